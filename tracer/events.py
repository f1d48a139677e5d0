"""What aio-trace has to say, as values: the border between finding out and writing down.

Knows: the fields of the contract's events. Does not know formats or where values come from. Addresses
are ints here, durations floats in seconds, times seconds since the epoch; None is "not known".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from tracer.known_bugs import BugNote
from tracer.layout import Layout
from tracer.records import dataclass
from tracer.sites.model import Attempt, Site


@dataclass(frozen=True)
class Event:
    """Something that happened at `time` (seconds since the epoch), about process `pid` if any."""

    time: float
    pid: int | None


@dataclass(frozen=True)
class ProbeInfo:
    """One attached probe site."""

    site: str
    address: int
    strategy: str
    cheap: bool


@dataclass(frozen=True)
class PoolInfo:
    """One pool found in memory, and the thread that runs its context where that shows."""

    pool: int
    context: int
    home_tid: int | None
    home_name: str | None


@dataclass(frozen=True)
class Attached(Event):
    """The probes are in place."""

    exe: str
    version: str | None
    mode: str
    probes: tuple[ProbeInfo, ...]
    pools: tuple[PoolInfo, ...]
    in_flight: int
    startup_s: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Requests:
    """Counts; None where this mode does not count that."""

    submitted: int | None
    done: int | None
    completed: int | None
    cancelled: int | None
    in_flight: int | None


@dataclass(frozen=True)
class Latency:
    """One stage's latencies in microseconds; `buckets` are (upper bound, count) without empty ones."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None
    buckets: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class Counts(Event):
    """Figures of a period: since the last interval, or (`final`) of the whole trace.

    `by_kind` and `by_file` are None where this mode does not tell kinds and files.
    """

    final: bool
    period_s: float
    requests: Requests
    alerts: int
    lost_records: int
    latency: Mapping[str, Latency]
    by_kind: Mapping[str, Mapping[str, Latency]] | None
    notes: tuple[str, ...] = ()
    by_file: Mapping[str, Mapping[str, Latency]] | None = None
    late: int | None = None  # completed, but a deadline or more after being done: cured by chance


@dataclass(frozen=True)
class Alert(Event):
    """One request is late."""

    request: int
    pool: int | None
    context: int | None
    kind: str | None
    file: str | None
    offset: int | None
    bytes: int | None
    state: str
    ret: int | None
    age_s: float
    deadline_s: float
    cause: str
    explanation: str
    evidence: Mapping[str, Any]
    seen_from: str
    submit_age_s: float | None = None
    there_before: bool = False  # in QEMU's memory already when the trace began
    by_libvirt: bool = False  # libvirt started the process, and holds its monitor

    @property
    def overdue_s(self) -> float:
        """Age beyond the deadline, in seconds."""
        return self.age_s - self.deadline_s


@dataclass(frozen=True)
class Resolved(Event):
    """A request that was alerted got on after all."""

    request: int
    pool: int | None
    after_s: float
    cause: str = ""


@dataclass(frozen=True)
class Nudged(Event):
    """A lost completion that something was done for; `freed` is what memory showed afterwards."""

    request: int
    pool: int
    cause: str
    command: str
    freed: bool
    pause_ms: float | None = None  # for how long a thread stood still; None by monitor


@dataclass(frozen=True)
class Stepped(Event):
    """Other probes than before are used, because of what they cost.

    `before` and `mode` as --probes names them; `share` and `budget` are parts of one processor, `share` what
    was measured before the change, None where nothing was.
    """

    before: str
    mode: str
    share: float | None
    budget: float


@dataclass(frozen=True)
class TargetEnded(Event):
    """The process is gone."""

    reason: str = field(default="")


@dataclass(frozen=True)
class Failure(Event):
    """Something could not be done."""

    message: str
    hint: str | None


@dataclass(frozen=True)
class HostNeed:
    """One thing the host must have (or, not `required`, had better have); `detail` says how to get it.

    `ok` None: it could not be proved here, and `detail` says why. `words`: what the kernel, its verifier or the
    compiler said, in full, line by line.
    """

    need: str
    ok: bool | None
    detail: str
    required: bool = True
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked(Event):
    """What would be attached to a QEMU, and whether this host can; `known_bugs` None: no version."""

    exe: str
    version: str | None
    build_id: str | None
    machine: str
    known_bugs: tuple[BugNote, ...] | None
    barrier_fixed: bool | None
    sites: tuple[Site, ...]
    layout: Layout | None
    attempts: tuple[Attempt, ...]
    host: tuple[HostNeed, ...]
    ready: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class InspectedRequest:
    """One request as memory shows it; `cause` and `explanation` are None unless it is overdue.

    `age_s` is how long it is known to be in its state, at least; None for a core file. Names beside
    addresses are those of symbols at hand.
    """

    request: int
    pool: int
    context: int
    kind: str | None
    file: str | None
    offset: int | None
    bytes: int | None
    node: str | None
    state: str
    ret: int | None
    age_s: float | None
    deadline_s: float | None
    cause: str | None
    explanation: str | None
    evidence: Mapping[str, Any] | None
    func: int
    func_name: str | None
    arg: int
    callback: int
    callback_name: str | None
    opaque: int
    next: int
    prev: int
    coroutine: int | None
    coroutine_entry: int | None
    coroutine_entry_name: str | None
    coroutine_entry_arg: int | None
    coroutine_caller: int | None
    coroutine_stack: tuple[str, ...]

    @property
    def overdue(self) -> bool:
        """Whether it is accused."""
        return self.cause is not None


@dataclass(frozen=True)
class InspectedPool:
    """One thread pool and all that is in it; `torn` says why its list is incomplete, or is None."""

    pool: int
    context: int
    main_loop: bool
    home_tid: int | None
    home_name: str | None
    bottom_half: int
    scheduled: bool | None
    current: int | None
    idle: int | None
    max: int | None
    requests: tuple[InspectedRequest, ...]
    torn: str | None


@dataclass(frozen=True)
class InspectedThread:
    """One thread; `stack` innermost first, and what is missing of it, or None."""

    tid: int
    name: str
    state: str | None
    syscall: str | None
    stack: tuple[str, ...]
    stack_missing: str | None
    home: bool


@dataclass(frozen=True)
class InspectedCoroutine:
    """A coroutine that serves a request outside the thread pools and did not move.

    `coroutine` is where its CoroutineUContext names its stack, `waits_in` a function, `stack` innermost first.
    """

    coroutine: int
    waits_in: str
    stack: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis(Event):
    """What `inspect` found: of a live process, or of a core file (`core` is its path)."""

    core: str | None
    exe: str | None
    version: str | None
    pools: tuple[InspectedPool, ...]
    threads: tuple[InspectedThread, ...]
    draining: str | None
    verdict: str
    explanation: str
    known_bugs: tuple[BugNote, ...] | None
    barrier_fixed: bool | None
    bypassing: tuple[str, ...]
    notes: tuple[str, ...]
    watched_s: float
    took_s: float
    run_state: str | None = None  # QEMU's word; None where it does not show
    waiting: tuple[InspectedCoroutine, ...] = ()
    standing: bool = False  # the process or a loop stands still, with or without a request

    @property
    def overdue(self) -> int:
        """How many requests are accused."""
        return sum(request.overdue for pool in self.pools for request in pool.requests)
