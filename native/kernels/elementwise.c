/* One number at a time: arithmetic of two, scale and shift, activations. */
#include "activate.h"
#include "planes.h"
#include "simd.h"

/* `count` numbers, `stride` floats apart: side by side, one for all, or anyhow */
ESP_INLINE vec fetch(const float *p, int64_t stride, int count)
{
    if (stride == 1) return count == ESP_WIDTH ? load(p) : load_part(p, count);
    if (stride == 0) return splat(*p);
    vec v = {0};
    for (int i = 0; i < count; i++) v[i] = p[i * stride];
    return v;
}

ESP_INLINE void deliver(float *p, int64_t stride, vec v, int count)
{
    if (stride != 1)
        for (int i = 0; i < count; i++) p[i * stride] = v[i];
    else if (count == ESP_WIDTH)
        store(p, v);
    else
        store_part(p, v, count);
}

/* One row of a step with its strides; b is used by arithmetic only. */
typedef struct {
    float *to;
    const float *a, *b;
    int64_t count, to_stride, a_stride, b_stride;
    float scale, shift, act_a, act_b;
    int activation;
} row;

ESP_INLINE vec combine(vec x, vec y, const int kind)
{
    switch (kind) {
    case 0: return x + y;
    case 1: return x - y;
    case 2: return x * y;
    default: return x / y;
    }
}

/* Activations that have loops of their own when they stand alone. */
ESP_INLINE int inlined(const int activation)
{
    return activation == ESP_SIGMOID || activation == ESP_SILU || activation == ESP_HARDSWISH ||
           activation == ESP_HARDSIGMOID || activation == ESP_GELU;
}

/* What is constant here is decided outside the loop: arithmetic (negative: scale and shift) and activation. */
ESP_INLINE void line(const row *given, const int arithmetic, const int activation, const int64_t a_stride,
    const int64_t b_stride, const int64_t to_stride)
{
    const row r = *given; /* stores do not change it */
    for (int64_t x = 0; x < r.count; x += ESP_WIDTH) {
        const int count = r.count - x < ESP_WIDTH ? (int)(r.count - x) : ESP_WIDTH;
        vec v = fetch(r.a + x * a_stride, a_stride, count);
        v = arithmetic < 0 ? v * r.scale + r.shift : combine(v, fetch(r.b + x * b_stride, b_stride, count), arithmetic);
        v = arithmetic < 0 && inlined(activation) ? curved(v, activation, 0) : activate(v, activation, r.act_a, r.act_b);
        deliver(r.to + x * to_stride, to_stride, v, count);
    }
}

/* rows that lie side by side, their second operand too or one number; and all others */
ESP_INLINE void line_by_strides(const row *r, const int arithmetic, const int activation)
{
    if (r->a_stride != 1 || r->to_stride != 1 || r->b_stride > 1)
        line(r, arithmetic, activation, r->a_stride, r->b_stride, r->to_stride);
    else if (arithmetic < 0 || r->b_stride == 0)
        line(r, arithmetic, activation, 1, 0, 1);
    else
        line(r, arithmetic, activation, 1, 1, 1);
}

ESP_INLINE void line_by_activation(const row *r, const int arithmetic)
{
    switch (r->activation) {
    case ESP_LINEAR_ACT: line_by_strides(r, arithmetic, ESP_LINEAR_ACT); break;
    case ESP_CLAMP: line_by_strides(r, arithmetic, ESP_CLAMP); break;
    default: line_by_strides(r, arithmetic, r->activation); break;
    }
}

static void line_scaled(const row *r)
{
    switch (r->activation) {
    case ESP_SIGMOID: line_by_strides(r, -1, ESP_SIGMOID); break;
    case ESP_SILU: line_by_strides(r, -1, ESP_SILU); break;
    case ESP_HARDSWISH: line_by_strides(r, -1, ESP_HARDSWISH); break;
    case ESP_HARDSIGMOID: line_by_strides(r, -1, ESP_HARDSIGMOID); break;
    case ESP_GELU: line_by_strides(r, -1, ESP_GELU); break;
    default: line_by_activation(r, -1); break;
    }
}

static void line_combined(const row *r, int64_t kind)
{
    switch (kind) {
    case 0: line_by_activation(r, 0); break;
    case 1: line_by_activation(r, 1); break;
    case 2: line_by_activation(r, 2); break;
    default: line_by_activation(r, 3); break;
    }
}

ESP_INLINE row row_of(const esp_step *s)
{
    return (row){.count = s->out.size[3], .to_stride = s->out.stride[3], .a_stride = s->a.stride[3], .scale = 1.0f,
        .act_a = s->act_a, .act_b = s->act_b, .activation = s->activation};
}

void ESP_NAME(binary)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *a = esp_source(&s->a, f), *b = esp_source(&s->b, f);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    row r = row_of(s);
    r.b_stride = s->b.stride[3];
    plane_row at = first_row(&s->out, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(&s->out, &p, &at)) {
        r.to = out + place(&s->out, at);
        r.a = a + place(&s->a, at);
        r.b = b + place(&s->b, at);
        line_combined(&r, s->param[BINARY_KIND]);
        zero_margin(s, out, at.c, at.y);
    }
}

/* activation(scale * x + shift), scale and shift one number, one per channel, or none */
void ESP_NAME(unary)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *a = esp_source(&s->a, f);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    row r = row_of(s);
    plane_row at = first_row(&s->out, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(&s->out, &p, &at)) {
        r.to = out + place(&s->out, at);
        r.a = a + place(&s->a, at);
        r.scale = s->values_count ? s->values[s->values_count > 1 ? at.c : 0] : 1.0f;
        r.shift = s->bias_count ? s->bias[s->bias_count > 1 ? at.c : 0] : 0.0f;
        line_scaled(&r);
        zero_margin(s, out, at.c, at.y);
    }
}
