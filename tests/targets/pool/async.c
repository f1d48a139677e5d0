/* SPDX-License-Identifier: Apache-2.0 */
/* Bottom halves, as util/async.c has them. */
#include <sys/eventfd.h>
#include <unistd.h>

#include "pool.h"

static AioContext main_context;
static AioContext *qemu_aio_context;

enum { BH_PENDING = 1, BH_SCHEDULED = 2 };

AioContext *qemu_get_aio_context(void)
{
    return qemu_aio_context;
}

static void __attribute__((constructor)) init_context(void)
{
    qemu_mutex_init(&main_context.lock);
    qemu_mutex_init(&main_context.bh_lock);
    main_context.event_fd = eventfd(0, 0);
    qemu_aio_context = &main_context;
}

void aio_notify(AioContext *ctx)
{
    uint64_t one = 1;

    if (write(ctx->event_fd, &one, sizeof(one)) != sizeof(one))
        abort();
}

void aio_wait(AioContext *ctx)
{
    uint64_t count;

    if (read(ctx->event_fd, &count, sizeof(count)) != sizeof(count))
        abort();
}

#if POOL_VERSION >= 500
static void aio_bh_enqueue(QEMUBH *bh, unsigned new_flags)
{
    AioContext *ctx = bh->ctx;
    unsigned old_flags = __atomic_fetch_or(&bh->flags, BH_PENDING | new_flags, __ATOMIC_SEQ_CST);

    if (!(old_flags & BH_PENDING)) {
        QEMUBH *head;

        do {
            head = __atomic_load_n(&ctx->bh_list, __ATOMIC_RELAXED);
            bh->next = head;
        } while (!__sync_bool_compare_and_swap(&ctx->bh_list, head, bh));
    }
    aio_notify(ctx);
}

#if POOL_VERSION >= 601
QEMUBH *aio_bh_new_full(AioContext *ctx, QEMUBHFunc *cb, void *opaque, const char *name)
#else
QEMUBH *aio_bh_new(AioContext *ctx, QEMUBHFunc *cb, void *opaque)
#endif
{
    QEMUBH *bh = malloc(sizeof(*bh));

    *bh = (QEMUBH){
        .ctx = ctx,
        .cb = cb,
        .opaque = opaque,
#if POOL_VERSION >= 601
        .name = name,
#endif
    };
    return bh;
}

void qemu_bh_schedule(QEMUBH *bh)
{
    aio_bh_enqueue(bh, BH_SCHEDULED);
}

void qemu_bh_cancel(QEMUBH *bh)
{
    __atomic_fetch_and(&bh->flags, ~BH_SCHEDULED, __ATOMIC_SEQ_CST);
}

int aio_bh_poll(AioContext *ctx)
{
    QEMUBH *bh = __atomic_exchange_n(&ctx->bh_list, NULL, __ATOMIC_SEQ_CST);
    int ret = 0;

    while (bh) {
        QEMUBH *next = bh->next;
        unsigned flags = __atomic_fetch_and(&bh->flags, ~(BH_PENDING | BH_SCHEDULED), __ATOMIC_SEQ_CST);

        if (flags & BH_SCHEDULED) {
            bh->cb(bh->opaque);
            ret = 1;
        }
        bh = next;
    }
    return ret;
}
#else
QEMUBH *aio_bh_new(AioContext *ctx, QEMUBHFunc *cb, void *opaque)
{
    QEMUBH *bh = calloc(1, sizeof(*bh));

    bh->ctx = ctx;
    bh->cb = cb;
    bh->opaque = opaque;
    qemu_mutex_lock(&ctx->bh_lock);
    bh->next = ctx->bh_list;
    __atomic_thread_fence(__ATOMIC_RELEASE);
    ctx->bh_list = bh;
    qemu_mutex_unlock(&ctx->bh_lock);
    return bh;
}

void qemu_bh_schedule(QEMUBH *bh)
{
    AioContext *ctx;

    if (bh->scheduled)
        return;
    ctx = bh->ctx;
    bh->idle = false;
    __sync_synchronize();
    bh->scheduled = true;
    aio_notify(ctx);
}

void qemu_bh_cancel(QEMUBH *bh)
{
    bh->scheduled = false;
}

int aio_bh_poll(AioContext *ctx)
{
    int ret = 0;

    for (QEMUBH *bh = ctx->bh_list, *next; bh; bh = next) {
        next = bh->next;
        if (!bh->deleted && bh->scheduled) {
            bh->scheduled = false;
            __sync_synchronize();
            ret = !bh->idle;
            bh->cb(bh->opaque);
        }
    }
    return ret;
}
#endif
