/* The kernel table: which function runs which op, format and instruction set. */
#ifndef ESP_DISPATCH_H
#define ESP_DISPATCH_H

#include "program.h"

enum esp_feature { ESP_HAS_AVX2 = 1, ESP_HAS_FMA = 2, ESP_HAS_AVX512 = 4 };

/* One row. height: of the row-blocks it takes, 0 for ops without. features: what the machine must have.
 * Among the rows that fit, the highest priority wins. */
typedef struct {
    int32_t op, height;
    esp_kernel run;
    const char *name;
    uint32_t features;
    int32_t priority;
} esp_kernel_row;

typedef struct {
    const char *name;
    uint32_t features;
    const esp_kernel_row *rows; /* ends with op 0 */
    int64_t (*peak)(int64_t rounds, float *result);
} esp_isa_row;

/* All instruction sets of this build, best first; ends with a NULL name. */
extern const esp_isa_row esp_isas[];

uint32_t esp_machine_features(void);
/* The kernel of instruction set `isa` (or of a lesser one where it has none) for op and height; NULL for none. */
const esp_kernel_row *esp_find_kernel(int isa, int32_t op, int64_t height);

#endif
