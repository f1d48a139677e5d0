"""Every cause told apart: each class of hang made on a real QEMU, in the main loop and in an iothread.

Each fault comes and goes AIO_TRACE_REPEAT times under one trace, which must name its cause every time and
no other one ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.qemu.tracing import PATIENCE_S, Json, Trace, traced
from tracer.errors import LabError
from tracer.lab import causes, faults
from tracer.lab.causes import Scene
from tracer.lab.process import continue_process, stop_process, wait_until
from tracer.layout import RequestState

REPEAT = int(os.environ.get("AIO_TRACE_REPEAT", "2"))
DEADLINES = ("--deadline", "300ms", "--slow", "500ms")
#: A late request is judged anew after a second; seconds.
SECOND_LOOK_S = 1.3

Fault = Callable[[Scene, str], AbstractContextManager[int]]

DONE_FAULTS: tuple[tuple[Fault, str], ...] = (
    (causes.lost_kick, "lost-kick"),
    (causes.unpolled_kick, "unpolled-kick"),
    (causes.blocked_in_storage, "loop-blocked"),
    (causes.spinning, "loop-busy"),
)
QUEUE_FAULTS = (causes.sleeping_workers, causes.missed_spawn, causes.lost_spawn)
KINDS = ("write", "read", "flush", "discard")


@pytest.fixture(scope="module", params=["main loop", "iothread"])
def on(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A QEMU whose disk is served by the main loop or by an iothread."""
    with causes.scene(iothread=request.param == "iothread") as scene:
        yield scene


@pytest.fixture
def trace(on: Scene) -> Iterator[Trace]:
    """A trace of it; what it says is judged when the test has ended it."""
    with traced(on.qemu.pid, *DEADLINES) as running:
        yield running


def told(trace: Trace, event: str, requests: Collection[int], since: int) -> list[Json]:
    """The first events of that name about these requests from index `since` on, waited for."""
    wanted = {hex(request) for request in requests}

    def come() -> list[Json]:
        found = {e["request"]: e for e in reversed(trace.events[since:]) if e["event"] == event}
        return [found[request] for request in wanted] if wanted <= found.keys() else []

    return wait_until(come, PATIENCE_S, f"{event} for {len(wanted)} requests")


def causes_told(trace: Trace, state: str | None = None) -> set[str]:
    """The causes of all alerts, or of those about requests in one state."""
    return {alert["cause"] for alert in trace.named("alert") if state in (None, alert["state"])}


def repeat(on: Scene, trace: Trace, fault: Fault, kinds: Collection[str] = ("write",)) -> list[Json]:
    """Put the fault in and take it out again, REPEAT times or once a kind; the alerts on what it yields."""
    alerts = []
    for turn in range(max(REPEAT, len(kinds))):
        since = len(trace.events)
        with fault(on, list(kinds)[turn % len(kinds)]) as request:
            alerts += told(trace, "alert", [request], since)
            if turn == 0:
                time.sleep(SECOND_LOOK_S)
        told(trace, "resolved", [request], since)
    assert trace.finish() == 3
    assert trace.summary["requests"]["in_flight"] == 0
    assert [alert["kind"] for alert in alerts[: len(kinds)]] == list(kinds)
    return alerts


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "cause"), DONE_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_loop_does_not_come_round(on: Scene, trace: Trace, fault: Fault, cause: str) -> None:
    """B, C and D: done, told, and the home thread does not come round."""
    alerts = repeat(on, trace, fault)
    assert causes_told(trace) == {cause}
    for alert in alerts:
        assert alert["state"] == "THREAD_DONE"
        # A bottom half that runs is scheduled no more.
        assert alert["evidence"]["bottom_half_scheduled"] == (cause != "loop-busy")
        assert alert["evidence"]["home_thread"]["tid"] == on.context.home_tid
    if cause == "loop-blocked":
        assert all(f"lseek on {on.other.file}" in alert["explanation"] for alert in alerts)
    if cause in ("lost-kick", "unpolled-kick"):
        assert {bool(alert["evidence"]["eventfd_count"]) for alert in alerts} == {cause == "unpolled-kick"}
        assert {alert["evidence"]["eventfd_polled"] for alert in alerts} == {cause == "lost-kick"}


@pytest.mark.timeout(600)
def test_an_iothread_waits_for_a_lock(on: Scene, trace: Trace) -> None:
    """D: its bottom half wants the AioContext, and a monitor command has it."""
    if on.context == on.main:
        with pytest.raises(LabError, match="an iothread"), causes.blocked_in_lock(on):
            pass
        return
    alerts = repeat(on, trace, causes.blocked_in_lock)
    assert causes_told(trace) == {"loop-blocked"}
    assert all("futex" in alert["explanation"] for alert in alerts)


@pytest.mark.timeout(600)
def test_the_storage_holds_a_request(on: Scene, trace: Trace) -> None:
    """F, with every kind of request."""
    alerts = repeat(on, trace, causes.stuck_worker, KINDS)
    assert causes_told(trace) == {"worker-stuck"}
    calls = {alert["kind"]: alert["evidence"]["worker"]["syscall"].split()[0] for alert in alerts}
    assert calls == {"write": "pwrite64", "read": "pread64", "flush": "fdatasync", "discard": "fallocate"}
    assert all(alert["state"] == "THREAD_ACTIVE" and str(on.slow.file) in alert["explanation"] for alert in alerts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", QUEUE_FAULTS)
def test_nobody_takes_a_request(on: Scene, trace: Trace, fault: Fault) -> None:
    """G2 and G3: workers are idle, or could be made."""
    alerts = repeat(on, trace, fault)
    assert {alert["state"] for alert in alerts} == {"THREAD_QUEUED"}
    assert causes_told(trace, "THREAD_QUEUED") == {"queue-stalled"}
    assert causes_told(trace, "THREAD_ACTIVE") <= {"worker-stuck"}


@pytest.mark.timeout(600)
def test_a_lost_flush_and_a_drain(on: Scene, trace: Trace) -> None:
    """A, and somebody types `stop`: the main thread waits in bdrv_drain_all, the cause is the same."""
    alerts = repeat(on, trace, lambda scene, _kind: causes.draining(scene), ("flush",))
    assert causes_told(trace) == {"lost-wakeup"}
    assert all(alert["evidence"]["bottom_half_scheduled"] is False for alert in alerts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_wakeup(on: Scene, trace: Trace, kind: str) -> None:
    """A, freed by chance after its deadline."""
    requests = 0
    for _ in range(REPEAT):
        since = len(trace.events)
        lost = faults.lose(on.qemu, "d0", kind, on.pool)
        requests += len(lost.requests)
        told(trace, "alert", lost.requests, since)
        lost.free()
        told(trace, "resolved", lost.requests, since)
    assert trace.finish() == 3
    assert causes_told(trace) == {"lost-wakeup"}
    assert len(trace.named("alert")) == len(trace.named("resolved")) == requests


@pytest.mark.timeout(600)
def test_freed_before_the_deadline(on: Scene) -> None:
    """A, B and C cured in time: not a word."""
    with traced(on.qemu.pid, "--deadline", "20s") as trace:
        for _ in range(REPEAT):
            faults.lose(on.qemu, "d0", "write", on.pool).free()
            for fault in (causes.lost_kick, causes.unpolled_kick):
                with fault(on):
                    pass
        assert trace.finish() == 0
    assert trace.named("alert") == []
    requests = trace.summary["requests"]
    assert requests["completed"] == requests["submitted"] > 0


@pytest.mark.timeout(600)
def test_a_stopped_process(on: Scene, trace: Trace) -> None:
    """SIGSTOP, whatever the request waits for."""
    for _ in range(REPEAT):
        since = len(trace.events)
        with causes.unpolled_kick(on) as request:
            stop_process(on.qemu.pid)
            try:
                told(trace, "alert", [request], since)
            finally:
                continue_process(on.qemu.pid)
    assert trace.finish() == 3
    assert "stopped" in causes_told(trace)


@pytest.mark.timeout(900)
def test_every_worker_is_busy(on: Scene, trace: Trace) -> None:
    """F and G1: 64 requests wait for the storage, more wait for a worker. Last: it leaves 64 workers."""
    for _ in range(max(1, REPEAT // 2)):
        since = len(trace.events)
        with causes.full_queue(on) as queued:
            told(trace, "alert", on.requests(), since)
            assert set(queued) == set(on.requests(RequestState.THREAD_QUEUED))
    assert trace.finish() == 3
    assert causes_told(trace, "THREAD_ACTIVE") == {"worker-stuck"}
    assert causes_told(trace, "THREAD_QUEUED") == {"queue-full"}
