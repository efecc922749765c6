/* One number at a time: arithmetic of two, scale and shift, activations. */
#include "activate.h"
#include "planes.h"
#include "simd.h"

enum { STRIP = 8 * ESP_WIDTH };

/* up to STRIP elements, strided or not, into a buffer; the rest of the last vector is zero */
ESP_INLINE void fetch(float *strip, const float *from, int64_t stride, int64_t count)
{
    if (stride == 1)
        for (int64_t i = 0; i < count; i++) strip[i] = from[i];
    else
        for (int64_t i = 0; i < count; i++) strip[i] = from[i * stride];
    for (int64_t i = count; i % ESP_WIDTH; i++) strip[i] = 0;
}

ESP_INLINE void deliver(float *to, int64_t stride, const float *strip, int64_t count)
{
    if (stride == 1)
        for (int64_t i = 0; i < count; i++) to[i] = strip[i];
    else
        for (int64_t i = 0; i < count; i++) to[i * stride] = strip[i];
}

ESP_INLINE vec combine(vec x, vec y, int64_t kind)
{
    switch (kind) {
    case 0: return x + y;
    case 1: return x - y;
    case 2: return x * y;
    default: return x / y;
    }
}

void ESP_NAME(binary)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f), first[STRIP], second[STRIP];
    const float *a = esp_source(&s->a, f), *b = esp_source(&s->b, f);
    const int64_t width = s->out.size[3];
    int64_t begin, end;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        float *to = out + place(&s->out, r);
        const float *x = a + place(&s->a, r), *y = b + place(&s->b, r);
        for (int64_t at = 0; at < width; at += STRIP) {
            int64_t count = width - at < STRIP ? width - at : STRIP;
            fetch(first, x + at * s->a.stride[3], s->a.stride[3], count);
            fetch(second, y + at * s->b.stride[3], s->b.stride[3], count);
            for (int64_t v = 0; v < count; v += ESP_WIDTH) {
                vec z = combine(load(first + v), load(second + v), s->param[BINARY_KIND]);
                store(first + v, activate(z, s->activation, s->act_a, s->act_b));
            }
            deliver(to + at * s->out.stride[3], s->out.stride[3], first, count);
        }
        zero_margin(s, out, r.c, r.y);
    }
}

/* activation(scale * x + shift), scale and shift one number, one per channel, or none */
void ESP_NAME(unary)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f), strip[STRIP];
    const float *a = esp_source(&s->a, f);
    const int64_t width = s->out.size[3];
    int64_t begin, end;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        float *to = out + place(&s->out, r);
        const float *x = a + place(&s->a, r);
        const float scale = s->values_count ? s->values[s->values_count > 1 ? r.c : 0] : 1.0f;
        const float shift = s->bias_count ? s->bias[s->bias_count > 1 ? r.c : 0] : 0.0f;
        for (int64_t at = 0; at < width; at += STRIP) {
            int64_t count = width - at < STRIP ? width - at : STRIP;
            fetch(strip, x + at * s->a.stride[3], s->a.stride[3], count);
            for (int64_t v = 0; v < count; v += ESP_WIDTH)
                store(strip + v, activate(load(strip + v) * scale + shift, s->activation, s->act_a, s->act_b));
            deliver(to + at * s->out.stride[3], s->out.stride[3], strip, count);
        }
        zero_margin(s, out, r.c, r.y);
    }
}
