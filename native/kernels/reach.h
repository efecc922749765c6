/* Rows of an image read past their ends: which lanes of a vector lie inside. */
#ifndef ESP_REACH_H
#define ESP_REACH_H

#include "simd.h"

/* Floats of an image row from `at` on, of which `inside` lie in the image. */
typedef struct {
    int64_t at;
    lanes inside;
} reach;

/* ESP_WIDTH floats from place `at` of a row of `width`, which may be outside on either side */
ESP_INLINE reach reach_of(int64_t at, int64_t width)
{
    int64_t low = at < 0 ? -at : 0, high = width - at;
    if (high > ESP_WIDTH) high = ESP_WIDTH;
    if (low >= high) return (reach){0, lanes_between(0, 0)}; /* nothing is read: any place will do */
    return (reach){at, lanes_between((int)low, (int)high)};
}

/* Of the places at, at + step, at + 2 * step, ... those in a row of `width`. */
ESP_INLINE lanes reach_by(int64_t at, int step, int64_t width)
{
    const int64_t low = at < 0 ? (step - 1 - at) / step : 0, high = at < width ? (width - at + step - 1) / step : 0;
    if (low >= high || low > ESP_WIDTH) return lanes_between(0, 0);
    return lanes_between((int)low, high < ESP_WIDTH ? (int)high : ESP_WIDTH);
}

#endif
