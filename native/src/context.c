/* Running a program: its arena, its threads, its clock. */
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "dispatch.h"
#include "pages.h"
#include "program.h"
#include "team.h"

enum { MAX_THREADS = 1024 };

struct esp_context {
    const esp_program *program;
    esp_team *team;
    int threads;
    float *room;  /* as it was allocated */
    float *arena; /* in it, with slack before and behind */
    double *step_ms;
    int profile;
    atomic_flag busy;
    int64_t batch; /* of the run in progress */
    const float *const *inputs;
    float *const *outputs;
};

uint32_t esp_version(void) { return ESP_VERSION; }

static int64_t workspace_floats(const esp_program *p) { return p->arena_floats + 3 * ESP_SLACK + 16; }

int64_t esp_workspace_size(const esp_program *p) { return p ? workspace_floats(p) * 4 : 0; }

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

static const esp_step *step_at(const esp_program *p, int32_t i)
{
    return p && i >= 0 && i < p->steps_count ? &p->steps[i] : NULL;
}

const char *esp_step_name(const esp_program *p, int32_t i) { return step_at(p, i) ? step_at(p, i)->name : NULL; }

const char *esp_step_note(const esp_program *p, int32_t i) { return step_at(p, i) ? step_at(p, i)->note : NULL; }

const char *esp_step_kernel(const esp_program *p, int32_t i)
{
    return step_at(p, i) ? step_at(p, i)->kernel_name : NULL;
}

void esp_context_free(esp_context *c)
{
    if (!c) return;
    esp_team_free(c->team);
    free(c->room);
    free(c->step_ms);
    free(c);
}

int esp_context_create(
    const esp_program *program, int32_t threads, esp_context **context, char *message, size_t capacity)
{
    if (message && capacity) message[0] = 0;
    if (!program || !context) return esp_fail(message, capacity, ESP_BAD_ARGUMENT, "a null pointer");
    *context = NULL;
    if (threads < 1 || threads > MAX_THREADS)
        return esp_fail(message, capacity, ESP_BAD_ARGUMENT, "threads must be 1..%d, got %d", MAX_THREADS, threads);
    esp_context *c = calloc(1, sizeof *c);
    if (!c) return esp_fail(message, capacity, ESP_NO_MEMORY, "out of memory");
    c->program = program;
    c->threads = threads;
    atomic_flag_clear(&c->busy);
    int64_t floats = workspace_floats(program);
    c->room = esp_pages((size_t)floats * sizeof(float)); /* zero: a program never sees what lay there before */
    c->step_ms = calloc((size_t)program->steps_count + 1, sizeof *c->step_ms);
    if (!c->room || !c->step_ms) {
        esp_context_free(c);
        return esp_fail(message, capacity, ESP_NO_MEMORY, "out of memory for a workspace of %lld bytes",
            (long long)floats * 4);
    }
    c->arena = c->room + ESP_SLACK;
    c->team = esp_team_create(threads);
    if (!c->team) {
        esp_context_free(c);
        return esp_fail(message, capacity, ESP_NO_THREADS, "the system refused %d threads", threads);
    }
    *context = c;
    return ESP_OK;
}

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* All steps of all samples, as member `part` of the team. Small steps are done by member 0 alone; members meet where
 * a step is shared or was. */
static void run_part(void *argument, int part)
{
    esp_context *c = argument;
    const esp_program *p = c->program;
    int meet_first = 0;
    esp_frame frame = {c->arena, (const float *)p->bytes, c->inputs, c->outputs, p->elements,
        p->elements + p->inputs_count, 0};
    for (int64_t sample = 0; sample < c->batch; sample++) {
        frame.sample = sample;
        for (int32_t i = 0; i < p->steps_count; i++) {
            const esp_step *s = &p->steps[i];
            if (meet_first || s->parallel || c->profile) esp_team_meet(c->team);
            double start = c->profile && part == 0 ? now_ms() : 0;
            if (s->parallel)
                s->kernel(s, &frame, part, c->threads);
            else if (part == 0)
                s->kernel(s, &frame, 0, 1);
            if (c->profile) esp_team_meet(c->team);
            if (c->profile && part == 0) c->step_ms[i] += now_ms() - start;
            meet_first = s->parallel;
        }
    }
}

int esp_run(esp_context *c, int64_t batch, const float *const *inputs, float *const *outputs)
{
    if (!c || batch < 0 || batch > ((int64_t)1 << 31)) return ESP_BAD_ARGUMENT;
    if ((!inputs && c->program->inputs_count) || (!outputs && c->program->outputs_count)) return ESP_BAD_ARGUMENT;
    for (int32_t i = 0; i < c->program->inputs_count; i++)
        if (!inputs[i]) return ESP_BAD_ARGUMENT;
    for (int32_t i = 0; i < c->program->outputs_count; i++)
        if (!outputs[i]) return ESP_BAD_ARGUMENT;
    if (atomic_flag_test_and_set(&c->busy)) return ESP_BUSY;
    c->batch = batch;
    c->inputs = inputs;
    c->outputs = outputs;
    esp_team_run(c->team, run_part, c);
    atomic_flag_clear(&c->busy);
    return ESP_OK;
}

int esp_profile(esp_context *c, int on)
{
    if (!c) return ESP_BAD_ARGUMENT;
    if (atomic_flag_test_and_set(&c->busy)) return ESP_BUSY;
    c->profile = on != 0;
    for (int32_t i = 0; i < c->program->steps_count; i++) c->step_ms[i] = 0;
    atomic_flag_clear(&c->busy);
    return ESP_OK;
}

double esp_step_ms(const esp_context *c, int32_t i)
{
    return c && i >= 0 && i < c->program->steps_count ? c->step_ms[i] : 0;
}
