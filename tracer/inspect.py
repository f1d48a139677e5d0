"""The diagnosis that takes gcore, gdb and an afternoon by hand: every pool, every request, one verdict.

Knows: when a request may be accused. A live process is looked at several times within a fraction of a
second, without stopping it: what is the same request in the same state at every look, and provably so, is
overdue. A core file is one look, at a process that stood still. Does not know what facts mean
(tracer/verdict), nor formats.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tracer import home, posix_aio
from tracer.build import Build, Loaded, load
from tracer.coroutine import code_regions, read_waiter
from tracer.coroutines import Coroutines
from tracer.errors import FaultError
from tracer.events import Diagnosis, InspectedPool, InspectedRequest, InspectedThread
from tracer.known_bugs import bug_notes
from tracer.layout import RequestState
from tracer.looking import Looker
from tracer.outside_pool import Outside, OutsidePool
from tracer.pools import BottomHalf, Pool, Request, RequestList, ThreadCounts
from tracer.posix_aio import Operation
from tracer.records import dataclass
from tracer.run_state import RunState, read_run_state
from tracer.target import Region, Thread
from tracer.verdict import (
    LOOP_BLOCKED,
    LOST_WAKEUP,
    NESTED_POLL,
    SEVERITY,
    STOPPED,
    UNKNOWN,
    Facts,
    Look,
    Verdict,
    as_evidence,
    draining,
    judge,
    under,
)
from tracer.view import ProcessView

ECANCELED = 125
HEALTHY, ELSEWHERE = "healthy", "elsewhere"

#: How long a live process is watched, and how often; a healthy one is left at the second look.
PATIENCE_S = 0.2
LOOKS = 9
#: So many looks must find the home thread asleep before it is said that nobody was told, and for that, where it is
#: awake at most looks, there are so many more.
TELLING = LOOKS // 2 + 1
MORE_LOOKS = 4 * LOOKS
#: How often a list is read again that was torn, and after what time.
RETRIES, RETRY_S = 6, 0.0005
#: Unwinding ends after that many seconds; home threads come first.
STACKS_S = 0.15
FRAMES = 40


@dataclass(frozen=True)
class _Snapshot:
    """One pool at one moment; `switches` is the home thread's count if it slept all the while, else None."""

    listed: RequestList
    look: Look
    switches: int | None
    threads: tuple[Thread, ...]
    arguments: Mapping[int, bytes]  # of the finished requests: what `arg` points to


@dataclass(frozen=True)
class _Watched:
    """One pool through all looks."""

    pool: Pool
    snapshots: tuple[_Snapshot, ...]

    @property
    def last(self) -> _Snapshot:
        return self.snapshots[-1]

    @property
    def whole(self) -> tuple[_Snapshot, ...]:
        """The looks whose list could be read to the end."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot.listed.torn is None)

    @property
    def home_unmoved(self) -> bool:
        """Whether the home thread slept from the first look to the last: no request came or went."""
        counts = {snapshot.switches for snapshot in self.snapshots}
        return len(counts) == 1 and None not in counts


def diagnose(view: ProcessView, build: Build, patience_s: float = PATIENCE_S, began: float | None = None) -> Diagnosis:
    """All about the pools and requests of `view`; `began` is when the command did (monotonic).

    A request is overdue when it stays in its state for `patience_s`. Raises TargetError.
    """
    started = time.monotonic() if began is None else began
    return _Inspection(view, load(view, build)).run(0.0 if view.core else patience_s, started)


@dataclass(frozen=True)
class Staying:
    """The addresses of the requests that read the same at every look, and of those that provably do not go on."""

    alike: set[int]
    proved: set[int]


def staying(view: ProcessView, loaded: Loaded, pools: Sequence[Pool], patience_s: float = PATIENCE_S) -> Staying:
    """The requests in `pools` that do not go on for `patience_s`."""
    return _Inspection(view, loaded).accused(pools, patience_s)


class _Inspection:
    def __init__(self, view: ProcessView, loaded: Loaded) -> None:
        self._view = view
        self._loaded = loaded
        self._reader = loaded.reader
        self._looker = Looker(view, loaded)
        self._code = code_regions(view)
        self._is_core = view.core is not None
        self._watched_s = 0.0
        self._workers_asleep: float | None = None

    def run(self, patience_s: float, started: float) -> Diagnosis:
        build = self._loaded.build
        coroutines = Coroutines(self._view, build.machine)
        found = self._reader.find(coroutines.passing(self._view.heap_chunks()))
        beside = OutsidePool(self._view, coroutines, lambda: self._home_tids(found))
        began = time.monotonic()
        watched = self._watch(found, patience_s)
        pools = tuple(self._pool(pool, patience_s) for pool in watched)
        accused = any(request.overdue for pool in pools for request in pool.requests)
        outside = Outside() if accused else beside.seen(began + patience_s)
        self._watched_s = time.monotonic() - began
        threads = self._threads(pools)
        drains = _drains(threads)
        bypassing = _bypassing(self._view)
        state = read_run_state(self._view)
        verdict = self._verdict(pools, drains, bypassing, outside, state)
        return Diagnosis(
            time.time(),
            self._view.pid,
            self._view.core,
            self._view.exe,
            build.version,
            pools,
            threads,
            drains,
            verdict.cause,
            verdict.explanation,
            bug_notes(build.version, build.machine, build.located.barrier_fixed),
            build.located.barrier_fixed,
            bypassing,
            (*self._notes(pools, threads), *outside.notes),
            self._watched_s,
            time.monotonic() - started,
            state.name if state else None,
            outside.waiting,
            verdict.cause in (STOPPED, LOOP_BLOCKED) and not accused,
        )

    def accused(self, found: Sequence[Pool], patience_s: float) -> Staying:
        alike = [(watched, request) for watched in self._watch(found, patience_s) for request in _persistent(watched)]
        proved = [r for watched, r in alike if self._accuse(watched, r, self._looker.operation(r))]
        return Staying({request.address for _, request in alike}, {request.address for request in proved})

    # -- looks --------------------------------------------------------------------------------------

    def _watch(self, pools: Sequence[Pool], patience_s: float) -> list[_Watched]:
        """Look at all pools again and again, as long as there is anything to suspect."""
        began = time.monotonic()
        looks: dict[Pool, list[_Snapshot]] = {pool: [] for pool in pools}
        for number in range(1 if self._is_core else LOOKS):
            if number:
                time.sleep(max(0.0, began + patience_s * number / (LOOKS - 1) - time.monotonic()))
            self._look_at(looks)
            self._watched_s = time.monotonic() - began
            if number and not any(_persistent(_Watched(p, tuple(s))) for p, s in looks.items()):
                break
        self._look_on(looks, patience_s / (LOOKS - 1))
        self._watched_s = time.monotonic() - began
        return [_Watched(pool, tuple(snapshots)) for pool, snapshots in looks.items()]

    def _look_at(self, looks: dict[Pool, list[_Snapshot]]) -> None:
        for pool, snapshots in looks.items():
            snapshots.append(self._snapshot(pool))

    def _look_on(self, looks: dict[Pool, list[_Snapshot]], pause_s: float) -> None:
        """Where only looks at a sleeping home thread are missing: on a busy host it is seen awake at most of them."""
        if self._is_core:
            return
        for _ in range(MORE_LOOKS):
            if not any(_is_open(_Watched(pool, tuple(snapshots))) for pool, snapshots in looks.items()):
                return
            time.sleep(pause_s)
            self._look_at(looks)

    def _snapshot(self, pool: Pool) -> _Snapshot:
        """One look. What was read while the home thread slept was not changed by it meanwhile."""
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(RETRY_S)
            before = self._looker.home(pool.context)
            listed = self._reader.requests(pool)
            after = self._looker.home(pool.context)
            look = self._looker.one_look(pool, after)
            again = self._looker.home(pool.context)
            if listed.torn is None or self._is_core:
                break
        threads = tuple(self._view.threads()) if any(_waits(r) for r in listed.requests) else ()
        return _Snapshot(listed, look, _slept(before, after, again), threads, self._arguments(listed))

    def _arguments(self, listed: RequestList) -> dict[int, bytes]:
        """What finished requests were about: it stays as it is until the callback."""
        if self._is_core:
            return {}
        finished = (request for request in listed.requests if request.state == RequestState.THREAD_DONE)
        return {
            request.address: posix_aio.read_raw(self._view.memory, request.arg)
            for request in finished
            if posix_aio.outlives_worker(request.arg, request.opaque)
        }

    # -- one pool -----------------------------------------------------------------------------------

    def _pool(self, watched: _Watched, patience_s: float) -> InspectedPool:
        pool, listed = watched.pool, watched.last.listed
        suspects = {request.address for request in _persistent(watched)}
        thread = self._looker.home(pool.context)
        bottom_half, counts = self._now(pool)
        requests = tuple(
            self._request(watched, request, request.address in suspects, patience_s) for request in listed.requests
        )
        return InspectedPool(
            pool.address,
            pool.context,
            pool.context == self._loaded.main_context,
            thread.tid if thread else None,
            thread.name if thread else None,
            pool.bottom_half,
            bottom_half.scheduled if bottom_half else None,
            counts.current if counts else None,
            counts.idle if counts else None,
            counts.max if counts else None,
            requests,
            listed.torn,
        )

    def _now(self, pool: Pool) -> tuple[BottomHalf | None, ThreadCounts | None]:
        try:
            return self._reader.bottom_half(pool), self._reader.threads(pool)
        except FaultError:
            return None, None

    def _request(self, watched: _Watched, request: Request, suspect: bool, patience_s: float) -> InspectedRequest:
        operation = self._looker.operation(request)
        accused = self._accuse(watched, request, operation) if suspect else None
        if accused is not None and not self._is_core and not self._still(request, operation):
            accused = None
        facts, verdict = accused or (None, None)
        node = posix_aio.read_node(self._view.memory, request.arg) if operation.fd is not None else None
        waiter = read_waiter(self._view, self._code, request.opaque) if request.callback else None
        entry = self._looker.function(waiter.entry) if waiter else None
        return InspectedRequest(
            request.address,
            watched.pool.address,
            watched.pool.context,
            operation.kind,
            operation.file or (node.file if node else None),
            operation.offset,
            operation.bytes,
            node.name if node else None,
            request.state.name,
            request.ret,
            facts.age_s if facts and not self._is_core else None,
            patience_s if not self._is_core else None,
            verdict.cause if verdict else None,
            verdict.explanation if verdict else None,
            as_evidence(facts) | {"layout": self._loaded.build.located.layout.source} if facts else None,
            request.func,
            self._looker.function(request.func),
            request.arg,
            request.callback,
            self._looker.function(request.callback),
            request.opaque,
            request.next,
            request.prev,
            waiter.coroutine if waiter else None,
            waiter.entry if waiter else None,
            entry,
            waiter.entry_arg if waiter else None,
            waiter.caller if waiter else None,
            tuple(str(frame) for frame in waiter.stack.frames[:FRAMES]) if waiter else (),
        )

    def _still(self, request: Request, operation: Operation) -> bool:
        return self._looker.same(request) and self._looker.operation(request) == operation

    # -- accusation ---------------------------------------------------------------------------------

    def _accuse(self, watched: _Watched, request: Request, operation: Operation) -> tuple[Facts, Verdict] | None:
        """Why a request does not go on; None where it may be another one at every look, or on its way."""
        if operation.file is None and operation.fd is not None:
            # A core file does not tell what its file descriptors were.
            node = posix_aio.read_node(self._view.memory, request.arg)
            operation = replace(operation, file=node.file if node else None)
        facts = self._looker.first_facts(request, operation, self._watched_s)
        facts = replace(facts, at_least=True, missing=_missing(watched))
        if request.state == RequestState.THREAD_DONE:
            return self._accuse_done(watched, facts)
        waiting = self._looker.waiting_facts(watched.pool, request, operation, facts)
        if waiting is None:
            return None
        facts = waiting
        if not self._is_core and not self._proved_waiting(watched, request, facts):
            return None
        if facts.worker_asleep_s is not None and not self._is_core:
            facts = replace(facts, age_s=max(facts.age_s, facts.worker_asleep_s))
        return facts, judge(facts)

    def _accuse_done(self, watched: _Watched, facts: Facts) -> tuple[Facts, Verdict] | None:
        looks = tuple(snapshot.look for snapshot in watched.whole) or (watched.last.look,)
        facts = self._looker.done_facts(watched.pool, looks, facts)
        if self._is_core:
            return self._judge_core(watched, facts)
        verdict = judge(facts)
        if verdict.cause == LOST_WAKEUP and not _nobody_told(watched):
            return facts, Verdict(UNKNOWN, _not_told(watched, facts))
        if self._workers_asleep is None:
            self._workers_asleep = self._looker.workers_asleep_s()
        asleep = self._workers_asleep
        return replace(facts, age_s=max(facts.age_s, asleep)), verdict if not asleep else judge(
            replace(facts, age_s=max(facts.age_s, asleep))
        )

    def _judge_core(self, watched: _Watched, facts: Facts) -> tuple[Facts, Verdict] | None:
        """A core is one moment: a home thread that was under way to the callback is no accusation."""
        look = watched.last.look
        if look.scheduled and look.syscall is None and not facts.missing:
            return None
        runs = [t for t in self._view.threads() if t.syscall is None and not re.match(home.NOT_HOME, t.name)]
        workers = [t for t in self._view.threads() if t.syscall is None and t.name.startswith("worker")]
        told = [t.tid for t in (workers or runs) if self._in_worker(t)]
        if told and look.scheduled is False:
            why = f"worker {told[0]} was under way when the core was taken, perhaps about to tell"
            facts = replace(facts, missing=(*facts.missing, why))
        return facts, judge(facts)

    def _in_worker(self, thread: Thread) -> bool:
        return "worker_thread" in self._looker.stack(thread).functions()

    def _proved_waiting(self, watched: _Watched, request: Request, facts: Facts) -> bool:
        """Whether this is the same request at all looks: home thread or worker did not move meanwhile."""
        if watched.home_unmoved:
            return True
        if facts.worker_tid is not None:
            return _unmoved(watched.snapshots, facts.worker_tid)
        if request.state != RequestState.THREAD_QUEUED:
            return False
        if facts.threads_idle:
            return True
        # No worker is free: it is stuck if they are, all of them.
        workers = [t for t in watched.last.threads if t.syscall and t.syscall.name in home.WORK_SYSCALLS]
        return bool(workers) and all(_unmoved(watched.snapshots, thread.tid) for thread in workers)

    # -- threads and the whole ----------------------------------------------------------------------

    def _threads(self, pools: Sequence[InspectedPool]) -> tuple[InspectedThread, ...]:
        homes = {self._view.pid, *(pool.home_tid for pool in pools if pool.home_tid)}
        until = time.monotonic() + STACKS_S
        found = [
            self._thread(thread, thread.tid in homes, until)
            for thread in sorted(self._view.threads(), key=lambda thread: thread.tid not in homes)
        ]
        return tuple(sorted(found, key=lambda thread: (thread.tid != self._view.pid, thread.tid)))

    def _thread(self, thread: Thread, is_home: bool, until: float) -> InspectedThread:
        frames: tuple[str, ...] = ()
        why: str | None = "left out to save time"
        if is_home or self._is_core or time.monotonic() < until:
            stack = self._looker.stack(thread)
            frames, why = tuple(str(frame) for frame in stack.frames[:FRAMES]), stack.why_not
        where = self._looker.describe_syscall(thread)
        return InspectedThread(thread.tid, thread.name, thread.state, where, frames, why, is_home)

    def _home_tids(self, pools: Sequence[Pool]) -> list[int]:
        """The threads that run the pools' contexts, as far as that shows."""
        return [thread.tid for pool in pools if (thread := self._looker.home(pool.context)) is not None]

    @staticmethod
    def _nested_poll(accused: Sequence[InspectedRequest]) -> str | None:
        """In what the main loop waits, where no name tells more; None where it does not, or that does not show."""
        nested = any(request.evidence.get("nested_poll") for request in accused if request.evidence)
        return NESTED_POLL if nested else None

    def _verdict(
        self,
        pools: Sequence[InspectedPool],
        drains: str | None,
        bypassing: Sequence[str],
        outside: Outside,
        state: RunState | None,
    ) -> Verdict:
        accused = [request for pool in pools for request in pool.requests if request.overdue]
        if accused:
            return _worst(accused, drains or self._nested_poll(accused))
        count = sum(len(pool.requests) for pool in pools)
        seen = f"No request of {len(pools)} thread pools is overdue ({count} in flight)." if pools else _no_pools()
        seen += _guest(state)
        if self._looker.process_stopped():
            return Verdict(STOPPED, f"{_standing(self._view)} {seen}")
        torn = [pool for pool in pools if pool.torn]
        if torn:
            return Verdict(UNKNOWN, f"The list of {len(torn)} pools could not be read to the end: {torn[0].torn}.")
        missing = self._view.missing()
        if missing:
            return Verdict(UNKNOWN, f"Nothing overdue was found in what the core holds, but {'; '.join(missing)}.")
        if outside.stuck_loops:
            return Verdict(LOOP_BLOCKED, f"{self._stuck_loop(outside.stuck_loops[0])} {seen}")
        return _beyond(seen, drains, bypassing, outside)

    def _stuck_loop(self, thread: Thread) -> str:
        what = "The main loop" if thread.tid == self._view.pid else "An iothread's loop"
        functions = self._looker.stack(thread).functions()
        return (
            f"{what} serves nobody: thread {thread.tid} ({thread.name}) has been in "
            f"{self._looker.describe_syscall(thread)}{under(functions)} for {self._watched_s:.1f} s at least."
        )

    def _notes(self, pools: Sequence[InspectedPool], threads: Sequence[InspectedThread]) -> tuple[str, ...]:
        notes = list(self._view.missing())
        if not pools:
            notes.append("no thread pool was found in memory; QEMU makes it with the first request that needs it")
        for pool in pools:
            if pool.torn:
                notes.append(f"the list of pool {pool.pool:#x} is incomplete: {pool.torn}")
            if pool.home_tid is None:
                notes.append(f"the thread that runs pool {pool.pool:#x} was not found")
        if self._is_core:
            notes.append("a core is one moment: how long a request was in its state it does not tell")
        return tuple(notes)


def _functions(stack: Sequence[str]) -> tuple[str, ...]:
    return tuple(frame.split("+")[0] for frame in stack)


def _waits(request: Request) -> bool:
    return request.state in (RequestState.THREAD_QUEUED, RequestState.THREAD_ACTIVE)


def _never_overdue(request: Request) -> bool:
    """Cancelled, or nobody waits for a callback."""
    return request.state == RequestState.THREAD_CANCELED or request.ret == -ECANCELED or not request.callback


def _slept(*threads: Thread | None) -> int | None:
    """The thread's switches, if it slept in one and the same system call at all these moments."""
    first = threads[0]
    if first is None or first.syscall is None or first.state == "R":
        return None
    return first.switches if all(thread == first for thread in threads) else None


def _persistent(watched: _Watched) -> list[Request]:
    """The requests that read the same at every look, as far as the whole list shows that.

    QEMU gives a finished request's memory to the next one at once, and puts that at the list's head: one
    that overtook another is not the same. Only the completion bottom half takes requests off the list, and
    it takes all that are finished: while one stays, none leaves.
    """
    whole = watched.whole or (watched.last,)
    last = whole[-1].listed
    kept = all(then.listed.kept_in(now.listed) for then, now in zip(whole, whole[1:]))
    stands_still = kept and 2 * len(whole) > len(watched.snapshots)
    behind = [_behind(snapshot.listed) for snapshot in whole]
    found = []
    for request in last.requests:
        if _never_overdue(request) or not all(_same_in(request, whole[-1], snapshot) for snapshot in whole):
            continue
        if request.state == RequestState.THREAD_DONE:
            if stands_still:
                found.append(request)
            continue
        # An active one among others that come and go is proved by its worker.
        if request.state == RequestState.THREAD_QUEUED and len(whole) < min(2, len(watched.snapshots)):
            continue
        sets = [places[request.address] for places in behind]
        if all(later <= earlier for earlier, later in zip(sets, sets[1:])):
            found.append(request)
    return found


def _behind(listed: RequestList) -> dict[int, set[int]]:
    """For each request, those that were there before it."""
    addresses = [request.address for request in listed.requests]
    return {address: set(addresses[at + 1 :]) for at, address in enumerate(addresses)}


def _same_in(request: Request, last: _Snapshot, snapshot: _Snapshot) -> bool:
    if snapshot.arguments.get(request.address) != last.arguments.get(request.address):
        return False
    return any(_identity(other) == _identity(request) for other in snapshot.listed.requests)


def _identity(request: Request) -> tuple[int, ...]:
    return (request.address, request.state, request.func, request.arg, request.callback, request.opaque)


def _nobody_told(watched: _Watched) -> bool:
    """Whether the bottom half was not scheduled while the home thread slept, at every look that tells.

    TELLING looks must tell, however many there were: a thread that comes round now and then is awake for moments only.
    """
    telling = _telling(watched)
    return len(telling) >= TELLING and all(s.look.scheduled is False for s in telling)


def _telling(watched: _Watched) -> list[_Snapshot]:
    """The looks during which the home thread slept; whether elsewhere than in its poll, the verdict says."""
    return [s for s in watched.whole if s.switches is not None]


def _is_open(watched: _Watched) -> bool:
    """Whether a finished request stays, nobody was told at any look, and too few looks tell."""
    if any(snapshot.look.scheduled for snapshot in watched.snapshots) or len(_telling(watched)) >= TELLING:
        return False
    return any(request.state == RequestState.THREAD_DONE for request in _persistent(watched))


def _not_told(watched: _Watched, facts: Facts) -> str:
    looks, asleep = len(watched.snapshots), len(_telling(watched))
    what = f"{facts.kind or 'request'}{f' on {facts.file}' if facts.file else ''}"
    told = sum(bool(snapshot.look.scheduled) for snapshot in watched.snapshots)
    if told:
        seen = f"its bottom half was scheduled at {told} of {looks} looks"
    else:
        seen = (
            f"its bottom half was not scheduled at any of {looks} looks, but its home thread slept at {asleep} of them"
        )
    return (
        f"The worker finished this {what}, and its callback has not come: {seen}. That is too little to tell a lost "
        f"wake-up from a loop that is late. Look again, for longer: --deadline 2s."
    )


def _unmoved(snapshots: Sequence[_Snapshot], tid: int) -> bool:
    """Whether a thread slept in one system call from the first look to the last."""
    seen = [next((thread for thread in s.threads if thread.tid == tid), None) for s in snapshots]
    return _slept(*seen) is not None


def _missing(watched: _Watched) -> tuple[str, ...]:
    torn = watched.last.listed.torn
    return (f"the pool's list could not be read to the end ({torn})",) if torn else ()


def _drains(threads: Sequence[InspectedThread]) -> str | None:
    """The function in which a thread waits until requests are done: home threads first, then all others."""
    ordered = sorted(threads, key=lambda thread: not thread.home)
    return next((found for thread in ordered if (found := draining(_functions(thread.stack)))), None)


def _worst(accused: Sequence[InspectedRequest], drains: str | None) -> Verdict:
    """The worst cause of all, in the words of its oldest request."""
    worst = min(accused, key=lambda request: (SEVERITY.index(request.cause or UNKNOWN), -(request.age_s or 0.0)))
    alike = sum(request.cause == worst.cause for request in accused)
    text = worst.explanation or ""
    if alike > 1:
        text += f" {alike - 1} more are late for the same reason."
    if drains:
        text += f" QEMU waits in {drains}: the monitor answers no more until the request is complete."
    return Verdict(worst.cause or UNKNOWN, text)


def _guest(state: RunState | None) -> str:
    if state is None or state.running:
        return ""
    return f" The guest does not run: its run state is `{state.name}`."


def _standing(view: ProcessView) -> str:
    if view.frozen:
        return "The QEMU process is frozen with its cgroup; nothing in it can continue."
    return "The QEMU process is stopped by a signal or a debugger; nothing in it can continue."


def _beyond(seen: str, drains: str | None, bypassing: Sequence[str], outside: Outside) -> Verdict:
    """What is said where neither a pool nor a loop stands still."""
    blind = _cannot_see(bypassing)
    waiting = f" {len(outside.waiting)} other requests did not move: {outside.places()}." if outside.waiting else ""
    if drains:
        return Verdict(ELSEWHERE, f"{seen}{waiting} Yet the home thread waits in {drains}: for something else. {blind}")
    if waiting or bypassing:
        return Verdict(ELSEWHERE, f"{seen}{waiting} {blind}")
    return Verdict(HEALTHY, seen)


def _no_pools() -> str:
    return "There is no thread pool: no request ever needed one."


# -- what bypasses the pool -----------------------------------------------------------------------------


def _bypassing(view: ProcessView) -> tuple[str, ...]:
    """The disks whose reads and writes bypass the thread pool: by what QEMU holds, named by its command line.

    A ring of linux-aio is a mapping, one of io_uring a file descriptor; QEMU has the latter for its loops, too.
    """
    engines = []
    if any(region.path.startswith("/[aio]") for region in _mappings(view)):
        engines.append("native")
    if not view.files() or "anon_inode:[io_uring]" in view.files().values():
        engines.append("io_uring")
    named = [(engine, file) for engine, file in _by_command_line(view) if engine in engines]
    found = [f"{file} (aio={engine})" for engine, file in named]
    if "native" in engines and not any(engine == "native" for engine, _ in named):
        found.append("disks with aio=native")
    return tuple(dict.fromkeys(found))


def _mappings(view: ProcessView) -> list[Region]:
    try:
        return view.regions()
    except (FaultError, OSError):
        return []


def _by_command_line(view: ProcessView) -> list[tuple[str, str]]:
    """(engine, file) of the -drive and -blockdev options that say aio=native or aio=io_uring."""
    found = []
    for argument in view.arguments():
        engine = re.search(r"""aio["']?\s*[=:]\s*["']?(native|io_uring)\b""", argument)
        if engine:
            file = re.search(r"""file(?:\.?name)?["']?\s*[=:]\s*["']?([^,"'}]+)""", argument)
            found.append((engine[1], file[1] if file else shlex.quote(argument)))
    return found


def _cannot_see(bypassing: Sequence[str]) -> str:
    what = ", ".join(bypassing)
    if not what:
        return "Not seen from here: throttling, virtio queues, locks, the guest's own driver."
    return (
        f"Reads and writes of {what} bypass the pool: what the kernel holds of them, a lost completion of theirs, "
        f"throttling, virtio queues and the guest's own driver are not seen from here."
    )
