"""What `inspect` says where a QEMU stands still and no late request of a pool shows it, or hardly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tests.qemu.test_inspect import inspect, requests_of
from tracer.lab import causes, faults
from tracer.lab.process import continue_process, stop_process, wait_until
from tracer.lab.qemu import Qemu, paused, storage_daemon
from tracer.target import open_target

#: How often a lost completion is looked at on a busy host; the long form is asked for by the environment.
BUSY_LOOKS = int(os.environ.get("AIO_TRACE_BUSY_INSPECTS", "4"))
PROCESSORS = os.cpu_count() or 1
CGROUPS = Path("/sys/fs/cgroup")


# A busy host


@contextmanager
def busy_processors(each: int = 3) -> Iterator[None]:
    """Programs that take all the processor time that they get."""
    with ExitStack() as stack:
        for _ in range(each * PROCESSORS):
            hog = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(hog.kill)
        yield


@contextmanager
def woken_all_the_time(qemu: Qemu, drive: str = "d0") -> Iterator[None]:
    """The drive's loop is made to come round again as soon as it has, hundreds of times a second."""
    over = threading.Event()

    def wake() -> None:
        while not over.is_set():
            qemu.kick(drive)

    waking = threading.Thread(target=wake)
    waking.start()
    try:
        yield
    finally:
        over.set()
        waking.join()


@pytest.mark.timeout(120 + 30 * BUSY_LOOKS)
def test_a_busy_host_never_makes_a_lost_completion_healthy(paused_qemu: Qemu) -> None:
    """The home thread is awake at most looks: then there are more, and if they do not tell, that is said."""
    lost = faults.lose(paused_qemu, "d0", "write")
    verdicts: Counter[str] = Counter()
    with busy_processors(), woken_all_the_time(paused_qemu):
        for _ in range(BUSY_LOOKS):
            found, status = inspect(paused_qemu.pid)
            verdicts[found["verdict"]] += 1
            assert status == 3, found["explanation"]
            (request,) = requests_of(found)
            assert request["cause"] == found["verdict"]
    print(f"{BUSY_LOOKS} looks: {dict(verdicts)}")
    assert set(verdicts) <= {"lost-wakeup", "unknown"}
    assert verdicts["lost-wakeup"]
    lost.free()


# A process, or a loop, that stands still without a request


def test_a_stopped_process_without_a_request(paused_qemu: Qemu) -> None:
    with faults.stopped(paused_qemu):
        found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("stopped", 3)
    assert "stopped by a signal or a debugger" in found["explanation"]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process is alone in a cgroup, which is frozen: by the freezer of cgroup v1, or as v2 does it."""
    first = CGROUPS / "freezer"
    root, knob, words = (first, "freezer.state", ("FROZEN", "THAWED"))
    if not first.is_dir():
        root, knob, words = (CGROUPS, "cgroup.freeze", ("1", "0"))
    group = root / f"aio-trace-test-{pid}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
        (group / knob).write_text(words[0])
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        require(False, f"no cgroup can be frozen here: {error}")
    try:
        yield
    finally:
        (group / knob).write_text(words[1])
        (root / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def test_a_frozen_process_without_a_request(paused_qemu: Qemu) -> None:
    with frozen(paused_qemu.pid):
        wait_until(lambda: open_target(paused_qemu.pid).frozen, what="the process to be frozen")
        found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("stopped", 3)
    assert "frozen with its cgroup" in found["explanation"]


def test_a_loop_that_is_stuck_without_a_request(paused_qemu: Qemu) -> None:
    """The main thread opens a file that does not answer."""
    paused_qemu.request("d0", "write")
    with faults.stalled_main_loop(paused_qemu):
        found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("loop-blocked", 3)
    assert requests_of(found) == []
    assert "openat of" in found["explanation"]
    found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("healthy", 0)


# Requests that are not in the pool


def waiting_in(found: dict[str, object]) -> list[str]:
    coroutines = found["coroutines"]
    assert isinstance(coroutines, list)
    return [coroutine["waits_in"] for coroutine in coroutines]


def test_a_throttled_disk(paused_qemu: Qemu) -> None:
    """Five writes, of which one a second may begin: four wait, and none is in the pool."""
    paused_qemu.hmp("block_set_io_throttle d0 0 0 0 1 0 0")
    for number in range(30):
        paused_qemu.io("d0", f"aio_write {number * 4096} 4k")
    found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("elsewhere", 0)
    assert "throttle_group_co_io_limits_intercept" in waiting_in(found)
    assert "throttle_group_co_io_limits_intercept" in found["explanation"]
    paused_qemu.hmp("block_set_io_throttle d0 0 0 0 0 0 0")
    paused_qemu.wait_until(lambda: inspect(paused_qemu.pid)[0]["verdict"] == "healthy", what="it to be healthy")


def test_a_server_that_does_not_answer() -> None:
    """The disk is on an NBD server, which stops."""
    with storage_daemon() as server:
        where = f"file.server.type=unix,file.server.path={server.inside('nbd')}"
        far = f"if=none,id=far,format=raw,file.driver=nbd,file.export=d0,{where}"
        with paused(extra=["-drive", far]) as qemu:
            stop_process(server.pid)
            try:
                qemu.io("far", "aio_write 0 4k")
                found, status = inspect(qemu.pid)
            finally:
                continue_process(server.pid)
    assert (found["verdict"], status) == ("elsewhere", 0)
    assert waiting_in(found), found["explanation"]


def test_a_disk_of_linux_aio_that_is_plugged_in_later(paused_qemu: Qemu, tmp_path: Path) -> None:
    """What bypasses the pool shows in the process; the command line does not know of it."""
    image = tmp_path / "later.img"
    image.write_bytes(bytes(1 << 20))
    assert inspect(paused_qemu.pid)[0]["verdict"] == "healthy"
    options = {"driver": "file", "node_name": "later", "filename": str(image), "aio": "native"}
    paused_qemu.qmp("blockdev-add", **options, cache={"direct": True})
    found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("elsewhere", 0)
    assert "aio=native" in found["explanation"]


# The guest


def test_a_guest_that_is_paused_is_said_to_be(paused_qemu: Qemu) -> None:
    states = []
    for command in (None, "cont", "stop"):
        if command:
            paused_qemu.qmp(command)
        found, status = inspect(paused_qemu.pid)
        assert (found["verdict"], status) == ("healthy", 0)
        states.append(found["run_state"])
        assert ("does not run" in found["explanation"]) is (found["run_state"] != "running")
    assert states == ["prelaunch", "running", "paused"]


# The storage holds every worker


@pytest.mark.parametrize("loop", ["main loop", "iothread"])
def test_a_request_behind_what_the_storage_holds(loop: str) -> None:
    """QEMU starts no worker for it while an idle one wakes: neither a bug, nor is the storage fine."""
    with causes.scene(iothread=loop == "iothread") as on, causes.missed_spawn(on) as queued:
        found, status = inspect(on.qemu.pid)
    assert (found["verdict"], status) == ("worker-stuck", 3)
    said = {int(request["request"], 16): request for request in requests_of(found)}
    assert {request["cause"] for request in said.values()} == {"worker-stuck"}
    assert said[queued]["state"] == "THREAD_QUEUED"
    assert "The storage" in said[queued]["explanation"]
    assert "bug" not in said[queued]["explanation"]
