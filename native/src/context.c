/* Running a program: its arenas, its threads, its clock.
 *
 * A single sample is split step by step among the threads. A batch of at least as many samples goes in waves: every
 * thread takes whole samples, each with an arena of its own, and they only meet at steps whose weights are too large for
 * a cache, which they share out by weights, so that a wave reads them once. Kernels give the same bits either way. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dispatch.h"
#include "pages.h"
#include "program.h"
#include "team.h"

enum {
    MAX_THREADS = 1024,
    HEAVY_FLOATS = 1 << 18,  /* weights of a step that a wave shares out */
    PIECE_FLOATS = 1 << 15,  /* of them at a time: they stay in a cache while all samples of the wave use them */
    NARROWEST_HEAVY_WAVE = 4, /* samples, also with fewer threads: it pays to read large weights less often */
    SLICES = 4,           /* of a thread's share of a step: who is done sooner takes over what others have not begun */
    SLICE_WORK = 1 << 16, /* of a slice, at least */
    CLAIMS = 16           /* of a thread: a cache line */
};

struct esp_context {
    const esp_program *program;
    esp_team *team;
    int threads;
    int wave;      /* samples that can be in work at once: as many as there are arenas */
    void **rooms;  /* as they were allocated */
    float **arena; /* in them: aligned, with slack before and behind */
    void **own;    /* each thread's scratch */
    double *step_ms; /* each thread's, of every step */
    atomic_uint *claims; /* of slices, or tasks, of the shared step in progress: its number, once somebody has one */
    unsigned shared;     /* steps before this run */
    int profile;
    atomic_flag busy;
    int64_t batch; /* of the run in progress */
    const float *const *inputs;
    float *const *outputs;
};

/* of an arena or a scratch, with slack before and behind */
static int64_t with_slack(int64_t floats) { return floats + 3 * ESP_SLACK + 16; }

int64_t esp_workspace_size(const esp_program *p)
{
    return p ? (with_slack(p->arena_floats) + with_slack(p->scratch_floats)) * 4 : 0;
}

void esp_context_free(esp_context *c)
{
    if (!c) return;
    esp_team_free(c->team);
    for (int i = 0; c->rooms && i < c->wave; i++) free(c->rooms[i]);
    for (int i = 0; c->own && i < c->threads; i++) free(c->own[i]);
    free(c->rooms);
    free(c->arena);
    free(c->own);
    free(c->step_ms);
    free(c->claims);
    free(c);
}

static int heavy(const esp_step *s)
{
    return s->op == ESP_LINEAR && s->param[LINEAR_POSITIONS] == 1 && s->values_count >= HEAVY_FLOATS;
}

static int heavy_program(const esp_program *p)
{
    for (int32_t i = 0; i < p->steps_count; i++)
        if (heavy(&p->steps[i])) return 1;
    return 0;
}

static float *aligned(void *room) { return (float *)(((uintptr_t)room + 63) / 64 * 64) + ESP_SLACK; }

/* One arena must be had. Where the system has no room for more, batches go sample by sample. They are zero, so that a
 * program never sees what lay there before. */
static int make_arenas(esp_context *c)
{
    size_t floats = (size_t)with_slack(c->program->arena_floats);
    int wanted = c->threads;
    if (heavy_program(c->program) && wanted < NARROWEST_HEAVY_WAVE) wanted = NARROWEST_HEAVY_WAVE;
    c->rooms = calloc((size_t)wanted, sizeof *c->rooms);
    c->arena = calloc((size_t)wanted, sizeof *c->arena);
    if (!c->rooms || !c->arena) return 0;
    for (c->wave = 0; c->wave < wanted; c->wave++) {
        /* the first is always used; the others take no memory until they are */
        void *room = c->wave ? calloc(floats, sizeof(float)) : esp_pages(floats * sizeof(float));
        if (!room) break;
        c->rooms[c->wave] = room;
        c->arena[c->wave] = aligned(room);
    }
    return c->wave > 0;
}

static int make_scratch(esp_context *c)
{
    c->own = calloc((size_t)c->threads, sizeof *c->own);
    for (int i = 0; c->own && i < c->threads; i++) {
        c->own[i] = esp_pages((size_t)with_slack(c->program->scratch_floats) * sizeof(float));
        if (!c->own[i]) return 0;
    }
    return c->own != NULL;
}

static int make_claims(esp_context *c)
{
    const esp_program *p = c->program;
    int64_t most = (int64_t)c->threads * CLAIMS, bands = 0;
    for (int32_t i = 0; i < p->steps_count; i++) { /* no run of tasks has more than all together */
        bands += p->steps[i].task ? p->steps[i].bands + 1 : 0;
        most = bands > most ? bands : most;
    }
    c->claims = esp_pages((size_t)most * sizeof *c->claims);
    return c->claims != NULL;
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
    c->step_ms = calloc((size_t)threads * (size_t)program->steps_count + 1, sizeof *c->step_ms);
    if (!c->step_ms || !make_arenas(c) || !make_scratch(c) || !make_claims(c)) {
        esp_context_free(c);
        return esp_fail(message, capacity, ESP_NO_MEMORY, "out of memory for a workspace of %lld bytes",
            (long long)esp_workspace_size(program));
    }
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

static esp_frame frame_of(const esp_context *c, int arena, int part, int64_t sample)
{
    const esp_program *p = c->program;
    return (esp_frame){c->arena[arena], aligned(c->own[part]), (const float *)p->bytes, c->inputs, c->outputs, p->elements,
        p->elements + p->inputs_count, sample, 0, 1};
}

/* Whether nobody has had slice or task `i` of shared step `number`. */
static int claim(esp_context *c, int64_t i, unsigned number)
{
    return atomic_exchange_explicit(&c->claims[i], number, memory_order_relaxed) != number;
}

/* A step with weights, shared in slices: each thread begins with its own share, and takes over from others when it is done.
 * Cores are seldom equally fast: others use them, too. */
static void run_slices(esp_context *c, const esp_step *s, const esp_frame *frame, int part, unsigned number)
{
    const int lanes = s->param[CONV_HEIGHT] == ESP_LANES_HEIGHT;
    esp_frame sliced = *frame;
    for (int k = 0; k < c->threads; k++) {
        const int owner = (part + k) % c->threads;
        for (int slice = 0; slice < SLICES; slice++) {
            if (!claim(c, owner * CLAIMS + slice, number)) continue;
            if (lanes) {
                s->kernel(s, frame, owner * SLICES + slice, c->threads * SLICES);
                continue;
            }
            sliced.slice = slice;
            sliced.slices = SLICES;
            s->kernel(s, &sliced, owner, c->threads);
        }
    }
}

/* Member `part`'s share of a step that all do together. */
static void run_share(esp_context *c, const esp_step *s, const esp_frame *frame, int part, unsigned number)
{
    if (c->threads > 1 && s->op == ESP_CONV && s->work / c->threads >= SLICES * SLICE_WORK)
        run_slices(c, s, frame, part, number);
    else
        s->kernel(s, frame, part, c->threads);
}

/* Steps first..upto of one task, or of one band of it, timed into `step_ms` if that is not NULL. */
static void run_task(const esp_step *steps, const esp_frame *frame, int32_t first, int32_t upto, int band, int bands,
    double *step_ms)
{
    for (int32_t i = first; i < upto; i++) {
        const double start = step_ms ? now_ms() : 0;
        steps[i].kernel(&steps[i], frame, band, bands);
        if (step_ms) step_ms[i] += now_ms() - start;
    }
}

/* The tasks of steps first..upto that are member `part`'s by their work, or all, of which nobody has had. */
static void run_some(esp_context *c, const esp_frame *frame, int32_t first, int32_t upto, int part, int parts, int all,
    unsigned number)
{
    const esp_step *steps = c->program->steps;
    double whole = 0, before = 0, *step_ms = c->profile ? c->step_ms + (int64_t)part * c->program->steps_count : NULL;
    int64_t task = 0;
    for (int32_t i = first; i < upto; i++) whole += (double)steps[i].work;
    for (int32_t i = first, next; i < upto; i = next) {
        double work = 0;
        for (next = i; next < upto && steps[next].task == steps[i].task; next++) work += (double)steps[next].work;
        const int bands = steps[i].bands ? steps[i].bands : 1;
        work /= bands;
        for (int band = 0; band < bands; band++, task++, before += work) {
            const int owner = whole > 0 ? (int)((before + work / 2) * parts / whole) : 0;
            const int own = (owner < parts ? owner : parts - 1) == part;
            if ((own || all) && (parts == 1 || claim(c, task, number)))
                run_task(steps, frame, i, next, band, bands, step_ms);
        }
    }
}

/* The tasks of steps first..upto, each all of one thread: first its own, then those that others have not begun. */
static void run_tasks(
    esp_context *c, const esp_frame *frame, int32_t first, int32_t upto, int part, int parts, unsigned number)
{
    run_some(c, frame, first, upto, part, parts, 0, number);
    if (parts > 1) run_some(c, frame, first, upto, part, parts, 1, number);
}

/* Samples begin..end one after another, each step split among all members. Small steps are done by member 0 alone;
 * members meet where a step is shared or was. */
static void split_steps(esp_context *c, int part, int64_t begin, int64_t end)
{
    const esp_program *p = c->program;
    unsigned number = c->shared;
    int meet_first = 0;
    for (int64_t sample = begin; sample < end; sample++) {
        const esp_frame frame = frame_of(c, 0, part, sample);
        for (int32_t i = 0, next; i < p->steps_count; i = next) {
            const esp_step *s = &p->steps[i];
            next = s->upto ? s->upto : i + 1;
            if (meet_first || s->parallel || c->profile) esp_team_meet(c->team);
            double start = c->profile && part == 0 ? now_ms() : 0;
            number++;
            if (s->upto)
                run_tasks(c, &frame, i, next, part, s->parallel ? c->threads : 1, number);
            else if (s->parallel)
                run_share(c, s, &frame, part, number);
            else if (part == 0)
                s->kernel(s, &frame, 0, 1);
            if (c->profile) esp_team_meet(c->team);
            if (c->profile && part == 0 && !s->upto) c->step_ms[i] += now_ms() - start;
            meet_first = s->parallel;
        }
    }
}

/* A step for all samples of a wave: its weights piece by piece, each piece for every sample while it is in a cache. */
static void run_heavy(const esp_context *c, const esp_step *s, int64_t begin, int count, int part)
{
    const int pieces = (int)(s->values_count / PIECE_FLOATS / c->threads + 1) * c->threads;
    const int upto = (int)((int64_t)pieces * (part + 1) / c->threads);
    for (int piece = (int)((int64_t)pieces * part / c->threads); piece < upto; piece++)
        for (int k = 0; k < count; k++) {
            const esp_frame frame = frame_of(c, k, part, begin + k);
            s->kernel(s, &frame, piece, pieces);
        }
}

/* `count` samples from `begin` at once: member `part` has those at part, part + threads, ... */
static void run_wave(esp_context *c, int part, int64_t begin, int count)
{
    const esp_program *p = c->program;
    for (int32_t first = 0, next; first < p->steps_count; first = next + 1) {
        for (next = first; next < p->steps_count && !heavy(&p->steps[next]); next++) continue;
        for (int k = part; k < count; k += c->threads) {
            const esp_frame frame = frame_of(c, k, part, begin + k);
            for (int32_t i = first, upto; i < next; i = upto) {
                upto = p->steps[i].upto > i && p->steps[i].upto <= next ? p->steps[i].upto : i + 1;
                run_tasks(c, &frame, i, upto, 0, 1, 0);
            }
        }
        if (next == p->steps_count) break;
        esp_team_meet(c->team);
        run_heavy(c, &p->steps[next], begin, count, part);
        esp_team_meet(c->team);
    }
}

static void run_part(void *argument, int part)
{
    esp_context *c = argument;
    int64_t sample = 0;
    const int wide = c->wave >= c->threads && c->wave > 1 && !c->profile;
    while (wide && c->batch - sample >= c->threads && c->batch - sample > 1) {
        const int64_t left = c->batch - sample;
        int count = left < c->wave ? (int)left : c->wave;
        count -= count % c->threads; /* nobody waits; what is left over is split */
        run_wave(c, part, sample, count);
        sample += count;
    }
    if (sample && sample < c->batch) esp_team_meet(c->team); /* the first arena was member 0's own */
    split_steps(c, part, sample, c->batch);
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
    c->shared += (unsigned)(batch * c->program->steps_count); /* as many as there can have been */
    atomic_flag_clear(&c->busy);
    return ESP_OK;
}

int esp_profile(esp_context *c, int on)
{
    if (!c) return ESP_BAD_ARGUMENT;
    if (atomic_flag_test_and_set(&c->busy)) return ESP_BUSY;
    c->profile = on != 0;
    memset(c->step_ms, 0, (size_t)c->threads * (size_t)c->program->steps_count * sizeof *c->step_ms);
    atomic_flag_clear(&c->busy);
    return ESP_OK;
}

double esp_step_ms(const esp_context *c, int32_t i)
{
    if (!c || !esp_step_at(c->program, i)) return 0;
    const esp_step *s = &c->program->steps[i];
    double sum = 0;
    for (int part = 0; part < c->threads; part++) sum += c->step_ms[(int64_t)part * c->program->steps_count + i];
    return s->task && s->parallel ? sum / c->threads : sum; /* others ran beside it */
}
