/* Up-sampling: every output mixes the pixels of two rows and two columns (nearest: one), whose places and shares are
 * given: rows first, then columns, the columns up to a multiple of 16. */
#include "planes.h"
#include "simd.h"

void ESP_NAME(resize)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *o = &s->out;
    const int64_t height = o->size[2], width = o->size[3], padded = (width + 15) / 16 * 16;
    const int mixes = s->values_count > 0;
    const int32_t *x0 = s->index + height, *y1 = x0 + padded, *x1 = y1 + height;
    const float *in = esp_source(&s->a, f), *share_y = s->values, *share_x = s->values + height;
    float *out = esp_target(o, f);
    const patch p = share_planes(o, part, parts, by_rows(o));
    plane_row r = first_row(o, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(o, &p, &r)) {
        const float *plane = in + r.c * s->a.stride[1], *first = plane + s->index[r.y] * s->a.stride[2];
        const float *second = mixes ? plane + y1[r.y] * s->a.stride[2] : first;
        float *to = out + place(o, r);
        for (int64_t x = 0; x < width; x += ESP_WIDTH) {
            vec y = gather(first, x0 + x);
            if (mixes) {
                const vec across = load(share_x + x);
                y += (gather(first, x1 + x) - y) * across;
                vec z = gather(second, x0 + x);
                z += (gather(second, x1 + x) - z) * across;
                y += (z - y) * share_y[r.y];
            }
            const int64_t left = width - x;
            if (o->stride[3] != 1)
                for (int k = 0; k < ESP_WIDTH && k < left; k++) to[(x + k) * o->stride[3]] = y[k];
            else if (left >= ESP_WIDTH)
                store(to + x, y);
            else
                store_part(to + x, y, (int)left);
        }
        zero_margin(s, out, r.c, r.y);
    }
}
