"""An AioContext of a QEMU of the lab: its eventfd, its flags, its list of bottom halves.

Knows: the members of AioContext (include/block/aio.h) that lie around its EventNotifier, in this order
since QEMU commit 8c6b0356b539 (in v5.0). They prove themselves by the eventfd's number standing twice
and by the empty list of slices pointing at itself. Does not know pools or requests.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

from tracer.errors import LabError
from tracer.home import parked
from tracer.lab.process import peek, poke, refuse_foreign
from tracer.lab.qemu import Qemu
from tracer.layout import BottomHalfLayout
from tracer.target import Thread, open_target

SEARCHED = 1024  # bytes; an AioContext is smaller
SYS_PIDFD_GETFD = 438  # the same on every architecture

# From notifier.rfd backwards.
NOTIFY_ME, BH_LIST, SLICES, NOTIFIED = -36, -28, -20, -4


@dataclass(frozen=True)
class Context:
    """One AioContext: `notifier` is the address of its EventNotifier, `fd` QEMU's eventfd in it."""

    qemu: Qemu
    address: int
    notifier: int
    fd: int
    home_tid: int

    def home(self) -> Thread:
        """The thread that runs it, now."""
        thread = open_target(self.qemu.pid).thread(self.home_tid)
        if thread is None:
            raise LabError(f"thread {self.home_tid} has ended")
        return thread

    def asleep(self) -> bool:
        """Whether its thread sleeps in its poll and has said so."""
        return self.notify_me != 0 and parked(self.home())

    @property
    def notify_me(self) -> int:
        """AioContext.notify_me: aio_notify() rings the eventfd only if it is not 0."""
        return int.from_bytes(peek(self.qemu.pid, self.notifier + NOTIFY_ME, 4), "little")

    def set_notify_me(self, value: int) -> None:
        """Write it; only while its thread sleeps."""
        poke(self.qemu.pid, self.notifier + NOTIFY_ME, value.to_bytes(4, "little"))

    def forget_notification(self) -> None:
        """Clear AioContext.notified, so that aio_poll() sleeps although aio_notify() was called."""
        poke(self.qemu.pid, self.notifier + NOTIFIED, b"\0")

    def answer(self) -> None:
        """Take what was rung, in the loop's place."""
        descriptor = borrow(self.qemu.pid, self.fd)
        try:
            if self.rung():
                os.read(descriptor, 8)
        finally:
            os.close(descriptor)

    def rung(self) -> bool:
        """Whether the eventfd is rung and nobody has answered."""
        return bool(open_target(self.qemu.pid).eventfd_count(self.fd))

    def ring(self) -> None:
        """Ring the eventfd: the loop comes round once if it listens."""
        descriptor = borrow(self.qemu.pid, self.fd)
        try:
            os.write(descriptor, struct.pack("=Q", 1))
        finally:
            os.close(descriptor)

    def schedule(self, bottom_half: int, layout: BottomHalfLayout) -> None:
        """Queue a bottom half that is on no list, as qemu_bh_schedule() does, and wake the loop.

        The process is not stopped for it, which would be seen; the loop sleeps, and the pool is idle.
        """
        pid = self.qemu.pid
        flags, following = bottom_half + layout.flags, bottom_half + layout.opaque + 8
        self.qemu.wait_until(self.asleep, what="the loop to sleep")
        if not any(peek(pid, flags, 4)):
            poke(pid, following, peek(pid, self.notifier + BH_LIST, 8))
            poke(pid, flags, struct.pack("<I", layout.pending_mask | layout.scheduled_mask))
            poke(pid, self.notifier + BH_LIST, struct.pack("<Q", bottom_half))
        self.ring()


def context_at(qemu: Qemu, address: int, home_tid: int) -> Context:
    """The AioContext at `address`; LabError unless it proves itself."""
    target = open_target(qemu.pid)
    data = peek(qemu.pid, address, SEARCHED)
    for offset in range(-NOTIFY_ME, SEARCHED - 8, 4):
        rfd, wfd = struct.unpack_from("<ii", data, offset)
        slices, last = struct.unpack_from("<QQ", data, offset + SLICES)
        if rfd == wfd and not slices and last == address + offset + SLICES and target.eventfd_count(rfd) is not None:
            return Context(qemu, address, address + offset, rfd, home_tid)
    raise LabError(f"no AioContext was recognised at {address:#x}")


def borrow(pid: int, descriptor: int) -> int:
    """A duplicate of an own process's file descriptor; pidfd_getfd(2)."""
    refuse_foreign(pid)
    process = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        copy = int(libc.syscall(SYS_PIDFD_GETFD, process, descriptor, 0))
    finally:
        os.close(process)
    if copy < 0:
        raise LabError(f"cannot borrow descriptor {descriptor} of {pid}: {os.strerror(ctypes.get_errno())}")
    return copy
