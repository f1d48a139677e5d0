"""Many QEMUs at once: one attachment for an executable, those that come and go, and what it may all cost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.attaching import open_kernel_objects
from tests.qemu.test_bad_weather import probed_sites
from tests.qemu.tracing import PATIENCE_S, ROOT, Trace, traced
from tracer import kernel, session
from tracer.budget import Decision
from tracer.build import read_build
from tracer.events import Alert, Attached, Counts, Event, Failure, Resolved, Stepped
from tracer.executable import Executable
from tracer.lab import faults
from tracer.lab.process import wait_until
from tracer.lab.qemu import STORAGE_DAEMON, SYSTEM, Qemu, paused, storage_daemon
from tracer.lab.storage import storage
from tracer.probes import Parameters, Programs
from tracer.session import EVERYBODY, SHARED_FROM, Newcomers, Options, Session, Stop
from tracer.sites.model import SITE_NAMES
from tracer.target import open_target
from tracer.watch import ALERT_ONLY, FULL, NONE, Settings, Watch

MANY = SHARED_FROM + 1


@pytest.fixture(scope="module")
def qemus(qemu_host: None) -> Iterator[list[Qemu]]:
    """More than have probes of their own, and one that is not watched."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(paused()) for _ in range(MANY + 1)]


def pids_of(qemus: list[Qemu]) -> list[str]:
    """As options."""
    return [word for qemu in qemus for word in ("--pid", str(qemu.pid))]


class Many(Trace):
    """A trace of several processes; the first is named by the base class."""

    def __init__(self, qemus: list[Qemu], *options: str) -> None:
        super().__init__(qemus[0].pid, *pids_of(qemus[1:]), *options)
        self.attached = {self.expect("attached")["pid"] for _ in qemus}

    def completed(self) -> dict[int, int]:
        """By process, after finish()."""
        return {event["pid"]: event["requests"]["completed"] for event in self.named("summary")}


def test_each_process_has_its_own_counts(qemus: list[Qemu]) -> None:
    """Shared probes see every process of the executable; only what is watched is counted, each for itself."""
    watched, other = qemus[:MANY], qemus[MANY]
    with Many(watched) as trace:
        assert trace.attached == {qemu.pid for qemu in watched}
        assert len(probed_sites(other)) == 3
        for number, qemu in enumerate([*watched, other]):
            for _ in range(number + 1):
                qemu.request("d0", "write")
        assert trace.finish() == 0
    assert trace.completed() == {qemu.pid: number + 1 for number, qemu in enumerate(watched)}
    for event in trace.named("summary"):
        assert event["requests"]["submitted"] == event["requests"]["done"] == event["requests"]["completed"]
        assert (event["requests"]["in_flight"], event["lost_records"]) == (0, 0)
    assert [probed_sites(qemu) for qemu in qemus] == [[]] * len(qemus)


def test_few_processes_leave_the_others_alone(qemus: list[Qemu]) -> None:
    watched, other = qemus[:SHARED_FROM], qemus[MANY]
    with Many(watched) as trace:
        assert probed_sites(other) == []
        for qemu in watched:
            qemu.request("d0", "flush")
        assert trace.finish() == 0
    assert trace.completed() == {qemu.pid: 1 for qemu in watched}


def test_a_lost_completion_among_many(qemus: list[Qemu]) -> None:
    """The alert names the process; the others go on."""
    watched = qemus[:MANY]
    with Many(watched, "--deadline", "300ms") as trace:
        lost = faults.lose(watched[2], "d0", "write")
        alert = trace.expect("alert")
        assert (alert["pid"], alert["cause"]) == (watched[2].pid, "lost-wakeup")
        assert int(alert["request"], 16) == lost.request
        assert 0 <= alert["overdue_s"] <= 0.1
        watched[3].request("d0", "read")
        lost.free()
        assert trace.expect("resolved")["pid"] == watched[2].pid
        assert trace.finish() == 3
    assert [event["pid"] for event in trace.named("alert")] == [watched[2].pid]


def test_one_of_many_ends(qemus: list[Qemu]) -> None:
    with contextlib.ExitStack() as stack:
        watched = [stack.enter_context(paused()), *qemus[:MANY]]
        with Many(watched) as trace:
            os.kill(watched[0].pid, signal.SIGKILL)
            assert trace.expect("ended")["pid"] == watched[0].pid
            watched[1].request("d0", "write")
            assert trace.finish() == 0
        assert trace.completed()[watched[1].pid] == 1


def test_those_that_start_later_are_followed_too(qemus: list[Qemu]) -> None:
    """--all: a QEMU that comes is traced as soon as it is seen, one that goes has its summary."""
    command = [sys.executable, str(ROOT / "cli.py"), "--all", "--json", "--deadline", "300ms", "--interval", "0"]
    with Trace.of(command) as trace:
        while trace.expect("attached")["pid"] != qemus[MANY].pid:
            pass
        with paused() as late:
            while trace.expect("attached")["pid"] != late.pid:
                pass
            lost = faults.lose(late, "d0", "write")
            while (alert := trace.expect("alert"))["pid"] != late.pid:
                pass
            assert alert["cause"] == "lost-wakeup"
            lost.free()
        while trace.expect("ended")["pid"] != late.pid:
            pass
        assert trace.finish() == 3


def test_another_program_in_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade may write a file anew, or get a freed one's number: what was known of the old one is gone."""
    ours: list[int] = []
    events: list[Event] = []
    monkeypatch.setattr(session, "list_pids", lambda: list(ours))
    monkeypatch.setattr(session, "FOLLOW_S", 0.1)
    monkeypatch.setenv("QEMU_MODULE_DIR", str(next(Path("/usr/lib").glob("*/qemu/accel-tcg-*.so")).parent))
    program = tmp_path / "qemu-in-one-file"
    stop = Stop()
    trace = Session([], Options(Settings(), interval_s=0, follow=True), events.append, stop)
    thread = threading.Thread(target=trace.run, args=(time.monotonic(),))
    before = open_kernel_objects()

    def of(kind: type[Event], qemu: Qemu) -> list[Event]:
        return [event for event in events if isinstance(event, kind) and event.pid == qemu.pid]

    def watched(qemu: Qemu) -> Attached:
        ours.append(qemu.pid)
        (attached,) = qemu.wait_until(lambda: of(Attached, qemu))
        assert isinstance(attached, Attached)
        return attached

    try:
        shutil.copy(str(shutil.which(STORAGE_DAEMON)), program)
        thread.start()
        with storage_daemon(exe=str(program)) as first:
            watched(first)
        ours.clear()
        wait_until(lambda: of(Counts, first) and open_kernel_objects() == before, PATIENCE_S, "the probes to be gone")
        number = program.stat().st_ino
        with open(program, "r+b") as file:
            file.truncate(0)
            file.write(Path(str(shutil.which(SYSTEM))).read_bytes())
        assert program.stat().st_ino == number
        with paused(exe=str(program)) as second:
            found = {probe.site: probe.address for probe in watched(second).probes}
            for _ in range(5):
                second.request("d0", "write")
    finally:
        stop.request()
        thread.join()
    assert found == {name: site.address for name, site in read_build(str(program), "it").located.sites.items()}
    (counts,) = of(Counts, second)
    assert isinstance(counts, Counts)
    assert counts.requests.completed == 5


def test_shared_counts_of_one_that_ends_meanwhile() -> None:
    """What was read for another process of the executable a moment ago is not counted on top of what ended since."""
    with storage() as slow, paused([slow.drive()]) as qemu, paused() as other, contextlib.ExitStack() as stack:
        for each in (qemu, other):
            each.request("d0", "write")
        pool = faults.pool_of(qemu, "d0")
        file = stack.enter_context(Executable.of(open_target(qemu.pid)))
        located = read_build(file.path, SYSTEM).located
        what = Parameters(shared=True, fresh_s=PATIENCE_S)
        programs = Programs(file, located.sites_of(*SITE_NAMES), located.layout.element, what)
        stack.callback(programs.close)
        watches = [InProcess(each, shared=programs) for each in (qemu, other)]
        for watched in watches:
            stack.callback(watched.close)
        qemu.request("d0", "write")
        with slow.held():
            handle = qemu.submit("d0", "write")
            qemu.wait_until(lambda: list(faults.requests_of(qemu, pool).values()) == [1])
            programs.refresh()
            watches[1].watch.counts(final=False)
        qemu.finish("d0", handle)
        watches[0].watch.counts(final=False)
    (counts,) = watches[0].named(Counts)
    assert isinstance(counts, Counts)
    requests = counts.requests
    assert (requests.submitted, requests.done, requests.completed, requests.in_flight) == (2, 2, 2, 0)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (5, EVERYBODY)])
def test_what_starts_a_qemu_is_another_program_first(tmp_path: Path, before: int, after: int) -> None:
    """libvirt forks, and the child becomes QEMU a moment later; a container's first program takes its time."""
    program = tmp_path / SYSTEM
    program.symlink_to("/bin/sleep")
    real = tmp_path / "bin" / SYSTEM
    real.parent.mkdir()
    real.write_bytes(Path("/bin/sleep").read_bytes())
    real.chmod(0o755)
    known = Newcomers([])
    known.look()
    shell = subprocess.Popen(["/bin/sh", "-c", f"read x; exec {real} 60"], stdin=subprocess.PIPE)
    try:
        assert all(shell.pid not in known.look() for _ in range(before))
        assert shell.stdin
        shell.stdin.write(b"\n")
        shell.stdin.flush()
        while os.readlink(f"/proc/{shell.pid}/exe") != str(real):
            time.sleep(0.01)
        assert any(shell.pid in known.look() for _ in range(after))
        assert shell.pid not in known.look()
    finally:
        shell.kill()
        shell.communicate()


# What the probes may cost


class InProcess:
    """A watch that the test steps by hand."""

    def __init__(
        self, qemu: Qemu, deadline_s: float = 0.2, slow_s: float = 10.0, shared: Programs | None = None
    ) -> None:
        self.events: list[Event] = []
        target = open_target(qemu.pid)
        self._file = Executable.of(target)
        build = read_build(self._file.path, target.exe)
        self.watch = Watch(target, build, Settings(deadline_s, slow_s, budget=10.0), self.events.append)
        self.watch.attach(time.monotonic(), self._file, shared)

    def close(self) -> None:
        self.watch.close()
        self._file.close()

    def step(self, mode: str) -> None:
        """As the budget decides."""
        self.watch._step(Decision(mode, 0.5))

    def named(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def until(self, kind: type[Event]) -> Event:
        """Scan as the session does, until there is such an event."""
        end = time.monotonic() + PATIENCE_S
        while not self.named(kind):
            assert time.monotonic() < end, self.events
            time.sleep(max(0.0, min(self.watch.next_scan - time.monotonic(), 0.5)))
            self.watch.scan()
        return self.named(kind)[-1]


@pytest.fixture
def stepped(paused_qemu: Qemu) -> Iterator[InProcess]:
    made = InProcess(paused_qemu)
    try:
        yield made
    finally:
        made.close()


def test_stepping_takes_probes_away_and_puts_them_back(paused_qemu: Qemu, stepped: InProcess) -> None:
    seen = []
    for mode in (ALERT_ONLY, NONE, ALERT_ONLY, FULL):
        stepped.step(mode)
        seen.append(len(probed_sites(paused_qemu)))
    assert seen == [2, 0, 2, 3]
    assert [event.mode for event in stepped.named(Stepped)] == ["alert", "none", "alert", "full"]  # type: ignore[attr-defined]


def test_counts_of_what_was_probed(paused_qemu: Qemu, stepped: InProcess) -> None:
    """2 with all probes, 3 with two, 4 with none, 5 with all: the 4 were not seen, and that is said."""
    for mode, number in ((FULL, 2), (ALERT_ONLY, 3), (NONE, 4), (FULL, 5)):
        if mode != FULL or number == 5:
            stepped.step(mode)
        for _ in range(number):
            paused_qemu.request("d0", "write")
    stepped.watch.counts(final=True)
    (counts,) = stepped.named(Counts)
    assert isinstance(counts, Counts)
    requests = counts.requests
    assert (requests.submitted, requests.done, requests.completed) == (10, 10, 10)
    assert (requests.in_flight, counts.lost_records) == (0, 0)
    assert any("budget" in note for note in counts.notes)


@pytest.mark.parametrize("mode", [ALERT_ONLY, NONE])
def test_a_stuck_request_is_told_once_through_all_steps(paused_qemu: Qemu, stepped: InProcess, mode: str) -> None:
    """Lost with all probes, told; the budget takes some away and gives them back: not told again, but its end is."""
    lost = faults.lose(paused_qemu, "d0", "write")
    stepped.until(Alert)
    for each in (mode, FULL):
        stepped.step(each)
        for _ in range(3):
            time.sleep(0.1)
            stepped.watch.scan()
    (alert,) = stepped.named(Alert)
    assert stepped.named(Resolved) == []
    lost.free()
    resolved = stepped.until(Resolved)
    assert isinstance(alert, Alert)
    assert isinstance(resolved, Resolved)
    assert resolved.after_s >= alert.age_s + 0.6  # as old as it is, not as the last step


def test_those_under_way_when_all_probes_come_back() -> None:
    """Without the submit probe nothing is known of a request that is not finished: it is found in memory."""
    with storage() as slow, paused([slow.drive()]) as qemu:
        qemu.request("d0", "write")
        pool = faults.pool_of(qemu, "d0")
        watched = InProcess(qemu, slow_s=0.5)
        try:
            watched.step(ALERT_ONLY)
            with slow.held():
                handle = qemu.submit("d0", "write")
                qemu.wait_until(lambda: list(faults.requests_of(qemu, pool).values()) == [1])
                watched.step(FULL)
                alert = watched.until(Alert)
                assert isinstance(alert, Alert)
                assert alert.cause == "worker-stuck"
            watched.until(Resolved)
            qemu.finish("d0", handle)
            watched.watch.counts(final=True)
        finally:
            watched.close()
    (counts,) = watched.named(Counts)
    assert isinstance(counts, Counts)
    assert (counts.requests.submitted, counts.requests.completed, counts.requests.in_flight) == (0, 0, 0)


@pytest.mark.parametrize("mode", [ALERT_ONLY, NONE])
def test_lost_after_a_step(paused_qemu: Qemu, stepped: InProcess, mode: str) -> None:
    stepped.step(mode)
    lost = faults.lose(paused_qemu, "d0", "write")
    alert = stepped.until(Alert)
    assert isinstance(alert, Alert)
    assert (alert.cause, alert.request) == ("lost-wakeup", lost.request)
    lost.free()
    stepped.until(Resolved)


def test_probes_that_cannot_be_put_back(paused_qemu: Qemu, stepped: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so and goes on without them."""
    stepped.step(NONE)

    def refused(*_: object) -> int:
        raise OSError(errno.EPERM, "not any more")

    monkeypatch.setattr(kernel, "attach_multi", refused)
    monkeypatch.setattr(kernel, "attach_perf", refused)
    stepped.step(FULL)
    (failure,) = stepped.named(Failure)
    assert isinstance(failure, Failure)
    assert "not any more" in failure.message
    assert probed_sites(paused_qemu) == []
    lost = faults.lose(paused_qemu, "d0", "write")
    alert = stepped.until(Alert)
    assert isinstance(alert, Alert)
    assert alert.cause == "lost-wakeup"
    lost.free()


@pytest.fixture
def busy_disk(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does requests as quickly as it can."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    command = ["qemu-img", "bench", "-f", "raw", "-i", "threads", "-d", "8", "-c", "100000000", str(image)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("budget", ["0.1%", "none"])
def test_a_budget_that_is_exceeded(busy_disk: subprocess.Popen[bytes], budget: str) -> None:
    """It says so and uses fewer probes; without a budget nothing is said."""
    with traced(busy_disk.pid, "--budget", budget, "--deadline", "500ms") as trace:
        if budget == "none":
            time.sleep(8.0)
        else:
            event = trace.expect("budget")
            assert (event["from"], event["to"], event["budget_percent"]) == ("full", "none", 0.1)
            assert event["cost_percent"] > 0.1
        trace.finish()
    assert len(trace.named("budget")) == (0 if budget == "none" else 1)
