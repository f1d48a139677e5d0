/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small program with a thread pool such as QEMU's: the same function and member names, the same order of
 * what happens to a request, written for the tests. POOL_VERSION chooses whose (201: 2.1.2, 502: 5.2,
 * 702: 7.2, 1000: 10.0). WITH_PROBES adds the notes of static probes.
 */
#ifndef POOL_H
#define POOL_H

#include <assert.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef POOL_VERSION
#define POOL_VERSION 702
#endif

#if POOL_VERSION >= 1000
#define ThreadPool ThreadPoolAio
#define ThreadPoolElement ThreadPoolElementAio
#define thread_pool_new thread_pool_new_aio
#endif

typedef struct QEMUBH QEMUBH;
typedef void QEMUBHFunc(void *opaque);
typedef void BlockCompletionFunc(void *opaque, int ret);
typedef int ThreadPoolFunc(void *opaque);

typedef struct QemuMutex {
    pthread_mutex_t lock;
    bool initialized;
} QemuMutex;

typedef struct QemuCond {
    pthread_cond_t cond;
    bool initialized;
} QemuCond;

typedef struct AioContext {
    void *source[12];
    QemuMutex lock;
    QemuMutex bh_lock;
    QEMUBH *bh_list;
    int event_fd;
} AioContext;

struct QEMUBH {
    AioContext *ctx;
#if POOL_VERSION >= 601
    const char *name;
#endif
    QEMUBHFunc *cb;
    void *opaque;
    QEMUBH *next;
#if POOL_VERSION >= 500
    unsigned flags;
#else
    bool scheduled, idle, deleted;
#endif
};

typedef struct AIOCBInfo {
    void (*cancel_async)(void *acb);
    AioContext *(*get_aio_context)(void *acb);
    size_t aiocb_size;
} AIOCBInfo;

typedef struct BlockAIOCB {
    const AIOCBInfo *aiocb_info;
    void *bs;
    BlockCompletionFunc *cb;
    void *opaque;
#if POOL_VERSION >= 202
    int refcnt;
#endif
} BlockAIOCB;

/* util/qemu-thread-posix.c */
void qemu_mutex_init(QemuMutex *mutex);
void qemu_cond_init(QemuCond *cond);
void qemu_cond_wait(QemuCond *cond, QemuMutex *mutex);
void qemu_cond_signal(QemuCond *cond);
void qemu_thread_create(pthread_t *thread, const char *name, void *(*start)(void *), void *arg, int mode);
#if POOL_VERSION >= 300
typedef void QemuMutexLockFunc(QemuMutex *mutex, const char *file, int line);
extern QemuMutexLockFunc *volatile qemu_mutex_lock_func;
void qemu_mutex_unlock_impl(QemuMutex *mutex, const char *file, int line);
#define qemu_mutex_lock(mutex) qemu_mutex_lock_func(mutex, __FILE__, __LINE__)
#define qemu_mutex_unlock(mutex) qemu_mutex_unlock_impl(mutex, __FILE__, __LINE__)
#else
void qemu_mutex_lock(QemuMutex *mutex);
void qemu_mutex_unlock(QemuMutex *mutex);
#endif

/* util/async.c */
#if POOL_VERSION >= 601
QEMUBH *aio_bh_new_full(AioContext *ctx, QEMUBHFunc *cb, void *opaque, const char *name);
#define aio_bh_new(ctx, cb, opaque) aio_bh_new_full(ctx, cb, opaque, #cb)
#else
QEMUBH *aio_bh_new(AioContext *ctx, QEMUBHFunc *cb, void *opaque);
#endif
void qemu_bh_schedule(QEMUBH *bh);
void qemu_bh_cancel(QEMUBH *bh);
void aio_notify(AioContext *ctx);
int aio_bh_poll(AioContext *ctx);
void aio_wait(AioContext *ctx);
AioContext *qemu_get_aio_context(void);

/* util/aiocb.c */
void *qemu_aio_get(const AIOCBInfo *aiocb_info, void *bs, BlockCompletionFunc *cb, void *opaque);
void qemu_aio_unref(void *p);

/* util/thread-pool.c */
#if POOL_VERSION >= 801
BlockAIOCB *thread_pool_submit_aio(ThreadPoolFunc *func, void *arg, BlockCompletionFunc *cb, void *opaque);
int thread_pool_submit_co(ThreadPoolFunc *func, void *arg);
void thread_pool_submit(ThreadPoolFunc *func, void *arg);
#define POOL_ARGUMENT
#else
struct ThreadPool;
BlockAIOCB *thread_pool_submit_aio(struct ThreadPool *pool, ThreadPoolFunc *func, void *arg,
                                   BlockCompletionFunc *cb, void *opaque);
int thread_pool_submit_co(struct ThreadPool *pool, ThreadPoolFunc *func, void *arg);
void thread_pool_submit(struct ThreadPool *pool, ThreadPoolFunc *func, void *arg);
#define POOL_ARGUMENT aio_get_thread_pool(qemu_get_aio_context()),
#endif
struct ThreadPool *aio_get_thread_pool(AioContext *ctx);
void loop_until(bool *finished);

/* Notes such as those of <sys/sdt.h>, in our own words; the semaphore is declared and never looked at. */
#if WITH_PROBES
#define PROBE(name, template, ...)                                                        \
    __asm__ volatile("990: nop\n"                                                         \
                     ".pushsection .note.stapsdt,\"\",\"note\"\n"                         \
                     ".balign 4\n.4byte 992f-991f, 994f-993f, 3\n"                        \
                     "991: .asciz \"stapsdt\"\n992: .balign 4\n"                          \
                     "993: .8byte 990b\n.8byte _.stapsdt.base\n.8byte qemu_" #name "_semaphore\n" \
                     ".asciz \"qemu\"\n.asciz \"" #name "\"\n.asciz \"" template "\"\n"   \
                     "994: .balign 4\n.popsection\n"                                      \
                     ".ifndef _.stapsdt.base\n"                                          \
                     ".pushsection .stapsdt.base,\"aG\",\"progbits\",.stapsdt.base,comdat\n" \
                     ".weak _.stapsdt.base\n.hidden _.stapsdt.base\n"                     \
                     "_.stapsdt.base: .space 1\n.size _.stapsdt.base, 1\n.popsection\n.endif\n" \
                     ::__VA_ARGS__)
#ifndef IN
#define IN "nor"
#endif
#define PROBE_SUBMIT(pool, req, opaque) \
    PROBE(thread_pool_submit, "8@%0 8@%1 8@%2", IN(pool), IN(req), IN(opaque))
#define PROBE_COMPLETE(pool, req, opaque, ret) \
    PROBE(thread_pool_complete, "8@%0 8@%1 8@%2 -4@%3", IN(pool), IN(req), IN(opaque), IN(ret))
#else
#define PROBE_SUBMIT(pool, req, opaque) (void)0
#define PROBE_COMPLETE(pool, req, opaque, ret) (void)0
#endif

#endif
