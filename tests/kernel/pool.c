/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A thread pool in miniature: structures and call sites as QEMU's util/thread-pool.c has them, driven by
 * words on standard input, so that a test decides which request reaches which site in which order.
 *
 *   sN dN cN   request N passes the site submit, done, callback
 *   xN nN      request N is cancelled (ret = -ECANCELED); has no callback function
 *   tN=T       request N has that aio_type; T = 0: its arg cannot be read
 *   fN=F       request N is on that file
 *   rN         N requests pass all three sites, done in worker threads, submit and callback in this one
 *   qN         as rN, but each may be called back and its memory used again before its worker reaches done
 *
 * Each line is answered with "ok".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS 16384
#define WORKERS 4
#define IN_FLIGHT 64

struct raw_posix_aio_data { void *bs; int aio_type; int fd; };

struct element {
    void *aiocb_info, *bs;
    void (*cb)(void *opaque, int ret);
    void *opaque;
    int refcnt;
    void *pool;
    void *func;
    void *arg;
    int state, ret;
    void *reqs[2];
    void *next, *prev;
};

_Static_assert(offsetof(struct element, cb) == 0x10, "callback");
_Static_assert(offsetof(struct element, arg) == 0x38, "arg");
_Static_assert(offsetof(struct element, state) == 0x40, "state");
_Static_assert(offsetof(struct element, ret) == 0x44, "ret");

struct element elements[SLOTS];
static struct raw_posix_aio_data args[SLOTS];
static _Atomic int stage[SLOTS]; /* 0 free, 1 submitted, 2 done, 3 taken by a worker */

__attribute__((noinline, used)) void touch(void) { __asm__ volatile("" ::: "memory"); }

/* A direct call with the element in a callee-saved register; the label is the site. */
#if defined(__x86_64__)
#define SITE(name, reg, e) do { register struct element *held __asm__(reg) = (e); \
    __asm__ volatile(".globl site_" name "\nsite_" name ": call touch" : "+r"(held) : : "memory", \
                     "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "cc"); } while (0)
#define R_SUBMIT "rbx"
#define R_DONE "r12"
#define R_CALLBACK "r13"
#else
#define SITE(name, reg, e) do { register struct element *held __asm__(reg) = (e); \
    __asm__ volatile(".globl site_" name "\nsite_" name ": bl touch" : "+r"(held) : : "memory", "x30", "cc"); \
    } while (0)
#define R_SUBMIT "x19"
#define R_DONE "x20"
#define R_CALLBACK "x21"
#endif

__attribute__((noinline)) static void submit(struct element *e) { SITE("submit", R_SUBMIT, e); }
__attribute__((noinline)) static void done(struct element *e) { SITE("done", R_DONE, e); }
__attribute__((noinline)) static void callback(struct element *e) { SITE("callback", R_CALLBACK, e); }

static void completion(void *opaque, int ret) { (void)opaque; (void)ret; }

static void prepare(int slot)
{
    struct element *e = &elements[slot];

    e->cb = completion;
    e->arg = &args[slot];
    e->ret = 0;
}

static _Atomic int running;
static int hasty; /* as in QEMU: a request is free to be called back before its worker reaches the site */

static void *worker(void *unused)
{
    (void)unused;
    while (atomic_load(&running))
        for (int slot = SLOTS - IN_FLIGHT; slot < SLOTS; slot++) {
            int submitted = 1;

            if (!atomic_compare_exchange_strong(&stage[slot], &submitted, 3))
                continue;
            if (hasty)
                atomic_store(&stage[slot], 2);
            done(&elements[slot]);
            if (!hasty)
                atomic_store(&stage[slot], 2);
        }
    return NULL;
}

static void run(int count)
{
    int submitted = 0, completed = 0;
    pthread_t threads[WORKERS];

    atomic_store(&running, 1);
    for (int i = 0; i < WORKERS; i++)
        if (pthread_create(&threads[i], NULL, worker, NULL))
            abort();
    while (completed < count)
        for (int slot = SLOTS - IN_FLIGHT; slot < SLOTS; slot++) {
            if (atomic_load(&stage[slot]) == 2) {
                callback(&elements[slot]);
                completed++;
                atomic_store(&stage[slot], 0);
            }
            if (atomic_load(&stage[slot]) == 0 && submitted < count) {
                prepare(slot);
                submit(&elements[slot]);
                submitted++;
                atomic_store(&stage[slot], 1);
            }
        }
    atomic_store(&running, 0);
    for (int i = 0; i < WORKERS; i++)
        pthread_join(threads[i], NULL);
}

static void obey(char *word)
{
    char *rest;
    int number = (int)strtol(word + 1, &rest, 10);

    switch (word[0]) {
    case 's': submit(&elements[number]); break;
    case 'd': done(&elements[number]); break;
    case 'c': callback(&elements[number]); prepare(number); break;
    case 'x': elements[number].ret = -ECANCELED; break;
    case 'n': elements[number].cb = NULL; break;
    case 't':
        args[number].aio_type = (int)strtol(rest + 1, NULL, 0);
        elements[number].arg = args[number].aio_type ? &args[number] : (void *)1;
        break;
    case 'f': args[number].fd = (int)strtol(rest + 1, NULL, 0); break;
    case 'r': hasty = 0; run(number); break;
    case 'q': hasty = 1; run(number); break;
    default: fprintf(stderr, "what is %s?\n", word); exit(2);
    }
}

int main(void)
{
    static char line[1 << 20];

    for (int slot = 0; slot < SLOTS; slot++)
        prepare(slot);
    while (fgets(line, sizeof(line), stdin)) {
        for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n"))
            obey(word);
        puts("ok");
        fflush(stdout);
    }
    return 0;
}
