/* From bytes to a program. Nothing that the bytes say is believed before it has been checked.
 *
 * Header, 128 bytes, little-endian: magic "ESPALIER", u32 version, u32 reserved, then i64: size of the file, floats of
 * the arena, inputs, outputs, steps, offset of the tensor table, offset of the step table, floats of the scratch.
 * Tables hold i64 words:
 * a tensor is name offset, name length, rank, 8 sizes; a step is ESP_STEP_WORDS words as read in read_step().
 * Names and arrays lie anywhere in the file, said by offset and count; arrays are aligned to 4 bytes.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "pages.h"
#include "program.h"

enum { HEADER_SIZE = 128, TENSOR_WORDS = 11, MAX_TABLE = 1 << 20, MAX_BANDS = 1024, WORK_WORTH_THREADS = 8192 };
static const int64_t MAX_FLOATS = (int64_t)1 << 38;

typedef struct {
    esp_program *program;
    const char *problem; /* the first one found; NULL while all is well */
    int64_t strings_used, strings_capacity; /* of the program's */
} reader;

int esp_fail(char *message, size_t capacity, int code, const char *format, ...)
{
    if (message && capacity) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(message, capacity, format, arguments);
        va_end(arguments);
    }
    return code;
}

const char *esp_code_name(int code)
{
    static const char *const names[] = {"ok",        "bad argument", "bad program", "bad version",
                                        "no memory", "no isa",       "busy",        "no threads"};
    return code >= 0 && code < (int)(sizeof names / sizeof *names) ? names[code] : "unknown code";
}

static int64_t word(const uint8_t *p)
{
    int64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

/* `count` elements of `width` bytes at `offset` of the file, or NULL with a problem. */
static const uint8_t *array(reader *r, int64_t offset, int64_t count, int64_t width)
{
    int64_t bytes, size = r->program->size;
    if (offset < HEADER_SIZE || count < 0 || __builtin_mul_overflow(count, width, &bytes) || offset > size ||
        bytes > size - offset) {
        r->problem = "an array lies outside the file";
        return NULL;
    }
    if (width >= 4 && offset % 4) {
        r->problem = "an array is not aligned";
        return NULL;
    }
    return r->program->bytes + offset;
}

static const char *string(reader *r, int64_t offset, int64_t length)
{
    if (length == 0) return "";
    if (length < 0 || length > 4096 || length + 1 > r->strings_capacity - r->strings_used) {
        r->problem = "a name is too long";
        return "";
    }
    const uint8_t *text = array(r, offset, length, 1);
    if (!text) return "";
    char *copy = r->program->strings + r->strings_used;
    memcpy(copy, text, (size_t)length);
    copy[length] = 0;
    r->strings_used += length + 1;
    return copy;
}

static void read_tensor(reader *r, const uint8_t *p, esp_tensor *t)
{
    t->name = string(r, word(p), word(p + 8));
    int64_t rank = word(p + 16);
    if (rank < 0 || rank > ESP_MAX_RANK) {
        r->problem = "an input or output has too many dimensions";
        return;
    }
    t->rank = (int32_t)rank;
    t->elements = 1;
    for (int32_t d = 0; d < t->rank; d++) {
        t->dims[d] = word(p + 24 + 8 * d);
        if (t->dims[d] < 1 || t->dims[d] > MAX_FLOATS ||
            __builtin_mul_overflow(t->elements, t->dims[d], &t->elements) || t->elements > MAX_FLOATS)
            r->problem = "an input or output has an impossible shape";
        if (r->problem) return;
    }
}

static void read_operand(reader *r, const uint8_t *p, esp_operand *o)
{
    int64_t space = word(p), index = word(p + 8);
    if (space < ESP_NOWHERE || space > ESP_SCRATCH || index < 0 || index > MAX_TABLE) {
        r->problem = "an operand lies in an unknown place";
        return;
    }
    o->space = (int32_t)space;
    o->index = (int32_t)index;
    o->offset = word(p + 16);
    for (int d = 0; d < 4; d++) {
        o->size[d] = word(p + 24 + 8 * d);
        o->stride[d] = word(p + 56 + 8 * d);
    }
}

static float float_of(int64_t bits)
{
    uint32_t low = (uint32_t)bits;
    float value;
    memcpy(&value, &low, sizeof value);
    return value;
}

static void read_step(reader *r, const uint8_t *p, esp_step *s)
{
    const void *arrays[5];
    int64_t counts[5], op = word(p), activation = word(p + 8);
    if (op < 1 || op >= ESP_OPS_END || activation < 0 || activation >= ESP_ACTIVATIONS_END) {
        r->problem = "a step has an unknown op or activation";
        return;
    }
    s->op = (int32_t)op;
    s->activation = (int32_t)activation;
    s->act_a = float_of(word(p + 16));
    s->act_b = float_of(word(p + 24));
    s->margins = word(p + 32) & 1;
    s->front = word(p + 40);
    read_operand(r, p + 8 * 6, &s->out);
    read_operand(r, p + 8 * 17, &s->a);
    read_operand(r, p + 8 * 28, &s->b);
    for (int i = 0; i < 5 && !r->problem; i++) {
        counts[i] = word(p + 8 * (40 + 2 * i));
        arrays[i] = counts[i] ? array(r, word(p + 8 * (39 + 2 * i)), counts[i], 4) : NULL;
    }
    if (r->problem) return;
    s->rows = arrays[0], s->starts = arrays[1], s->index = arrays[2], s->values = arrays[3], s->bias = arrays[4];
    s->rows_count = counts[0], s->starts_count = counts[1], s->index_count = counts[2];
    s->values_count = counts[3], s->bias_count = counts[4];
    s->name = string(r, word(p + 8 * 49), word(p + 8 * 50));
    s->note = string(r, word(p + 8 * 51), word(p + 8 * 52));
    for (int i = 0; i < ESP_PARAMS; i++) s->param[i] = word(p + 8 * (53 + i));
    const int64_t task = word(p + 8 * (53 + ESP_PARAMS));
    if (task < 0 || task > MAX_TABLE) r->problem = "a task has an impossible number";
    s->task = (int32_t)task;
    const int64_t bands = word(p + 8 * (54 + ESP_PARAMS));
    if (bands < 0 || bands > MAX_BANDS || (bands && (!task || op != ESP_CONV)))
        r->problem = "bands that are too many, or of what is no task of a conv";
    s->bands = (int32_t)bands;
}

/* Counts, sizes and places of the two tables. */
static const char *read_header(esp_program *p, int64_t *tensors_at, int64_t *steps_at)
{
    const uint8_t *b = p->bytes;
    int64_t inputs = word(b + 32), outputs = word(b + 40), steps = word(b + 48);
    if (word(b + 16) != p->size) return "its size is not the one it states (truncated?)";
    p->arena_floats = word(b + 24);
    p->scratch_floats = word(b + 72);
    if (p->arena_floats < 0 || p->arena_floats > MAX_FLOATS || p->scratch_floats < 0 || p->scratch_floats > MAX_FLOATS)
        return "its arena has an impossible size";
    if (inputs < 0 || outputs < 0 || steps < 0 || inputs > MAX_TABLE || outputs > MAX_TABLE || steps > MAX_TABLE)
        return "it has an impossible number of inputs, outputs or steps";
    p->inputs_count = (int32_t)inputs;
    p->outputs_count = (int32_t)outputs;
    p->steps_count = (int32_t)steps;
    *tensors_at = word(b + 56);
    *steps_at = word(b + 64);
    return NULL;
}

static int read_tables(reader *r, char *message, size_t capacity)
{
    esp_program *p = r->program;
    int64_t tensors_at, steps_at, tensors;
    r->problem = read_header(p, &tensors_at, &steps_at);
    tensors = (int64_t)p->inputs_count + p->outputs_count;
    const uint8_t *tensor_table = r->problem ? NULL : array(r, tensors_at, tensors, 8 * TENSOR_WORDS);
    const uint8_t *step_table = r->problem ? NULL : array(r, steps_at, p->steps_count, 8 * ESP_STEP_WORDS);
    if (r->problem) return esp_fail(message, capacity, ESP_BAD_PROGRAM, "not a valid program: %s", r->problem);
    p->tensors = calloc((size_t)tensors + 1, sizeof *p->tensors);
    p->elements = calloc((size_t)tensors + 1, sizeof *p->elements);
    p->steps = calloc((size_t)p->steps_count + 1, sizeof *p->steps);
    if (!p->tensors || !p->elements || !p->steps) return esp_fail(message, capacity, ESP_NO_MEMORY, "out of memory");
    for (int64_t i = 0; i < tensors && !r->problem; i++) {
        read_tensor(r, tensor_table + i * 8 * TENSOR_WORDS, &p->tensors[i]);
        p->elements[i] = p->tensors[i].elements;
    }
    for (int32_t i = 0; i < p->steps_count && !r->problem; i++)
        read_step(r, step_table + (int64_t)i * 8 * ESP_STEP_WORDS, &p->steps[i]);
    if (r->problem) return esp_fail(message, capacity, ESP_BAD_PROGRAM, "not a valid program: %s", r->problem);
    return ESP_OK;
}

/* Roughly how many multiply-adds or moves a step costs; checked steps only. */
static int64_t step_work(const esp_step *s)
{
    int64_t elements = s->out.size[0] * s->out.size[1] * s->out.size[2] * s->out.size[3], taps = 1;
    if (s->op == ESP_CONV) return s->values_count * s->param[CONV_SEGMENTS] * s->param[CONV_LENGTH] / 8;
    if (s->op == ESP_LINEAR) return s->values_count * s->param[LINEAR_POSITIONS] / 4;
    if (s->op == ESP_DEPTHWISE) taps = s->values_count / s->out.size[1] / 2 + 1;
    if (s->op == ESP_STEM) return s->values_count * s->out.size[2] * ((s->out.size[3] + 3) / 4) / 8;
    if (s->op == ESP_MATMUL) taps = s->a.size[3] / 8 + 1;
    if (s->op == ESP_NORM) taps = 4;
    if (s->op == ESP_POOL) taps = s->param[POOL_WINDOW_Y] * s->param[POOL_WINDOW_X];
    if (s->op == ESP_ADAPTIVE || s->op == ESP_SOFTMAX) taps = s->a.size[2] * s->a.size[3] / 8 + 1;
    return elements * (taps < 4096 ? taps : 4096);
}

/* Tasks that may be done at once: their first step knows where they end, and whether they are worth threads. */
static void find_tasks(esp_program *p)
{
    for (int32_t i = 0, upto; i < p->steps_count; i = upto) {
        int64_t work = p->steps[i].work;
        upto = i + 1;
        if (!p->steps[i].task) continue;
        for (; upto < p->steps_count && p->steps[upto].task; upto++) {
            const int32_t next = p->steps[upto].task - p->steps[upto - 1].task;
            if (next != 0 && next != 1) break;
            if (__builtin_add_overflow(work, p->steps[upto].work, &work)) work = INT64_MAX;
        }
        p->steps[i].upto = upto;
        for (int32_t k = i; k < upto; k++) p->steps[k].parallel = work > WORK_WORTH_THREADS;
    }
}

static int bind_steps(esp_program *p, char *message, size_t capacity)
{
    int isa = esp_isa(message, capacity);
    if (isa < 0) return ESP_NO_ISA;
    for (int32_t i = 0; i < p->steps_count; i++) {
        esp_step *s = &p->steps[i];
        int code = esp_check_step(p, s, i, message, capacity);
        if (code) return code;
        int64_t height = s->op == ESP_CONV || s->op == ESP_LINEAR ? s->param[0] : 0;
        const esp_kernel_row *row = esp_find_kernel(isa, s->op, height);
        if (!row) return esp_fail(message, capacity, ESP_BAD_PROGRAM, "step %d (%s): no kernel for it", i, s->name);
        s->kernel = row->run;
        s->work = step_work(s);
        s->parallel = s->work > WORK_WORTH_THREADS;
        s->kernel_name = row->name;
    }
    find_tasks(p);
    return ESP_OK;
}

static int load_into(esp_program *p, const void *bytes, size_t size, char *message, size_t capacity)
{
    p->size = (int64_t)size;
    if (size > (size_t)1 << 40) return esp_fail(message, capacity, ESP_BAD_PROGRAM, "not a valid program: too large");
    const size_t names = size < (size_t)1 << 24 ? size + 4096 : (size_t)1 << 24; /* at most; untouched, it takes nothing */
    p->bytes = esp_pages((size + 63) / 64 * 64 + ESP_SLACK * 4);
    p->strings = malloc(names);
    if (!p->bytes || !p->strings)
        return esp_fail(message, capacity, ESP_NO_MEMORY, "out of memory for a program of %zu bytes", size);
    memcpy(p->bytes, bytes, size);
    reader r = {p, NULL, 0, (int64_t)names};
    int code = read_tables(&r, message, capacity);
    return code ? code : bind_steps(p, message, capacity);
}

int esp_load(const void *bytes, size_t size, esp_program **program, char *message, size_t capacity)
{
    const uint32_t one = 1;
    uint32_t version;
    if (message && capacity) message[0] = 0;
    if (!bytes || !program) return esp_fail(message, capacity, ESP_BAD_ARGUMENT, "esp_load: a null pointer");
    *program = NULL;
    if (*(const uint8_t *)&one != 1)
        return esp_fail(message, capacity, ESP_BAD_PROGRAM, "programs run on little-endian machines only");
    if (size < HEADER_SIZE || memcmp(bytes, "ESPALIER", 8) != 0)
        return esp_fail(message, capacity, ESP_BAD_PROGRAM, "not a valid program: it does not begin with ESPALIER");
    memcpy(&version, (const uint8_t *)bytes + 8, 4);
    if (version != ESP_FORMAT_VERSION)
        return esp_fail(message, capacity, ESP_BAD_VERSION,
            "the program has format version %u, this engine reads %u: compile the network again", version,
            ESP_FORMAT_VERSION);
    esp_program *p = calloc(1, sizeof *p);
    if (!p) return esp_fail(message, capacity, ESP_NO_MEMORY, "out of memory");
    int code = load_into(p, bytes, size, message, capacity);
    if (code) {
        esp_free(p);
        return code;
    }
    *program = p;
    return ESP_OK;
}

const void *esp_program_bytes(const esp_program *program, size_t *size)
{
    if (size) *size = program ? (size_t)program->size : 0;
    return program ? program->bytes : NULL;
}

void esp_free(esp_program *program)
{
    if (!program) return;
    free(program->bytes);
    free(program->strings);
    free(program->tensors);
    free(program->elements);
    free(program->steps);
    free(program);
}
