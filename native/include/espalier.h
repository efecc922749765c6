/* Espalier's engine: load a program from memory, run it, time it. The only public header.
 *
 * A program (made by espalier.compiler) is a network for one sample: steps over one planned arena. It is
 * checked completely when it is loaded: a damaged or hostile one gives an error code and a message, never a crash.
 *
 * Threads: a program is read-only after esp_load and may be shared. A context belongs to one caller at a time (a second
 * one gets ESP_BUSY); make one context per caller. esp_run neither allocates nor prints, and results do not depend
 * on the number of threads.
 */
#ifndef ESPALIER_H
#define ESPALIER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ESP_API __declspec(dllexport)
#else
#define ESP_API __attribute__((visibility("default")))
#endif

#define ESP_VERSION 1u        /* of this interface */
#define ESP_FORMAT_VERSION 1u /* of the bytes of a program */

enum esp_code {
    ESP_OK = 0,
    ESP_BAD_ARGUMENT = 1, /* a null pointer, a negative count */
    ESP_BAD_PROGRAM = 2,  /* bytes that are no valid program */
    ESP_BAD_VERSION = 3,  /* a program of another format version */
    ESP_NO_MEMORY = 4,
    ESP_NO_ISA = 5,     /* ESPALIER_ISA names an instruction set that is unknown or missing here */
    ESP_BUSY = 6,       /* the context is running for another caller */
    ESP_NO_THREADS = 7, /* the system refused a thread */
};

typedef struct esp_program esp_program;
typedef struct esp_context esp_context;

ESP_API uint32_t esp_version(void);
ESP_API const char *esp_code_name(int code);

/* Instruction sets compiled into this library, best first; NULL past the end. */
ESP_API const char *esp_isa_name(int i);
/* 1 when this machine has it. */
ESP_API int esp_isa_supported(int i);
/* The index of the one that esp_load would use now: the best, or what ESPALIER_ISA names. -1 with a message else. */
ESP_API int esp_isa(char *message, size_t capacity);

/* Billions of floating-point operations a second that this machine does on so many threads, at most: measured, in about
 * a tenth of a second. 0 when it cannot be. */
ESP_API double esp_peak_gflops(int32_t threads);

/* Check `size` bytes and make a program of them; the bytes are copied. `message` gets the reason of a refusal. */
ESP_API int esp_load(const void *bytes, size_t size, esp_program **program, char *message, size_t capacity);
/* The bytes that it was made of: the program's own copy, which lives as long as it does. */
ESP_API const void *esp_program_bytes(const esp_program *program, size_t *size);
/* Free its contexts first. */
ESP_API void esp_free(esp_program *program);

ESP_API int32_t esp_input_count(const esp_program *program);
ESP_API int32_t esp_output_count(const esp_program *program);
ESP_API const char *esp_input_name(const esp_program *program, int32_t i);
ESP_API const char *esp_output_name(const esp_program *program, int32_t i);
/* The rank; at most `capacity` sizes of one sample are written to `dims`. -1 for a wrong index. */
ESP_API int32_t esp_input_shape(const esp_program *program, int32_t i, int64_t *dims, int32_t capacity);
ESP_API int32_t esp_output_shape(const esp_program *program, int32_t i, int64_t *dims, int32_t capacity);
/* Bytes of workspace for one sample; a context has some for each thread, of which it touches what it uses. */
ESP_API int64_t esp_workspace_size(const esp_program *program);

ESP_API int32_t esp_step_count(const esp_program *program);
ESP_API const char *esp_step_name(const esp_program *program, int32_t i);
ESP_API const char *esp_step_note(const esp_program *program, int32_t i);   /* what the compiler chose, and why */
ESP_API const char *esp_step_kernel(const esp_program *program, int32_t i); /* e.g. conv/8/avx512 */

/* Workspace and threads (the caller's included) for running `program`. */
ESP_API int esp_context_create(
    const esp_program *program, int32_t threads, esp_context **context, char *message, size_t capacity);
ESP_API void esp_context_free(esp_context *context);

/* Run `batch` samples. inputs[i] holds batch * (size of input i) floats, contiguous; outputs[i] likewise. */
ESP_API int esp_run(esp_context *context, int64_t batch, const float *const *inputs, float *const *outputs);

/* Time every step of the runs that follow (1) or not (0); either sets the times to zero. */
ESP_API int esp_profile(esp_context *context, int on);
/* Milliseconds spent in step i since esp_profile. */
ESP_API double esp_step_ms(const esp_context *context, int32_t i);

#ifdef __cplusplus
}
#endif
#endif
