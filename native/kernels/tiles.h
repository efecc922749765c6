/* The tiles of row-blocks over planes: acc[m][v] += w[j][m] * x[index[j]][v] for m rows that share columns and v vectors of pixels.
 *
 * Each activation vector is loaded once for m rows, each weight broadcast once for v vectors. The order in which columns
 * are added does not depend on tile, thread or segment, so results do not either. */
#ifndef ESP_TILES_H
#define ESP_TILES_H

#include <math.h>

#include "tile.h"

enum { LONE_ROWS = ESP_WIDTH == 16 ? 8 : 0 }; /* of tiles that take a lone pixel with them */

/* Rows of a group whose columns come in pieces: so many sums wait. */
enum { PIECE_ROWS = 128 };

/* Columns ahead of the one worked on whose pixels are fetched meanwhile; and where in a vector: its last float, since a
 * tile's first line is the last of the tile before it. Tiles of fewer rows, or short vectors, wait for loads as it is. */
enum { AHEAD = 4, FETCHED = ESP_WIDTH - 1, FETCHING_ROWS = ESP_WIDTH == 16 ? 4 : 1 << 30 };

/* The sums of all columns; the vectors lie one behind the other (run), or anywhere. fetch: pixels are fetched early; what
 * is fetched behind the last column is of no use, but within the program's bytes. lone: NULL, or the sums of the lone
 * pixel, whose M rows share a vector. */
ESP_INLINE void sum_up(const int M, const int V, const bool run, const bool fetch, const field *f, const block *b,
    const spots *at, vec acc[8][8], vec *lone)
{
    const float *in = f->in + at->in[0], *values = b->values;
    const int32_t *index = b->index, *const end = index + b->columns;
    const int64_t height = f->height;
    int64_t apart[8];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) apart[v] = run ? v * ESP_WIDTH : at->in[v] - at->in[0];
    const int64_t alone = lone ? at->lone - at->in[0] : 0;
    vec last = lone ? *lone : (vec){0};
    for (; index < end; index++, values += height) {
        const float *x = in + *index, *next = in + index[AHEAD] + FETCHED;
        vec pixels[8];
        if (lone) last += load(values) * splat(x[alone]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            pixels[v] = load(x + apart[v]);
            if (fetch) __builtin_prefetch(next + apart[v]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vec w = splat(values[m]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[m][v] += w * pixels[v];
        }
    }
    if (lone) *lone = last;
}

/* The lines of a tile of `o`, which begins at `from`, are asked for while the sums are made: to be read, or written. */
ESP_INLINE void fetch_early(const int M, const int V, const bool run, const bool written, const float *from,
    const esp_operand *o, const int32_t *rows, const int64_t *at)
{
    const int64_t stride = o->stride[1];
    from += at[0] + FETCHED;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const int64_t row = rows[m];
        if (row < 0) continue;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            __builtin_prefetch(from + row * stride + (run ? v * ESP_WIDTH : at[v] - at[0]), written);
    }
}

/* M rows of one block at V vectors of pixels. add: there is a residual. */
ESP_INLINE void tile_rows(const int M, const int V, const int how, const bool add, const field *f, const block *b,
    const spots *at, float low, float high)
{
    const float *bias = f->step->bias;
    vec acc[8][8];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const float first = bias && b->rows[m] >= 0 ? bias[b->rows[m]] : 0.0f;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[m][v] = splat(first);
    }
    const bool run = is_run(how);
    if (M >= FETCHING_ROWS && add && f->far_residual) fetch_early(M, V, run, false, f->residual, &f->step->b, b->rows, at->residual);
    if (M >= FETCHING_ROWS && f->far_output) fetch_early(M, V, run, true, f->out, &f->step->out, b->rows, at->out);
    if (how == LONE || (how == ANYHOW && M == LONE_ROWS && at->lone)) {
        vec lone = {0};
        for (int m = 0; m < M && bias; m++)
            if (b->rows[m] >= 0) lone[m] = bias[b->rows[m]];
        sum_up(M, V, run, M >= FETCHING_ROWS, f, b, at, acc, &lone);
        finish_lone(f, b->rows, M, lone, at->lone, low, high);
    } else {
        sum_up(M, V, run, M >= FETCHING_ROWS, f, b, at, acc, NULL);
    }
    if (how == ANYHOW && !is_clamp(f->step))
        finish(M, V, false, add, how, f, b->rows, acc, at, low, high);
    else
        finish(M, V, true, add, how == LONE ? PLAIN : how, f, b->rows, acc, at, low, high);
}

/* Blocks first..upto of one row each, at V vectors of pixels. Where columns come in pieces, one piece of all, then the
 * next: what pixels it reads stays in the nearest cache, and the sums wait beside it. */
ESP_INLINE void tile_singles(
    const int V, const int how, const bool add, const field *f, int64_t first, int64_t upto, const spots *at)
{
    const esp_step *s = f->step;
    const int64_t pieces = s->param[CONV_PIECES] ? s->param[CONV_PIECES] : 1, blocks = s->rows_count;
    const float low = s->activation ? s->act_a : -INFINITY, high = s->activation ? s->act_b : INFINITY;
    vec waiting[PIECE_ROWS][8], acc[8][8];
    for (int64_t k = 0; k < pieces; k++)
        for (int64_t i = first; i < upto; i++) {
            const int64_t row = s->rows[i], start = s->starts[k * blocks + i], end = s->starts[k * blocks + i + 1];
            const block b = {s->rows + i, s->index + start, s->values + start, end - start};
            const float bias = s->bias && row >= 0 ? s->bias[row] : 0.0f;
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[0][v] = k ? waiting[i - first][v] : splat(bias);
            sum_up(1, V, is_run(how), false, f, &b, at, acc, NULL);
            if (k < pieces - 1) {
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) waiting[i - first][v] = acc[0][v];
            } else {
                if (how == ANYHOW && !is_clamp(s))
                    finish(1, V, false, add, how, f, b.rows, acc, at, low, high);
                else
                    finish(1, V, true, add, how, f, b.rows, acc, at, low, high);
            }
        }
}

/* Blocks first..upto at V vectors of pixels, M rows at once. */
ESP_INLINE void tile(
    const int M, const int V, const int how, const bool add, const field *f, int64_t first, int64_t upto, const spots *at)
{
    const esp_step *s = f->step;
    if (M == 1) {
        tile_singles(V, how, add, f, first, upto, at);
        return;
    }
    const int64_t height = M < 4 ? M : f->height;
    const float low = s->activation ? s->act_a : -INFINITY, high = s->activation ? s->act_b : INFINITY;
    for (int64_t i = first; i < upto; i++) {
        const int64_t start = s->starts[i];
        block b = {s->rows + i * height, s->index + start, s->values + start * height, s->starts[i + 1] - start};
        for (int64_t r = 0; r < height; r += M, b.rows += M, b.values += M)
            tile_rows(M, V, how, add, f, &b, at, low, high);
    }
}

typedef void (*tile_function)(const field *, int64_t, int64_t, const spots *);

/* Of a height and width, for every way to store it, without and with residual: each by itself, as what all of them need
 * would fill more registers than there are. */
typedef struct {
    tile_function by[HOWS][2];
} tile_kinds;

#define TILE_BY(M, V, HOW, ADD, NAME) \
    static void tile_##M##_##V##_##NAME(const field *f, int64_t first, int64_t upto, const spots *at) \
    { \
        tile(M, V, HOW, ADD, f, first, upto, at); \
    }
#define TILE(M, V) \
    TILE_BY(M, V, ANYHOW, false, any) TILE_BY(M, V, ANYHOW, true, any_add) \
    TILE_BY(M, V, PLAIN, false, plain) TILE_BY(M, V, PLAIN, true, plain_add) \
    TILE_BY(M, V, MASKED, false, masked) TILE_BY(M, V, MASKED, true, masked_add) \
    TILE_BY(M, V, ROWS, false, rows) TILE_BY(M, V, ROWS, true, rows_add) \
    TILE_BY(M, V, SIDED, false, sided) TILE_BY(M, V, SIDED, true, sided_add) \
    TILE_BY(M, V, SIDED_PAIRS, false, pairs) TILE_BY(M, V, SIDED_PAIRS, true, pairs_add)
#define KINDS(M, V) \
    [ANYHOW] = {tile_##M##_##V##_any, tile_##M##_##V##_any_add}, \
    [PLAIN] = {tile_##M##_##V##_plain, tile_##M##_##V##_plain_add}, \
    [MASKED] = {tile_##M##_##V##_masked, tile_##M##_##V##_masked_add}, \
    [ROWS] = {tile_##M##_##V##_rows, tile_##M##_##V##_rows_add}, \
    [SIDED] = {tile_##M##_##V##_sided, tile_##M##_##V##_sided_add}, \
    [SIDED_PAIRS] = {tile_##M##_##V##_pairs, tile_##M##_##V##_pairs_add}

/* Rows at once and the widest tile per instruction set: as many accumulators as it has registers for. */
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(1, 5) TILE(1, 6) TILE(1, 7) TILE(1, 8)
TILE(2, 1) TILE(2, 2) TILE(2, 3) TILE(2, 4) TILE(2, 5)
TILE(4, 1) TILE(4, 2) TILE(4, 3)
static const tile_kinds tiles_1[] = {{{KINDS(1, 1)}}, {{KINDS(1, 2)}}, {{KINDS(1, 3)}}, {{KINDS(1, 4)}}, {{KINDS(1, 5)}},
    {{KINDS(1, 6)}}, {{KINDS(1, 7)}}, {{KINDS(1, 8)}}};
#if ESP_WIDTH == 16
TILE(2, 6) TILE(2, 7) TILE(2, 8) TILE(4, 4) TILE(4, 5) TILE(4, 6) TILE(8, 1) TILE(8, 2) TILE(8, 3)
#define LONE_TILE(V) \
    TILE_BY(8, V, LONE, false, lone) TILE_BY(8, V, LONE, true, lone_add)
LONE_TILE(1) LONE_TILE(2) LONE_TILE(3)
#define LONE_KINDS(V) {{KINDS(8, V), [LONE] = {tile_8_##V##_lone, tile_8_##V##_lone_add}}}
static const tile_kinds tiles_2[] = {{{KINDS(2, 1)}}, {{KINDS(2, 2)}}, {{KINDS(2, 3)}}, {{KINDS(2, 4)}}, {{KINDS(2, 5)}},
    {{KINDS(2, 6)}}, {{KINDS(2, 7)}}, {{KINDS(2, 8)}}};
static const tile_kinds tiles_4[] = {
    {{KINDS(4, 1)}}, {{KINDS(4, 2)}}, {{KINDS(4, 3)}}, {{KINDS(4, 4)}}, {{KINDS(4, 5)}}, {{KINDS(4, 6)}}};
static const tile_kinds tiles_8[] = {LONE_KINDS(1), LONE_KINDS(2), LONE_KINDS(3)};
static const tile_kinds *const lone_tiles = tiles_8;
#else
static const tile_kinds tiles_2[] = {
    {{KINDS(2, 1)}}, {{KINDS(2, 2)}}, {{KINDS(2, 3)}}, {{KINDS(2, 4)}}, {{KINDS(2, 5)}}};
static const tile_kinds tiles_4[] = {{{KINDS(4, 1)}}, {{KINDS(4, 2)}}, {{KINDS(4, 3)}}};
static const tile_kinds *const lone_tiles = NULL;
#endif

#endif
