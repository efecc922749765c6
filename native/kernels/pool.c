/* Pooling over windows of planes. */
#include <math.h>

#include "planes.h"
#include "simd.h"

/* Output pixels are made in strips: the input columns that a strip reads, folded over the rows of the window, then over
 * its columns at every position, of which the stride picks some. The first two are vectors. */
enum { STRIP = 4096 };

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* taps k of a window that lie in the image: 0 <= at + k * dilation < size */
typedef struct {
    int64_t begin, end;
} range;

static range inside(int64_t at, int64_t window, int64_t dilation, int64_t size)
{
    range r = {at < 0 ? (-at + dilation - 1) / dilation : 0, 0};
    r.end = at >= size ? 0 : smaller(window, (size - 1 - at) / dilation + 1);
    r.begin = smaller(r.begin, r.end);
    return r;
}

/* the larger; NaN if either is */
ESP_INLINE vec larger_or_nan(vec a, vec b) { return choose(a == a, vmax(a, b), a); }

/* into[x] = into[x] + from[x], or the larger of them; both may be read and written up to the next whole vector */
ESP_INLINE void fold(float *into, const float *from, int64_t count, int sum)
{
    for (int64_t x = 0; x < count; x += ESP_WIDTH) {
        vec a = load(into + x), b = load(from + x);
        store(into + x, sum ? a + b : larger_or_nan(a, b));
    }
}

/* the same for a line of the image, of which no more than `count` floats may be read */
ESP_INLINE void fold_line(float *into, const float *line, int64_t unit, int64_t count, int sum)
{
    int64_t x = 0;
    if (unit == 1) {
        x = count / ESP_WIDTH * ESP_WIDTH;
        fold(into, line, x, sum);
    }
    for (; x < count; x++) {
        float b = line[x * unit];
        into[x] = sum ? into[x] + b : b > into[x] || b != b ? b : into[x];
    }
}

/* outputs first..first+count of row y */
static void pool_strip(const esp_step *s, const float *plane, float *to, int64_t y, int64_t first, int64_t count)
{
    const int64_t *p = s->param, width = s->a.size[3], unit = s->a.stride[3], dilation = p[POOL_DILATION_X];
    const int sum = p[POOL_KIND] != 0;
    const int64_t top = y * p[POOL_STRIDE_Y] - p[POOL_PAD_Y], left = first * p[POOL_STRIDE_X] - p[POOL_PAD_X];
    const range ky = inside(top, p[POOL_WINDOW_Y], p[POOL_DILATION_Y], s->a.size[2]);
    const int64_t positions = (count - 1) * p[POOL_STRIDE_X] + 1;
    const int64_t reach = positions + (p[POOL_WINDOW_X] - 1) * dilation;
    /* reach is at most STRIP; folding goes on to the next whole vector */
    float columns[STRIP + 2 * ESP_WIDTH], folded[STRIP + 2 * ESP_WIDTH];
    for (int64_t x = 0; x < reach + 2 * ESP_WIDTH; x++) columns[x] = sum ? 0.0f : -INFINITY;
    const int64_t from = larger(0, left), upto = smaller(width, left + reach);
    for (int64_t k = ky.begin; k < ky.end && from < upto; k++) {
        const float *line = plane + (top + k * p[POOL_DILATION_Y]) * s->a.stride[2] + from * unit;
        fold_line(columns + (from - left), line, unit, upto - from, sum);
    }
    memcpy(folded, columns, (size_t)(positions + ESP_WIDTH) * sizeof *folded);
    for (int64_t k = 1; k < p[POOL_WINDOW_X]; k++) fold(folded, columns + k * dilation, positions, sum);
    const int64_t tall = smaller(top + p[POOL_WINDOW_Y], s->a.size[2] + p[POOL_PAD_Y]) - top;
    for (int64_t x = 0; x < count; x++) {
        const int64_t at = left + x * p[POOL_STRIDE_X];
        float result = folded[x * p[POOL_STRIDE_X]];
        if (p[POOL_KIND] == 1) {
            result /= (float)(tall * (smaller(at + p[POOL_WINDOW_X], width + p[POOL_PAD_X]) - at));
        } else if (p[POOL_KIND] == 2) {
            const range kx = inside(at, p[POOL_WINDOW_X], dilation, width);
            result /= (float)larger(1, (ky.end - ky.begin) * (kx.end - kx.begin));
        }
        to[(first + x) * s->out.stride[3]] = result;
    }
}

void ESP_NAME(pool)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(&s->a, f);
    int64_t begin, end;
    const int64_t width = s->out.size[3], spare = STRIP - 1 - (s->param[POOL_WINDOW_X] - 1) * s->param[POOL_DILATION_X];
    const int64_t strip = spare / s->param[POOL_STRIDE_X] + 1;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        for (int64_t x = 0; x < width; x += strip)
            pool_strip(s, in + r.c * s->a.stride[1], out + place(&s->out, r), r.y, x, smaller(strip, width - x));
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
