/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes requests and prints how many: `pool WITH WITHOUT CO` submits so many with a callback, without one, and
 * by thread_pool_submit_co(). With a fourth argument it waits for a line on standard input first, and after.
 */
#include <stdio.h>

#include "pool.h"

const char version[] = "QEMU emulator version 7.2.0 (pool test target)";

static int callbacks, works;

void loop_until(bool *finished)
{
    AioContext *ctx = qemu_get_aio_context();

    while (!*finished) {
        aio_wait(ctx);
        aio_bh_poll(ctx);
    }
}

static int work(void *arg)
{
    (void)arg;
    __atomic_fetch_add(&works, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static void finished_one(void *opaque, int ret)
{
    (void)ret;
    if (++callbacks == *(int *)opaque)
        callbacks = -1;
}

int main(int argc, char **argv)
{
    int with = argc > 1 ? atoi(argv[1]) : 0;
    int without = argc > 2 ? atoi(argv[2]) : 0;
    int co = argc > 3 ? atoi(argv[3]) : 0;
    AioContext *ctx = qemu_get_aio_context();
    int all = with + without + co;
    char line[8];

    if (argc > 4) {
        printf("%s\n", version);
        fflush(stdout);
        if (!fgets(line, sizeof(line), stdin))
            return 1;
    }
    for (int i = 0; i < without; i++)
        thread_pool_submit(POOL_ARGUMENT work, NULL);
    for (int i = 0; i < co; i++)
        thread_pool_submit_co(POOL_ARGUMENT work, NULL);
    for (int i = 0; i < with; i++)
        thread_pool_submit_aio(POOL_ARGUMENT work, NULL, finished_one, &with);
    while (with && callbacks != -1) {
        aio_wait(ctx);
        aio_bh_poll(ctx);
    }
    while (__atomic_load_n(&works, __ATOMIC_SEQ_CST) < all)
        aio_bh_poll(ctx);
    printf("%d\n", works);
    fflush(stdout);
    return argc > 4 && !fgets(line, sizeof(line), stdin);
}
