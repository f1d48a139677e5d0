"""Why a request is late: pure rules over facts.

Knows: what a request's state, its pool's bottom half, its home thread and the pool's threads mean
together. Does not read anything, ask any clock or know how facts were come by. A fact that is not known
is None, and a rule that needs it says so instead of accusing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tracer.layout import RequestState

LOST_WAKEUP = "lost-wakeup"
LOST_KICK = "lost-kick"
UNPOLLED_KICK = "unpolled-kick"
LOOP_BLOCKED = "loop-blocked"
LOOP_BUSY = "loop-busy"
WORKER_STUCK = "worker-stuck"
QUEUE_FULL = "queue-full"
QUEUE_STALLED = "queue-stalled"
STOPPED = "stopped"
UNKNOWN = "unknown"

#: Bugs of QEMU itself, as opposed to a slow or stopped world around it.
QEMU_BUGS = frozenset({LOST_WAKEUP, LOST_KICK, UNPOLLED_KICK, QUEUE_STALLED})


@dataclass(frozen=True)
class Look:
    """The home thread and the bottom half at one moment; None where it could not be read."""

    scheduled: bool | None = None
    home_state: str | None = None  # the letter of proc(5)
    parked: bool | None = None  # sleeps in a poll
    syscall: str | None = None  # name with what it is on; None: runs in user space
    switches: int | None = None  # voluntary context switches so far


@dataclass(frozen=True)
class Facts:
    """Everything a verdict may rest on; ages in seconds."""

    state: RequestState
    kind: str | None = None
    file: str | None = None
    ret: int | None = None
    age_s: float = 0.0
    looks: tuple[Look, ...] = ()
    home_name: str | None = None
    home_tid: int | None = None
    process_stopped: bool = False
    bell_count: int | None = None  # of the home thread's eventfd
    bell_polled: bool | None = None
    threads_current: int | None = None
    threads_idle: int | None = None
    threads_max: int | None = None
    worker_syscall: str | None = None  # where the worker of an ACTIVE request sits
    worker_tid: int | None = None
    missing: tuple[str, ...] = ()  # evidence that could not be had, in words


@dataclass(frozen=True)
class Verdict:
    """A cause of the contract and one sentence for a tired person."""

    cause: str
    explanation: str


def judge(facts: Facts) -> Verdict:
    """The cause of one late request."""
    if facts.process_stopped:
        return Verdict(
            STOPPED,
            "The QEMU process is stopped by a signal, a debugger or a frozen cgroup; nothing in it can go on.",
        )
    if facts.state == RequestState.THREAD_ACTIVE:
        return _judge_active(facts)
    if facts.state == RequestState.THREAD_QUEUED:
        return _judge_queued(facts)
    return _judge_done(facts)


def _request(facts: Facts) -> str:
    what = facts.kind or "request"
    return f"{what} on {facts.file}" if facts.file else what


def _home(facts: Facts) -> str:
    return f"thread {facts.home_tid} ({facts.home_name})" if facts.home_tid else "its home thread"


def _judge_done(facts: Facts) -> Verdict:
    looks = facts.looks
    parked = [look for look in looks if look.parked]
    if facts.missing or not looks or any(look.scheduled is None or look.parked is None for look in looks):
        why = "; ".join(facts.missing) or "its bottom half or its home thread could not be read"
        return Verdict(
            UNKNOWN,
            f"The worker has finished this {_request(facts)}, but why nobody was told is not known: {why}.",
        )
    if looks[-1].home_state in ("T", "t"):
        return Verdict(STOPPED, f"The home thread, {_home(facts)}, is stopped by a signal or a debugger.")
    if parked and not any(look.scheduled for look in looks):
        return Verdict(
            LOST_WAKEUP,
            f"The worker finished this {_request(facts)} {facts.age_s:.1f} s ago, but nobody was told: its bottom "
            f"half is not scheduled, and {_home(facts)} sleeps in {parked[-1].syscall}. This is a lost wake-up, a "
            f"bug of QEMU; the storage is fine.",
        )
    if all(look.scheduled for look in looks) and _slept(looks):
        return _judge_kick(facts)
    if parked:
        return Verdict(
            UNKNOWN,
            f"The worker has finished this {_request(facts)}, and {_home(facts)} comes round to {parked[-1].syscall}, "
            f"but bottom half and thread changed while they were looked at.",
        )
    return _judge_loop(facts)


def _slept(looks: tuple[Look, ...]) -> bool:
    """Whether the home thread slept in its poll all the while, without coming round."""
    return all(look.parked for look in looks) and len({look.switches for look in looks}) == 1


def _judge_kick(facts: Facts) -> Verdict:
    if facts.bell_count is None:
        return Verdict(
            UNKNOWN,
            f"The bottom half for this {_request(facts)} is scheduled and {_home(facts)} sleeps, but its eventfd "
            f"could not be found, so whether it was woken is not known.",
        )
    if facts.bell_count == 0:
        return Verdict(
            LOST_KICK,
            f"The bottom half for this {_request(facts)} is scheduled, but {_home(facts)} sleeps in "
            f"{facts.looks[-1].syscall} and its eventfd is empty: it was told, but not woken.",
        )
    return Verdict(
        UNPOLLED_KICK,
        f"The bottom half for this {_request(facts)} is scheduled and the eventfd was rung, but {_home(facts)} "
        f"sleeps in {facts.looks[-1].syscall} and does not answer: it does not listen to that eventfd.",
    )


def _judge_loop(facts: Facts) -> Verdict:
    """The home thread neither sleeps in its poll nor was the notification lost."""
    places = {look.syscall for look in facts.looks}
    switches = {look.switches for look in facts.looks}
    last = facts.looks[-1]
    if places == {None} and not any(look.home_state == "R" for look in facts.looks):
        return Verdict(
            UNKNOWN,
            f"The worker finished this {_request(facts)}, but {_home(facts)} sleeps elsewhere; where, could not be "
            f"read.",
        )
    if len(places) == 1 and last.syscall is not None and len(switches) == 1 and last.home_state != "R":
        return Verdict(
            LOOP_BLOCKED,
            f"The worker finished this {_request(facts)}, but {_home(facts)} is stuck in {last.syscall} and cannot "
            f"call its callback.",
        )
    where = ", ".join(sorted(place for place in places if place)) or "user space"
    return Verdict(
        LOOP_BUSY,
        f"The worker finished this {_request(facts)}, but {_home(facts)} is busy (seen in {where}) and does not come "
        f"round to call its callback.",
    )


def _judge_active(facts: Facts) -> Verdict:
    if facts.worker_syscall is None:
        return Verdict(
            WORKER_STUCK,
            f"A worker has had this {_request(facts)} for {facts.age_s:.1f} s; none was seen in a system call on its "
            f"file, so whether the storage holds it is not known. QEMU waits.",
        )
    return Verdict(
        WORKER_STUCK,
        f"The storage has held this {_request(facts)} for {facts.age_s:.1f} s: worker {facts.worker_tid} is in "
        f"{facts.worker_syscall}. QEMU waits.",
    )


def _judge_queued(facts: Facts) -> Verdict:
    current, idle, most = facts.threads_current, facts.threads_idle, facts.threads_max
    if facts.missing or current is None or idle is None or (idle == 0 and most is None):
        why = "; ".join(facts.missing) or "the thread counters are not all known"
        return Verdict(UNKNOWN, f"This {_request(facts)} waits for a worker, why is not known: {why}.")
    if idle == 0 and most is not None and current >= most:
        return Verdict(
            QUEUE_FULL,
            f"This {_request(facts)} has waited {facts.age_s:.1f} s for a worker: all {current} are busy. Look at "
            f"what they wait for.",
        )
    why = f"{idle} of {current} workers are idle" if idle else f"only {current} of {most} workers were started"
    return Verdict(
        QUEUE_STALLED,
        f"This {_request(facts)} has waited {facts.age_s:.1f} s for a worker although {why}: nobody takes it.",
    )


def as_evidence(facts: Facts) -> dict[str, Any]:
    """The facts that decided, as the `evidence` object of an alert; null where not known."""
    last = facts.looks[-1] if facts.looks else Look()
    return {
        "bottom_half_scheduled": last.scheduled,
        "home_thread": {
            "tid": facts.home_tid,
            "name": facts.home_name,
            "state": last.home_state,
            "syscall": last.syscall,
            "in_poll": last.parked,
        },
        "looks": len(facts.looks),
        "came_round": len({look.switches for look in facts.looks}) > 1 if facts.looks else None,
        "eventfd_count": facts.bell_count,
        "eventfd_polled": facts.bell_polled,
        "threads": {"current": facts.threads_current, "idle": facts.threads_idle, "max": facts.threads_max},
        "worker": {"tid": facts.worker_tid, "syscall": facts.worker_syscall} if facts.worker_tid else None,
        "missing": list(facts.missing),
    }
