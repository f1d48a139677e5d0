/* SPDX-License-Identifier: Apache-2.0 */
/* Requests' common part, as util/aiocb.c has it. */
#include "pool.h"

void *qemu_aio_get(const AIOCBInfo *aiocb_info, void *bs, BlockCompletionFunc *cb, void *opaque)
{
    BlockAIOCB *acb = malloc(aiocb_info->aiocb_size);

    acb->aiocb_info = aiocb_info;
    acb->bs = bs;
    acb->cb = cb;
    acb->opaque = opaque;
#if POOL_VERSION >= 202
    acb->refcnt = 1;
#endif
    return acb;
}

void qemu_aio_unref(void *p)
{
#if POOL_VERSION >= 202
    BlockAIOCB *acb = p;

    assert(acb->refcnt > 0);
    if (--acb->refcnt == 0)
        free(acb);
#else
    free(p);
#endif
}
