/* What a tile of row-blocks over planes is made of, and how it is stored: with residual and activation, each row where it
 * belongs, the zeros around it, and where they are wanted copies a column to either side. */
#ifndef ESP_TILE_H
#define ESP_TILE_H

#include <stdbool.h>

#include "activate.h"
#include "planes.h"
#include "simd.h"

/* What tiles read and write; the same for all blocks. */
typedef struct {
    const esp_step *step;
    const float *in;
    float *out;
    const float *residual; /* or NULL */
    int64_t height;        /* of blocks */
    bool far_residual;     /* it is worth fetching early; with more than one row at once */
    bool far_output;       /* so are the lines to be written: other cores have had them, or they have left the cache */
} field;

/* Rows that share columns. */
typedef struct {
    const int32_t *rows, *index;
    const float *values;
    int64_t columns;
} block;

/* The vectors of a tile: where each lies, how many of its lanes count, and up to which zeros are stored behind them. */
typedef struct {
    int64_t in[8], out[8], residual[8];
    int lanes[8], stored[8];
    int64_t lone; /* 0, or the place of a pixel behind them, which would have a vector to itself */
    bool plain;  /* the vectors lie one behind the other, and all lanes of all are stored */
    bool masked; /* and those that are no pixels, but side margin, as zeros: `pixels` are the others */
    bool rows;   /* of an image row by row: all lanes are stored, those behind a row as zeros */
    lanes pixels[8];
    int sided;   /* SIDED or SIDED_PAIRS, where copies to either side are stored with it; else 0 */
    lanes not_first, not_last; /* then of rows of the image in a vector, or of half a row: all pixels but one */
} spots;

/* How a tile is stored. All but ANYHOW are of whole vectors and at most clamped, and all but ROWS of vectors that lie one
 * behind the other; LONE has a lone pixel with it. */
enum { ANYHOW, PLAIN, LONE, MASKED, ROWS, SIDED, SIDED_PAIRS, HOWS };

ESP_INLINE bool is_run(const int how) { return how != ANYHOW && how != ROWS; }

static bool is_clamp(const esp_step *s) { return s->activation == ESP_CLAMP || s->activation == ESP_LINEAR_ACT; }

static int how_of(const spots *at, bool clamps)
{
    if (at->rows && clamps) return ROWS;
    if (!at->plain || !clamps) return ANYHOW;
    if (at->masked) return at->lone ? ANYHOW : MASKED;
    return at->sided ? at->sided : at->lone ? LONE : PLAIN;
}

/* SIDED or SIDED_PAIRS, where copies of the output, a column to either side, are stored as its vectors are: rows fill one,
 * or two; else 0. */
static int sided_of(const esp_step *s)
{
    const int64_t width = s->out.size[3];
    if (!s->param[CONV_SIDES] || s->param[CONV_LENGTH] % ESP_WIDTH || !is_clamp(s)) return 0;
    if (width == 2 * ESP_WIDTH) return SIDED_PAIRS;
    return width <= ESP_WIDTH && ESP_WIDTH % width == 0 ? SIDED : 0;
}

/* Residual and activation of M rows at V vectors, and every row where it belongs. With clamp, kind is no activation or
 * a clamp between low and high; without, any. */
ESP_INLINE void finish(const int M, const int V, const bool clamp, const bool add, const int how, const field *f,
    const int32_t *rows, vec acc[8][8], const spots *at, float low, float high)
{
    const bool whole = how != ANYHOW, run = is_run(how);
    const bool masked = how == MASKED || how == ROWS || (how == ANYHOW && at->masked);
    /* copies: the compiler must believe that stores change what lies behind pointers */
    const int64_t to_stride = f->step->out.stride[1], from_stride = f->step->b.stride[1];
    const bool sided = how == SIDED || how == SIDED_PAIRS;
    const int64_t sides = sided ? f->step->param[CONV_SIDES] : 0;
    const lanes not_first = at->not_first, not_last = at->not_last;
    const int activation = f->step->activation;
    const float *from = f->residual;
    float *to = f->out;
    int64_t to_at[8], from_at[8];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        to_at[v] = run ? at->out[0] + v * ESP_WIDTH : at->out[v];
        from_at[v] = !add ? 0 : run ? at->residual[0] + v * ESP_WIDTH : at->residual[v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const int64_t row = rows[m];
        if (row < 0) continue;
        float *out = to + row * to_stride;
        const float *residual = add ? from + row * from_stride : NULL;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const int lanes = whole ? ESP_WIDTH : at->lanes[v];
            vec y = acc[m][v];
            if (add) y += lanes < ESP_WIDTH ? load_part(residual + from_at[v], lanes) : load(residual + from_at[v]);
            y = clamp ? vmin(splat(high), vmax(splat(low), y)) : activate(y, activation, low, high);
            if (masked) y = choose_lanes(at->pixels[v], y, (vec){0});
            if (lanes < ESP_WIDTH)
                store_part(out + to_at[v], choose_lanes(lanes_between(0, lanes), y, (vec){0}), at->stored[v]);
            else
                store(out + to_at[v], y);
            if (sided) acc[m][v] = y;
        }
#pragma GCC unroll 8
        for (int v = 0; v < V && sided; v++) {
            const bool second = how == SIDED_PAIRS && v % 2 == 1, first = how == SIDED_PAIRS && v % 2 == 0 && v + 1 < V;
            const vec y = acc[m][v], before = second ? last_then(acc[m][v - 1], y)
                                                     : choose_lanes(not_first, lanes_before(y), (vec){0});
            const vec behind = first ? next_lanes(y, acc[m][v + 1])
                                     : choose_lanes(not_last, lanes_behind(y), (vec){0});
            store(out - sides + to_at[v], before);
            store(out + sides + to_at[v], behind);
        }
    }
}

/* One pixel of the rows of a block, whose sums stand side by side. */
static void finish_lone(const field *f, const int32_t *rows, int count, vec sums, int64_t pixel, float low, float high)
{
    const int64_t to_stride = f->step->out.stride[1], from_stride = f->step->b.stride[1];
    for (int m = 0; m < count && f->residual; m++)
        if (rows[m] >= 0) sums[m] += f->residual[rows[m] * from_stride + pixel];
    sums = is_clamp(f->step) ? vmin(splat(high), vmax(splat(low), sums)) : activate(sums, f->step->activation, low, high);
    for (int m = 0; m < count; m++)
        if (rows[m] >= 0) f->out[rows[m] * to_stride + pixel] = sums[m];
}

/* Zero the `front` floats before the first plane, where pixels begin..end of plane `row`, worked on as one run, are its
 * beginning; and the back margin of the plane, where they are the plane's end. */
static void zero_flat(const esp_step *s, float *out, int64_t front, int64_t row, int64_t begin, int64_t end)
{
    float *plane = out + row * s->out.stride[1];
    if (end >= s->param[CONV_LENGTH]) zero_floats(plane + s->param[CONV_LENGTH], s->out.stride[1] - s->param[CONV_LENGTH]);
    if (begin == 0 && row == 0) zero_floats(out - front, front);
}

/* Pixels begin..end of plane `row` in the copies to either side. Whoever writes a pixel writes it there, too, and zero
 * where no pixel comes: nobody else writes either. */
static void store_sides(const esp_step *s, float *out, int64_t row, int64_t begin, int64_t end)
{
    const int64_t width = s->out.size[3], sides = s->param[CONV_SIDES];
    const float *plane = out + row * s->out.stride[1];
    float *before = out - sides + row * s->out.stride[1], *behind = out + sides + row * s->out.stride[1];
    if (end > s->param[CONV_LENGTH]) end = s->param[CONV_LENGTH];
    for (int64_t i = begin, x = begin % width; i < end; i++, x = x + 1 < width ? x + 1 : 0) {
        if (x == 0)
            before[i] = 0;
        else
            behind[i - 1] = plane[i];
        if (x == width - 1)
            behind[i] = 0;
        else
            before[i + 1] = plane[i];
    }
}

#endif
