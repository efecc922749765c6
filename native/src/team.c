/* Members spin for a while between jobs, since the next one usually comes soon, and then sleep. To be woken takes 50 to
 * 100 us, as long as a small network runs; a caller in Python is back after 30 to 50 us, or after what it does between. */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

enum { SPIN_NS = 1000000, SPINS_PER_LOOK = 64, SPINS_BEFORE_YIELD = 4000 }; /* a spin is 10 to 40 ns */

typedef struct {
    esp_team *team;
    pthread_t thread;
    int part;
} member;

struct esp_team {
    int threads, started;
    esp_job job;
    void *argument;
    _Alignas(64) atomic_uint jobs;    /* how many were given out */
    _Alignas(64) atomic_uint arrived; /* at the meeting point */
    _Alignas(64) atomic_uint meetings;
    _Alignas(64) atomic_int sleepers;
    atomic_int leaving;
    pthread_mutex_t mutex; /* only to sleep and to wake */
    pthread_cond_t wake;
    member *members;
};

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void esp_team_meet(esp_team *team)
{
    if (team->threads == 1) return;
    unsigned meeting = atomic_load_explicit(&team->meetings, memory_order_acquire);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)team->threads) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->meetings, meeting + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&team->meetings, memory_order_acquire) == meeting; spins++) {
        if (spins < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
    }
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Wait until the number of jobs is no longer `seen`. */
static void await_job(esp_team *team, unsigned seen)
{
    const int64_t start = now_ns();
    do {
        for (int spins = 0; spins < SPINS_PER_LOOK; spins++) {
            if (atomic_load_explicit(&team->jobs, memory_order_acquire) != seen) return;
            relax();
        }
    } while (now_ns() - start < SPIN_NS);
    pthread_mutex_lock(&team->mutex);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->jobs) == seen) pthread_cond_wait(&team->wake, &team->mutex);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->mutex);
}

static void *work(void *argument)
{
    member *me = argument;
    esp_team *team = me->team;
    for (unsigned seen = 0;; seen++) {
        await_job(team, seen);
        if (atomic_load(&team->leaving)) return NULL;
        team->job(team->argument, me->part);
        esp_team_meet(team);
    }
}

static void announce(esp_team *team)
{
    atomic_fetch_add(&team->jobs, 1);
    if (atomic_load(&team->sleepers) == 0) return;
    pthread_mutex_lock(&team->mutex);
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->mutex);
}

void esp_team_run(esp_team *team, esp_job job, void *argument)
{
    team->job = job;
    team->argument = argument;
    if (team->threads > 1) announce(team);
    job(argument, 0);
    esp_team_meet(team);
}

esp_team *esp_team_create(int threads)
{
    esp_team *team = NULL;
    if (posix_memalign((void **)&team, 64, sizeof *team)) return NULL;
    *team = (esp_team){.threads = threads};
    team->members = calloc((size_t)threads, sizeof *team->members);
    if (!team->members || pthread_mutex_init(&team->mutex, NULL)) {
        free(team->members);
        free(team);
        return NULL;
    }
    pthread_cond_init(&team->wake, NULL);
    for (int part = 1; part < threads; part++) {
        member *m = &team->members[part];
        m->team = team;
        m->part = part;
        if (pthread_create(&m->thread, NULL, work, m)) {
            esp_team_free(team);
            return NULL;
        }
        team->started = part;
    }
    return team;
}

void esp_team_free(esp_team *team)
{
    if (!team) return;
    atomic_store(&team->leaving, 1);
    announce(team);
    for (int part = 1; part <= team->started; part++) pthread_join(team->members[part].thread, NULL);
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->mutex);
    free(team->members);
    free(team);
}
