/* A team of threads that runs one job after another, the caller among them. */
#ifndef ESP_TEAM_H
#define ESP_TEAM_H

typedef struct esp_team esp_team;

/* What each member does: `part` counts from 0 (the caller). */
typedef void (*esp_job)(void *argument, int part);

/* NULL when the system refuses. With one thread nothing is started. */
esp_team *esp_team_create(int threads);
void esp_team_free(esp_team *team);
/* Run job(argument, part) on all members; returns when all have met at the end. */
void esp_team_run(esp_team *team, esp_job job, void *argument);
/* Inside a job: wait for all members. */
void esp_team_meet(esp_team *team);

#endif
