/* Moving data: strided copies, the phases of strided windows, constants. */
#include <stdbool.h>

#include "planes.h"
#include "simd.h"

/* to[i] = from[2 * i]; `reach` floats from `from` on may be read */
ESP_INLINE void pick_even(float *to, const float *from, int64_t count, int64_t reach)
{
    int64_t i = 0;
    for (; i < count && 2 * i + 2 * ESP_WIDTH <= reach; i += ESP_WIDTH) {
        const vec picked = even_lanes(load(from + 2 * i), load(from + 2 * i + ESP_WIDTH));
        if (count - i >= ESP_WIDTH)
            store(to + i, picked);
        else
            store_part(to + i, picked, (int)(count - i));
    }
    for (; i < count; i++) to[i] = from[2 * i];
}

ESP_INLINE void copy_row(
    float *to, int64_t to_stride, const float *from, int64_t from_stride, int64_t count, int64_t reach)
{
    if (to_stride == 1 && from_stride == 1)
        memcpy(to, from, (size_t)count * sizeof *to);
    else if (to_stride == 1 && from_stride == 2)
        pick_even(to, from, count, reach);
    else
        for (int64_t i = 0; i < count; i++) to[i * to_stride] = from[i * from_stride];
}

/* Behind the last float of an operand that lies at `in`. */
static const float *end_of(const esp_operand *o, const float *in)
{
    const float *end = in + 1;
    for (int d = 1; d < 4; d++) end += (o->size[d] - 1) * o->stride[d];
    return end;
}

void ESP_NAME(copy)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(&s->a, f), *end = end_of(&s->a, in);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    plane_row r = first_row(&s->out, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(&s->out, &p, &r)) {
        const float *from = in + place(&s->a, r);
        copy_row(out + place(&s->out, r), s->out.stride[3], from, s->a.stride[3], s->out.size[3], end - from);
        zero_margin(s, out, r.c, r.y);
    }
}

/* Of `size` places along a side, the first that a phase takes, and behind the last: 0 <= place * stride + from < room. */
static void inside_of(int64_t size, int64_t stride, int64_t from, int64_t room, int64_t *low, int64_t *high)
{
    *low = from < 0 ? (-from + stride - 1) / stride : 0;
    *high = room > from ? (room - 1 - from) / stride + 1 : 0;
    *high = *high > size ? size : *high;
    *low = *low > *high ? *high : *low;
}

/* Rows of every second pixel, with a zero in front of `first` and behind `last` where the plane has no pixel. What lies
 * behind rows may be read. */
static void pick_rows(float *to, int64_t to_stride, int64_t width, const float *from, int64_t from_stride, int64_t rows,
    int64_t first, int64_t last)
{
    for (; rows > 0; rows--, to += to_stride, from += from_stride) {
        if (first) to[0] = 0;
        pick_even(to + first, from, last - first, INT64_MAX);
        if (last < width) to[last] = 0;
    }
}

/* Rows of one phase of one plane: out[y, x] = in[y * sy + y0, x * sx + x0], zero outside the image. */
static void gather_rows(const esp_step *s, const patch *p, float *out, const float *in, const float *end, int64_t y0,
    int64_t x0)
{
    const esp_operand *a = &s->a;
    const int64_t sy = s->param[GATHER_STRIDE_Y], sx = s->param[GATHER_STRIDE_X];
    const int64_t width = s->out.size[3], step = s->out.stride[3], from_step = sx * a->stride[3];
    int64_t low, high, above, below;
    inside_of(width, sx, x0, a->size[3], &low, &high);
    inside_of(s->out.size[2], sy, y0, a->size[2], &above, &below);
    const int64_t count = high - low;
    const bool own = a->space == ESP_ARENA || a->space == ESP_SCRATCH; /* what lies behind may be read */
    if (own && step == 1 && from_step == 2 && low <= 1 && high >= width - 1) {
        above = above < p->row ? p->row : above;
        below = below > p->last_row ? p->last_row : below;
        float *to = out + above * s->out.stride[2];
        const float *from = in + (above * sy + y0) * a->stride[2] + low * 2 + x0;
        pick_rows(to, s->out.stride[2], width, from, sy * a->stride[2], below - above, low, high);
        for (int64_t row = p->row; row < p->last_row; row++)
            if (row < above || row >= below) zero_floats(out + row * s->out.stride[2], width);
        return;
    }
    for (int64_t row = p->row; row < p->last_row; row++) {
        float *to = out + row * s->out.stride[2];
        if (row < above || row >= below) {
            for (int64_t x = 0; x < width; x++) to[x * step] = 0;
            continue;
        }
        const float *from = in + (row * sy + y0) * a->stride[2] + (low * sx + x0) * a->stride[3];
        for (int64_t x = 0; x < low; x++) to[x * step] = 0;
        copy_row(to + low * step, step, from, from_step, count, end - from);
        for (int64_t x = high; x < width; x++) to[x * step] = 0;
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
    const float *in = esp_source(a, f), *end = end_of(a, in);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    const int64_t phases = s->out.size[0], channels = s->out.size[1];
    const bool whole = moves_whole(s) && p.row == 0 && p.last_row == s->out.size[2];
    masks m;
    if (whole) fill_masks(s, &m);
    for (int64_t i = p.plane; i < p.last_plane; i++) {
        /* all phases of a plane while it is near */
        const int64_t n = i % phases, c = i / phases, row = s->index[2 * n] * a->stride[2];
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
    const esp_operand *o = &s->out;
    float *out = esp_target(o, f);
    const patch p = share_planes(o, part, parts, by_rows(o));
    plane_row r = first_row(o, &p);
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(o, &p, &r)) {
        float *row = out + place(o, r);
        int64_t x = 0;
        for (; o->stride[3] == 1 && x + ESP_WIDTH <= o->size[3]; x += ESP_WIDTH) store(row + x, splat(s->act_a));
        for (; x < o->size[3]; x++) row[x * o->stride[3]] = s->act_a;
        zero_margin(s, out, r.c, r.y);
    }
}
