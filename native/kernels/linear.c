/* Row-blocks times a vector: y[row] = sum of w[j] * x[index[j]]. Its cost is reading the weights, so it is vectorised
 * along the rows of a block; four sums per block hide the latency of the additions. */
#include "activate.h"
#include "planes.h"
#include "simd.h"

typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_anywhere __attribute__((vector_size(16), aligned(4), may_alias));
#if ESP_WIDTH >= 8
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec8_anywhere __attribute__((vector_size(32), aligned(4), may_alias));
#endif

enum { AHEAD = 1024 }; /* floats of weights that are fetched ahead: what prefetchers of processors do ends with a page */

/* H rows by pieces of type VEC, which has LANES floats */
#define SUMS(H, VEC, LANES) \
    ESP_INLINE void sums_##H(const float *w, const int32_t *index, int64_t columns, const float *x, float *sum) \
    { \
        enum { PIECES = (H) / (LANES) }; \
        VEC acc[4][PIECES] = {{{0}}}; \
        int64_t j = 0; \
        for (; j + 4 <= columns; j += 4) \
            for (int u = 0; u < 4; u++) { \
                if ((u * (H)) % 16 == 0) __builtin_prefetch(w + (j + u) * (H) + AHEAD, 0, 2); \
                for (int k = 0; k < PIECES; k++) \
                    acc[u][k] += *(const VEC##_anywhere *)(w + (j + u) * (H) + k * (LANES)) * x[index[j + u]]; \
            } \
        for (; j < columns; j++) \
            for (int k = 0; k < PIECES; k++) \
                acc[0][k] += *(const VEC##_anywhere *)(w + j * (H) + k * (LANES)) * x[index[j]]; \
        for (int k = 0; k < PIECES; k++) \
            *(VEC##_anywhere *)(sum + k * (LANES)) = (acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k]); \
    }

/* one row: along its columns instead */
ESP_INLINE void sums_1(const float *w, const int32_t *index, int64_t columns, const float *x, float *sum)
{
    vec acc[2] = {{0}, {0}};
    float rest = 0;
    int64_t j = 0;
    for (; j + 2 * ESP_WIDTH <= columns; j += 2 * ESP_WIDTH) {
        acc[0] += load(w + j) * gather(x, index + j);
        acc[1] += load(w + j + ESP_WIDTH) * gather(x, index + j + ESP_WIDTH);
    }
    for (; j < columns; j++) rest += w[j] * x[index[j]];
    *sum = sum_lanes(acc[0] + acc[1]) + rest;
}

/* two rows: too few for a vector */
ESP_INLINE void sums_2(const float *w, const int32_t *index, int64_t columns, const float *x, float *sum)
{
    float acc[4][2] = {{0}};
    for (int64_t j = 0; j < columns; j++)
        for (int k = 0; k < 2; k++) acc[j % 4][k] += w[j * 2 + k] * x[index[j]];
    for (int k = 0; k < 2; k++) sum[k] = (acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k]);
}

SUMS(4, vec4, 4)
#if ESP_WIDTH == 16
SUMS(8, vec8, 8)
SUMS(16, vec, 16)
#elif ESP_WIDTH == 8
SUMS(8, vec8, 8)
SUMS(16, vec8, 8)
#else
SUMS(8, vec4, 4)
SUMS(16, vec4, 4)
#endif

typedef void (*sums_function)(const float *, const int32_t *, int64_t, const float *, float *);

ESP_INLINE void run(
    const esp_step *s, const esp_frame *f, int part, int parts, const sums_function sums, const int height)
{
    const int64_t *p = s->param, blocks = s->starts_count - 1, cost = s->index_count + 4 * blocks;
    const float *in = esp_source(&s->a, f), *residual = s->b.space ? esp_source(&s->b, f) : NULL;
    float *out = esp_target(&s->out, f), sum[16 + ESP_WIDTH];
    int64_t begin, end;
    share(cost, part, parts, &begin, &end);
    for (int64_t i = 0; i < blocks; i++) {
        int64_t first = s->starts[i], position = first + 4 * i;
        if (position < begin || position >= end) continue;
        for (int64_t t = 0; t < p[LINEAR_POSITIONS]; t++) {
            sums(s->values + first * height, s->index + first, s->starts[i + 1] - first,
                in + t * p[LINEAR_IN_STRIDE], sum);
            for (int r = 0; r < height; r++) {
                int64_t row = s->rows[i * height + r];
                if (row < 0) continue;
                float y = sum[r] + (s->bias ? s->bias[row] : 0.0f);
                if (residual) y += residual[t * p[LINEAR_RESIDUAL_STRIDE] + row * s->b.stride[3]];
                out[t * p[LINEAR_OUT_STRIDE] + row * p[LINEAR_ROW_STRIDE]] =
                    activate_one(y, s->activation, s->act_a, s->act_b);
            }
        }
    }
}

#define KERNEL(H) \
    void ESP_NAME(linear_##H)(const esp_step *s, const esp_frame *f, int part, int parts) \
    { \
        run(s, f, part, parts, sums_##H, H); \
    }
KERNEL(1)
KERNEL(2)
KERNEL(4)
KERNEL(8)
KERNEL(16)
