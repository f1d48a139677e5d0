/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What code inside a QEMU could do to whoever looks at it: put into a stock QEMU by LD_PRELOAD, so that the executable
 * is the very one that honest QEMUs run. HOSTILE says what:
 *
 *   flood:SITE:TARGET   hits the probe at the file's offset SITE, whose call leads to TARGET, with requests that do
 *                       not exist, for ever
 *   zeroes:MIB          that much memory of zero pages, in pieces that malloc's arenas could be
 *   pools:COUNT:CALLBACK-ENTRY:CONTEXT:COMPLETION_BH:BH_CONTEXT:BH_CALLBACK:BH_OPAQUE
 *                       so many made-up thread pools, each with a bottom half that points back
 *   names:FOLDER        threads and mapped files whose names hold every end of a line that there is
 *
 * When it is done, or under way, it makes the file HOSTILE_READY.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096UL
#define PIECE (60UL << 20)
#define REQUESTS 65536UL
#define REQUEST_SIZE 0x70UL

static void die(const char *what)
{
    perror(what);
    _exit(1);
}

static void *map(size_t size)
{
    void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (place == MAP_FAILED)
        die("mmap");
    return place;
}

/* All registers but the stack pointer hold the request: whichever the probe reads, it is that. */
#if defined(__x86_64__)
void hit(void *site, void *request);
__asm__(".globl hit\nhit:\n"
        "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rdi, %rax\nmov %rsi, %rbx\nmov %rsi, %rbp\nmov %rsi, %rcx\nmov %rsi, %rdx\nmov %rsi, %rdi\n"
        "mov %rsi, %r8\nmov %rsi, %r9\nmov %rsi, %r10\nmov %rsi, %r11\nmov %rsi, %r12\nmov %rsi, %r13\n"
        "mov %rsi, %r14\nmov %rsi, %r15\n"
        "call *%rax\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");
/* add $8, %rsp; ret: from the function that the site calls back to whoever came to the site. */
static const unsigned char back[] = {0x48, 0x83, 0xc4, 0x08, 0xc3};
#else
static void hit(void *site, void *request) { (void)site; (void)request; }
static const unsigned char back[] = {0};
#endif

static char *code; /* the executable once more, with our own code where the site's call leads to */
static unsigned long site;

static void *flood(void *unused)
{
    char *requests = map(REQUESTS * REQUEST_SIZE);

    memset(requests, 1, REQUESTS * REQUEST_SIZE);
    for (;;) {
        for (unsigned long i = 0; i < REQUESTS; i++)
            hit(code + site, requests + i * REQUEST_SIZE);
        usleep(1000);
    }
    return unused;
}

static void begin_flood(const char *how)
{
    unsigned long target;
    int file = open("/proc/self/exe", O_RDONLY);
    struct stat status;
    pthread_t thread;

    if (file < 0 || fstat(file, &status) || sscanf(how, "%lu:%lu", &site, &target) != 2)
        die("flood");
    code = mmap(NULL, status.st_size, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, 0);
    if (code == MAP_FAILED || mprotect(code + (target & -PAGE), PAGE, PROT_READ | PROT_WRITE | PROT_EXEC))
        die("flood");
    memcpy(code + target, back, sizeof(back));
    if (pthread_create(&thread, NULL, flood, NULL))
        die("flood");
}

static void make_zeroes(const char *how)
{
    for (unsigned long left = strtoul(how, NULL, 0) << 20; left >= PIECE; left -= PIECE) {
        volatile char *piece = map(PIECE + PAGE);

        /* Not one mapping with the next. */
        mprotect((char *)piece + PIECE, PAGE, PROT_NONE);
        madvise((char *)piece, PIECE, MADV_HUGEPAGE);
        for (unsigned long at = 0; at < PIECE; at += PAGE)
            (void)piece[at];
    }
}

static void make_pools(const char *how)
{
    unsigned long count, at[5];
    long callback;

    if (sscanf(how, "%lu:%ld:%lu:%lu:%lu:%lu:%lu", &count, &callback, at, at + 1, at + 2, at + 3, at + 4) != 7)
        die("pools");
    for (char *pool = map(count * PAGE); count--; pool += PAGE) {
        char *half = pool + PAGE / 2;

        *(char **)(pool + at[0]) = pool + 8;
        *(char **)(pool + at[1]) = half;
        *(char **)(half + at[2]) = pool + 8;
        *(unsigned long *)(half + at[3]) = getauxval(AT_ENTRY) + callback;
        *(char **)(half + at[4]) = pool;
    }
}

static void *named(void *name)
{
    prctl(PR_SET_NAME, name);
    while (pause())
        ;
    return NULL;
}

static void make_names(const char *folder)
{
    static const char *const names[] = {"a\v\f\r\x1c\x1d\x1e", "b\xc2\x85\xe2\x80\xa8 \t\xff", "\r7f00-7f01 rw-p",
                                        "x) R 1 1 1", "\nPid:\t1"};
    char path[PATH_MAX];
    pthread_t thread;

    for (unsigned i = 0; i < sizeof(names) / sizeof(*names); i++) {
        int file;

        snprintf(path, sizeof(path), "%s/%s", folder, names[i]);
        file = open(path, O_RDWR | O_CREAT, 0600);
        if (file < 0 || ftruncate(file, PAGE) ||
            mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0) == MAP_FAILED)
            die(path);
        if (pthread_create(&thread, NULL, named, (void *)names[i]))
            die("names");
    }
}

__attribute__((constructor)) static void begin(void)
{
    const char *what = getenv("HOSTILE"), *ready = getenv("HOSTILE_READY");
    const char *how = what ? strchr(what, ':') : NULL;

    if (!how || !ready)
        return;
    how++;
    switch (what[0]) {
    case 'f': begin_flood(how); break;
    case 'z': make_zeroes(how); break;
    case 'p': make_pools(how); break;
    case 'n': make_names(how); break;
    default: die(what);
    }
    close(open(ready, O_WRONLY | O_CREAT, 0600));
}
