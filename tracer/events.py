"""What aio-trace has to say, as values: the border between finding out and writing down.

Knows: the fields of the contract's events. Does not know formats or where values come from. Addresses
are ints here, durations floats in seconds, times seconds since the epoch; None is "not known".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """Figures of a period: since the last interval, or (`final`) of the whole trace."""

    final: bool
    period_s: float
    requests: Requests
    alerts: int
    lost_records: int
    latency: Mapping[str, Latency]
    by_kind: Mapping[str, Mapping[str, Latency]]
    notes: tuple[str, ...] = ()


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
class TargetEnded(Event):
    """The process is gone."""

    reason: str = field(default="")


@dataclass(frozen=True)
class Failure(Event):
    """Something could not be done."""

    message: str
    hint: str | None
