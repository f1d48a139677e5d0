"""Facts about one late request, gathered without stopping the process.

Knows: how to read the request, its bottom half and its home thread several times in a row. Does not
know what they mean (tracer/verdict) nor when to look (tracer/watch, tracer/inspect).
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tracer import home, posix_aio
from tracer.build import Loaded
from tracer.coroutine import code_regions, read_waiter
from tracer.errors import FaultError, LayoutError
from tracer.layout import RequestState
from tracer.memory import read_string
from tracer.pools import Pool, Request, RequestList, ThreadCounts
from tracer.posix_aio import Operation
from tracer.records import dataclass
from tracer.target import FILE_SYSCALLS, Thread
from tracer.text import printable
from tracer.verdict import MAX_FRAMES, Facts, HomeStack, Look, draining, nested_poll
from tracer.view import Frame, ProcessView, Stack

LOOKS = 3
#: As many where nobody was told and the home thread has not been seen in its poll: it may be coming round.
LOOKS_FOR_POLL = 25
LOOK_PAUSE_S = 0.004
LOOKS_FOR_IDLE = 10
#: For so long what was seen of a pool and of the threads serves for other requests, too; seconds.
FRESH_S = 0.05
#: For so long threads are looked at for one that drains; seconds.
DRAINS_S = 0.1
ATTEMPTS = 3


@dataclass(frozen=True)
class Finding:
    """A late request as memory shows it, with the facts for a verdict."""

    request: Request
    pool: Pool | None
    operation: Operation
    facts: Facts


class Looker:
    """Looks at requests of one process; remembers which thread runs which context."""

    def __init__(self, view: ProcessView, loaded: Loaded) -> None:
        self._view = view
        self._loaded = loaded
        self._reader = loaded.reader
        self._order = posix_aio.order_of(loaded.build.version)
        self._homes: dict[int, int] = {}
        self._stacks: dict[int, tuple[Thread, Stack]] = {}
        self._pool_looks: dict[int, tuple[float, tuple[Look, ...]]] = {}
        self._beside: dict[int, tuple[tuple[Look, ...], dict[str, Any]]] = {}
        self._pool_counts: dict[int, tuple[float, ThreadCounts]] = {}
        self._walks: dict[int, tuple[float, RequestList]] = {}
        self._all_threads: tuple[float, list[Thread]] | None = None

    def know_homes(self, homes: Mapping[int, int]) -> None:
        """The thread (tid) that runs each context, as was found out before."""
        self._homes.update(homes)

    def home(self, context: int) -> Thread | None:
        """The thread that runs `context`, now; None when it could not be found out."""
        tid = self._homes.get(context) or home.find_home(
            self._view, context, self._loaded.main_context, self._loaded.worker_code
        )
        thread = self._view.thread(tid) if tid else None
        if thread is None:
            self._homes.pop(context, None)
        else:
            self._homes[context] = thread.tid
        return thread

    def pool_of(self, request: Request) -> Pool | None:
        """The proved pool of a request, or None."""
        try:
            return self._reader.pool(request.pool)
        except (FaultError, LayoutError):
            return None

    def operation(self, request: Request) -> Operation:
        """What the request does, as far as that proves itself."""
        finished = request.state not in (RequestState.THREAD_QUEUED, RequestState.THREAD_ACTIVE)
        if finished and not posix_aio.outlives_worker(request.arg, request.opaque):
            return self._operation_by_coroutine(request)
        return posix_aio.read_operation(self._view, request.arg, request.func, self._order)

    def _operation_by_coroutine(self, request: Request) -> Operation:
        """The kind by what waits for the request; what its argument was about is not known any more."""
        name = self.function(request.func)
        if name is not None and name.split(".")[0] not in posix_aio.FILE_FUNCTIONS:
            return Operation(posix_aio.OTHER)
        waiter = read_waiter(self._view, code_regions(self._view), request.opaque) if request.callback else None
        if waiter is None:
            return Operation()
        return Operation(posix_aio.kind_of((self.function(waiter.entry), *waiter.stack.functions())))

    def function(self, address: int) -> str | None:
        """The name of the function that starts at `address`, or None."""
        found = self._loaded.function_at(address) or self._view.function_at(address)
        return found[0] if found and found[1] == 0 else None

    def look(self, address: int, age_s: float, at_least: bool = True) -> Finding | None:
        """All about the request at `address`; None when it is not on its pool's list: it is gone.

        `at_least`: it may have been in its state for longer than `age_s`, because it was so when it was first seen.
        """
        # One that went from QUEUED to ACTIVE or DONE under our eyes is not gone.
        return next(filter(None, (self._look(address, age_s, at_least) for _ in range(ATTEMPTS))), None)

    def workers_asleep_s(self) -> float:
        """How long no worker has run, in seconds, 0 where not known: what is finished has been so for as long.

        Whoever finished it has run then, and may have begun another request since.
        """
        regions = self._view.regions()
        slept = []
        for thread in self._view.threads():
            if thread.syscall is None and not re.match(home.NOT_WORKER, thread.name):
                return 0.0
            if home.is_worker(self._view, regions, thread, self._loaded.worker_code):
                slept.append(self._view.asleep_s(thread.tid) or 0.0)
        return min(slept, default=0.0)

    def _look(self, address: int, age_s: float, at_least: bool) -> Finding | None:
        """As look(), but None also when the request changed meanwhile."""
        try:
            request = self._reader.request(address)
        except (FaultError, LayoutError):
            return None
        pool = self.pool_of(request)
        held = pool is not None and self._held(pool, address)
        if pool is None or held is False:
            return None
        operation = self.operation(request)
        facts = replace(self.first_facts(request, operation, age_s), at_least=at_least)
        if held is None:
            facts = replace(facts, missing=("the pool's list could not be read to the end",))
        if request.state == RequestState.THREAD_DONE:
            looks = self._looks(pool, request, age_s)
            if looks is None:
                return None
            facts = self.done_facts(pool, looks, facts)
        else:
            waiting = self.waiting_facts(pool, request, operation, facts)
            if waiting is None:
                return None
            facts = waiting
        return Finding(request, pool, operation, facts)

    def first_facts(self, request: Request, operation: Operation, age_s: float) -> Facts:
        """What the request itself tells."""
        return Facts(
            request.state,
            operation.kind,
            operation.file,
            request.ret,
            age_s,
            function=self.function(request.func),
            barrier_fixed=self._loaded.build.located.barrier_fixed,
            from_core=self._view.core is not None,
        )

    def _held(self, pool: Pool, address: int) -> bool | None:
        """Whether the element is on the pool's list; None when that could not be read to the end.

        A walk of a moment ago serves for what it saw, if the element's own links still say so.
        """
        walked, seen = self._walks.get(pool.address, (0.0, RequestList(())))
        if time.monotonic() - walked <= FRESH_S and seen.holds(address) and self._reader.linked(pool, address):
            return True
        listed = self._reader.patient_requests(pool)
        if listed.torn is None:
            self._walks[pool.address] = time.monotonic(), listed
        return listed.holds(address)

    def _threads(self) -> list[Thread]:
        """All threads, a moment ago at most: many requests may be late at once, and many threads work for them."""
        if self._all_threads is None or time.monotonic() - self._all_threads[0] > FRESH_S:
            threads = self._view.threads()
            self._all_threads = time.monotonic(), threads
        return self._all_threads[1]

    def process_stopped(self) -> bool:
        """Whether a signal, a debugger or the freezer holds the whole process."""
        if self._view.frozen:
            return True
        first = self._view.thread(self._view.pid)
        if first is not None and not first.stopped:
            return False
        threads = self._threads()
        return bool(threads) and all(thread.stopped for thread in threads)

    def _looks(self, pool: Pool, request: Request, age_s: float) -> tuple[Look, ...] | None:
        """Several looks at bottom half and home thread; None when the request went on meanwhile."""
        # What was seen of the pool a moment ago holds for all that were finished before that.
        began, known = self._pool_looks.get(pool.address, (0.0, ()))
        now = time.monotonic()
        if known and now - began <= min(FRESH_S, age_s):
            return known if self.same(request) else None
        looks: list[Look] = []
        while len(looks) < LOOKS or (len(looks) < LOOKS_FOR_POLL and _worth_looking_on(looks)):
            if looks:
                time.sleep(LOOK_PAUSE_S)
            looks.append(self.one_look(pool, self.home(pool.context)))
            if not self.same(request):
                return None
        self._pool_looks[pool.address] = now, tuple(looks)
        return tuple(looks)

    def done_facts(self, pool: Pool, looks: tuple[Look, ...], facts: Facts) -> Facts:
        """What tells why a finished request's callback does not come."""
        # As the looks, what was seen beside them holds for all that share them.
        known = self._beside.get(pool.address)
        if known is None or known[0] is not looks:
            known = self._beside[pool.address] = looks, self._seen_beside(pool)
        found = known[1]
        return replace(facts, looks=looks, **found | {"missing": (*facts.missing, *found["missing"])})

    def _seen_beside(self, pool: Pool) -> dict[str, Any]:
        """Members of Facts: the home thread, its bell, its stack, the process."""
        thread = self.home(pool.context)
        bell = home.find_bell(self._view, pool.context, thread)
        poller = self.poller(pool.context, thread)
        return {
            "home_tid": thread.tid if thread else None,
            "home_name": thread.name if thread else None,
            "process_stopped": self.process_stopped(),
            "bell_count": bell.count,
            "bell_polled": bell.polled,
            "stack": self.home_stack(thread) if thread else HomeStack(),
            "poller_tid": poller.tid if poller else None,
            "poller_name": poller.name if poller else None,
            "poller_stack": self.home_stack(poller) if poller else HomeStack(),
            "draining": self._draining(thread, poller),
            "nested_poll": self._nested_poll(),
            "home_asleep_s": self._asleep(thread),
            **self._thread_counts(pool),
            "missing": () if thread else ("the thread that runs its context was not found",),
        }

    def _thread_counts(self, pool: Pool) -> dict[str, int | None]:
        """Members of Facts: the pool's thread counters, as read just now."""
        try:
            counts = self._reader.threads(pool)
        except FaultError:
            return {}
        return {f"threads_{name}": getattr(counts, name) for name in ("current", "idle", "max", "new", "pending")}

    def poller(self, context: int, thread: Thread | None) -> Thread | None:
        """Who polls `context` although it is not `thread`, its home thread; None where nobody does."""
        return home.find_poller(self._view, context, thread, self._threads(), self._loaded.worker_code)

    def _nested_poll(self) -> bool | None:
        """Whether the main thread polls inside a callback of its own loop; None where its stack does not tell."""
        main = self._view.thread(self._view.pid)
        if main is None or main.syscall is None:
            return None
        stack = self.stack(main)
        if home.parked(main) and nested_poll(stack.functions()):
            return True
        return False if stack.complete else None

    def _draining(self, *first: Thread | None) -> str | None:
        """The function in which a thread waits until requests are done, whichever thread it is.

        Such a thread sleeps in the poll of aio_poll; others are not looked at, nor any after a while.
        """
        until = time.monotonic() + DRAINS_S
        others = [thread for thread in self._threads() if home.parked(thread)]
        for thread in (*filter(None, first), *others):
            found = draining(self.stack(thread).functions())
            if found is not None or time.monotonic() > until:
                return found
        return None

    def _asleep(self, thread: Thread | None) -> float | None:
        return self._view.asleep_s(thread.tid) if thread and thread.syscall else None

    def same(self, request: Request) -> bool:
        """Whether the element still is the same request in the same state."""
        try:
            now = self._reader.request(request.address)
        except (FaultError, LayoutError):
            return False
        return (now.state, now.pool, now.func, now.arg, now.opaque) == (
            request.state,
            request.pool,
            request.func,
            request.arg,
            request.opaque,
        )

    def one_look(self, pool: Pool, thread: Thread | None) -> Look:
        """The bottom half and the home thread, as read just now."""
        try:
            scheduled = self._reader.bottom_half(pool).scheduled
        except FaultError:
            scheduled = None
        if thread is None:
            return Look(scheduled)
        where = self.describe_syscall(thread)
        return Look(scheduled, thread.state, home.parked(thread), where, thread.switches, thread.ran_s, thread.waited_s)

    def stack(self, thread: Thread) -> Stack:
        """A thread's stack; unwound again only when the thread has moved."""
        known = self._stacks.get(thread.tid)
        if known and thread.syscall is not None and thread.switches is not None and known[0] == thread:
            return known[1]
        stack = self._view.stack(thread.tid)
        named = Stack(tuple(self._named(frame) for frame in stack.frames), stack.complete, stack.why_not)
        self._stacks[thread.tid] = (thread, named)
        return named

    def _named(self, frame: Frame) -> Frame:
        """A frame in a function without a symbol, named where the search for sites found the function."""
        if frame.function is not None:
            return frame
        found = self._loaded.function_at(frame.address)
        return replace(frame, function=found[0], offset=found[1]) if found else frame

    def home_stack(self, thread: Thread) -> HomeStack:
        """A thread's stack for a verdict."""
        stack = self.stack(thread)
        frames = tuple(str(frame) for frame in stack.frames[:MAX_FRAMES])
        return HomeStack(frames, stack.functions(), stack.complete, stack.why_not)

    def describe_syscall(self, thread: Thread) -> str | None:
        """A thread's system call with the file that it is on, for people; None while it runs."""
        call = thread.syscall
        if call is None:
            return None
        if call.name in FILE_SYSCALLS:
            file = self._view.file_of(call.args[0] & 0xFFFFFFFF)
            return f"{call.name} on {file}" if file else call.name
        if call.name in ("open", "openat"):
            path = read_string(self._view.memory, call.args[0 if call.name == "open" else 1])
            return f"{call.name} of {printable(path)}" if path else call.name
        return call.name

    def _counts(self, pool: Pool) -> ThreadCounts:
        """The thread counters, a moment ago at most: they are looked at for a while where workers are idle."""
        began, known = self._pool_counts.get(pool.address, (0.0, None))
        if known is None or time.monotonic() - began > FRESH_S:
            known = self._counted(pool)
            self._pool_counts[pool.address] = time.monotonic(), known
        return known

    def _counted(self, pool: Pool) -> ThreadCounts:
        """Up to 7.0 each worker is idle for a moment after each request: that does not count."""
        seen = [self._reader.threads(pool)]
        while seen[-1].idle and len(seen) < LOOKS_FOR_IDLE and self._view.core is None:
            time.sleep(LOOK_PAUSE_S)
            seen.append(self._reader.threads(pool))
        return seen[-1]

    def waiting_facts(self, pool: Pool, request: Request, operation: Operation, facts: Facts) -> Facts | None:
        """What tells why a request is not finished; None when it went on meanwhile."""
        try:
            counts = self._counts(pool)
        except FaultError:
            counts = None
        if not self.same(request):
            return None
        threads = self._threads()
        active = request.state == RequestState.THREAD_ACTIVE
        busy = Counter[str]() if active else self._places_in_storage(threads)
        worker = self.worker_on(threads, operation) if active else None
        return replace(
            facts,
            process_stopped=self.process_stopped(),
            threads_current=counts.current if counts else None,
            threads_idle=counts.idle if counts else None,
            threads_max=counts.max if counts else None,
            threads_new=counts.new if counts else None,
            threads_pending=counts.pending if counts else None,
            worker_syscall=self.describe_syscall(worker) if worker else None,
            worker_tid=worker.tid if worker else None,
            worker_state=worker.state if worker else None,
            worker_kernel=self._view.kernel_stack(worker.tid) if worker else (),
            worker_asleep_s=self._asleep(worker),
            busy_with=_most_of(busy),
            workers_in_storage=None if active else sum(busy.values()),
        )

    def _places_in_storage(self, threads: list[Thread]) -> Counter[str]:
        """How many workers are in which system call on a file; a vCPU's ioctl is none of that."""
        regions = self._view.regions()
        return Counter(
            where
            for thread in threads
            if thread.syscall is not None
            and thread.syscall.name in FILE_SYSCALLS
            and home.is_worker(self._view, regions, thread, self._loaded.worker_code)
            and (where := self.describe_syscall(thread)) is not None
        )

    def worker_on(self, threads: list[Thread], operation: Operation) -> Thread | None:
        """The worker that is in a system call on the request's file, at its offset where several are."""
        workers = [
            thread
            for thread in threads
            if thread.syscall is not None
            and thread.syscall.name in FILE_SYSCALLS
            and thread.syscall.args[0] & 0xFFFFFFFF == operation.fd
        ]
        exact = [thread for thread in workers if thread.syscall and operation.offset in thread.syscall.args]
        return next(iter(exact or workers), None)


def _most_of(places: Counter[str]) -> str | None:
    """Where most are, and how many elsewhere."""
    if not places:
        return None
    (where, count), *others = places.most_common()
    return f"{count} in {where}" + (f" and {sum(n for _, n in others)} elsewhere" if others else "")


def _worth_looking_on(looks: list[Look]) -> bool:
    """Whether only a look at the home thread in its poll is missing for a verdict."""
    return not any(look.scheduled or look.parked is not False for look in looks)
