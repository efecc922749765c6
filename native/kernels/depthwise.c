/* Depthwise convolution: every output channel has one window of its own over one input channel.
 *
 * Planes are read as they lie, without margins: lanes outside the image are masked at the ends of a row, rows outside it
 * are skipped. Square windows of the usual sizes at stride 1 and 2 make some output rows at once, so that an input
 * vector is loaded once for all rows that it meets; every other window takes the general way. An output is the sum of its
 * taps in the order of the window whichever way it is made, so results do not depend on tile or thread. */
#include <math.h>
#include <stdbool.h>

#include "activate.h"
#include "planes.h"
#include "reach.h"
#include "simd.h"

/* One output channel, and what of the step every row of it needs. */
typedef struct {
    const esp_step *step;
    const float *in, *residual, *weights;
    float *out;
    float bias;
} channel;

/* What follows a sum: limits that leave it as it is where there is no activation, or an activation that is called for. */
typedef struct {
    vec low, high;
    float a, b;
    int kind; /* ESP_LINEAR_ACT: the limits are all */
} ending;

ESP_INLINE ending ending_of(const esp_step *s)
{
    const bool clamp = s->activation == ESP_CLAMP, none = s->activation == ESP_LINEAR_ACT;
    return (ending){splat(clamp ? s->act_a : -INFINITY), splat(clamp ? s->act_b : INFINITY), s->act_a, s->act_b,
        clamp || none ? ESP_LINEAR_ACT : s->activation};
}

/* `count` pixels of R rows of output; the compiler would keep the places of all rows if it could see them */
ESP_INLINE void finish(const int R, vec *acc, const ending *e, float *to, int64_t stride, const float *residual,
    int64_t residual_stride, int count)
{
    if (residual) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++, residual += residual_stride)
            acc[r] += count == ESP_WIDTH ? load(residual) : load_lanes(residual, lanes_between(0, count));
    }
    if (e->kind == ESP_LINEAR_ACT) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = vmin(e->high, vmax(e->low, acc[r]));
    } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = activate(acc[r], e->kind, e->a, e->b);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++, to += stride) {
        if (count == ESP_WIDTH)
            store(to, acc[r]);
        else
            store_part(to, acc[r], count);
        ESP_HIDE(to);
    }
}

/* Rows y..y+R for a K x K window at stride S. */
ESP_INLINE void band(const int K, const int S, const int R, const channel *c, int64_t y)
{
    /* copies: the compiler must believe that stores change what lies behind pointers */
    const esp_step *s = c->step;
    const int64_t width = s->a.size[3], row_stride = s->a.stride[2], out_width = s->out.size[3];
    const int64_t out_stride = s->out.stride[2], residual_stride = s->b.stride[2], pad = s->param[DEPTHWISE_PAD_X];
    const int64_t top = y * S - s->param[DEPTHWISE_PAD_Y], rest = s->a.size[2] - top;
    const float *residual = c->residual ? c->residual + y * residual_stride : NULL, *in = c->in + top * row_stride;
    float *out = c->out + y * out_stride;
    const ending e = ending_of(s);
    const int lines = (R - 1) * S + K, first = top < 0 ? (top < -lines ? lines : (int)-top) : 0;
    const int last = rest < lines ? (rest < 0 ? 0 : (int)rest) : lines; /* lines first..last - 1 lie in the image */
    const int loads = S == 1 ? K : 2 * ((K + 1) / 2); /* stride 2: pairs of vectors give an even and an odd tap */
    const bool whole = first == 0 && last == lines;
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
        const float *line = in;
        vec acc[8];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r] = bias;
#define LINES(EDGE, LOAD) \
    _Pragma("GCC unroll 24") for (int i = 0; i < lines; i++) \
    { \
        if (!EDGE || (i >= first && i < last)) { \
            vec raw[8], taps[8]; \
            _Pragma("GCC unroll 8") for (int l = 0; l < loads; l++) \
            { \
                raw[l] = LOAD; \
                if (K == 3) ESP_KEEP(raw[l]); \
            } \
            _Pragma("GCC unroll 8") for (int k = 0; k < K; k++) taps[k] = \
                S == 1 ? raw[k] : k % 2 ? odd(raw[k - 1], raw[k]) : even(raw[k], raw[k + 1]); \
            _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) \
            { \
                if (i < r * S || i >= r * S + K) continue; \
                _Pragma("GCC unroll 8") for (int k = 0; k < K; k++) acc[r] += w[(i - r * S) * K + k] * taps[k]; \
            } \
        } \
        line += row_stride; \
        ESP_HIDE(line); \
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
        finish(R, acc, &e, out + x, out_stride, residual ? residual + x : NULL, residual_stride, count);
    }
}

typedef void (*row_function)(const channel *, int64_t y);

/* The general way: a row of any window. */
static void row_of_any(const channel *c, int64_t y)
{
    const esp_step *s = c->step;
    const int64_t *p = s->param, stride = p[DEPTHWISE_STRIDE_X], width = s->a.size[3];
    const ending e = ending_of(s);
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
        finish(1, &acc, &e, c->out + y * s->out.stride[2] + x, 0,
            c->residual ? c->residual + y * s->b.stride[2] + x : NULL, 0, (int)count);
    }
}

#define ROW(K, S, R) \
    static void row_##K##_##S##_##R(const channel *c, int64_t y) { band(K, S, R, c, y); }
#define ROWS(K, S) ROW(K, S, 1) ROW(K, S, 2) ROW(K, S, 4)
ROWS(3, 1) ROW(3, 1, 7)
ROWS(3, 2) ROW(3, 2, 7)
ROWS(5, 1) ROW(5, 1, 7)
ROWS(5, 2)
ROWS(7, 1)
ROWS(7, 2)

/* Windows that have functions of their own, by the number of rows that they make at once. */
typedef struct {
    int64_t window, stride;
    row_function rows[8];
} window_row;

#define FOUR(K, S) {NULL, row_##K##_##S##_1, row_##K##_##S##_2, NULL, row_##K##_##S##_4, NULL, NULL, NULL}
#define SEVEN(K, S) {NULL, row_##K##_##S##_1, row_##K##_##S##_2, NULL, row_##K##_##S##_4, NULL, NULL, row_##K##_##S##_7}
static const window_row windows[] = {
    {3, 1, SEVEN(3, 1)}, {3, 2, SEVEN(3, 2)}, {5, 1, SEVEN(5, 1)}, {5, 2, FOUR(5, 2)}, {7, 1, FOUR(7, 1)},
    {7, 2, FOUR(7, 2)},
};
static const window_row any_window = {0, 0, {NULL, row_of_any, NULL, NULL, NULL, NULL, NULL, NULL}};

static const window_row *functions_for(const int64_t *p)
{
    const bool square = p[DEPTHWISE_WINDOW_Y] == p[DEPTHWISE_WINDOW_X] && p[DEPTHWISE_STRIDE_Y] == p[DEPTHWISE_STRIDE_X];
    const bool dilated = p[DEPTHWISE_DILATION_Y] != 1 || p[DEPTHWISE_DILATION_X] != 1;
    for (size_t i = 0; square && !dilated && i < sizeof windows / sizeof *windows; i++)
        if (windows[i].window == p[DEPTHWISE_WINDOW_Y] && windows[i].stride == p[DEPTHWISE_STRIDE_Y]) return &windows[i];
    return &any_window;
}

/* The tallest band of at most `left` rows. */
ESP_INLINE int64_t band_height(const window_row *w, int64_t left)
{
    int64_t rows = left < 7 ? left : 7;
    while (!w->rows[rows]) rows--;
    return rows;
}

void ESP_NAME(depthwise)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const int64_t *p = s->param, taps = p[DEPTHWISE_WINDOW_Y] * p[DEPTHWISE_WINDOW_X];
    const float *in = esp_source(&s->a, f), *residual = s->b.space ? esp_source(&s->b, f) : NULL;
    float *out = esp_target(&s->out, f);
    const window_row *functions = functions_for(p);
    const patch own = share_planes(&s->out, part, parts, false);
    for (int64_t number = own.plane; number < own.last_plane; number++) {
        const int64_t source = p[DEPTHWISE_MULTIPLIER] == 1 ? number : number / p[DEPTHWISE_MULTIPLIER];
        const channel c = {s, in + source * s->a.stride[1], residual ? residual + number * s->b.stride[1] : NULL,
            s->values + number * taps, out + number * s->out.stride[1], s->bias ? s->bias[number] : 0.0f};
        for (int64_t y = own.row, rows; y < own.last_row; y += rows) {
            rows = band_height(functions, own.last_row - y);
            functions->rows[rows](&c, y);
            for (int64_t k = y; s->margins && k < y + rows; k++) zero_margin(s, out, number, k);
        }
    }
}
