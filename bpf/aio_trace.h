/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What crosses the border between kernel and user space. tracer/maps.py has the same structures in
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

/* Four buckets an octave of nanoseconds. */
#define SUB_BUCKET_BITS 2
#define BUCKETS (64 << SUB_BUCKET_BITS)

/* Flags of a request. */
#define FLAG_NO_CALLBACK 1 /* it has no callback function: being done is all that happens to it */
#define FLAG_BEFORE 2      /* it was submitted before we came; of its times only DONE may be true */
#define FLAG_OVERFLOW 4    /* it is in the map `overflow` */

/* In place of done_ns, without the submit probe: the callback came before the done hit, which will find this
 * and clear it away. submit_ns is when the callback came; the flags have CALLED_AGAIN times one more that
 * came so, of the next request at this address. */
#define CALLED 1
#define CALLED_AGAIN 256

/* One request that is under way: process and address of its ThreadPoolElement. Its memory is recycled,
 * so (process, address, submit_ns, done_ns) names the request. Free where `request` or `process` is 0. */
struct request_record {
    u64 request;
    u64 submit_ns; /* CLOCK_MONOTONIC; 0 where the submit probe did not see it */
    u64 done_ns;   /* CLOCK_MONOTONIC; 0: not done yet */
    u32 process;   /* the process id as user space knows it, or THE_PROCESS */
    s32 fd;        /* the file that it is on, NO_FD where not known */
    u32 kind;
    u32 flags;
};

/* The requests are in sets, found by a hash of process and address. What finds its set full is in the map
 * `overflow`. */
#define WAYS 4

struct request_set {
    struct request_record ways[WAYS];
};

/* Key of the map `overflow`. */
struct request_key {
    u64 request;
    u64 process;
};

/* Which probes count for a process. */
#define MODE_NONE 0  /* none, but they see the end of what is followed */
#define MODE_ALERT 1 /* done and callback */
#define MODE_FULL 2  /* submit, too */

/* A process that is watched; the key is its id. Programs for one process only have one of these and call the
 * process THE_PROCESS. */
#define THE_PROCESS 1

struct process {
    u32 mode;
    u32 overflow; /* 1: the map `overflow` has or had requests of this process */
    u64 map_full; /* requests that could not be followed: their set and the map `overflow` were full */
    u64 missed;   /* requests whose end was not seen: the address was recycled without it */
    u64 settled_ns; /* from then on, no request is under way that was done before its probe was there */
    s64 taken; /* requests in `overflow`: those that user space took out, less those that it put in */
};

/* What a process has of what all share; only the programs write it, and they only ever add. With `taken` it tells
 * how many requests of the process are in `overflow`. */
struct share {
    u64 entered; /* requests that the programs put into `overflow` */
    u64 left;    /* requests that they took out */
    u64 counted; /* kinds and files that are counted apart */
};

/* Counts are kept by process, what a request does and the file descriptor that it does it on. */
#define NO_FD (-1)

struct statistics_key {
    u32 process;
    u16 kind;
    u16 reserved;
    s32 fd;
};

struct stage_statistics {
    u64 max_ns;
    u64 buckets[BUCKETS];
};

/* Counts of one kind on one file of one process. */
struct statistics {
    u64 deadline_ns;  /* from when on a callback is late; from the template that the others start as */
    u64 completed;    /* called back */
    u64 cancelled;
    u64 no_callback;  /* completed by being done: nobody waits */
    u64 before;       /* its end was seen here, but it was submitted before we came */
    u64 late;         /* completed, but its callback came deadline_ns or more after DONE */
    struct stage_statistics stages[STAGES];
};

#endif
