#define _DEFAULT_SOURCE
#include "pages.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { LARGE_PAGE = 2 << 20, WORTH_LARGE_PAGES = LARGE_PAGE / 4 };

void *esp_pages(size_t size)
{
    void *room = NULL;
    int large = size >= WORTH_LARGE_PAGES && size <= SIZE_MAX - LARGE_PAGE;
    size_t align = large ? LARGE_PAGE : 64;
    if (posix_memalign(&room, align, large ? (size + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE : size)) return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (large) (void)madvise(room, size, MADV_HUGEPAGE); /* a wish: without it all is as before */
#endif
    memset(room, 0, size);
    return room;
}
