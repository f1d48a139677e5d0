"""The lab: what it counts, what it breaks and mends, what it refuses, what it leaves behind."""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType

import pytest

from tracer.errors import LabError
from tracer.lab import causes, faults
from tracer.lab.guest import MODULES, OPERATIONS, Guest, Workload, _packaged, cache_folder, guest, host_kernel
from tracer.lab.kicks import lose_kick
from tracer.lab.nbd import KINDS
from tracer.lab.process import MARKER, TOKEN, continue_process, end, is_own, peek, poke, stop_process, wait_until
from tracer.lab.qemu import Drive, Qemu, TraceCounts, paused
from tracer.lab.storage import storage
from tracer.layout import RequestState
from tracer.target import open_target

REPOSITORY = Path(__file__).parents[2]
REQUEST_KINDS = sorted(set(KINDS) - {"unknown"})
#: How often a guest's requests are lost and freed; the long form is asked for by the environment.
LOSSES = int(os.environ.get("AIO_TRACE_REPEAT", "1"))

# Counts, by QEMU's own trace


def test_23_writes_are_23_requests(any_loop_qemu: Qemu) -> None:
    for block in range(23):
        any_loop_qemu.request("d0", "write", block * 4096)
    assert any_loop_qemu.trace_counts() == TraceCounts(submitted=23, completed=23)


def test_the_monitor_can_write_too(paused_qemu: Qemu) -> None:
    for block in range(23):
        paused_qemu.io("d0", f"aio_write {block * 65536} 64k")
    paused_qemu.wait_until(lambda: paused_qemu.trace_counts().completed == 23)
    assert paused_qemu.trace_counts().submitted == 23


def test_a_drive_and_its_iothread_have_a_pool_of_their_own(iothread_qemu: Qemu) -> None:
    in_iothread = faults.pool_of(iothread_qemu, "d0")
    in_main_loop = faults.pool_of(iothread_qemu, "d1")
    assert in_iothread.pool != in_main_loop.pool
    assert iothread_qemu.iothread_ids().keys() == {"io0"}


def test_the_storage_daemon_does_every_kind_of_request(daemon: Qemu) -> None:
    for drive in daemon.drives:
        daemon.request(drive, "write")
        for kind in ("flush", "read", "discard"):
            daemon.request(drive, kind)
    assert daemon.trace_counts() == TraceCounts(submitted=8, completed=8)


# A lost completion


@pytest.mark.parametrize("kind", REQUEST_KINDS)
def test_a_lost_completion_stays_lost_until_freed(any_loop_qemu: Qemu, kind: str) -> None:
    lost = faults.lose(any_loop_qemu, "d0", kind)
    before = any_loop_qemu.trace_counts()
    assert before.submitted == before.completed + 1
    assert faults.requests_of(any_loop_qemu, lost.pool) == {lost.request: RequestState.THREAD_DONE}
    for _ in range(20):  # waking the loop does not help: that tells this bug from a lost kick
        any_loop_qemu.kick("d0")
    assert lost.still_lost()
    assert any_loop_qemu.trace_counts() == before
    lost.free()
    any_loop_qemu.wait_until(lambda: not faults.requests_of(any_loop_qemu, lost.pool))
    expected = before.submitted + 1
    any_loop_qemu.wait_until(lambda: any_loop_qemu.trace_counts() == TraceCounts(expected, expected))


@pytest.mark.parametrize("drive", ["d0", "d1"])
def test_a_storage_daemon_loses_and_is_freed(daemon: Qemu, drive: str) -> None:
    lost = faults.lose(daemon, drive, "write")
    daemon.kick(drive)
    assert lost.still_lost()
    lost.free()
    assert not lost.still_lost()


def test_losing_and_freeing_again_and_again(paused_qemu: Qemu) -> None:
    pool = faults.pool_of(paused_qemu, "d0")
    for _ in range(25):
        faults.lose(paused_qemu, "d0", "write", pool).free()
    paused_qemu.wait_until(lambda: not faults.requests_of(paused_qemu, pool))


# The guest


def test_the_guest_stands_still_when_its_completion_is_lost(live_guest: Guest) -> None:
    live_guest.wait_progress(5)
    began = time.monotonic()
    live_guest.wait_progress(10)
    ten_rounds = time.monotonic() - began
    lost = faults.lose_guest_io(live_guest)
    stands_at = live_guest.progress()
    with pytest.raises(LabError, match="waited"):
        live_guest.wait_progress(1, timeout=3 * ten_rounds)
    assert lost.still_lost()
    assert live_guest.progress() == stands_at
    lost.free()
    live_guest.wait_progress(5)


def test_a_guest_that_is_only_slow_is_waited_for(live_guest: Guest) -> None:
    live_guest.wait_progress(1)
    began = time.monotonic()
    live_guest.wait_progress(10)
    ten_rounds = time.monotonic() - began
    # All together take four times as long, none of them does.
    live_guest.wait_progress(40, timeout=ten_rounds)


@pytest.mark.usefixtures("guest_files")
@pytest.mark.parametrize(("image_format", "iothread"), [("qcow2", None), ("raw", "io0")])
def test_no_data_is_lost_with_the_completion(image_format: str, iothread: str | None) -> None:
    workload = Workload(mix=OPERATIONS, pause=0)
    with guest(workload, Drive(format=image_format, iothread=iothread)) as machine:
        for _ in range(LOSSES):
            faults.lose_guest_io(machine).free()
            machine.wait_progress(5)
        assert machine.failures() == []


# A main loop that does not come round, storage that does not answer


def test_a_request_is_done_while_the_main_loop_is_stuck(paused_qemu: Qemu) -> None:
    pool = faults.pool_of(paused_qemu, "d0")
    target = open_target(paused_qemu.pid)
    with faults.stalled_completion(paused_qemu, "d0", pool) as done:
        for _ in range(20):
            assert faults.main_system_call(target) == "openat"
            assert set(faults.requests_of(paused_qemu, pool).values()) == {RequestState.THREAD_DONE}
        assert set(done) == set(faults.requests_of(paused_qemu, pool))
    paused_qemu.wait_until(lambda: not faults.requests_of(paused_qemu, pool))
    paused_qemu.qmp("query-status")


def test_a_busy_main_loop_answers_afterwards(paused_qemu: Qemu) -> None:
    target = open_target(paused_qemu.pid)
    with faults.busy_main_loop(paused_qemu, seconds=1):
        paused_qemu.wait_until(lambda: faults.main_system_call(target) is None)
    paused_qemu.qmp("query-status")


@pytest.fixture
def on_slow_storage() -> Iterator[tuple[Qemu, faults.PoolHandle]]:
    """A QEMU whose d0 is on a storage that is held during the test."""
    with storage() as slow, paused([slow.drive()]) as qemu:
        pool = faults.pool_of(qemu, "d0")
        with slow.held():
            yield qemu, pool
        qemu.wait_until(lambda: not faults.requests_of(qemu, pool))


def test_a_worker_waits_for_held_storage(on_slow_storage: tuple[Qemu, faults.PoolHandle]) -> None:
    qemu, pool = on_slow_storage
    qemu.submit("d0", "write")
    target = open_target(qemu.pid)
    qemu.wait_until(lambda: any(thread.syscall and thread.syscall.name == "pwrite64" for thread in target.threads()))
    assert list(faults.requests_of(qemu, pool).values()) == [RequestState.THREAD_ACTIVE]


def test_held_storage_fills_the_pool(on_slow_storage: tuple[Qemu, faults.PoolHandle]) -> None:
    qemu, pool = on_slow_storage
    for block in range(70):
        qemu.io("d0", f"aio_write {block * 4096} 4k")
    full = {RequestState.THREAD_ACTIVE: 64, RequestState.THREAD_QUEUED: 6}
    qemu.wait_until(lambda: Counter(faults.requests_of(qemu, pool).values()) == full)


@pytest.mark.parametrize("iothread", [None, "io0"])
@pytest.mark.parametrize("unpolled", [False, True])
def test_a_loop_sleeps_through_its_kick(iothread: str | None, unpolled: bool) -> None:
    with storage() as slow, paused([slow.drive(iothread=iothread)]) as qemu:
        pool = faults.pool_of(qemu, "d0")
        scheduled = pool.layout.bottom_half.scheduled_mask
        lost = lose_kick(qemu, slow, pool, unpolled=unpolled)
        for _ in range(20):
            assert faults.requests_of(qemu, pool) == {lost.request: RequestState.THREAD_DONE}
            assert faults.bottom_half_flags(qemu, pool) & scheduled
        qemu.kick("d0")
        qemu.wait_until(lambda: not faults.requests_of(qemu, pool))


# What it refuses


@pytest.fixture
def foreign() -> Iterator[int]:
    """A process of somebody else, asleep."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            wait_until(lambda: states_of(process.pid) == {"S"}, what="sleep to sleep")
            yield process.pid
        finally:
            process.kill()


def states_of(pid: int) -> set[str]:
    return {thread.state for thread in open_target(pid).threads()}


def test_a_foreign_process_is_refused(foreign: int) -> None:
    for act in (
        lambda: stop_process(foreign),
        lambda: continue_process(foreign),
        lambda: peek(foreign, 0, 1),
        lambda: poke(foreign, 0, b"\0"),
    ):
        with pytest.raises(LabError, match="not started by this lab"):
            act()
    assert states_of(foreign) == {"S"}


def test_the_token_alone_does_not_make_a_process_ours() -> None:
    shell = "sleep 600 & echo $!; wait"
    environment = {**os.environ, MARKER: TOKEN}
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        try:
            assert not is_own(grandchild)
        finally:
            os.kill(grandchild, signal.SIGKILL)


def test_its_own_process_is_not_refused(paused_qemu: Qemu) -> None:
    assert is_own(paused_qemu.pid)
    with faults.stopped(paused_qemu):
        assert states_of(paused_qemu.pid) == {"T"}


@pytest.mark.parametrize("address", [0, 1 << 63, (1 << 64) - 8])
def test_no_address_is_no_surprise(paused_qemu: Qemu, address: int) -> None:
    """What was taken for a pointer may be anything."""
    with pytest.raises(LabError, match="cannot read 8 bytes"):
        peek(paused_qemu.pid, address, 8)


@pytest.mark.parametrize("fault", [causes.sleeping_workers, causes.missed_spawn])
def test_nobody_takes_a_request_whatever_workers_there_are(fault: Callable[..., AbstractContextManager[int]]) -> None:
    """One worker is idle, or several are: as many as earlier requests have left."""
    with causes.scene(iothread=True) as on:
        for workers in (1, 2, 3):
            with on.slow.held():
                for index in range(workers):
                    on.submit(index)
                    on.wait_states(active=index + 1)
            on.wait_empty()
            with fault(on, "write") as request:
                assert on.requests(RequestState.THREAD_QUEUED) == (request,)


# What it leaves behind


LAB = textwrap.dedent("""\
    import time
    from tracer.lab.qemu import paused
    with paused() as qemu:
        print(qemu.pid, qemu.folder, flush=True)
        time.sleep(600)
""")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_lab_leaves_no_qemu(number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", LAB]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as lab:
        assert lab.stdout is not None
        pid, folder = lab.stdout.readline().split()
        assert Path(folder).is_relative_to(tmp_path)
        qemu = open_target(int(pid))
        lab.send_signal(number)
    wait_until(lambda: not qemu.alive, what="QEMU to end")
    assert number == signal.SIGKILL or not Path(folder).exists()


class Raised(BaseException):
    """What a signal handler raises."""


def raising_at(number: int) -> Callable[[FrameType, str, object], object]:
    """A trace function that raises at that line of the lab's own code and of json's."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        if not {"lab", "json"} & set(Path(frame.f_code.co_filename).parts):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Raised
        return trace

    return trace


def test_an_interruption_anywhere_in_a_command_harms_nothing(paused_qemu: Qemu) -> None:
    """The next command is answered by its own answer, and the end waits for nothing."""
    before = sys.gettrace()
    for number in range(1000):
        sys.settrace(raising_at(number))
        try:
            paused_qemu.qmp("query-block")
            break
        except Raised:
            pass
        finally:
            sys.settrace(before)
        assert paused_qemu.qmp("query-status")["status"] == "prelaunch"
    assert 20 < number < 999
    paused_qemu.close()
    assert not paused_qemu.folder.exists()


def test_a_process_is_ended_whatever_popen_believes() -> None:
    """A signal handler that raises at the wrong moment leaves Popen's lock taken; wait() would wait for ever."""
    child = subprocess.Popen(["sleep", "600"])
    child._waitpid_lock.acquire()  # type: ignore[attr-defined]
    end(child)
    assert child.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_qemu_that_does_not_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(LabError, match="no-such-option"):
        paused(extra=["-no-such-option"])
    assert list(tmp_path.iterdir()) == []


def test_the_hosts_own_kernel_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be downloaded, and modules are packed as many distributions have them."""
    kernel, busybox = _packaged(cache_folder())
    modules = tmp_path / "lib/modules" / kernel.modules.name
    for name in MODULES:
        for path in kernel.modules.glob("kernel/drivers/virtio/*.ko*"), kernel.modules.glob(f"kernel/**/{name}.ko*"):
            for module in path:
                place = modules / module.relative_to(kernel.modules).with_suffix(".ko.xz")
                place.parent.mkdir(parents=True, exist_ok=True)
                data = module.read_bytes()
                place.write_bytes(data if module.suffix == ".xz" else lzma.compress(data, preset=0))
    for source, name in ((kernel.image, f"boot/vmlinuz-{kernel.modules.name}"), (busybox, "bin/busybox")):
        (tmp_path / name).parent.mkdir()
        shutil.copy(source, tmp_path / name)

    def offline(*_: object) -> None:
        raise LabError("no network")

    monkeypatch.setattr("tracer.lab.guest._packaged", offline)
    monkeypatch.setattr("tracer.lab.guest.host_kernel", lambda: host_kernel(tmp_path))
    monkeypatch.setenv("AIO_TRACE_LAB_CACHE", str(tmp_path / "cache"))
    with guest(Workload(pause=0.02)) as machine:
        machine.wait_progress(5)


@pytest.mark.parametrize("lacking", ["boot/vmlinuz-1.2.3", "lib/modules/1.2.3/kernel", "bin/busybox", "nothing", "zst"])
def test_what_a_host_may_lack(tmp_path: Path, lacking: str) -> None:
    """A kernel, its modules in a form that can be read, a busybox that needs no loader."""
    static = next(place for place in _packaged(cache_folder())[1:])
    for name, source in (("boot/vmlinuz-1.2.3", Path(sys.executable)), ("bin/busybox", static)):
        (tmp_path / name).parent.mkdir()
        shutil.copy(source, tmp_path / name)
    (tmp_path / "lib/modules/1.2.3/kernel").mkdir(parents=True)
    for name in MODULES:
        (tmp_path / f"lib/modules/1.2.3/kernel/{name}.ko{'.zst' if lacking == 'zst' else ''}").write_bytes(b"")
    assert (host_kernel(tmp_path) is None) == (lacking == "zst")
    place = tmp_path / lacking
    if place.is_dir():
        shutil.rmtree(place)
    elif place.exists():
        place.unlink()
    assert (host_kernel(tmp_path) is None) == (lacking != "nothing")
    shutil.copy(sys.executable, tmp_path / "bin/busybox")
    assert host_kernel(tmp_path) is None, "that one is not static"
