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
 *   SET_BITS                                            binary logarithm of the number of sets of requests
 *   MAX_REQUESTS                                        requests that the map `overflow` holds
 *   MAX_PROCESSES                                       processes that are watched at once
 *   MAX_STATISTICS                                      processes times kinds times files that are told apart
 *   PREALLOCATED                                        1: the kernel wants the memory for those beforehand (before 6.1)
 *   CALLED_FOR_NS                                       how long a done hit may come after its callback
 *   CALLBACK_MAY_BE_NULL                                1: the callback site is reached without a callback, too
 *   HAVE_ATOMICS                                        1: the kernel has compare and exchange (5.12)
 *   SHARED                                              1: the probes are in every process of the executable
 *   WAYS_OF_ONE, OVERFLOW_OF_ONE, STATISTICS_OF_ONE     for that, what one process may take of a set and of those maps
 *   PID_NAMESPACE_DEVICE, PID_NAMESPACE_INODE           for that, user space's pid namespace, unless it is the first
 *   COUNT_OPERATIONS                                    1, for the tests: count look-ups in hashes and in arrays
 *
 * No event is sent: state and histograms stay in maps, user space reads them when it needs to. What a hit
 * costs, and what was tried to make it cost less, is in docs/cost.md: per request one look-up in a hash and a
 * few in arrays (which the kernel makes inline), nothing inserted, nothing deleted.
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

#define INLINE static inline __attribute__((always_inline))

#if HAVE_ATOMICS
/* User space maps it (the flag) and so reads it without a system call. */
BPF_F_TABLE("array", u32, struct request_set, requests, 1 << SET_BITS, 1024);
#endif
BPF_HASH(overflow, struct request_key, struct request_record, MAX_REQUESTS);
#if SHARED
BPF_HASH(processes, u32, struct process, MAX_PROCESSES);
BPF_HASH(shares, u32, struct share, MAX_PROCESSES);
#else
BPF_ARRAY(processes, struct process, 1);
#endif
/* Not preallocated (the flag) where that may be: a QEMU has few files. Not per CPU: nearly all is counted by the
 * one thread that calls the callbacks. */
BPF_F_TABLE("hash", struct statistics_key, struct statistics, statistics, MAX_STATISTICS, !PREALLOCATED);
BPF_ARRAY(template, struct statistics, 1);

#if COUNT_OPERATIONS
BPF_ARRAY(operations, u64, 2);

INLINE void operation(u32 kind)
{
    u64 *count = operations.lookup(&kind);

    if (count)
        __sync_fetch_and_add(count, 1);
}
#else
INLINE void operation(u32 kind)
{
}
#endif

#define ON_HASH 0
#define ON_ARRAY 1

/* Every map operation is one of these. */
#if HAVE_ATOMICS
INLINE struct request_set *lookup_set(u32 index)
{
    operation(ON_ARRAY);
    return requests.lookup(&index);
}
#endif

INLINE struct request_record *lookup_overflow(struct request_key *key)
{
    operation(ON_HASH);
    return overflow.lookup(key);
}

INLINE int update_overflow(struct request_key *key, struct request_record *record)
{
    operation(ON_HASH);
    return overflow.update(key, record);
}

INLINE int insert_overflow(struct request_key *key, struct request_record *record)
{
    operation(ON_HASH);
    return overflow.insert(key, record);
}

/* Whether it was there. */
INLINE bool delete_overflow(struct request_key *key)
{
    operation(ON_HASH);
    return !overflow.delete(key);
}

INLINE struct process *lookup_process(u32 pid)
{
#if !SHARED
    pid = 0;
#endif
    operation(SHARED ? ON_HASH : ON_ARRAY);
    return processes.lookup(&pid);
}

INLINE struct statistics *lookup_statistics(struct statistics_key *key)
{
    operation(ON_HASH);
    return statistics.lookup(key);
}

/* Programs run on several CPUs at once and may be preempted: a count that is off by one would be a lie
 * about a lost request. */
INLINE void add(u64 *counter, u64 amount)
{
    __sync_fetch_and_add(counter, amount);
}

INLINE u64 exchange_if(u64 *place, u64 expected, u64 value)
{
#if HAVE_ATOMICS
    return __sync_val_compare_and_swap(place, expected, value);
#else
    u64 found = *place;

    if (found == expected)
        *place = value;
    return found;
#endif
}

/* Shares: whoever makes up requests and files takes no more of the maps than its own part. Only what finds no
 * record in the sets asks. */
#if SHARED
INLINE struct share *lookup_share(u32 pid)
{
    operation(ON_HASH);
    return shares.lookup(&pid);
}
#endif

INLINE bool may_overflow(u32 pid, struct process *process)
{
#if SHARED
    struct share *share = lookup_share(pid);

    return share && (s64)(share->entered - share->left) - process->taken < OVERFLOW_OF_ONE;
#else
    return true;
#endif
}

INLINE void count_entered(u32 pid)
{
#if SHARED
    struct share *share = lookup_share(pid);

    if (share)
        add(&share->entered, 1);
#endif
}

INLINE void count_left(u32 pid)
{
#if SHARED
    struct share *share = lookup_share(pid);

    if (share)
        add(&share->left, 1);
#endif
}

INLINE void insert_statistics(struct statistics_key *key)
{
    u32 first = 0;
    struct statistics *empty = template.lookup(&first);

    operation(ON_ARRAY);
    operation(ON_HASH);
    if (!empty)
        return;
#if SHARED
    struct share *share = lookup_share(key->process);

    if (!share || share->counted >= STATISTICS_OF_ONE)
        return;
    if (!statistics.insert(key, empty))
        add(&share->counted, 1);
#else
    statistics.insert(key, empty);
#endif
}

/* The process that hit the probe, as user space knows it. */
INLINE u32 this_process(void)
{
#if !SHARED
    return THE_PROCESS;
#elif defined(PID_NAMESPACE_INODE)
    struct bpf_pidns_info here = {};

    bpf_get_ns_current_pid_tgid(PID_NAMESPACE_DEVICE, PID_NAMESPACE_INODE, &here, sizeof(here));
    return here.tgid;
#else
    return bpf_get_current_pid_tgid() >> 32;
#endif
}

/* Requests */

/* The set that a request is in, or 0 where there are none. */
INLINE struct request_set *set_of(u64 request, u32 process)
{
#if HAVE_ATOMICS
    /* Fibonacci hashing of the address, which is a multiple of 8 or 16, and the process. */
    u32 index = ((request + ((u64)process << 20)) * 0x9e3779b97f4a7c15ULL) >> (64 - SET_BITS);

    return lookup_set(index);
#else
    return 0;
#endif
}

/* The way of its set that the request is in, or 0. */
INLINE struct request_record *find_way(struct request_set *set, u64 request, u32 process)
{
    if (!set)
        return 0;
#pragma unroll
    for (int way = 0; way < WAYS; way++)
        if (set->ways[way].request == request && set->ways[way].process == process)
            return &set->ways[way];
    return 0;
}

/* The request in `overflow`, or 0. */
INLINE struct request_record *find_overflow(u64 request, u32 pid, struct process *process)
{
    struct request_key key = {.request = request, .process = pid};

    return process->overflow || !HAVE_ATOMICS ? lookup_overflow(&key) : 0;
}

INLINE void forget(struct request_record *record)
{
    struct request_key key = {.request = record->request, .process = record->process};

    if (record->flags & FLAG_OVERFLOW) {
        if (delete_overflow(&key))
            count_left(key.process);
        return;
    }
    record->process = 0;
#if HAVE_ATOMICS && defined(__aarch64__)
    /* In this order on every processor: whoever sees the place free may take it. */
    exchange_if(&record->request, key.request, 0);
#else
    record->request = 0;
#endif
}

/* Fills a place that is ours; `process` last: until then nobody takes it for a record. */
INLINE void fill(struct request_record *place, struct request_record *record)
{
    place->submit_ns = record->submit_ns;
    place->done_ns = record->done_ns;
    place->fd = record->fd;
    place->kind = record->kind;
    place->flags = record->flags;
    place->process = record->process;
}

#define STORED 0
#define NO_ROOM 1
#define MET 2

/* Follow a request. With `may_meet`, another processor may do so at the same moment, with the request's other
 * hit; then at least one of the two sees it, and none is left. */
INLINE int store(struct request_set *set, struct process *process, struct request_record *record, bool may_meet)
{
    struct request_key key = {.request = record->request, .process = record->process};
    struct request_record *place = 0;
    u32 own = 0;
    int error;

    if (set) {
#if WAYS_OF_ONE < WAYS
#pragma unroll
        for (int way = 0; way < WAYS; way++)
            own += set->ways[way].process == record->process;
#endif
#pragma unroll
        for (int way = 0; way < WAYS; way++) {
            if (!place && own < WAYS_OF_ONE && !set->ways[way].request && !exchange_if(&set->ways[way].request, 0, record->request)) {
                place = &set->ways[way];
                fill(place, record);
            }
        }
    }
    if (place) {
        if (!may_meet)
            return STORED;
#pragma unroll
        for (int way = 0; way < WAYS; way++) {
            struct request_record *other = &set->ways[way];

            if (other != place && other->request == record->request &&
                (!other->process || other->process == record->process)) {
                forget(other);
                forget(place);
                return MET;
            }
        }
        return STORED;
    }
    if (!may_overflow(record->process, process))
        return NO_ROOM;
    process->overflow = 1;
    record->flags |= FLAG_OVERFLOW;
    error = may_meet ? insert_overflow(&key, record) : update_overflow(&key, record);
    if (error == -EEXIST) {
        if (delete_overflow(&key))
            count_left(record->process);
        return MET;
    }
    if (error)
        return NO_ROOM;
    count_entered(record->process);
    return STORED;
}

INLINE void count_missed(u32 pid)
{
    struct process *process = lookup_process(pid);

    if (process)
        add(&process->missed, 1);
}

/* Statistics */

/* The counts of one kind on one file. When there are too many files, those of the kind. */
INLINE struct statistics *counts_of(u32 process, u32 kind, s32 fd)
{
    struct statistics_key key = {.process = process, .kind = kind, .fd = fd};
    struct statistics *s = lookup_statistics(&key);

    if (s)
        return s;
    insert_statistics(&key);
    s = lookup_statistics(&key);
    if (s)
        return s;
    key.fd = NO_FD;
    return lookup_statistics(&key);
}

/* The highest bit's number is the count of bits once all below are set. Without branches: with them the
 * verifier looks at 2^18 paths through a callback, and takes fifty milliseconds for it. */
INLINE u32 bucket_of(u64 ns)
{
    u64 bits = ns | 1;
    u32 octave;

    bits |= bits >> 1;
    bits |= bits >> 2;
    bits |= bits >> 4;
    bits |= bits >> 8;
    bits |= bits >> 16;
    bits |= bits >> 32;
    bits -= (bits >> 1) & 0x5555555555555555ULL;
    bits = (bits & 0x3333333333333333ULL) + ((bits >> 2) & 0x3333333333333333ULL);
    bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
    octave = ((bits * 0x0101010101010101ULL) >> 56) - 1;
    if (octave < SUB_BUCKET_BITS)
        return ns;
    return (octave << SUB_BUCKET_BITS) |
           ((ns >> (octave - SUB_BUCKET_BITS)) & ((1 << SUB_BUCKET_BITS) - 1));
}

INLINE void record_stage(struct statistics *s, u32 stage, u64 from_ns, u64 to_ns)
{
    struct stage_statistics *st = &s->stages[stage];
    u64 ns = to_ns > from_ns ? to_ns - from_ns : 0;
    u32 bucket = bucket_of(ns) & (BUCKETS - 1); /* the verifier wants to see that it is none of another */

    if (ns > st->max_ns)
        st->max_ns = ns;
    add(&st->buckets[bucket], 1);
}

/* Whether the request has no callback: being done was all. Only some callback sites see such. */
INLINE bool nobody_waits(u64 request)
{
#if CALLBACK_MAY_BE_NULL
    u64 callback = 1;

    bpf_probe_read_user(&callback, sizeof(callback), (void *)(request + REQUEST_CALLBACK));
    return !callback;
#else
    return false;
#endif
}

/* thread_pool_cancel takes a request from the pool before a worker does, and says so in ret. */
INLINE bool was_cancelled(u64 request)
{
    int ret = 0;

    bpf_probe_read_user(&ret, sizeof(ret), (void *)(request + REQUEST_RET));
    return ret == -ECANCELED;
}

/* Kind and file by RawPosixAIOData, believed only where exactly one operation's bit is set. Other users
 * of the pool (qcow2 compression and encryption) have sizes and offsets there. */
INLINE void read_operation(struct request_record *record, u64 arg)
{
    u32 words[ARG_WORDS] = {};
    u32 type, operation, kind;

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

/* The probes */

INLINE int at_submit(u64 request)
{
    u32 pid = this_process();
    struct request_record record = {.request = request, .process = pid, .fd = NO_FD};
    struct process *process = lookup_process(pid);
    struct request_set *set;
    struct request_record *old;
    u64 words[WORDS_TO_ARG] = {};

    if (!process || process->mode != MODE_FULL)
        return 0;
    if (!bpf_probe_read_user(words, sizeof(words), (void *)(request + REQUEST_CALLBACK))) {
        read_operation(&record, words[WORDS_TO_ARG - 1]);
        if (!words[0])
            record.flags = FLAG_NO_CALLBACK;
    }
    record.submit_ns = bpf_ktime_get_ns();
    set = set_of(request, pid);
    old = find_way(set, request, pid);
    if (!old)
        old = find_overflow(request, pid, process);
    if (old) {
        /* The address is recycled, and the end of the request before was not seen. */
        if (!(old->flags & (FLAG_NO_CALLBACK | FLAG_BEFORE)) && old->done_ns != CALLED)
            count_missed(pid);
        record.flags |= old->flags & FLAG_OVERFLOW;
        fill(old, &record);
    } else if (store(set, process, &record, false) == NO_ROOM) {
        add(&process->map_full, 1);
    }
    return 0;
}

/* Without the submit probe this is the first that is seen of a request. With it, it was submitted before we
 * came, or is not followed, or has been called back already. */
INLINE int at_unknown_done(u64 request, u32 pid, struct request_set *set, struct process *process, u64 now)
{
    struct request_record record = {.request = request, .done_ns = now, .process = pid, .fd = NO_FD};

    if (process->mode == MODE_ALERT && store(set, process, &record, true) == NO_ROOM)
        add(&process->map_full, 1);
    return 0;
}

INLINE int at_done(u64 request)
{
    u64 now = bpf_ktime_get_ns();
    u32 pid = this_process();
    struct request_set *set = set_of(request, pid);
    struct request_record *record = find_way(set, request, pid);
    struct process *process;
    struct statistics *s;

    if (!record) {
        process = lookup_process(pid);
        if (!process)
            return 0;
        record = find_overflow(request, pid, process);
        if (!record)
            return at_unknown_done(request, pid, set, process, now);
    }
    if (record->done_ns == CALLED) {
        /* Its callback came first and has counted it; a stamp that is old is of another time. */
        if (record->submit_ns + CALLED_FOR_NS > now) {
            if (record->flags >= CALLED_AGAIN)
                record->flags -= CALLED_AGAIN;
            else
                forget(record);
            return 0;
        }
        record->submit_ns = 0;
        record->flags &= FLAG_OVERFLOW;
    } else if (record->done_ns && !record->submit_ns) {
        count_missed(pid);
    }
    /* One that is set is of the request before at this address, whose hit came late. */
    record->done_ns = now;
    if (!(record->flags & FLAG_NO_CALLBACK))
        return 0;
    s = counts_of(pid, record->kind, record->fd);
    if (s) {
        add(&s->completed, 1);
        add(&s->no_callback, 1);
        record_stage(s, SUBMIT_TO_DONE, record->submit_ns, now);
    }
    forget(record);
    return 0;
}

/* A callback of a request that is not followed: it was submitted before we came, or (without the submit
 * probe) its callback comes before its done hit. */
INLINE int at_unknown_callback(u64 request, u32 pid, struct request_set *set, struct process *process, u64 now)
{
    struct request_record called = {
        .request = request, .submit_ns = now, .done_ns = CALLED, .process = pid, .fd = NO_FD};
    struct statistics *s;

    if (process->mode == MODE_NONE || nobody_waits(request))
        return 0;
    s = counts_of(pid, KIND_OTHER, NO_FD);
    if (!s)
        return 0;
    if (process->mode == MODE_FULL) {
        add(&s->before, 1);
    } else if (was_cancelled(request)) {
        add(&s->cancelled, 1);
    } else {
        add(&s->completed, 1);
        /* Before that it may be one whose done hit was not seen, and the next at this address would be taken
         * for it, and so would the one after that. */
        if (now >= process->settled_ns)
            store(set, process, &called, true);
    }
    return 0;
}

INLINE int at_callback(u64 request)
{
    u64 now = bpf_ktime_get_ns();
    u32 pid = this_process();
    struct request_set *set = set_of(request, pid);
    struct request_record *record = find_way(set, request, pid);
    struct process *process;
    struct statistics *s;
    u64 submit_ns, done_ns;
    u32 flags;

    if (!record) {
        process = lookup_process(pid);
        if (!process)
            return 0;
        record = find_overflow(request, pid, process);
        if (!record)
            return at_unknown_callback(request, pid, set, process, now);
    }
    if (nobody_waits(request))
        return 0;
    submit_ns = record->submit_ns;
    done_ns = record->done_ns;
    flags = record->flags;
    s = counts_of(pid, record->kind, record->fd);
    if (!s) {
        forget(record);
        return 0;
    }
    if (done_ns <= CALLED && was_cancelled(request)) {
        add(flags & FLAG_BEFORE ? &s->before : &s->cancelled, 1);
        if (done_ns != CALLED)
            forget(record);
        return 0;
    }
    if (done_ns == CALLED) {
        record->flags = submit_ns + CALLED_FOR_NS > now ? flags + CALLED_AGAIN : flags & FLAG_OVERFLOW;
        record->submit_ns = now;
        add(&s->completed, 1);
        return 0;
    }
    forget(record);
    if (flags & FLAG_BEFORE) {
        add(&s->before, 1);
        return 0;
    }
    /* Without a done hit yet, the worker is still on its way to the probe. */
    if (!done_ns)
        done_ns = now;
    add(&s->completed, 1);
    record_stage(s, DONE_TO_CALLBACK, done_ns, now);
    if (now >= done_ns + s->deadline_ns)
        add(&s->late, 1);
    if (submit_ns) {
        record_stage(s, SUBMIT_TO_DONE, submit_ns, done_ns);
        record_stage(s, TOTAL, submit_ns, now);
    }
    return 0;
}

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
