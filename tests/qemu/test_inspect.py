"""`inspect` on real QEMUs: what it names, what it shows, and that it accuses nobody under load."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from tracer.build import Build, read_build
from tracer.errors import FaultError, TargetError
from tracer.events import Diagnosis
from tracer.inspect import PATIENCE_S, diagnose
from tracer.lab import faults
from tracer.lab.nbd import KINDS
from tracer.lab.process import wait_until
from tracer.lab.qemu import Drive, Qemu, paused
from tracer.lab.storage import storage
from tracer.live import LiveView
from tracer.memory import MemoryReader
from tracer.target import open_target
from tracer.view import ProcessView

REPOSITORY = Path(__file__).parents[2]
Json = dict[str, Any]

REQUEST_FIELDS = {
    *("request", "pool", "context", "kind", "file", "offset", "bytes", "state", "ret", "age_s", "deadline_s"),
    *("overdue_s", "cause", "explanation", "evidence", "seen_from"),
    *("func", "callback", "opaque", "coroutine", "coroutine_entry"),
}
#: How often `inspect` looks at a QEMU under full load; the long form is asked for by the environment.
UNDER_LOAD = int(os.environ.get("AIO_TRACE_INSPECT_LOAD", "80"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "cli.py"), "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def inspect(pid: int, *options: str) -> tuple[Json, int]:
    """What `inspect --json` prints, and its exit status."""
    done = run("--pid", str(pid), "--json", *options)
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line), done.returncode


def requests_of(found: Json) -> list[Json]:
    return [request for pool in found["pools"] for request in pool["requests"]]


def test_a_process_that_ends_meanwhile(paused_qemu: Qemu) -> None:
    """What was seen until then is no verdict: that nothing is overdue any more, above all."""
    faults.lose(paused_qemu, "d0", "write")
    pid = paused_qemu.pid
    command = [sys.executable, str(REPOSITORY / "cli.py"), "inspect", "--pid", str(pid), "--deadline", "20s", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as inspecting:
        wait_until(lambda: f"/proc/{pid}/mem" in open_files(inspecting.pid), what="it to look")
        os.kill(pid, signal.SIGKILL)
        output, errors = inspecting.communicate(timeout=60)
    assert inspecting.returncode == 1, errors
    (error,) = (json.loads(line) for line in output.splitlines())
    assert (error["event"], error["message"]) == ("error", f"process {pid} has ended")


def open_files(pid: int) -> list[str]:
    with suppress(OSError):
        return [os.readlink(file.path) for file in os.scandir(f"/proc/{pid}/fd")]
    return []


def test_a_full_disk_takes_nothing_from_the_diagnosis(paused_qemu: Qemu, tmp_path: Path) -> None:
    faults.lose(paused_qemu, "d0", "write")
    command = [sys.executable, str(REPOSITORY / "cli.py"), "inspect", "--pid", str(paused_qemu.pid), "--json"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 1000; exec "$@"', "sh", *command, "--save", str(tmp_path / "core")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    found, error = (json.loads(line) for line in done.stdout.splitlines())
    assert (found["verdict"], error["event"]) == ("lost-wakeup", "error")
    assert "cannot be written" in error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"unknown"}))
def test_a_lost_completion(any_loop_qemu: Qemu, kind: str) -> None:
    """One element, THREAD_DONE, its file and coroutine: the vendor's first picture."""
    lost = faults.lose(any_loop_qemu, "d0", kind)
    found, status = inspect(any_loop_qemu.pid)
    assert (found["verdict"], status) == ("lost-wakeup", 3)
    assert found["took_s"] < 10
    (request,) = requests_of(found)
    assert request.keys() >= REQUEST_FIELDS
    assert (int(request["request"], 16), request["state"], request["ret"]) == (lost.request, "THREAD_DONE", 0)
    assert (request["kind"], request["file"]) == (kind, str(any_loop_qemu.folder / "d0.img"))
    assert request["cause"] == "lost-wakeup"
    assert request["node"] in nodes_of(any_loop_qemu)
    assert request["all"]["le_next"] == "0x0"
    assert request["coroutine"] is not None
    stack = request["coroutine_stack"]
    assert any(frame.startswith(("bdrv_co_", "blk_co_")) for frame in stack), stack
    assert stack[-1].startswith("coroutine_trampoline")
    (pool,) = (pool for pool in found["pools"] if pool["requests"])
    assert pool["bottom_half"]["scheduled"] is False
    assert pool["main_loop"] is (any_loop_qemu.drives["d0"].iothread is None)
    (home,) = (thread for thread in found["threads"] if thread["tid"] == pool["home_tid"])
    assert home["syscall"] in ("ppoll", "epoll_wait")
    assert any("ppoll" in frame or "epoll" in frame for frame in home["stack"]), home["stack"]
    lost.free()
    found, status = inspect(any_loop_qemu.pid)
    assert (found["verdict"], status, requests_of(found)) == ("healthy", 0, [])


def nodes_of(qemu: Qemu) -> set[str]:
    return {node["node-name"] for node in qemu.qmp("query-named-block-nodes")}


def test_a_drain_after_a_lost_flush() -> None:
    """The vendor's second picture: the monitor hangs in bdrv_drain_all, and inspect says so."""
    with paused() as qemu:
        faults.lose(qemu, "d0", "flush")
        with hanging_stop(qemu):
            found, status = inspect(qemu.pid)
    assert (found["verdict"], status) == ("lost-wakeup", 3)
    assert found["draining"].startswith("bdrv_drain_all")
    main = next(thread for thread in found["threads"] if thread["tid"] == found["pid"])
    names = [frame.split("+")[0] for frame in main["stack"]]
    assert names.index("aio_poll") < names.index("bdrv_drain_all_begin") < names.index("main_loop_wait")
    (request,) = requests_of(found)
    assert request["evidence"]["draining"] == found["draining"]
    assert found["draining"] in found["explanation"]


@contextmanager
def hanging_stop(qemu: Qemu) -> Iterator[None]:
    """QMP `cont` and `stop`, which does not return: the lab's QEMU is started with -S."""
    qemu.qmp("cont")
    target = open_target(qemu.pid)
    with faults._raw_monitor(qemu) as monitor:
        monitor.sendall(b'{"execute": "stop"}\n')
        qemu.wait_until(lambda: draining_now(target.pid), what="the monitor to hang")
        yield


def draining_now(pid: int) -> bool:
    with closing(LiveView(open_target(pid))) as view:
        return "bdrv_drain_all_begin" in view.stack(pid).functions()


def test_held_storage() -> None:
    """Storage that does not answer: the worker's system call, and a full pool behind it."""
    with storage() as slow, paused([slow.drive()]) as qemu:
        pool = faults.pool_of(qemu, "d0")
        with slow.held():
            qemu.submit("d0", "write")
            qemu.wait_until(lambda: list(faults.requests_of(qemu, pool).values()) == [1])
            found, status = inspect(qemu.pid)
            assert (found["verdict"], status) == ("worker-stuck", 3)
            (request,) = requests_of(found)
            assert request["evidence"]["worker"]["syscall"].startswith("pwrite64")
            for block in range(1, 70):
                qemu.io("d0", f"aio_write {block * 4096} 4k")
            qemu.wait_until(lambda: sorted(faults.requests_of(qemu, pool).values()) == [0] * 6 + [1] * 64)
            found, status = inspect(qemu.pid)
            assert (found["verdict"], status) == ("queue-full", 3)
            causes = sorted(request["cause"] for request in requests_of(found))
            assert causes == ["queue-full"] * 6 + ["worker-stuck"] * 64
        qemu.wait_until(lambda: not faults.requests_of(qemu, pool))


def test_a_stuck_loop(paused_qemu: Qemu) -> None:
    pool = faults.pool_of(paused_qemu, "d0")
    with faults.stalled_completion(paused_qemu, "d0", pool):
        found, status = inspect(paused_qemu.pid)
    assert (found["verdict"], status) == ("loop-blocked", 3)
    assert "openat of" in found["explanation"]


def test_a_stopped_process(paused_qemu: Qemu) -> None:
    faults.lose(paused_qemu, "d0", "write")
    with faults.stopped(paused_qemu):
        found, _ = inspect(paused_qemu.pid)
    assert found["verdict"] == "stopped"


def test_disks_that_bypass_the_pool(tmp_path: Path) -> None:
    """aio=native: nothing overdue, and it says what it cannot see."""
    image = tmp_path / "native.img"
    image.write_bytes(bytes(1 << 20))
    option = f"driver=file,node-name=native,filename={image},aio=native,cache.direct=on"
    with paused(extra=["-blockdev", option]) as qemu:
        found, status = inspect(qemu.pid)
    assert (found["verdict"], status) == ("elsewhere", 0)
    assert f"{image} (aio=native)" in found["explanation"]


def test_the_text_shows_what_the_article_shows(paused_qemu: Qemu) -> None:
    lost = faults.lose(paused_qemu, "d0", "flush")
    done = run("--pid", str(paused_qemu.pid))
    assert done.returncode == 3
    for text in ("THREAD_DONE", "common.cb", "common.opaque", "func =", "arg =", "le_next", "Coroutine", "ret = 0"):
        assert text in done.stdout, done.stdout
    lost.free()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--pid", "1"], 1), (["--pid", "4194304"], 1), ([], 2), (["--pid", "1", "--core", "x"], 2)],
)
def test_bad_input(arguments: list[str], status: int) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


# Under load


class _Load:
    """Requests of all kinds, as many as there can be, from a thread of their own."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self._end = threading.Event()
        self.count = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        kinds = ("write", "read", "write", "flush", "read", "write")
        while not self._end.is_set():
            depth = (1, 3, 24)[self.count % 3]
            handles = [self._qemu.submit("d0", kinds[n % len(kinds)], n * 4096) for n in range(depth)]
            for handle in handles:
                self._qemu.finish("d0", handle)
            self.count += 1

    def __enter__(self) -> _Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def _diagnoses(pid: int, times: int) -> Iterator[Diagnosis]:
    target = open_target(pid)
    build: Build = read_build(target.image_path, target.exe)
    with closing(LiveView(target)) as view:
        for _ in range(times):
            yield diagnose(view, build)


@pytest.mark.timeout(120 + UNDER_LOAD)
@pytest.mark.parametrize("loop", ["main loop", "iothread"])
def test_nobody_is_accused_under_load(loop: str) -> None:
    with paused([Drive("d0", iothread="io0" if loop == "iothread" else None)]) as qemu:
        qemu.request("d0", "write")
        with _Load(qemu) as load:
            before = load.count
            verdicts: dict[str, int] = {}
            slowest = 0.0
            for found in _diagnoses(qemu.pid, UNDER_LOAD // 2):
                verdicts[found.verdict] = verdicts.get(found.verdict, 0) + 1
                slowest = max(slowest, found.took_s)
                for request in (r for pool in found.pools for r in pool.requests if r.overdue):
                    # A shared machine's disk, or CPU, may really take so long: the scheduler is the witness.
                    assert request.evidence
                    if request.cause == "worker-stuck":
                        assert request.evidence["worker"]["asleep_s"] > PATIENCE_S / 2, request.evidence
                    else:
                        assert request.cause == "loop-busy", request.explanation
                        assert request.evidence["home_starved"], request.evidence
            assert load.count > before
        print(f"{UNDER_LOAD // 2} diagnoses, {load.count} rounds of load, {verdicts}, slowest {slowest:.2f} s")


def test_a_lost_completion_beside_load() -> None:
    """Another disk's requests go on in another loop: exactly the lost one is accused."""
    with paused([Drive("d0"), Drive("d1", iothread="io0")]) as qemu:
        qemu.request("d1", "write")
        lost = faults.lose(qemu, "d1", "write")
        with _Load(qemu):
            time.sleep(0)
            for found in _diagnoses(qemu.pid, 10):
                accused = [r for pool in found.pools for r in pool.requests if r.overdue]
                assert [r.request for r in accused] == [lost.request]
                assert found.verdict == "lost-wakeup"
        lost.free()


# Broken evidence


class _Mutated:
    """A process's memory with some reads spoilt: by chance, the same way for the same seed."""

    def __init__(self, memory: MemoryReader, seed: int, share: float) -> None:
        self._memory = memory
        self._random = random.Random(seed)
        self._share = share
        self._before = b""

    def read(self, address: int, size: int) -> bytes:
        data = self._memory.read(address, size)
        if self._random.random() < self._share:
            data = self._spoilt(address, bytearray(data))
        self._before = data
        return data

    def _spoilt(self, address: int, data: bytearray) -> bytes:
        size = len(data)
        at = self._random.randrange(max(1, size - 7))
        how = self._random.randrange(6)
        if how == 0:
            raise FaultError(address, len(data))
        if how == 1:  # a wild pointer, or a count
            data[at : at + 8] = self._random.randbytes(8)
        elif how == 2:  # a list that is cut
            data[at : at + 8] = bytes(8)
        elif how == 3:  # a cycle
            data[at : at + 8] = struct.pack("<Q", address)
        elif how == 4:  # one bit
            data[at] ^= 1 << self._random.randrange(8)
        else:  # what stood elsewhere
            data[: len(self._before)] = self._before[: len(data)]
        return bytes(data[:size])


class _MutatedView:
    """A live process whose memory lies now and then; everything else is true."""

    def __init__(self, view: LiveView, seed: int, share: float) -> None:
        self._view = view
        self.memory = _Mutated(view.memory, seed, share)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


#: How many seeds; the long form is asked for by the environment.
MUTATIONS = int(os.environ.get("AIO_TRACE_MUTATIONS", "40"))


def _mutated(pid: int) -> Iterator[tuple[int, Diagnosis]]:
    target = open_target(pid)
    build = read_build(target.image_path, target.exe)
    with closing(LiveView(target)) as view:
        for seed in range(MUTATIONS):
            share = (0.002, 0.02, 0.1, 0.5)[seed % 4]
            with suppress(TargetError):  # "no main context": said, not guessed
                yield seed, diagnose(cast(ProcessView, _MutatedView(view, seed, share)), build, patience_s=0.02)


@pytest.mark.timeout(60 + MUTATIONS * 2)
def test_broken_evidence_accuses_nobody_else(any_loop_qemu: Qemu) -> None:
    """With a lost completion: that one, or not known; never another request, never another cause."""
    lost = faults.lose(any_loop_qemu, "d0", "write")
    found = 0
    for seed, diagnosis in _mutated(any_loop_qemu.pid):
        assert diagnosis.took_s < 10, seed
        accused = [r for pool in diagnosis.pools for r in pool.requests if r.overdue]
        assert {r.request for r in accused} <= {lost.request}, seed
        assert {r.cause for r in accused} <= {"lost-wakeup", "unknown"}, seed
        found += diagnosis.verdict == "lost-wakeup"
    assert found
    lost.free()


@pytest.mark.timeout(60 + MUTATIONS * 2)
def test_broken_evidence_makes_no_hang(any_loop_qemu: Qemu) -> None:
    """With requests that come and go: nobody is accused."""
    any_loop_qemu.request("d0", "write")
    with _Load(any_loop_qemu):
        for seed, diagnosis in _mutated(any_loop_qemu.pid):
            assert diagnosis.took_s < 10, seed
            accused = [r for pool in diagnosis.pools for r in pool.requests if r.overdue and r.cause != "unknown"]
            assert not accused, seed
