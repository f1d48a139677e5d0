"""One QEMU under watch: attach, look when a deadline may have passed, judge, tell.

Knows: the order of a trace of one process. A request that becomes THREAD_DONE after a scan cannot be
overdue before that scan's time plus the deadline, so scans follow the deadlines, not the requests.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import field, replace
from functools import partial

from tracer import figures, posix_aio, probes
from tracer.apart import Errand
from tracer.budget import Decision
from tracer.build import Build, load
from tracer.descriptors import Descriptors
from tracer.errors import FaultError, HostError, LayoutError
from tracer.events import (
    Alert,
    Attached,
    Counts,
    Event,
    Failure,
    Latency,
    PoolInfo,
    ProbeInfo,
    Requests,
    Resolved,
    Stepped,
    TargetEnded,
)
from tracer.executable import Executable
from tracer.layout import RequestState
from tracer.live import LiveView
from tracer.looking import Finding, Looker
from tracer.maps import FLAG_NO_CALLBACK, Record, Statistics, Subject
from tracer.pools import Pool
from tracer.posix_aio import Operation
from tracer.records import dataclass
from tracer.sampling import MemorySampler
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES
from tracer.spending import HitPrice, Spending
from tracer.target import Target
from tracer.verdict import LOOP_BUSY, UNKNOWN, as_evidence, judge

ECANCELED = 125
FULL, ALERT_ONLY, NONE = "full", "alert", "none"
MODES: dict[str, tuple[str, ...]] = {FULL: SITE_NAMES, ALERT_ONLY: (DONE, CALLBACK), NONE: ()}

#: While a request is late, how often to see whether it went on, and where many are; seconds.
RESOLVE_S, RESOLVE_MANY_S = 0.05, 0.25
#: Without probes, how often memory is sampled: so many times in a deadline, in seconds at most and at least.
SAMPLES, SAMPLE_S, SAMPLE_MIN_S = 4, 1.0, 0.01
#: Without probes, how often new pools are searched for, and how soon after the last time if there are new
#: threads, which a new pool always brings; seconds.
SEARCH_S, SEARCH_SOON_S = 60.0, 1.0
#: So much of the time goes into that at most, with a pool and without.
SEARCH_SHARE, SEARCH_SHARE_FIRST = 1 / 400, 1 / 20
#: Without probes, how long before the deadline a request is to be proved stuck, besides the time between two
#: samples, by which it may be older than it looks: PATIENCE_S of tracer.inspect and a little; and the pause after a
#: proof that failed; seconds.
PROOF_S, FAILED_S = 0.25, 0.25
#: After so many alerts in so many seconds on a loop that is only slow (FOR_SLOWNESS), further late requests are looked
#: at together, so often; seconds.
MANY_ALERTS, MANY_ALERTS_S, TOGETHER_S = 8, 10.0, 1.0
#: What is said of requests whose home thread runs, and comes round late.
FOR_SLOWNESS = frozenset({LOOP_BUSY, UNKNOWN})
#: So long a search for pools may take, and how often to see whether it has ended; seconds.
SEARCH_MOST_S, SEARCHING_S = 60.0, 0.05
#: Of the tracer's processor, what samples take of the time, at most.
SAMPLE_SHARE = 1 / 20
#: What late requests of one process take of that at a time (seconds), and of the time; so many are told of at once.
SLICE_S, SLICE_SHARE, MOST_ALERTED = 0.2, 1 / 2, 1024
#: What it may take to adopt those that were there before; of a processor's time, seconds.
ADOPT_S = 1.0
#: How long memory is sampled because requests could not be followed: the first time, and at most; seconds.
SAMPLED_S, SAMPLED_MOST_S = 30.0, 600.0
#: How often to see whether the process still runs the same program; seconds.
PROGRAM_S = 5.0
#: How often to see whether the descriptors of known files are still the same files; seconds.
NAMES_S = 0.25
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
    budget: float = 0.0  # of one processor for the probes of one process; 0 for no limit


#: With shared probes, what was read is good for all processes that are asked about at the same time; seconds.
FRESH_S = 0.02


def parameters_of(build: Build, settings: Settings, shared: bool = False) -> probes.Parameters:
    """What the programs for this build are compiled for."""
    order = posix_aio.order_of(build.version)
    if not shared:
        return probes.Parameters(settings.max_requests, settings.deadline_s, order)
    return probes.Parameters(
        settings.max_requests, settings.deadline_s, order, shared=True, fresh_s=FRESH_S, shares=probes.SHARES
    )


@dataclass
class _Alerted:
    record: Record
    pool: int | None
    since_ns: int
    causes: set[str] = field(default_factory=set)
    judged: float = 0.0
    cause: str = ""


@dataclass(frozen=True)
class Found:
    """The pools of a process; by context, the thread that runs it (tid and name) where that shows."""

    pools: tuple[Pool, ...]
    homes: Mapping[int, tuple[int, str]]


def find_pools(target: Target, build: Build) -> Found:
    """All that the process's heap holds now. It takes as long as the process has made it; see tracer.apart."""
    with closing(LiveView(target)) as view:
        loaded = load(view, build)
        looker = Looker(view, loaded)
        pools = tuple(loaded.reader.find(view.heap_chunks()))
        threads = {pool.context: looker.home(pool.context) for pool in pools}
        target.check_alive()
    return Found(pools, {context: (thread.tid, thread.name) for context, thread in threads.items() if thread})


class Watch:
    """A trace of one process. `emit` gets every event."""

    def __init__(
        self,
        target: Target,
        build: Build,
        settings: Settings,
        emit: Callable[[Event], None],
        price: HitPrice | None = None,
    ) -> None:
        """`price`: what a hit costs, measured once for all watches of a session."""
        self.target = target
        self._build = build
        self._settings = settings
        self._emit = emit
        self.executable: object = None  # what the session tells executables apart by
        self._view = LiveView(target)
        try:
            self._loaded = load(self._view, build)
        except BaseException:
            self._view.close()
            raise
        self._reader = self._loaded.reader
        self._looker = Looker(self._view, self._loaded)
        self._proved: dict[int, Record] = {}
        self._next_proof = 0.0
        self._probes: probes.Probes | None = None
        self._sampler: MemorySampler | None = None
        self._alerted: dict[int, _Alerted] = {}
        self._ignored: dict[int, Record] = {}
        self._began = time.monotonic()
        self._last_scan = self._began
        self._period_start = self._began
        self._snapshot: dict[Subject, Statistics] = {}
        self._descriptors = Descriptors()
        self._by_file: dict[tuple[str, str], Statistics] = {}
        self._next_names = 0.0
        self._late_at_stop: int | None = None  # how many had been late when the process was seen to be stopped
        self._late_by_stop = 0
        self._stopped = False
        self._late = self._late_before = 0
        self._period_alerts = 0
        self._stale = 0
        self._mode = settings.mode
        self._spending = self._make_spending(price or HitPrice())
        self._stepped = self._stepped_in_period = False
        self._adopted = False
        self._slow_times: deque[float] = deque(maxlen=MANY_ALERTS)
        self._next_full = self._next_look = self._next_program_look = 0.0
        self.alerts = 0
        self.next_scan = self._began
        self._tids: set[int] = set()
        self._new_threads = False
        self._search_soon = self._search_latest = self._search_began = self._began
        self._search: Errand | None = None
        self._pools: list[Pool] = []
        self._hurt = self._unfinished = False
        self._mode_before = self._mode
        self._lost = 0
        self._sampled_until, self._sampled_s = 0.0, SAMPLED_S
        self._sample_took = 0.0

    def _make_spending(self, price: HitPrice) -> Spending | None:
        if not self._settings.budget or self._mode == NONE:
            return None
        modes = [mode for mode in MODES if mode != FULL or self._mode == FULL]
        sites = self._build.located.sites
        return Spending(
            self._settings.budget, {mode: [sites[name].cheap for name in MODES[mode]] for mode in modes}, price
        )

    # -- attach -------------------------------------------------------------------------------------

    def attach(self, started: float, file: Executable, programs: probes.Programs | None = None) -> None:
        """Attach what the mode wants, adopt what is in flight; `started` is when the command began.

        `file` is what the build was read from; it stays open while the watch lasts. `programs` are those that are
        shared by the processes of this build, if they are.
        """
        self.attach_probes(file, programs)
        self.begin(started, find_pools(self.target, self._build))

    def attach_probes(self, file: Executable, programs: probes.Programs | None = None) -> None:
        """The first half of attach()."""
        sites = self._build.located.sites_of(*MODES[self._mode])
        if sites:
            element = self._build.located.layout.element
            what = parameters_of(self._build, self._settings)
            self._probes = probes.Probes(self.target.pid, file, sites, element, what, programs)
            self.target.check_memory()
            self._probes.attach()
        self._tids = set(self.target.tids())

    def begin(self, started: float, found: Found) -> None:
        """The second half of attach(), with what was found after the first."""
        self._looker.know_homes({context: tid for context, (tid, _) in found.homes.items()})
        self._pools = pools = list(found.pools)
        in_flight = self._adopt(pools)
        self._take_names()
        now = time.monotonic()
        self._next_names = now + NAMES_S
        self._search_soon, self._search_latest = now + SEARCH_SOON_S, now + SEARCH_S
        self._began = self._period_start = self._last_scan = now
        self._plan(now, {})
        self._emit(
            Attached(
                time.time(),
                self.target.pid,
                self.target.exe,
                self._build.version,
                self._settings.mode,
                tuple(
                    ProbeInfo(site.name, site.address, site.strategy, site.cheap)
                    for site in self._build.located.sites_of(*MODES[self._mode])
                ),
                tuple(
                    PoolInfo(pool.address, pool.context, *found.homes.get(pool.context, (None, None))) for pool in pools
                ),
                in_flight,
                now - started,
                self._notes(pools),
            )
        )

    def _notes(self, pools: list[Pool]) -> tuple[str, ...]:
        notes = []
        if not pools:
            notes.append("no thread pool was found in memory yet; QEMU makes it with the first request that needs it")
        if self._settings.mode == ALERT_ONLY and self._settings.slow_s:
            notes.append(
                "requests that the storage holds, or that wait for a worker, are not seen with --probes alert, nor are "
                "kinds and files"
            )
        return tuple(notes)

    def _adopt(self, pools: list[Pool]) -> int:
        """Follow what is in the pools already; how many requests that were."""
        if self._probes is None or self._mode == NONE:
            self._sampler = MemorySampler(self._view.memory, self._reader, pools)
            self._sampler.sample(time.monotonic_ns())
            return len(self._sampler.records())
        self._sampler = None
        in_flight = 0
        adopted: set[int] = set()
        until = time.thread_time() + ADOPT_S
        # Twice: one that became done between reading and adopting passed its probe unnoticed.
        for _ in range(2):
            found = [request for pool in pools for request in self._reader.patient_requests(pool, until).requests]
            in_flight = in_flight or len(found)
            for request in found:
                adopted.add(request.address)
                done = request.state == RequestState.THREAD_DONE
                if self._with_submit or done:
                    kind = self._looker.operation(request).kind or "other"
                    self._hurt |= not self._probes.adopt(request.address, kind, time.monotonic_ns(), done)
                if time.thread_time() >= until:
                    self._hurt = True
                    break
        self._forget_gone(pools, adopted, until)
        self._probes.settled()
        self._adopted = bool(adopted)
        return in_flight

    def _forget_gone(self, pools: list[Pool], adopted: set[int], until: float) -> None:
        """One that was called back between reading and adopting passed its last probe unnoticed."""
        for address in adopted:
            if time.thread_time() >= until:
                self._hurt = True
                return
            record = self._probes.record(address) if self._probes else None
            if record and record.before and all(self._reader.holds(pool, address) is False for pool in pools):
                self._drop(record)

    @property
    def _with_submit(self) -> bool:
        return self._mode == FULL

    # -- budget -------------------------------------------------------------------------------------

    def _spend(self, now: float) -> None:
        """Look at what the probes cost; use fewer, or more again, where the budget says so."""
        if self._spending is None or self._probes is None or now < max(self._spending.due(), self._sampled_until):
            return
        completed = None if self._mode == NONE else self._probes.completed()
        decision = self._spending.look(now, self._mode, completed)
        if decision.mode != self._mode:
            self._step(decision)

    def _step(self, decision: Decision) -> None:
        before = self._mode
        self._change_mode(decision.mode)
        self._stepped = self._stepped_in_period = True
        if self._mode != before:
            stepped = Stepped(time.time(), self.target.pid, before, self._mode, decision.share, self._settings.budget)
            self._emit(stepped)

    def _change_mode(self, mode: str) -> None:
        before, self._mode = self._mode, mode
        assert self._probes is not None
        try:
            self._probes.step(MODES[self._mode])
        except HostError as error:
            self._without_probes(error)
        if NONE in (before, self._mode):
            self._change_source()
        elif self._mode == FULL:
            # Those that are not done yet had no record.
            self._adopt(self._pools)
            self._begin_search()

    def _look_for_hurt(self, now: float) -> None:
        """Where requests could not be followed, memory is sampled for a time: their alerts must come all the same."""
        if self._probes is None:
            return
        if self._mode == NONE:
            if self._sampled_until and now >= self._sampled_until:
                self._sampled_until = 0.0
                self._lost = self._probes.lost()
                self._change_mode(self._mode_before)
            return
        if not self._hurt and self._probes.lost() <= self._lost:
            return
        self._hurt, self._mode_before = False, self._mode
        self._sampled_until = now + self._sampled_s
        self._sampled_s = min(2 * self._sampled_s, SAMPLED_MOST_S)
        self._change_mode(NONE)
        message = f"requests of process {self.target.pid} could not be followed, since too many were under way"
        self._emit(
            Failure(
                time.time(),
                self.target.pid,
                f"{message}; its memory is sampled for a time, as with --probes none",
                None,
            )
        )

    def _without_probes(self, error: HostError) -> None:
        """They were to be put back, and could not be: go on without, and do not try again."""
        assert self._probes is not None
        self._mode, self._spending = NONE, None
        self._probes.step(())
        self._emit(Failure(time.time(), self.target.pid, error.message, error.hint))

    def _change_source(self) -> None:
        """From the probes' records to those of memory, or back; what was told of stays told of."""
        assert self._probes is not None
        if self._mode == NONE:
            known = self._probes.records()
            self._learn_pools([*self._alerted, *known])
            for record in known.values():
                self._probes.forget(record)
        self._adopt(self._pools)
        self._begin_search()
        records = self._records()
        for address, alerted in self._alerted.items():
            alerted.record = records.get(address, alerted.record)

    # -- scan ---------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Look for late requests and for late ones that went on; plans the next scan."""
        now = time.monotonic()
        between = now < self._next_full
        if now >= self._next_names:
            self._take_names(disks=between)
            self._next_names = now + NAMES_S
        if self._probes is not None and self._mode != NONE and between:
            self._follow_alerted(now)
            return
        self._take_search(now)
        self._look_for_hurt(now)
        self._see_stop()
        records = self._records()
        if now >= self._next_program_look:
            self._next_program_look = now + PROGRAM_S
            self.target.check_memory()
        if self._mode == NONE:
            now = time.monotonic()  # a proof takes its time
        self._resolve(records, now)
        self._consider_late(records, now)
        if self._next_look <= now and self._only_slow(now):
            self._next_look = now + TOGETHER_S
        self._ignored = {a: r for a, r in self._ignored.items() if records.get(a) == r}
        if self._adopted and self._probes and not any(record.before for record in records.values()):
            self._probes.spare_overflow()
            self._adopted = False
        self._spend(now)
        self._plan(now, records)
        self._last_scan = now

    def _consider_late(self, records: dict[int, Record], now: float) -> None:
        """As many of the late ones as there is time for, those first that nobody was told of."""
        late = [
            record
            for record in records.values()
            if (limit := self._limit_of(record)) is not None and now >= max(limit, self._next_look)
        ]
        late.sort(key=lambda record: (record.request in self._alerted, record.done_ns or record.submit_ns))
        until = time.thread_time() + SLICE_S
        self._unfinished = False
        for record in late:
            if record.request not in self._alerted and len(self._alerted) >= MOST_ALERTED:
                continue
            if time.thread_time() >= until:
                self._unfinished = True
                return
            self._consider(record, now)

    def _follow_alerted(self, now: float) -> None:
        """Between two looks at everything: whether one of those that were told of went on, if any."""
        assert self._probes is not None
        found = ((address, self._probes.record(address)) for address in self._alerted)
        self._resolve({address: record for address, record in found if record is not None}, now)
        due = min(self._next_full, self._next_names)
        if self._alerted:
            due = min(due, now + self._resolve_s(now))
        self.next_scan = max(due, now) + MARGIN_S

    def _resolve_s(self, now: float) -> float:
        return RESOLVE_MANY_S if now < self._next_look else RESOLVE_S

    def _only_slow(self, now: float) -> bool:
        """Whether many requests are late lately, and none of them is lost: a host or a loop with too much to do."""
        return len(self._slow_times) == MANY_ALERTS and now - self._slow_times[0] < MANY_ALERTS_S

    def _records(self) -> dict[int, Record]:
        if self._probes is not None and self._mode != NONE:
            return self._probes.records()
        if self._sampler is not None:
            self._look_for_pools(time.monotonic())
            self._sample(self._sampler)
            return self._prove(self._sampler)
        return {}

    def _limit_of(self, record: Record) -> float | None:
        """When this record is overdue, on the monotonic clock; None for never."""
        if record.flags & FLAG_NO_CALLBACK or self._ignored.get(record.request) == record:
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
        if self._mode == NONE:
            due = min(due, now + self._sample_s)
        if self._spending is not None:
            due = min(due, max(self._spending.due(), now))
        for record in records.values():
            limit = self._limit_of(record)
            if limit is None or record.request in self._alerted:
                continue
            if self._mode == NONE:
                due = min([due, *(moment for moment in (limit - PROOF_S - self._sample_s, limit) if moment > now)])
            else:
                due = min(due, max(limit, self._next_look))
        if self._unfinished:
            due = max(due, now + SLICE_S / SLICE_SHARE)
        if self._search is not None:
            due = min(due, now + SEARCHING_S)
        self._next_full = due
        if self._alerted:
            due = min(due, now + self._resolve_s(now))
        if self._probes is not None and self._settings.mode == FULL:
            due = min(due, self._next_names)
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
            # What the probes followed from its submit on, they count.
            self._late += bool(alerted.record.done_ns) and (self._mode == NONE or alerted.record.before)
            after_s = now - alerted.since_ns / 1e9
            self._emit(Resolved(time.time(), self.target.pid, address, alerted.pool, after_s, alerted.cause))

    def _consider(self, record: Record, now: float) -> None:
        """An overdue record: believe memory, not the record, then judge and tell."""
        known = self._alerted.get(record.request)
        if self._judged_lately(record):
            return
        # One proof serves one judgement.
        if self._mode == NONE and self._proved.pop(record.request, None) != record:
            return
        since_ns = known.since_ns if known else record.done_ns or record.submit_ns
        finding = self._looker.look(record.request, now - since_ns / 1e9, record.before)
        if finding is None or not self._still(record):
            if known is None:
                self._drop(record)
            return
        if _never_overdue(finding) or not _agrees(finding, record):
            self._ignored[record.request] = record
            return
        pool = finding.pool.address if finding.pool else None
        self._judged(self._as_recorded(finding, record), known or _Alerted(record, pool, since_ns))

    def _as_recorded(self, finding: Finding, record: Record) -> Finding:
        """Kind and file as the submit probe saw them, where memory does not tell them any more (up to QEMU 3.1)."""
        if record.before or record.fd is None or finding.operation.fd is not None:
            return finding
        operation = Operation(record.kind, record.fd, self._descriptors.name(record.fd))
        facts = replace(finding.facts, kind=operation.kind, file=operation.file)
        return replace(finding, operation=operation, facts=facts)

    def _still(self, record: Record) -> bool:
        if self._probes is None or self._mode == NONE:
            return True
        return self._probes.record(record.request) == record

    def _prove(self, sampler: MemorySampler) -> dict[int, Record]:
        """Without probes: the records; one late soon is proved to be one request that does not go on, or restarted."""
        now = time.monotonic()
        records = sampler.records()
        self._proved = {address: record for address, record in self._proved.items() if records.get(address) == record}
        suspects = {address: record for address, record in records.items() if self._suspicious(sampler, record, now)}
        if not suspects or now < self._next_proof:
            return records
        from tracer.inspect import PATIENCE_S, staying

        left = min(self._limit_of(record) or now for record in suspects.values()) - now - self._sample_s
        patience_s = min(PATIENCE_S, max(left, PATIENCE_S / 2))
        seen = staying(self._view, self._loaded, sampler.pools_of(set(suspects)), patience_s)
        found = seen.proved & suspects.keys()
        self._date(sampler, [suspects[address] for address in found])
        for address in suspects.keys() - found:
            # A finished one that nothing contradicts may be proved at the next try, as where the host is overloaded.
            if address not in seen.alike or not suspects[address].done_ns:
                sampler.restart(address, time.monotonic_ns())
        self._proved |= {address: record for address, record in sampler.records().items() if address in found}
        self._next_proof = 0.0 if found else time.monotonic() + FAILED_S
        self._sample(sampler)
        return sampler.records()

    def _suspicious(self, sampler: MemorySampler, record: Record, now: float) -> bool:
        """Whether the record, which more than one look has seen, will be late soon."""
        limit = self._limit_of(record)
        if limit is None or now < limit - PROOF_S - self._sample_s or self._judged_lately(record):
            return False
        if self._proved.get(record.request) == record:
            return False
        return (record.done_ns or record.submit_ns) < sampler.last_ns

    def _date(self, sampler: MemorySampler, proved: list[Record]) -> None:
        """Since when the finished ones have been so: no worker has run since then."""
        finished = [record.request for record in proved if record.done_ns and record.request not in self._alerted]
        if finished:
            asleep = self._looker.workers_asleep_s()
            for address in finished:
                sampler.finished_by(address, time.monotonic_ns() - int(asleep * 1e9))

    def _judged_lately(self, record: Record) -> bool:
        known = self._alerted.get(record.request)
        return known is not None and time.monotonic() - known.judged < max(self._settings.deadline_s, 1.0)

    @property
    def _sample_s(self) -> float:
        return max(
            min(max(self._settings.deadline_s / SAMPLES, SAMPLE_MIN_S), SAMPLE_S), self._sample_took / SAMPLE_SHARE
        )

    def _look_for_pools(self, now: float) -> None:
        """Without probes: pools are made with the first request that needs them, and go with their iothread."""
        if self._sampler is None:
            return
        tids = set(self.target.tids())
        self._new_threads |= not tids <= self._tids
        self._tids = tids
        if now >= (self._search_soon if self._new_threads else self._search_latest):
            self._begin_search()

    def _learn_pools(self, requests: Iterable[int]) -> None:
        """The pools of requests that are known: what a search finds besides comes later."""
        known = {pool.address for pool in self._pools}
        until = time.thread_time() + SLICE_S
        for address in requests:
            if time.thread_time() >= until:
                return
            with suppress(FaultError, LayoutError):
                pool = self._reader.pool(self._reader.request(address).pool)
                if pool.address not in known:
                    known.add(pool.address)
                    self._pools.append(pool)

    def _begin_search(self) -> None:
        """Look for pools apart: all of a heap is read for that."""
        if self._search is None:
            self._search = Errand(partial(find_pools, self.target, self._build))
            self._search_began = time.monotonic()
            self._new_threads = False

    def _take_search(self, now: float) -> None:
        """What a search has found, if it has ended."""
        if self._search is None:
            return
        over = now - self._search_began > SEARCH_MOST_S
        if not over and not self._search.ready():
            return
        pause = (now - self._search_began) / (SEARCH_SHARE if self._pools else SEARCH_SHARE_FIRST)
        self._search_soon, self._search_latest = now + max(pause, SEARCH_SOON_S), now + max(pause, SEARCH_S)
        errand, self._search = self._search, None
        if over:
            errand.abandon()
            return
        found: Found = errand.outcome()
        self._looker.know_homes({context: tid for context, (tid, _) in found.homes.items()})
        new = set(found.pools) - set(self._pools)
        self._pools = list(found.pools)
        if self._sampler is not None:
            self._sampler.pools = list(found.pools)
        elif new and self._mode == FULL:
            self._adopt(self._pools)

    def _drop(self, record: Record) -> None:
        """The request is gone from memory but not from the map: a hit was not seen, or came too late."""
        if self._probes is not None and self._mode != NONE and self._still(record):
            self._probes.forget(record)
            self._stale += self._with_submit and not record.before

    def _judged(self, finding: Finding, alerted: _Alerted) -> None:
        verdict = judge(finding.facts)
        alerted.judged = time.monotonic()
        if verdict.cause not in alerted.causes:
            alerted.causes.add(verdict.cause)
            alerted.cause = verdict.cause
            self._alerted[finding.request.address] = alerted
            self.alerts += 1
            if verdict.cause in FOR_SLOWNESS:
                self._slow_times.append(alerted.judged)
            else:
                self._slow_times.clear()
            self._period_alerts += 1
            self._emit(self._alert(alerted, finding, verdict.cause, verdict.explanation))

    def _alert(self, alerted: _Alerted, finding: Finding, cause: str, explanation: str) -> Alert:
        record = alerted.record
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
            (now_ns - alerted.since_ns) / 1e9,
            self._settings.deadline_s if done else self._settings.slow_s,
            cause,
            explanation,
            as_evidence(finding.facts) | {"layout": self._build.located.layout.source},
            "memory" if record.before else "probes",
            (now_ns - record.submit_ns) / 1e9 if record.submit_ns and not record.before else None,
            record.before and (self._mode != NONE or record.submit_ns <= int(self._began * 1e9)),
            self.target.domain is not None,
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
        late = self._late_now(figures.combined(by_subject.values()))
        start = self._began if final else self._period_start
        self._emit(
            Counts(
                time.time(),
                self.target.pid,
                final,
                now - start,
                self._requests(total, final),
                self.alerts if final else self._period_alerts,
                total.map_full + total.missed + (self._stale if final else 0),
                figures.latencies(total, self._settings.mode == FULL) if self._probes else {},
                self._figures(figures.grouped(period, lambda subject: subject[0])),
                self._count_notes(total, final),
                self._figures(self._files_of(by_subject, final)),
                late if final else late - self._late_before,
            )
        )
        self._snapshot, self._period_start, self._period_alerts = by_subject, now, 0
        self._late_before = late
        self._stepped_in_period = self._mode != self._settings.mode and not self._sampled_until

    def _figures(self, groups: Mapping[str, Statistics]) -> dict[str, dict[str, Latency]] | None:
        """None where only the submit probe could tell the groups apart."""
        if self._settings.mode != FULL:
            return None
        return {name: figures.latencies(statistics, True) for name, statistics in groups.items()}

    def _files_of(self, by_subject: dict[Subject, Statistics], final: bool) -> dict[str, Statistics]:
        """What was counted since the last time, or of the whole trace, by file."""
        self._take_names(by_subject)
        now = self._descriptors.by_file(by_subject)
        then = {} if final else self._by_file
        self._by_file = now
        period = {own: figures.difference(counted, then.get(own, Statistics())) for own, counted in now.items()}
        return figures.grouped(period, lambda own: own[0])

    def _take_names(self, by_subject: Mapping[Subject, Statistics] | None = None, disks: bool = False) -> None:
        """What the descriptors are now; `disks`: those that may be a disk's by what they were.

        Where one is another file than it was, what it has counted stays the old one's.
        """
        if self._probes is None or self._settings.mode != FULL:
            return
        names = self._view.files_but(self._descriptors.others() if disks else ())
        counted: Mapping[Subject, Statistics] = {}
        if self._descriptors.changed(names):
            counted = self._probes.statistics() if by_subject is None else by_subject
        self._descriptors.turn(names, counted)

    def _late_now(self, total: Statistics) -> int:
        """How many callbacks came late since the beginning, without those that were late because QEMU was stopped."""
        late = total.late + self._late
        if self._late_at_stop is not None:
            self._late_by_stop += late - self._late_at_stop
            self._late_at_stop = late
        return late - self._late_by_stop

    def _see_stop(self) -> None:
        """Whether the process is stopped; what comes late until it has come round again is not QEMU's fault."""
        was, self._stopped = self._stopped, self._looker.process_stopped()
        if self._late_at_stop is None and not self._stopped:
            return
        total = figures.combined(self._probes.statistics().values() if self._probes else ())
        if self._late_at_stop is None:
            self._late_at_stop = total.late + self._late
        self._late_now(total)
        if not (was or self._stopped):
            self._late_at_stop = None

    def _requests(self, total: Statistics, final: bool) -> Requests:
        sampled = len(self._sampler.records()) if self._sampler else None
        if self._probes is None or (self._mode == NONE and not final):
            return Requests(None, None, None, None, sampled)
        in_flight = len(self._probes.under_way()) if self._with_submit else sampled
        return figures.requests(total, in_flight, self._settings.mode == FULL)

    def _count_notes(self, total: Statistics, final: bool) -> tuple[str, ...]:
        notes = []
        if self._stepped if final else self._stepped_in_period:
            notes.append(
                "the budget took probes away for a time: the requests of that time are not all counted, and those that "
                "the storage held were not seen"
            )
        if total.map_full:
            notes.append(
                f"{total.map_full} requests could not be followed because too many were under way: "
                "then memory is sampled for a time, as with --probes none"
            )
        if self._sampled_until:
            notes.append("memory is sampled for a time: the requests of that time are not counted")
        if self._with_submit and total.missed:
            notes.append(f"{total.missed} hits of probes were not seen")
        return tuple(notes)

    def last_look(self) -> None:
        """Tell of those that went on since the last scan."""
        if not self._alerted:
            return
        if self._probes is not None and self._mode != NONE:
            self._follow_alerted(time.monotonic())
        elif self._sampler is not None:
            self._sample(self._sampler)
            self._resolve(self._sampler.records(), time.monotonic())

    def _sample(self, sampler: MemorySampler) -> None:
        """Take a sample. Raises TargetExited where nothing can be read: memory goes before the process does."""
        began = time.thread_time()
        sampler.sample(time.monotonic_ns())
        self._sample_took = time.thread_time() - began
        self.target.check_memory()

    # -- end ----------------------------------------------------------------------------------------

    def ended(self, reason: str | None = None) -> None:
        """Tell that the process is gone, or is no QEMU any more."""
        reason = reason or f"process {self.target.pid} has ended"
        self._emit(TargetEnded(time.time(), self.target.pid, reason))

    def close(self) -> None:
        """Detach; the process goes on untouched."""
        if self._search is not None:
            self._search.abandon()
            self._search = None
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
