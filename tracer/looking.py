"""Facts about one late request, gathered from a live process without stopping it.

Knows: how to read the request, its bottom half and its home thread several times in a row. Does not
know what they mean (tracer/verdict) nor when to look (tracer/watch).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from tracer import home, posix_aio
from tracer.build import Loaded
from tracer.errors import FaultError, LayoutError
from tracer.layout import RequestState
from tracer.memory import LiveMemory, read_string
from tracer.pools import Pool, Request, ThreadCounts
from tracer.posix_aio import Operation
from tracer.target import FILE_SYSCALLS, Target, Thread
from tracer.verdict import Facts, Look

LOOKS = 3
#: As many where nobody was told and the home thread has not been seen in its poll: it may be coming round.
LOOKS_FOR_POLL = 25
LOOK_PAUSE_S = 0.004
LOOKS_FOR_IDLE = 10
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

    def __init__(self, target: Target, memory: LiveMemory, loaded: Loaded) -> None:
        self._target = target
        self._memory = memory
        self._loaded = loaded
        self._reader = loaded.reader
        self._homes: dict[int, int] = {}

    def home(self, context: int) -> Thread | None:
        """The thread that runs `context`, now; None when it could not be found out."""
        tid = self._homes.get(context) or home.find_home(
            self._target, self._memory, context, self._loaded.main_context, self._loaded.worker_code
        )
        thread = self._target.thread(tid) if tid else None
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

    def look(self, address: int, age_s: float) -> Finding | None:
        """All about the request at `address`; None when it is not on its pool's list: it is gone."""
        # One that went from QUEUED to ACTIVE or DONE under our eyes is not gone.
        return next(filter(None, (self._look(address, age_s) for _ in range(ATTEMPTS))), None)

    def _look(self, address: int, age_s: float) -> Finding | None:
        """As look(), but None also when the request changed meanwhile."""
        try:
            request = self._reader.request(address)
        except (FaultError, LayoutError):
            return None
        pool = self.pool_of(request)
        if pool is None or self._reader.holds(pool, address) is False:
            return None
        operation = posix_aio.read_operation(self._memory, self._target, request.arg)
        facts = Facts(
            request.state,
            operation.kind,
            operation.file,
            request.ret,
            age_s,
            missing=self._missing(pool, address),
        )
        if request.state == RequestState.THREAD_DONE:
            looked = self._done_facts(pool, request, facts)
        else:
            looked = self._waiting_facts(pool, request, operation, facts)
        return None if looked is None else Finding(request, pool, operation, looked)

    def _missing(self, pool: Pool, address: int) -> tuple[str, ...]:
        torn = self._reader.holds(pool, address) is None
        return ("the pool's list could not be read to the end",) if torn else ()

    def _process_stopped(self) -> bool:
        threads = self._target.threads()
        return self._target.frozen or (bool(threads) and all(thread.stopped for thread in threads))

    def _done_facts(self, pool: Pool, request: Request, facts: Facts) -> Facts | None:
        """Several looks at bottom half and home thread; None when the request went on meanwhile."""
        looks: list[Look] = []
        thread = None
        while len(looks) < LOOKS or (len(looks) < LOOKS_FOR_POLL and _worth_looking_on(looks)):
            if looks:
                time.sleep(LOOK_PAUSE_S)
            thread = self.home(pool.context)
            looks.append(self._one_look(pool, thread))
            if not self._same(request):
                return None
        missing = facts.missing if thread else (*facts.missing, "the thread that runs its context was not found")
        bell = home.find_bell(self._target, self._memory, pool.context, thread)
        return replace(
            facts,
            looks=tuple(looks),
            home_tid=thread.tid if thread else None,
            home_name=thread.name if thread else None,
            process_stopped=self._process_stopped(),
            bell_count=bell.count,
            bell_polled=bell.polled,
            missing=missing,
        )

    def _same(self, request: Request) -> bool:
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

    def _one_look(self, pool: Pool, thread: Thread | None) -> Look:
        try:
            scheduled = self._reader.bottom_half(pool).scheduled
        except FaultError:
            scheduled = None
        if thread is None:
            return Look(scheduled)
        where = self.describe_syscall(thread)
        return Look(scheduled, thread.state, home.parked(thread), where, thread.switches)

    def describe_syscall(self, thread: Thread) -> str | None:
        """A thread's system call with the file that it is on, for people; None while it runs."""
        call = thread.syscall
        if call is None:
            return None
        if call.name in FILE_SYSCALLS:
            file = self._target.file_of(call.args[0] & 0xFFFFFFFF)
            return f"{call.name} on {file}" if file else call.name
        if call.name in ("open", "openat"):
            path = read_string(self._memory, call.args[0 if call.name == "open" else 1])
            return f"{call.name} of {path}" if path else call.name
        return call.name

    def _counts(self, pool: Pool) -> ThreadCounts:
        """The thread counters. Up to 7.0 each worker is idle for a moment after each request: that does not count."""
        seen = [self._reader.threads(pool)]
        while seen[-1].idle and len(seen) < LOOKS_FOR_IDLE:
            time.sleep(LOOK_PAUSE_S)
            seen.append(self._reader.threads(pool))
        return seen[-1]

    def _waiting_facts(self, pool: Pool, request: Request, operation: Operation, facts: Facts) -> Facts | None:
        try:
            counts = self._counts(pool)
        except FaultError:
            counts = None
        if not self._same(request):
            return None
        worker = self._worker_on(operation) if request.state == RequestState.THREAD_ACTIVE else None
        return replace(
            facts,
            process_stopped=self._process_stopped(),
            threads_current=counts.current if counts else None,
            threads_idle=counts.idle if counts else None,
            threads_max=counts.max if counts else None,
            worker_syscall=self.describe_syscall(worker) if worker else None,
            worker_tid=worker.tid if worker else None,
        )

    def _worker_on(self, operation: Operation) -> Thread | None:
        """The worker that is in a system call on the request's file, at its offset where several are."""
        workers = [
            thread
            for thread in self._target.threads()
            if thread.syscall is not None
            and thread.syscall.name in FILE_SYSCALLS
            and thread.syscall.args[0] & 0xFFFFFFFF == operation.fd
        ]
        exact = [thread for thread in workers if thread.syscall and operation.offset in thread.syscall.args]
        return next(iter(exact or workers), None)


def _worth_looking_on(looks: list[Look]) -> bool:
    """Whether only a look at the home thread in its poll is missing for a verdict."""
    return not any(look.scheduled or look.parked is not False for look in looks)
