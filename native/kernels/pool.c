/* Pooling over windows of planes. */
#include <math.h>
#include <stdbool.h>

#include "planes.h"
#include "reach.h"
#include "simd.h"

/* Any window: output pixels are made in strips: the input columns that a strip reads, folded over the rows of the window, then over
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

/* Small square windows, K x K at stride S, undilated: R output rows at once, each input row folded along the window once
 * for all rows that it meets. Lanes outside the image hold what changes nothing. */

/* how many taps at places at, at + 1, ... at + K - 1 count for a mean: in the image, or in the padded image */
ESP_INLINE int64_t counted(int64_t at, int K, int64_t size, int64_t pad, int64_t kind)
{
    const int64_t low = kind == 1 ? -pad : 0, high = kind == 1 ? size + pad : size;
    return larger(1, smaller(at + K, high) - larger(at, low));
}

ESP_INLINE vec fold_two(vec a, vec b, const bool sum) { return sum ? a + b : larger_or_nan(a, b); }

ESP_INLINE void pool_band(const int K, const int S, const int R, const bool sum, const esp_step *s, const float *plane,
    float *out, int64_t y)
{
    const int64_t *p = s->param, width = s->a.size[3], height = s->a.size[2], row_stride = s->a.stride[2];
    const int64_t out_width = s->out.size[3], out_stride = s->out.stride[2], kind = p[POOL_KIND];
    const int64_t pad_x = p[POOL_PAD_X], pad_y = p[POOL_PAD_Y], top = y * S - pad_y;
    const int lines = (R - 1) * S + K, loads = S == 1 ? K : 2 * ((K + 1) / 2);
    const vec nothing = splat(sum ? 0.0f : -INFINITY);
    for (int64_t x = 0; x < out_width; x += ESP_WIDTH) {
        const int count = out_width - x < ESP_WIDTH ? (int)(out_width - x) : ESP_WIDTH;
        const int64_t left = x * S - pad_x, right = left + (S == 1 ? ESP_WIDTH + K - 1 : 2 * ESP_WIDTH + loads - 2);
        const bool inner = left >= 0 && right <= width;
        reach reaches[8];
        vec acc[8];
#pragma GCC unroll 8
        for (int l = 0; l < loads; l++)
            reaches[l] = reach_of(left + (S == 1 ? l : l / 2 * 2 + l % 2 * ESP_WIDTH), width);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = nothing;
#pragma GCC unroll 16
        for (int i = 0; i < lines; i++) {
            if (top + i < 0 || top + i >= height) continue;
            const float *from = plane + (top + i) * row_stride;
            vec raw[8], folded;
            if (i >= K - S) /* what the next band reads of this column, and nobody has read yet */
                for (int v = 0; v < S; v++) __builtin_prefetch(from + R * S * row_stride + left + v * ESP_WIDTH);
            if (inner)
                for (int l = 0; l < loads; l++) raw[l] = load(from + reaches[l].at);
            else
                for (int l = 0; l < loads; l++)
                    raw[l] = choose_lanes(reaches[l].inside, load_lanes(from + reaches[l].at, reaches[l].inside), nothing);
            folded = S == 1 ? raw[0] : even(raw[0], raw[1]);
#pragma GCC unroll 8
            for (int k = 1; k < K; k++)
                folded = fold_two(folded, S == 1 ? raw[k] : k % 2 ? odd(raw[k - 1], raw[k]) : even(raw[k], raw[k + 1]), sum);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                if (i >= r * S && i < r * S + K) acc[r] = fold_two(acc[r], folded, sum);
        }
        vec across = splat((float)K);
        if (sum && (left < 0 || (x + count - 1) * S - pad_x + K > width))
            for (int l = 0; l < count; l++) across[l] = (float)counted((x + l) * S - pad_x, K, width, pad_x, kind);
        for (int r = 0; r < R; r++) {
            float *to = out + (y + r) * out_stride + x;
            if (sum) acc[r] = acc[r] / (across * (float)counted(top + r * S, K, height, pad_y, kind));
            if (count == ESP_WIDTH)
                store(to, acc[r]);
            else
                store_part(to, acc[r], count);
        }
    }
}

typedef void (*band_function)(const esp_step *, const float *, float *, int64_t);

#define BAND(K, S, R) \
    static void largest_##K##_##S##_##R(const esp_step *s, const float *plane, float *out, int64_t y) \
    { \
        pool_band(K, S, R, false, s, plane, out, y); \
    } \
    static void mean_##K##_##S##_##R(const esp_step *s, const float *plane, float *out, int64_t y) \
    { \
        pool_band(K, S, R, true, s, plane, out, y); \
    }
#define BANDS(K, S) BAND(K, S, 1) BAND(K, S, 4)
BANDS(2, 1)
BANDS(2, 2)
BANDS(3, 1)
BANDS(3, 2)
BANDS(5, 1)

#define ROW(K, S) {K, S, {{largest_##K##_##S##_1, largest_##K##_##S##_4}, {mean_##K##_##S##_1, mean_##K##_##S##_4}}}
static const struct {
    int64_t window, stride;
    band_function functions[2][2]; /* largest or mean; one row or four */
} bands[] = {ROW(2, 1), ROW(2, 2), ROW(3, 1), ROW(3, 2), ROW(5, 1)};

/* Vectors of the last lanes may be read beside the rows where there are no masked loads: only arenas have room there. */
static const band_function *bands_for(const esp_step *s)
{
    const int64_t *p = s->param;
    const bool square = p[POOL_WINDOW_Y] == p[POOL_WINDOW_X] && p[POOL_STRIDE_Y] == p[POOL_STRIDE_X];
    const bool dilated = p[POOL_DILATION_Y] != 1 || p[POOL_DILATION_X] != 1;
    const bool rows = s->a.stride[3] == 1 && s->out.stride[3] == 1 && (ESP_WIDTH >= 8 || s->a.space == ESP_ARENA);
    for (size_t i = 0; square && !dilated && rows && i < sizeof bands / sizeof *bands; i++)
        if (bands[i].window == p[POOL_WINDOW_Y] && bands[i].stride == p[POOL_STRIDE_Y])
            return bands[i].functions[p[POOL_KIND] != 0];
    return NULL;
}

void ESP_NAME(pool)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(&s->a, f);
    const int64_t width = s->out.size[3], spare = STRIP - 1 - (s->param[POOL_WINDOW_X] - 1) * s->param[POOL_DILATION_X];
    const int64_t strip = spare / s->param[POOL_STRIDE_X] + 1;
    const band_function *small = bands_for(s);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    plane_row r = first_row(&s->out, &p);
    for (int64_t left = rows_of(&p), rows; left > 0; left -= rows) {
        const float *plane = in + r.c * s->a.stride[1];
        float *to = out + r.c * s->out.stride[1];
        rows = small && p.last_row - r.y >= 4 ? 4 : 1;
        if (small)
            small[rows == 4](s, plane, to, r.y);
        else
            for (int64_t x = 0; x < width; x += strip)
                pool_strip(s, plane, to + r.y * s->out.stride[2], r.y, x, smaller(strip, width - x));
        for (int64_t k = 0; k < rows; k++, next_row(&s->out, &p, &r)) zero_margin(s, out, r.c, r.y);
    }
}

/* the sum of `count` floats that lie side by side */
ESP_INLINE vec sum_run(vec sum, const float *p, int64_t count)
{
    vec more[3] = {{0}, {0}, {0}};
    int64_t k = 0;
    for (; k + 4 * ESP_WIDTH <= count; k += 4 * ESP_WIDTH) {
        sum += load(p + k);
        for (int u = 0; u < 3; u++) more[u] += load(p + k + (u + 1) * ESP_WIDTH);
    }
    sum += (more[0] + more[1]) + more[2];
    for (; k + ESP_WIDTH <= count; k += ESP_WIDTH) sum += load(p + k);
    return k < count ? sum + load_part(p + k, (int)(count - k)) : sum;
}

/* means over windows that divide the plane as evenly as they can */
void ESP_NAME(adaptive)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a, *o = &s->out;
    const bool whole = o->size[2] == 1 && o->size[3] == 1, rows = a->stride[3] == 1;
    const bool run = whole && rows && (a->stride[2] == a->size[3] || a->size[2] == 1); /* a plane is one run */
    float *out = esp_target(o, f);
    const float *in = esp_source(a, f);
    const patch p = share_planes(o, part, parts, by_rows(o));
    plane_row r = first_row(o, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(o, &p, &r)) {
        const float *plane = in + r.c * a->stride[1];
        float *to = out + place(o, r);
        const int64_t y0 = whole ? 0 : r.y * a->size[2] / o->size[2];
        const int64_t y1 = whole ? a->size[2] : ((r.y + 1) * a->size[2] + o->size[2] - 1) / o->size[2];
        for (int64_t x = 0; x < o->size[3]; x++) {
            const int64_t x0 = whole ? 0 : x * a->size[3] / o->size[3];
            const int64_t x1 = whole ? a->size[3] : ((x + 1) * a->size[3] + o->size[3] - 1) / o->size[3];
            vec sum = {0};
            float total = 0;
            if (run)
                sum = sum_run(sum, plane, a->size[2] * a->size[3]);
            else if (rows && x1 - x0 >= 8)
                for (int64_t y = y0; y < y1; y++) sum = sum_run(sum, plane + y * a->stride[2] + x0, x1 - x0);
            else
                for (int64_t y = y0; y < y1; y++)
                    for (int64_t k = x0; k < x1; k++) total += plane[y * a->stride[2] + k * a->stride[3]];
            to[x * o->stride[3]] = (sum_lanes(sum) + total) / (float)((y1 - y0) * (x1 - x0));
        }
        zero_margin(s, out, r.c, r.y);
    }
}
