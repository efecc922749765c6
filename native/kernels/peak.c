/* The most multiply-adds that this instruction set does: what a kernel's speed is held against. */
#include "planes.h"
#include "simd.h"

/* Multiply-adds on sums that wait for nobody; returns how many floating-point operations they were. */
int64_t ESP_NAME(peak)(int64_t rounds, float *result)
{
    enum { SUMS = ESP_WIDTH == 16 ? 24 : 12 };
    vec acc[SUMS], a = splat(result[0]), b = splat(result[1]);
#pragma GCC unroll 24
    for (int k = 0; k < SUMS; k++) acc[k] = splat((float)k);
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 24
        for (int k = 0; k < SUMS; k++) acc[k] = acc[k] * a + b;
    }
    for (int k = 1; k < SUMS; k++) acc[0] += acc[k];
    result[0] = sum_lanes(acc[0]);
    return (int64_t)2 * SUMS * ESP_WIDTH * rounds;
}
