/* Layer norm over the last dimension. Where positions lie side by side (tokens along the vectors, one
 * plane per channel), a vector of them is worked on at once; else row by row. */
#include <math.h>

#include "planes.h"
#include "simd.h"

/* the first n lanes, or all; the others are zero */
ESP_INLINE vec load_some(const float *p, int64_t n) { return n >= ESP_WIDTH ? load(p) : load_part(p, (int)n); }

ESP_INLINE void store_some(float *p, vec v, int64_t n)
{
    if (n >= ESP_WIDTH)
        store(p, v);
    else
        store_part(p, v, (int)n);
}

/* (x - mean) / sqrt(var + eps) * values + bias */
static void norm_side(const esp_step *s, const float *x, float *y, int64_t n)
{
    const int64_t width = s->out.size[3], in = s->a.stride[3], to = s->out.stride[3];
    vec sum = splat(0.0f), square = splat(0.0f);
    for (int64_t k = 0; k < width; k++) sum += load_some(x + k * in, n);
    const vec mean = sum / (float)width;
    for (int64_t k = 0; k < width; k++) {
        vec d = load_some(x + k * in, n) - mean;
        square += d * d;
    }
    vec scale = square / (float)width + s->act_a;
    for (int i = 0; i < ESP_WIDTH; i++) scale[i] = 1.0f / sqrtf(scale[i]);
    for (int64_t k = 0; k < width; k++) {
        vec z = (load_some(x + k * in, n) - mean) * scale;
        if (s->values_count) z *= s->values[k];
        if (s->bias_count) z += s->bias[k];
        store_some(y + k * to, z, n);
    }
}

static void norm_row(const esp_step *s, const float *x, float *y)
{
    const int64_t width = s->out.size[3], in = s->a.stride[3], to = s->out.stride[3];
    double sum = 0, square = 0;
    for (int64_t k = 0; k < width; k++) sum += x[k * in];
    const float mean = (float)(sum / (double)width);
    for (int64_t k = 0; k < width; k++) square += (double)(x[k * in] - mean) * (x[k * in] - mean);
    const float scale = (float)(1.0 / sqrt(square / (double)width + s->act_a));
    for (int64_t k = 0; k < width; k++) {
        float z = (x[k * in] - mean) * scale;
        if (s->values_count) z *= s->values[k];
        y[k * to] = z + (s->bias_count ? s->bias[k] : 0.0f);
    }
}

void ESP_NAME(norm)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *o = &s->out, *a = &s->a;
    float *out = esp_target(o, f);
    const float *in = esp_source(a, f);
    if (o->stride[2] == 1 && a->stride[2] == 1 && o->size[2] > 1) {
        const int64_t pieces = (o->size[2] + ESP_WIDTH - 1) / ESP_WIDTH;
        int64_t begin, end;
        share(o->size[0] * o->size[1] * pieces, part, parts, &begin, &end);
        for (int64_t i = begin; i < end; i++) {
            const plane_row r = {i / pieces / o->size[1], i / pieces % o->size[1], i % pieces * ESP_WIDTH};
            norm_side(s, in + place(a, r), out + place(o, r), o->size[2] - r.y);
        }
        return;
    }
    const patch p = share_planes(o, part, parts, by_rows(o));
    plane_row r = first_row(o, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(o, &p, &r)) {
        norm_row(s, in + place(a, r), out + place(o, r));
        zero_margin(s, out, r.c, r.y);
    }
}
