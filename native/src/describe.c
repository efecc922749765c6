/* What a caller may ask of a program: its inputs, outputs and steps. */
#include "program.h"

uint32_t esp_version(void) { return ESP_VERSION; }

int32_t esp_input_count(const esp_program *p) { return p ? p->inputs_count : 0; }

int32_t esp_output_count(const esp_program *p) { return p ? p->outputs_count : 0; }

static const esp_tensor *tensor(const esp_program *p, int32_t i, int output)
{
    if (!p || i < 0 || i >= (output ? p->outputs_count : p->inputs_count)) return NULL;
    return &p->tensors[output ? p->inputs_count + i : i];
}

static int32_t shape(const esp_tensor *t, int64_t *dims, int32_t capacity)
{
    if (!t) return -1;
    for (int32_t d = 0; dims && d < t->rank && d < capacity; d++) dims[d] = t->dims[d];
    return t->rank;
}

const char *esp_input_name(const esp_program *p, int32_t i)
{
    const esp_tensor *t = tensor(p, i, 0);
    return t ? t->name : NULL;
}

const char *esp_output_name(const esp_program *p, int32_t i)
{
    const esp_tensor *t = tensor(p, i, 1);
    return t ? t->name : NULL;
}

int32_t esp_input_shape(const esp_program *p, int32_t i, int64_t *dims, int32_t capacity)
{
    return shape(tensor(p, i, 0), dims, capacity);
}

int32_t esp_output_shape(const esp_program *p, int32_t i, int64_t *dims, int32_t capacity)
{
    return shape(tensor(p, i, 1), dims, capacity);
}

int32_t esp_step_count(const esp_program *p) { return p ? p->steps_count : 0; }

const char *esp_step_name(const esp_program *p, int32_t i) { return esp_step_at(p, i) ? esp_step_at(p, i)->name : NULL; }

const char *esp_step_note(const esp_program *p, int32_t i) { return esp_step_at(p, i) ? esp_step_at(p, i)->note : NULL; }

const char *esp_step_kernel(const esp_program *p, int32_t i)
{
    return esp_step_at(p, i) ? esp_step_at(p, i)->kernel_name : NULL;
}
