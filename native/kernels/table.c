/* The kernels of one instruction set: one row each. */
#include "../src/dispatch.h"
#include "simd.h"

#define ESP_TEXT_(x) #x
#define ESP_TEXT(x) ESP_TEXT_(x)

#define DECLARE(name) void ESP_NAME(name)(const esp_step *, const esp_frame *, int, int)
DECLARE(conv_1);
DECLARE(conv_2);
DECLARE(conv_4);
DECLARE(conv_8);
DECLARE(conv_16);
DECLARE(conv_32);
DECLARE(linear_1);
DECLARE(linear_2);
DECLARE(linear_4);
DECLARE(linear_8);
DECLARE(linear_16);
DECLARE(copy);
DECLARE(gather);
DECLARE(fill);
DECLARE(pool);
DECLARE(adaptive);
DECLARE(binary);
DECLARE(unary);
DECLARE(softmax);
DECLARE(depthwise);
DECLARE(winograd_in);
DECLARE(winograd_out);
DECLARE(norm);
DECLARE(matmul);
DECLARE(resize);
DECLARE(stem);

#if ESP_WIDTH == 16
enum { NEEDS = ESP_HAS_AVX512 | ESP_HAS_AVX2 | ESP_HAS_FMA, PRIORITY = 30 };
#elif ESP_WIDTH == 8
enum { NEEDS = ESP_HAS_AVX2 | ESP_HAS_FMA, PRIORITY = 20 };
#else
enum { NEEDS = 0, PRIORITY = 10 };
#endif

#define BLOCKS(op, name, height) {op, height, ESP_NAME(name##_##height), #name "/" #height "/" ESP_TEXT(ESP_ISA), NEEDS, PRIORITY}
#define PLAIN(op, name) {op, 0, ESP_NAME(name), #name "/" ESP_TEXT(ESP_ISA), NEEDS, PRIORITY}

const esp_kernel_row ESP_NAME(esp_rows)[] = {
    /* op, format (height of the row-blocks), name */
    BLOCKS(ESP_CONV, conv, 1),
    BLOCKS(ESP_CONV, conv, 2),
    BLOCKS(ESP_CONV, conv, 4),
    BLOCKS(ESP_CONV, conv, 8),
    BLOCKS(ESP_CONV, conv, 16),
    BLOCKS(ESP_CONV, conv, 32), /* lanes.c */
    BLOCKS(ESP_LINEAR, linear, 1),
    BLOCKS(ESP_LINEAR, linear, 2),
    BLOCKS(ESP_LINEAR, linear, 4),
    BLOCKS(ESP_LINEAR, linear, 8),
    BLOCKS(ESP_LINEAR, linear, 16),
    PLAIN(ESP_COPY, copy),
    PLAIN(ESP_GATHER, gather),
    PLAIN(ESP_FILL, fill),
    PLAIN(ESP_POOL, pool),
    PLAIN(ESP_ADAPTIVE, adaptive),
    PLAIN(ESP_BINARY, binary),
    PLAIN(ESP_UNARY, unary),
    PLAIN(ESP_SOFTMAX, softmax),
    PLAIN(ESP_DEPTHWISE, depthwise),
    PLAIN(ESP_WINOGRAD_IN, winograd_in),
    PLAIN(ESP_WINOGRAD_OUT, winograd_out),
    PLAIN(ESP_NORM, norm),
    PLAIN(ESP_MATMUL, matmul),
    PLAIN(ESP_RESIZE, resize),
    PLAIN(ESP_STEM, stem),
    {0, 0, 0, 0, 0, 0},
};
