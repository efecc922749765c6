/* Vectors of the instruction set that this file is compiled for: compiler vector types, and the few things that they
 * cannot say. A new instruction set adds its width and, if it likes, a faster store_part, vmax and vmin. */
#ifndef ESP_SIMD_H
#define ESP_SIMD_H

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ESP_WIDTH 16
#elif defined(__AVX2__)
#define ESP_WIDTH 8
#else
#define ESP_WIDTH 4
#endif

#define ESP_INLINE static inline __attribute__((always_inline))
#define ESP_JOIN_(a, b) a##_##b
#define ESP_JOIN(a, b) ESP_JOIN_(a, b)
#define ESP_NAME(name) ESP_JOIN(name, ESP_ISA)

typedef float vec __attribute__((vector_size(4 * ESP_WIDTH)));
typedef int32_t ivec __attribute__((vector_size(4 * ESP_WIDTH)));
typedef float vec_anywhere __attribute__((vector_size(4 * ESP_WIDTH), aligned(4), may_alias));

ESP_INLINE vec load(const float *p) { return *(const vec_anywhere *)p; }
ESP_INLINE void store(float *p, vec v) { *(vec_anywhere *)p = v; }
ESP_INLINE vec splat(float x) { return x - (vec){0}; }

/* Keep v in a register, where the compiler would load it again and again. */
#if defined(__AVX512F__)
#define ESP_KEEP(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__) || defined(__i386__)
#define ESP_KEEP(v) __asm__("" : "+x"(v))
#else
#define ESP_KEEP(v) ((void)0)
#endif

/* Have the compiler know nothing of a pointer, so that it does not work out all that will follow from it beforehand. */
#define ESP_HIDE(pointer) __asm__("" : "+r"(pointer))

/* where the mask is set a, else b */
ESP_INLINE vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* the first n lanes, 1 <= n <= ESP_WIDTH */
ESP_INLINE void store_part(float *p, vec v, int n)
{
#if ESP_WIDTH == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif ESP_WIDTH == 8
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), (__m256)v);
#else
    for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

/* Some lanes of a vector, those between two bounds; loading them touches no others and leaves zeros there, but without
 * masked loads up to ESP_WIDTH floats before and behind are read. */
#if ESP_WIDTH == 16
typedef __mmask16 lanes;
#elif ESP_WIDTH == 8
typedef __m256i lanes;
#else
typedef ivec lanes;
#endif

/* low..high - 1, 0 <= low <= high <= ESP_WIDTH */
ESP_INLINE lanes lanes_between(int low, int high)
{
#if ESP_WIDTH == 16
    return (__mmask16)(((1u << high) - 1) & ~((1u << low) - 1));
#else
    static const int32_t steps[3 * 8] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    typedef int32_t ivec_anywhere __attribute__((vector_size(4 * ESP_WIDTH), aligned(4), may_alias));
    return (lanes)(*(const ivec_anywhere *)(steps + 8 - low) & *(const ivec_anywhere *)(steps + 16 - high));
#endif
}

/* those whose bit is set, of the lowest ESP_WIDTH bits */
ESP_INLINE lanes lanes_of(uint32_t bits)
{
#if ESP_WIDTH == 16
    return (__mmask16)bits;
#else
    ivec lane;
    for (int i = 0; i < ESP_WIDTH; i++) lane[i] = 1 << i;
    return (lanes)((((ivec){0} + (int32_t)bits) & lane) != 0);
#endif
}

ESP_INLINE vec load_lanes(const float *p, lanes which)
{
#if ESP_WIDTH == 16
    return (vec)_mm512_maskz_loadu_ps(which, p);
#elif ESP_WIDTH == 8
    return (vec)_mm256_maskload_ps(p, which);
#else
    return (vec)((ivec)load(p) & which);
#endif
}

/* the first n lanes, 0 <= n <= ESP_WIDTH, zeros behind them; nothing else is read */
ESP_INLINE vec load_part(const float *p, int n)
{
#if ESP_WIDTH >= 8
    return load_lanes(p, lanes_between(0, n));
#else
    vec v = {0};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

/* which ? a : b, lane by lane */
ESP_INLINE vec choose_lanes(lanes which, vec a, vec b)
{
#if ESP_WIDTH == 16
    return (vec)_mm512_mask_blend_ps(which, (__m512)b, (__m512)a);
#else
    return choose((ivec)which, a, b);
#endif
}

/* sum + a * b in some lanes; the others stay as they are, whatever stands in b */
ESP_INLINE vec add_product(lanes which, vec sum, vec a, vec b)
{
#if ESP_WIDTH == 16
    return (vec)_mm512_mask3_fmadd_ps((__m512)a, (__m512)b, (__m512)sum, which);
#else
    return sum + a * choose_lanes(which, b, (vec){0});
#endif
}

/* lanes 0, 2, 4, ... and 1, 3, 5, ... of a and b behind one another */
#if ESP_WIDTH == 16
ESP_INLINE vec even(vec a, vec b)
{
    const __m512i which = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (vec)_mm512_permutex2var_ps((__m512)a, which, (__m512)b);
}
ESP_INLINE vec odd(vec a, vec b)
{
    const __m512i which = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return (vec)_mm512_permutex2var_ps((__m512)a, which, (__m512)b);
}
#elif ESP_WIDTH == 8
ESP_INLINE vec in_order(__m256 halves)
{
    return (vec)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8));
}
ESP_INLINE vec even(vec a, vec b) { return in_order(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88)); }
ESP_INLINE vec odd(vec a, vec b) { return in_order(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd)); }
#else
ESP_INLINE vec even(vec a, vec b) { return (vec){a[0], a[2], b[0], b[2]}; }
ESP_INLINE vec odd(vec a, vec b) { return (vec){a[1], a[3], b[1], b[3]}; }
#endif

/* p[index[0]], p[index[1]], ... */
ESP_INLINE vec gather(const float *p, const int32_t *index)
{
#if ESP_WIDTH == 16
    return (vec)_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
#elif ESP_WIDTH == 8
    return (vec)_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i_u *)index), 4);
#else
    return (vec){p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
#endif
}

#if ESP_WIDTH == 16
#define ESP_LANES ((ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#elif ESP_WIDTH == 8
#define ESP_LANES ((ivec){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define ESP_LANES ((ivec){0, 1, 2, 3})
#endif

/* lanes 0, 2, 4, ... of a, then of b; and lanes 1, 3, 5, ... */
ESP_INLINE vec even_lanes(vec a, vec b) { return __builtin_shuffle(a, b, ESP_LANES * 2); }
ESP_INLINE vec odd_lanes(vec a, vec b) { return __builtin_shuffle(a, b, ESP_LANES * 2 + 1); }

/* a[0], b[0], a[1], b[1], ... from the first half of both; and from the second half */
ESP_INLINE vec first_lanes(vec a, vec b) { return __builtin_shuffle(a, b, ESP_LANES / 2 + ESP_LANES % 2 * ESP_WIDTH); }
ESP_INLINE vec last_lanes(vec a, vec b)
{
    return __builtin_shuffle(a, b, ESP_LANES / 2 + ESP_LANES % 2 * ESP_WIDTH + ESP_WIDTH / 2);
}

/* v[0][0], v[1][0], v[2][0], v[3][0], v[0][1], ... */
ESP_INLINE void interleave(const vec v[4], vec out[4])
{
    const vec low = first_lanes(v[0], v[2]), high = last_lanes(v[0], v[2]);
    const vec low_odd = first_lanes(v[1], v[3]), high_odd = last_lanes(v[1], v[3]);
    out[0] = first_lanes(low, low_odd);
    out[1] = last_lanes(low, low_odd);
    out[2] = first_lanes(high, high_odd);
    out[3] = last_lanes(high, high_odd);
}

/* in every lane the one before it, and the one behind it; the first and the last hold anything */
ESP_INLINE vec lanes_before(vec a) { return __builtin_shuffle(a, (ESP_LANES + ESP_WIDTH - 1) % ESP_WIDTH); }
ESP_INLINE vec lanes_behind(vec a) { return __builtin_shuffle(a, (ESP_LANES + 1) % ESP_WIDTH); }

/* a's last, b[0], b[1], ... */
ESP_INLINE vec last_then(vec a, vec b) { return __builtin_shuffle(a, b, ESP_LANES + ESP_WIDTH - 1); }

/* a[1], a[2], ..., b[0] */
ESP_INLINE vec next_lanes(vec a, vec b) { return __builtin_shuffle(a, b, ESP_LANES + 1); }

/* v[i][j] becomes v[j][i]: blocks of 1, 2, 4, ... off the diagonal change places */
ESP_INLINE void transpose(vec v[ESP_WIDTH])
{
#pragma GCC unroll 4
    for (int d = 1; d < ESP_WIDTH; d *= 2) {
        const ivec odd = ESP_LANES & d, other = (ESP_LANES & d) / d * (ESP_WIDTH - d);
#pragma GCC unroll 16
        for (int i = 0; i < ESP_WIDTH; i++) {
            if (i & d) continue;
            const vec a = v[i], b = v[i + d];
            v[i] = __builtin_shuffle(a, b, ESP_LANES + other);
            v[i + d] = __builtin_shuffle(a, b, ESP_LANES + d + (ESP_WIDTH - d) * (odd / d));
        }
    }
}

ESP_INLINE float sum_lanes(vec v)
{
    float sum = 0;
    for (int i = 0; i < ESP_WIDTH; i++) sum += v[i];
    return sum;
}

/* max and min that hand on a NaN in x */
ESP_INLINE vec vmax(vec bound, vec x)
{
#if ESP_WIDTH == 16
    return (vec)_mm512_max_ps((__m512)bound, (__m512)x);
#elif ESP_WIDTH == 8
    return (vec)_mm256_max_ps((__m256)bound, (__m256)x);
#else
    return choose(x < bound, bound, x);
#endif
}

ESP_INLINE vec vmin(vec bound, vec x)
{
#if ESP_WIDTH == 16
    return (vec)_mm512_min_ps((__m512)bound, (__m512)x);
#elif ESP_WIDTH == 8
    return (vec)_mm256_min_ps((__m256)bound, (__m256)x);
#else
    return choose(x > bound, bound, x);
#endif
}

ESP_INLINE vec vabs(vec x) { return (vec)((ivec)x & 0x7fffffff); }

/* e^x to about 1e-7 relative: x = n ln 2 + r, a polynomial in r, n into the exponent */
ESP_INLINE vec vexp(vec x)
{
    x = vmin(splat(88.37f), vmax(splat(-87.33f), x));
    vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds to nearest */
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)exponent;
}

#endif
