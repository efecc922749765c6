/* Moving data: strided copies, the phases of strided windows, constants. */
#include <stdbool.h>

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
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    plane_row r = first_row(&s->out, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(&s->out, &p, &r)) {
        copy_row(out + place(&s->out, r), s->out.stride[3], in + place(&s->a, r), s->a.stride[3], s->out.size[3]);
        zero_margin(s, out, r.c, r.y);
    }
}

/* to[i] = from[2 * i]; vectors may read up to `end` */
ESP_INLINE void pick_even(float *to, const float *from, int64_t count, const float *end)
{
    int64_t i = 0;
    for (; i < count && from + 2 * i + 2 * ESP_WIDTH <= end; i += ESP_WIDTH) {
        const vec picked = even_lanes(load(from + 2 * i), load(from + 2 * i + ESP_WIDTH));
        if (count - i >= ESP_WIDTH)
            store(to + i, picked);
        else
            store_part(to + i, picked, (int)(count - i));
    }
    for (; i < count; i++) to[i] = from[2 * i];
}

/* Rows of one phase of one plane: out[y, x] = in[y * sy + y0, x * sx + x0], zero outside the image. */
static void gather_rows(const esp_step *s, const patch *p, float *out, const float *in, const float *end, int64_t y0,
    int64_t x0)
{
    const esp_operand *a = &s->a;
    const int64_t sy = s->param[GATHER_STRIDE_Y], sx = s->param[GATHER_STRIDE_X];
    const int64_t width = s->out.size[3], step = s->out.stride[3], from_step = sx * a->stride[3];
    /* the x that lie in the image: 0 <= x * sx + x0 < size */
    const int64_t room = a->size[3] - 1 - x0;
    int64_t high = room < 0 ? 0 : room / sx + 1, low = x0 < 0 ? (-x0 + sx - 1) / sx : 0;
    high = high > width ? width : high;
    low = low > high ? high : low;
    for (int64_t row = p->row; row < p->last_row; row++) {
        float *to = out + row * s->out.stride[2];
        const int64_t y = row * sy + y0;
        const bool inside = y >= 0 && y < a->size[2] && high > low;
        const int64_t first = inside ? low : 0, last = inside ? high : 0;
        for (int64_t x = 0; x < first; x++) to[x * step] = 0;
        if (inside) {
            const float *from = in + y * a->stride[2] + (low * sx + x0) * a->stride[3];
            if (step == 1 && from_step == 2)
                pick_even(to + low, from, last - first, end);
            else
                copy_row(to + low * step, step, from, from_step, last - first);
        }
        for (int64_t x = last; x < width; x++) to[x * step] = 0;
    }
}

/* Small planes without margins, moved as a whole at stride 1: what lies outside the image is masked. A mask for every
 * vector of every phase. */
enum { MOST_MASKS = 64, FARTHEST = 64 };

typedef struct {
    int64_t vectors, last; /* of an output plane, and how many lanes of its last vector count */
    _Alignas(64) int32_t inside[MOST_MASKS][ESP_WIDTH];
} masks;

static bool moves_whole(const esp_step *s)
{
    const esp_operand *a = &s->a, *o = &s->out;
    if (s->param[GATHER_STRIDE_Y] != 1 || s->param[GATHER_STRIDE_X] != 1 || a->size[3] != o->size[3]) return false;
    if (a->stride[3] != 1 || o->stride[3] != 1 || a->stride[2] != a->size[3] || o->stride[2] != o->size[3]) return false;
    if (o->size[2] > FARTHEST || o->size[3] > FARTHEST || o->size[0] > MOST_MASKS) return false;
    for (int64_t i = 0; i < s->index_count; i++)
        if (s->index[i] < -FARTHEST || s->index[i] > FARTHEST) return false;
    return o->size[0] * ((o->size[2] * o->size[3] + ESP_WIDTH - 1) / ESP_WIDTH) <= MOST_MASKS;
}

static void fill_masks(const esp_step *s, masks *m)
{
    const int64_t width = s->out.size[3], pixels = s->out.size[2] * width;
    m->vectors = (pixels + ESP_WIDTH - 1) / ESP_WIDTH;
    m->last = pixels - (m->vectors - 1) * ESP_WIDTH;
    for (int64_t n = 0; n < s->out.size[0]; n++)
        for (int64_t i = 0, y = s->index[2 * n], x = 0; i < m->vectors * ESP_WIDTH; i++) {
            const int64_t from = x + s->index[2 * n + 1];
            m->inside[n * m->vectors + i / ESP_WIDTH][i % ESP_WIDTH] =
                y >= 0 && y < s->a.size[2] && from >= 0 && from < width ? -1 : 0;
            if (++x < width) continue;
            x = 0;
            y++;
        }
}

/* Plane `in` as phase n, pixel (0, 0) of which lies `from` floats before or behind pixel (0, 0) of the image. */
static void move_whole(const masks *m, int64_t n, float *out, const float *in, int64_t from)
{
    for (int64_t v = 0; v < m->vectors; v++) {
        const ivec inside = *(const ivec *)m->inside[n * m->vectors + v];
        const vec x = choose(inside, load(in + from + v * ESP_WIDTH), (vec){0});
        if (v < m->vectors - 1 || m->last == ESP_WIDTH)
            store(out + v * ESP_WIDTH, x);
        else
            store_part(out + v * ESP_WIDTH, x, (int)m->last);
    }
}

/* The phases of a strided window: out[n, c] is the phase that begins at index[2 n], index[2 n + 1] of in[c]. */
void ESP_NAME(gather)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a;
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(a, f), *end = in + 1;
    for (int d = 1; d < 4; d++) end += (a->size[d] - 1) * a->stride[d];
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    const int64_t channels = s->out.size[1];
    const bool whole = moves_whole(s) && p.row == 0 && p.last_row == s->out.size[2];
    masks m;
    if (whole) fill_masks(s, &m);
    for (int64_t i = p.plane; i < p.last_plane; i++) {
        const int64_t n = i / channels, c = i % channels, row = s->index[2 * n] * a->stride[2];
        /* the planes beside this one are read with it: the first and the last have none */
        const int64_t first = c * a->stride[1] + row + s->index[2 * n + 1], last = first + (whole ? m.vectors * ESP_WIDTH : 0);
        if (whole && first >= 0 && last <= (channels - 1) * a->stride[1]) {
            move_whole(&m, n, out + n * s->out.stride[0] + c * s->out.stride[1], in + c * a->stride[1],
                row + s->index[2 * n + 1]);
            continue;
        }
        gather_rows(s, &p, out + n * s->out.stride[0] + c * s->out.stride[1], in + c * a->stride[1], end,
            s->index[2 * n], s->index[2 * n + 1]);
    }
}

void ESP_NAME(fill)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    plane_row r = first_row(&s->out, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(&s->out, &p, &r)) {
        float *row = out + place(&s->out, r);
        for (int64_t x = 0; x < s->out.size[3]; x++) row[x * s->out.stride[3]] = s->act_a;
        zero_margin(s, out, r.c, r.y);
    }
}
