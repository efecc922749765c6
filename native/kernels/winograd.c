/* Winograd's F(4 x 4, 3 x 3): windows of 3 x 3 at stride 1 with 36 products for 16 pixels instead of 144.
 *
 * y = A' [(G w G') * (B' x B)] A for tiles of 6 x 6 inputs that overlap by 2. winograd_in makes 36 planes of B' x B per
 * channel, with one number per tile; the conv kernels multiply them by G w G', which the compiler made;
 * winograd_out makes pixels of the products. Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015. */
#include "activate.h"
#include "planes.h"
#include "simd.h"

enum { WIDE = 4 * ESP_WIDTH };

/* t = B' d */
ESP_INLINE void into(const vec d[6], vec t[6])
{
    const vec a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1], c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
    t[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

/* y = A' m */
ESP_INLINE void out_of(const vec m[6], vec y[4])
{
    const vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
    y[0] = m[0] + a + c;
    y[1] = b + 2.0f * e;
    y[2] = a + 4.0f * c;
    y[3] = b + 8.0f * e + m[5];
}

/* `tiles` tiles from column 4 * at of a row of tiles, whose pixel (-1, 0) is at `in`; rows: how many of 6 there are */
ESP_INLINE void tiles_in(const esp_step *s, const float *in, int rows, int64_t at, int tiles, float *out, float *lines)
{
    enum { LINE = WIDE + ESP_WIDTH };
    const int64_t row = s->a.stride[2], left = 4 * at - 1;
    const int64_t needed = 4 * tiles + 2, there = s->a.size[3] + 1 - left; /* the margin of one pixel included */
    for (int64_t x = 0; x < needed; x += ESP_WIDTH) {
        vec d[6], t[6];
#pragma GCC unroll 6
        for (int k = 0; k < 6; k++) d[k] = k < rows ? load(in + k * row + left + x) : splat(0.0f);
        into(d, t);
#pragma GCC unroll 6
        for (int k = 0; k < 6; k++) store(lines + k * LINE + x, t[k]);
    }
    for (int k = 0; k < 6; k++)
        for (int64_t x = there; x < needed; x++) lines[k * LINE + x] = 0;
    for (int k = 0; k < 6; k++, out += 6 * s->out.stride[0]) {
        const float *line = lines + k * LINE;
        const vec a = load(line), b = load(line + ESP_WIDTH), c = load(line + 2 * ESP_WIDTH),
                  e = load(line + 3 * ESP_WIDTH);
        const vec even_ab = even_lanes(a, b), odd_ab = odd_lanes(a, b), even_ce = even_lanes(c, e),
                  odd_ce = odd_lanes(c, e);
        vec d[6], t[6];
        d[0] = even_lanes(even_ab, even_ce);
        d[1] = even_lanes(odd_ab, odd_ce);
        d[2] = odd_lanes(even_ab, even_ce);
        d[3] = odd_lanes(odd_ab, odd_ce);
        d[4] = next_lanes(d[0], splat(line[WIDE]));
        d[5] = next_lanes(d[1], splat(line[WIDE + 1]));
        into(d, t);
#pragma GCC unroll 6
        for (int j = 0; j < 6; j++) store_part(out + j * s->out.stride[0], t[j], tiles);
    }
}

/* out[6 i + j, c, ty, tx] = (B' x B)[i, j] of the tile whose first pixel is (4 (first + ty) - 1, 4 tx - 1) */
void ESP_NAME(winograd_in)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a, *o = &s->out;
    const float *in = esp_source(a, f);
    float *out = esp_target(o, f), lines[6 * (WIDE + ESP_WIDTH)] = {0};
    int64_t begin, end;
    share(o->size[1] * o->size[2], part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t c = i / o->size[2], ty = i % o->size[2], top = 4 * (s->param[WINOGRAD_FIRST] + ty) - 1;
        const int64_t rows = a->size[2] + 1 - top; /* down to the margin below the image */
        for (int64_t tx = 0; tx < o->size[3]; tx += ESP_WIDTH)
            tiles_in(s, in + c * a->stride[1] + top * a->stride[2], rows < 6 ? (int)rows : 6, tx,
                o->size[3] - tx < ESP_WIDTH ? (int)(o->size[3] - tx) : ESP_WIDTH,
                out + c * o->stride[1] + ty * o->stride[2] + tx, lines);
    }
}

/* A row of pixels from the one at `to` on, of which `count` exist. */
ESP_INLINE void finish(
    const esp_step *s, const vec phases[4], float bias, float *to, const float *residual, int64_t count)
{
    vec row[4];
    interleave(phases, row);
    for (int v = 0; v < 4 && count > 0; v++, count -= ESP_WIDTH) {
        const int lanes = count < ESP_WIDTH ? (int)count : ESP_WIDTH;
        vec z = row[v] + bias;
        if (residual) z += load_part(residual + v * ESP_WIDTH, lanes);
        store_part(to + v * ESP_WIDTH, activate(z, s->activation, s->act_a, s->act_b), lanes);
    }
}

/* out[c, 4 (first + ty) + 0..3, 4 tx + 0..3] = activation(A' a[., c, ty, tx] A + bias + residual) */
void ESP_NAME(winograd_out)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a, *o = &s->out;
    const float *in = esp_source(a, f), *residual = s->b.space ? esp_source(&s->b, f) : NULL;
    float *out = esp_target(o, f);
    int64_t begin, end;
    share(a->size[1] * a->size[2], part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t c = i / a->size[2], ty = i % a->size[2], y = 4 * (s->param[WINOGRAD_FIRST] + ty);
        const int64_t rows = o->size[2] - y < 4 ? o->size[2] - y : 4;
        const float *row = in + c * a->stride[1] + ty * a->stride[2], bias = s->bias ? s->bias[c] : 0.0f;
        float *to = out + c * o->stride[1] + y * o->stride[2];
        const float *other = residual ? residual + c * s->b.stride[1] + y * s->b.stride[2] : NULL;
        for (int64_t tx = 0; tx < a->size[3]; tx += ESP_WIDTH) {
            vec half[6][4];
#pragma GCC unroll 6
            for (int j = 0; j < 6; j++) {
                vec m[6];
#pragma GCC unroll 6
                for (int k = 0; k < 6; k++) m[k] = load(row + tx + (6 * k + j) * a->stride[0]);
                out_of(m, half[j]);
            }
            const int64_t tiles = a->size[3] - tx < ESP_WIDTH ? a->size[3] - tx : ESP_WIDTH;
            const int64_t left = o->size[3] - 4 * tx, count = left < 4 * tiles ? left : 4 * tiles;
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                if (k >= rows) break;
                const vec m[6] = {half[0][k], half[1][k], half[2][k], half[3][k], half[4][k], half[5][k]};
                vec phases[4];
                out_of(m, phases);
                finish(s, phases, bias, to + k * o->stride[2] + 4 * tx,
                    other ? other + k * s->b.stride[2] + 4 * tx : NULL, count);
            }
        }
        for (int64_t k = 0; k < rows; k++) zero_margin(s, out, c, y + k);
    }
}
