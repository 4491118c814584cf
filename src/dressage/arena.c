/* Where torch puts its tensors: one range of addresses, the smallest hole that fits, holes side by side joined.

   torch asks the C library for aligned memory, and glibc then needs more than the block it has just taken back, so a
   tensor never gets the place that one of its size has left, and a learning pass takes twice what is alive in it.
   Whole pages have no such trouble. Only the calls of torch's allocator (libc10) come here: two entries of its table of
   addresses are replaced. memory.py says when. */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__linux__) && defined(__x86_64__) && defined(__GLIBC__)

#include <link.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

enum { PAGE = 4096, LEAST = 1 << 15 /* bytes; what is smaller stays with the C library */ };

typedef struct {
    uint32_t at, pages;
} Hole;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *base;
static size_t room;        /* pages of the range */
static uint32_t top, most; /* pages below which all lies now, and has lain since the last trim */
static uint32_t *size;     /* of the block that begins at a page */
static uint32_t *hole_of;  /* 1 + the number of the hole that begins or ends at a page; 0: none does */
static Hole *holes;        /* in no order */
static uint32_t count;

static void name(uint32_t number, uint32_t at, uint32_t pages) {
    holes[number] = (Hole){at, pages};
    hole_of[at] = hole_of[at + pages - 1] = number + 1;
}

static void drop(uint32_t number) {
    const Hole gone = holes[number];
    hole_of[gone.at] = hole_of[gone.at + gone.pages - 1] = 0;
    if (number != --count) name(number, holes[count].at, holes[count].pages);
}

/* Pages for so many bytes, the lowest of the smallest holes that have them, or new ones behind all. NULL where none are,
   and for more than the machine has: the system then says no at once, which is better than at the first touch. */
static void *take(size_t bytes) {
    const size_t pages = bytes / PAGE + (bytes % PAGE != 0);
    if (pages > room / 2) return NULL;
    Hole best = {0, UINT32_MAX};
    uint32_t number = 0;
    for (uint32_t i = 0; i < count; i++) {
        const Hole hole = holes[i];
        if (hole.pages >= pages && (hole.pages < best.pages || (hole.pages == best.pages && hole.at < best.at)))
            best = hole, number = i;
    }
    if (best.pages == UINT32_MAX) {
        if (pages > room - top) return NULL;
        best.at = top;
        top += pages;
        if (most < top) most = top;
    } else {
        drop(number);
        if (best.pages > pages) name(count++, best.at + pages, best.pages - pages);
    }
    size[best.at] = pages;
    return base + (size_t)best.at * PAGE;
}

static void give(const char *block) {
    uint32_t at = (block - base) / PAGE, pages = size[at], beside;
    if (at + pages < top && (beside = hole_of[at + pages])) {
        pages += holes[beside - 1].pages;
        drop(beside - 1);
    }
    if (at && (beside = hole_of[at - 1])) {
        at -= holes[beside - 1].pages;
        pages += holes[beside - 1].pages;
        drop(beside - 1);
    }
    if (at + pages == top)
        top = at;
    else
        name(count++, at, pages);
}

int arena_memalign(void **block, size_t alignment, size_t bytes) {
    if (bytes >= LEAST && alignment <= PAGE) {
        pthread_mutex_lock(&lock);
        void *found = take(bytes);
        pthread_mutex_unlock(&lock);
        if (found) {
            *block = found;
            return 0;
        }
    }
    return posix_memalign(block, alignment, bytes);
}

void arena_free(void *block) {
    if ((char *)block < base || (char *)block >= base + room * PAGE) {
        free(block);
        return;
    }
    pthread_mutex_lock(&lock);
    give(block);
    pthread_mutex_unlock(&lock);
}

/* Holes go back to the system; their addresses are kept. */
void arena_trim(void) {
    if (!base) return;
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < count; i++)
        madvise(base + (size_t)holes[i].at * PAGE, (size_t)holes[i].pages * PAGE, MADV_DONTNEED);
    if (most > top) madvise(base + (size_t)top * PAGE, (size_t)(most - top) * PAGE, MADV_DONTNEED);
    most = top;
    pthread_mutex_unlock(&lock);
}

int arena_used(void) { return base != NULL; }

/* Bytes below the end of the last block, holes among them. */
size_t arena_extent(void) { return (size_t)top * PAGE; }

/* An entry of libc10's table, and whose address belongs there. */
typedef struct {
    void **entry, *ours;
} Patch;

enum { PATCHES = 16 };

typedef struct {
    Patch patches[PATCHES];
    int memaligns, frees, odd;
} Found;

static void look(Found *found, ElfW(Addr) at, const ElfW(Rela) *rela, size_t bytes, const ElfW(Sym) *symbols,
                 const char *names) {
    for (const ElfW(Rela) *end = rela + bytes / sizeof *rela; rela < end; rela++) {
        const char *called = names + symbols[ELF64_R_SYM(rela->r_info)].st_name;
        const int memalign = !strcmp(called, "posix_memalign"), type = ELF64_R_TYPE(rela->r_info);
        if (!memalign && strcmp(called, "free")) continue;
        if ((type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT && type != R_X86_64_64) || rela->r_addend ||
            found->memaligns + found->frees == PATCHES) {
            found->odd = 1;
            continue;
        }
        void **entry = (void **)(at + rela->r_offset);
        /* Somebody was here before: a profiler, or another copy of this. */
        if (*entry != (memalign ? (void *)posix_memalign : (void *)free)) found->odd = 1;
        found->patches[found->memaligns + found->frees] =
            (Patch){entry, memalign ? (void *)arena_memalign : (void *)arena_free};
        memalign ? found->memaligns++ : found->frees++;
    }
}

static int visit(struct dl_phdr_info *object, size_t bytes, void *found) {
    (void)bytes;
    const char *file = strrchr(object->dlpi_name, '/');
    if (!file || strcmp(file, "/libc10.so")) return 0;
    const ElfW(Dyn) *entry = NULL;
    const ElfW(Rela) *rela = NULL, *calls = NULL;
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    size_t of_rela = 0, of_calls = 0;
    for (int i = 0; i < object->dlpi_phnum; i++)
        if (object->dlpi_phdr[i].p_type == PT_DYNAMIC)
            entry = (const ElfW(Dyn) *)(object->dlpi_addr + object->dlpi_phdr[i].p_vaddr);
    for (; entry && entry->d_tag != DT_NULL; entry++) switch (entry->d_tag) {
            case DT_RELA: rela = (const ElfW(Rela) *)entry->d_un.d_ptr; break;
            case DT_RELASZ: of_rela = entry->d_un.d_val; break;
            case DT_JMPREL: calls = (const ElfW(Rela) *)entry->d_un.d_ptr; break;
            case DT_PLTRELSZ: of_calls = entry->d_un.d_val; break;
            case DT_SYMTAB: symbols = (const ElfW(Sym) *)entry->d_un.d_ptr; break;
            case DT_STRTAB: names = (const char *)entry->d_un.d_ptr; break;
        }
    if (!symbols || !names) return 0;
    look(found, object->dlpi_addr, rela, of_rela, symbols, names);
    look(found, object->dlpi_addr, calls, of_calls, symbols, names);
    return 1;
}

static void *reserved(size_t bytes) {
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

static void hold(void) { pthread_mutex_lock(&lock); }
static void let_go(void) { pthread_mutex_unlock(&lock); }

/* From now on torch's blocks lie here; 0, and nothing has changed, where that cannot be. libc10 is loaded before. */
int arena_use(void) {
    Found found = {0};
    struct rlimit addresses;
    if (base) return 1;
    dl_iterate_phdr(visit, &found);
    if (!found.memaligns || !found.frees || found.odd || sysconf(_SC_PAGESIZE) != PAGE ||
        getrlimit(RLIMIT_AS, &addresses) || addresses.rlim_cur != RLIM_INFINITY)
        return 0;
    /* Twice the machine's memory, because holes too have addresses. */
    const size_t pages = 2 * (size_t)sysconf(_SC_PHYS_PAGES);
    if (pages > UINT32_MAX / 2) return 0;
    const size_t tables = pages * (2 * sizeof(uint32_t) + sizeof(Hole));
    char *range = reserved(pages * PAGE), *notes = reserved(tables);
    const int patches = found.memaligns + found.frees;
    int able = range && notes;
    for (int i = 0; able && i < patches; i++) {
        char *page = (char *)((uintptr_t)found.patches[i].entry & ~(uintptr_t)(PAGE - 1));
        able = !mprotect(page, PAGE, PROT_READ | PROT_WRITE);
    }
    if (!able) {
        if (range) munmap(range, pages * PAGE);
        if (notes) munmap(notes, tables);
        return 0;
    }
    holes = (Hole *)notes;
    size = (uint32_t *)(holes + pages);
    hole_of = size + pages;
    room = pages;
    base = range;
    pthread_atfork(hold, let_go, let_go);
    for (int i = 0; i < patches; i++) /* who frees knows both kinds of blocks: first of all */
        if (found.patches[i].ours == (void *)arena_free) *found.patches[i].entry = (void *)arena_free;
    for (int i = 0; i < patches; i++) *found.patches[i].entry = found.patches[i].ours;
    return 1;
}

#else

void arena_trim(void) {}

int arena_used(void) { return 0; }

size_t arena_extent(void) { return 0; }

int arena_use(void) { return 0; }

#endif
