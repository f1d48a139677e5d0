"""The QEMUs of other Debian releases, live: why a request is late, live and in a core, and how it is freed.

The host's own QEMU has all of this in tests/qemu. AIO_TRACE_REPEAT and AIO_TRACE_NUDGE_ROUNDS set how often
each fault comes and is freed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.conftest import require
from tests.matrix.roots import Release
from tests.qemu.causing import DEADLINES, DONE_FAULTS, QUEUE_FAULTS, Fault, Said, queued_causes, repeat
from tests.qemu.cores import HANGS, core_agrees
from tests.qemu.nudging import by_force, by_monitor, free_a_guest
from tests.qemu.resetting import free_resetting_guests
from tests.qemu.secrets import MIB, VIDEO_MIB, filled, nothing_is_saved
from tests.qemu.tracing import traced
from tracer.errors import LabError
from tracer.lab import causes, faults
from tracer.lab.causes import Scene
from tracer.lab.qemu import SYSTEM, Qemu, paused

LOOPS = ("main loop", "iothread")
REPEAT = int(os.environ.get("AIO_TRACE_REPEAT", "1"))
ROUNDS = int(os.environ.get("AIO_TRACE_NUDGE_ROUNDS", "2"))
FAULTS: tuple[tuple[Fault, str], ...] = (
    *DONE_FAULTS,
    (causes.stuck_worker, "worker-stuck"),
    *QUEUE_FAULTS,
    (causes.nested_wait, "nested-wait"),
)

pytestmark = pytest.mark.timeout(1500 + 60 * ROUNDS)


# Why


@pytest.fixture(scope="module", params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    """Who serves the disk."""
    return str(request.param)


@pytest.fixture(scope="module")
def on(loop: str, root: Path) -> Iterator[Scene]:
    """A QEMU of that release."""
    with causes.scene(iothread=loop == "iothread", chroot=root) as scene:
        yield scene


def _cannot_be_made(release: Release, loop: str) -> dict[Fault, str]:
    """Faults that this QEMU is not capable of, and how the lab finds out: its loops wait in io_uring."""
    if release.qemu != "11.":
        return {}
    if loop == "iothread":
        return {causes.unpolled_kick: "io_uring_enter, not in poll"}
    return {causes.unpolled_kick: "does not poll its eventfd", causes.nested_wait: "did not wait"}


@pytest.mark.parametrize(("fault", "cause"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_cause(on: Scene, release: Release, loop: str, fault: Fault, cause: str) -> None:
    if why := _cannot_be_made(release, loop).get(fault):
        with pytest.raises(LabError, match=why), fault(on, "write"):
            pass
        return
    with traced(on.qemu.pid, *DEADLINES) as trace:
        said = Said(trace)
        repeat(on, said, fault, times=REPEAT, cause=cause if fault in dict(QUEUE_FAULTS) else None)
        said.wait("resolved", {int(alert["request"], 16) for alert in said.named("alert")})
        assert trace.finish() == 3
    queued = queued_causes(said, cause)
    assert queued | said.causes("THREAD_DONE") | (set() if queued else said.causes("THREAD_ACTIVE")) == {cause}
    assert trace.summary["requests"]["in_flight"] == 0


@pytest.mark.parametrize("hang", HANGS)
def test_a_core_tells_what_the_process_told(root: Path, hang: str) -> None:
    require(shutil.which("gcore"), "gdb is not installed")
    core_agrees(hang, root, root / "usr/bin" / SYSTEM)


# Freed


def test_a_lost_completion_is_freed(root: Path, release: Release, loop: str) -> None:
    with paused(iothread=loop == "iothread", chroot=root) as qemu:
        pool = faults.pool_of(qemu, "d0")
        for way in (by_monitor, by_force):
            for _ in range(ROUNDS):
                lost = faults.lose(qemu, "d0", "write", pool)
                before = qemu.trace_counts()
                done = way(qemu)
                if way is by_monitor and not _monitor_reaches(release, loop):
                    assert done.status == 1, done.errors
                    assert lost.still_lost()
                    lost.free()
                    break
                assert done.status == 0, done.errors
                (event,) = done.nudges
                assert (event["request"], event["freed"]) == (hex(lost.request), True)
                _all_complete(qemu, before.submitted + (way is by_monitor))


def _monitor_reaches(release: Release, loop: str) -> bool:
    """Whether a monitor command can put a read into the pool; from 10.0 on the main loop runs it in its own."""
    return loop == "main loop" or release.qemu in ("5.2.", "7.2.")


def _all_complete(qemu: Qemu, submitted: int) -> None:
    qemu.wait_until(lambda: qemu.trace_counts().completed == submitted, what="every request to be called back")
    assert qemu.trace_counts().submitted == submitted


def test_a_guest_goes_on_and_loses_nothing(root: Path, release: Release, loop: str) -> None:
    image_format = "raw" if loop == "iothread" else "qcow2"
    ways = (by_monitor, by_force) if _monitor_reaches(release, loop) else (by_force,)
    with TemporaryDirectory(dir=root / "tmp", prefix="aio-trace-") as folder:
        iothread = "io0" if loop == "iothread" else None
        free_a_guest(Path(folder), image_format, iothread, ways, ROUNDS, root)


def test_a_guest_that_resets_its_disk_is_freed(root: Path) -> None:
    with TemporaryDirectory(dir=root / "tmp", prefix="aio-trace-") as folder:
        free_resetting_guests(Path(folder), ROUNDS, root)


def test_guest_memory_is_not_saved(root: Path, tmp_path: Path) -> None:
    """Also of a small guest; and what is saved tells the same."""
    with filled(64, root) as qemu:
        nothing_is_saved(qemu, tmp_path / "core", (64 - 3 + VIDEO_MIB) * MIB, root / "usr/bin" / SYSTEM)
