/* SPDX-License-Identifier: Apache-2.0 */
/* Locks and threads, as util/qemu-thread-posix.c has them. */
#include <stdio.h>

#include "pool.h"

static void __attribute__((noreturn)) error_exit(int err, const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(err));
    abort();
}

void qemu_mutex_init(QemuMutex *mutex)
{
    int err = pthread_mutex_init(&mutex->lock, NULL);

    if (err)
        error_exit(err, __func__);
    mutex->initialized = true;
}

#if POOL_VERSION >= 300
static void qemu_mutex_lock_impl(QemuMutex *mutex, const char *file, int line)
{
    int err;

    assert(mutex->initialized && file && line);
    err = pthread_mutex_lock(&mutex->lock);
    if (err)
        error_exit(err, file);
}

QemuMutexLockFunc *volatile qemu_mutex_lock_func = qemu_mutex_lock_impl;

void qemu_mutex_unlock_impl(QemuMutex *mutex, const char *file, int line)
{
    int err;

    assert(mutex->initialized && file && line);
    err = pthread_mutex_unlock(&mutex->lock);
    if (err)
        error_exit(err, file);
}
#else
void qemu_mutex_lock(QemuMutex *mutex)
{
    int err = pthread_mutex_lock(&mutex->lock);

    if (err)
        error_exit(err, __func__);
}

void qemu_mutex_unlock(QemuMutex *mutex)
{
    int err = pthread_mutex_unlock(&mutex->lock);

    if (err)
        error_exit(err, __func__);
}
#endif

void qemu_cond_init(QemuCond *cond)
{
    int err = pthread_cond_init(&cond->cond, NULL);

    if (err)
        error_exit(err, __func__);
    cond->initialized = true;
}

void qemu_cond_wait(QemuCond *cond, QemuMutex *mutex)
{
    int err = pthread_cond_wait(&cond->cond, &mutex->lock);

    if (err)
        error_exit(err, __func__);
}

void qemu_cond_signal(QemuCond *cond)
{
    int err;

    assert(cond->initialized);
    err = pthread_cond_signal(&cond->cond);
    if (err)
        error_exit(err, __func__);
}

void qemu_thread_create(pthread_t *thread, const char *name, void *(*start)(void *), void *arg, int mode)
{
    int err = pthread_create(thread, NULL, start, arg);

    if (err)
        error_exit(err, name);
    if (mode)
        pthread_detach(*thread);
}
