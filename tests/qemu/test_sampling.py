"""The trace without probes: what it costs and does not say under load, and that its alert is in time."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.qemu.tracing import traced
from tracer.build import load, read_build
from tracer.events import Alert, Event
from tracer.executable import Executable
from tracer.inspect import diagnose
from tracer.lab import faults
from tracer.lab.process import wait_until
from tracer.lab.qemu import paused
from tracer.live import LiveView
from tracer.memory import LiveMemory
from tracer.target import open_target
from tracer.watch import SAMPLES, Settings, Watch

DEPTH = 64


@contextmanager
def busy_pool(folder: Path, depth: int = DEPTH) -> Iterator[int]:
    """The pid of a qemu-img whose pool has that many requests all the time."""
    image = folder / "image"
    image.write_bytes(bytes(16 << 20))
    command = ["qemu-img", "bench", "-f", "raw", "-i", "threads", "-t", "writeback", "-c", "2000000000"]
    with subprocess.Popen([*command, "-d", str(depth), str(image)], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: _pools(process.pid) == 1, what="its thread pool")
            yield process.pid
        finally:
            process.kill()


def _pools(pid: int) -> int:
    target = open_target(pid)
    with closing(LiveView(target)) as view:
        return len(load(view, read_build(target.image_path, "qemu-img")).reader.find(view.heap_chunks()))


def test_a_busy_pool_costs_few_short_looks_and_gives_no_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither scans nor reads grow with the requests that are done, of which there are thousands between two looks."""
    reads = 0
    read = LiveMemory.read

    def counted(self: LiveMemory, address: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        return read(self, address, size)

    monkeypatch.setattr(LiveMemory, "read", counted)
    events: list[Event] = []
    with busy_pool(tmp_path) as pid:
        target = open_target(pid)
        watch = Watch(target, read_build(target.image_path, "qemu-img"), Settings(1.0, mode="none"), events.append)
        with closing(watch), Executable.of(target) as file:
            watch.attach(time.monotonic(), file)
            reads, scans, seen = 0, 0, []
            began = time.monotonic()
            while watch.next_scan < began + 5:
                time.sleep(max(0.0, watch.next_scan - time.monotonic()))
                scans += 1
                before = reads
                watch.scan()
                seen.append(reads - before)
    assert [event for event in events if isinstance(event, Alert)] == []
    assert scans <= 5 * (SAMPLES + 1)
    # A torn list is walked twice, and what that did not reach is looked up one by one, three reads each.
    assert sorted(seen)[len(seen) // 2] <= (2 + 2 + 1) * DEPTH + 8
    assert max(seen) > DEPTH


@pytest.mark.parametrize("depth", [1, DEPTH])
def test_inspect_accuses_nothing_in_a_busy_pool(tmp_path: Path, depth: int) -> None:
    """Each of its requests is in the memory of an earlier one, and most are finished whenever one looks."""
    with busy_pool(tmp_path, depth) as pid:
        target = open_target(pid)
        build = read_build(target.image_path, "qemu-img")
        for _ in range(8):
            with closing(LiveView(target)) as view:
                diagnosis = diagnose(view, build)
            late = [request for pool in diagnosis.pools for request in pool.requests if request.overdue]
            # On an overloaded host the loop may really be late: the scheduler is the witness.
            assert not [request.cause for request in late if not (request.evidence or {})["home_starved"]]
            assert {request.cause for request in late} <= {"loop-busy"}


@pytest.mark.parametrize("deadline_s", [0.3, 1.0])
def test_the_alert_without_probes_comes_at_the_deadline(deadline_s: float) -> None:
    """Counted from the loss, not from the look that saw it, though looks are a quarter of the deadline apart."""
    late = []
    with paused() as qemu:
        qemu.request("d0", "write")
        pool = faults.pool_of(qemu, "d0")
        with traced(qemu.pid, "--probes", "none", "--deadline", f"{1000 * deadline_s:g}ms") as trace:
            for number in range(3):
                time.sleep(number * deadline_s / 10)  # at different places between two looks
                before = time.time()
                lost = faults.lose(qemu, "d0", "write", pool)
                after = time.time()
                alert = trace.expect("alert")
                lost.free()
                trace.expect("resolved")
                assert (alert["cause"], int(alert["request"], 16)) == ("lost-wakeup", lost.request)
                assert alert["arrived"] - before >= max(deadline_s, alert["age_s"])
                late.append(max(alert["overdue_s"], alert["arrived"] - after - deadline_s))
            assert trace.finish() == 3
    assert statistics.median(late) <= 0.1


def test_how_long_a_thread_has_slept_is_that_on_any_cpu() -> None:
    """Each CPU has a clock of its own; no thread slept longer than its process lives."""
    began = time.monotonic()
    with paused() as qemu, closing(LiveView(open_target(qemu.pid))) as view:
        time.sleep(0.2)
        slept = [view.asleep_s(thread.tid) for thread in view.threads()]
        lived = time.monotonic() - began
        assert all(seconds is not None and seconds <= lived for seconds in slept), slept
