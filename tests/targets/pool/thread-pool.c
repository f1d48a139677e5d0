/* SPDX-License-Identifier: Apache-2.0 */
/* The pool, as util/thread-pool.c has it. */
#include "pool.h"

typedef struct ThreadPool ThreadPool;
typedef struct ThreadPoolElement ThreadPoolElement;

enum ThreadState { THREAD_QUEUED, THREAD_ACTIVE, THREAD_DONE, THREAD_CANCELED };

struct ThreadPoolElement {
    BlockAIOCB common;
    ThreadPool *pool;
    ThreadPoolFunc *func;
    void *arg;
    enum ThreadState state;
    int ret;
    struct { ThreadPoolElement *tqe_next, **tqe_prev; } reqs;
    struct { ThreadPoolElement *le_next, **le_prev; } all;
};

struct ThreadPool {
    AioContext *ctx;
    QEMUBH *completion_bh;
    QemuMutex lock;
    QemuCond worker_stopped;
    QemuCond request_cond;
    QEMUBH *new_thread_bh;
    struct { ThreadPoolElement *lh_first; } head;
    struct { ThreadPoolElement *tqh_first, **tqh_last; } request_list;
    int cur_threads, idle_threads, new_threads, pending_threads, min_threads, max_threads;
};

#if WITH_PROBES
#ifdef __clang__
#define FOR_NOTES __attribute__((used))
#else
#define FOR_NOTES __attribute__((used, externally_visible))
#endif
FOR_NOTES unsigned short qemu_thread_pool_submit_semaphore;
FOR_NOTES unsigned short qemu_thread_pool_complete_semaphore;
#endif

static void do_spawn_thread(ThreadPool *pool);

static void *worker_thread(void *opaque)
{
    ThreadPool *pool = opaque;

    qemu_mutex_lock(&pool->lock);
    pool->pending_threads--;
    do_spawn_thread(pool);
    while (pool->cur_threads <= pool->max_threads) {
        ThreadPoolElement *req;
        int ret;

        if (!pool->request_list.tqh_first) {
            pool->idle_threads++;
            qemu_cond_wait(&pool->request_cond, &pool->lock);
            pool->idle_threads--;
            continue;
        }
        req = pool->request_list.tqh_first;
        if (req->reqs.tqe_next)
            req->reqs.tqe_next->reqs.tqe_prev = req->reqs.tqe_prev;
        else
            pool->request_list.tqh_last = req->reqs.tqe_prev;
        *req->reqs.tqe_prev = req->reqs.tqe_next;
        req->state = THREAD_ACTIVE;
        qemu_mutex_unlock(&pool->lock);

        ret = req->func(req->arg);

#if POOL_VERSION >= 1000
        __atomic_store_n(&req->ret, ret, __ATOMIC_RELEASE);
        __atomic_store_n(&req->state, THREAD_DONE, __ATOMIC_RELEASE);
#else
        req->ret = ret;
        __atomic_thread_fence(__ATOMIC_RELEASE);
        req->state = THREAD_DONE;
#endif
#if POOL_VERSION >= 701
        qemu_bh_schedule(pool->completion_bh);
        qemu_mutex_lock(&pool->lock);
#else
        qemu_mutex_lock(&pool->lock);
        qemu_bh_schedule(pool->completion_bh);
#endif
    }
    pool->cur_threads--;
    qemu_cond_signal(&pool->worker_stopped);
    qemu_mutex_unlock(&pool->lock);
    return NULL;
}

static void do_spawn_thread(ThreadPool *pool)
{
    pthread_t thread;

    if (!pool->new_threads)
        return;
    pool->new_threads--;
    pool->pending_threads++;
    qemu_thread_create(&thread, "worker", worker_thread, pool, 1);
}

static void spawn_thread_bh_fn(void *opaque)
{
    ThreadPool *pool = opaque;

    qemu_mutex_lock(&pool->lock);
    do_spawn_thread(pool);
    qemu_mutex_unlock(&pool->lock);
}

static void spawn_thread(ThreadPool *pool)
{
    pool->cur_threads++;
    pool->new_threads++;
    if (!pool->pending_threads)
        qemu_bh_schedule(pool->new_thread_bh);
}

static inline void unlink_element(ThreadPoolElement *elem)
{
    if (elem->all.le_next)
        elem->all.le_next->all.le_prev = elem->all.le_prev;
    *elem->all.le_prev = elem->all.le_next;
}

static void thread_pool_completion_bh(void *opaque)
{
    ThreadPool *pool = opaque;
    ThreadPoolElement *elem, *next;

#if POOL_VERSION >= 209 && POOL_VERSION < 801
    qemu_mutex_lock(&pool->ctx->lock);
#endif
restart:
    for (elem = pool->head.lh_first; elem; elem = next) {
        next = elem->all.le_next;
#if POOL_VERSION < 202
        if (elem->state != THREAD_CANCELED && elem->state != THREAD_DONE)
            continue;
        if (elem->state == THREAD_DONE)
            PROBE_COMPLETE(pool, elem, elem->common.opaque, elem->ret);
        if (elem->state == THREAD_DONE && elem->common.cb) {
            unlink_element(elem);
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            qemu_bh_schedule(pool->completion_bh);
            elem->common.cb(elem->common.opaque, elem->ret);
            qemu_aio_unref(elem);
            goto restart;
        } else {
            unlink_element(elem);
            qemu_aio_unref(elem);
        }
#else
        if (elem->state != THREAD_DONE)
            continue;
        PROBE_COMPLETE(pool, elem, elem->common.opaque, elem->ret);
        unlink_element(elem);
        if (elem->common.cb) {
            __atomic_thread_fence(__ATOMIC_ACQUIRE);
            qemu_bh_schedule(pool->completion_bh);
#if POOL_VERSION >= 209 && POOL_VERSION < 801
            qemu_mutex_unlock(&pool->ctx->lock);
#endif
            elem->common.cb(elem->common.opaque, elem->ret);
#if POOL_VERSION >= 209 && POOL_VERSION < 801
            qemu_mutex_lock(&pool->ctx->lock);
#endif
            qemu_bh_cancel(pool->completion_bh);
            qemu_aio_unref(elem);
            goto restart;
        } else {
            qemu_aio_unref(elem);
        }
#endif
    }
#if POOL_VERSION >= 209 && POOL_VERSION < 801
    qemu_mutex_unlock(&pool->ctx->lock);
#endif
}

static void thread_pool_cancel(void *acb)
{
    ThreadPoolElement *elem = acb;
    ThreadPool *pool = elem->pool;

    qemu_mutex_lock(&pool->lock);
    if (elem->state == THREAD_QUEUED) {
        if (elem->reqs.tqe_next)
            elem->reqs.tqe_next->reqs.tqe_prev = elem->reqs.tqe_prev;
        else
            pool->request_list.tqh_last = elem->reqs.tqe_prev;
        *elem->reqs.tqe_prev = elem->reqs.tqe_next;
#if POOL_VERSION >= 202
        elem->state = THREAD_DONE;
        elem->ret = -125;
#else
        elem->state = THREAD_CANCELED;
#endif
        qemu_bh_schedule(pool->completion_bh);
    }
    qemu_mutex_unlock(&pool->lock);
}

static const AIOCBInfo thread_pool_aiocb_info = {
    .aiocb_size = sizeof(ThreadPoolElement),
    .cancel_async = thread_pool_cancel,
};

static ThreadPool *thread_pool_new(AioContext *ctx);
static ThreadPool *the_pool;

struct ThreadPool *aio_get_thread_pool(AioContext *ctx)
{
    if (!the_pool)
        the_pool = thread_pool_new(ctx);
    return the_pool;
}

#if POOL_VERSION >= 801
BlockAIOCB *thread_pool_submit_aio(ThreadPoolFunc *func, void *arg, BlockCompletionFunc *cb, void *opaque)
#else
BlockAIOCB *thread_pool_submit_aio(ThreadPool *pool, ThreadPoolFunc *func, void *arg, BlockCompletionFunc *cb,
                                   void *opaque)
#endif
{
    ThreadPoolElement *req;
#if POOL_VERSION >= 801
    ThreadPool *pool = aio_get_thread_pool(qemu_get_aio_context());
#endif

    req = qemu_aio_get(&thread_pool_aiocb_info, NULL, cb, opaque);
    req->func = func;
    req->arg = arg;
    req->state = THREAD_QUEUED;
    req->pool = pool;

    req->all.le_next = pool->head.lh_first;
    if (req->all.le_next)
        pool->head.lh_first->all.le_prev = &req->all.le_next;
    pool->head.lh_first = req;
    req->all.le_prev = &pool->head.lh_first;

    PROBE_SUBMIT(pool, req, arg);

    qemu_mutex_lock(&pool->lock);
    if (pool->idle_threads == 0 && pool->cur_threads < pool->max_threads)
        spawn_thread(pool);
    req->reqs.tqe_next = NULL;
    req->reqs.tqe_prev = pool->request_list.tqh_last;
    *pool->request_list.tqh_last = req;
    pool->request_list.tqh_last = &req->reqs.tqe_next;
    qemu_mutex_unlock(&pool->lock);
    qemu_cond_signal(&pool->request_cond);
    return &req->common;
}

struct waiter {
    bool finished;
    int ret;
};

static void thread_pool_co_cb(void *opaque, int ret)
{
    struct waiter *waiter = opaque;

    waiter->ret = ret;
    waiter->finished = true;
}

#if POOL_VERSION >= 801
int thread_pool_submit_co(ThreadPoolFunc *func, void *arg)
{
    struct waiter waiter = {.ret = -1};

    thread_pool_submit_aio(func, arg, thread_pool_co_cb, &waiter);
    loop_until(&waiter.finished);
    return waiter.ret;
}

void thread_pool_submit(ThreadPoolFunc *func, void *arg)
{
    thread_pool_submit_aio(func, arg, NULL, NULL);
}
#else
int thread_pool_submit_co(ThreadPool *pool, ThreadPoolFunc *func, void *arg)
{
    struct waiter waiter = {.ret = -1};

    thread_pool_submit_aio(pool, func, arg, thread_pool_co_cb, &waiter);
    loop_until(&waiter.finished);
    return waiter.ret;
}

void thread_pool_submit(ThreadPool *pool, ThreadPoolFunc *func, void *arg)
{
    thread_pool_submit_aio(pool, func, arg, NULL, NULL);
}
#endif

static void thread_pool_init_one(ThreadPool *pool, AioContext *ctx)
{
    if (!ctx)
        ctx = qemu_get_aio_context();
    memset(pool, 0, sizeof(*pool));
    pool->ctx = ctx;
    pool->completion_bh = aio_bh_new(ctx, thread_pool_completion_bh, pool);
    qemu_mutex_init(&pool->lock);
    qemu_cond_init(&pool->worker_stopped);
    qemu_cond_init(&pool->request_cond);
    pool->max_threads = 64;
    pool->new_thread_bh = aio_bh_new(ctx, spawn_thread_bh_fn, pool);
    pool->request_list.tqh_last = &pool->request_list.tqh_first;
}

static ThreadPool *thread_pool_new(AioContext *ctx)
{
    ThreadPool *pool = malloc(sizeof(*pool));

    thread_pool_init_one(pool, ctx);
    return pool;
}
