"""Why a request is late: pure rules over facts.

Knows: what a request's state, its pool's bottom half, its home thread and the pool's threads mean
together. Does not read anything, ask any clock or know how facts were come by. A fact that is not known
is None, and a rule that needs it says so instead of accusing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tracer.layout import RequestState
from tracer.records import dataclass

LOST_WAKEUP = "lost-wakeup"
LOST_KICK = "lost-kick"
UNPOLLED_KICK = "unpolled-kick"
LOOP_BLOCKED = "loop-blocked"
LOOP_BUSY = "loop-busy"
NESTED_WAIT = "nested-wait"
WORKER_STUCK = "worker-stuck"
QUEUE_FULL = "queue-full"
QUEUE_STALLED = "queue-stalled"
STOPPED = "stopped"
UNKNOWN = "unknown"

#: Bugs of QEMU itself, as opposed to a slow or stopped world around it.
QEMU_BUGS = frozenset({LOST_WAKEUP, LOST_KICK, UNPOLLED_KICK, NESTED_WAIT, QUEUE_STALLED})

#: Where there are several causes, the first of these is the verdict on the whole process.
SEVERITY = (
    *(STOPPED, LOST_WAKEUP, NESTED_WAIT, LOST_KICK, UNPOLLED_KICK, LOOP_BLOCKED, LOOP_BUSY),
    *(QUEUE_STALLED, QUEUE_FULL, WORKER_STUCK, UNKNOWN),
)

COMPLETION_BH = "thread_pool_completion_bh"
#: In what QEMU waits then, where no name tells more.
NESTED_POLL = "a poll inside a callback of its main loop"
_DISPATCH = "g_main_context_dispatch"
#: Frames that an alert shows of a stack.
MAX_FRAMES = 20


def draining(functions: Sequence[str]) -> str | None:
    """The outermost function that drains, of a stack's functions, innermost first."""
    return next((name for name in reversed(functions) if _drains(name)), None)


def _drains(function: str) -> bool:
    """Whether it waits for all requests, or those of one node or drive, to end (block/io.c, block/block-backend.c)."""
    return re.match(r"(bdrv|blk)_(co_|subtree_|do_)?drain|bdrv_graph_wrlock", function) is not None


def nested_poll(functions: Sequence[str]) -> bool:
    """Whether a thread that sleeps in a poll does so inside a callback of its own loop, by its stack's functions.

    glib's name is there also where QEMU has none: its main loop calls g_main_context_dispatch() only after it has
    polled (util/main-loop.c), so what polls within it holds up the loop, and the monitor with it.
    """
    return _DISPATCH in functions


def nested_wait(functions: Sequence[str]) -> bool:
    """Whether a callback of the completion bottom half waits in aio_poll, by a stack's functions."""
    if COMPLETION_BH not in functions:
        return False
    return "aio_poll" in functions[: functions.index(COMPLETION_BH)]


@dataclass(frozen=True)
class Look:
    """The home thread and the bottom half at one moment; None where it could not be read."""

    scheduled: bool | None = None
    home_state: str | None = None  # the letter of proc(5)
    parked: bool | None = None  # sleeps in a poll
    syscall: str | None = None  # name with what it is on; None: runs in user space
    switches: int | None = None  # voluntary context switches so far
    ran_s: float | None = None  # on a CPU so far
    waited_s: float | None = None  # ready to run, but without a CPU, so far


@dataclass(frozen=True)
class HomeStack:
    """The home thread's stack: frames as text, its functions, innermost first; and what is missing, if so."""

    frames: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    complete: bool = False
    why_not: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything a verdict may rest on; ages in seconds.

    `at_least`: the request was in this state already when we came, for how long is not known.
    """

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
    worker_state: str | None = None
    worker_kernel: tuple[str, ...] = ()  # kernel functions, innermost first
    worker_asleep_s: float | None = None
    home_asleep_s: float | None = None
    threads_new: int | None = None
    threads_pending: int | None = None
    busy_with: str | None = None  # what the workers do, in words
    workers_in_storage: int | None = None  # how many threads are in a system call on a file
    function: str | None = None  # the name of the request's func
    stack: HomeStack = HomeStack()
    poller_tid: int | None = None  # a thread, not the home thread, that polls the context meanwhile
    poller_name: str | None = None
    poller_stack: HomeStack = HomeStack()
    draining: str | None = None  # the function, whichever thread is in it
    nested_poll: bool | None = None  # whether the main thread polls inside a callback of its own loop
    barrier_fixed: bool | None = None  # whether this build has the barriers of e8d3b1a25f
    at_least: bool = False
    from_core: bool = False
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
    what = facts.kind if facts.kind and facts.kind != "other" else f"request ({facts.function or 'of an unknown kind'})"
    return f"{what} on {facts.file}" if facts.file else what


def _home(facts: Facts) -> str:
    if not facts.home_tid:
        return "its home thread"
    return f"thread {facts.home_tid} ({facts.home_name})" if facts.home_name else f"thread {facts.home_tid}"


def _age(facts: Facts) -> str:
    return f"{'at least ' if facts.at_least else ''}{facts.age_s:.1f} s"


def _finished(facts: Facts) -> str:
    """The beginning of a sentence about a request that is THREAD_DONE."""
    what = _request(facts)
    if facts.from_core:
        return f"The worker had finished this {what}"
    return f"The worker finished this {what} {_age(facts)} ago"


def known_fix(barrier_fixed: bool | None) -> str:
    """One sentence on the bug that loses wake-ups, and whether this build has its fix.

    QEMU commits e8d3b1a25f (in v2.3) and ef6dada8b4 (in v2.11).
    """
    fixes = "the fixes e8d3b1a25f (QEMU 2.3) and ef6dada8b4 (2.11)"
    if barrier_fixed is None:
        return f"Known causes have {fixes}; whether this build has the first could not be read from its code."
    if barrier_fixed:
        return f"Known causes have {fixes}; by its code this build has the first, so look for the second or a new one."
    return f"Known causes have {fixes}; by its code this build LACKS the first: update QEMU."


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
    if nested_wait(facts.stack.functions) or nested_wait(facts.poller_stack.functions):
        who = _home(facts) if nested_wait(facts.stack.functions) else _poller(facts)
        return Verdict(
            NESTED_WAIT,
            f"{_finished(facts)}, but {who} is in the callback of another request (thread_pool_completion_bh "
            f"is on its stack), which waits in aio_poll: a callback waits for a request that only it could let go "
            f"on. This is a bug of QEMU; the storage is fine.",
        )
    if not any(look.scheduled for look in looks) and (parked or _seen_outside_the_bottom_half(facts)):
        return Verdict(
            LOST_WAKEUP,
            f"{_finished(facts)}, but nobody was told: its bottom half is not scheduled, and {_waits(facts)}. "
            f"This is a lost wake-up, a bug of QEMU; the storage is fine. {known_fix(facts.barrier_fixed)}",
        )
    if all(look.scheduled for look in looks) and _slept(looks):
        return _judge_kick(facts)
    if parked:
        return Verdict(
            UNKNOWN,
            f"{_finished(facts)}, but why its callback does not come is not known: {_home(facts)} comes round to "
            f"{parked[-1].syscall}, but bottom half and thread changed while they were looked at.",
        )
    return _judge_loop(facts)


def _seen_outside_the_bottom_half(facts: Facts) -> bool:
    """Whether the home thread sleeps elsewhere, and its whole stack shows that it is not about to call the callback.

    A bottom half is not scheduled any more while it runs, nor while it waits for a lock to begin (2.9 to 8.0).
    """
    if not facts.stack.complete or not any(look.syscall for look in facts.looks):
        return False
    return COMPLETION_BH not in (*facts.stack.functions, *facts.poller_stack.functions)


def _waits(facts: Facts) -> str:
    """Where the home thread is, for whom the bottom half is not scheduled; and who waits for the request meanwhile."""
    parked = [look for look in facts.looks if look.parked]
    if parked:
        sleeps = "sleeps" if _slept(facts.looks) else "comes round and sleeps again"
        return f"{_home(facts)} {sleeps} in {parked[-1].syscall}"
    place = next(look.syscall for look in reversed(facts.looks) if look.syscall)
    text = f"{_home(facts)} would not be told even if it came round; it is in {place}{under(facts.stack.functions)}"
    if facts.poller_tid is None:
        return text
    doing = f"drains (in {facts.draining}) and so waits" if facts.draining else "waits"
    return f"{text}, while {_poller(facts)} {doing} for the request"


def _poller(facts: Facts) -> str:
    return f"thread {facts.poller_tid} ({facts.poller_name})"


def _slept(looks: tuple[Look, ...]) -> bool:
    """Whether the home thread slept in its poll all the while, without coming round (of a core: at its moment)."""
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
        where = f"{last.syscall}{under(facts.stack.functions)}"
        return Verdict(
            LOOP_BLOCKED,
            f"{_finished(facts)}, but {_home(facts)} is stuck in {where} and cannot call its callback.",
        )
    if _starved(facts.looks):
        return Verdict(
            LOOP_BUSY,
            f"{_finished(facts)}, but {_home(facts)} is ready to run and gets no CPU: the host is overloaded.",
        )
    where = ", ".join(sorted(place for place in places if place)) or "user space"
    return Verdict(
        LOOP_BUSY,
        f"{_finished(facts)}, but {_home(facts)} is busy (seen in {where}) and does not come round to call its "
        f"callback.",
    )


def _starved(looks: tuple[Look, ...]) -> bool:
    """Whether the home thread waited for a CPU longer than it had one, between the first look and the last."""
    first, last = looks[0], looks[-1]
    if first.ran_s is None or first.waited_s is None or last.ran_s is None or last.waited_s is None:
        return False
    return last.waited_s - first.waited_s > last.ran_s - first.ran_s


def under(stack: Sequence[str]) -> str:
    """The innermost of QEMU's own functions on a stack, in words; a library's are known by their names."""
    functions = [name for name in stack if not _of_a_library(name)]
    if COMPLETION_BH in functions:
        return f" inside the completion bottom half (under {functions[0]})"
    return f" (under {functions[0]})" if functions else ""


def _of_a_library(function: str) -> bool:
    """Functions of libc and glib, and QEMU's wrappers of them, say nothing about what the thread is at."""
    known = r"_|g_|pthread|qemu_(mutex|cond|sem|futex|open|poll)|(pp?oll|epoll_\w+|open\w*|read|write)$"
    return re.match(known, function) is not None


def _judge_active(facts: Facts) -> Verdict:
    if facts.worker_syscall is None:
        return Verdict(
            WORKER_STUCK,
            f"A worker has had this {_request(facts)} for {_age(facts)}; none was seen in a system call on its file, "
            f"so whether the storage holds it is not known. QEMU waits.",
        )
    where = facts.worker_syscall
    who = f"worker {facts.worker_tid}" if facts.worker_tid else "a worker"
    kernel = f", in the kernel's {facts.worker_kernel[0]}" if facts.worker_kernel else ""
    held = "held" if facts.from_core else f"has held for {_age(facts)}"
    then = " when the core was taken; for how long a core does not tell" if facts.from_core else ""
    if facts.kind == "other":
        return Verdict(
            WORKER_STUCK, f"This {_request(facts)} keeps {who} busy ({_age(facts)}): it is in {where}{then}."
        )
    return Verdict(
        WORKER_STUCK,
        f"The storage {held} this {_request(facts)}{then}: {who} is in {where}{kernel}. QEMU waits; it "
        f"is not its fault.",
    )


def _judge_queued(facts: Facts) -> Verdict:
    current, idle, most = facts.threads_current, facts.threads_idle, facts.threads_max
    if facts.missing or current is None or idle is None or (idle == 0 and most is None):
        why = "; ".join(facts.missing) or "the thread counters are not all known"
        return Verdict(UNKNOWN, f"This {_request(facts)} waits for a worker, why is not known: {why}.")
    waited = "waited" if facts.from_core else f"has waited {_age(facts)}"
    if idle == 0 and most is not None and current >= most:
        what = facts.busy_with or "look at what they wait for"
        return Verdict(QUEUE_FULL, f"This {_request(facts)} {waited} for a worker: all {current} are busy ({what}).")
    if idle == 0 and not facts.threads_new and (facts.workers_in_storage or 0) >= current > 0:
        waits = (
            f"made this {_request(facts)} wait"
            if facts.from_core
            else f"has made this {_request(facts)} wait for {_age(facts)}"
        )
        return Verdict(
            WORKER_STUCK,
            f"The storage, not QEMU, {waits}: it holds all {current} workers of the pool ({facts.busy_with}). QEMU "
            f"starts another one only with the next request.",
        )
    start = ""
    if facts.threads_new:
        start = f"; {facts.threads_new} more were to be started ({facts.threads_pending or 0} on their way)"
    if idle:
        return Verdict(
            QUEUE_STALLED,
            f"This {_request(facts)} {waited} although {idle} of {current} workers are idle{start}: nobody takes it. "
            f"This is a bug of QEMU; the storage is fine.",
        )
    return Verdict(
        QUEUE_STALLED,
        f"This {_request(facts)} {waited} for a worker: all {current} are busy, and QEMU started no other one though "
        f"there may be {most}{start}. This is a bug of QEMU; the storage is fine.",
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
        "home_stack": list(facts.stack.frames) or None,
        "home_stack_missing": facts.stack.why_not,
        "draining": draining(facts.stack.functions) or facts.draining,
        "nested_poll": facts.nested_poll,
        "polled_by": {"tid": facts.poller_tid, "name": facts.poller_name, "stack": list(facts.poller_stack.frames)}
        if facts.poller_tid
        else None,
        "barrier_fixed": facts.barrier_fixed,
        "home_asleep_s": facts.home_asleep_s,
        "looks": len(facts.looks),
        "home_starved": _starved(facts.looks) if facts.looks else None,
        "came_round": len({look.switches for look in facts.looks}) > 1 if facts.looks else None,
        "eventfd_count": facts.bell_count,
        "eventfd_polled": facts.bell_polled,
        "threads": {
            "current": facts.threads_current,
            "idle": facts.threads_idle,
            "max": facts.threads_max,
            "new": facts.threads_new,
            "pending": facts.threads_pending,
        },
        "worker": _worker(facts) if facts.worker_tid else None,
        "function": facts.function,
        "missing": list(facts.missing),
    }


def _worker(facts: Facts) -> dict[str, Any]:
    return {
        "tid": facts.worker_tid,
        "state": facts.worker_state,
        "syscall": facts.worker_syscall,
        "kernel_stack": list(facts.worker_kernel) or None,
        "asleep_s": facts.worker_asleep_s,
    }
