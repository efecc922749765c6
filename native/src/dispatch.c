#include "dispatch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const esp_kernel_row esp_rows_baseline[];
extern int64_t peak_baseline(int64_t, float *);
#ifdef ESP_BUILD_X86
extern const esp_kernel_row esp_rows_avx512[], esp_rows_avx2[];
extern int64_t peak_avx512(int64_t, float *), peak_avx2(int64_t, float *);
#endif

const esp_isa_row esp_isas[] = {
#ifdef ESP_BUILD_X86
    {"avx512", ESP_HAS_AVX512 | ESP_HAS_AVX2 | ESP_HAS_FMA, esp_rows_avx512, peak_avx512},
    {"avx2", ESP_HAS_AVX2 | ESP_HAS_FMA, esp_rows_avx2, peak_avx2},
#endif
    {"baseline", 0, esp_rows_baseline, peak_baseline},
    {NULL, 0, NULL, NULL},
};

uint32_t esp_machine_features(void)
{
    uint32_t found = 0;
#ifdef ESP_BUILD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found |= ESP_HAS_AVX2;
    if (__builtin_cpu_supports("fma")) found |= ESP_HAS_FMA;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
        found |= ESP_HAS_AVX512;
#endif
    return found;
}

const char *esp_isa_name(int i)
{
    int count = (int)(sizeof esp_isas / sizeof *esp_isas);
    return i >= 0 && i < count ? esp_isas[i].name : NULL;
}

int esp_isa_supported(int i)
{
    return esp_isa_name(i) && (esp_isas[i].features & ~esp_machine_features()) == 0;
}

/* "avx512, avx2, baseline", those of this machine only */
static void list_supported(char *text, size_t capacity)
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; esp_isas[i].name; i++) {
        if (!esp_isa_supported(i)) continue;
        int n = snprintf(text + used, capacity - used, "%s%s", used ? ", " : "", esp_isas[i].name);
        if (n < 0 || used + (size_t)n >= capacity) return;
        used += (size_t)n;
    }
}

int esp_isa(char *message, size_t capacity)
{
    const char *forced = getenv("ESPALIER_ISA");
    char known[128];
    if (forced && !*forced) forced = NULL;
    for (int i = 0; esp_isas[i].name; i++) {
        if (forced && strcmp(forced, esp_isas[i].name) != 0) continue;
        if (esp_isa_supported(i)) return i;
        if (!forced) continue;
        list_supported(known, sizeof known);
        esp_fail(message, capacity, 0, "ESPALIER_ISA=%s: this machine lacks it; it has %s", forced, known);
        return -1;
    }
    list_supported(known, sizeof known);
    esp_fail(message, capacity, 0, "ESPALIER_ISA=%.40s: unknown instruction set; this machine has %s", forced, known);
    return -1;
}

const esp_kernel_row *esp_find_kernel(int isa, int32_t op, int64_t height)
{
    const esp_kernel_row *best = NULL;
    uint32_t allowed = esp_isas[isa].features;
    for (int i = isa; esp_isas[i].name; i++) {
        for (const esp_kernel_row *row = esp_isas[i].rows; row->op; row++) {
            if (row->op != op || row->height != height || (row->features & ~allowed)) continue;
            if (!best || row->priority > best->priority) best = row;
        }
    }
    return best;
}
