/* Windows at stride 2 over few channels, as a network's first: Winograd's F(4, 4) along the rows.
 *
 * At stride 2 the even and the odd columns of a window read every other pixel each, so both are windows of up to 4
 * columns at stride 1. y = A' [(G w) * (B' x)] for 4 pixels from 7 inputs: 7 products for each row of either, and one A'
 * for all of them together, where the plain sum takes 28 for a window of 7 columns. The points are +-1/2, +-1, +-2 and
 * infinity. A band of rows goes through at once: B' x of what it reads lies by points, channels, even and odd columns
 * and rows, with one number for each tile of 4 pixels, rows of tiles one behind the other, so that vectors are full
 * where rows of tiles do not fill them. Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015. */
#include "activate.h"
#include "planes.h"
#include "simd.h"

enum {
    POINTS = ESP_STEM_POINTS,
    AT_ONCE = ESP_WIDTH == 16 ? ESP_STEM_HEIGHT : 4, /* filters */
    WIDEST = 3,                                      /* vectors of tiles at once */
    ACROSS = 32,                                     /* tiles of a row in a band, at most */
    TILES = 128,                                     /* of a band, or more where rows are short */
    FAR = (ESP_STEM_WINDOW - 1) / 2,                 /* rows of either kind that a window reaches down */
    MOST = TILES + ESP_WIDTH,                        /* tiles of a band, and what else their vectors hold */
    LINE = 8 * (ACROSS + ESP_WIDTH),
    ROOM = 2 * POINTS * 2 * ESP_STEM_CHANNELS * (TILES + FAR * ACROSS) + WIDEST * ESP_WIDTH,
};

/* Rows of pixels, or a part of each, and what their windows read. */
typedef struct {
    int64_t y, first;    /* the first row; the first tile of each */
    int64_t rows, across; /* how many rows; tiles of each */
    int64_t lines;       /* even rows of the input, and as many odd ones */
    int64_t vectors;     /* of tiles */
    int64_t plane;       /* floats of one point, channel and kind of columns: of such rows */
} band;

/* t = B' d */
ESP_INLINE void into(const vec d[POINTS], vec t[POINTS])
{
    const vec half = d[4] - 5.0f * d[2] + 4.0f * d[0], half_odd = d[5] - 5.0f * d[3] + 4.0f * d[1];
    const vec one = d[4] - 4.25f * d[2] + d[0], one_odd = d[5] - 4.25f * d[3] + d[1];
    const vec two = d[4] - 1.25f * d[2] + 0.25f * d[0], two_odd = d[5] - 1.25f * d[3] + 0.25f * d[1];
    t[0] = half_odd + 0.5f * half;
    t[1] = half_odd - 0.5f * half;
    t[2] = one_odd + one;
    t[3] = one_odd - one;
    t[4] = two_odd + 2.0f * two;
    t[5] = two_odd - 2.0f * two;
    t[6] = d[6] - d[0] + 5.25f * (d[2] - d[4]);
}

/* y = A' m */
ESP_INLINE void out_of(const vec m[POINTS], vec y[4])
{
    const vec half = m[0] + m[1], one = m[2] + m[3], two = m[4] + m[5];
    const vec half_odd = m[0] - m[1], one_odd = m[2] - m[3], two_odd = m[4] - m[5];
    y[0] = half + one + two;
    y[1] = 0.5f * half_odd + one_odd + 2.0f * two_odd;
    y[2] = 0.25f * half + one + 4.0f * two;
    y[3] = 0.125f * half_odd + one_odd + 8.0f * two_odd + m[6];
}

/* The pixels of row y of a channel that a band's tiles read, with zeros where there are none. */
static void read_line(const esp_step *s, const band *b, const float *channel, int64_t y, float line[LINE])
{
    const int64_t x = 8 * b->first - s->param[STEM_PAD_X], width = s->a.size[3];
    int64_t from = x < 0 ? -x : 0, upto = width - x;
    if (y < 0 || y >= s->a.size[2] || from > LINE) from = LINE;
    if (upto > LINE) upto = LINE;
    if (upto < from) upto = from;
    zero_floats(line, from);
    if (upto > from) memcpy(line + from, channel + y * s->a.stride[2] + x + from, (size_t)(upto - from) * sizeof *line);
    zero_floats(line + upto, LINE - upto);
}

/* B' x of a vector of tiles whose pixels begin at `line`, of which `tiles` are stored, points `point` floats apart, odd
 * columns `plane` floats behind even ones. */
ESP_INLINE void tiles_in(const float *line, int tiles, float *out, int64_t point, int64_t plane)
{
    vec l[8], half[8], d[14];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) l[k] = load(line + k * ESP_WIDTH);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        half[k] = even_lanes(l[2 * k], l[2 * k + 1]);
        half[4 + k] = odd_lanes(l[2 * k], l[2 * k + 1]);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        const vec *h = half + 4 * odd;
        const vec a = even_lanes(h[0], h[1]), b = even_lanes(h[2], h[3]);
        const vec c = odd_lanes(h[0], h[1]), e = odd_lanes(h[2], h[3]);
        d[odd] = even_lanes(a, b);
        d[odd + 4] = odd_lanes(a, b);
        d[odd + 2] = even_lanes(c, e);
        d[odd + 6] = odd_lanes(c, e);
    }
#pragma GCC unroll 6
    for (int k = 0; k < 6; k++) d[8 + k] = next_lanes(d[k], splat(line[8 * ESP_WIDTH + k]));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
        const vec columns[POINTS] = {d[odd], d[odd + 2], d[odd + 4], d[odd + 6], d[odd + 8], d[odd + 10], d[odd + 12]};
        vec t[POINTS];
        into(columns, t);
#pragma GCC unroll 7
        for (int j = 0; j < POINTS; j++) store_part(out + odd * plane + j * point, t[j], tiles);
    }
}

/* B' x of all that a band's windows read. */
static void read_band(const esp_step *s, const esp_frame *f, const band *b, float *room)
{
    const float *in = esp_source(&s->a, f);
    const int64_t channels = s->a.size[1], point = 2 * channels * b->plane;
    const int64_t rows = 2 * b->rows - 2 + s->param[STEM_WINDOW_Y];
    float line[LINE];
    for (int64_t c = 0; c < channels; c++)
        for (int64_t q = 0; q < rows; q++) {
            float *out = room + q % 2 * POINTS * point + 2 * c * b->plane + q / 2 * b->across;
            read_line(s, b, in + c * s->a.stride[1], 2 * b->y - s->param[STEM_PAD_Y] + q, line);
            for (int64_t t = 0, left = b->across; t < b->across; t += ESP_WIDTH, left -= ESP_WIDTH)
                tiles_in(line + 8 * t, left < ESP_WIDTH ? (int)left : ESP_WIDTH, out + t, point, b->plane);
        }
}

/* Where each column of the weights finds its rows of tiles, at the first point. */
static void find_columns(const esp_step *s, const band *b, int32_t *index)
{
    const int64_t kinds = 2 * s->a.size[1], window = s->param[STEM_WINDOW_Y];
    for (int64_t k = 0; k < kinds; k++)
        for (int64_t y = 0; y < window; y++)
            *index++ = (int32_t)((y % 2 * POINTS * kinds + k) * b->plane + y / 2 * b->across);
}

/* V vectors of products: out[m] = w[column][m] * in[index[column]], summed over columns */
ESP_INLINE void sum_up(const int V, const float *in, const int32_t *index, int64_t columns, const float *w, float *out)
{
    vec acc[AT_ONCE][WIDEST] = {0};
    for (const int32_t *end = index + columns; index < end; index++, w += ESP_STEM_HEIGHT) {
        vec x[WIDEST];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) x[v] = load(in + *index + v * ESP_WIDTH);
#pragma GCC unroll 8
        for (int m = 0; m < AT_ONCE; m++)
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) acc[m][v] += splat(w[m]) * x[v];
    }
#pragma GCC unroll 8
    for (int m = 0; m < AT_ONCE; m++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) store(out + m * MOST + v * ESP_WIDTH, acc[m][v]);
}

/* Pixels of `count` tiles from tile `tile` of a band on, where rows of pixels do not lie as rows of tiles do. */
static void store_apart(const esp_step *s, const band *b, const float *pixels, float *plane, int64_t tile, int64_t count)
{
    const int64_t width = s->out.size[3];
    while (count > 0) {
        const int64_t row = tile / b->across, t = tile % b->across, x = 4 * (b->first + t);
        const int64_t tiles = count < b->across - t ? count : b->across - t;
        const int64_t floats = width - x < 4 * tiles ? width - x : 4 * tiles;
        memcpy(plane + (b->y + row) * s->out.stride[2] + x, pixels, (size_t)floats * sizeof *pixels);
        pixels += 4 * tiles;
        tile += tiles;
        count -= tiles;
    }
}

/* The products of the AT_ONCE filters whose weights begin at `w` with all tiles of a band, [points][filters][tiles].
 * soon: where the pixels of the first go; lines there are fetched early. */
static void multiply(const esp_step *s, const band *b, const float *room, const int32_t *index, int64_t columns,
    const float *w, float *products, const float *soon)
{
    const int64_t point = 2 * s->a.size[1] * b->plane, steps = divide_up(b->vectors, WIDEST);
    for (int j = 0; j < POINTS; j++, room += point, w += columns * ESP_STEM_HEIGHT, products += AT_ONCE * MOST) {
        for (int64_t step = 0, from, upto = 0; step < steps; step++) { /* of nearly equal width */
            from = upto;
            upto = b->vectors * (step + 1) / steps;
            for (int m = j; m < AT_ONCE; m += POINTS)
                for (int64_t k = 4 * from; k < 4 * upto; k++)
                    __builtin_prefetch(soon + m * s->out.stride[1] + k * ESP_WIDTH, 1);
            if (upto - from == 3)
                sum_up(3, room + from * ESP_WIDTH, index, columns, w, products + from * ESP_WIDTH);
            else if (upto - from == 2)
                sum_up(2, room + from * ESP_WIDTH, index, columns, w, products + from * ESP_WIDTH);
            else
                sum_up(1, room + from * ESP_WIDTH, index, columns, w, products + from * ESP_WIDTH);
        }
    }
}

/* The pixels of one filter. flat: rows of pixels lie one behind the other, as rows of tiles do. */
static void finish(const esp_step *s, const band *b, const float *products, float bias, float *plane, bool flat)
{
    const int64_t tiles = b->rows * b->across;
    for (int64_t tile = 0; tile < tiles; tile += ESP_WIDTH) {
        float apart[4 * ESP_WIDTH], *to = flat ? plane + b->y * s->out.stride[2] + 4 * tile : apart;
        int64_t lanes = flat ? 4 * (tiles - tile) : 4 * ESP_WIDTH;
        vec at[POINTS], y[4], pixels[4];
#pragma GCC unroll 7
        for (int j = 0; j < POINTS; j++) at[j] = load(products + j * AT_ONCE * MOST + tile);
        out_of(at, y);
        interleave(y, pixels);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++, lanes -= ESP_WIDTH) {
            const vec z = activate(pixels[k] + bias, s->activation, s->act_a, s->act_b);
            if (lanes >= ESP_WIDTH)
                store(to + k * ESP_WIDTH, z);
            else if (lanes > 0)
                store_part(to + k * ESP_WIDTH, z, (int)lanes);
        }
        if (!flat) store_apart(s, b, apart, plane, tile, tiles - tile < ESP_WIDTH ? tiles - tile : ESP_WIDTH);
    }
}

/* out[o, y, x] = activation(sum w[o, c, j, i] in[c, 2 y + j - pad_y, 2 x + i - pad_x] + bias[o]) */
void ESP_NAME(stem)(const esp_step *s, const esp_frame *f, int part, int parts)
{
    const esp_operand *o = &s->out;
    const int64_t tiles = divide_up(o->size[3], 4), chunks = divide_up(tiles, ACROSS);
    const int64_t most = TILES / divide_up(tiles, chunks), tall = most < o->size[2] ? most : o->size[2];
    const int64_t bands = divide_up(o->size[2], tall), columns = 2 * s->a.size[1] * s->param[STEM_WINDOW_Y];
    const bool flat = chunks == 1 && o->size[3] == 4 * tiles && o->stride[2] == o->size[3];
    float *out = esp_target(o, f), room[ROOM], products[POINTS * AT_ONCE * MOST];
    int32_t index[2 * ESP_STEM_CHANNELS * ESP_STEM_WINDOW];
    int64_t begin, end;
    memset(room, 0, sizeof room);
    share(bands * chunks, part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        int64_t first, last;
        share(tiles, (int)(i % chunks), (int)chunks, &first, &last);
        band b = {i / chunks * tall, first, tall, last - first, 0, 0, 0};
        if (b.rows > o->size[2] - b.y) b.rows = o->size[2] - b.y;
        b.lines = b.rows + (s->param[STEM_WINDOW_Y] - 1) / 2;
        b.plane = b.lines * b.across;
        read_band(s, f, &b, room);
        find_columns(s, &b, index);
        b.vectors = divide_up(b.rows * b.across, ESP_WIDTH);
        for (int64_t filter = 0; filter < o->size[1]; filter += AT_ONCE) {
            const int64_t block = filter / ESP_STEM_HEIGHT, weights = POINTS * columns * ESP_STEM_HEIGHT;
            multiply(s, &b, room, index, columns, s->values + block * weights + filter % ESP_STEM_HEIGHT, products,
                out + filter * o->stride[1] + b.y * o->stride[2] + 4 * b.first);
            for (int64_t c = filter; c < filter + AT_ONCE && c < o->size[1]; c++)
                finish(s, &b, products + (c - filter) * MOST, s->bias ? s->bias[c] : 0.0f, out + c * o->stride[1], flat);
        }
        for (int64_t c = 0; c < o->size[1] && last == tiles; c++)
            for (int64_t y = b.y; y < b.y + b.rows; y++) zero_margin(s, out, c, y);
    }
}
