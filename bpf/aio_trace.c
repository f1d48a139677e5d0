/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The three probes of a QEMU thread-pool request (util/thread-pool.c): submit, done, callback.
 *
 * Parameters by -D:
 *   SUBMIT_REGISTER, DONE_REGISTER, CALLBACK_REGISTER   member of struct pt_regs that holds the request,
 *                                                       or "member-0x44" where it holds a place in it
 *   SUBMIT_2_REGISTER, … SUBMIT_4_REGISTER, likewise    the same for further copies of a site, if any
 *   REQUEST_CALLBACK, REQUEST_ARG, REQUEST_RET          offsets in ThreadPoolElement
 *   ARG_AIO_TYPE, ARG_AIO_FILDES                        offsets in RawPosixAIOData, in one window of memory
 *   MAX_REQUESTS                                        requests followed at once
 *   MAX_STATISTICS                                      kinds times files that are told apart
 *   DEADLINE_NS                                         from when on a callback is late
 *   CALLBACK_MAY_BE_NULL                                1: the callback site is reached without a callback, too
 *   WITH_SUBMIT                                         1: the submit probe is attached, 0: it is not
 *   HAVE_CMPXCHG                                        1: the kernel has atomic compare and exchange (5.12)
 *
 * No event is sent: state and histograms stay in maps, user space reads them when it needs to.
 */
#include <linux/types.h>

#include "aio_trace.h"

/* User registers as the kernel hands them to a uprobe: ABI, the same for every kernel. */
#if defined(__x86_64__)
struct pt_regs {
    unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
    unsigned long orig_ax, ip, cs, flags, sp, ss;
};
#elif defined(__aarch64__)
struct pt_regs {
    u64 regs[31];
    u64 sp, pc, pstate;
};
#else
#error "aio-trace knows the registers of x86-64 and aarch64 only"
#endif

#define EEXIST 17
#define ECANCELED 125

#define WORDS_TO_ARG ((REQUEST_ARG + 8 - REQUEST_CALLBACK) / 8)

#define ARG_FROM (ARG_AIO_TYPE < ARG_AIO_FILDES ? ARG_AIO_TYPE : ARG_AIO_FILDES)
#define ARG_WORDS (((ARG_AIO_TYPE > ARG_AIO_FILDES ? ARG_AIO_TYPE : ARG_AIO_FILDES) - ARG_FROM) / 4 + 1)

BPF_HASH(requests, u64, struct request_record, MAX_REQUESTS);
/* One look-up a hit, as an array would need. Not preallocated (the flag): a QEMU has few files. */
BPF_F_TABLE("percpu_hash", struct statistics_key, struct statistics, statistics, MAX_STATISTICS, 1);
BPF_PERCPU_ARRAY(nothing, struct statistics, 1);

/* Programs may be preempted and run again on the same CPU, so even per-CPU counts are added
 * atomically: a count that is off by one would be a lie about a lost request. */
static inline __attribute__((always_inline)) void add(u64 *counter, u64 amount)
{
    __sync_fetch_and_add(counter, amount);
}

/* The counts of one kind on one file. When there are too many files, those of the kind, which are there
 * from the start. */
static inline __attribute__((always_inline)) struct statistics *counts_of(u32 kind, s32 fd)
{
    struct statistics_key key = {.kind = kind, .fd = fd};
    struct statistics *s = statistics.lookup(&key);
    struct statistics *empty;
    int first = 0;

    if (s)
        return s;
    empty = nothing.lookup(&first);
    if (!empty)
        return 0;
    statistics.insert(&key, empty);
    s = statistics.lookup(&key);
    if (s)
        return s;
    key.fd = NO_FD;
    return statistics.lookup(&key);
}

static inline __attribute__((always_inline)) u32 bucket_of(u64 ns)
{
    u32 octave = 0;
    u64 rest = ns;

    if (rest >> 32) { octave += 32; rest >>= 32; }
    if (rest >> 16) { octave += 16; rest >>= 16; }
    if (rest >> 8) { octave += 8; rest >>= 8; }
    if (rest >> 4) { octave += 4; rest >>= 4; }
    if (rest >> 2) { octave += 2; rest >>= 2; }
    if (rest >> 1) { octave += 1; }
    if (octave < SUB_BUCKET_BITS)
        return ns;
    return (octave << SUB_BUCKET_BITS) |
           ((ns >> (octave - SUB_BUCKET_BITS)) & ((1 << SUB_BUCKET_BITS) - 1));
}

static inline __attribute__((always_inline)) void record_stage(struct statistics *s, u32 stage, u64 from_ns, u64 to_ns)
{
    struct stage_statistics *st = &s->stages[stage];
    u64 ns = to_ns > from_ns ? to_ns - from_ns : 0;
    u32 bucket = bucket_of(ns);

    if (bucket >= BUCKETS)
        bucket = BUCKETS - 1;
    add(&st->count, 1);
    add(&st->sum_ns, ns);
    if (ns > st->max_ns)
        st->max_ns = ns;
    add(&st->buckets[bucket], 1);
}

/* Claims the change from "not done" to "done" for the caller: true for one of the two that may race.
 * The worker stores THREAD_DONE before it reaches the done probe, so a bottom half that runs for
 * another request may call the callback first. */
static inline __attribute__((always_inline)) bool claim_done(struct request_record *record, u64 now)
{
#if HAVE_CMPXCHG
    return __sync_val_compare_and_swap(&record->done_ns, 0, now) == 0;
#else
    if (record->done_ns)
        return false;
    record->done_ns = now;
    return true;
#endif
}

/* The callback of a request that is done comes now. */
static inline __attribute__((always_inline)) void record_callback(struct statistics *s, u64 done_ns, u64 now)
{
    record_stage(s, DONE_TO_CALLBACK, done_ns, now);
    if (now >= done_ns + DEADLINE_NS)
        add(&s->late, 1);
}

/* Whether the request has no callback: being done was all. Only some callback sites see such. */
static inline __attribute__((always_inline)) bool nobody_waits(u64 request)
{
#if CALLBACK_MAY_BE_NULL
    u64 callback = 1;

    bpf_probe_read_user(&callback, sizeof(callback), (void *)(request + REQUEST_CALLBACK));
    return !callback;
#else
    return false;
#endif
}

#if WITH_SUBMIT
/* Kind and file by RawPosixAIOData, believed only where exactly one operation's bit is set. Other users
 * of the pool (qcow2 compression and encryption) have sizes and offsets there. */
static inline __attribute__((always_inline)) void read_operation(struct request_record *record, u64 arg)
{
    u32 words[ARG_WORDS] = {};
    u32 type, operation, kind;

    record->fd = NO_FD;
    if (!arg || bpf_probe_read_user(words, sizeof(words), (void *)(arg + ARG_FROM)))
        return;
    type = words[(ARG_AIO_TYPE - ARG_FROM) / 4];
    operation = type & 0x7ff;
    /* Write zeroes, and unmap where that can be done. */
    if (operation == 0x30)
        operation = 0x20;
    if ((type & ~0x7fff) || (operation & (operation - 1)))
        return;
    switch (operation) {
    case 0x01: kind = 1; break;
    case 0x02: kind = 2; break;
    case 0x04: kind = 3; break;
    case 0x08: kind = 4; break;
    case 0x10: kind = 5; break;
    case 0x20: kind = 6; break;
    case 0x40: kind = 7; break;
    case 0x80: kind = 8; break;
    default: return;
    }
    record->kind = kind;
    record->fd = words[(ARG_AIO_FILDES - ARG_FROM) / 4];
}

static inline __attribute__((always_inline)) int at_submit(u64 request)
{
    u64 words[WORDS_TO_ARG] = {};
    struct request_record record = {.fd = NO_FD};
    struct statistics *s;
    int error;

    if (!bpf_probe_read_user(words, sizeof(words), (void *)(request + REQUEST_CALLBACK))) {
        read_operation(&record, words[WORDS_TO_ARG - 1]);
        if (!words[0])
            record.flags = FLAG_NO_CALLBACK;
    }
    s = counts_of(record.kind, record.fd);
    if (!s)
        return 0;
    add(&s->submitted, 1);
    record.submit_ns = bpf_ktime_get_ns();
    error = requests.insert(&request, &record);
    if (error == -EEXIST) {
        struct request_record *old = requests.lookup(&request);

        if (old && !old->flags)
            add(&s->missed, 1);
        error = requests.update(&request, &record);
    }
    if (error)
        add(&s->map_full, 1);
    return 0;
}

static inline __attribute__((always_inline)) int at_done(u64 request)
{
    u64 now = bpf_ktime_get_ns();
    struct request_record *record = requests.lookup(&request);
    struct statistics *s;

    /* Its callback came first and has counted it, or its submit could not be recorded. */
    if (!record)
        return 0;
    if (!claim_done(record, now)) {
        /* The late hit of an earlier request at this address claimed it: ours is the true time. */
        record->done_ns = now;
        return 0;
    }
    s = counts_of(record->kind, record->fd);
    if (!s || (record->flags & FLAG_BEFORE))
        return 0;
    add(&s->done, 1);
    record_stage(s, SUBMIT_TO_DONE, record->submit_ns, now);
    if (record->flags & FLAG_NO_CALLBACK) {
        add(&s->completed, 1);
        add(&s->no_callback, 1);
        requests.delete(&request);
    }
    return 0;
}

static inline __attribute__((always_inline)) int at_callback(u64 request)
{
    u64 now = bpf_ktime_get_ns();
    struct request_record *record = requests.lookup(&request);
    struct statistics *s = record ? counts_of(record->kind, record->fd) : counts_of(KIND_OTHER, NO_FD);
    int ret = 0;

    if (!s || nobody_waits(request))
        return 0;
    if (!record || (record->flags & FLAG_BEFORE)) {
        add(&s->before, 1);
    } else if (claim_done(record, now)) {
        /* No done hit yet: the worker is still on its way to the probe, or there was no worker
         * because thread_pool_cancel took the request, and says so in ret. */
        bpf_probe_read_user(&ret, sizeof(ret), (void *)(request + REQUEST_RET));
        if (ret == -ECANCELED) {
            add(&s->cancelled, 1);
        } else {
            add(&s->done, 1);
            add(&s->completed, 1);
            record_stage(s, SUBMIT_TO_DONE, record->submit_ns, now);
            record_stage(s, DONE_TO_CALLBACK, now, now);
            record_stage(s, TOTAL, record->submit_ns, now);
        }
    } else {
        add(&s->completed, 1);
        record_callback(s, record->done_ns, now);
        record_stage(s, TOTAL, record->submit_ns, now);
    }
    requests.delete(&request);
    return 0;
}

#else /* done and callback only */

static inline __attribute__((always_inline)) int at_done(u64 request)
{
    struct request_record record = {.done_ns = bpf_ktime_get_ns(), .fd = NO_FD};
    struct statistics *s = counts_of(KIND_OTHER, NO_FD);

    if (!s)
        return 0;
    add(&s->done, 1);
    if (requests.update(&request, &record))
        add(&s->map_full, 1);
    return 0;
}

static inline __attribute__((always_inline)) int at_callback(u64 request)
{
    u64 now = bpf_ktime_get_ns();
    struct request_record *record = requests.lookup(&request);
    struct statistics *s = counts_of(KIND_OTHER, NO_FD);
    int ret = 0;

    if (!s || nobody_waits(request))
        return 0;
    if (!record) {
        bpf_probe_read_user(&ret, sizeof(ret), (void *)(request + REQUEST_RET));
        if (ret == -ECANCELED)
            add(&s->cancelled, 1);
        else
            add(&s->completed, 1);
        return 0;
    }
    if (record->flags & FLAG_BEFORE) {
        add(&s->before, 1);
    } else {
        add(&s->completed, 1);
        record_callback(s, record->done_ns, now);
    }
    requests.delete(&request);
    return 0;
}
#endif

/* One program for each register in which a site, or one of its copies, holds the request. */
#ifdef SUBMIT_REGISTER
int on_submit(struct pt_regs *ctx)
{
    return at_submit(ctx->SUBMIT_REGISTER);
}
#endif
#ifdef SUBMIT_2_REGISTER
int on_submit_2(struct pt_regs *ctx)
{
    return at_submit(ctx->SUBMIT_2_REGISTER);
}
#endif
#ifdef SUBMIT_3_REGISTER
int on_submit_3(struct pt_regs *ctx)
{
    return at_submit(ctx->SUBMIT_3_REGISTER);
}
#endif
#ifdef SUBMIT_4_REGISTER
int on_submit_4(struct pt_regs *ctx)
{
    return at_submit(ctx->SUBMIT_4_REGISTER);
}
#endif
#ifdef DONE_REGISTER
int on_done(struct pt_regs *ctx)
{
    return at_done(ctx->DONE_REGISTER);
}
#endif
#ifdef DONE_2_REGISTER
int on_done_2(struct pt_regs *ctx)
{
    return at_done(ctx->DONE_2_REGISTER);
}
#endif
#ifdef DONE_3_REGISTER
int on_done_3(struct pt_regs *ctx)
{
    return at_done(ctx->DONE_3_REGISTER);
}
#endif
#ifdef DONE_4_REGISTER
int on_done_4(struct pt_regs *ctx)
{
    return at_done(ctx->DONE_4_REGISTER);
}
#endif
#ifdef CALLBACK_REGISTER
int on_callback(struct pt_regs *ctx)
{
    return at_callback(ctx->CALLBACK_REGISTER);
}
#endif
#ifdef CALLBACK_2_REGISTER
int on_callback_2(struct pt_regs *ctx)
{
    return at_callback(ctx->CALLBACK_2_REGISTER);
}
#endif
#ifdef CALLBACK_3_REGISTER
int on_callback_3(struct pt_regs *ctx)
{
    return at_callback(ctx->CALLBACK_3_REGISTER);
}
#endif
#ifdef CALLBACK_4_REGISTER
int on_callback_4(struct pt_regs *ctx)
{
    return at_callback(ctx->CALLBACK_4_REGISTER);
}
#endif
