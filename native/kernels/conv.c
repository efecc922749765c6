/* Row-blocks over planes: how a step is cut into tiles, and in which order they are done. */
#include "tiles.h"

/* Of a group of blocks: weights, which are read again for every tile, a third of the nearest cache; and rows, where each
 * is written to a plane of its own: so few streams that prefetchers follow them. */
enum { GROUP_FLOATS = 4096, GROUP_ROWS = 16 };

/* What is larger leaves the second cache before it is read or written again. */
enum { FAR_FLOATS = 1 << 19 };

static bool is_far(const esp_operand *o) { return o->size[1] * o->size[2] * o->size[3] > FAR_FLOATS; }

/* How a step is cut: its units, which are vectors of its pixels or pairs of them, into chunks. */
typedef struct {
    int64_t units, per_segment, chunks;
    int vectors;  /* of a unit */
    int64_t cost; /* of all blocks at one unit: a column is 1, the work that every block has 4 */
    int padding;  /* lanes behind a segment that are its margin, or nobody's, where they lie in its last vector; or 0 */
    int sided;    /* as in `spots` */
} cut;

/* Which lanes are pixels: all but the side margins. */
static void mask_margins(spots *at, const esp_step *s, int64_t first, int count)
{
    const int64_t stride = s->out.stride[2], width = s->out.size[3], upto = first + count * ESP_WIDTH;
    uint32_t bits[8];
    for (int v = 0; v < count; v++) bits[v] = ~0u;
    for (int64_t margin = first / stride * stride + width; margin < upto; margin += stride)
        for (int64_t i = margin > first ? margin : first; i < margin + stride - width && i < upto; i++)
            bits[(i - first) / ESP_WIDTH] &= ~(1u << (i - first) % ESP_WIDTH);
    for (int v = 0; v < count; v++) at->pixels[v] = lanes_of(bits[v]);
}

/* Whether pixels worked on as one run have side margins between them, to be stored as zeros. */
static bool masks(const esp_step *s)
{
    return s->margins && s->out.size[2] > 1 && s->out.stride[2] > s->out.size[3];
}

/* `count` units in the only segment, counted from its pixel `first`. */
ESP_INLINE void flat_spots(spots *at, const esp_step *s, const cut *c, int64_t first, int count)
{
    const int64_t left = s->param[CONV_LENGTH] - first - (count - 1) * ESP_WIDTH;
    for (int v = 0; v < count; v++) {
        at->in[v] = at->out[v] = at->residual[v] = first + v * ESP_WIDTH;
        at->lanes[v] = at->stored[v] = ESP_WIDTH;
    }
    at->rows = false;
    at->lone = 0;
    at->plain = left >= ESP_WIDTH;
    if (!at->plain) at->lanes[count - 1] = at->stored[count - 1] = (int)left;
    at->masked = masks(s);
    if (at->masked) mask_margins(at, s, first, count);
    at->sided = c->sided;
    if (!at->sided) return;
    uint32_t firsts = 0;
    for (int64_t i = 0; i < ESP_WIDTH; i += s->out.size[3]) firsts |= 1u << i;
    at->not_first = lanes_of(~firsts);
    at->not_last = lanes_of(~(firsts << ((s->out.size[3] < ESP_WIDTH ? s->out.size[3] : ESP_WIDTH) - 1)));
}

/* The next `count` units from (*segment, *vector) on. */
ESP_INLINE void next_spots(spots *at, const esp_step *s, const cut *c, int64_t *segment, int64_t *vector, int count)
{
    const int64_t *p = s->param;
    at->plain = at->masked = false;
    at->rows = true;
    at->sided = 0;
    at->lone = 0;
    for (int v = 0; v < count; v++) {
        const int64_t pixel = *vector * ESP_WIDTH, left = p[CONV_LENGTH] - pixel;
        at->in[v] = *segment * p[CONV_IN_STRIDE] + pixel;
        at->out[v] = *segment * p[CONV_OUT_STRIDE] + pixel;
        at->residual[v] = *segment * p[CONV_RESIDUAL_STRIDE] + pixel;
        at->lanes[v] = left < ESP_WIDTH ? (int)left : ESP_WIDTH;
        at->stored[v] = left < ESP_WIDTH ? (int)left + c->padding : ESP_WIDTH;
        at->rows &= at->stored[v] == ESP_WIDTH;
        at->pixels[v] = lanes_between(0, at->lanes[v]);
        if (++*vector < c->per_segment) continue;
        *vector = 0;
        ++*segment;
    }
}

/* The margins that units begin..end of a row of the output leave to be zeroed. */
static void zero_margins(const esp_step *s, const cut *c, float *out, int64_t row, int64_t begin, int64_t end)
{
    const int64_t *p = s->param;
    if (p[CONV_SEGMENTS] == 1 && s->out.size[2] > 1) {
        const int64_t sides = p[CONV_SIDES], first = begin * c->vectors * ESP_WIDTH, upto = end * c->vectors * ESP_WIDTH;
        zero_flat(s, out - sides, s->front, row, first, upto);
        if (!sides) return;
        zero_flat(s, out, 0, row, first, upto); /* before the first plane lies the margin of the last of the copy */
        zero_flat(s, out + sides, 0, row, first, upto);
        if (!c->sided) store_sides(s, out, row, first, upto);
        return;
    }
    /* the segments whose last vector lies in begin..end */
    for (int64_t y = begin / c->per_segment; y < end / c->per_segment; y++)
        if (c->padding)
            zero_above_and_below(s, out, row, y);
        else
            zero_margin(s, out, row, y);
}

/* The last pixel of an image, where it would have a vector to itself, and tiles before it and tiles' sums have room for
 * it: 7 x 7 pixels are three vectors and one. Else 0. */
static int64_t lone_pixel(const esp_step *s, const cut *c, const tile_kinds *tiles, int64_t begin, int64_t end)
{
    const int64_t length = s->param[CONV_LENGTH];
    const bool flat = c->per_segment == c->units && !masks(s) && !c->sided;
    return tiles == lone_tiles && flat && end == c->units && end - begin > 1 && length % ESP_WIDTH == 1 ? length - 1 : 0;
}

/* Blocks first..upto at units begin..end, in tiles of nearly equal width. All blocks at one tile before the next, and
 * all tiles before the next group: its weights stay in the nearest cache, what tiles read comes from the second. */
static void run_blocks(const field *f, int64_t first, int64_t upto, const tile_kinds *tiles, int widest, const cut *c,
    int64_t begin, int64_t end)
{
    const esp_step *s = f->step;
    const int64_t lone = lone_pixel(s, c, tiles, begin, end), units = end - begin - (lone > 0);
    const int64_t count = divide_up(units, widest / c->vectors), narrow = units / count, wider = units % count;
    const bool flat = c->per_segment == c->units, masked = masks(s), clamps = is_clamp(s);
    int64_t segment = begin / c->per_segment, vector = begin % c->per_segment, pixel = begin * c->vectors * ESP_WIDTH;
    int known = 0; /* of so many whole vectors in a row `at` is: most tiles differ in nothing but where they begin */
    field moved = *f;
    spots at;
    for (int64_t t = 0; t < count; t++) {
        const int wide = ((int)narrow + (t < wider)) * c->vectors;
        const int64_t behind = pixel + wide * ESP_WIDTH;
        const bool whole = flat && !masked && behind <= s->param[CONV_LENGTH];
        if (whole) {
            if (wide != known) flat_spots(&at, s, c, 0, wide);
            moved.in = f->in + pixel;
            moved.out = f->out + pixel;
            if (f->residual) moved.residual = f->residual + pixel;
            at.lone = lone && t == count - 1 ? lone - pixel : 0;
        } else if (flat) {
            flat_spots(&at, s, c, pixel, wide);
        } else {
            next_spots(&at, s, c, &segment, &vector, wide);
        }
        known = whole ? wide : 0;
        pixel = behind;
        tiles[wide - 1].by[how_of(&at, clamps)][f->residual != NULL](whole ? &moved : f, first, upto, &at);
    }
    for (int64_t r = first * f->height; r < upto * f->height && s->margins; r++)
        if (s->rows[r] >= 0) zero_margins(s, c, f->out, s->rows[r], begin, end);
}

/* Columns of the blocks before block i, of all pieces. */
static int64_t columns_before(const esp_step *s, int64_t i)
{
    int64_t count = s->starts[i];
    for (int64_t k = 1; k < s->param[CONV_PIECES]; k++)
        count += s->starts[k * s->rows_count + i] - s->starts[k * s->rows_count];
    return count;
}

/* Behind block `first`, at most `limit`: where its group ends. */
static int64_t group_end(const esp_step *s, int64_t first, int64_t limit, int64_t height)
{
    int64_t upto = first + 1;
    if (s->param[CONV_PIECES]) return first + PIECE_ROWS < limit ? first + PIECE_ROWS : limit;
    if (!by_rows(&s->out) && first + GROUP_ROWS / height < limit) limit = first + GROUP_ROWS / height;
    while (upto < limit && (s->starts[upto + 1] - s->starts[first]) * height <= GROUP_FLOATS) upto++;
    return upto;
}

/* In tenths of the time that the product of a weight and a vector takes: to stream a weight from the second or third
 * cache, to have a float from the cache of another core, and what a tile takes beside its products. */
enum { STREAM = 24, FETCH = 22, TILE = 3 };

enum { MOST_CHUNKS = 4096 }; /* of a band */

/* In how many bands to cut the pixels for `parts` threads. With a band for each thread, a thread finds in its own cache
 * most of what it reads, since it wrote that in the step before, but all threads read all weights. With fewer bands
 * threads share them by blocks: they read fewer weights, and most pixels from each other. */
static int64_t bands_of(const esp_step *s, int64_t vectors, int parts)
{
    const int64_t rows = s->out.size[1] * (s->b.space ? 2 : 1), weights = s->values_count + s->index_count;
    int64_t best = 1, least = INT64_MAX;
    if (s->param[CONV_CHANNELS] && !bands_pay(&s->out, parts)) return 1;
    for (int64_t bands = 1; bands <= parts && bands <= vectors; bands++) {
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
    const int64_t *p = s->param, length = p[CONV_LENGTH];
    const int sided = sided_of(s), vectors = sided == SIDED_PAIRS ? 2 : 1;
    const int64_t per_segment = divide_up(length, vectors * ESP_WIDTH);
    const int64_t units = p[CONV_SEGMENTS] * per_segment, blocks = s->rows_count / p[CONV_HEIGHT];
    const int64_t wanted = p[CONV_SEGMENTS] == 1 ? divide_up(p[CONV_CHUNK], vectors * ESP_WIDTH)
                                                 : (1 + p[CONV_CHUNK] / length) * per_segment;
    const int64_t bands = s->bands ? parts : bands_of(s, units * vectors, parts);
    int64_t chunks = (units + bands * wanted / 2) / (bands * wanted); /* of a band: about as many as are wanted */
    chunks = bands * (chunks < 1 ? 1 : chunks < MOST_CHUNKS ? chunks : MOST_CHUNKS);
    const int64_t padding = row_padding(s);
    const bool stored = length + padding <= per_segment * ESP_WIDTH;
    return (cut){units, per_segment, chunks < units ? chunks : units, vectors, s->index_count + 4 * blocks,
        stored ? (int)padding : 0, sided};
}

/* Which part of the sequence of chunks, counted in their cost, is a thread's: its band, where bands are about equal. Else
 * an equal share, which leaves the ends of bands to two threads. */
static void share_chunks(const cut *c, bool bands, int part, int parts, int64_t *begin, int64_t *end)
{
    if (c->chunks % parts == 0 && (bands || divide_up(c->units, parts) * parts * 8 <= c->units * 9)) {
        const int64_t each = c->chunks / parts;
        *begin = c->units * (each * part) / c->chunks * c->cost;
        *end = c->units * (each * (part + 1)) / c->chunks * c->cost;
    } else {
        share(c->units * c->cost, part, parts, begin, end);
    }
}

/* How many blocks of a chunk, `count` units from `from` on, have their position in the sequence before `position`. */
static int64_t blocks_before(const esp_step *s, const cut *c, int64_t from, int64_t count, int64_t position)
{
    int64_t low = 0, high = s->rows_count / s->param[CONV_HEIGHT];
    while (low < high) {
        const int64_t i = (low + high) / 2;
        if (from * c->cost + count * (columns_before(s, i) + 4 * i) < position)
            low = i + 1;
        else
            high = i;
    }
    return low;
}

/* Chunks of pixels one after another, in each all blocks: what a chunk reads stays in the second cache. Threads get
 * equal shares of the sequence by its cost. */
static void run(const esp_step *s, const esp_frame *frame, int part, int parts, const tile_kinds *tiles, int widest)
{
    const int64_t height = s->param[CONV_HEIGHT];
    const cut c = cut_of(s, parts);
    int64_t begin, end;
    share_chunks(&c, s->bands, part, parts, &begin, &end);
    if (frame->slices > 1) {
        const int64_t from = begin;
        share(end - from, frame->slice, frame->slices, &begin, &end);
        begin += from;
        end += from;
    }
    const bool in_place = s->b.space == s->out.space && s->b.offset == s->out.offset;
    field f = {s, esp_source(&s->a, frame), esp_target(&s->out, frame), NULL, height, false, parts > 1 || is_far(&s->out)};
    if (s->b.space) {
        f.residual = esp_source(&s->b, frame);
        f.far_residual = !in_place && is_far(&s->b);
    }
    for (int64_t k = 0; k < c.chunks; k++) {
        int64_t from, upto;
        share(c.units, (int)k, (int)c.chunks, &from, &upto);
        if (upto * c.cost <= begin || from * c.cost >= end) continue;
        /* the blocks whose position lies in begin..end */
        const int64_t count = upto - from, limit = blocks_before(s, &c, from, count, end);
        int64_t first = blocks_before(s, &c, from, count, begin);
        while (first < limit) {
            const int64_t next = group_end(s, first, limit, height);
            run_blocks(&f, first, next, tiles, widest, &c, from, upto);
            first = next;
        }
    }
}

#define KERNEL(HEIGHT, M) \
    void ESP_NAME(conv_##HEIGHT)(const esp_step *s, const esp_frame *f, int part, int parts) \
    { \
        run(s, f, part, parts, tiles_##M, (int)(sizeof tiles_##M / sizeof *tiles_##M)); \
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
