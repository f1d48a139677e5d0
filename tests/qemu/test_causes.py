"""Every cause told apart: each class of hang made on a real QEMU, in the main loop and in an iothread.

Each fault comes and goes AIO_TRACE_REPEAT times under one trace, which must name its cause every time and
no other one ever.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.qemu.causing import DEADLINES, DONE_FAULTS, KINDS, QUEUE_FAULTS, REPEAT, Fault, Said, queued_causes, repeat
from tests.qemu.tracing import Trace, traced
from tracer.errors import LabError
from tracer.lab import causes, faults
from tracer.lab.causes import Scene
from tracer.lab.process import continue_process, stop_process
from tracer.layout import RequestState


@pytest.fixture(scope="module", params=["main loop", "iothread"])
def on(request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A QEMU whose disk is served by the main loop or by an iothread."""
    with causes.scene(iothread=request.param == "iothread") as scene:
        yield scene


@pytest.fixture(scope="module")
def whole_trace(on: Scene) -> Iterator[Trace]:
    """One trace for all tests of a scene; in the end every request was accounted for."""
    with traced(on.qemu.pid, *DEADLINES) as running:
        yield running
        assert running.finish() == 3
        assert running.summary["requests"]["in_flight"] == 0
        assert running.summary["lost_records"] == 0


@pytest.fixture
def said(whole_trace: Trace) -> Iterator[Said]:
    """What the trace says during one test; whatever it gave an alert on has gone on when the test ends."""
    said = Said(whole_trace)
    yield said
    said.wait("resolved", {int(alert["request"], 16) for alert in said.named("alert")})


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "cause"), DONE_FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_loop_does_not_come_round(on: Scene, said: Said, fault: Fault, cause: str) -> None:
    """B, C and D: done, told, and the home thread does not come round."""
    alerts = repeat(on, said, fault)
    assert said.causes() == {cause}
    for alert in alerts:
        assert alert["state"] == "THREAD_DONE"
        # A bottom half that runs is scheduled no more.
        assert alert["evidence"]["bottom_half_scheduled"] == (cause != "loop-busy")
        assert alert["evidence"]["home_thread"]["tid"] == on.context.home_tid
    if cause == "loop-blocked":
        assert all(f"lseek on {on.other.disk}" in alert["explanation"] for alert in alerts)
    if cause in ("lost-kick", "unpolled-kick"):
        assert {bool(alert["evidence"]["eventfd_count"]) for alert in alerts} == {cause == "unpolled-kick"}
        assert {alert["evidence"]["eventfd_polled"] for alert in alerts} == {cause == "lost-kick"}


@pytest.mark.timeout(600)
def test_an_iothread_waits_for_a_lock(on: Scene, said: Said) -> None:
    """D: its bottom half wants the AioContext, and a monitor command has it."""
    if on.context == on.main:
        with pytest.raises(LabError, match="an iothread"), causes.blocked_in_lock(on):
            pass
        return
    alerts = repeat(on, said, causes.blocked_in_lock)
    assert said.causes() == {"loop-blocked"}
    assert all("futex" in alert["explanation"] for alert in alerts)


@pytest.mark.timeout(600)
def test_the_storage_holds_a_request(on: Scene, said: Said) -> None:
    """F, with every kind of request."""
    alerts = repeat(on, said, causes.stuck_worker, KINDS)
    assert said.causes() == {"worker-stuck"}
    calls = {alert["kind"]: alert["evidence"]["worker"]["syscall"].split()[0] for alert in alerts}
    assert calls == {"write": "pwrite64", "read": "pread64", "flush": "fdatasync", "discard": "fallocate"}
    assert all(alert["state"] == "THREAD_ACTIVE" and str(on.slow.disk) in alert["explanation"] for alert in alerts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fault", "cause"), QUEUE_FAULTS, ids=lambda each: getattr(each, "__name__", None))
def test_nobody_takes_a_request(on: Scene, said: Said, fault: Fault, cause: str) -> None:
    """G2 and G3: workers are idle, or one could not be made; or the storage holds all there are."""
    alerts = repeat(on, said, fault, cause=cause)
    assert {alert["state"] for alert in alerts} == {"THREAD_QUEUED"}
    assert queued_causes(said, cause) == {cause}
    assert said.causes("THREAD_ACTIVE") <= {"worker-stuck"}


@pytest.mark.timeout(600)
def test_a_callback_waits(on: Scene, said: Said) -> None:
    """E: the bottom half is not scheduled, the home thread sleeps, and yet it is no lost wake-up."""
    repeat(on, said, causes.nested_wait)
    assert said.causes() == {"nested-wait"}


@pytest.mark.timeout(600)
def test_a_lost_flush_and_a_drain(on: Scene, said: Said) -> None:
    """A, and somebody types `stop`: the main thread waits in bdrv_drain_all, the cause is the same."""
    alerts = repeat(on, said, lambda scene, _kind: causes.draining(scene), ("flush",))
    assert said.causes() == {"lost-wakeup"}
    assert all(alert["evidence"]["bottom_half_scheduled"] is False for alert in alerts)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_wakeup(on: Scene, said: Said, kind: str) -> None:
    """A, freed by chance after its deadline."""
    requests = 0
    for _ in range(REPEAT):
        here = said.fresh()
        lost = faults.lose(on.qemu, "d0", kind, on.pool)
        requests += len(lost.requests)
        here.wait("alert", lost.requests)
        lost.free()
        here.wait("resolved", lost.requests)
    assert said.causes() == {"lost-wakeup"}
    assert len(said.named("alert")) == requests


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
@pytest.mark.parametrize("fault", [causes.lost_kick, causes.sleeping_workers])
def test_a_stopped_process(on: Scene, said: Said, fault: Fault) -> None:
    """SIGSTOP before the deadline, whatever the request waits for: nothing else is said of it."""
    for _ in range(REPEAT):
        here = said.fresh()
        with fault(on, "write") as request:
            stop_process(on.qemu.pid)
            try:
                here.wait("alert", [request])
            finally:
                continue_process(on.qemu.pid)
        here.wait("resolved", [request])
    assert said.causes() == {"stopped"}


@pytest.mark.timeout(900)
def test_every_worker_is_busy(on: Scene, said: Said) -> None:
    """F and G1: 64 requests wait for the storage, more wait for a worker. Last: it leaves 64 workers."""
    for _ in range(REPEAT):
        here = said.fresh()
        with causes.full_queue(on) as queued:
            here.wait("alert", on.requests())
            assert set(queued) == set(on.requests(RequestState.THREAD_QUEUED))
    assert said.causes("THREAD_ACTIVE") == {"worker-stuck"}
    assert said.causes("THREAD_QUEUED") == {"queue-full"}
