"""`aio-trace nudge`: what it frees, what it refuses, what it sends, on real QEMUs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.nudging import ROOT, WITNESS, by_force, by_monitor, commands, nudge
from tracer.build import read_build
from tracer.errors import NudgeRefused
from tracer.lab import faults
from tracer.lab.guest import OPERATIONS, Workload, guest
from tracer.lab.qemu import Drive, Qemu, TraceCounts, paused
from tracer.nudge import Nudge
from tracer.target import open_target

#: How often each way frees a lost completion in these tests; 100 for the long form.
ROUNDS = int(os.environ.get("AIO_TRACE_NUDGE_ROUNDS", "3"))
REFUSALS = int(os.environ.get("AIO_TRACE_NUDGE_REFUSALS", "50"))
LONG = pytest.mark.timeout(120 + 10 * ROUNDS + REFUSALS)
MOST_PAUSE_MS = 200


@pytest.fixture(params=["main loop", "iothread"])
def watched(request: pytest.FixtureRequest) -> Iterator[Qemu]:
    """A QEMU whose trace log also says what its monitors were sent; d0 in the main loop, then in an iothread."""
    with paused(iothread=request.param == "iothread", extra=WITNESS) as qemu:
        yield qemu


# What it frees


@LONG
def test_by_monitor(watched: Qemu) -> None:
    pool = faults.pool_of(watched, "d0")
    for _ in range(ROUNDS):
        lost = faults.lose(watched, "d0", "write", pool)
        before, sent = watched.trace_counts(), len(commands(watched))
        done = by_monitor(watched)
        assert done.status == 0, done.errors
        assert not lost.still_lost()
        (event,) = done.nudges
        assert event["request"] == hex(lost.request)
        assert event["cause"] == "lost-wakeup"
        assert event["freed"] is True
        # QEMU's own trace: one request, and no other command than those announced.
        watched.wait_until(lambda expected=before.submitted + 1: watched.trace_counts().completed == expected)
        assert watched.trace_counts().submitted == before.submitted + 1
        names = [json.loads(line)["execute"] for line in commands(watched)[sent:] if line.startswith("{")]
        assert names == ["qmp_capabilities", "query-status", "query-block", "human-monitor-command"]
        assert "query-status" in done.errors
        assert 'qemu-io d0 "aio_read -q 1 510"' in done.errors


@LONG
def test_by_force(watched: Qemu) -> None:
    pool = faults.pool_of(watched, "d0")
    for _ in range(ROUNDS):
        lost = faults.lose(watched, "d0", "write", pool)
        before, sent = watched.trace_counts(), commands(watched)
        done = by_force(watched)
        assert done.status == 0, done.errors
        assert not lost.still_lost()
        (event,) = done.nudges
        assert (event["request"], event["freed"]) == (hex(lost.request), True)
        assert 0 < event["pause_ms"] < MOST_PAUSE_MS
        watched.wait_until(lambda expected=before.submitted: watched.trace_counts().completed == expected)
        assert watched.trace_counts().submitted == before.submitted
        assert commands(watched) == sent
    watched.request("d0", "write")


@pytest.mark.usefixtures("guest_files")
@pytest.mark.parametrize(("image_format", "iothread"), [("qcow2", None), ("raw", "io0")])
@LONG
def test_a_guest_goes_on_and_loses_nothing(image_format: str, iothread: str | None, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, str(image), "64M"], check=True)
    workload = Workload(mix=OPERATIONS, pause=0)
    with guest(workload, Drive(format=image_format, iothread=iothread, file=image)) as machine:
        for way in (by_monitor, by_force):
            for _ in range(max(1, ROUNDS // 3)):
                faults.lose_guest_io(machine)
                stands_at = machine.progress()
                done = way(machine)
                assert done.status == 0, done.errors
                assert all(event["freed"] for event in done.nudges)
                assert machine.wait_progress(3) >= stands_at + 3
        assert machine.failures() == []
        counts = machine.trace_counts()
        assert counts.submitted - counts.completed <= 1
    if image_format == "qcow2":
        check = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True, check=False)
        assert check.returncode == 0, check.stdout


def test_a_dead_monitor_is_freed_by_force(paused_qemu: Qemu) -> None:
    lost = faults.lose(paused_qemu, "d0", "flush")
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(30)
        monitor.connect(str(paused_qemu.folder / "stall.qmp"))
        answers = monitor.makefile("rw")
        answers.readline()
        for command in ("qmp_capabilities", "stop"):
            answers.write(json.dumps({"execute": command}) + "\n")
            answers.flush()
            if command != "stop":
                assert "return" in json.loads(answers.readline())
        done = by_monitor(paused_qemu, "--timeout", "1s")
        assert done.status == 1
        assert "does not answer within 1 s" in done.errors
        assert "--force" in done.errors
        assert lost.still_lost()
        done = by_force(paused_qemu)
        assert done.status == 0, done.errors
        assert done.nudges[0]["freed"] is True
        replies = iter(lambda: json.loads(answers.readline()), None)
        assert any("return" in reply for reply in replies)
    counts = paused_qemu.trace_counts()
    assert paused_qemu.qmp("query-status")["running"] is False
    assert counts == TraceCounts(counts.submitted, counts.submitted)


# What it refuses


@pytest.mark.usefixtures("guest_files")
@LONG
def test_a_healthy_vm_under_load_is_refused() -> None:
    with guest(Workload(pause=0, jobs=4), extra=WITNESS) as machine:
        sent = commands(machine)
        for _ in range(3):
            done = nudge(machine.pid, "--qmp", str(machine.spare_monitor), "--force", "--yes")
            assert done.status == 1, done.errors
            assert "nothing was sent" in done.errors
            assert done.nudges == []
        target = open_target(machine.pid)
        nudger = Nudge(target, read_build(target.image_path, target.exe), print)
        for _ in range(REFUSALS):
            with pytest.raises(NudgeRefused):
                nudger.diagnose()
        assert commands(machine) == sent
        machine.wait_progress(1)


def test_a_stopped_process_is_refused(watched: Qemu) -> None:
    faults.lose(watched, "d0", "write")
    sent = commands(watched)
    with faults.stopped(watched):
        done = nudge(watched.pid, "--qmp", str(watched.spare_monitor), "--force", "--yes")
        assert done.status == 1
        assert f"kill -CONT {watched.pid}" in done.errors
    assert commands(watched) == sent
    assert by_force(watched).status == 0


def test_a_stuck_loop_is_refused(paused_qemu: Qemu) -> None:
    pool = faults.pool_of(paused_qemu, "d0")
    with faults.stalled_completion(paused_qemu, "d0", pool):
        done = nudge(paused_qemu.pid, "--qmp", str(paused_qemu.spare_monitor), "--force", "--yes")
        assert done.status == 1
        assert "loop-blocked" in done.errors
        assert done.nudges == []


def test_force_asks_first(paused_qemu: Qemu) -> None:
    lost = faults.lose(paused_qemu, "d0", "write")
    done = nudge(paused_qemu.pid, "--force")
    assert done.status == 2
    assert "--yes" in done.errors
    assert lost.still_lost()
    lost.free()


def test_a_monitor_of_another_qemu_is_refused(watched: Qemu) -> None:
    lost = faults.lose(watched, "d0", "write")
    with paused(extra=WITNESS) as other:
        sent = commands(other)
        done = nudge(watched.pid, "--qmp", str(other.spare_monitor))
        assert done.status == 1
        assert f"belongs to process {other.pid}" in done.errors
        assert commands(other) == sent
    assert lost.still_lost()
    lost.free()


def test_a_monitor_that_somebody_holds(watched: Qemu) -> None:
    lost = faults.lose(watched, "d0", "write")
    done = nudge(watched.pid, "--qmp", str(watched.folder / "lab.qmp"), "--timeout", "500ms")
    assert done.status == 1
    assert "another client, usually libvirt, holds the monitor" in done.errors
    assert "virsh qemu-monitor-command DOMAIN --hmp" in done.errors
    assert lost.still_lost()
    lost.free()


@pytest.mark.parametrize(("path", "sentence"), [("nothing", "there is no socket"), ("d0.img", "nobody listens at")])
def test_no_monitor_there(paused_qemu: Qemu, path: str, sentence: str) -> None:
    lost = faults.lose(paused_qemu, "d0", "write")
    done = nudge(paused_qemu.pid, "--qmp", str(paused_qemu.folder / path))
    assert done.status == 1
    assert sentence in done.errors
    lost.free()


def test_a_human_monitor_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with paused(extra=["-monitor", f"unix:{path},server=on,wait=off"]) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--qmp", str(path))
        assert done.status == 1
        assert "does not speak QMP" in done.errors
        lost.free()


KILLED = """
import os, signal, sys
from tracer import inject
from tracer.build import read_build
from tracer.nudge import Nudge
from tracer.target import open_target

at = int(sys.argv[2])
plain, calls = inject._Stopped._ptrace, 0


def ptrace(self, *arguments, **named):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, *arguments, **named)


inject._Stopped._ptrace = ptrace
target = open_target(int(sys.argv[1]))
nudger = Nudge(target, read_build(target.image_path, target.exe), lambda text: None)
nudger.force(nudger.diagnose())
print(calls)
"""


def test_killed_in_the_middle_it_does_no_harm(watched: Qemu) -> None:
    """Killed before each of its steps in turn, --force leaves QEMU as it was, or the request freed."""
    pool = faults.pool_of(watched, "d0")
    outcomes = []
    while True:
        lost = faults.lose(watched, "d0", "write", pool)
        command = [sys.executable, "-c", KILLED, str(watched.pid), str(len(outcomes) + 1)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        watched.kick("d0")
        outcomes.append(lost.still_lost())
        if outcomes[-1]:
            lost.free()
    # SEIZE, INTERRUPT, registers, mask, FPU state; SETREGS is the moment; then DETACH.
    assert outcomes == [True] * 6 + [False]
    assert int(done.stdout) == len(outcomes)
    assert not lost.still_lost()
    watched.request("d0", "write")
