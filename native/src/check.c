/* Every offset, count, size and index of a step, checked before any kernel sees it. */
#include <limits.h>
#include <stdbool.h>

#include "program.h"

static const int64_t MAX_SIZE = INT32_MAX, MAX_STRIDE = (int64_t)1 << 38;

/* Floats in the space of an operand, or -1. */
static int64_t room(const esp_program *p, const esp_operand *o)
{
    switch (o->space) {
    case ESP_ARENA: return p->arena_floats;
    case ESP_SCRATCH: return p->scratch_floats;
    case ESP_INPUT: return o->index < p->inputs_count ? p->elements[o->index] : -1;
    case ESP_OUTPUT: return o->index < p->outputs_count ? p->elements[p->inputs_count + o->index] : -1;
    case ESP_CONST: return p->size / 4;
    default: return -1;
    }
}

static bool within(int64_t value, int64_t low, int64_t high) { return value >= low && value <= high; }

/* a * b + c, false when it does not fit */
static bool multiply_add(int64_t a, int64_t b, int64_t c, int64_t *result)
{
    return !__builtin_mul_overflow(a, b, result) && !__builtin_add_overflow(*result, c, result);
}

/* All elements lie in the operand's space. */
static bool readable(const esp_program *p, const esp_operand *o)
{
    int64_t limit = room(p, o), last = o->offset;
    if (limit < 0 || !within(o->offset, 0, MAX_STRIDE)) return false;
    for (int d = 0; d < 4; d++) {
        if (!within(o->size[d], 1, MAX_SIZE) || !within(o->stride[d], 0, MAX_STRIDE)) return false;
        if (!multiply_add(o->size[d] - 1, o->stride[d], last, &last)) return false;
    }
    return last < limit;
}

static bool same_sizes(const esp_operand *x, const esp_operand *y)
{
    for (int d = 0; d < 4; d++)
        if (x->size[d] != y->size[d]) return false;
    return true;
}

/* An arena or a scratch: both have slack, where vectors may touch what lies beside. */
static bool has_slack(const esp_operand *o) { return o->space == ESP_ARENA || o->space == ESP_SCRATCH; }

/* The output lies in the arena, an output or, of a conv of either kind, the scratch, holds no more elements than its space (so that a
 * step's work is bounded), and so do its margins: rows and planes in ascending order, room before the first and behind
 * the last plane. */
static bool writable(const esp_program *p, const esp_step *s)
{
    const esp_operand *o = &s->out;
    int64_t count = 1, end, row;
    const bool own = o->space == ESP_SCRATCH && (s->op == ESP_CONV || s->op == ESP_DEPTHWISE);
    if (o->space != ESP_ARENA && o->space != ESP_OUTPUT && !own) return false;
    if (!readable(p, o)) return false;
    for (int d = 0; d < 4; d++)
        if (__builtin_mul_overflow(count, o->size[d], &count) || count > room(p, o)) return false;
    if (!s->margins) return s->front == 0;
    if (o->size[0] != 1 || o->stride[3] != 1 || o->stride[2] < o->size[3] || o->stride[1] < o->size[3]) return false;
    if (o->size[2] > 1 && o->stride[2] > o->stride[1]) { /* row by row, with as many rows behind as before */
        if (!multiply_add(o->size[1], o->stride[1], 0, &row) || row > o->stride[2]) return false;
        if (!within(s->front, 0, o->offset)) return false;
        return multiply_add(o->size[2] + s->front / o->stride[2], o->stride[2], o->offset, &end) && end <= room(p, o);
    }
    if (!multiply_add(o->size[2] - 1, o->stride[2], o->size[3], &row) || row > o->stride[1]) return false;
    return within(s->front, 0, o->offset) && multiply_add(o->size[1], o->stride[1], o->offset, &end) &&
           end <= room(p, o);
}

/* Row-blocks: counts that agree, ascending starts, rows that exist. pieces: of the columns of each. */
static const char *check_blocks(const esp_step *s, int64_t height, int64_t rows, int64_t pieces)
{
    const int64_t parts = s->starts_count - 1, blocks = parts / pieces;
    if (height != 1 && height != 2 && height != 4 && height != 8 && height != 16 &&
        height != ESP_LANES_HEIGHT)
        return "impossible block height";
    if (parts < 0 || parts > MAX_SIZE || parts % pieces || s->rows_count != blocks * height)
        return "rows and blocks disagree";
    if (s->index_count > MAX_SIZE || s->values_count != s->index_count * height) return "values and columns disagree";
    if (s->bias_count != 0 && s->bias_count != rows) return "bias and rows disagree";
    for (int64_t i = 0; i < s->rows_count; i++)
        if (!within(s->rows[i], -1, rows - 1)) return "a row lies outside the output";
    if (s->starts[0] != 0 || s->starts[parts] != s->index_count) return "blocks and columns disagree";
    for (int64_t i = 0; i < parts; i++)
        if (s->starts[i] > s->starts[i + 1]) return "blocks are out of order";
    return NULL;
}

/* Reads at a.offset + index + 0..reach stay in a's space. */
static bool indices_within(const esp_program *p, const esp_step *s, int64_t reach)
{
    int64_t low = INT32_MAX, high = INT32_MIN, last;
    for (int64_t i = 0; i < s->index_count; i++) {
        low = s->index[i] < low ? s->index[i] : low;
        high = s->index[i] > high ? s->index[i] : high;
    }
    if (!s->index_count) return true;
    return within(s->a.offset, 0, MAX_STRIDE) && s->a.offset + low >= 0 &&
           !__builtin_add_overflow(s->a.offset + high, reach, &last) && last < room(p, &s->a);
}

/* Copies of the output, a column to either side: planes without side margins, those before and behind far enough. */
static const char *check_sides(const esp_program *p, const esp_step *s)
{
    const esp_operand *o = &s->out;
    const int64_t sides = s->param[CONV_SIDES];
    int64_t end;
    if (s->param[CONV_HEIGHT] == ESP_LANES_HEIGHT || s->param[CONV_SEGMENTS] != 1 || o->size[2] < 2 || o->stride[2] != o->size[3] ||
        s->param[CONV_LENGTH] != o->size[2] * o->size[3] || o->stride[1] < s->param[CONV_LENGTH] || !s->margins)
        return "impossible planes beside its output";
    if (!within(sides, 1, MAX_STRIDE) || !multiply_add(o->size[1], o->stride[1], 0, &end) || sides < end ||
        o->offset - sides < s->front || !multiply_add(o->size[1], o->stride[1], o->offset + sides, &end) ||
        end > room(p, o))
        return "planes beside its output lie outside the arena";
    return NULL;
}

static const char *check_conv(const esp_program *p, const esp_step *s)
{
    int64_t rows = s->out.size[1], reach, end, segments = s->param[CONV_SEGMENTS], length = s->param[CONV_LENGTH];
    if (!within(segments, 1, MAX_SIZE) || !within(length, 1, MAX_SIZE) || !within(s->param[CONV_CHUNK], 1, MAX_SIZE))
        return "impossible segments";
    for (int i = CONV_IN_STRIDE; i <= CONV_RESIDUAL_STRIDE; i++)
        if (!within(s->param[i], 0, MAX_STRIDE)) return "impossible segment stride";
    const int64_t pieces = s->param[CONV_PIECES];
    if (!within(pieces, 0, MAX_SIZE) || (pieces && s->param[CONV_HEIGHT] != 1)) return "impossible pieces";
    const char *problem = check_blocks(s, s->param[CONV_HEIGHT], rows, pieces ? pieces : 1);
    if (problem) return problem;
    if (s->param[CONV_HEIGHT] == ESP_LANES_HEIGHT && length > ESP_LANES_PIXELS) return "a segment too long";
    for (int i = 0; i < 3; i++) { /* products, and what goes in and comes out */
        const int64_t each = i == 0 ? s->values_count + s->starts_count : i == 1 ? s->a.size[1] : rows;
        if (!within(each, 1, (int64_t)1 << 40) || __builtin_mul_overflow(segments * length, each, &end) ||
            end > (int64_t)1 << 48)
            return "more work than can be shared out";
    }
    /* tails read up to ESP_SLACK floats more, which every arena has behind its end */
    if (!has_slack(&s->a) || !multiply_add(segments - 1, s->param[CONV_IN_STRIDE], length - 1, &reach) ||
        !indices_within(p, s, reach))
        return "a column lies outside the arena";
    if (row_padding(s) < 0) return "rows of its output overlap";
    if (!multiply_add(segments - 1, s->param[CONV_OUT_STRIDE], length + row_padding(s), &reach) ||
        !multiply_add(rows - 1, s->out.stride[1], s->out.offset, &end) || __builtin_add_overflow(end, reach, &end) ||
        end > room(p, &s->out))
        return "a segment lies outside the output";
    if (segments > s->out.size[2] || length > room(p, &s->out)) return "more segments than rows";
    if (s->out.space == ESP_OUTPUT) return "its output is not in the arena";
    if (s->param[CONV_SIDES] && (problem = check_sides(p, s))) return problem;
    if (s->b.space == ESP_NOWHERE) return NULL;
    if (s->b.space != ESP_ARENA || !within(s->b.offset, 0, MAX_STRIDE) || !within(s->b.stride[1], 0, MAX_STRIDE) ||
        !multiply_add(segments - 1, s->param[CONV_RESIDUAL_STRIDE], length, &reach) ||
        !multiply_add(rows - 1, s->b.stride[1], s->b.offset, &end) || __builtin_add_overflow(end, reach, &end) ||
        end > p->arena_floats)
        return "its residual lies outside the arena";
    return NULL;
}

static const char *check_linear(const esp_program *p, const esp_step *s)
{
    int64_t rows = s->out.size[3], positions = s->param[LINEAR_POSITIONS], reach, end;
    if (s->margins || s->out.size[0] != 1 || s->out.size[1] != 1 || positions != s->out.size[2])
        return "impossible shape";
    for (int i = LINEAR_IN_STRIDE; i <= LINEAR_ROW_STRIDE; i++)
        if (!within(s->param[i], 0, MAX_STRIDE)) return "impossible stride";
    if (s->param[LINEAR_OUT_STRIDE] != s->out.stride[2] || s->param[LINEAR_ROW_STRIDE] != s->out.stride[3])
        return "strides disagree";
    const char *problem = check_blocks(s, s->param[LINEAR_HEIGHT], rows, 1);
    if (problem) return problem;
    if (!multiply_add(positions - 1, s->param[LINEAR_IN_STRIDE], 0, &reach) || room(p, &s->a) < 0 ||
        !indices_within(p, s, reach))
        return "a column lies outside the input";
    if (s->b.space == ESP_NOWHERE) return NULL;
    if (!within(s->b.offset, 0, MAX_STRIDE) || !within(s->b.stride[3], 0, MAX_STRIDE) ||
        !multiply_add(positions - 1, s->param[LINEAR_RESIDUAL_STRIDE], s->b.offset, &end) ||
        !multiply_add(rows - 1, s->b.stride[3], end, &end) || end >= room(p, &s->b))
        return "its residual lies outside its space";
    return NULL;
}

static const char *check_depthwise(const esp_program *p, const esp_step *s)
{
    const int64_t *w = s->param, *size = s->out.size, multiplier = w[DEPTHWISE_MULTIPLIER];
    int64_t taps, count, channels;
    for (int i = DEPTHWISE_WINDOW_Y; i <= DEPTHWISE_MULTIPLIER; i++)
        if (!within(w[i], i == DEPTHWISE_PAD_Y || i == DEPTHWISE_PAD_X ? 0 : 1, 1 << 20)) return "impossible window";
    if (!readable(p, &s->a) || s->a.size[0] != 1 || size[0] != 1 || s->a.size[3] > 1 << 30) return "impossible source";
    if (size[3] > 1 << 30 || s->out.stride[3] != 1 || s->a.stride[3] != 1) return "its rows are no rows of pixels";
    if (!has_slack(&s->a) || !has_slack(&s->out)) return "it reads or writes outside the arena";
    if (__builtin_mul_overflow(s->a.size[1], multiplier, &channels) || channels != size[1]) return "channels disagree";
    taps = w[DEPTHWISE_WINDOW_Y] * w[DEPTHWISE_WINDOW_X];
    if (__builtin_mul_overflow(taps, size[1], &count) || count != s->values_count) return "weights and channels disagree";
    if (s->bias_count != 0 && s->bias_count != size[1]) return "bias and channels disagree";
    if (s->b.space == ESP_NOWHERE) return NULL;
    if (s->b.space != ESP_ARENA || !readable(p, &s->b) || !same_sizes(&s->b, &s->out) || s->b.stride[3] != 1)
        return "impossible residual";
    return NULL;
}

static const char *check_gather(const esp_program *p, const esp_step *s)
{
    if (!readable(p, &s->a) || s->a.size[0] != 1 || s->a.size[1] != s->out.size[1]) return "impossible source";
    if (s->margins || s->index_count != 2 * s->out.size[0]) return "phases and outputs disagree";
    if (!within(s->param[GATHER_STRIDE_Y], 1, MAX_SIZE) || !within(s->param[GATHER_STRIDE_X], 1, MAX_SIZE))
        return "impossible stride";
    return NULL;
}

/* Tiles of 4 x 4 pixels, of which each holds a pixel of the image. */
static bool tiles_within(const esp_operand *tiles, const esp_operand *image, int64_t first)
{
    return tiles->size[0] == 36 && tiles->size[1] == image->size[1] && image->size[0] == 1 && image->stride[3] == 1 &&
           tiles->stride[3] == 1 && within(first, 0, MAX_SIZE) &&
           (first + tiles->size[2] - 1) * 4 < image->size[2] && (tiles->size[3] - 1) * 4 < image->size[3];
}

/* The image has a margin of one pixel, which is read, in the arena, behind which lies slack for whole vectors. */
static const char *check_winograd_in(const esp_program *p, const esp_step *s)
{
    const esp_operand *a = &s->a;
    int64_t last;
    if (!readable(p, a) || a->space != ESP_ARENA || s->margins) return "impossible source";
    if (!tiles_within(&s->out, a, s->param[WINOGRAD_FIRST])) return "tiles and image disagree";
    if (a->offset < a->stride[2] + 1 || !multiply_add(a->size[1] - 1, a->stride[1], a->offset, &last) ||
        !multiply_add(a->size[2], a->stride[2], last, &last) || last + a->size[3] >= p->arena_floats)
        return "a margin lies outside the arena";
    return NULL;
}

static const char *check_winograd_out(const esp_program *p, const esp_step *s)
{
    if (!readable(p, &s->a) || s->a.space != ESP_ARENA) return "impossible source";
    if (!tiles_within(&s->a, &s->out, s->param[WINOGRAD_FIRST])) return "tiles and image disagree";
    if (s->bias_count != 0 && s->bias_count != s->out.size[1]) return "bias and channels disagree";
    if (s->b.space == ESP_NOWHERE) return NULL;
    if (s->b.space != ESP_ARENA || !readable(p, &s->b) || !same_sizes(&s->b, &s->out) || s->b.stride[3] != 1)
        return "impossible residual";
    return NULL;
}

static const char *check_stem(const esp_program *p, const esp_step *s)
{
    const int64_t *w = s->param, blocks = (s->out.size[1] + ESP_STEM_HEIGHT - 1) / ESP_STEM_HEIGHT;
    if (!readable(p, &s->a) || s->a.size[0] != 1 || s->a.size[1] > ESP_STEM_CHANNELS || s->a.stride[3] != 1)
        return "impossible source";
    if (s->out.size[0] != 1 || s->out.stride[3] != 1) return "its rows are no rows of pixels";
    if (!within(w[STEM_WINDOW_Y], 1, ESP_STEM_WINDOW) || !within(w[STEM_PAD_Y], 0, ESP_STEM_WINDOW) ||
        !within(w[STEM_PAD_X], 0, ESP_STEM_WINDOW))
        return "impossible window";
    if (s->values_count != blocks * ESP_STEM_HEIGHT * ESP_STEM_POINTS * 2 * s->a.size[1] * w[STEM_WINDOW_Y])
        return "weights and channels disagree";
    if (s->bias_count != 0 && s->bias_count != s->out.size[1]) return "bias and channels disagree";
    return NULL;
}

static const char *check_pool(const esp_program *p, const esp_step *s)
{
    if (!readable(p, &s->a) || s->a.size[0] != 1 || s->out.size[0] != 1 || s->a.size[1] != s->out.size[1])
        return "impossible source";
    int64_t count = 1;
    for (int d = 0; d < 4; d++)
        if (__builtin_mul_overflow(count, s->a.size[d], &count) || count > room(p, &s->a)) return "impossible source";
    if (s->op == ESP_ADAPTIVE) return NULL;
    if (!within(s->param[POOL_KIND], 0, 2)) return "unknown kind of pooling";
    for (int i = POOL_WINDOW_Y; i <= POOL_DILATION_X; i++)
        if (!within(s->param[i], i == POOL_PAD_Y || i == POOL_PAD_X ? 0 : 1, 1 << 20)) return "impossible window";
    for (int i = 0; i < 2; i++)
        if ((s->param[POOL_WINDOW_Y + i] - 1) * s->param[POOL_DILATION_Y + i] >= ESP_POOL_REACH)
            return "a window too wide";
    return NULL;
}

/* The number of elements that an operand describes, no more than its space holds, so that a step's work is bounded. */
static bool modest(const esp_program *p, const esp_operand *o)
{
    int64_t count = 1;
    for (int d = 0; d < 4; d++)
        if (__builtin_mul_overflow(count, o->size[d], &count) || count > room(p, o)) return false;
    return true;
}

static const char *check_matmul(const esp_program *p, const esp_step *s)
{
    const esp_operand *o = &s->out, *a = &s->a, *b = &s->b;
    if (!readable(p, a) || !readable(p, b) || !modest(p, a) || !modest(p, b)) return "impossible factors";
    if (s->margins || o->stride[3] != 1 || b->stride[3] != 1 || b->space != ESP_ARENA) return "impossible strides";
    for (int d = 0; d < 2; d++)
        if (a->size[d] != o->size[d] || b->size[d] != o->size[d]) return "factors and product disagree";
    if (a->size[2] != o->size[2] || b->size[3] != o->size[3] || a->size[3] != b->size[2])
        return "factors and product disagree";
    return NULL;
}

static const char *check_norm(const esp_program *p, const esp_step *s)
{
    const int64_t width = s->out.size[3];
    if (!readable(p, &s->a) || !same_sizes(&s->a, &s->out)) return "impossible source";
    if ((s->values_count && s->values_count != width) || (s->bias_count && s->bias_count != width))
        return "scale, shift and channels disagree";
    return NULL;
}

static const char *check_resize(const esp_program *p, const esp_step *s)
{
    const esp_operand *o = &s->out, *a = &s->a;
    const int64_t padded = (o->size[3] + 15) / 16 * 16, lines = o->size[2] + padded;
    if (!readable(p, a) || a->size[0] != 1 || o->size[0] != 1 || a->size[1] != o->size[1]) return "impossible source";
    if (s->index_count != (s->values_count ? 2 : 1) * lines || (s->values_count && s->values_count != lines))
        return "places, shares and outputs disagree";
    for (int64_t i = 0; i < s->index_count; i++) {
        const bool row = i % lines < o->size[2];
        if (!within(s->index[i], 0, row ? a->size[2] - 1 : (a->size[3] - 1) * a->stride[3]))
            return "a place lies outside the source";
    }
    return NULL;
}

static const char *check_elements(const esp_program *p, const esp_step *s)
{
    if (!readable(p, &s->a) || !same_sizes(&s->a, &s->out)) return "impossible source";
    if (s->op == ESP_BINARY) {
        if (!within(s->param[BINARY_KIND], 0, 3)) return "unknown arithmetic";
        if (!readable(p, &s->b) || !same_sizes(&s->b, &s->out)) return "impossible second source";
    }
    if (s->op == ESP_UNARY) {
        int64_t channels = s->out.size[1];
        if (s->values_count > 1 && s->values_count != channels) return "scale and channels disagree";
        if (s->bias_count > 1 && s->bias_count != channels) return "shift and channels disagree";
    }
    return NULL;
}

int esp_check_step(const esp_program *program, const esp_step *step, int32_t number, char *message, size_t capacity)
{
    const char *problem = NULL;
    if (!writable(program, step)) {
        problem = "its output lies outside its space";
    } else {
        switch (step->op) {
        case ESP_CONV: problem = check_conv(program, step); break;
        case ESP_LINEAR: problem = check_linear(program, step); break;
        case ESP_DEPTHWISE: problem = check_depthwise(program, step); break;
        case ESP_GATHER: problem = check_gather(program, step); break;
        case ESP_WINOGRAD_IN: problem = check_winograd_in(program, step); break;
        case ESP_WINOGRAD_OUT: problem = check_winograd_out(program, step); break;
        case ESP_STEM: problem = check_stem(program, step); break;
        case ESP_POOL:
        case ESP_ADAPTIVE: problem = check_pool(program, step); break;
        case ESP_MATMUL: problem = check_matmul(program, step); break;
        case ESP_NORM: problem = check_norm(program, step); break;
        case ESP_RESIZE: problem = check_resize(program, step); break;
        case ESP_COPY:
        case ESP_BINARY:
        case ESP_UNARY:
        case ESP_SOFTMAX: problem = check_elements(program, step); break;
        default: break;
        }
    }
    if (!problem) return ESP_OK;
    return esp_fail(message, capacity, ESP_BAD_PROGRAM, "not a valid program: step %d (%s): %s", number, step->name,
        problem);
}
