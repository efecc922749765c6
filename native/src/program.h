/* What a loaded program is made of, and what kernels see of it. */
#ifndef ESP_PROGRAM_H
#define ESP_PROGRAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "espalier.h"

enum esp_op {
    ESP_CONV = 1, /* row-blocks over planes */
    ESP_LINEAR,   /* row-blocks times vectors */
    ESP_COPY,
    ESP_GATHER, /* the phases of a strided window */
    ESP_POOL,
    ESP_ADAPTIVE,
    ESP_BINARY,
    ESP_UNARY, /* scale, shift, activation */
    ESP_SOFTMAX,
    ESP_FILL,
    ESP_DEPTHWISE,
    ESP_WINOGRAD_IN, /* before and behind the products of a 3 x 3 window */
    ESP_WINOGRAD_OUT,
    ESP_NORM,   /* over the last dimension; act_a is epsilon */
    ESP_MATMUL, /* of two activations; act_a is a factor */
    ESP_RESIZE, /* up-sampling, nearest or bilinear */
    ESP_STEM,   /* a window at stride 2 over few channels */
    ESP_OPS_END,
};

enum esp_space { ESP_NOWHERE = 0, ESP_ARENA, ESP_INPUT, ESP_OUTPUT, ESP_CONST, ESP_SCRATCH };

enum esp_activation {
    ESP_LINEAR_ACT = 0,
    ESP_CLAMP, /* a..b; relu is 0..inf */
    ESP_LEAKY, /* slope a */
    ESP_ELU,   /* alpha a */
    ESP_SIGMOID,
    ESP_TANH,
    ESP_SILU,
    ESP_HARDSWISH,
    ESP_HARDSIGMOID,
    ESP_GELU,
    ESP_GELU_TANH,
    ESP_ACTIVATIONS_END,
};

enum { ESP_PARAMS = 16, ESP_STEP_WORDS = 72, ESP_OPERAND_WORDS = 11, ESP_MAX_RANK = 8 };

/* Floats that kernels may read (never write) past what they need: the tail of the widest tile. */
enum { ESP_SLACK = 256 };

/* Row-blocks of conv whose vectors run along the rows: their height, and the longest segment that they take. */
enum { ESP_LANES_HEIGHT = 32, ESP_LANES_PIXELS = 256 };

/* What a stem can be: channels that it reads, rows and columns of its window; and the points of its products, and how many
 * filters lie side by side in its weights: by such blocks, points, channels, even columns and odd, rows, filters. */
enum { ESP_STEM_CHANNELS = 4, ESP_STEM_WINDOW = 8, ESP_STEM_POINTS = 7, ESP_STEM_HEIGHT = 8 };

/* How far a pooling window may reach, in either direction. */
enum { ESP_POOL_REACH = 2048 };

/* A tensor of up to four dimensions in some space; offsets, sizes and strides in floats. */
typedef struct {
    int32_t space, index; /* index: which input or output */
    int64_t offset, size[4], stride[4];
} esp_operand;

typedef struct esp_step esp_step;

/* Where one thread finds its data during one sample. */
typedef struct {
    float *arena, *scratch; /* scratch: the thread's own, for what a task alone writes and reads */
    const float *constants;
    const float *const *inputs;
    float *const *outputs;
    const int64_t *input_sizes, *output_sizes;
    int64_t sample;
    int slice, slices; /* of a share of ESP_CONV: only this one of so many; of others 0 and 1 */
} esp_frame;

/* Do share `part` of `parts` of a step. */
typedef void (*esp_kernel)(const esp_step *step, const esp_frame *frame, int part, int parts);

/* Parameters of ESP_CONV in `param`. Its work is `segments` runs of `length` pixels each. */
enum {
    CONV_HEIGHT = 0,
    CONV_SEGMENTS,
    CONV_LENGTH,
    CONV_IN_STRIDE, /* from segment to segment */
    CONV_OUT_STRIDE,
    CONV_RESIDUAL_STRIDE,
    CONV_CHUNK,    /* pixels worked on at once, so that they stay in the cache */
    CONV_CHANNELS, /* not 0: who reads the output shares out channels, where images are small */
    CONV_SIDES,    /* 0, or: so many floats before and behind the output lie copies of it, a column to either side */
    CONV_PIECES,   /* 0, or: single rows have their columns in so many pieces, the first of all rows before the second */
};
enum {
    LINEAR_HEIGHT = 0,
    LINEAR_POSITIONS,
    LINEAR_IN_STRIDE, /* from position to position */
    LINEAR_OUT_STRIDE,
    LINEAR_RESIDUAL_STRIDE,
    LINEAR_ROW_STRIDE, /* from output row to output row */
};
enum { GATHER_STRIDE_Y = 0, GATHER_STRIDE_X };
enum { WINOGRAD_FIRST = 0 }; /* row of tiles of 4 x 4 pixels */
enum {
    POOL_KIND = 0, /* 0 max, 1 mean over the padded window, 2 mean over what lies in the image */
    POOL_WINDOW_Y,
    POOL_WINDOW_X,
    POOL_STRIDE_Y,
    POOL_STRIDE_X,
    POOL_PAD_Y,
    POOL_PAD_X,
    POOL_DILATION_Y,
    POOL_DILATION_X,
};
enum {
    DEPTHWISE_WINDOW_Y = 0,
    DEPTHWISE_WINDOW_X,
    DEPTHWISE_STRIDE_Y,
    DEPTHWISE_STRIDE_X,
    DEPTHWISE_PAD_Y,
    DEPTHWISE_PAD_X,
    DEPTHWISE_DILATION_Y,
    DEPTHWISE_DILATION_X,
    DEPTHWISE_MULTIPLIER, /* output channels per input channel */
};
enum { STEM_WINDOW_Y = 0, STEM_PAD_Y, STEM_PAD_X };
enum { BINARY_KIND = 0 }; /* 0 add, 1 subtract, 2 multiply, 3 divide */
enum { SOFTMAX_LOG = 0 };

struct esp_step {
    int32_t op, activation;
    float act_a, act_b;
    int32_t margins; /* 1: the kernel zeroes the margins of the planes it writes */
    int64_t front;   /* floats of margin before the first plane */
    esp_operand out, a, b;
    int64_t param[ESP_PARAMS];
    /* row-blocks: block k has columns starts[k]..starts[k+1]; its r-th row is output row rows[k * height + r] */
    const int32_t *rows, *starts, *index;
    const float *values, *bias;
    int64_t rows_count, starts_count, index_count, values_count, bias_count;
    esp_kernel kernel;
    const char *kernel_name, *name, *note;
    int64_t work;     /* roughly, in multiply-adds or moves */
    int32_t parallel; /* worth more than one thread */
    int32_t task;     /* 0, or: steps of one number are done by one thread, numbers that follow each other at once */
    int32_t bands;    /* 0, or: the task is as many, each a band of the pixels of every step of it */
    int32_t upto;     /* of the first step of such numbers: behind the last; else 0 */
};

typedef struct {
    const char *name;
    int32_t rank;
    int64_t dims[ESP_MAX_RANK], elements;
} esp_tensor;

struct esp_program {
    uint8_t *bytes;
    char *strings; /* names, with a zero behind each */
    int64_t size, arena_floats, scratch_floats;
    int32_t inputs_count, outputs_count, steps_count;
    esp_tensor *tensors; /* inputs, then outputs */
    int64_t *elements;   /* of each tensor, for frames */
    esp_step *steps;
};

/* NULL, where there is none */
static inline const esp_step *esp_step_at(const esp_program *p, int32_t i)
{
    return p && i >= 0 && i < p->steps_count ? &p->steps[i] : NULL;
}

static inline const float *esp_source(const esp_operand *o, const esp_frame *f)
{
    switch (o->space) {
    case ESP_ARENA: return f->arena + o->offset;
    case ESP_SCRATCH: return f->scratch + o->offset;
    case ESP_INPUT: return f->inputs[o->index] + f->sample * f->input_sizes[o->index] + o->offset;
    case ESP_OUTPUT: return f->outputs[o->index] + f->sample * f->output_sizes[o->index] + o->offset;
    case ESP_CONST: return f->constants + o->offset;
    default: return NULL;
    }
}

static inline float *esp_target(const esp_operand *o, const esp_frame *f)
{
    if (o->space == ESP_ARENA) return f->arena + o->offset;
    if (o->space == ESP_SCRATCH) return f->scratch + o->offset;
    return f->outputs[o->index] + f->sample * f->output_sizes[o->index] + o->offset;
}

/* Floats behind each row of a conv's output that may be written with it: of an image that lies row by row, up to the next
 * plane's row. They are margin, or nobody's. */
static inline int64_t row_padding(const esp_step *s)
{
    const esp_operand *o = &s->out;
    const bool whole = s->param[CONV_SEGMENTS] == o->size[2] && s->param[CONV_LENGTH] == o->size[3] &&
                       s->param[CONV_OUT_STRIDE] == o->stride[2];
    return whole && o->size[2] > 1 && o->stride[2] > o->stride[1] ? o->stride[1] - o->size[3] : 0;
}

/* message must not be NULL with capacity > 0 */
int esp_fail(char *message, size_t capacity, int code, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 4, 5)))
#endif
    ;
int esp_check_step(const esp_program *program, const esp_step *step, int32_t number, char *message, size_t capacity);

#endif
