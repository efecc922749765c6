/* Row-blocks over planes: acc[m][v] += w[j][m] * x[index[j]][v] for m rows that share columns and v vectors of pixels.
 *
 * Each activation vector is loaded once for m rows, each weight broadcast once for v vectors. The order in which columns
 * are added does not depend on tile, thread or segment, so results do not either. */
#include <math.h>
#include <stdbool.h>

#include "activate.h"
#include "planes.h"
#include "simd.h"

enum { GROUP_FLOATS = 64 * 1024 }; /* of weights that are read again for every tile: a part of the second cache */

/* What a tile needs; the same for all tiles of a block. */
typedef struct {
    const esp_step *step;
    const float *in;
    float *out;
    const float *residual; /* or NULL */
    const int32_t *rows, *index;
    const float *values;
    int64_t columns, height;
} block;

/* Residual and activation of M rows at V vectors, and every row where it belongs. With clamp, kind is no activation or
 * a clamp between low and high; without, any. */
ESP_INLINE void finish(const int M, const int V, const bool clamp, const bool add, const block *b, vec acc[8][8],
    int64_t out_at, int64_t res_at, int last, float low, float high)
{
    const esp_step *s = b->step;
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const int64_t row = b->rows[m];
        if (row < 0) continue;
        float *out = b->out + row * s->out.stride[1] + out_at;
        const float *residual = add ? b->residual + row * s->b.stride[1] + res_at : NULL;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const bool part = v == V - 1 && last < ESP_WIDTH;
            vec y = acc[m][v];
            if (add) y += part ? load_part(residual + v * ESP_WIDTH, last) : load(residual + v * ESP_WIDTH);
            y = clamp ? vmin(splat(high), vmax(splat(low), y)) : activate(y, s->activation, low, high);
            if (part)
                store_part(out + v * ESP_WIDTH, y, last);
            else
                store(out + v * ESP_WIDTH, y);
        }
    }
}

/* M rows at V vectors of pixels; `last` lanes of the last vector count. */
ESP_INLINE void tile(const int M, const int V, const block *b, int64_t in_at, int64_t out_at, int64_t res_at, int last)
{
    const esp_step *s = b->step;
    const float *in = b->in + in_at, *values = b->values;
    const int32_t *index = b->index;
    vec acc[8][8];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const int64_t row = b->rows[m] < 0 ? 0 : b->rows[m];
        const float bias = s->bias ? s->bias[row] : 0.0f;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            acc[m][v] = splat(bias);
            /* other cores may have read these lines: they are ours alone by the time that the sums are ready */
            __builtin_prefetch(b->out + row * s->out.stride[1] + out_at + v * ESP_WIDTH, 1, 3);
        }
    }
    const int64_t height = b->height;
    for (int64_t j = 0; j < b->columns; j++, values += height) {
        const float *x = in + index[j];
        vec pixels[8];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) pixels[v] = load(x + v * ESP_WIDTH);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vec w = splat(values[m]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[m][v] += w * pixels[v];
        }
    }
    const bool clamps = s->activation == ESP_CLAMP;
    const float low = s->activation ? s->act_a : -INFINITY, high = s->activation ? s->act_b : INFINITY;
    if (clamps || s->activation == ESP_LINEAR_ACT) {
        if (b->residual)
            finish(M, V, true, true, b, acc, out_at, res_at, last, low, high);
        else
            finish(M, V, true, false, b, acc, out_at, res_at, last, low, high);
    } else if (b->residual) {
        finish(M, V, false, true, b, acc, out_at, res_at, last, low, high);
    } else {
        finish(M, V, false, false, b, acc, out_at, res_at, last, low, high);
    }
}

typedef void (*tile_function)(const block *, int64_t, int64_t, int64_t, int);

#define TILE(M, V) \
    static void tile_##M##_##V(const block *b, int64_t i, int64_t o, int64_t r, int last) \
    { \
        tile(M, V, b, i, o, r, last); \
    }

/* Rows at once and the widest tile per instruction set: as many accumulators as it has registers for. */
TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) TILE(1, 5) TILE(1, 6) TILE(1, 7) TILE(1, 8)
TILE(2, 1) TILE(2, 2) TILE(2, 3) TILE(2, 4) TILE(2, 5)
TILE(4, 1) TILE(4, 2) TILE(4, 3)
static const tile_function tiles_1[] = {
    tile_1_1, tile_1_2, tile_1_3, tile_1_4, tile_1_5, tile_1_6, tile_1_7, tile_1_8};
#if ESP_WIDTH == 16
TILE(2, 6) TILE(2, 7) TILE(2, 8) TILE(4, 4) TILE(4, 5) TILE(4, 6) TILE(8, 1) TILE(8, 2) TILE(8, 3)
static const tile_function tiles_2[] = {
    tile_2_1, tile_2_2, tile_2_3, tile_2_4, tile_2_5, tile_2_6, tile_2_7, tile_2_8};
static const tile_function tiles_4[] = {tile_4_1, tile_4_2, tile_4_3, tile_4_4, tile_4_5, tile_4_6};
static const tile_function tiles_8[] = {tile_8_1, tile_8_2, tile_8_3};
#else
static const tile_function tiles_2[] = {tile_2_1, tile_2_2, tile_2_3, tile_2_4, tile_2_5};
static const tile_function tiles_4[] = {tile_4_1, tile_4_2, tile_4_3};
#endif

/* Zero the side margins among pixels begin..end of a plane that is worked on as one run, and its back margin. */
static void zero_flat(const esp_step *s, float *out, int64_t row, int64_t begin, int64_t end)
{
    const int64_t width = s->out.size[3], stride = s->out.stride[2], side = stride - width;
    float *plane = out + row * s->out.stride[1];
    for (int64_t y = begin / stride; side && y * stride + width < end; y++) {
        int64_t from = y * stride + width, upto = from + side;
        from = from < begin ? begin : from;
        upto = upto > end ? end : upto;
        for (; from < upto; from++) plane[from] = 0;
    }
    if (end == s->param[CONV_LENGTH]) zero_floats(plane + end, s->out.stride[1] - end);
    if (begin == 0 && row == 0) zero_floats(out - s->front, s->front);
}

/* The pixels of one chunk: part of the only segment, or some of many. */
typedef struct {
    int64_t first, count, begin, end;
} chunk;

/* Blocks first..upto at one tile: b is the part that all of them share. */
ESP_INLINE void run_tile(block b, int64_t first, int64_t upto, tile_function tile, int M, const int64_t at[3], int last)
{
    const esp_step *s = b.step;
    for (int64_t i = first; i < upto; i++) {
        b.index = s->index + s->starts[i];
        b.columns = s->starts[i + 1] - s->starts[i];
        b.rows = s->rows + i * b.height;
        b.values = s->values + s->starts[i] * b.height;
        for (int64_t r = 0; r < b.height; r += M, b.rows += M, b.values += M) tile(&b, at[0], at[1], at[2], last);
    }
}

/* Blocks first..upto over the pixels of a chunk, in tiles of nearly equal width. All blocks at one tile before the
 * next: what the tile reads stays in the nearest cache, while the weights, which are read in order, come from the
 * second. */
static void run_blocks(
    const block *b, int64_t first, int64_t upto, const tile_function *tiles, int M, int widest, const chunk *c)
{
    const esp_step *s = b->step;
    const int64_t *p = s->param, length = c->end - c->begin;
    const int64_t vectors = (length + ESP_WIDTH - 1) / ESP_WIDTH, count = (vectors + widest - 1) / widest;
    for (int64_t seg = c->first; seg < c->first + c->count; seg++)
        for (int64_t t = 0, done = 0; t < count; t++) {
            const int64_t next = vectors * (t + 1) / count, pixel = c->begin + done * ESP_WIDTH;
            const int64_t at[3] = {seg * p[CONV_IN_STRIDE] + pixel, seg * p[CONV_OUT_STRIDE] + pixel,
                seg * p[CONV_RESIDUAL_STRIDE] + pixel};
            const int last = next < vectors ? ESP_WIDTH : (int)(length - (vectors - 1) * ESP_WIDTH);
            run_tile(*b, first, upto, tiles[next - done - 1], M, at, last);
            done = next;
        }
    for (int64_t r = first * b->height; r < upto * b->height && s->margins; r++) {
        if (s->rows[r] < 0) continue;
        if (p[CONV_SEGMENTS] == 1 && s->out.size[2] > 1)
            zero_flat(s, b->out, s->rows[r], c->begin, c->end);
        else if (c->end == p[CONV_LENGTH])
            for (int64_t seg = c->first; seg < c->first + c->count; seg++) zero_margin(s, b->out, s->rows[r], seg);
    }
}

/* Behind block `first`, at most `limit`: as many blocks as leave room in the second cache for what they read. */
static int64_t group_end(const esp_step *s, int64_t first, int64_t limit, int64_t height)
{
    int64_t upto = first + 1;
    while (upto < limit && (s->starts[upto + 1] - s->starts[first]) * height <= GROUP_FLOATS) upto++;
    return upto;
}

/* How a step is cut: its pixels into chunks of whole vectors (of one run of pixels) or whole segments. */
typedef struct {
    bool flat;
    int64_t units, chunks; /* units: vectors or segments */
    int64_t cost;          /* of all blocks at one unit: a column is 1, the work that every block has 4 */
} cut;

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* In tenths of the time that the product of a weight and a vector takes: to stream a weight from the second or third
 * cache, to have a float from the cache of another core, and what a tile takes beside its products. */
enum { STREAM = 16, FETCH = 30, TILE = 3 };

/* In how many bands to cut the pixels for `parts` threads. With a band for each thread, a thread finds in its own cache
 * most of what it reads, since it wrote that in the step before, but all threads read all weights. With fewer bands
 * threads share them by blocks: they read fewer weights, and most pixels from each other. */
static int64_t bands_of(const esp_step *s, int64_t units, int64_t vectors, int parts)
{
    const int64_t rows = s->out.size[1] * (s->b.space ? 2 : 1), weights = s->values_count + s->index_count;
    int64_t best = 1, least = INT64_MAX;
    for (int64_t bands = 1; bands <= parts && bands <= units; bands++) {
        if (parts % bands) continue;
        const int64_t sharers = parts / bands, width = divide_up(vectors, bands);
        const int64_t used = (s->a.size[1] * width + rows * width / sharers) * ESP_WIDTH, moved = used - used / sharers;
        const int64_t products = s->values_count * (10 * vectors / bands + TILE * divide_up(width, 3)) / sharers;
        const int64_t time = products + weights / sharers * STREAM + moved * FETCH;
        if (time < least) {
            least = time;
            best = bands;
        }
    }
    return best;
}

static cut cut_of(const esp_step *s, int parts)
{
    const int64_t *p = s->param, blocks = s->starts_count - 1;
    const bool flat = p[CONV_SEGMENTS] == 1;
    const int64_t per_unit = flat ? 1 : divide_up(p[CONV_LENGTH], ESP_WIDTH);
    const int64_t units = flat ? divide_up(p[CONV_LENGTH], ESP_WIDTH) : p[CONV_SEGMENTS];
    const int64_t wanted = flat ? divide_up(p[CONV_CHUNK], ESP_WIDTH) : 1 + p[CONV_CHUNK] / p[CONV_LENGTH];
    const int64_t bands = bands_of(s, units, units * per_unit, parts);
    int64_t chunks = (units + bands * wanted / 2) / (bands * wanted); /* of a band: about as many as are wanted */
    chunks = bands * (chunks ? chunks : 1);
    return (cut){flat, units, chunks < units ? chunks : units, s->index_count + 4 * blocks};
}

/* How many blocks of a chunk, `count` units from `from` on, have their position in the sequence before `position`. */
static int64_t blocks_before(const esp_step *s, const cut *c, int64_t from, int64_t count, int64_t position)
{
    int64_t low = 0, high = s->starts_count - 1;
    while (low < high) {
        const int64_t i = (low + high) / 2;
        if (from * c->cost + count * (s->starts[i] + 4 * i) < position)
            low = i + 1;
        else
            high = i;
    }
    return low;
}

/* Chunks of pixels one after another, in each all blocks: what a chunk reads stays in the second cache. Threads get
 * equal shares of the sequence by its cost. */
static void run(const esp_step *s, const esp_frame *f, int part, int parts, const tile_function *tiles, int M, int widest)
{
    const int64_t *p = s->param, height = p[CONV_HEIGHT];
    const cut c = cut_of(s, parts);
    int64_t begin, end;
    share(c.units * c.cost, part, parts, &begin, &end);
    block b = {s, esp_source(&s->a, f), esp_target(&s->out, f), NULL, NULL, NULL, NULL, 0, height};
    if (s->b.space) b.residual = esp_source(&s->b, f);
    for (int64_t k = 0; k < c.chunks; k++) {
        int64_t from, upto;
        share(c.units, (int)k, (int)c.chunks, &from, &upto);
        if (upto * c.cost <= begin || from * c.cost >= end) continue;
        /* the blocks whose position lies in begin..end */
        const int64_t count = upto - from, limit = blocks_before(s, &c, from, count, end);
        int64_t first = blocks_before(s, &c, from, count, begin);
        const int64_t last = upto * ESP_WIDTH < p[CONV_LENGTH] ? upto * ESP_WIDTH : p[CONV_LENGTH];
        const chunk pixels = c.flat ? (chunk){0, 1, from * ESP_WIDTH, last} : (chunk){from, count, 0, p[CONV_LENGTH]};
        while (first < limit) {
            const int64_t next = group_end(s, first, limit, height);
            run_blocks(&b, first, next, tiles, M, widest, &pixels);
            first = next;
        }
    }
}

#define KERNEL(HEIGHT, M) \
    void ESP_NAME(conv_##HEIGHT)(const esp_step *s, const esp_frame *f, int part, int parts) \
    { \
        run(s, f, part, parts, tiles_##M, M, (int)(sizeof tiles_##M / sizeof *tiles_##M)); \
    }
KERNEL(1, 1)
KERNEL(2, 2)
KERNEL(4, 4)
#if ESP_WIDTH == 16
KERNEL(8, 8)
KERNEL(16, 8)
#else
KERNEL(8, 4)
KERNEL(16, 4)
#endif
