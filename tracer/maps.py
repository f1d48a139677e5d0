"""What the probe programs keep in their maps, in Python's terms.

Knows: bpf/aio_trace.h, structure by structure, and what follows from the counts. Does not know system calls.
"""

from __future__ import annotations

import ctypes as ct
from dataclasses import field
from typing import Optional

from tracer.records import dataclass

# The same as in bpf/aio_trace.h; tests/kernel compares the two.
KINDS = ("other", "read", "write", "ioctl", "flush", "discard", "write-zeroes", "copy-range", "truncate")
STAGES = ("submit_to_done", "done_to_callback", "total")
SUB_BUCKET_BITS = 2
BUCKETS = 64 << SUB_BUCKET_BITS
FLAG_NO_CALLBACK = 1
FLAG_BEFORE = 2
FLAG_OVERFLOW = 4
CALLED = 1
CALLED_AGAIN = 256
WAYS = 4
THE_PROCESS = 1
MODE_NONE = 0
MODE_ALERT = 1
MODE_FULL = 2
NO_FD = -1


class RequestRecord(ct.Structure):
    """`struct request_record` of bpf/aio_trace.h; times in ns of CLOCK_MONOTONIC."""

    _fields_ = (
        ("request", ct.c_uint64),
        ("submit_ns", ct.c_uint64),
        ("done_ns", ct.c_uint64),
        ("process", ct.c_uint32),
        ("fd", ct.c_int32),
        ("kind", ct.c_uint32),
        ("flags", ct.c_uint32),
    )


class RequestSet(ct.Structure):
    """`struct request_set` of bpf/aio_trace.h."""

    _fields_ = (("ways", RequestRecord * WAYS),)


class RequestKey(ct.Structure):
    """`struct request_key` of bpf/aio_trace.h."""

    _fields_ = (("request", ct.c_uint64), ("process", ct.c_uint64))


class Process(ct.Structure):
    """`struct process` of bpf/aio_trace.h."""

    _fields_ = (
        ("mode", ct.c_uint32),
        ("overflow", ct.c_uint32),
        ("map_full", ct.c_uint64),
        ("missed", ct.c_uint64),
        ("settled_ns", ct.c_uint64),
        ("taken", ct.c_int64),
    )


class Share(ct.Structure):
    """`struct share` of bpf/aio_trace.h."""

    _fields_ = (("entered", ct.c_uint64), ("left", ct.c_uint64), ("counted", ct.c_uint64))


class StatisticsKey(ct.Structure):
    """`struct statistics_key` of bpf/aio_trace.h."""

    _fields_ = (("process", ct.c_uint32), ("kind", ct.c_uint16), ("reserved", ct.c_uint16), ("fd", ct.c_int32))


class StageStatistics(ct.Structure):
    """`struct stage_statistics` of bpf/aio_trace.h."""

    _fields_ = (("max_ns", ct.c_uint64), ("buckets", ct.c_uint64 * BUCKETS))


KERNEL_COUNTERS = ("deadline_ns", "completed", "cancelled", "no_callback", "before", "late")


class KindStatistics(ct.Structure):
    """`struct statistics` of bpf/aio_trace.h: one kind on one file of one process."""

    _fields_ = (
        *((name, ct.c_uint64) for name in KERNEL_COUNTERS),
        ("stages", StageStatistics * len(STAGES)),
    )


#: What is told of requests, by kind and file.
COUNTERS = ("submitted", "done", "completed", "cancelled", "no_callback", "before", "map_full", "late", "missed")

#: A kind and the file descriptor that it is on, None where that is not known.
Subject = tuple[str, Optional[int]]


@dataclass(frozen=True)
class Record:
    """A request under way as the probes saw it; its identity is all of its fields but `kind` and `fd`.

    Times in ns of CLOCK_MONOTONIC, 0 where not (yet) seen. `before`: it was there when we came.
    """

    request: int
    submit_ns: int
    done_ns: int
    kind: str
    flags: int
    fd: int | None = None

    @property
    def before(self) -> bool:
        """It was in QEMU's memory already when we came; its times are when we first saw it."""
        return bool(self.flags & FLAG_BEFORE)

    @property
    def subject(self) -> Subject:
        """Under what it is counted."""
        return self.kind, self.fd


@dataclass
class Histogram:
    """Latencies of one stage: maximum in ns, counts by bucket."""

    max_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.buckets)


@dataclass
class Statistics:
    """What is known of requests since the probes were attached: of one kind on one file, or of several."""

    submitted: int = 0
    done: int = 0
    completed: int = 0
    cancelled: int = 0
    no_callback: int = 0
    before: int = 0
    map_full: int = 0
    late: int = 0
    missed: int = 0
    stages: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in STAGES])


def record_of(raw: RequestRecord) -> Record:
    """A record as the rest of the program knows it."""
    kind = KINDS[raw.kind] if raw.kind < len(KINDS) else KINDS[0]
    fd = None if raw.fd == NO_FD else int(raw.fd)
    return Record(raw.request, raw.submit_ns, raw.done_ns, kind, raw.flags & ~FLAG_OVERFLOW, fd)


def statistics_of(raw: KindStatistics) -> Statistics:
    """What ended, as it was counted; submitted and done are these, until what is under way is added."""
    made = Statistics(
        submitted=raw.completed + raw.cancelled,
        done=raw.completed,
        completed=raw.completed,
        cancelled=raw.cancelled,
        no_callback=raw.no_callback,
        before=raw.before,
        late=raw.late,
    )
    made.stages = [Histogram(stage.max_ns, list(stage.buckets)) for stage in raw.stages]
    return made


def bucket_upper_ns(index: int) -> int:
    """The largest value in ns that falls into bucket `index`; bucket_of() of bpf/aio_trace.c reversed."""
    octave, part = index >> SUB_BUCKET_BITS, index & ((1 << SUB_BUCKET_BITS) - 1)
    if octave < SUB_BUCKET_BITS:
        return index
    width = 1 << (octave - SUB_BUCKET_BITS)
    return (1 << octave) + (part + 1) * width - 1


def set_of(request: int, process: int, set_bits: int) -> int:
    """The set that a request is in; set_of() of bpf/aio_trace.c."""
    mixed = (request + (process << 20)) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    return mixed >> 64 - set_bits
