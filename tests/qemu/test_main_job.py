"""The main job on real QEMUs: counts against QEMU's own trace, lost completions, stuck loops, no false alarm."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator

import pytest

from tests.qemu.tracing import Trace, traced
from tracer.lab import faults
from tracer.lab.guest import Workload, guest
from tracer.lab.process import continue_process, stop_process
from tracer.lab.qemu import Drive, Qemu, paused, storage_daemon
from tracer.watch import MANY_ALERTS

KINDS = ("write", "read", "flush", "discard")
DEADLINES = ["200ms", "1s", "5s"]
STALL_S = 3.0
REQUEST_FIELDS = {
    *("event", "time", "pid", "request", "pool", "context", "kind", "file", "offset", "bytes", "state", "ret"),
    *("age_s", "deadline_s", "overdue_s", "cause", "explanation", "evidence", "seen_from"),
}


@pytest.fixture(scope="module", params=["main loop", "iothread"])
def qemu(request: pytest.FixtureRequest) -> Iterator[Qemu]:
    """A paused QEMU whose disk is served by the main loop or by an iothread; both have a pool already."""
    with paused(iothread=request.param == "iothread") as machine:
        machine.request("d0", "write")
        yield machine


@pytest.fixture(scope="module")
def pool(qemu: Qemu) -> faults.PoolHandle:
    """The pool of its disk."""
    return faults.pool_of(qemu, "d0")


def test_counts_are_those_of_qemus_own_trace() -> None:
    """23 writes by the monitor, not one more or less at any stage."""
    with paused() as machine, traced(machine.pid) as trace:
        before = machine.trace_counts()
        for index in range(23):
            machine.io("d0", f"aio_write {index * 65536} 64k")
        machine.wait_until(lambda: machine.trace_counts().completed == before.completed + 23)
        assert trace.finish() == 0
        witness = machine.trace_counts()
    requests = trace.summary["requests"]
    assert witness.submitted - before.submitted == 23
    assert (requests["submitted"], requests["done"], requests["completed"]) == (23, 23, 23)
    assert (requests["in_flight"], requests["cancelled"], trace.summary["lost_records"]) == (0, 0, 0)
    assert trace.summary["by_kind"]["write"]["total"]["count"] == 23
    for stage in ("submit_to_done", "done_to_callback", "total"):
        latency = trace.summary["latency_us"][stage]
        assert latency["count"] == 23 == sum(count for _, count in latency["buckets"])
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]


def test_counts_stay_exact_under_load(qemu: Qemu) -> None:
    """Thousands of requests of all kinds, many at once: still what QEMU's own trace says."""
    with traced(qemu.pid, "--interval", "200ms") as trace:
        before = qemu.trace_counts()
        for start in range(0, 4000, 16):
            handles = [qemu.submit("d0", KINDS[index % 4], index % 256 * 4096) for index in range(start, start + 16)]
            for handle in handles:
                qemu.finish("d0", handle)
            if start == 2000:
                while not trace.expect("interval")["requests"]["submitted"]:
                    pass
        assert trace.finish() == 0
        after = qemu.trace_counts()
    requests = trace.summary["requests"]
    assert requests["submitted"] == after.submitted - before.submitted > 2000
    assert requests["done"] == requests["completed"] == requests["submitted"]
    assert (requests["in_flight"], trace.summary["lost_records"]) == (0, 0)
    # Intervals are of their own time: together with the rest after the last one they make the summary.
    told = sum(event["requests"]["submitted"] for event in trace.named("interval"))
    assert 0 < told <= requests["submitted"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_completion_is_named(qemu: Qemu, pool: faults.PoolHandle, kind: str) -> None:
    """One alert, in time, that names the request; `resolved` once it is freed."""
    deadline = 0.5
    with traced(qemu.pid, "--deadline", "500ms") as trace:
        lost = faults.lose(qemu, "d0", kind, pool)
        alert = trace.expect("alert")
        assert alert.keys() >= REQUEST_FIELDS
        assert (alert["cause"], alert["kind"], alert["state"]) == ("lost-wakeup", kind, "THREAD_DONE")
        assert int(alert["request"], 16) == lost.request
        assert int(alert["pool"], 16) == lost.pool.pool
        assert (alert["seen_from"], alert["ret"], alert["deadline_s"]) == ("probes", 0, deadline)
        assert os.path.basename(alert["file"]) == "d0.img"
        assert (alert["bytes"] is None) == (kind == "flush")
        assert alert["evidence"]["bottom_half_scheduled"] is False
        assert alert["age_s"] >= deadline
        assert alert["overdue_s"] == pytest.approx(alert["age_s"] - deadline, abs=1e-5)
        lost.free()
        resolved = trace.expect("resolved")
        assert resolved["request"] == alert["request"]
        assert resolved["after_s"] >= alert["age_s"]
        assert trace.finish() == 3
    assert len(trace.named("alert")) == 1
    assert trace.summary["alerts"] == 1
    assert trace.summary["requests"]["in_flight"] == 0


@pytest.mark.parametrize("deadline", DEADLINES)
def test_the_alert_comes_at_the_deadline(qemu: Qemu, pool: faults.PoolHandle, deadline: str) -> None:
    """Never before the deadline and no later than 100 ms after it, by the target's own clock."""
    with traced(qemu.pid, "--deadline", deadline) as trace:
        lost = faults.lose(qemu, "d0", "write", pool)
        alert = trace.expect("alert")
        lost.free()
        assert trace.finish() == 3
    assert alert["cause"] == "lost-wakeup"
    assert 0 <= alert["overdue_s"] <= 0.1


def test_many_in_a_row_are_each_told_at_once(qemu: Qemu, pool: faults.PoolHandle) -> None:
    """Late requests of a slow loop are looked at together; lost ones never wait for that."""
    overdue = []
    with traced(qemu.pid, "--deadline", "200ms") as trace:
        for _ in range(MANY_ALERTS + 6):
            lost = faults.lose(qemu, "d0", "write", pool)
            alert = trace.expect("alert")
            assert (int(alert["request"], 16), alert["cause"]) == (lost.request, "lost-wakeup")
            overdue.append(alert["overdue_s"])
            lost.free()
            trace.expect("resolved")
    assert min(overdue) >= 0
    assert statistics.median(overdue[MANY_ALERTS:]) <= 0.1


@pytest.mark.parametrize("mode", ["full", "alert", "none"])
def test_freed_at_the_last_moment(qemu: Qemu, pool: faults.PoolHandle, mode: str) -> None:
    """What goes on right before the end is told, too."""
    with traced(qemu.pid, "--deadline", "300ms", "--probes", mode) as trace:
        lost = faults.lose(qemu, "d0", "write", pool)
        trace.expect("alert")
        lost.free()
        qemu.request("d0", "read")  # off the list it was before its callback
        assert trace.finish() == 3
    (resolved,) = trace.named("resolved")
    assert int(resolved["request"], 16) == lost.request


def test_a_completion_lost_before_we_came(qemu: Qemu, pool: faults.PoolHandle) -> None:
    """It is in memory only, and is found there."""
    lost = faults.lose(qemu, "d0", "write", pool)
    with Trace(qemu.pid, "--deadline", "300ms") as trace:
        attached = trace.expect("attached")
        assert attached["in_flight"] == 1
        assert pool.pool in [int(info["pool"], 16) for info in attached["pools"]]
        alert = trace.expect("alert")
        assert (alert["cause"], alert["seen_from"]) == ("lost-wakeup", "memory")
        assert int(alert["request"], 16) == lost.request
        lost.free()
        trace.expect("resolved")
        assert trace.finish() == 3
    assert trace.summary["requests"]["completed"] == trace.summary["requests"]["submitted"]


@pytest.mark.parametrize("mode", ["alert", "none"])
def test_fewer_probes_see_the_same(qemu: Qemu, pool: faults.PoolHandle, mode: str) -> None:
    """Two probes or none: the same alert, and what is not measured is null."""
    with traced(qemu.pid, "--deadline", "300ms", "--probes", mode) as trace:
        lost = faults.lose(qemu, "d0", "write", pool)
        alert = trace.expect("alert")
        assert (alert["cause"], alert["kind"]) == ("lost-wakeup", "write")
        assert int(alert["request"], 16) == lost.request
        lost.free()
        trace.expect("resolved")
        assert trace.finish() == 3
    assert trace.summary["requests"]["submitted"] is None


def test_the_storage_daemon_too() -> None:
    """Counts and a lost completion on qemu-storage-daemon."""
    with storage_daemon() as daemon:
        daemon.request("d0", "write")
        with traced(daemon.pid, "--deadline", "300ms") as trace:
            before = daemon.trace_counts()
            for index in range(10):
                daemon.request("d0", "write", index * 4096)
            daemon.wait_until(lambda: daemon.trace_counts().completed == before.completed + 10)
            lost = faults.lose(daemon, "d0", "write")
            assert trace.expect("alert")["cause"] == "lost-wakeup"
            lost.free()
            trace.expect("resolved")
            assert trace.finish() == 3
            after = daemon.trace_counts()
    requests = trace.summary["requests"]
    assert requests["submitted"] == requests["completed"] == after.submitted - before.submitted


def test_a_stuck_main_loop_is_no_lost_wakeup() -> None:
    """The main loop hangs in a system call for 3 s: said so, by name, and resolved after it."""
    with paused() as machine:
        machine.request("d0", "write")
        handle = faults.pool_of(machine, "d0")
        with traced(machine.pid, "--deadline", "500ms") as trace:
            with faults.stalled_completion(machine, "d0", handle):
                alert = trace.expect("alert")
                time.sleep(STALL_S)
            trace.expect("resolved")
            assert trace.finish() == 3
    assert {event["cause"] for event in trace.named("alert")} == {"loop-blocked"}
    assert "openat" in alert["explanation"]
    assert "stall-" in alert["explanation"]


def test_a_busy_main_loop_is_no_lost_wakeup() -> None:
    """The main loop computes for seconds while requests wait."""
    with paused([Drive(size=256 << 20)]) as machine:
        machine.request("d0", "write")
        with traced(machine.pid, "--deadline", "300ms") as trace:
            with faults.busy_main_loop(machine, 2, ahead='qemu-io d0 "aio_write 0 128M"'):
                alert = trace.expect("alert")
            trace.expect("resolved")
            assert trace.finish() == 3
    assert alert["cause"] == "loop-busy"
    assert {event["cause"] for event in trace.named("alert")} <= {"loop-busy", "loop-blocked"}


def test_a_stopped_process_is_called_stopped(qemu: Qemu, pool: faults.PoolHandle) -> None:
    """SIGSTOP with a finished request in the pool: `stopped`, not a bug of QEMU."""
    lost = faults.lose(qemu, "d0", "write", pool)
    stop_process(qemu.pid)
    try:
        with traced(qemu.pid, "--deadline", "300ms") as trace:
            assert trace.expect("alert")["cause"] == "stopped"
            assert trace.finish() == 3
    finally:
        continue_process(qemu.pid)
        lost.free()


@pytest.mark.timeout(300)
def test_a_busy_guest_raises_no_alarm() -> None:
    """A Linux guest that writes, reads and flushes with four jobs; the long form is `make soak`."""
    workload = Workload(mix=("write", "read", "flush"), pause=0, jobs=4)
    with guest(workload, Drive(iothread="io0")) as machine, traced(machine.pid, "--deadline", "1s") as trace:
        time.sleep(float(os.environ.get("AIO_TRACE_SOAK_S", "8")))
        assert trace.finish() == 0
        assert not machine.failures()
    assert trace.named("alert") == []
    requests = trace.summary["requests"]
    assert requests["completed"] > 100
    assert requests["submitted"] - requests["completed"] == requests["in_flight"]
    assert trace.summary["lost_records"] == 0


def test_a_guest_hangs_and_goes_on() -> None:
    """The real thing: a Linux guest's disk stands still, is explained, is freed, goes on."""
    with guest(Workload(pause=0.02)) as machine, traced(machine.pid) as trace:
        lost = faults.lose_guest_io(machine)
        alert = trace.expect("alert")
        assert alert["cause"] == "lost-wakeup"
        stuck_at = machine.progress()
        time.sleep(2)
        assert machine.progress() == stuck_at
        lost.free()
        trace.expect("resolved")
        machine.wait_progress(10)
        assert trace.finish() == 3
        assert not machine.failures()
