"""The thread pools and requests that QEMU itself holds in memory.

Knows: how to read ThreadPool, ThreadPoolElement and QEMUBH by a Layout, and how to find all pools
without a probe. Does not know events, time or causes. Every structure proves itself by its back links
before it is believed, every walk is bounded, and a torn list is a partial result with a reason.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable, Iterator

from tracer.errors import FaultError, LayoutError, OutOfBounds
from tracer.layout import Layout, RequestState
from tracer.memory import CHUNK, MemoryReader, read_u64
from tracer.records import dataclass

MAX_REQUESTS = 65536
#: A QEMU has a pool for each AioContext, so for each iothread.
MAX_POOLS = 1024
#: Words that would be a pool's bottom half, most of them in memory that was freed.
MAX_CANDIDATES = 65536
STATES = frozenset(map(int, RequestState))
_ZEROES = bytes(CHUNK)
#: How often a list that changes while it is read is read again.
WALKS = 5
#: QEMU allows at most 64 threads a pool by default; anything far above is not a thread counter.
MAX_THREADS = 1 << 20


@dataclass(frozen=True)
class BottomHalf:
    """`struct QEMUBH` (util/async.c) of a pool at one moment."""

    address: int
    scheduled: bool
    flags: int


@dataclass(frozen=True)
class ThreadCounts:
    """Worker threads of a pool; None where this build's offset was not found."""

    current: int | None
    idle: int | None
    max: int | None
    new: int | None = None  # to be started
    pending: int | None = None  # being started


@dataclass(frozen=True)
class Pool:
    """One proved `ThreadPool` (util/thread-pool.c) and the AioContext that it belongs to."""

    address: int
    context: int
    bottom_half: int


@dataclass(frozen=True)
class Request:
    """One `ThreadPoolElement` (util/thread-pool.c) at one moment."""

    address: int
    pool: int
    state: RequestState
    ret: int | None  # None until it is THREAD_DONE
    func: int
    arg: int
    callback: int
    opaque: int
    next: int
    prev: int


@dataclass(frozen=True)
class RequestList:
    """The requests on `pool->head`; `torn` says why the list is incomplete, or is None."""

    requests: tuple[Request, ...]
    torn: str | None = None

    def kept_in(self, later: RequestList) -> bool:
        """Whether no request left between these two: what was there is the later one's end still, in the same order.

        Only the completion bottom half takes requests off, and it takes all that are finished: while one stays, none
        leaves.
        """
        then, now = ([request.address for request in listed.requests] for listed in (self, later))
        return len(now) >= len(then) and now[len(now) - len(then) :] == then

    def holds(self, address: int) -> bool | None:
        """Whether the element is among them; None when that could not be read to the end."""
        if any(request.address == address for request in self.requests):
            return True
        return False if self.torn is None else None


def _words_found(chunks: Iterable[tuple[int, bytes]], word: int) -> Iterator[int]:
    """Where that 64-bit word stands, at multiples of 8.

    An address begins or ends with zero bytes, with which a search would find a place to look closer at in every byte
    of empty memory: they are left out of what is searched for. And `re` is twice as fast as bytes.find.
    """
    packed = struct.pack("<Q", word % (1 << 64))
    if not word:
        return
    shift = len(packed) - len(packed.lstrip(b"\0"))
    search = re.compile(re.escape(packed.strip(b"\0")), re.DOTALL).finditer
    for base, data in chunks:
        if _ZEROES.startswith(data):
            continue
        for found in search(data):
            at = found.start() - shift
            if at >= 0 and not (base + at) & 7 and data[at : at + 8] == packed:
                yield base + at


class PoolReader:
    """Reads pools by `layout`; `completion_bh` is the address of thread_pool_completion_bh in the process."""

    def __init__(self, memory: MemoryReader, layout: Layout, completion_bh: int) -> None:
        self._memory = memory
        self._layout = layout
        self._completion_bh = completion_bh

    def find(self, chunks: Iterable[tuple[int, bytes]]) -> list[Pool]:
        """All pools whose completion bottom half stands in the memory given.

        A QEMUBH whose `cb` is thread_pool_completion_bh belongs to a pool; its `opaque` is the pool, and
        the pool points back. Stale copies in freed memory do not prove themselves and are left out.
        Raises OutOfBounds where there are more of them than any QEMU has.
        """
        pools: dict[int, Pool] = {}
        for count, address in enumerate(_words_found(chunks, self._completion_bh)):
            pool = self._pool_of_bottom_half(address - self._layout.bottom_half.callback)
            if pool:
                pools[pool.address] = pool
            if len(pools) > MAX_POOLS or count >= MAX_CANDIDATES:
                raise OutOfBounds(f"the process holds more than {MAX_POOLS} thread pools or what looks like one")
        return sorted(pools.values(), key=lambda pool: pool.address)

    def _pool_of_bottom_half(self, bottom_half: int) -> Pool | None:
        try:
            pool = self.pool(read_u64(self._memory, bottom_half + self._layout.bottom_half.opaque))
        except (FaultError, LayoutError):
            return None
        return pool if pool.bottom_half == bottom_half else None

    def pool(self, address: int) -> Pool:
        """The pool at `address`, proved: its bottom half calls thread_pool_completion_bh with this pool.

        Raises LayoutError if it is no pool, FaultError if it cannot be read.
        """
        layout = self._layout
        context = read_u64(self._memory, address + layout.pool.context)
        bottom_half = read_u64(self._memory, address + layout.pool.completion_bh)
        if not context or not bottom_half:
            raise LayoutError(f"no thread pool at {address:#x}")
        if (
            read_u64(self._memory, bottom_half + layout.bottom_half.callback) != self._completion_bh
            or read_u64(self._memory, bottom_half + layout.bottom_half.opaque) != address
            or read_u64(self._memory, bottom_half + layout.bottom_half.context) != context
        ):
            raise LayoutError(f"no thread pool at {address:#x}: its bottom half does not point back")
        return Pool(address, context, bottom_half)

    def bottom_half(self, pool: Pool) -> BottomHalf:
        """The pool's completion bottom half now."""
        layout = self._layout.bottom_half
        data = self._memory.read(pool.bottom_half + layout.flags, layout.flags_width)
        flags = int.from_bytes(data, "little")
        return BottomHalf(pool.bottom_half, bool(flags & layout.scheduled_mask), flags)

    def threads(self, pool: Pool) -> ThreadCounts:
        """The pool's thread counters now; what is not known or not sane is None."""
        return ThreadCounts(
            self._counter(pool, self._layout.pool.cur_threads),
            self._counter(pool, self._layout.pool.idle_threads),
            self._counter(pool, self._layout.pool.max_threads),
            self._counter(pool, self._layout.pool.new_threads),
            self._counter(pool, self._layout.pool.pending_threads),
        )

    def _counter(self, pool: Pool, offset: int | None) -> int | None:
        if offset is None:
            return None
        value: int = struct.unpack("<i", self._memory.read(pool.address + offset, 4))[0]
        return value if 0 <= value <= MAX_THREADS else None

    def request(self, address: int) -> Request:
        """The element at `address` as it reads now; its pool is not checked.

        Raises LayoutError where the state is none, FaultError where it cannot be read.
        """
        layout = self._layout.element
        data = self._memory.read(address, layout.size)

        def word(offset: int) -> int:
            value: int = struct.unpack_from("<Q", data, offset)[0]
            return value

        (state,) = struct.unpack_from("<i", data, layout.state)
        (ret,) = struct.unpack_from("<i", data, layout.ret)
        if state not in STATES:
            raise LayoutError(f"no request at {address:#x}: its state would be {state}")
        return Request(
            address,
            word(layout.pool),
            RequestState(state),
            ret if state == RequestState.THREAD_DONE else None,
            word(layout.func),
            word(layout.arg),
            word(layout.callback),
            word(layout.opaque),
            word(layout.next),
            word(layout.prev),
        )

    def requests(self, pool: Pool, until: float | None = None) -> RequestList:
        """Every request on the pool's list, newest first, as far as the list proves itself.

        `until`: the thread's own CPU time (seconds) at which to leave it at what was read.
        """
        found: list[Request] = []
        seen: set[int] = set()
        link = pool.address + self._layout.pool.head
        try:
            address = read_u64(self._memory, link)
            while address:
                if address in seen or len(seen) >= MAX_REQUESTS:
                    return RequestList(tuple(found), "the list goes round in circles")
                if until is not None and not len(seen) & 63 and time.thread_time() >= until:
                    return RequestList(tuple(found), "it takes too long to read the list")
                seen.add(address)
                request = self.request(address)
                if request.pool != pool.address or request.prev != link:
                    return RequestList(tuple(found), f"the element at {address:#x} does not point back")
                found.append(request)
                link = address + self._layout.element.next
                address = request.next
        except (FaultError, LayoutError) as error:
            return RequestList(tuple(found), error.message)
        return RequestList(tuple(found))

    def patient_requests(self, pool: Pool, until: float | None = None) -> RequestList:
        """As requests(); a list that was torn is read again, and what was seen of it put together."""
        found: dict[int, Request] = {}
        for _ in range(WALKS):
            listed = self.requests(pool, until)
            found |= {request.address: request for request in listed.requests}
            if listed.torn is None:
                return listed
            if until is not None and time.thread_time() >= until:
                break
        return RequestList(tuple(found.values()), listed.torn)

    def linked(self, pool: Pool, address: int) -> Request | None:
        """The request at `address` if it is one of the pool's and what stands before it on the list points at it."""
        try:
            request = self.request(address)
            if request.pool != pool.address or read_u64(self._memory, request.prev) != address:
                return None
        except (FaultError, LayoutError):
            return None
        return request

    def holds(self, pool: Pool, address: int) -> bool | None:
        """Whether the element is on the pool's list; None when that could not be read to the end."""
        for _ in range(WALKS):
            held = self.requests(pool).holds(address)
            if held is not None:
                return held
        return None
