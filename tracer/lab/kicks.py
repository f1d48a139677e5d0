"""Wake-ups that get lost: the bottom half is scheduled, and its loop sleeps on.

Knows: how to hold one thread of a QEMU of the lab with ptrace while its workers go on, and what to do
to the eventfd by which they would wake it. Does not know how pools are found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator

from tracer.errors import LabError
from tracer.lab.faults import LostCompletion, PoolHandle, requests_of
from tracer.lab.process import peek, poke, refuse_foreign
from tracer.lab.qemu import Qemu
from tracer.lab.storage import Storage
from tracer.layout import RequestState
from tracer.target import Target, Thread, open_target

PTRACE_DETACH = 17
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
WAIT_ALL = 0x40000000
PIDFD_GETFD = 438  # the same number on every architecture
POLLFD = struct.Struct("<ihh")  # fd, events, revents
ACTIVE = [RequestState.THREAD_ACTIVE]
DONE = [RequestState.THREAD_DONE]


def lose_kick(qemu: Qemu, slow: Storage, pool: PoolHandle, drive: str = "d0", unpolled: bool = False) -> LostCompletion:
    """Make a write to `drive`, which is on `slow`, be done while its home thread sleeps through the news.

    The home thread is held in its ppoll() until the request is THREAD_DONE. Then the eventfd is
    emptied (a lost kick), or, with `unpolled`, taken out of the set that ppoll() watches (a kick to a
    bell nobody listens to). Let go, the thread sleeps on. Qemu.kick() cures either.

    LabError where the loop listens through io_uring (seen in 11.1): that has heard it already.
    """
    target = open_target(qemu.pid)
    iothread = qemu.drives[drive].iothread
    tid = qemu.iothread_ids()[iothread] if iothread else qemu.pid
    with contextlib.ExitStack() as hold:
        with slow.held():
            qemu.submit(drive, "write")
            qemu.wait_until(lambda: _states(qemu, pool) == ACTIVE, what="the write to reach the storage")
            qemu.wait_until(lambda: _asleep(target, tid), 10, "the home thread to sleep in ppoll")
            before = _eventfds(target)
            hold.enter_context(_held_thread(qemu, tid))
        qemu.wait_until(lambda: _states(qemu, pool) == DONE, what="the write to be THREAD_DONE")
        rung = qemu.wait_until(lambda: _rung(before, _eventfds(target)), what="the worker's kick")
        if unpolled:
            _unpoll(qemu, _thread(target, tid), rung)
        else:
            _drain(qemu, rung)
    qemu.wait_until(lambda: _asleep(target, tid), what="the home thread to sleep on")
    if _states(qemu, pool) != DONE:
        raise LabError("the home thread woke in spite of all")
    return LostCompletion(qemu, pool, drive, tuple(requests_of(qemu, pool)))


def _states(qemu: Qemu, pool: PoolHandle) -> list[int]:
    return list(requests_of(qemu, pool).values())


def _thread(target: Target, tid: int) -> Thread:
    thread = target.thread(tid)
    if thread is None:
        raise LabError(f"thread {tid} has ended")
    return thread


def _asleep(target: Target, tid: int) -> bool:
    call = _thread(target, tid).syscall
    return call is not None and call.name == "ppoll"


@contextlib.contextmanager
def _held_thread(qemu: Qemu, tid: int) -> Iterator[None]:
    """One thread stopped for the time of the block; a system call it sleeps in starts anew after it."""
    refuse_foreign(qemu.pid)
    _ptrace(PTRACE_SEIZE, tid)
    try:
        _ptrace(PTRACE_INTERRUPT, tid)
        os.waitpid(tid, WAIT_ALL)
        yield
    finally:
        _ptrace(PTRACE_DETACH, tid)


def _ptrace(request: int, tid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(ctypes.c_long(request), ctypes.c_long(tid), None, None) < 0:
        raise LabError(f"ptrace of thread {tid}: {os.strerror(ctypes.get_errno())}")


def _eventfds(target: Target) -> dict[int, int]:
    """The counter of every eventfd of the process, by file descriptor."""
    descriptors = [int(name) for name in os.listdir(f"/proc/{target.pid}/fd")]
    counts = {descriptor: target.eventfd_count(descriptor) for descriptor in descriptors}
    return {descriptor: count for descriptor, count in counts.items() if count is not None}


def _rung(before: dict[int, int], after: dict[int, int]) -> list[int]:
    """The eventfds that were written to in between."""
    return [descriptor for descriptor, count in after.items() if count > before.get(descriptor, 0)]


def _drain(qemu: Qemu, descriptors: list[int]) -> None:
    """Read the eventfds empty, through descriptors of our own for them."""
    process = os.pidfd_open(qemu.pid)
    try:
        for descriptor in descriptors:
            own = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, descriptor, 0)
            os.read(own, 8)
            os.close(own)
    finally:
        os.close(process)


def _unpoll(qemu: Qemu, thread: Thread, descriptors: list[int]) -> None:
    """Take the descriptors out of the array of the ppoll() in which the thread stands."""
    if thread.syscall is None or thread.syscall.name != "ppoll":
        raise LabError(f"thread {thread.tid} is not in ppoll")
    array, count = thread.syscall.args[:2]
    data = peek(qemu.pid, array, count * POLLFD.size)
    for index, (descriptor, _, revents) in enumerate(POLLFD.iter_unpack(data)):
        if descriptor in descriptors:
            # glib compares the descriptors afterwards: leave them, and ask for no event.
            poke(qemu.pid, array + index * POLLFD.size, POLLFD.pack(descriptor, 0, revents))
