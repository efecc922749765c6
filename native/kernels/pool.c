/* Pooling over windows of planes. */
#include <math.h>

#include "planes.h"
#include "simd.h"

enum { WIDEST = 2048 };

typedef struct {
    int64_t begin, end;
} range;

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* taps k of a window that lie in the image: 0 <= at + k * dilation < size */
static range inside(int64_t at, int64_t window, int64_t dilation, int64_t size)
{
    range r = {at < 0 ? (-at + dilation - 1) / dilation : 0, 0};
    r.end = at >= size ? 0 : smaller(window, (size - 1 - at) / dilation + 1);
    return r;
}

/* column maxima or sums over the rows of the window, so that what is left is one row */
ESP_INLINE void fold_rows(float *folded, const float *top, int64_t row, range k, int64_t step, int64_t width, int sum)
{
    for (int64_t x = 0; x < width; x++) folded[x] = sum ? 0.0f : -INFINITY;
    for (int64_t i = k.begin; i < k.end; i++) {
        const float *line = top + i * step * row;
        if (sum)
            for (int64_t x = 0; x < width; x++) folded[x] += line[x];
        else
            for (int64_t x = 0; x < width; x++) folded[x] = line[x] > folded[x] || line[x] != line[x] ? line[x] : folded[x];
    }
}

/* one output row */
static void pool_row(const esp_step *s, const float *plane, float *to, int64_t y)
{
    const int64_t *p = s->param, width = s->a.size[3], unit = s->a.stride[3];
    const int sum = p[POOL_KIND] != 0;
    const int64_t top = y * p[POOL_STRIDE_Y] - p[POOL_PAD_Y];
    const range ky = inside(top, p[POOL_WINDOW_Y], p[POOL_DILATION_Y], s->a.size[2]);
    const int64_t tall = smaller(top + p[POOL_WINDOW_Y], s->a.size[2] + p[POOL_PAD_Y]) - top;
    float folded[WIDEST];
    const int folds = unit == 1 && width <= WIDEST && ky.end > ky.begin;
    /* the first row of the window may lie above the plane; only rows that exist are touched */
    const float *first = plane + (ky.end > ky.begin ? (top + ky.begin * p[POOL_DILATION_Y]) * s->a.stride[2] : 0);
    const range rows = {0, larger(0, ky.end - ky.begin)};
    if (folds) fold_rows(folded, first, s->a.stride[2], rows, p[POOL_DILATION_Y], width, sum);
    for (int64_t x = 0; x < s->out.size[3]; x++) {
        const int64_t left = x * p[POOL_STRIDE_X] - p[POOL_PAD_X], dilation = p[POOL_DILATION_X];
        const range kx = inside(left, p[POOL_WINDOW_X], dilation, width);
        float result = sum ? 0.0f : -INFINITY;
        for (int64_t k = kx.begin; k < kx.end; k++) {
            const int64_t at = left + k * dilation;
            for (int64_t i = 0; i < (folds ? 1 : rows.end); i++) {
                float v = folds ? folded[at] : first[i * p[POOL_DILATION_Y] * s->a.stride[2] + at * unit];
                result = sum ? result + v : v > result || v != v ? v : result;
            }
        }
        if (p[POOL_KIND] == 1)
            result /= (float)(tall * (smaller(left + p[POOL_WINDOW_X], width + p[POOL_PAD_X]) - left));
        if (p[POOL_KIND] == 2) result /= (float)larger(1, rows.end * larger(0, kx.end - kx.begin));
        to[x * s->out.stride[3]] = result;
    }
}

void ESP_NAME(pool)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(&s->a, f);
    int64_t begin, end;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        pool_row(s, in + r.c * s->a.stride[1], out + place(&s->out, r), r.y);
        zero_margin(s, out, r.c, r.y);
    }
}

/* means over windows that divide the plane as evenly as they can */
void ESP_NAME(adaptive)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a, *o = &s->out;
    float *out = esp_target(o, f);
    const float *in = esp_source(a, f);
    int64_t begin, end;
    share(rows_of(o), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(o, i);
        const int64_t y0 = r.y * a->size[2] / o->size[2];
        const int64_t y1 = ((r.y + 1) * a->size[2] + o->size[2] - 1) / o->size[2];
        for (int64_t x = 0; x < o->size[3]; x++) {
            const int64_t x0 = x * a->size[3] / o->size[3];
            const int64_t x1 = ((x + 1) * a->size[3] + o->size[3] - 1) / o->size[3];
            float sum[8] = {0};
            for (int64_t y = y0; y < y1; y++) {
                const float *row = in + r.c * a->stride[1] + y * a->stride[2];
                for (int64_t k = x0; k < x1; k++) sum[(k - x0) % 8] += row[k * a->stride[3]];
            }
            float total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
            out[place(o, r) + x * o->stride[3]] = total / (float)((y1 - y0) * (x1 - x0));
        }
        zero_margin(s, out, r.c, r.y);
    }
}
