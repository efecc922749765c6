/* Dense row-blocks over small planes: vectors run along the rows of a block, and each pixel is broadcast.
 *
 * acc[x][k] += w[j][k] * x[index[j]][x] for the 2 vectors k of rows and up to 14 pixels x. A plane of 7 x 7 or 4 x 4
 * pixels leaves lanes idle when vectors run along its pixels; its many channels never do. The columns are worked on in
 * pieces that stay in the nearest cache while all pixels pass over them; sums wait in between, to the bit. */
#include <stdbool.h>

#include "activate.h"
#include "planes.h"
#include "simd.h"

enum {
    ROWS = ESP_LANES_HEIGHT,
    VECTORS = 2,
    PART = VECTORS * ESP_WIDTH, /* rows at once */
    PIXELS = ESP_LANES_PIXELS,  /* of a band */
    PIECE = 256,                /* columns at once */
#if ESP_WIDTH == 16
    TILE = 14 /* pixels at once: as many as there are registers for */
#else
    TILE = 6
#endif
};

/* Columns count, from values and index on, at S segments of X pixels; sums[pixel][PART] before and after. The weights
 * from `next` on are fetched meanwhile, `step` for each column. */
ESP_INLINE void tile(const int S, const int X, const float *values, const int32_t *index, int64_t count,
    const float *in, int64_t segment, float *sums, int64_t length, const float *next, int64_t step)
{
    vec acc[TILE][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < S * X; i++)
#pragma GCC unroll 2
        for (int k = 0; k < VECTORS; k++)
            acc[i][k] = load(sums + (i / X * length + i % X) * PART + k * ESP_WIDTH);
    for (int64_t j = 0; j < count; j++, values += ROWS) {
        const float *x = in + index[j];
        vec w[VECTORS];
        __builtin_prefetch(next, 0, 2);
        next += step;
#pragma GCC unroll 2
        for (int k = 0; k < VECTORS; k++) w[k] = load(values + k * ESP_WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < S * X; i++) {
            const vec pixel = splat(x[i / X * segment + i % X]);
#pragma GCC unroll 2
            for (int k = 0; k < VECTORS; k++) acc[i][k] += w[k] * pixel;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < S * X; i++)
#pragma GCC unroll 2
        for (int k = 0; k < VECTORS; k++)
            store(sums + (i / X * length + i % X) * PART + k * ESP_WIDTH, acc[i][k]);
}

typedef void (*tile_function)(
    const float *, const int32_t *, int64_t, const float *, int64_t, float *, int64_t, const float *, int64_t);

#define TILE_OF(S, X) \
    static void tile_##S##_##X(const float *values, const int32_t *index, int64_t count, const float *in, \
        int64_t segment, float *sums, int64_t length, const float *next, int64_t step) \
    { \
        tile(S, X, values, index, count, in, segment, sums, length, next, step); \
    }

TILE_OF(1, 1) TILE_OF(1, 2) TILE_OF(1, 3) TILE_OF(1, 4) TILE_OF(1, 5) TILE_OF(1, 6)
TILE_OF(2, 1) TILE_OF(2, 2) TILE_OF(2, 3) TILE_OF(3, 1) TILE_OF(3, 2)
#if ESP_WIDTH == 16
TILE_OF(1, 7) TILE_OF(1, 8) TILE_OF(1, 9) TILE_OF(1, 10) TILE_OF(1, 11) TILE_OF(1, 12) TILE_OF(1, 13) TILE_OF(1, 14)
TILE_OF(2, 4) TILE_OF(2, 5) TILE_OF(2, 6) TILE_OF(2, 7) TILE_OF(3, 3) TILE_OF(3, 4)
static const tile_function tiles[][TILE] = {
    {tile_1_1, tile_1_2, tile_1_3, tile_1_4, tile_1_5, tile_1_6, tile_1_7, tile_1_8, tile_1_9, tile_1_10, tile_1_11,
        tile_1_12, tile_1_13, tile_1_14},
    {tile_2_1, tile_2_2, tile_2_3, tile_2_4, tile_2_5, tile_2_6, tile_2_7},
    {tile_3_1, tile_3_2, tile_3_3, tile_3_4},
};
#else
static const tile_function tiles[][TILE] = {
    {tile_1_1, tile_1_2, tile_1_3, tile_1_4, tile_1_5, tile_1_6},
    {tile_2_1, tile_2_2, tile_2_3},
    {tile_3_1, tile_3_2},
};
#endif

/* Segments first..upto of PART rows of one block, from row `r` of it on. */
typedef struct {
    const esp_step *step;
    const float *in, *residual;
    float *out;
    int64_t block, r, first, upto;
} band;

/* All columns at all pixels, piece by piece. */
static void sum_up(const band *b, float *sums)
{
    const esp_step *s = b->step;
    const int64_t *p = s->param, length = p[CONV_LENGTH], segments = b->upto - b->first;
    const int64_t limit = segments > 1 && TILE > 6 ? TILE / 2 : TILE; /* two segments at once, where registers reach */
    const int64_t across = (length + limit - 1) / limit, widest = (length + across - 1) / across;
    const int64_t high = TILE / widest < 3 ? TILE / widest : 3, down = (segments + high - 1) / high;
    for (int64_t j = s->starts[b->block], end = s->starts[b->block + 1]; j < end; j += PIECE) {
        const float *values = s->values + j * ROWS + b->r;
        for (int64_t t = 0; t < down * across; t++) {
            const int64_t d = t / across, a = t % across;
            const int64_t y = segments * d / down, tall = segments * (d + 1) / down - y;
            const int64_t x = length * a / across, wide = length * (a + 1) / across - x;
            tiles[tall - 1][wide - 1](values, s->index + j, end - j < PIECE ? end - j : PIECE,
                b->in + (b->first + y) * p[CONV_IN_STRIDE] + x, p[CONV_IN_STRIDE], sums + (y * length + x) * PART, length,
                values + PIECE * ROWS + t * (PIECE * ROWS / (down * across)), ROWS / (down * across));
        }
    }
}

/* Turned so that vectors run along pixels: residual and activation, and every row where it belongs. */
static void finish(const band *b, const float *sums)
{
    const esp_step *s = b->step;
    const int64_t *p = s->param, length = p[CONV_LENGTH];
    for (int64_t y = b->first; y < b->upto; y++)
        for (int64_t x = 0; x < length; x += ESP_WIDTH)
            for (int k = 0; k < VECTORS; k++) {
                const int32_t *rows = s->rows + b->block * ROWS + b->r + k * ESP_WIDTH;
                const float *from = sums + ((y - b->first) * length + x) * PART + k * ESP_WIDTH;
                const int count = length - x < ESP_WIDTH ? (int)(length - x) : ESP_WIDTH;
                vec v[ESP_WIDTH];
                for (int i = 0; i < ESP_WIDTH; i++) v[i] = load(from + (i < count ? i : 0) * PART);
                transpose(v);
                for (int r = 0; r < ESP_WIDTH; r++) {
                    if (rows[r] < 0) continue;
                    vec z = v[r];
                    if (b->residual) z += load_part(b->residual + rows[r] * s->b.stride[1] + y * p[CONV_RESIDUAL_STRIDE] + x, count);
                    store_part(b->out + rows[r] * s->out.stride[1] + y * p[CONV_OUT_STRIDE] + x,
                        activate(z, s->activation, s->act_a, s->act_b), count);
                }
            }
    const int32_t *rows = s->rows + b->block * ROWS + b->r;
    for (int r = 0; r < PART && s->margins; r++)
        for (int64_t y = b->first; y < b->upto && rows[r] >= 0; y++) zero_margin(s, b->out, rows[r], y);
}

static void run_band(const band *b)
{
    const esp_step *s = b->step;
    const int64_t pixels = (b->upto - b->first) * s->param[CONV_LENGTH];
    const int32_t *rows = s->rows + b->block * ROWS + b->r;
    _Alignas(64) float sums[PIXELS * PART];
    for (int r = 0; r < PART; r++) sums[r] = s->bias && rows[r] >= 0 ? s->bias[rows[r]] : 0.0f;
    for (int64_t i = 1; i < pixels; i++) memcpy(sums + i * PART, sums, PART * sizeof *sums);
    sum_up(b, sums);
    finish(b, sums);
}

/* Threads share the sequence of (band, block, segment) evenly: few blocks seldom come out even, and a block that two
 * threads share is all that is read twice. */
void ESP_NAME(conv_32)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const int64_t *p = s->param, blocks = s->starts_count - 1, most = PIXELS / p[CONV_LENGTH];
    const int64_t bands = (p[CONV_SEGMENTS] + most - 1) / most;
    band b = {s, esp_source(&s->a, f), s->b.space ? esp_source(&s->b, f) : NULL, esp_target(&s->out, f), 0, 0, 0, 0};
    int64_t begin, end, at = 0;
    share(blocks * p[CONV_SEGMENTS], part, parts, &begin, &end);
    for (int64_t i = 0; i < bands * blocks && at < end; i++) {
        int64_t first, upto;
        share(p[CONV_SEGMENTS], (int)(i / blocks), (int)bands, &first, &upto);
        const int64_t from = at;
        at += upto - first;
        if (at <= begin) continue;
        b.block = i % blocks;
        b.first = from < begin ? first + begin - from : first;
        b.upto = at > end ? upto - (at - end) : upto;
        for (b.r = 0; b.r < ROWS; b.r += PART) run_band(&b);
    }
}
