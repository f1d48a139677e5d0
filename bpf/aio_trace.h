/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What crosses the border between kernel and user space. tracer/probes.py has the same structures in
 * ctypes; a test compares the two. Fixed widths, explicit padding, the unit in the name.
 */
#ifndef AIO_TRACE_H
#define AIO_TRACE_H

/* A request's kind is the lowest bit of its aio_type plus one, 0 where that is not known. The bits
 * are QEMU's (include/block/raw-aio.h): read, write, ioctl, flush, discard, write-zeroes,
 * copy-range, truncate. */
#define KIND_OTHER 0
#define KINDS 9

/* Stages of a request. */
#define SUBMIT_TO_DONE 0
#define DONE_TO_CALLBACK 1
#define TOTAL 2
#define STAGES 3

/* Four buckets an octave of nanoseconds, up to 2^42 ns, more than an hour. */
#define SUB_BUCKET_BITS 2
#define BUCKETS (43 << SUB_BUCKET_BITS)

/* Flags of a request. */
#define FLAG_NO_CALLBACK 1 /* it has no callback function: being done is all that happens to it */
#define FLAG_BEFORE 2      /* it was in QEMU's memory already when we came; its times are when we saw it */

/* One request that is under way; the key is the address of its ThreadPoolElement. Its memory is
 * recycled, so (address, submit_ns, done_ns) names the request. */
struct request_record {
    u64 submit_ns; /* CLOCK_MONOTONIC; 0 where the submit probe is not used */
    u64 done_ns;   /* CLOCK_MONOTONIC; 0: not done yet */
    u32 kind;
    u32 flags;
    s32 fd;        /* the file that it is on, NO_FD where not known */
    u32 reserved;
};

/* Counts are kept by what a request does and the file descriptor that it does it on. */
#define NO_FD (-1)

struct statistics_key {
    u32 kind;
    s32 fd;
};

struct stage_statistics {
    u64 count;
    u64 sum_ns;
    u64 max_ns;
    u64 buckets[BUCKETS];
};

/* Counts of one kind on one file, per CPU. */
struct statistics {
    u64 submitted;
    u64 done;
    u64 completed;
    u64 cancelled;
    u64 no_callback;  /* completed by being done: nobody waits */
    u64 before;       /* its end was seen here, but it was submitted before we came */
    u64 map_full;     /* could not be followed: the map of requests is full */
    u64 late;         /* completed, but its callback came DEADLINE_NS or more after DONE */
    u64 missed;       /* a probe's hit was not seen: address recycled, or DONE without its hit */
    struct stage_statistics stages[STAGES];
};

#endif
