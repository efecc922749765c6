/* The speed of the machine itself, measured. */
#include <stdatomic.h>
#include <time.h>

#include "dispatch.h"
#include "team.h"

typedef struct {
    int64_t (*peak)(int64_t, float *);
    int64_t rounds;
    atomic_llong operations;
} measurement;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void work(void *argument, int part)
{
    measurement *m = argument;
    float numbers[2] = {0.5f, (float)part};
    atomic_fetch_add(&m->operations, m->peak(m->rounds, numbers));
}

double esp_peak_gflops(int32_t threads)
{
    int isa = esp_isa(NULL, 0);
    esp_team *team = isa < 0 || threads < 1 || threads > 1024 ? NULL : esp_team_create(threads);
    if (!team) return 0;
    double best = 0;
    measurement m = {esp_isas[isa].peak, 1 << 12, 0};
    for (int attempt = 0; attempt < 150; attempt++) { /* doubling up to half a millisecond, then the best */
        atomic_store(&m.operations, 0);
        double start = now();
        esp_team_run(team, work, &m);
        double seconds = now() - start, speed = (double)atomic_load(&m.operations) / seconds * 1e-9;
        if (seconds < 5e-4)
            m.rounds *= 2;
        else if (speed > best)
            best = speed;
    }
    esp_team_free(team);
    return best;
}
