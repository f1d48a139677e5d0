"""Faults put into a QEMU of the lab, and taken out again.

Knows: how to make QEMU lose a completion exactly as the bug does (see lose_completion), how to keep
its main loop stuck or busy. Does not know how pools are found: they come as PoolHandle from
locate_pools(), the only seam to the rest of aio-trace.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

from tracer.build import load, read_build
from tracer.errors import LabError
from tracer.lab.guest import Guest
from tracer.lab.monitor import qmp_line
from tracer.lab.process import continue_process, peek, poke, stop_process, wait_until
from tracer.lab.qemu import MIB, Qemu
from tracer.layout import Layout, RequestState
from tracer.live import LiveView
from tracer.target import Target, Thread, open_target

MAX_REQUESTS = 4096
NO_MEMORY = 1 << 40  # a guest-physical address with nothing behind it: as slow anywhere
_IN_FLIGHT = (RequestState.THREAD_QUEUED, RequestState.THREAD_ACTIVE)


@dataclass(frozen=True)
class PoolHandle:
    """One thread pool of one live process: run-time addresses of its structures, and their layout.

    `pool`: the ThreadPool; `bottom_half`: its completion_bh; `head`: the list of all its requests.
    """

    pool: int
    bottom_half: int
    head: int
    layout: Layout


@dataclass(frozen=True)
class LostCompletion:
    """Requests that are THREAD_DONE and whose callbacks nobody will run."""

    qemu: Qemu
    pool: PoolHandle
    drive: str
    requests: tuple[int, ...]

    @property
    def request(self) -> int:
        """The address of the first one, usually the only one."""
        return self.requests[0]

    def still_lost(self) -> bool:
        """Whether they still stand in the list, THREAD_DONE, with nobody told."""
        return _stuck(self.qemu, self.pool) == self.requests and not bottom_half_flags(self.qemu, self.pool)

    def free(self) -> None:
        """See free()."""
        free(self.qemu, self.drive)
        self.qemu.wait_until(lambda: not self.still_lost(), what="the lost completion to be freed")


def pool_of(qemu: Qemu, drive: str) -> PoolHandle:
    """The pool that serves that drive, by QEMU's own trace of the latest request there.

    The lab asks for one read; a guest's own requests come from the same pool.
    """
    qemu.request(drive, "read", 0, 512)
    pools = locate_pools(qemu)
    served_by = {event.pool for event in qemu.trace_events()[-1:]}
    for pool in pools:
        if pool.pool in served_by or (not served_by and len(pools) == 1):
            return pool
    raise LabError(f"which of {len(pools)} pools serves drive {drive} was not found out")


def locate_pools(qemu: Qemu) -> list[PoolHandle]:
    """Every thread pool of that QEMU, found in its memory."""
    target = open_target(qemu.pid)
    build = read_build(target.image_path, target.exe)
    with contextlib.closing(LiveView(target)) as view:
        pools = load(view, build).reader.find(view.heap_chunks())
    layout = build.located.layout
    return [PoolHandle(p.address, p.bottom_half, p.address + layout.pool.head, layout) for p in pools]


# A lost completion


def lose(qemu: Qemu, drive: str = "d0", kind: str = "write", pool: PoolHandle | None = None) -> LostCompletion:
    """Send one request of that kind (read, write, flush, discard) to the drive and lose its completion."""
    handle = pool or pool_of(qemu, drive)
    # QEMU skips a flush when nothing was written since the last one.
    before = (lambda: qemu.request(drive, "write")) if kind == "flush" else None
    return lose_completion(qemu, drive, handle, lambda: qemu.submit(drive, kind), before=before)


def lose_guest_io(guest: Guest, pool: PoolHandle | None = None) -> LostCompletion:
    """Lose the completions of the guest's own next requests; all its jobs then stand still.

    The mark stays until nothing moved for a while: any later request of the guest would free all. To take it off,
    QEMU is stopped for a moment, which must not be the moment at which the usual deadline of a second is over.
    """
    drive = next(iter(guest.drives))
    return lose_completion(guest, drive, pool or pool_of(guest, drive), None, settle=0.6)


def lose_completion(
    qemu: Qemu,
    drive: str,
    pool: PoolHandle,
    request: Callable[[], object] | None,
    *,
    before: Callable[[], object] | None = None,
    settle: float = 0.0,
    attempts: int = 50,
    timeout: float = 30.0,
) -> LostCompletion:
    """Make QEMU lose the completion of what `request` sends to `drive` (None: of the guest's own next I/O).

    While the pool's bottom half is idle it is marked as pending, so that qemu_bh_schedule believes
    it queued, sets BH_SCHEDULED and tells nobody. When every request in the pool is THREAD_DONE, and
    has been for `settle` seconds, both flags are taken off. What remains is the bug's own state. If
    anything else ran the bottom half meanwhile, try again. `before` runs ahead of each attempt.
    """
    for _ in range(attempts):
        if before is not None:
            before()
        lost = _attempt(qemu, drive, pool, request, settle, timeout)
        if lost:
            return LostCompletion(qemu, pool, drive, lost)
    raise LabError(f"no completion could be lost in {attempts} attempts")


def _attempt(
    qemu: Qemu,
    drive: str,
    pool: PoolHandle,
    request: Callable[[], object] | None,
    settle: float,
    timeout: float,
) -> tuple[int, ...]:
    """One round: the addresses of the lost requests, or none if the loop was quicker."""
    _mark(qemu, drive, pool, timeout)
    try:
        if request is not None:
            request()
        _wait_stuck(qemu, pool, settle, timeout)
    finally:
        lost = _unmark(qemu, pool)
    qemu.kick(drive)
    return lost if lost and _stuck(qemu, pool) == lost and not bottom_half_flags(qemu, pool) else ()


def _wait_stuck(qemu: Qemu, pool: PoolHandle, settle: float, timeout: float) -> None:
    """Wait until the pool holds the same requests, all of them THREAD_DONE, for `settle` seconds."""
    since = time.monotonic()
    last: tuple[int, ...] = ()

    def settled() -> bool:
        nonlocal since, last
        _hide_schedule(qemu, pool)
        now = _stuck(qemu, pool)
        if now != last:
            since, last = time.monotonic(), now
        return bool(now) and time.monotonic() - since >= settle

    qemu.wait_until(settled, timeout, "the requests to be THREAD_DONE")


def _hide_schedule(qemu: Qemu, pool: PoolHandle) -> None:
    """Take the scheduled flag off that marked requests leave, so that they look lost from the start."""
    bottom_half = pool.layout.bottom_half
    if (
        bottom_half_flags(qemu, pool)
        == bottom_half.pending_mask | bottom_half.scheduled_mask
        != bottom_half.pending_mask
    ):
        _set_flags(qemu, pool, bottom_half.pending_mask)


def free(qemu: Qemu, drive: str) -> None:
    """Cure a lost completion as a user would: one new tiny request in the same pool.

    Through the monitor's qemu-io where that reaches the pool, else (iothreads since QEMU's
    multi-queue block layer) through the lab's own connection.
    """
    if qemu.has_hmp and qemu.drives[drive].iothread is None:
        qemu.io(drive, "aio_read 0 512")
    else:
        qemu.submit(drive, "read", 0, 512)


def _mark(qemu: Qemu, drive: str, pool: PoolHandle, timeout: float) -> None:
    """Set the pending mark at a moment when the bottom half is neither pending nor scheduled.

    Its own code leaves it pending until the loop next comes round: a mark set then would be lost.
    """
    mask = pool.layout.bottom_half.pending_mask

    def try_to_mark() -> bool:
        if bottom_half_flags(qemu, pool):
            qemu.kick(drive)
        if bottom_half_flags(qemu, pool):
            return False
        with stopped(qemu):
            idle = not bottom_half_flags(qemu, pool)
            if idle:
                _set_flags(qemu, pool, mask)
        return idle

    qemu.wait_until(try_to_mark, timeout, "the completion bottom half to be idle")


def _unmark(qemu: Qemu, pool: PoolHandle) -> tuple[int, ...]:
    """Take the mark off; the requests that are lost by that, or none if the mark was gone."""
    with stopped(qemu):
        if not bottom_half_flags(qemu, pool):  # the loop ran it in spite of the mark: up to 4.2 it may
            return ()
        _set_flags(qemu, pool, 0)
        return _stuck(qemu, pool)


def requests_of(qemu: Qemu, pool: PoolHandle) -> dict[int, int]:
    """The pool's requests: address to state. The list may be torn while QEMU runs; walks are bounded."""
    layout = pool.layout.element
    found: dict[int, int] = {}
    address = _word(qemu, pool.head, 8)
    while address and address not in found and len(found) < MAX_REQUESTS:
        found[address] = _word(qemu, address + layout.state, 4)
        address = _word(qemu, address + layout.next, 8)
    return found


def _stuck(qemu: Qemu, pool: PoolHandle) -> tuple[int, ...]:
    """The pool's requests if all are THREAD_DONE: one in flight would free the others."""
    states = requests_of(qemu, pool)
    return () if any(state in _IN_FLIGHT for state in states.values()) else tuple(sorted(states))


def bottom_half_flags(qemu: Qemu, pool: PoolHandle) -> int:
    """The flags (up to QEMU 4.2: the byte `scheduled`) of the pool's completion bottom half."""
    layout = pool.layout.bottom_half
    return _word(qemu, pool.bottom_half + layout.flags, layout.flags_width)


def _set_flags(qemu: Qemu, pool: PoolHandle, value: int) -> None:
    layout = pool.layout.bottom_half
    poke(qemu.pid, pool.bottom_half + layout.flags, value.to_bytes(layout.flags_width, "little"))


def _word(qemu: Qemu, address: int, size: int) -> int:
    return int.from_bytes(peek(qemu.pid, address, size), "little")


# A monitor that hangs in a drain


@dataclass(frozen=True)
class Stopping:
    """A QMP `stop` under way, which drains all disks first."""

    answers: IO[str]

    def wait(self) -> None:
        """Until it is answered; LabError if it fails or the monitor stays silent."""
        try:
            for line in self.answers:
                reply = json.loads(line)
                if "return" in reply:
                    return
                if "error" in reply:
                    raise LabError(f"stop failed: {reply['error']}")
        except OSError as error:
            raise LabError(f"stop was not answered: {error}") from error
        raise LabError("stop was not answered: the monitor is gone")


@contextlib.contextmanager
def stopping(qemu: Qemu) -> Iterator[Stopping]:
    """Send `stop` and do not wait: with a lost completion it never ends, nor does any monitor answer again."""
    target = open_target(qemu.pid)
    with _raw_monitor(qemu, timeout=30.0) as monitor:
        before = target.thread(qemu.pid)
        monitor.sendall(qmp_line("stop", {}))
        qemu.wait_until(lambda: _went_to_sleep_again(target, before), what="stop to wait")
        with monitor.makefile("r") as answers:
            yield Stopping(answers)


def _went_to_sleep_again(target: Target, before: Thread | None) -> bool:
    now = target.thread(target.pid)
    return bool(now and before and now.syscall and (now.switches or 0) > (before.switches or 0))


# A stopped process


@contextlib.contextmanager
def stopped(qemu: Qemu) -> Iterator[None]:
    """SIGSTOP for the time of the block."""
    stop_process(qemu.pid)
    try:
        yield
    finally:
        continue_process(qemu.pid)


# A main loop that does not come round


@dataclass(frozen=True)
class Stall:
    """The main thread sits in openat() of a FIFO that nobody reads."""

    qemu: Qemu
    fifo: Path

    def release(self) -> None:
        """Open the FIFO for reading, so that openat() returns; harmless when repeated, or when QEMU is gone."""
        if self.fifo.exists():
            # A blocking open() would wait for a writer that may never come.
            reader = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
            try:
                self.fifo.unlink()
                wait_until(lambda: _at_end(reader), what="QEMU to close the FIFO")
            finally:
                os.close(reader)


def _at_end(pipe: int) -> bool:
    """Whether nobody writes to a pipe any more; takes what was written."""
    with contextlib.suppress(BlockingIOError):
        return not os.read(pipe, 1 << 20)
    return False


@contextlib.contextmanager
def stalled_main_loop(qemu: Qemu, ahead: str | None = None, timeout: float = 10.0) -> Iterator[Stall]:
    """A main loop that is truly stuck, on stock QEMU, for the time of the block.

    QMP pmemsave opens its file in the main thread, and a FIFO without a reader keeps it there; workers
    and iothreads go on. `ahead` is a human monitor line that QEMU runs immediately before.
    """
    fifo = qemu.folder / f"stall-{uuid4().hex}"
    os.mkfifo(fifo)
    stall = Stall(qemu, fifo)
    commands = _burst("pmemsave", {"val": 0, "size": 0, "filename": qemu.inside(fifo.name)}, ahead)
    with _raw_monitor(qemu) as monitor:
        monitor.sendall(b"".join(commands))
        try:
            target = open_target(qemu.pid)
            qemu.wait_until(lambda: main_system_call(target) == "openat", timeout, "the main loop to be stuck")
            yield stall
        finally:
            stall.release()


@contextlib.contextmanager
def stalled_completion(qemu: Qemu, drive: str, pool: PoolHandle, attempts: int = 50) -> Iterator[tuple[int, ...]]:
    """As stalled_main_loop(), with requests of a drive of the main loop that reach THREAD_DONE meanwhile.

    Yields their addresses. The write is large, so that it lasts longer than the loop's way into the stall.
    """
    for _ in range(attempts):
        with stalled_main_loop(qemu, ahead=f'qemu-io {drive} "aio_write 0 {16 * MIB}"'):
            if requests_of(qemu, pool):
                yield qemu.wait_until(lambda: _stuck(qemu, pool), what="a request to be THREAD_DONE")
                return
    raise LabError(f"in {attempts} attempts each write was complete before the main loop was stuck")


@contextlib.contextmanager
def busy_main_loop(qemu: Qemu, seconds: float, ahead: str | None = None) -> Iterator[None]:
    """A main loop that is on CPU inside one monitor command for about that many seconds.

    `ahead` is a human monitor line that QEMU runs immediately before.
    """
    probe = 16 * MIB
    began = time.monotonic()
    qemu.qmp("pmemsave", val=NO_MEMORY, size=probe, filename="/dev/null")
    size = int(probe * seconds / (time.monotonic() - began))
    with unanswered(qemu, "pmemsave", {"val": NO_MEMORY, "size": size, "filename": "/dev/null"}, ahead):
        yield


@contextlib.contextmanager
def unanswered(qemu: Qemu, command: str, arguments: dict[str, object], ahead: str | None = None) -> Iterator[None]:
    """Send a command to a monitor of its own, and wait for the answer only after the block.

    `ahead` is a human monitor line that QEMU runs immediately before.
    """
    commands = _burst(command, arguments, ahead)
    with _raw_monitor(qemu) as monitor:
        monitor.sendall(b"".join(commands))
        yield
        answers = b""
        while answers.count(b'"return"') < len(commands):
            answers += monitor.recv(65536)


def _burst(command: str, arguments: dict[str, object], ahead: str | None) -> list[bytes]:
    """The lines of a command, and of the human monitor's line ahead of it if there is one."""
    first = [] if ahead is None else [qmp_line("human-monitor-command", {"command-line": ahead})]
    return [*first, qmp_line(command, arguments)]


def main_system_call(target: Target) -> str | None:
    """The name of the system call in which the main thread sleeps, None while it runs."""
    thread = target.thread(target.pid)
    return thread.syscall.name if thread and thread.syscall else None


@contextlib.contextmanager
def _raw_monitor(qemu: Qemu, timeout: float = 120.0) -> Iterator[socket.socket]:
    """A monitor that may be written to without waiting for answers."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(timeout)
        monitor.connect(str(qemu.folder / "stall.qmp"))
        monitor.sendall(qmp_line("qmp_capabilities", {}))
        answers = b""
        while b'"return"' not in answers:
            answers += monitor.recv(65536)
        yield monitor
