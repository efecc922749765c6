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

enum { MOST_PHASES = 16, PLANES_AHEAD = 4 /* whose rows are fetched early */ };

/* Of `size` places along a side, the first that a phase takes, and behind the last: 0 <= place * stride + from < room. */
static void inside_of(int64_t size, int64_t stride, int64_t from, int64_t room, int64_t *low, int64_t *high)
{
    *low = from < 0 ? (-from + stride - 1) / stride : 0;
    *high = room > from ? (room - 1 - from) / stride + 1 : 0;
    *high = *high > size ? size : *high;
    *low = *low > *high ? *high : *low;
}

/* Rows of every second pixel, with a zero in front of `first` and behind `last` where the plane has no pixel. What lies
 * behind rows may be read. The same rows of the next plane, `plane` floats on, are fetched meanwhile. */
static void pick_rows(float *to, int64_t to_stride, int64_t width, const float *from, int64_t from_stride, int64_t rows,
    int64_t first, int64_t last, int64_t plane)
{
    for (; rows > 0; rows--, to += to_stride, from += from_stride) {
        for (int64_t i = 0; i < 2 * width; i += ESP_WIDTH) __builtin_prefetch(from + plane + i);
        if (first) to[0] = 0;
        pick_even(to + first, from, last - first, INT64_MAX);
        if (last < width) to[last] = 0;
    }
}

/* The same where rows fit into a vector; what lies before rows may be read, too. */
static void pick_short_rows(float *to, int64_t to_stride, int64_t width, const float *from, int64_t from_stride,
    int64_t rows, int64_t first, int64_t last)
{
    const lanes inside = lanes_between((int)first, (int)last);
    from -= 2 * first;
    for (; rows > 0; rows--, to += to_stride, from += from_stride) {
        const vec low = load(from), high = 2 * width > ESP_WIDTH ? load(from + ESP_WIDTH) : low;
        const vec picked = choose_lanes(inside, even_lanes(low, high), (vec){0});
        if (width == ESP_WIDTH)
            store(to, picked);
        else
            store_part(to, picked, (int)width);
    }
}

/* What of a phase lies inside the image: columns low..high - 1 of rows above..below - 1. The same for all planes, and
 * divisions take as long as moving a small plane. */
typedef struct {
    int64_t y0, x0, low, high, above, below;
} phase;

static phase phase_of(const esp_step *s, int64_t n)
{
    phase f = {s->index[2 * n], s->index[2 * n + 1], 0, 0, 0, 0};
    inside_of(s->out.size[3], s->param[GATHER_STRIDE_X], f.x0, s->a.size[3], &f.low, &f.high);
    inside_of(s->out.size[2], s->param[GATHER_STRIDE_Y], f.y0, s->a.size[2], &f.above, &f.below);
    return f;
}

/* Whether rows of a phase are picked by whole vectors: of every second pixel, with one zero at most on either side. */
static bool picks(const esp_step *s, const phase *f)
{
    const bool own = s->a.space == ESP_ARENA || s->a.space == ESP_SCRATCH; /* what lies behind may be read */
    return own && s->out.stride[3] == 1 && s->param[GATHER_STRIDE_X] * s->a.stride[3] == 2 && f->low <= 1 &&
           f->high >= s->out.size[3] - 1;
}

/* Rows of one phase of one plane: out[y, x] = in[y * sy + y0, x * sx + x0], zero outside the image. */
static void gather_rows(
    const esp_step *s, const patch *p, float *out, const float *in, const float *end, const phase *f)
{
    const esp_operand *a = &s->a;
    const int64_t sy = s->param[GATHER_STRIDE_Y], sx = s->param[GATHER_STRIDE_X], y0 = f->y0, x0 = f->x0;
    const int64_t width = s->out.size[3], step = s->out.stride[3], from_step = sx * a->stride[3];
    const int64_t low = f->low, high = f->high, count = high - low;
    int64_t above = f->above, below = f->below;
    if (picks(s, f)) {
        above = above < p->row ? p->row : above;
        below = below > p->last_row ? p->last_row : below;
        float *to = out + above * s->out.stride[2];
        const float *from = in + (above * sy + y0) * a->stride[2] + low * 2 + x0;
        if (width <= ESP_WIDTH)
            pick_short_rows(to, s->out.stride[2], width, from, sy * a->stride[2], below - above, low, high);
        else
            pick_rows(to, s->out.stride[2], width, from, sy * a->stride[2], below - above, low, high, a->stride[1]);
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

/* One row of a phase of all planes: where images lie row by row, they lie one behind the other. */
static void gather_row(const esp_step *s, float *out, const float *in, const phase *f, int64_t row)
{
    const esp_operand *a = &s->a, *o = &s->out;
    const int64_t width = o->size[3], planes = o->size[1];
    float *to = out + row * o->stride[2];
    if (row < f->above || row >= f->below) {
        for (int64_t c = 0; c < planes; c++) zero_floats(to + c * o->stride[1], width);
        return;
    }
    const float *from = in + (row * s->param[GATHER_STRIDE_Y] + f->y0) * a->stride[2] + f->low * 2 + f->x0;
    if (width <= ESP_WIDTH)
        pick_short_rows(to, o->stride[1], width, from, a->stride[1], planes, f->low, f->high);
    else
        pick_rows(to, o->stride[1], width, from, a->stride[1], planes, f->low, f->high, PLANES_AHEAD * a->stride[1]);
}

/* Small planes without margins, moved as a whole at stride 1: what lies outside the image is masked. */
enum { MOST_PIXELS = 2048, AT_ONCE = 8, FARTHEST = 64 };

static bool moves_whole(const esp_step *s)
{
    const esp_operand *a = &s->a, *o = &s->out;
    if (s->param[GATHER_STRIDE_Y] != 1 || s->param[GATHER_STRIDE_X] != 1 || a->size[3] != o->size[3]) return false;
    if (a->stride[3] != 1 || o->stride[3] != 1 || a->stride[2] != a->size[3] || o->stride[2] != o->size[3]) return false;
    for (int64_t i = 0; i < s->index_count; i++)
        if (s->index[i] < -FARTHEST || s->index[i] > FARTHEST) return false;
    return o->size[2] <= FARTHEST && o->size[3] <= FARTHEST && o->size[2] * o->size[3] <= MOST_PIXELS;
}

/* V vectors of one phase of `count` planes: `inside` are the lanes that lie in the image, `last` says how many of the last
 * vector lie in the phase. */
ESP_INLINE void move_vectors(const int V, const esp_step *s, float *out, const float *in, int64_t count,
    const lanes *inside, int last)
{
    const int64_t to = s->out.stride[1], from = s->a.stride[1];
    lanes which[AT_ONCE];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) which[v] = inside[v];
    for (; count > 0; count--, out += to, in += from) {
        vec x[AT_ONCE];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) x[v] = load_lanes(in + v * ESP_WIDTH, which[v]);
#pragma GCC unroll 8
        for (int v = 0; v < V - 1; v++) store(out + v * ESP_WIDTH, x[v]);
        if (last == ESP_WIDTH)
            store(out + (V - 1) * ESP_WIDTH, x[V - 1]);
        else
            store_part(out + (V - 1) * ESP_WIDTH, x[V - 1], last);
    }
}

/* Planes first..upto - 1 of phase f, of which whole vectors are read. */
static void move_whole(const esp_step *s, const phase *f, float *out, const float *in, int64_t first, int64_t upto)
{
    const int64_t width = s->out.size[3], pixels = s->out.size[2] * width, far = f->y0 * width + f->x0;
    const int vectors = (int)((pixels + ESP_WIDTH - 1) / ESP_WIDTH), last = (int)(pixels - (vectors - 1) * ESP_WIDTH);
    uint32_t bits[MOST_PIXELS / ESP_WIDTH] = {0};
    lanes inside[MOST_PIXELS / ESP_WIDTH];
    for (int64_t y = f->above; y < f->below; y++)
        for (int64_t i = y * width + f->low; i < y * width + f->high; i++)
            bits[i / ESP_WIDTH] |= 1u << i % ESP_WIDTH;
    for (int v = 0; v < vectors; v++) inside[v] = lanes_of(bits[v]);
    out += first * s->out.stride[1];
    in += first * s->a.stride[1] + far;
    for (int v = 0; v < vectors; v += AT_ONCE, out += AT_ONCE * ESP_WIDTH, in += AT_ONCE * ESP_WIDTH) {
        const int count = vectors - v < AT_ONCE ? vectors - v : AT_ONCE, end = v + count < vectors ? ESP_WIDTH : last;
        switch (count) {
#define CASE(V) \
    case V: \
        move_vectors(V, s, out, in, upto - first, inside + v, end); \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
    }
}

/* The planes of a phase, first..upto - 1, of which whole vectors may be read: with masked loads all, else those beside
 * which others lie. */
static void readable_planes(const esp_step *s, const phase *f, int64_t *first, int64_t *upto)
{
#if ESP_WIDTH < 8
    const int64_t from = s->a.stride[1], width = s->out.size[3], far = f->y0 * width + f->x0, room = (s->a.size[1] - 1) * from;
    const int64_t reach = far + s->out.size[2] * width + ESP_WIDTH;
    while (*first < *upto && *first * from + far < 0) ++*first;
    while (*first < *upto && (*upto - 1) * from + reach > room) --*upto;
#else
    (void)s, (void)f, (void)first, (void)upto;
#endif
}

/* The phases of a strided window: out[n, c] is the phase that begins at index[2 n], index[2 n + 1] of in[c]. */
void ESP_NAME(gather)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a;
    float *out = esp_target(&s->out, f);
    const float *in = esp_source(a, f), *end = end_of(a, in);
    const patch p = share_planes(&s->out, part, parts, by_rows(&s->out));
    const int64_t phases = s->out.size[0];
    phase known[MOST_PHASES];
    for (int64_t n = 0; n < phases && n < MOST_PHASES; n++) known[n] = phase_of(s, n);
    if (moves_whole(s) && p.row == 0 && p.last_row == s->out.size[2] && p.plane % phases == 0 && p.last_plane % phases == 0) {
        const int64_t first = p.plane / phases, upto = p.last_plane / phases;
        for (int64_t n = 0; n < phases; n++) {
            const phase far = n < MOST_PHASES ? known[n] : phase_of(s, n);
            float *to = out + n * s->out.stride[0];
            int64_t low = first, high = upto;
            readable_planes(s, &far, &low, &high);
            move_whole(s, &far, to, in, low, high);
            for (int64_t c = first; c < upto; c++)
                if (c < low || c >= high)
                    gather_rows(s, &p, to + c * s->out.stride[1], in + c * a->stride[1], end, &far);
        }
        return;
    }
    bool rows = by_rows(&s->out) && (by_rows(a) || phases > 1) && phases <= MOST_PHASES && p.plane == 0 && p.last_plane == phases * s->out.size[1];
    for (int64_t n = 0; n < phases && rows; n++) rows = picks(s, &known[n]);
    for (int64_t row = p.row; row < p.last_row && rows; row++)
        for (int64_t n = 0; n < phases; n++) gather_row(s, out + n * s->out.stride[0], in, &known[n], row);
    if (rows) return;
    int64_t c = p.plane / phases, n = p.plane % phases;
    for (int64_t i = p.plane; i < p.last_plane; i++, c += ++n == phases, n = n == phases ? 0 : n) {
        /* all phases of a plane while it is near */
        const phase far = n < MOST_PHASES ? known[n] : phase_of(s, n);
        gather_rows(s, &p, out + n * s->out.stride[0] + c * s->out.stride[1], in + c * a->stride[1], end, &far);
    }
}

void ESP_NAME(fill)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *o = &s->out;
    float *out = esp_target(o, f);
    const patch p = share_planes(o, part, parts, by_rows(o));
    plane_row r = first_row(o, &p);
    if (s->act_a == 0 && s->margins && o->size[0] == 1 && !by_rows(o) && p.row == 0 && p.last_row == o->size[2]) {
        /* planes and margins alike, one behind the other */
        if (p.plane == 0) zero_floats(out - s->front, s->front);
        zero_floats(out + p.plane * o->stride[1], (p.last_plane - p.plane) * o->stride[1]);
        return;
    }
    for (int64_t i = rows_of(&p); i > 0; i--, next_row(o, &p, &r)) {
        float *row = out + place(o, r);
        int64_t x = 0;
        for (; o->stride[3] == 1 && x + ESP_WIDTH <= o->size[3]; x += ESP_WIDTH) store(row + x, splat(s->act_a));
        for (; x < o->size[3]; x++) row[x * o->stride[3]] = s->act_a;
        zero_margin(s, out, r.c, r.y);
    }
}
