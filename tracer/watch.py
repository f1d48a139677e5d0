"""One QEMU under watch: attach, look when a deadline may have passed, judge, tell.

Knows: the order of a trace of one process. A request that becomes THREAD_DONE after a scan cannot be
overdue before that scan's time plus the deadline, so scans follow the deadlines, not the requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import field

from tracer import figures, posix_aio, probes
from tracer.build import Build, load
from tracer.events import Alert, Attached, Counts, Event, Latency, PoolInfo, ProbeInfo, Requests, Resolved, TargetEnded
from tracer.layout import RequestState
from tracer.live import LiveView
from tracer.looking import Finding, Looker
from tracer.pools import Pool
from tracer.probes import Record, Statistics, Subject
from tracer.records import dataclass
from tracer.sampling import MemorySampler
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES
from tracer.target import Target
from tracer.verdict import as_evidence, judge

ECANCELED = 125
FULL, ALERT_ONLY, NONE = "full", "alert", "none"
MODES = {FULL: SITE_NAMES, ALERT_ONLY: (DONE, CALLBACK), NONE: ()}

#: While a request is late, how often to see whether it went on; seconds.
RESOLVE_S = 0.05
#: Without probes, how often new pools are searched for, and while there is none; seconds.
SEARCH_S, SEARCH_FIRST_S = 10.0, 1.0
#: Without probes, how long a proof of what is stuck counts; seconds.
PROVED_S = 0.5
#: A scan a little after the deadline sees the request as overdue; seconds.
MARGIN_S = 0.002


@dataclass(frozen=True)
class Settings:
    """What the user asked for; durations in seconds, `slow_s` 0 for never."""

    deadline_s: float = 1.0
    slow_s: float = 10.0
    mode: str = FULL
    max_requests: int = probes.MAX_REQUESTS
    locate_by: str | None = None


@dataclass
class _Alerted:
    record: Record
    pool: int | None
    causes: set[str] = field(default_factory=set)
    judged: float = 0.0
    cause: str = ""


class Watch:
    """A trace of one process. `emit` gets every event."""

    def __init__(self, target: Target, build: Build, settings: Settings, emit: Callable[[Event], None]) -> None:
        self.target = target
        self._build = build
        self._settings = settings
        self._emit = emit
        self._view = LiveView(target)
        self._loaded = load(self._view, build)
        self._reader = self._loaded.reader
        self._looker = Looker(self._view, self._loaded)
        self._stuck: set[int] = set()
        self._proved_at = self._next_search = 0.0
        self._probes: probes.Probes | None = None
        self._sampler: MemorySampler | None = None
        self._alerted: dict[int, _Alerted] = {}
        self._ignored: dict[int, Record] = {}
        self._began = time.monotonic()
        self._last_scan = self._began
        self._period_start = self._began
        self._snapshot: dict[Subject, Statistics] = {}
        self._files: dict[int, str] = {}
        self._late = self._late_before = 0
        self._period_alerts = 0
        self._stale = 0
        self.alerts = 0
        self.next_scan = self._began
        self._next_search = self._began

    # -- attach -------------------------------------------------------------------------------------

    def attach(self, started: float) -> None:
        """Load and attach what the mode wants, adopt what is in flight; `started` is when the command began."""
        names = MODES[self._settings.mode]
        sites = self._build.located.sites_of(*names)
        if sites:
            element = self._build.located.layout.element
            order = posix_aio.order_of(self._build.version)
            what = probes.Parameters(self._settings.max_requests, self._settings.deadline_s, order)
            self._probes = probes.Probes(self.target.pid, sites, element, what)
            self.target.check_alive()
            self._probes.attach()
        pools = self._reader.find(self._view.heap_chunks())
        in_flight = self._adopt(pools)
        now = time.monotonic()
        self._next_search = now + SEARCH_S
        self._began = self._period_start = self._last_scan = now
        self._plan(now, {})
        self._emit(
            Attached(
                time.time(),
                self.target.pid,
                self.target.exe,
                self._build.version,
                self._settings.mode,
                tuple(ProbeInfo(s.name, s.address, s.strategy, s.cheap) for s in sites),
                tuple(self._pool_info(pool) for pool in pools),
                in_flight,
                now - started,
                self._notes(pools),
            )
        )

    def _notes(self, pools: list[Pool]) -> tuple[str, ...]:
        if pools:
            return ()
        return ("no thread pool was found in memory yet; QEMU makes it with the first request that needs it",)

    def _pool_info(self, pool: Pool) -> PoolInfo:
        thread = self._looker.home(pool.context)
        return PoolInfo(pool.address, pool.context, thread.tid if thread else None, thread.name if thread else None)

    def _adopt(self, pools: list[Pool]) -> int:
        """Follow what is in the pools already; how many requests that were."""
        if self._probes is None:
            self._sampler = MemorySampler(self._reader, pools)
            self._sampler.sample(time.monotonic_ns())
            return len(self._sampler.records())
        in_flight = 0
        adopted: set[int] = set()
        # Twice: one that became done between reading and adopting passed its probe unnoticed.
        for _ in range(2):
            found = [request for pool in pools for request in self._reader.patient_requests(pool).requests]
            in_flight = in_flight or len(found)
            for request in found:
                adopted.add(request.address)
                done = request.state == RequestState.THREAD_DONE
                if self._with_submit or done:
                    kind = self._looker.operation(request).kind or "other"
                    self._probes.adopt(request.address, kind, time.monotonic_ns(), done)
        self._forget_gone(pools, adopted)
        return in_flight

    def _forget_gone(self, pools: list[Pool], adopted: set[int]) -> None:
        """One that was called back between reading and adopting passed its last probe unnoticed."""
        for address in adopted:
            record = self._probes.record(address) if self._probes else None
            if record and record.before and all(self._reader.holds(pool, address) is False for pool in pools):
                self._drop(record)

    @property
    def _with_submit(self) -> bool:
        return self._settings.mode == FULL

    # -- scan ---------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Look for late requests and for late ones that went on; plans the next scan."""
        now = time.monotonic()
        records = self._records()
        self._resolve(records, now)
        for record in records.values():
            limit = self._limit_of(record)
            if limit is not None and now >= limit:
                self._consider(record, now)
        self._ignored = {a: r for a, r in self._ignored.items() if records.get(a) == r}
        self._plan(now, records)
        self._last_scan = now

    def _records(self) -> dict[int, Record]:
        if self._probes is not None:
            return self._probes.records()
        if self._sampler is not None:
            self._find_pools(time.monotonic())
            self._sampler.sample(time.monotonic_ns())
            return self._sampler.records()
        return {}

    def _limit_of(self, record: Record) -> float | None:
        """When this record is overdue, on the monotonic clock; None for never."""
        if record.flags & probes.FLAG_NO_CALLBACK or self._ignored.get(record.request) == record:
            return None
        if record.done_ns:
            return record.done_ns / 1e9 + self._settings.deadline_s
        if self._settings.slow_s and record.submit_ns:
            return record.submit_ns / 1e9 + self._settings.slow_s
        return None

    def _plan(self, now: float, records: dict[int, Record]) -> None:
        """When to scan next: at the first deadline of what is known, or of what may come right after now."""
        due = now + self._settings.deadline_s
        if self._settings.slow_s:
            due = min(due, now + self._settings.slow_s)
        if self._probes is None:
            due = min(due, now + max(self._settings.deadline_s / 4, 0.01))
        for record in records.values():
            limit = self._limit_of(record)
            if limit is not None and record.request not in self._alerted:
                due = min(due, limit)
        if self._alerted:
            due = min(due, now + RESOLVE_S)
        self.next_scan = max(due, now) + MARGIN_S

    def _resolve(self, records: dict[int, Record], now: float) -> None:
        for address, alerted in list(self._alerted.items()):
            record = records.get(address)
            if record is not None and (record.submit_ns, record.done_ns) == (
                alerted.record.submit_ns,
                alerted.record.done_ns,
            ):
                continue
            del self._alerted[address]
            since = alerted.record.done_ns or alerted.record.submit_ns
            # What the probes followed from its submit on, they count.
            self._late += bool(alerted.record.done_ns) and (self._probes is None or alerted.record.before)
            self._emit(Resolved(time.time(), self.target.pid, address, alerted.pool, now - since / 1e9, alerted.cause))

    def _consider(self, record: Record, now: float) -> None:
        """An overdue record: believe memory, not the record, then judge and tell."""
        known = self._alerted.get(record.request)
        if known and now - known.judged < max(self._settings.deadline_s, 1.0):
            return
        if self._probes is None and not self._proved(record):
            return
        since = record.done_ns or record.submit_ns
        finding = self._looker.look(record.request, now - since / 1e9)
        if finding is None or not self._still(record):
            if known is None:
                self._drop(record)
            return
        if _never_overdue(finding) or not _agrees(finding, record):
            self._ignored[record.request] = record
            return
        self._judged(record, finding, known)

    def _still(self, record: Record) -> bool:
        if self._probes is None:
            return True
        return self._probes.record(record.request) == record

    def _proved(self, record: Record) -> bool:
        """Without probes: whether it is one request that does not go on, not several that look the same."""
        if self._sampler is None:
            return False
        if time.monotonic() - self._proved_at > PROVED_S:
            from tracer.inspect import stuck

            self._stuck = stuck(self._view, self._loaded, self._sampler.pools)
            self._proved_at = time.monotonic()
        if record.request not in self._stuck:
            self._sampler.restart(record.request, time.monotonic_ns())
        return record.request in self._stuck

    def _find_pools(self, now: float) -> None:
        """Without probes: pools are made with the first request that needs them, and go with their iothread."""
        if self._sampler is not None and now >= self._next_search:
            self._sampler.pools = self._reader.find(self._view.heap_chunks())
            took = time.monotonic() - now
            # At most a twentieth of the time; sooner while there is none.
            self._next_search = time.monotonic() + max(20 * took, SEARCH_S if self._sampler.pools else SEARCH_FIRST_S)

    def _drop(self, record: Record) -> None:
        """The request is gone from memory but not from the map: a hit was not seen, or came too late."""
        if self._probes is not None and self._still(record):
            self._probes.forget(record)
            self._stale += self._with_submit and not record.before

    def _judged(self, record: Record, finding: Finding, known: _Alerted | None) -> None:
        verdict = judge(finding.facts)
        alerted = known or _Alerted(record, finding.pool.address if finding.pool else None)
        alerted.judged = time.monotonic()
        if verdict.cause not in alerted.causes:
            alerted.causes.add(verdict.cause)
            alerted.cause = verdict.cause
            self._alerted[record.request] = alerted
            self.alerts += 1
            self._period_alerts += 1
            self._emit(self._alert(record, finding, verdict.cause, verdict.explanation))

    def _alert(self, record: Record, finding: Finding, cause: str, explanation: str) -> Alert:
        request, pool, operation = finding.request, finding.pool, finding.operation
        done = record.done_ns != 0
        now_ns = time.monotonic_ns()
        return Alert(
            time.time(),
            self.target.pid,
            request.address,
            pool.address if pool else None,
            pool.context if pool else None,
            operation.kind,
            operation.file,
            operation.offset,
            operation.bytes,
            request.state.name,
            request.ret,
            (now_ns - (record.done_ns or record.submit_ns)) / 1e9,
            self._settings.deadline_s if done else self._settings.slow_s,
            cause,
            explanation,
            as_evidence(finding.facts) | {"layout": self._build.located.layout.source},
            "memory" if record.before else "probes",
            (now_ns - record.submit_ns) / 1e9 if record.submit_ns and not record.before else None,
        )

    # -- figures ------------------------------------------------------------------------------------

    def counts(self, final: bool) -> None:
        """Tell the figures since the last time, or of the whole trace."""
        now = time.monotonic()
        by_subject = self._probes.statistics() if self._probes else {}
        then = {} if final else self._snapshot
        period = {
            subject: figures.difference(statistics, then.get(subject, Statistics()))
            for subject, statistics in by_subject.items()
        }
        total = figures.combined(period.values())
        start = self._began if final else self._period_start
        self._emit(
            Counts(
                time.time(),
                self.target.pid,
                final,
                now - start,
                self._requests(total),
                self.alerts if final else self._period_alerts,
                total.map_full + total.missed + (self._stale if final else 0),
                figures.latencies(total, self._with_submit) if self._probes else {},
                self._grouped(period, lambda subject: subject[0]),
                self._count_notes(total),
                self._grouped(period, self._file_of),
                total.late + self._late - (0 if final else self._late_before),
            )
        )
        self._snapshot, self._period_start, self._period_alerts = by_subject, now, 0
        self._late_before = self._late

    def _grouped(
        self, period: dict[Subject, Statistics], group_of: Callable[[Subject], str | None]
    ) -> dict[str, dict[str, Latency]]:
        groups = figures.grouped(period, group_of)
        return {name: figures.latencies(statistics, self._with_submit) for name, statistics in groups.items()}

    def _file_of(self, subject: Subject) -> str | None:
        """The file of a descriptor: what it is now, or was when it was last seen open."""
        fd = subject[1]
        if fd is None:
            return None
        name = self._view.file_of(fd)
        if name is not None:
            self._files[fd] = name
        return self._files.get(fd)

    def _requests(self, total: Statistics) -> Requests:
        if self._probes is None:
            in_flight = len(self._sampler.records()) if self._sampler else None
            return Requests(None, None, None, None, in_flight)
        return figures.requests(total, len(self._probes.records()) if self._with_submit else None, self._with_submit)

    def _count_notes(self, total: Statistics) -> tuple[str, ...]:
        notes = []
        if total.map_full:
            notes.append(
                f"{total.map_full} requests could not be followed because more than "
                f"{self._settings.max_requests} were under way: a lost completion among them is not seen"
            )
        if self._with_submit and total.missed:
            notes.append(f"{total.missed} hits of probes were not seen")
        return tuple(notes)

    # -- end ----------------------------------------------------------------------------------------

    def ended(self) -> None:
        """Tell that the process is gone."""
        self._emit(TargetEnded(time.time(), self.target.pid, f"process {self.target.pid} has ended"))

    def close(self) -> None:
        """Detach; the process goes on untouched."""
        if self._probes is not None:
            self._probes.close()
            self._probes = None
        self._view.close()


def _never_overdue(finding: Finding) -> bool:
    """Cancelled, or nobody waits for a callback."""
    request = finding.request
    cancelled = request.state == RequestState.THREAD_CANCELED or request.ret == -ECANCELED
    return cancelled or not request.callback


def _agrees(finding: Finding, record: Record) -> bool:
    """Whether memory shows the state that the record is late in."""
    return (finding.request.state == RequestState.THREAD_DONE) == bool(record.done_ns)
