/* Depthwise convolution: every output channel has one window of its own over one input channel.
 *
 * Planes are read as they lie, without margins: lanes outside the image are masked at the ends of a row, rows outside it
 * are skipped. Square windows of the usual sizes at stride 1 and 2 make some output rows at once, so that an input
 * vector is loaded once for all rows that it meets; every other window takes the general way. An output is the sum of its
 * taps in the order of the window whichever way it is made, so results do not depend on tile or thread. */
#include <stdbool.h>

#include "activate.h"
#include "planes.h"
#include "simd.h"

/* One output channel, and what of the step every row of it needs. */
typedef struct {
    const esp_step *step;
    const float *in, *residual, *weights;
    float *out;
    float bias;
} channel;

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

/* `count` pixels of output */
ESP_INLINE void finish(vec sum, float *to, const float *residual, int kind, float a, float b, int count)
{
    if (residual) sum += count == ESP_WIDTH ? load(residual) : load_lanes(residual, lanes_between(0, count));
    sum = activate(sum, kind, a, b);
    if (count == ESP_WIDTH)
        store(to, sum);
    else
        store_part(to, sum, count);
}

/* Rows y..y+R for a K x K window at stride S. */
ESP_INLINE void band(const int K, const int S, const int R, const channel *c, int64_t y)
{
    /* copies: the compiler must believe that stores change what lies behind pointers */
    const esp_step *s = c->step;
    const int64_t width = s->a.size[3], row_stride = s->a.stride[2], out_width = s->out.size[3];
    const int64_t out_stride = s->out.stride[2], residual_stride = s->b.stride[2], pad = s->param[DEPTHWISE_PAD_X];
    const int64_t top = y * S - s->param[DEPTHWISE_PAD_Y], height = s->a.size[2];
    const float *residual = c->residual ? c->residual + y * residual_stride : NULL, *in = c->in + top * row_stride;
    float *out = c->out + y * out_stride;
    const float a = s->act_a, b = s->act_b;
    const int kind = s->activation, lines = (R - 1) * S + K;
    const int loads = S == 1 ? K : 2 * ((K + 1) / 2); /* stride 2: pairs of vectors give an even and an odd tap */
    const bool whole = top >= 0 && top + lines <= height;
    vec w[49];
#pragma GCC unroll 49
    for (int k = 0; k < K * K; k++) {
        w[k] = splat(c->weights[k]);
        if (K == 3) ESP_KEEP(w[k]);
    }
    const vec bias = splat(c->bias);
    for (int64_t x = 0; x < out_width; x += ESP_WIDTH) {
        const int count = out_width - x < ESP_WIDTH ? (int)(out_width - x) : ESP_WIDTH;
        const int64_t left = x * S - pad, right = left + (S == 1 ? ESP_WIDTH + K - 1 : 2 * ESP_WIDTH + loads - 2);
        vec acc[8];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = bias;
#define LINES(EDGE, LOAD) \
    _Pragma("GCC unroll 24") for (int i = 0; i < lines; i++) \
    { \
        if (EDGE && (top + i < 0 || top + i >= height)) continue; \
        const float *line = in + i * row_stride; \
        vec raw[8], taps[8]; \
        _Pragma("GCC unroll 8") for (int l = 0; l < loads; l++) raw[l] = LOAD; \
        _Pragma("GCC unroll 8") for (int k = 0; k < K; k++) taps[k] = \
            S == 1 ? raw[k] : k % 2 ? odd(raw[k - 1], raw[k]) : even(raw[k], raw[k + 1]); \
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) \
        { \
            if (i < r * S || i >= r * S + K) continue; \
            _Pragma("GCC unroll 8") for (int k = 0; k < K; k++) acc[r] += w[(i - r * S) * K + k] * taps[k]; \
        } \
    }
        if (whole && left >= 0 && right <= width) {
            LINES(false, load(line + left + (S == 1 ? l : l / 2 * 2 + l % 2 * ESP_WIDTH)))
        } else {
            reach reaches[8];
#pragma GCC unroll 8
            for (int l = 0; l < loads; l++)
                reaches[l] = reach_of(left + (S == 1 ? l : l / 2 * 2 + l % 2 * ESP_WIDTH), width);
            LINES(true, load_lanes(line + reaches[l].at, reaches[l].inside))
        }
#undef LINES
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            finish(acc[r], out + r * out_stride + x, residual ? residual + r * residual_stride + x : NULL, kind, a, b,
                count);
    }
}

typedef void (*row_function)(const channel *, int64_t y);

/* The general way: a row of any window. */
static void row_of_any(const channel *c, int64_t y)
{
    const esp_step *s = c->step;
    const int64_t *p = s->param, stride = p[DEPTHWISE_STRIDE_X], width = s->a.size[3];
    for (int64_t x = 0; x < s->out.size[3]; x += ESP_WIDTH) {
        const int64_t count = s->out.size[3] - x < ESP_WIDTH ? s->out.size[3] - x : ESP_WIDTH;
        vec acc = splat(c->bias);
        for (int64_t i = 0; i < p[DEPTHWISE_WINDOW_Y]; i++) {
            const int64_t from = y * p[DEPTHWISE_STRIDE_Y] - p[DEPTHWISE_PAD_Y] + i * p[DEPTHWISE_DILATION_Y];
            if (from < 0 || from >= s->a.size[2]) continue;
            const float *line = c->in + from * s->a.stride[2], *weights = c->weights + i * p[DEPTHWISE_WINDOW_X];
            for (int64_t k = 0; k < p[DEPTHWISE_WINDOW_X]; k++) {
                const int64_t at = x * stride - p[DEPTHWISE_PAD_X] + k * p[DEPTHWISE_DILATION_X];
                vec pixels = {0};
                if (stride == 1) {
                    const reach r = reach_of(at, width);
                    pixels = load_lanes(line + r.at, r.inside);
                } else {
                    for (int64_t l = 0; l < count; l++)
                        if (at + l * stride >= 0 && at + l * stride < width) pixels[l] = line[at + l * stride];
                }
                acc += splat(weights[k]) * pixels;
            }
        }
        finish(acc, c->out + y * s->out.stride[2] + x, c->residual ? c->residual + y * s->b.stride[2] + x : NULL,
            s->activation, s->act_a, s->act_b, (int)count);
    }
}

#define ROW(K, S, R) \
    static void row_##K##_##S##_##R(const channel *c, int64_t y) { band(K, S, R, c, y); }
#define ROWS(K, S) \
    ROW(K, S, 1) ROW(K, S, 2) ROW(K, S, 3) ROW(K, S, 4) ROW(K, S, 5) ROW(K, S, 6) ROW(K, S, 7) \
    static const row_function rows_##K##_##S[] = {row_##K##_##S##_1, row_##K##_##S##_2, row_##K##_##S##_3, \
        row_##K##_##S##_4, row_##K##_##S##_5, row_##K##_##S##_6, row_##K##_##S##_7};
ROWS(3, 1)
ROWS(3, 2)
ROWS(5, 1)
ROWS(5, 2)
ROWS(7, 1)
ROWS(7, 2)
static const row_function rows_any[] = {row_of_any};

/* Windows that have tiles of their own: functions for 1..tallest rows at once. */
static const struct {
    int64_t window, stride;
    const row_function *rows;
    int64_t tallest;
} windows[] = {
    {3, 1, rows_3_1, 7},
    {3, 2, rows_3_2, 7},
    {5, 1, rows_5_1, 7},
    {5, 2, rows_5_2, 4},
    {7, 1, rows_7_1, 4},
    {7, 2, rows_7_2, 4},
};

static const row_function *functions_for(const int64_t *p, int64_t *tallest)
{
    const bool square = p[DEPTHWISE_WINDOW_Y] == p[DEPTHWISE_WINDOW_X] && p[DEPTHWISE_STRIDE_Y] == p[DEPTHWISE_STRIDE_X];
    for (size_t i = 0; square && i < sizeof windows / sizeof *windows; i++) {
        if (windows[i].window != p[DEPTHWISE_WINDOW_Y] || windows[i].stride != p[DEPTHWISE_STRIDE_Y]) continue;
        if (p[DEPTHWISE_DILATION_Y] != 1 || p[DEPTHWISE_DILATION_X] != 1) continue;
        *tallest = windows[i].tallest;
        return windows[i].rows;
    }
    *tallest = 1;
    return rows_any;
}

void ESP_NAME(depthwise)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const int64_t *p = s->param, taps = p[DEPTHWISE_WINDOW_Y] * p[DEPTHWISE_WINDOW_X], height = s->out.size[2];
    const float *in = esp_source(&s->a, f), *residual = s->b.space ? esp_source(&s->b, f) : NULL;
    float *out = esp_target(&s->out, f);
    int64_t tallest, begin, end;
    const row_function *functions = functions_for(p, &tallest);
    const int64_t bands = (height + tallest - 1) / tallest, each = (height + bands - 1) / bands; /* all but the last */
    share(s->out.size[1] * bands, part, parts, &begin, &end);
    int64_t number = begin / bands, band = begin % bands, top = band * each, source;
    for (int64_t i = begin; i < end; number++, band = 0, top = 0) {
        source = p[DEPTHWISE_MULTIPLIER] == 1 ? number : number / p[DEPTHWISE_MULTIPLIER];
        const channel c = {s, in + source * s->a.stride[1], residual ? residual + number * s->b.stride[1] : NULL,
            s->values + number * taps, out + number * s->out.stride[1], s->bias ? s->bias[number] : 0.0f};
        for (; band < bands && i < end; band++, i++) {
            const int64_t bottom = top + each < height ? top + each : height;
            functions[bottom - top - 1](&c, top);
            for (int64_t y = top; s->margins && y < bottom; y++) zero_margin(s, out, number, y);
            top = bottom;
        }
    }
}
