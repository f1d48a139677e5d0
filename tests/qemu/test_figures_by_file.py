"""The main job's figures by file, late completions, stacks in alerts, and the trace without probes under load."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.qemu.tracing import traced
from tracer.lab import faults
from tracer.lab.process import wait_until
from tracer.lab.qemu import Drive, Qemu, paused
from tracer.target import open_target


def test_every_file_has_its_own_figures() -> None:
    """23 writes and one flush on one disk, 7 reads on the other: exactly that, by kind and by file."""
    with paused([Drive("d0"), Drive("d1", iothread="io0")]) as qemu, traced(qemu.pid) as trace:
        before = qemu.trace_counts()
        for block in range(23):
            qemu.request("d0", "write", block * 4096)
        qemu.request("d0", "flush")
        for block in range(7):
            qemu.request("d1", "read", block * 4096)
        assert trace.finish() == 0
        assert qemu.trace_counts().completed - before.completed == 31
        files = {name: str(qemu.folder / f"{name}.img") for name in ("d0", "d1")}
    counts = {file: stages["total"]["count"] for file, stages in trace.summary["by_file"].items()}
    assert counts == {files["d0"]: 24, files["d1"]: 7}
    kinds = {kind: stages["total"]["count"] for kind, stages in trace.summary["by_kind"].items()}
    assert kinds == {"write": 23, "flush": 1, "read": 7}
    assert (trace.summary["requests"]["completed"], trace.summary["late"]) == (31, 0)


def test_a_late_completion_is_counted_and_its_alert_has_the_stack(any_loop_qemu: Qemu) -> None:
    """Lost, freed, and counted apart, once, in the interval in which it came."""
    with traced(any_loop_qemu.pid, "--deadline", "300ms") as trace:
        lost = faults.lose(any_loop_qemu, "d0", "flush")
        alert = trace.expect("alert")
        lost.free()
        trace.expect("resolved")
        assert trace.finish() == 3
    assert trace.summary["late"] == 1
    assert trace.summary["requests"]["completed"] == trace.summary["requests"]["submitted"]
    evidence = alert["evidence"]
    loop = "main_loop_wait" if any_loop_qemu.drives["d0"].iothread is None else "aio_poll"
    assert any(frame.startswith(loop) for frame in evidence["home_stack"]), evidence
    assert evidence["draining"] is None
    assert "e8d3b1a25f" in alert["explanation"]


def test_without_probes_requests_that_look_alike_are_not_one(tmp_path: Path) -> None:
    """One large write after the other, each in the memory of the last: samples look the same."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    bench = ["qemu-img", "bench", "-f", "raw", "-i", "threads", "-w", "-d", "1", "-s", "1M", "-c", "100000000"]
    with subprocess.Popen([*bench, str(image)], stdout=subprocess.DEVNULL) as load:
        try:
            wait_until(lambda: len(open_target(load.pid).threads()) > 2, what="a worker")
            with traced(
                load.pid, "--probes", "none", "--deadline", "100ms", "--slow", "200ms", "--interval", "3s"
            ) as trace:
                trace.expect("interval")
                assert trace.finish() == 0
        finally:
            load.kill()
    assert trace.named("alert") == []


def test_without_probes_a_pool_that_comes_later_is_seen() -> None:
    """QEMU makes a pool with the first request; here that is the lost one's."""
    with paused([Drive("d0"), Drive("d1", iothread="io0")]) as qemu:
        with traced(qemu.pid, "--probes", "none", "--deadline", "200ms") as trace:
            known = {pool["pool"] for pool in trace.events[0]["pools"]}
            lost = faults.lose(qemu, "d1", "write")
            alert = trace.expect("alert")
            assert (alert["cause"], int(alert["request"], 16)) == ("lost-wakeup", lost.request)
            assert alert["pool"] not in known
            lost.free()
            trace.expect("resolved")
            assert trace.finish() == 3
        assert trace.summary["late"] == 1
