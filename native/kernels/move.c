/* Moving data: strided copies, the phases of strided windows, constants. */
#include "planes.h"
#include "simd.h"

ESP_INLINE void copy_row(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t count)
{
    if (to_stride == 1 && from_stride == 1)
        memcpy(to, from, (size_t)count * sizeof *to);
    else
        for (int64_t i = 0; i < count; i++) to[i * to_stride] = from[i * from_stride];
}

void ESP_NAME(copy)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(&s->a, f);
    int64_t begin, end;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        copy_row(out + place(&s->out, r), s->out.stride[3], in + place(&s->a, r), s->a.stride[3], s->out.size[3]);
        zero_margin(s, out, r.c, r.y);
    }
}

/* to[i] = from[i * stride]; a stride of 2 is common enough for vectors */
ESP_INLINE void pick(float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t count)
{
    if (to_stride == 1 && from_stride == 2)
        for (int64_t i = 0; i < count; i++) to[i] = from[2 * i];
    else
        copy_row(to, to_stride, from, from_stride, count);
}

/* out[n, c, y, x] = in[c, y * stride + y0(n), x * stride + x0(n)], zero outside the image */
void ESP_NAME(gather)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a;
    const int64_t sy = s->param[GATHER_STRIDE_Y], sx = s->param[GATHER_STRIDE_X], width = s->out.size[3];
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(a, f);
    int64_t begin, end;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        int64_t y = r.y * sy + s->index[2 * r.n], x0 = s->index[2 * r.n + 1];
        float *to = out + place(&s->out, r);
        const int64_t step = s->out.stride[3];
        /* the x that lie in the image: 0 <= x * sx + x0 < size */
        int64_t low = x0 < 0 ? (-x0 + sx - 1) / sx : 0, room = a->size[3] - 1 - x0;
        int64_t high = room < 0 ? 0 : room / sx + 1;
        if (y < 0 || y >= a->size[2]) high = 0;
        high = high > width ? width : high;
        low = low > high ? high : low;
        const float *from = in + r.c * a->stride[1] + (high > low ? y * a->stride[2] + x0 * a->stride[3] : 0);
        for (int64_t x = 0; x < low; x++) to[x * step] = 0;
        pick(to + low * step, step, from + low * sx * a->stride[3], sx * a->stride[3], high - low);
        for (int64_t x = high; x < width; x++) to[x * step] = 0;
    }
}

void ESP_NAME(fill)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    int64_t begin, end;
    share(rows_of(&s->out), part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        plane_row r = row_at(&s->out, i);
        float *row = out + place(&s->out, r);
        for (int64_t x = 0; x < s->out.size[3]; x++) row[x * s->out.stride[3]] = s->act_a;
        zero_margin(s, out, r.c, r.y);
    }
}
