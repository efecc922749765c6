/* Sharing out rows of planes, and their margins.
 *
 * Planes lie one behind the other: each is followed by its back margin (up to the next plane), a row by its side margin
 * (up to the next row). Or they lie row by row: one row of all planes, each followed by its side margin, then the next
 * row of all; rows of margin lie before the first and behind the last. `front` floats lie before the first pixel.
 * Whoever writes a row zeroes what belongs to it. */
#ifndef ESP_PLANES_H
#define ESP_PLANES_H

#include <stdbool.h>
#include <string.h>

#include "../src/program.h"

static inline void share(int64_t count, int part, int parts, int64_t *begin, int64_t *end)
{
    *begin = count * part / parts;
    *end = count * (part + 1) / parts;
}

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline void zero_floats(float *p, int64_t count)
{
    if (count > 8)
        memset(p, 0, (size_t)count * sizeof *p);
    else
        for (int64_t i = 0; i < count; i++) p[i] = 0;
}

static inline bool by_rows(const esp_operand *o) { return o->size[2] > 1 && o->stride[2] > o->stride[1]; }

/* Planes row by row: the margin above or below, if row y of plane c is the first or the last. */
static inline void zero_above_and_below(const esp_step *s, float *out, int64_t c, int64_t y)
{
    const int64_t plane = s->out.stride[1], row = s->out.stride[2], rows = s->front / row;
    float *first = out + c * plane, *last = first + (s->out.size[2] - 1) * row;
    for (int64_t k = 1; k <= rows && y == 0; k++) zero_floats(first - k * row, plane);
    for (int64_t k = 1; k <= rows && y == s->out.size[2] - 1; k++) zero_floats(last + k * row, plane);
    if (c == 0 && y == 0) zero_floats(out - s->front, s->front - rows * row);
}

/* the margins that belong to row y of plane c of the step's output, whose pixel (0, 0, 0) is at `out` */
static inline void zero_margin(const esp_step *s, float *out, int64_t c, int64_t y)
{
    const esp_operand *o = &s->out;
    if (!s->margins) return;
    float *row = out + c * o->stride[1] + y * o->stride[2], *behind = row + o->size[3];
    if (by_rows(o)) {
        zero_floats(behind, o->stride[1] - o->size[3]);
        zero_above_and_below(s, out, c, y);
        return;
    }
    float *next = y + 1 < o->size[2] ? row + o->stride[2] : out + (c + 1) * o->stride[1];
    zero_floats(behind, next - behind);
    if (c == 0 && y == 0) zero_floats(out - s->front, s->front);
}

/* One row of an operand. */
typedef struct {
    int64_t n, c, y;
} plane_row;

static inline int64_t place(const esp_operand *o, plane_row r)
{
    return r.n * o->stride[0] + r.c * o->stride[1] + r.y * o->stride[2];
}

/* Rows row..last_row - 1 of planes plane..last_plane - 1. */
typedef struct {
    int64_t plane, last_plane, row, last_row;
} patch;

/* Floats of a band: with less, where rows of a plane lie together, prefetchers of a core fetch the bands beside it, too,
 * which others write. */
enum { LEAST_BAND = 1024 };

static inline bool bands_pay(const esp_operand *o, int parts) { return o->size[2] / parts * o->size[3] >= LEAST_BAND; }

/* Share `part` of the planes of `o`: a band of the rows of all of them, which a thread has in its own cache since steps
 * with weights share out pixels; or whole planes, where bands would be too narrow. */
static inline patch share_planes(const esp_operand *o, int part, int parts, bool narrow)
{
    const int64_t planes = o->size[0] * o->size[1], rows = o->size[2];
    patch p = {0, planes, 0, rows};
    if (rows >= parts && (narrow || bands_pay(o, parts) || planes < parts))
        share(rows, part, parts, &p.row, &p.last_row);
    else
        share(planes, part, parts, &p.plane, &p.last_plane);
    return p;
}

static inline int64_t rows_of(const patch *p) { return (p->last_plane - p->plane) * (p->last_row - p->row); }

static inline plane_row first_row(const esp_operand *o, const patch *p)
{
    return (plane_row){p->plane / o->size[1], p->plane % o->size[1], p->row};
}

/* the row behind r */
static inline void next_row(const esp_operand *o, const patch *p, plane_row *r)
{
    if (++r->y < p->last_row) return;
    r->y = p->row;
    if (++r->c < o->size[1]) return;
    r->c = 0;
    r->n++;
}

#endif
