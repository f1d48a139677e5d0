"""The main job's figures by file, late completions, stacks in alerts, and the trace without probes under load."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import closing
from pathlib import Path

from tests.qemu.tracing import traced
from tracer.lab import causes, faults
from tracer.lab.process import continue_process, stop_process, wait_until
from tracer.lab.qemu import Drive, Qemu, paused
from tracer.live import LiveView
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
                trace.finish()
        finally:
            load.kill()
    # On an overloaded host the loop may really be late: the scheduler is the witness.
    assert [alert for alert in trace.named("alert") if not alert["evidence"]["home_starved"]] == []
    assert {alert["cause"] for alert in trace.named("alert")} <= {"loop-busy"}


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


def test_figures_stay_with_the_file_they_were_counted_on(paused_qemu: Qemu, tmp_path: Path) -> None:
    """One disk is unplugged, and another gets its descriptor: neither has the other's requests."""
    images = {name: tmp_path / f"{name}.img" for name in ("first", "second")}
    for image in images.values():
        image.write_bytes(bytes(1 << 20))
    with traced(paused_qemu.pid, "--interval", "300ms") as trace:
        descriptors = set()
        for (name, image), count in zip(images.items(), (23, 7)):
            options = {"driver": "file", "node_name": name, "filename": str(image)}
            paused_qemu.qmp("blockdev-add", **options)
            descriptors |= {fd for fd, file in open_files(paused_qemu.pid).items() if file == str(image)}
            intervals = len(trace.named("interval"))
            wait_until(lambda seen=intervals: len(trace.named("interval")) > seen + 1, what="the names to be taken")
            for block in range(count):
                paused_qemu.hmp(f'qemu-io {name} "write {block * 4096} 4k"')
            paused_qemu.qmp("blockdev-del", node_name=name)
        assert len(descriptors) == 1, "QEMU gave the second disk another descriptor"
        assert trace.finish() == 0
    counts = {file: stages["total"]["count"] for file, stages in trace.summary["by_file"].items()}
    assert counts == {str(images["first"]): 23 + 1, str(images["second"]): 7 + 1}  # the last is a flush, at the end
    seen = [event["by_file"] for event in trace.named("interval") if str(images["first"]) in event["by_file"]]
    assert sum(by_file[str(images["first"])]["total"]["count"] for by_file in seen) == 23 + 1


def open_files(pid: int) -> dict[int, str]:
    with closing(LiveView(open_target(pid))) as view:
        return view.files()


def test_a_qemu_that_ended_has_its_files_in_the_summary(paused_qemu: Qemu) -> None:
    """No interval took their names, and at the end there is no process to ask."""
    with traced(paused_qemu.pid, "--interval", "0") as trace:
        for block in range(5):
            paused_qemu.request("d0", "write", block * 4096)
        os.kill(paused_qemu.pid, signal.SIGKILL)
        trace.expect("summary")
        assert trace.finish() == 0
    image = str(paused_qemu.folder / "d0.img")
    assert {file: stages["total"]["count"] for file, stages in trace.summary["by_file"].items()} == {image: 5}


def test_what_a_stop_made_late_is_not_counted_as_late() -> None:
    """The write is done, and nobody can call back while the process is stopped: that is not QEMU's fault."""
    with causes.scene() as on, traced(on.qemu.pid, "--deadline", "300ms", "--interval", "0") as trace:
        with causes.lost_kick(on, "write"):
            stop_process(on.qemu.pid)
            try:
                trace.expect("alert")
            finally:
                continue_process(on.qemu.pid)
        trace.expect("resolved")
        lost = faults.lose(on.qemu, "d0", "write", on.pool)
        trace.expect("alert")
        lost.free()
        trace.expect("resolved")
        assert trace.finish() == 3
    assert [alert["cause"] for alert in trace.named("alert")] == ["stopped", "lost-wakeup"]
    assert trace.summary["late"] == 1


def test_without_the_submit_probe_kinds_and_files_are_not_known(paused_qemu: Qemu) -> None:
    with traced(paused_qemu.pid, "--probes", "alert") as trace:
        paused_qemu.request("d0", "write")
        assert trace.finish() == 0
    assert (trace.summary["by_kind"], trace.summary["by_file"]) == (None, None)
    assert trace.summary["requests"]["completed"] == 1
    assert any("not seen with --probes alert" in note for note in trace.events[0]["notes"])
