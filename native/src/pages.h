/* Memory that lies in large pages where the system has them: what is streamed then misses no address translations. */
#ifndef ESP_PAGES_H
#define ESP_PAGES_H

#include <stddef.h>

/* `size` bytes of zeros, aligned to 64, or NULL; given back with free(). */
void *esp_pages(size_t size);

#endif
