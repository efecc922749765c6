/* Depthwise convolution: every output channel has one window of its own over one input channel.
 *
 * Planes are read as they lie, without margins: at the ends of a row lanes outside the image are read, but not added; rows
 * outside it are skipped. Under square windows of the usual sizes at stride 1 and 2 the rows of a column of vectors pass
 * by, each loaded once and added to all rows of output that it meets; every other window takes the general way. An output
 * is the sum of its taps in the order of the window whichever way it is made, so results do not depend on tile or thread. */
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

/* A vector of a row of output: where in a line of the image its taps begin, and which of their lanes lie in the image. The
 * same for all rows and channels. edge: some lie outside, or it is no whole vector. */
typedef struct {
    int64_t x, from[8];
    int count;
    bool edge;
    lanes inside[8];
} span;

enum { SPANS = 16 };

/* Vectors a step needs of a line: stride 2 takes pairs, which give an even and an odd tap. */
ESP_INLINE int loads_of(const int K, const int S) { return S == 1 ? K : 2 * ((K + 1) / 2); }

/* The spans of a row from x on, at most SPANS, for K x K windows at stride S: how many. K is 0 for any other window. */
static int plan_spans(const esp_step *s, const int K, const int S, int64_t x, span *spans)
{
    const int64_t width = s->a.size[3], out_width = s->out.size[3], loads = loads_of(K, S);
    const int64_t behind = S == 1 ? ESP_WIDTH + K - 1 : 2 * ESP_WIDTH + loads - 2;
    int count = 0;
    for (; x < out_width && count < SPANS; x += ESP_WIDTH) {
        span *p = &spans[count++];
        const int64_t left = x * S - s->param[DEPTHWISE_PAD_X], rest = out_width - x;
        p->x = x;
        p->edge = left < 0 || left + behind > width;
        p->count = rest < ESP_WIDTH ? (int)rest : ESP_WIDTH;
        for (int l = 0; l < loads; l++) {
            const int64_t place = left + (S == 1 ? l : l / 2 * 2 + l % 2 * ESP_WIDTH);
            p->from[l] = p->edge ? reach_of(place, width).at : place;
        }
        for (int k = 0; k < K; k++) p->inside[k] = reach_by(left + k, S, width);
    }
    return count;
}

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

/* A row of output: `which` of its pixels count. plain: nothing is added, and the activation is a clamp. */
ESP_INLINE void finish(const bool plain, vec acc, const ending *e, float *to, const float *residual, int count)
{
    if (!plain && residual) acc += load_part(residual, count);
    acc = plain || e->kind == ESP_LINEAR_ACT ? vmin(e->high, vmax(e->low, acc)) : activate(acc, e->kind, e->a, e->b);
    if (count == ESP_WIDTH)
        store(to, acc);
    else
        store_part(to, acc, count);
}

enum { LINES_AHEAD = 4 }; /* which are fetched early, to be read and to be written */

/* Rows y..upto of a span, for a K x K window at stride S. The lines of the image pass by from the top, S in a step, and
 * each is added to all rows of output that it meets: acc[a] is the row that began a steps ago. */
ESP_INLINE void column(const int K, const int S, const bool edge, const bool plain, const channel *c, const ending *e,
    const vec *w, const span *p, int64_t y, int64_t upto)
{
    const esp_step *s = c->step;
    const int under_way = (K + S - 1) / S, loads = loads_of(K, S), count = edge ? p->count : ESP_WIDTH;
    const int64_t row_stride = s->a.stride[2], out_stride = s->out.stride[2], residual_stride = s->b.stride[2];
    const uint64_t height = (uint64_t)s->a.size[2];
    uint64_t at = (uint64_t)(y * S - s->param[DEPTHWISE_PAD_Y]); /* above the image it is more than any height */
    int64_t line = (int64_t)at * row_stride, steps = upto - y + under_way - 1, first = steps - under_way;
    const float *from[8], *residual = c->residual ? c->residual + y * residual_stride + p->x : NULL;
    float *to = c->out + y * out_stride + p->x;
    const vec bias = splat(c->bias);
    const ending end = *e;
    lanes inside[8];
#pragma GCC unroll 8
    for (int l = 0; l < loads; l++) from[l] = c->in + p->from[l];
#pragma GCC unroll 8
    for (int k = 0; k < K && edge; k++) inside[k] = p->inside[k];
    vec acc[8];
#pragma GCC unroll 8
    for (int a = 0; a < under_way; a++) acc[a] = bias;
    while (steps-- > 0) {
#pragma GCC unroll 2
        for (int j = 0; j < S; j++, at++, line += row_stride) {
            if (at >= height) continue;
            for (int l = 0; l < S; l++) __builtin_prefetch(from[l] + line + LINES_AHEAD * row_stride);
            vec raw[8], taps[8];
#pragma GCC unroll 8
            for (int l = 0; l < loads; l++) {
                raw[l] = load(from[l] + line);
                ESP_KEEP(raw[l]);
            }
#pragma GCC unroll 8
            for (int k = 0; k < K; k++)
                taps[k] = S == 1 ? raw[k] : k % 2 ? odd(raw[k - 1], raw[k]) : even(raw[k], raw[k + 1]);
#pragma GCC unroll 8
            for (int k = 0; k < K; k++) {
#pragma GCC unroll 8
                for (int a = 0; a < under_way; a++)
                    if (a * S + j >= K)
                        continue;
                    else if (edge)
                        acc[a] = add_product(inside[k], acc[a], w[(a * S + j) * K + k], taps[k]);
                    else
                        acc[a] += w[(a * S + j) * K + k] * taps[k];
            }
        }
        if (steps <= first) {
            __builtin_prefetch(to + LINES_AHEAD * out_stride, 1);
            finish(plain, acc[under_way - 1], &end, to, residual, count);
            to += out_stride;
            if (!plain && residual) residual += residual_stride;
        }
#pragma GCC unroll 8
        for (int a = under_way - 1; a > 0; a--) acc[a] = acc[a - 1];
        acc[0] = bias;
    }
}

/* Rows y..upto of all spans, for a K x K window at stride S. */
ESP_INLINE void window(
    const int K, const int S, const channel *c, const ending *e, const span *spans, int count, int64_t y, int64_t upto)
{
    const bool plain = !c->residual && e->kind == ESP_LINEAR_ACT;
    vec w[49];
#pragma GCC unroll 49
    for (int k = 0; k < K * K; k++) {
        w[k] = splat(c->weights[k]);
        if (K == 3) ESP_KEEP(w[k]);
    }
    for (const span *p = spans; p < spans + count; p++) {
        if (p->edge && plain)
            column(K, S, true, true, c, e, w, p, y, upto);
        else if (p->edge)
            column(K, S, true, false, c, e, w, p, y, upto);
        else if (plain)
            column(K, S, false, true, c, e, w, p, y, upto);
        else
            column(K, S, false, false, c, e, w, p, y, upto);
    }
}

typedef void (*rows_function)(
    const channel *c, const ending *e, const span *spans, int count, int64_t y, int64_t upto);

/* The general way: rows of any window, at all spans. */
static void rows_of_any(
    const channel *c, const ending *e, const span *spans, int spans_count, int64_t first, int64_t upto)
{
    const esp_step *s = c->step;
    const int64_t *p = s->param, stride = p[DEPTHWISE_STRIDE_X], width = s->a.size[3];
    for (int64_t y = first; y < upto; y++) {
        for (const span *n = spans; n < spans + spans_count; n++) {
            const int64_t x = n->x, count = n->count;
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
            finish(false, acc, e, c->out + y * s->out.stride[2] + x,
                c->residual ? c->residual + y * s->b.stride[2] + x : NULL, (int)count);
        }
    }
}

/* Windows that have functions of their own. */
typedef struct {
    int64_t window, stride;
    rows_function rows;
} window_rows;

#define ROWS(K, S) \
    static void rows_##K##_##S( \
        const channel *c, const ending *e, const span *spans, int count, int64_t y, int64_t upto) \
    { \
        window(K, S, c, e, spans, count, y, upto); \
    }
ROWS(3, 1) ROWS(3, 2) ROWS(5, 1) ROWS(5, 2) ROWS(7, 1) ROWS(7, 2)
static const window_rows windows[] = {
    {3, 1, rows_3_1}, {3, 2, rows_3_2}, {5, 1, rows_5_1}, {5, 2, rows_5_2}, {7, 1, rows_7_1}, {7, 2, rows_7_2},
};

static rows_function function_for(const int64_t *p)
{
    const bool square = p[DEPTHWISE_WINDOW_Y] == p[DEPTHWISE_WINDOW_X] && p[DEPTHWISE_STRIDE_Y] == p[DEPTHWISE_STRIDE_X];
    const bool dilated = p[DEPTHWISE_DILATION_Y] != 1 || p[DEPTHWISE_DILATION_X] != 1;
    for (size_t i = 0; square && !dilated && i < sizeof windows / sizeof *windows; i++)
        if (windows[i].window == p[DEPTHWISE_WINDOW_Y] && windows[i].stride == p[DEPTHWISE_STRIDE_Y]) return windows[i].rows;
    return rows_of_any;
}

/* Of a plane, made before the vector of columns beside it: about what is read for it stays in the nearest cache. */
enum { NEAR_FLOATS = 4096 };

void ESP_NAME(depthwise)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const int64_t *p = s->param, taps = p[DEPTHWISE_WINDOW_Y] * p[DEPTHWISE_WINDOW_X];
    const float *in = esp_source(&s->a, f), *residual = s->b.space ? esp_source(&s->b, f) : NULL;
    float *out = esp_target(&s->out, f);
    const rows_function rows = function_for(p);
    const int K = rows == rows_of_any ? 0 : (int)p[DEPTHWISE_WINDOW_X], S = (int)p[DEPTHWISE_STRIDE_X];
    const ending e = ending_of(s);
    const patch own = share_planes(&s->out, part, parts, false);
    const int64_t most = 8 + NEAR_FLOATS / (s->a.size[3] * p[DEPTHWISE_STRIDE_Y]), width = s->out.size[3];
    for (int64_t x = 0; x < width; x += SPANS * ESP_WIDTH) {
        span spans[SPANS];
        const int count = plan_spans(s, K, S, x, spans);
        for (int64_t number = own.plane; number < own.last_plane; number++) {
            const int64_t source = p[DEPTHWISE_MULTIPLIER] == 1 ? number : number / p[DEPTHWISE_MULTIPLIER];
            const channel c = {s, in + source * s->a.stride[1], residual ? residual + number * s->b.stride[1] : NULL,
                s->values + number * taps, out + number * s->out.stride[1], s->bias ? s->bias[number] : 0.0f};
            for (int64_t y = own.row; y < own.last_row; y += most)
                rows(&c, &e, spans, count, y, y + most < own.last_row ? y + most : own.last_row);
            const bool behind = x + SPANS * ESP_WIDTH >= width; /* nothing of the row is left */
            for (int64_t y = own.row; behind && s->margins && y < own.last_row; y++) zero_margin(s, out, number, y);
        }
    }
}
