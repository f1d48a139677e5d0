"""Hangs in core files of real QEMUs: the same verdict as live, and none from broken evidence."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tests.qemu.cores import HANGS, Json, agree, core_agrees, inspect, main_functions, run
from tests.qemu.tracing import PATIENCE_S, ROOT, without_bcc
from tracer.build import Build, build_of
from tracer.core import CoreView
from tracer.errors import AioTraceError
from tracer.inspect import diagnose
from tracer.lab import faults
from tracer.lab.process import wait_until
from tracer.lab.qemu import Drive, paused
from tracer.lab.storage import storage
from tracer.live import LiveView
from tracer.save import save
from tracer.target import open_target

MIB = 1 << 20
DIRTY_MIB = 2048 if "AIO_TRACE_SOAK_S" in os.environ else 512
MUTATIONS = int(os.environ.get("AIO_TRACE_MUTATIONS", "40"))


@pytest.fixture(scope="session", autouse=True)
def debugger() -> None:
    require(shutil.which("gcore"), "gdb is not installed")


@pytest.mark.parametrize("hang", HANGS)
def test_a_core_tells_what_the_process_told(hang: str) -> None:
    live, found = core_agrees(hang)
    assert found["core"]
    assert (found["exe"], found["version"]) == (live["exe"], live["version"])
    if hang == "drain after a lost flush":
        names = [frame.split("+")[0] for frame in found["threads"][0]["stack"]]
        assert names.index("aio_poll") < names.index("bdrv_drain_all_begin") < names.index("main_loop_wait")


def eu_stack(pid: int) -> dict[int, list[tuple[int, str]]]:
    """(address, function) of each frame of each thread, as elfutils finds it in the stopped process."""
    text = subprocess.run(["eu-stack", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    found: dict[int, list[tuple[int, str]]] = {}
    tid = 0
    for line in text.splitlines():
        if head := re.match(r"TID (\d+):", line):
            tid = int(head[1])
            found[tid] = []
        elif frame := re.match(r"#\d+\s+(0x[0-9a-f]+)\s*(\S*)", line):
            found[tid].append((int(frame[1], 16), frame[2].partition("@")[0]))
    return found


@pytest.mark.parametrize("hang", ["lost write in an iothread", "drain after a lost flush"])
def test_stacks_are_those_of_elfutils(hang: str) -> None:
    """Without stopping anything, the same frames as a tool that stops."""
    require(shutil.which("eu-stack"), "elfutils is not installed")
    with HANGS[hang][1](None) as qemu:
        witness = eu_stack(qemu.pid)
        with closing(LiveView(open_target(qemu.pid))) as view:
            for thread in view.threads():
                if thread.name == "worker" or thread.tid not in witness:
                    continue  # it may come or go
                stack = view.stack(thread.tid)
                assert [frame.address for frame in stack.frames] == [address for address, _ in witness[thread.tid]]
                for frame, (_, name) in zip(stack.frames, witness[thread.tid]):
                    # elfutils knows static functions where separate debug files are installed.
                    assert frame.function is None or frame.function.strip("_") == name.strip("_"), (frame, name)
        assert {"main_loop_wait", "qemu_main_loop"} <= set(main_functions(qemu))


def test_seventy_stacks_take_a_fraction_of_a_second() -> None:
    with storage() as slow, paused([slow.drive()]) as qemu:
        pool = faults.pool_of(qemu, "d0")
        with slow.held():
            for block in range(64):
                qemu.io("d0", f"aio_write {block * 4096} 4k")
            qemu.wait_until(lambda: list(faults.requests_of(qemu, pool).values()) == [1] * 64)
            with closing(LiveView(open_target(qemu.pid))) as view:
                threads = view.threads()
                began, worked = time.monotonic(), time.process_time()
                stacks = [view.stack(thread.tid) for thread in threads]
                took, work = time.monotonic() - began, time.process_time() - worked
        qemu.wait_until(lambda: not faults.requests_of(qemu, pool))
    assert len(stacks) >= 66
    assert all(stack.complete for stack in stacks)
    print(f"{len(stacks)} stacks in {took * 1e3:.0f} ms, {work * 1e3:.0f} ms of them on the CPU")
    assert work < 0.3


def test_a_dump_of_the_guest_is_refused() -> None:
    with paused(extra=["-machine", "pc", "-m", "16", "-accel", "tcg,tb-size=32"]) as qemu:
        qemu.qmp("dump-guest-memory", paging=False, protocol=f"file:{qemu.inside('dump')}")
        done = run("--core", str(qemu.folder / "dump"))
    assert done.returncode == 1
    assert "holds the guest's memory (virsh dump --memory-only" in done.stderr
    assert "gcore" in done.stderr


# Saved by aio-trace itself


def test_what_is_saved_is_small_and_tells_the_same(tmp_path: Path) -> None:
    """A guest's dirty memory stays out; the hang is neither cured nor disturbed."""
    path = tmp_path / "saved"
    memory = ["-m", f"{DIRTY_MIB}M", "-object", f"memory-backend-ram,id=m0,size={DIRTY_MIB}M,prealloc=on"]
    with paused([Drive("d0", iothread="io0"), Drive("d1")], extra=memory) as qemu:
        lost = faults.lose(qemu, "d0", "flush")
        resident = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{qemu.pid}/status").read_text())
        assert resident
        assert int(resident[1]) > DIRTY_MIB * 1024
        done = run("--pid", str(qemu.pid), "--save", str(path), "--json")
        assert done.returncode == 3, done.stderr
        assert lost.still_lost()
        again = run("--pid", str(qemu.pid), "--save", str(path))
        assert (again.returncode, "is there already" in again.stderr) == (1, True)
    stopped = re.search(r"stood still for ([\d.]+) ms", done.stderr)
    assert stopped
    print(f"{path.stat().st_size / MIB:.1f} MiB, stopped for {stopped[1]} ms")
    assert path.stat().st_size < 64 * MIB
    live: Json = json.loads(done.stdout)
    assert json.loads(Path(f"{path}.json").read_text()) == live
    found = inspect("--core", str(path), prefix=without_bcc(tmp_path))
    agree(live | {"status": 3}, found)
    (request,) = (request for pool in found["pools"] for request in pool["requests"])
    assert (request["kind"], request["file"]) == ("flush", str(qemu.folder / "d0.img"))
    assert [t["name"] for t in found["threads"]] == [t["name"] for t in live["threads"]]


def test_held_storage_is_saved_without_waiting_for_it(tmp_path: Path) -> None:
    """Its workers cannot be stopped; gcore would wait until the storage answers."""
    path = tmp_path / "saved"
    with storage() as slow, paused([slow.drive()]) as qemu:
        pool = faults.pool_of(qemu, "d0")
        with slow.held():
            qemu.submit("d0", "write")
            qemu.wait_until(lambda: list(faults.requests_of(qemu, pool).values()) == [1])
            done = run("--pid", str(qemu.pid), "--save", str(path), "--json")
            assert done.returncode == 3, done.stderr
        qemu.wait_until(lambda: not faults.requests_of(qemu, pool))
    found = inspect("--core", str(path))
    assert (json.loads(done.stdout)["verdict"], found["verdict"]) == ("worker-stuck", "worker-stuck")


@pytest.mark.parametrize("moment", ["while it is saved", "when it is saved"])
def test_an_interruption_leaves_both_files_or_none(tmp_path: Path, moment: str) -> None:
    """And says which. The diagnosis comes last, and here goes to somebody who does not read."""
    path, report = tmp_path / "saved", tmp_path / "saved.json"
    command = [sys.executable, str(ROOT / "cli.py"), "inspect", "--save", str(path), "--pid"]
    with full_pipe() as full, paused() as qemu:
        process = subprocess.Popen([*command, str(qemu.pid)], stdout=full, stderr=subprocess.PIPE, text=True)
        with process:
            assert process.stderr is not None
            if moment == "while it is saved":
                wait_until(path.exists)
            while moment == "when it is saved" and "stood still" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=PATIENCE_S)[1]
    there = (path.exists(), report.exists())
    assert process.returncode == 1
    assert there in ((True, True), (False, False))
    assert all(there) or moment == "while it is saved"
    assert f"interrupted; {path} and {report} are saved" in said if all(there) else "nothing was saved" in said


@contextmanager
def full_pipe() -> Iterator[int]:
    """What is written to it waits."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(1 << 12))
        os.set_blocking(writer, True)
        yield writer
    finally:
        os.close(reader)
        os.close(writer)


# Broken evidence


@pytest.fixture(scope="module")
def lost_core(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A saved QEMU with one lost write, and the request's address."""
    path = tmp_path_factory.mktemp("cores") / "lost"
    with paused([Drive("d0", iothread="io0"), Drive("d1")]) as qemu:
        qemu.request("d1", "write")
        lost = faults.lose(qemu, "d0", "write")
        with closing(LiveView(open_target(qemu.pid))) as view:
            save(view, str(path))
    return path, lost.request


@pytest.fixture(scope="module")
def healthy_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved QEMU after 30 requests, of which none is left."""
    path = tmp_path_factory.mktemp("cores") / "healthy"
    with paused() as qemu:
        for block in range(30):
            qemu.request("d0", "write", block * 4096)
        pool = faults.pool_of(qemu, "d0")
        qemu.wait_until(lambda: not faults.requests_of(qemu, pool))
        qemu.kick("d0")
        with closing(LiveView(open_target(qemu.pid))) as view:
            save(view, str(path))
    return path


def build_from(path: Path) -> Build:
    with closing(CoreView(str(path))) as view, view.open_image() as image:
        return build_of(image, "qemu")


def evidence(path: Path, build: Build) -> tuple[list[int], list[int]]:
    """File offsets of the pointers in pools, bottom halves and requests; and addresses to point to."""
    layout = build.located.layout
    offsets, targets = [], []
    with closing(CoreView(str(path))) as view:
        found = diagnose(view, build)
        for pool in found.pools:
            places = [
                pool.pool + layout.pool.head,
                pool.pool + layout.pool.context,
                pool.pool + layout.pool.completion_bh,
            ]
            bottom_half = layout.bottom_half
            places += [pool.bottom_half + at for at in (bottom_half.context, bottom_half.callback, bottom_half.opaque)]
            for request in pool.requests:
                element = layout.element
                places += [request.request + at for at in (element.pool, element.next, element.prev, element.arg)]
                places += [request.request + at for at in (element.func, element.opaque)]
                targets.append(request.request)
            targets += [pool.pool, pool.bottom_half, pool.context, *places]
            for place in places:
                load = view.file.load_at(place)
                assert load
                offsets.append(load.offset + place - load.start)
    return offsets, targets


def changes(path: Path, build: Build, dice: random.Random) -> Iterator[dict[int, bytes]]:
    """What to write where: wrong pointers, cycles and cut lists in the evidence, and damage anywhere."""
    offsets, targets = evidence(path, build)
    size = path.stat().st_size
    for _ in range(MUTATIONS):
        written = {}
        for _ in range(dice.randint(1, 3)):
            value = dice.choice([0, 8, dice.choice(targets), dice.getrandbits(47) & ~7, dice.getrandbits(64)])
            written[dice.choice(offsets)] = struct.pack("<Q", value)
        for _ in range(dice.choice([0, 0, 4, 64])):
            written[dice.randrange(size - 8)] = dice.randbytes(8)
        yield written


@contextmanager
def mutated(path: Path, written: dict[int, bytes], cut: int | None) -> Iterator[None]:
    """The core with these bytes in it, cut off there, for the time of the block."""
    with open(path, "r+b") as file:
        before = {at: os.pread(file.fileno(), len(data), at) for at, data in written.items()}
        tail = b"" if cut is None else os.pread(file.fileno(), path.stat().st_size - cut, cut)
        try:
            for at, data in written.items():
                os.pwrite(file.fileno(), data, at)
            if cut is not None:
                file.truncate(cut)
            yield
        finally:
            if cut is not None:
                os.pwrite(file.fileno(), tail, cut)
            for at, data in reversed(before.items()):
                os.pwrite(file.fileno(), data, at)


def verdicts(original: Path, folder: Path, seed: int) -> Iterator[tuple[str, set[tuple[int, str]]]]:
    """(what was changed, {(request, cause)}) of every copy that can be read at all."""
    path = folder / "mutated"
    shutil.copy(original, path)
    build = build_from(path)
    dice = random.Random(seed)
    for number, written in enumerate(changes(path, build, dice)):
        cut = dice.randrange(path.stat().st_size) if number % 4 == 3 else None
        what = f"{number}: {[f'{at:#x}={data.hex()}' for at, data in list(written.items())[:3]]}, cut at {cut}"
        began = time.monotonic()
        with mutated(path, written, cut), suppress(AioTraceError), closing(CoreView(str(path))) as view:
            found = diagnose(view, build)
            yield what, {(r.request, str(r.cause)) for p in found.pools for r in p.requests if r.cause}
        assert time.monotonic() - began < 10, what


@pytest.mark.timeout(60 + 2 * MUTATIONS)
def test_broken_evidence_names_no_other_cause(lost_core: tuple[Path, int], tmp_path: Path) -> None:
    path, request = lost_core
    told = 0
    for what, accused in verdicts(path, tmp_path, seed=1):
        assert {cause for _, cause in accused} <= {"lost-wakeup", "unknown"}, what
        assert {address for address, cause in accused if cause == "lost-wakeup"} <= {request}, what
        told += any(cause == "lost-wakeup" for _, cause in accused)
    assert told  # the damage does not hide everything


@pytest.mark.timeout(60 + 2 * MUTATIONS)
def test_broken_evidence_makes_no_hang(healthy_core: Path, tmp_path: Path) -> None:
    for what, accused in verdicts(healthy_core, tmp_path, seed=2):
        assert not accused, what
