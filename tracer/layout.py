"""Where the members of QEMU's thread-pool structures are, in one build.

Knows: offsets in bytes. An absent member raises AbsentMember, it is never 0. Does not know
addresses, processes or versions: offsets come from the code or debug info of the very build
(tracer/sites) and are proved on live structures (tracer/pools).
"""

from __future__ import annotations

from enum import IntEnum

from tracer.errors import AbsentMember
from tracer.records import dataclass


class RequestState(IntEnum):
    """`enum ThreadState` of util/thread-pool.c (CANCELED only up to QEMU 2.1.3)."""

    THREAD_QUEUED = 0
    THREAD_ACTIVE = 1
    THREAD_DONE = 2
    THREAD_CANCELED = 3


@dataclass(frozen=True)
class ElementLayout:
    """`ThreadPoolElement` (ThreadPoolElementAio since 10.0), util/thread-pool.c; offsets in bytes."""

    callback: int  # common.cb
    opaque: int  # common.opaque
    pool: int
    func: int
    arg: int
    state: int
    ret: int
    next: int  # all.le_next
    prev: int  # all.le_prev

    @property
    def size(self) -> int:
        """Bytes that hold every member above."""
        return max(self.next, self.prev) + 8


@dataclass(frozen=True)
class PoolLayout:
    """`ThreadPool` (ThreadPoolAio since 10.0), util/thread-pool.c; offsets in bytes."""

    context: int  # ctx
    completion_bh: int
    head: int
    cur_threads: int | None = None
    idle_threads: int | None = None
    new_threads: int | None = None
    pending_threads: int | None = None
    max_threads: int | None = None

    def counter(self, name: str) -> int:
        """Offset of a thread counter; AbsentMember if this build's was not found."""
        offset: int | None = getattr(self, name)
        if offset is None:
            raise AbsentMember(f"the offset of ThreadPool.{name} was not found in this build")
        return offset


@dataclass(frozen=True)
class BottomHalfLayout:
    """`struct QEMUBH`, util/async.c; offsets in bytes.

    `flags` is a 32-bit word since QEMU commit 8c6b0356b539 (in v5.0): PENDING 1, SCHEDULED 2. Before
    it is the byte `scheduled` (`flags_width` 1).
    """

    context: int
    callback: int
    opaque: int
    flags: int
    flags_width: int  # 4: flags, 1: scheduled byte
    name: int | None = None  # since 6.1

    @property
    def pending_mask(self) -> int:
        """What makes qemu_bh_schedule believe that it is queued already."""
        return 1

    @property
    def scheduled_mask(self) -> int:
        """What says that the loop was told to run it."""
        return 2 if self.flags_width == 4 else 1


@dataclass(frozen=True)
class Layout:
    """The three structures together, and how their offsets were found."""

    element: ElementLayout
    pool: PoolLayout
    bottom_half: BottomHalfLayout
    source: str
