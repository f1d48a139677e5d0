"""Every way in which a request can be late, made on stock QEMU and taken back.

Knows: how to bring a request of a lab QEMU into each class of hang, and out of it. A lost wake-up and a
stuck or busy main loop are made by tracer/lab/faults; what is here goes for the main loop and for an
iothread alike. Does not know what the tracer says about it.

Most of them need a request that becomes THREAD_DONE at a chosen moment: its disk stands on a storage that
is held and let go (tracer/lab/storage). Do not stop the whole QEMU while the storage is held: a worker
that waits for FUSE stops only when it is answered.
"""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tracer.build import read_build
from tracer.errors import LabError
from tracer.lab import faults
from tracer.lab.context import Context, context_at
from tracer.lab.faults import PoolHandle, requests_of
from tracer.lab.nbd import NbdClient
from tracer.lab.process import peek, poke
from tracer.lab.ptrace import HeldThread, held_thread
from tracer.lab.qemu import Qemu, paused
from tracer.lab.storage import Storage, storage
from tracer.layout import RequestState
from tracer.sites.model import CALLBACK
from tracer.target import open_target

QUEUED, ACTIVE, DONE = RequestState.THREAD_QUEUED, RequestState.THREAD_ACTIVE, RequestState.THREAD_DONE

CALL_SIZE = 5  # call rel32
SPIN = b"\xeb\xfe"  # jmp to itself
NOBODY = -1  # poll(2) ignores it
POOL_SIZE = 256  # bytes that are searched for the pool's other members
LSEEK, FUTEX = 8, 202
POLLS = (7, 271)  # poll, ppoll
WAITS = (FUTEX, 219)  # restart_syscall: what a timed futex becomes once the process was stopped
HOLE = 32 << 20  # nothing was written there
IN_FLIGHT_PER_CLIENT = 16  # nbd/server.c: MAX_NBD_REQUESTS


@dataclass(frozen=True)
class Scene:
    """A QEMU with d0 on a storage that can be held, and d1 on another, both served by one loop."""

    qemu: Qemu
    slow: Storage
    other: Storage
    pool: PoolHandle
    context: Context
    main: Context  # the main loop's, the same where it serves the drives
    sparse: NbdClient  # on d1
    functions: Mapping[str, int]  # QEMU's functions, where they are in this process
    callback_site: int
    clients: list[NbdClient] = field(default_factory=list)  # kept: QEMU 7.2 does not survive their end

    def submit(self, index: int, kind: str = "write") -> None:
        """Send one request to d0, the one of that index of many: QEMU takes 16 a connection at once."""
        while len(self.clients) <= index // IN_FLIGHT_PER_CLIENT:
            client = NbdClient(self.qemu.folder / "nbd", "d0")
            self.qemu.on_exit(client.close)
            self.clients.append(client)
        self.clients[index // IN_FLIGHT_PER_CLIENT].submit(kind)

    def requests(self, *states: RequestState) -> tuple[int, ...]:
        """The pool's requests in these states (none given: all), by address."""
        found = requests_of(self.qemu, self.pool)
        return tuple(sorted(a for a, state in found.items() if not states or state in states))

    def counts(self) -> Counter[int]:
        """How many of the pool's requests are in each state."""
        return Counter(requests_of(self.qemu, self.pool).values())

    def counter(self, name: str) -> int:
        """One of the pool's thread counters, such as idle_threads."""
        address = self.pool.pool + self.pool.layout.pool.counter(name)
        return int.from_bytes(peek(self.qemu.pid, address, 4), "little")

    def wait_states(self, **states: int) -> None:
        """Wait until the pool holds exactly so many requests in each state, and none other."""
        wanted = Counter({RequestState[f"THREAD_{name.upper()}"]: count for name, count in states.items()})
        self.qemu.wait_until(lambda: self.counts() == wanted, what=f"the requests to be {states}")

    def wait_empty(self) -> None:
        """Wait until the pool has no request."""
        self.qemu.wait_until(lambda: not self.requests(), what="the pool to be empty")

    def wake(self) -> None:
        """Make the loop come round."""
        self.qemu.kick("d0")


@contextlib.contextmanager
def scene(iothread: bool = False, chroot: Path | None = None) -> Iterator[Scene]:
    """Set one up; its pool exists and is idle."""
    name = "io0" if iothread else None
    with (
        storage(chroot=chroot) as slow,
        storage(chroot=chroot) as other,
        paused([slow.drive("d0", name), other.drive("d1", name)], chroot=chroot) as qemu,
    ):
        qemu.request("d1", "write")
        pool = faults.pool_of(qemu, "d0")
        home = qemu.iothread_ids()["io0"] if iothread else qemu.pid
        yield _scene(qemu, slow, other, pool, home)


def _scene(qemu: Qemu, slow: Storage, other: Storage, pool: PoolHandle, home: int) -> Scene:
    target = open_target(qemu.pid)
    build = read_build(target.image_path, target.exe)
    if build.located.main_context is None:
        raise LabError("where QEMU keeps its main AioContext is not known")
    bias = target.entry_address() - build.entry
    sparse = NbdClient(qemu.folder / "nbd", "d1", sparse=True)
    qemu.on_exit(sparse.close)
    return Scene(
        qemu,
        slow,
        other,
        pool,
        context_at(qemu, _word(qemu, pool.pool + pool.layout.pool.context), home),
        context_at(qemu, _word(qemu, build.located.main_context + bias), qemu.pid),
        sparse,
        {name: address + bias for name, address in build.located.functions.items()},
        build.located.sites[CALLBACK].address + bias,
    )


def _word(qemu: Qemu, address: int) -> int:
    return int.from_bytes(peek(qemu.pid, address, 8), "little")


# Requests that wait for a held storage, and are THREAD_DONE once it is let go


@contextlib.contextmanager
def _held(on: Scene, *kinds: str) -> Iterator[None]:
    """For the time of the block these requests are THREAD_ACTIVE, and the loop sleeps."""
    if "flush" in kinds:
        on.qemu.request("d0", "write")  # QEMU skips a flush when nothing was written
    with on.slow.held():
        for count, kind in enumerate(kinds, 1):
            on.qemu.submit("d0", kind)
            on.wait_states(active=count)  # one by one: see missed_spawn()
        on.qemu.wait_until(on.context.asleep, what="the loop to sleep")
        yield


@contextlib.contextmanager
def _alone(on: Scene) -> Iterator[None]:
    """The block begins with an empty pool; whatever it does, the loop is woken after it, and none is left."""
    on.wait_empty()  # what freed an earlier fault may still be under way
    try:
        yield
    finally:
        on.wake()
        on.wait_empty()
        for client in (on.sparse, *on.clients):
            client.discard_replies()


# F: the storage


@contextlib.contextmanager
def stuck_worker(on: Scene, kind: str = "write") -> Iterator[int]:
    """The storage does not answer: the request is THREAD_ACTIVE. Yields its address."""
    with _alone(on), _held(on, kind):
        (request,) = on.requests(ACTIVE)
        yield request


# B and C: the loop is told, and sleeps on


@contextlib.contextmanager
def lost_kick(on: Scene, kind: str = "write") -> Iterator[int]:
    """The bottom half is scheduled and the eventfd not rung: aio_notify() saw nobody asleep.

    That is what a missing barrier makes of AioContext.notify_me. Yields the request.
    """
    with _alone(on):
        with contextlib.ExitStack() as told, _held(on, kind):
            told.callback(_restore_notify_me, on, on.context.notify_me)
            on.context.set_notify_me(0)
        yield on.requests(DONE)[0]


def _restore_notify_me(on: Scene, value: int) -> None:
    try:
        on.wait_states(done=1)
    finally:
        on.context.set_notify_me(value)


@contextlib.contextmanager
def unpolled_kick(on: Scene, kind: str = "write") -> Iterator[int]:
    """The eventfd is rung, but the loop's poll does not include it. Yields the request.

    The thread is held for a moment; when it goes on, the kernel reads the array of its poll(2) anew. The
    array is mended before the loop is woken: glib does not survive a surprise in it.
    """
    with _alone(on), contextlib.ExitStack() as undo:
        with _held(on, kind), held_thread(on.qemu.pid, on.context.home_tid):
            entry = _poll_entry(on.context)
            undo.callback(poke, on.qemu.pid, entry, struct.pack("<i", on.context.fd))
            poke(on.qemu.pid, entry, struct.pack("<i", NOBODY))
        on.wait_states(done=1)
        on.qemu.wait_until(on.context.rung, what="the eventfd to be rung")
        yield on.requests(DONE)[0]


def _poll_entry(context: Context) -> int:
    """Where the eventfd stands in the array of the poll(2) in which the thread sleeps."""
    call = context.home().syscall
    if call is None or call.number not in POLLS:
        raise LabError(f"the loop sleeps in {call.name if call else 'nothing'}, not in poll")
    polled = struct.iter_unpack("<ihh", peek(context.qemu.pid, call.args[0], call.args[1] * 8))
    for index, (fd, _events, _revents) in enumerate(polled):
        if fd == context.fd:
            return call.args[0] + index * 8
    raise LabError("the loop does not poll its eventfd")


# D: the home thread is elsewhere


@contextlib.contextmanager
def blocked_in_storage(on: Scene, kind: str = "write") -> Iterator[int]:
    """The home thread asks the other storage where d1 has data, by lseek(2), and gets no answer."""
    with _alone(on), contextlib.ExitStack() as undo:
        with _held(on, kind):
            undo.enter_context(on.other.held())
            on.sparse.submit("read", HOLE)
            on.qemu.wait_until(lambda: _is_in(on.context, LSEEK), what="the home thread to be in lseek")
        on.wait_states(done=1)
        yield on.requests(DONE)[0]


def _is_in(context: Context, number: int) -> bool:
    call = context.home().syscall
    return call is not None and call.number == number


@contextlib.contextmanager
def blocked_in_lock(on: Scene, kind: str = "write", seconds: int = 3) -> Iterator[int]:
    """The main loop has taken the iothread's AioContext, and its bottom half waits for it (2.9 to 8.0).

    A command that sleeps holds it, so this lasts its time whatever the block does.
    """
    if on.context == on.main:
        raise LabError("the main loop cannot wait for itself: this needs an iothread")
    with _alone(on), contextlib.ExitStack() as undo:
        with _held(on, kind):
            line = f'qemu-io d0 "sleep {seconds * 1000}"'
            undo.enter_context(faults.unanswered(on.qemu, "human-monitor-command", {"command-line": line}))
            on.qemu.wait_until(lambda: _has_timeout(on.main), what="the command to sleep")
        on.wait_states(done=1)
        on.qemu.wait_until(lambda: _is_in(on.context, FUTEX), what="the home thread to wait for the lock")
        yield on.requests(DONE)[0]


def _has_timeout(context: Context) -> bool:
    """Whether the loop sleeps for a limited time; one without timers sleeps for ever."""
    call = context.home().syscall
    return call is not None and call.name == "ppoll" and call.args[2] != 0


@contextlib.contextmanager
def spinning(on: Scene, kind: str = "write") -> Iterator[int]:
    """The home thread turns round and round at the entry of thread_pool_completion_bh."""
    entry = on.functions["thread_pool_completion_bh"]
    original = peek(on.qemu.pid, entry, len(SPIN))
    with _alone(on), contextlib.ExitStack() as undo:
        with _held(on, kind):
            undo.callback(poke, on.qemu.pid, entry, original)
            poke(on.qemu.pid, entry, SPIN)
        on.wait_states(done=1)
        on.qemu.wait_until(lambda: on.context.home().syscall is None, what="the home thread to spin")
        yield on.requests(DONE)[0]


# G: nobody takes the request


@contextlib.contextmanager
def full_queue(on: Scene, more: int = 6) -> Iterator[tuple[int, ...]]:
    """All workers wait for the storage, and `more` requests for a worker. Yields those that are queued."""
    most = on.counter("max_threads")
    with _alone(on), on.slow.held():
        for index in range(most + more):
            on.submit(index)
            on.wait_states(active=min(index + 1, most), queued=max(0, index + 1 - most))
        yield on.requests(QUEUED)


@contextlib.contextmanager
def sleeping_workers(on: Scene, kind: str = "write") -> Iterator[int]:
    """Idle workers stand still one by one, so that none hears the call. Yields the queued request."""
    with _alone(on), contextlib.ExitStack() as undo:
        on.qemu.request("d0", "write")  # workers leave after ten idle seconds
        for tid in _idle_workers(on):
            undo.enter_context(held_thread(on.qemu.pid, tid))
        on.qemu.submit("d0", kind)
        on.wait_states(queued=1)
        yield on.requests(QUEUED)[0]


def _idle_workers(on: Scene) -> list[int]:
    """They wait for a futex inside the pool."""
    pool = range(on.pool.pool, on.pool.pool + POOL_SIZE)

    def waiting() -> list[int]:
        threads = open_target(on.qemu.pid).threads()
        found = [t.tid for t in threads if t.syscall and t.syscall.number in WAITS and t.syscall.args[0] in pool]
        # One that has answered and not come to rest would take what nobody is to take.
        resting = on.counter("cur_threads") - on.counts()[ACTIVE]
        return found if len(found) == on.counter("idle_threads") == resting else []

    return list(on.qemu.wait_until(waiting, what="the workers to be idle"))


@contextlib.contextmanager
def missed_spawn(on: Scene, kind: str = "write") -> Iterator[int]:
    """No worker is made for the second of two requests, though there could be. Yields the queued one.

    QEMU does that by itself: a worker that was called counts as idle until it runs, so the next request
    asks for no other. The worker takes the first, and the second waits as long as the first does.
    """
    with _alone(on):
        on.qemu.request("d0", "write")  # workers leave after ten idle seconds
        with on.slow.held():
            busy, idle = _one_idle_worker(on)
            with held_thread(on.qemu.pid, idle):
                for more in (1, 2):
                    on.submit(busy + more - 1, kind)
                    on.wait_states(active=busy, queued=more)
            on.wait_states(active=busy + 1, queued=1)
            yield on.requests(QUEUED)[0]


def _one_idle_worker(on: Scene) -> tuple[int, int]:
    """Give all but one idle worker something to wait for: how many that are, and the one.

    The C library's condition variable lets nobody call a second sleeper before the first, held, has left it: with
    two of them the home thread would wait.
    """
    busy = 0
    while len(idle := _idle_workers(on)) > 1:
        on.submit(busy)
        busy += 1
        on.wait_states(active=busy)
    return busy, idle[0]


@contextlib.contextmanager
def lost_spawn(on: Scene, kind: str = "write") -> Iterator[int]:
    """All workers are busy, and the bottom half that starts another one is lost. Yields the queued request."""
    half = _spawner(on)
    with _alone(on), contextlib.ExitStack() as undo, on.slow.held():
        busy = _occupy(on)
        with _marked(on, half):
            undo.callback(on.context.schedule, half, on.pool.layout.bottom_half)
            undo.callback(on.wait_empty)
            on.submit(busy, kind)
            on.wait_states(active=busy, queued=1)
        yield on.requests(QUEUED)[0]


@contextlib.contextmanager
def _marked(on: Scene, half: int) -> Iterator[None]:
    """For the time of the block nobody can schedule that bottom half; it is idle before and after."""
    layout = on.pool.layout.bottom_half
    on.qemu.wait_until(lambda: not any(peek(on.qemu.pid, half + layout.flags, 4)), what="the bottom half to be idle")
    poke(on.qemu.pid, half + layout.flags, struct.pack("<I", layout.pending_mask))
    try:
        yield
    finally:
        poke(on.qemu.pid, half + layout.flags, bytes(4))


def _occupy(on: Scene) -> int:
    """Give every idle worker something to wait for; how many requests that took."""
    busy = 0
    while busy == 0 or on.counter("idle_threads"):
        on.submit(busy)
        busy += 1
        on.wait_states(active=busy)
    return busy


def _spawner(on: Scene) -> int:
    """pool->new_thread_bh: calls spawn_thread_bh_fn with the pool."""
    layout, wanted = on.pool.layout.bottom_half, on.functions["spawn_thread_bh_fn"]
    for address in range(on.pool.pool, on.pool.pool + POOL_SIZE, 8):
        half = _word(on.qemu, address)
        with contextlib.suppress(LabError):
            if (_word(on.qemu, half + layout.callback), _word(on.qemu, half + layout.opaque)) == (wanted, on.pool.pool):
                return half
    raise LabError("the bottom half that starts workers was not found")


# E: a callback waits


@contextlib.contextmanager
def nested_wait(on: Scene, kind: str = "write") -> Iterator[int]:
    """A callback sits in aio_poll() and waits, while a finished request has nobody to complete it.

    QEMU's own callbacks do that no more (3c80ca158c, in 2.1.1), so its home thread is led there: ahead of
    the first of two callbacks it calls aio_poll(), with the bottom half taken off as in that bug. Once
    woken it goes on as if nothing had been. Yields the request that is left.
    """
    with _alone(on):
        with contextlib.ExitStack() as led, _held(on, kind, "write"):
            thread = led.enter_context(held_thread(on.qemu.pid, on.context.home_tid))
            led.enter_context(_led_into_wait(on, thread))
        on.qemu.wait_until(on.context.asleep, what="the callback to wait")
        left = on.requests(DONE)
        if not left:
            raise LabError("aio_poll() did not wait: the loop has other events")
        yield left[0]


@contextlib.contextmanager
def _led_into_wait(on: Scene, thread: HeldThread) -> Iterator[None]:
    """The held thread calls aio_poll() where it is about to call the first callback of those done in the block."""
    with thread.run_to(on.callback_site + CALL_SIZE):
        yield
    on.wait_states(done=1)
    on.qemu.wait_until(lambda: on.counter("idle_threads") == on.counter("cur_threads"), what="the workers to be idle")
    flags = on.pool.bottom_half + on.pool.layout.bottom_half.flags
    poke(on.qemu.pid, flags, struct.pack("<I", on.pool.layout.bottom_half.pending_mask))
    on.context.forget_notification()
    on.context.answer()
    thread.call_first(on.functions["aio_poll"], on.context.address, 1)


# The drain


@contextlib.contextmanager
def draining(on: Scene) -> Iterator[int]:
    """A lost flush, and then `stop` on the monitor: the main thread waits in bdrv_drain_all for it."""
    with _alone(on):
        lost = faults.lose(on.qemu, "d0", "flush", on.pool)
        with faults.unanswered(on.qemu, "stop", {}):
            try:
                on.qemu.wait_until(lambda: on.main.notify_me > 1 and on.main.asleep(), what="the main thread to drain")
                yield lost.request
            finally:
                on.context.schedule(on.pool.bottom_half, on.pool.layout.bottom_half)
