/* What the sanitizers watch: programs that are loaded, run, damaged and run by many at once.
 *
 *   driver run FILE...                   every program at several threads and batches; the same bits each time
 *   driver attack SEED ROUNDS FILE...    damaged programs: an error with a message, or a run
 *   driver race FILE...                  many callers of one program, with contexts of their own and one that they share;
 *                                        prints how many runs they had
 *
 * Inputs and outputs have exactly the size that the program states, so that a float too far is seen. With SHORT_OUTPUTS
 * they are one float too short: then every sanitizer run must end with a report. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "espalier.h"

#ifndef SHORT_OUTPUTS
#define SHORT_OUTPUTS 0
#endif
enum { STEP_BYTES = 576, MOST_ENDS = 64, CALLERS = 4, LARGE = 1 << 26 };

typedef struct {
    uint8_t *data;
    size_t size;
} bytes;

typedef struct {
    float *inputs[MOST_ENDS], *outputs[MOST_ENDS];
    int64_t out_size[MOST_ENDS];
    int32_t in_count, out_count;
} ends;

static uint64_t state = 1;

static uint64_t rnd(uint64_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % below;
}

static void die(const char *what, const char *why)
{
    fprintf(stderr, "driver: %s: %s\n", what, why);
    exit(2);
}

static bytes read_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) die(path, "cannot be opened");
    bytes b = {NULL, 0};
    fseek(f, 0, SEEK_END);
    b.size = (size_t)ftell(f);
    rewind(f);
    b.data = malloc(b.size);
    if (!b.data || fread(b.data, 1, b.size, f) != b.size) die(path, "cannot be read");
    fclose(f);
    return b;
}

static int64_t elements(const esp_program *p, int32_t i, int output)
{
    int64_t dims[8], n = 1;
    int32_t rank = output ? esp_output_shape(p, i, dims, 8) : esp_input_shape(p, i, dims, 8);
    for (int32_t d = 0; d < rank; d++) n *= dims[d];
    return n;
}

/* Buffers for `batch` samples; 0 when they would be too large. Inputs depend on the sample's number alone. */
static int make_ends(const esp_program *p, int64_t batch, ends *e)
{
    *e = (ends){.in_count = esp_input_count(p), .out_count = esp_output_count(p)};
    if (e->in_count > MOST_ENDS || e->out_count > MOST_ENDS) return 0;
    int64_t total = 0;
    for (int32_t i = 0; i < e->in_count; i++) total += elements(p, i, 0);
    for (int32_t i = 0; i < e->out_count; i++) total += elements(p, i, 1);
    if (total > LARGE / 4 / batch) return 0;
    for (int32_t i = 0; i < e->in_count; i++) {
        int64_t n = elements(p, i, 0);
        e->inputs[i] = malloc((size_t)(n * batch) * sizeof(float));
        for (int64_t k = 0; k < n * batch; k++) e->inputs[i][k] = (float)((k % n * 7919 + k / n * 31) % 2003) / 1000 - 1;
    }
    for (int32_t i = 0; i < e->out_count; i++) {
        e->out_size[i] = elements(p, i, 1);
        e->outputs[i] = calloc((size_t)(e->out_size[i] * batch - SHORT_OUTPUTS), sizeof(float));
    }
    return 1;
}

static void free_ends(ends *e)
{
    for (int32_t i = 0; i < e->in_count && i < MOST_ENDS; i++) free(e->inputs[i]);
    for (int32_t i = 0; i < e->out_count && i < MOST_ENDS; i++) free(e->outputs[i]);
}

static esp_program *load(const char *path)
{
    bytes b = read_file(path);
    esp_program *p = NULL;
    char message[512];
    if (esp_load(b.data, b.size, &p, message, sizeof message)) die(path, message);
    free(b.data);
    return p;
}

static void same(const char *path, const ends *a, const ends *b, int64_t batch)
{
    for (int32_t i = 0; i < a->out_count; i++)
        if (memcmp(a->outputs[i], b->outputs[i], (size_t)(a->out_size[i] * batch) * sizeof(float)))
            die(path, "results depend on threads or batch");
}

static void run_file(const char *path)
{
    esp_program *p = load(path);
    char message[512];
    ends expected;
    if (!make_ends(p, 7, &expected)) die(path, "too large");
    const int threads[] = {1, 2, 3}, batches[] = {7, 1, 2, 5};
    for (int t = 0; t < 3; t++) {
        esp_context *c = NULL;
        if (esp_context_create(p, threads[t], &c, message, sizeof message)) die(path, message);
        for (int k = 0; k < 4; k++) {
            ends e;
            make_ends(p, batches[k], &e);
            esp_profile(c, k == 3);
            if (esp_run(c, batches[k], (const float *const *)e.inputs, e.outputs)) die(path, "refused to run");
            if (t + k == 0)
                for (int32_t i = 0; i < e.out_count; i++)
                    memcpy(expected.outputs[i], e.outputs[i], (size_t)(7 * e.out_size[i]) * sizeof(float));
            same(path, &expected, &e, batches[k]);
            free_ends(&e);
        }
        esp_context_free(c);
    }
    for (int32_t i = 0; i < esp_step_count(p); i++) printf("%s\n", esp_step_kernel(p, i));
    free_ends(&expected);
    esp_free(p);
}

static void put(uint8_t *at, int64_t value, size_t width)
{
    if (width == 4) {
        int32_t low = (int32_t)(uint32_t)value;
        memcpy(at, &low, 4);
    } else {
        memcpy(at, &value, 8);
    }
}

static int64_t strange(int64_t old)
{
    static const int64_t extreme[] = {0, 1, 2, 3, 5, 7, 8, 15, 16, 63, 64, 255, 256, 65536, INT32_MAX, (int64_t)1 << 31,
        (int64_t)1 << 32, (int64_t)1 << 38, (int64_t)1 << 40, INT64_MAX, INT64_MIN};
    int64_t other = extreme[rnd(sizeof extreme / sizeof *extreme)];
    switch (rnd(6)) {
    case 0: return (int64_t)((uint64_t)old + 1);
    case 1: return (int64_t)((uint64_t)old - 1);
    case 2: return (int64_t)((uint64_t)old * 2);
    case 3: return (int64_t)(0 - (uint64_t)old);
    case 4: return other;
    default: return (int64_t)(0 - (uint64_t)other);
    }
}

/* A copy of `good` with something wrong in it, most often in the header and tables. */
static bytes damaged(const bytes *good)
{
    int64_t words[9], old = 0;
    memcpy(words, good->data, sizeof words);
    size_t tables = (size_t)(words[8] + words[6] * STEP_BYTES);
    bytes bad = {malloc(good->size), good->size};
    memcpy(bad.data, good->data, good->size);
    switch (rnd(4)) {
    case 0: bad.size = rnd(good->size); break;
    case 1:
        for (uint64_t n = 1 + rnd(3); n; n--) bad.data[rnd(good->size)] ^= (uint8_t)(1u << rnd(8));
        break;
    default:
        for (uint64_t n = 1 + rnd(3); n; n--) {
            int in_table = rnd(3) > 0;
            size_t width = in_table ? 8 : 4, from = in_table ? 16 : tables, upto = in_table ? tables : good->size;
            if (upto < from + width) continue;
            uint8_t *at = bad.data + from + rnd((upto - from) / width) * width;
            old = 0;
            memcpy(&old, at, width);
            put(at, strange(old), width);
        }
    }
    uint8_t *fitted = malloc(bad.size ? bad.size : 1); /* exactly as large as stated */
    memcpy(fitted, bad.data, bad.size);
    free(bad.data);
    bad.data = fitted;
    return bad;
}

static void attack(const bytes *good, int rounds, int *refused, int *ran)
{
    for (int round = 0; round < rounds; round++) {
        bytes bad = damaged(good);
        esp_program *p = NULL;
        esp_context *c = NULL;
        char message[512] = "";
        ends e;
        int64_t batch = 1 + round % 3;
        if (esp_load(bad.data, bad.size, &p, message, sizeof message)) {
            if (!message[0] || p) die("attack", "refused without a message");
            ++*refused;
        } else if (esp_workspace_size(p) <= LARGE && make_ends(p, batch, &e)) {
            if (!esp_context_create(p, 1 + round % 2, &c, message, sizeof message))
                *ran += !esp_run(c, batch, (const float *const *)e.inputs, e.outputs);
            esp_context_free(c);
            free_ends(&e);
        }
        esp_free(p);
        free(bad.data);
    }
}

static esp_context *common;
static atomic_int runs;
static atomic_int finished;

/* Runs of one program: with a context of its own, and with one that others want too. */
static void *caller(void *argument)
{
    const esp_program *p = argument;
    char message[512];
    esp_context *own = NULL;
    if (esp_context_create(p, 2, &own, message, sizeof message)) die("race", message);
    for (int64_t round = 0; round < 4; round++) {
        ends e;
        make_ends(p, 1 + round, &e);
        if (esp_run(own, 1 + round, (const float *const *)e.inputs, e.outputs)) die("race", "refused to run");
        int code = esp_run(common, 1 + round, (const float *const *)e.inputs, e.outputs);
        if (code != ESP_OK && code != ESP_BUSY) die("race", esp_code_name(code));
        atomic_fetch_add(&runs, 1 + (code == ESP_OK));
        atomic_fetch_add(&finished, 1);
        free_ends(&e);
    }
    esp_context_free(own);
    return NULL;
}

static void race(const char *path)
{
    esp_program *p = load(path);
    pthread_t threads[CALLERS];
    char message[512];
    if (esp_context_create(p, 3, &common, message, sizeof message)) die(path, message);
    for (int i = 0; i < CALLERS; i++)
        if (pthread_create(&threads[i], NULL, caller, p)) die(path, "no thread");
    for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
    esp_context_free(common);
    esp_free(p);
}

int main(int argc, char **argv)
{
    if (argc < 3) die("usage", "driver run|attack|race ...");
    if (!strcmp(argv[1], "run"))
        for (int i = 2; i < argc; i++) run_file(argv[i]);
    else if (!strcmp(argv[1], "race")) {
        for (int i = 2; i < argc; i++) race(argv[i]);
        printf("%d\n", atomic_load(&runs));
    } else if (!strcmp(argv[1], "attack") && argc > 4) {
        int refused = 0, ran = 0;
        state = strtoull(argv[2], NULL, 10);
        for (int i = 4; i < argc; i++) {
            bytes good = read_file(argv[i]);
            attack(&good, atoi(argv[3]), &refused, &ran);
            free(good.data);
        }
        printf("%d %d\n", refused, ran);
    } else
        die(argv[1], "unknown");
    return 0;
}
