/* Products of two activations, as attention has them: out[m][n] = scale * sum over k of a[m][k] * b[k][n], for every
 * pair of leading indices. Vectors run along n; numbers of `a` are broadcast, whatever its strides. */
#include "activate.h"
#include "planes.h"
#include "simd.h"

#if ESP_WIDTH == 16
enum { ROWS = 8, VECTORS = 3 };
#else
enum { ROWS = 4, VECTORS = 3 };
#endif

ESP_INLINE void tile(const int M, const int V, const esp_step *s, const float *a, const float *b, float *out, int last)
{
    const int64_t am = s->a.stride[2], ak = s->a.stride[3], bk = s->b.stride[2], om = s->out.stride[2];
    vec acc[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) acc[m][v] = splat(0.0f);
    for (int64_t k = 0; k < s->a.size[3]; k++, a += ak, b += bk) {
        vec x[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) x[v] = load(b + v * ESP_WIDTH);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vec w = splat(a[m * am]);
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) acc[m][v] += w * x[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) {
            vec y = acc[m][v] * s->act_a;
            float *to = out + m * om + v * ESP_WIDTH;
            if (v < V - 1 || last == ESP_WIDTH)
                store(to, y);
            else
                store_part(to, y, last);
        }
}

typedef void (*tile_function)(const esp_step *, const float *, const float *, float *, int);

#define TILE(M, V) \
    static void tile_##M##_##V(const esp_step *s, const float *a, const float *b, float *out, int last) \
    { \
        tile(M, V, s, a, b, out, last); \
    }
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(2, 1) TILE(2, 2) TILE(2, 3) TILE(4, 1) TILE(4, 2) TILE(4, 3)
#if ESP_WIDTH == 16
TILE(8, 1) TILE(8, 2) TILE(8, 3)
#endif
static const tile_function tiles[][VECTORS] = {
    {tile_1_1, tile_1_2, tile_1_3},
    {tile_2_1, tile_2_2, tile_2_3},
    {tile_4_1, tile_4_2, tile_4_3},
#if ESP_WIDTH == 16
    {tile_8_1, tile_8_2, tile_8_3},
#endif
};

/* All columns of `rows` rows: tiles of nearly equal width. */
static void strip(const esp_step *s, const float *a, const float *b, float *out, int64_t rows)
{
    const int64_t width = s->out.size[3], vectors = (width + ESP_WIDTH - 1) / ESP_WIDTH;
    const int64_t count = (vectors + VECTORS - 1) / VECTORS;
    for (int64_t t = 0, done = 0; t < count; t++) {
        const int64_t upto = vectors * (t + 1) / count, at = done * ESP_WIDTH;
        const int last = upto < vectors ? ESP_WIDTH : (int)(width - (vectors - 1) * ESP_WIDTH);
        for (int64_t m = 0; m < rows;) {
            const int step = rows - m >= 8 && ROWS == 8 ? 3 : rows - m >= 4 ? 2 : rows - m >= 2 ? 1 : 0;
            tiles[step][upto - done - 1](s, a + m * s->a.stride[2], b + at, out + m * s->out.stride[2] + at, last);
            m += (int64_t)1 << step;
        }
        done = upto;
    }
}

void ESP_NAME(matmul)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const float *a = esp_source(&s->a, f), *b = esp_source(&s->b, f);
    float *out = esp_target(&s->out, f);
    const int64_t height = s->out.size[2], strips = (height + 31) / 32;
    int64_t begin, end;
    share(s->out.size[0] * s->out.size[1] * strips, part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t first = i % strips * 32, rows = height - first < 32 ? height - first : 32;
        const plane_row r = {i / strips / s->out.size[1], i / strips % s->out.size[1], first};
        const plane_row top = {r.n, r.c, 0};
        strip(s, a + place(&s->a, r), b + place(&s->b, top), out + place(&s->out, r), rows);
    }
}
