"""Which thread runs an AioContext, and what it would hear if somebody rang.

Knows: threads, their stacks and poll sets, and that an AioContext (include/block/aio.h) holds the
eventfd of its EventNotifier. Does not know requests or causes.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Sequence

from tracer.errors import FaultError
from tracer.records import dataclass
from tracer.target import FILE_SYSCALLS, Region, Thread
from tracer.view import ProcessView

#: System calls in which an event loop waits: glib's and QEMU's poll, epoll, io_uring.
POLLS = frozenset({"poll", "ppoll", "epoll_wait", "epoll_pwait", "epoll_pwait2", "io_uring_enter"})
#: System calls in which a worker does its work.
WORK_SYSCALLS = FILE_SYSCALLS | {"copy_file_range"}
#: How much of an AioContext is searched for its notifier, and of a stack for its context; bytes.
CONTEXT_SIZE = 1024
STACK_SIZE = 1 << 20
TLS_SIZE = 8192
#: What a search through stacks takes at most, of a processor's time; seconds.
MOST_S = 0.5
#: From AioContext.bh_slice_list to AioContext.notifier; bytes.
SLICES = 20
MAX_POLL_SET = 65536
#: Names of threads that run no context, where QEMU names its threads (-name debug-threads=on).
NOT_HOME = r"^(worker|CPU )"
#: The same of threads that do no request.
NOT_WORKER = r"^(IO |CPU )"


@dataclass(frozen=True)
class Bell:
    """The eventfd that wakes a context's thread; None where it could not be found."""

    fd: int | None
    count: int | None
    polled: bool | None  # whether the thread's poll listens to it


def find_home(view: ProcessView, context: int, main_context: int | None, worker_code: range) -> int | None:
    """The tid of the thread that runs `context`, or None when that does not show.

    The main context is run by the main thread. An iothread has its context's address in its stack or
    thread-local storage. Workers, which have a return address into `worker_code` on their stack, may
    hold it too and are left out; two candidates are none. Where it is not known which context is the main one, or
    no stack tells, the thread whose poll listens to the context's bell does.
    """
    if context == main_context:
        return view.pid
    if main_context is None and (listener := _listener(view, context)) is not None:
        return listener
    return _by_stack(view, context, main_context, worker_code) or (
        None if main_context is None else _listener(view, context)
    )


def _listener(view: ProcessView, context: int) -> int | None:
    """The one thread that sleeps in a poll of the context's bell.

    The main thread's poll is of the main context alone, whoever else drains that. Others run a context where the main
    thread sleeps in a poll of its own, and so drains nothing.
    """
    fd = find_bell(view, context, None).fd
    main = view.thread(view.pid)
    if fd is None or main is None or not parked(main):
        return None
    if _listens(view, main, fd):
        return main.tid
    others = [thread for thread in view.threads() if thread.tid != main.tid and not re.match(NOT_HOME, thread.name)]
    found = [thread.tid for thread in others if _listens(view, thread, fd)]
    return found[0] if len(found) == 1 else None


def _by_stack(view: ProcessView, context: int, main_context: int | None, worker_code: range) -> int | None:
    regions = view.regions()
    until = time.thread_time() + MOST_S
    candidates = []
    for thread in view.threads():
        if re.match(NOT_HOME, thread.name) or (main_context is not None and thread.tid == view.pid):
            continue
        if _holds(view, _stack(view, regions, thread), context, worker_code):
            candidates.append(thread)
        if time.thread_time() >= until:
            return None
    named = [thread for thread in candidates if thread.name.startswith("IO ")]
    for some in (named, candidates):
        if len(some) == 1:
            return some[0].tid
    return None


def is_worker(view: ProcessView, regions: list[Region], thread: Thread, worker_code: range) -> bool:
    """Whether a sleeping thread is inside worker_thread, by a return address on its stack."""
    return _returns_into(view, _words(_stack(view, regions, thread)), worker_code)


def _stack(view: ProcessView, regions: list[Region], thread: Thread) -> bytes:
    """A sleeping thread's stack from its stack pointer on, with the thread-local storage above it."""
    if thread.syscall is None:
        return b""
    sp = thread.syscall.sp & ~7
    top = next((region.end for region in regions if region.start <= sp < region.end), sp)
    try:
        if top - sp <= STACK_SIZE:
            return view.memory.read(sp, top - sp)
        return view.memory.read(sp, STACK_SIZE) + view.memory.read(top - TLS_SIZE, TLS_SIZE)
    except FaultError:
        return b""


def _words(stack: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(stack) // 8}Q", stack[: len(stack) // 8 * 8])


def _holds(view: ProcessView, stack: bytes, context: int, worker_code: range) -> bool:
    words = _words(stack)
    return context in words and not _returns_into(view, words, worker_code)


def _returns_into(view: ProcessView, words: tuple[int, ...], code: range) -> bool:
    return any(view.machine.code_address(word) in code for word in words)


def parked(thread: Thread) -> bool:
    """Whether the thread sleeps in a poll."""
    return thread.syscall is not None and thread.syscall.name in POLLS


def find_poller(
    view: ProcessView, context: int, home: Thread | None, threads: Sequence[Thread], worker_code: range
) -> Thread | None:
    """The thread, other than `home`, that sleeps in a poll of `context`, or None where that does not show.

    That is one which waits in aio_poll for the context's requests to end while it holds the big lock: a virtual
    processor whose guest resets a disk (block/block-backend.c, blk_drain).
    """
    fd = find_bell(view, context, None).fd
    found = []
    for thread in threads:
        if not parked(thread) or (home is not None and thread.tid == home.tid):
            continue
        listens = None if fd is None else _listens(view, thread, fd)
        if listens is None:
            listens = _holds(view, _stack(view, view.regions(), thread), context, worker_code)
        if listens:
            found.append(thread)
    return found[0] if len(found) == 1 else None


def find_bell(view: ProcessView, context: int, thread: Thread | None) -> Bell:
    """The context's notifier: the one eventfd whose number stands twice in a row in the AioContext.

    EventNotifier (include/qemu/event_notifier.h) has rfd and wfd, the same eventfd on Linux.
    """
    try:
        data = view.memory.read(context, CONTEXT_SIZE)
    except FaultError:
        return Bell(None, None, None)
    bells = {fd: count for fd in notifiers(data, context) if (count := view.eventfd_count(fd)) is not None}
    if len(bells) != 1:
        return Bell(None, None, None)
    fd, count = bells.popitem()
    return Bell(fd, count, None if thread is None else _listens(view, thread, fd))


def notifiers(data: bytes, context: int) -> set[int]:
    """The numbers that may be the eventfd in the bytes of the AioContext at `context`.

    Counters of a context may be equal, too, and happen to be an eventfd's number (seen in 11.1). Since QEMU
    commit 8c6b0356b539 (in v5.0) the notifier stands 20 bytes after bh_slice_list, which points at itself
    while it is empty; where that shows, only that number counts.
    """
    words = struct.unpack(f"<{len(data) // 4}i", data[: len(data) // 4 * 4])
    pairs = {4 * index: a for index, (a, b) in enumerate(zip(words, words[1:])) if a == b and a > 2}
    proved = {fd for offset, fd in pairs.items() if offset >= SLICES and _empty_list(data, context, offset - SLICES)}
    return proved or set(pairs.values())


def _empty_list(data: bytes, context: int, offset: int) -> bool:
    """Whether an empty QSIMPLEQ (include/qemu/queue.h) stands there: no first, last points at first."""
    return struct.unpack_from("<QQ", data, offset) == (0, context + offset)


def _listens(view: ProcessView, thread: Thread, fd: int) -> bool | None:
    """Whether the poll that the thread sleeps in includes `fd`; None where that cannot be read."""
    call = thread.syscall
    if call is None or call.name not in POLLS:
        return None
    if call.name in ("poll", "ppoll"):
        return fd in _poll_set(view, call.args[0], call.args[1])
    if call.name.startswith("epoll"):
        return view.epoll_holds(call.args[0], fd)
    return None


def _poll_set(view: ProcessView, address: int, count: int) -> set[int]:
    if not 0 < count <= MAX_POLL_SET:
        return set()
    try:
        data = view.memory.read(address, count * 8)
    except FaultError:
        return set()
    return {fd for fd, _events, _revents in struct.iter_unpack("<ihh", data)}
