/* Softmax over the last dimension: in vectors along it, or, where its elements lie apart but those of the dimension before
 * lie side by side, of many rows at once. */
#include <math.h>

#include "planes.h"
#include "simd.h"

ESP_INLINE float largest_lane(vec v)
{
    float most = v[0];
    for (int i = 1; i < ESP_WIDTH; i++) most = v[i] > most || v[i] != v[i] ? v[i] : most;
    return most;
}

ESP_INLINE vec logs(vec v)
{
    for (int i = 0; i < ESP_WIDTH; i++) v[i] = logf(v[i]);
    return v;
}

/* rows of which elements lie side by side; sums of all lanes in a fixed order */
static void along(float *y, const float *x, int64_t count, int as_logs)
{
    const int64_t whole = count / ESP_WIDTH * ESP_WIDTH;
    const int rest = (int)(count - whole);
    const lanes left = lanes_between(0, rest);
    vec most = splat(-INFINITY), sum = {0};
    for (int64_t k = 0; k < whole; k += ESP_WIDTH) most = vmax(most, load(x + k));
    if (rest) most = vmax(most, choose_lanes(left, load_part(x + whole, rest), splat(-INFINITY)));
    const vec highest = splat(largest_lane(most));
    for (int64_t k = 0; k < whole; k += ESP_WIDTH) {
        const vec e = vexp(load(x + k) - highest);
        if (!as_logs) store(y + k, e);
        sum += e;
    }
    if (rest) {
        const vec e = vexp(load_part(x + whole, rest) - highest);
        if (!as_logs) store_part(y + whole, e, rest);
        sum += choose_lanes(left, e, (vec){0});
    }
    const float total = sum_lanes(sum);
    const vec shift = splat(logf(total)), scale = splat(1.0f / total); /* x - highest first: both may be large */
    for (int64_t k = 0; k < whole; k += ESP_WIDTH) store(y + k, as_logs ? load(x + k) - highest - shift : load(y + k) * scale);
    if (!rest) return;
    const vec end = as_logs ? load_part(x + whole, rest) - highest - shift : load_part(y + whole, rest) * scale;
    store_part(y + whole, end, rest);
}

/* `rows` neighbours, at most ESP_WIDTH, each `count` elements that lie apart */
static void across(float *y, int64_t to, const float *x, int64_t from, int64_t count, int rows, int as_logs)
{
    vec most = load_part(x, rows), sum = {0};
    for (int64_t k = 1; k < count; k++) most = vmax(most, load_part(x + k * from, rows));
    for (int64_t k = 0; k < count; k++) {
        const vec e = vexp(load_part(x + k * from, rows) - most);
        if (!as_logs) store_part(y + k * to, e, rows);
        sum += e;
    }
    const vec shift = as_logs ? logs(sum) : sum, scale = 1.0f / sum;
    for (int64_t k = 0; k < count; k++) {
        const vec v = as_logs ? load_part(x + k * from, rows) - most - shift : load_part(y + k * to, rows) * scale;
        store_part(y + k * to, v, rows);
    }
}

void ESP_NAME(softmax)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *a = &s->a, *o = &s->out;
    float *out = esp_target(o, f);
    const float *in = esp_source(a, f);
    const int64_t count = o->size[3], to = o->stride[3], from = a->stride[3];
    const int side_by_side = to == 1 && from == 1, as_logs = s->param[SOFTMAX_LOG] != 0;
    const int neighbours = !side_by_side && o->stride[2] == 1 && a->stride[2] == 1 && !s->margins;
    const int64_t together = neighbours ? ESP_WIDTH : 1; /* rows that are worked on at once */
    const int64_t groups = (o->size[2] + together - 1) / together;
    int64_t begin, end;
    share(o->size[0] * o->size[1] * groups, part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const plane_row r = {i / groups / o->size[1], i / groups % o->size[1], i % groups * together};
        const int64_t rows = o->size[2] - r.y < together ? o->size[2] - r.y : together;
        if (side_by_side)
            along(out + place(o, r), in + place(a, r), count, as_logs);
        else
            across(out + place(o, r), to, in + place(a, r), from, count, (int)rows, as_logs);
        for (int64_t y = r.y; y < r.y + rows; y++) zero_margin(s, out, r.c, y);
    }
}
