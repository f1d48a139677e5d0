"""Guests that have broken into their QEMU, beside honest ones: who looks at all of them helps the honest ones.

The attackers are stock QEMUs with code of ours inside (tests/targets/hostile), so that they run the very executable
that the others run.
"""

from __future__ import annotations

import os
import platform
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import require
from tests.qemu.tracing import PATIENCE_S, ROOT, Trace
from tracer.build import Build, read_build
from tracer.lab import faults
from tracer.lab.process import wait_until
from tracer.lab.qemu import Qemu, paused
from tracer.sites.model import SUBMIT
from tracer.target import open_target

SOURCE = ROOT / "tests" / "targets" / "hostile" / "hostile.c"
REPEAT = int(os.environ.get("AIO_TRACE_REPEAT", "0"))
HONEST = 3
#: Zero pages took 4 s for each GiB to be searched, and made-up pools the longer the more there are.
ZEROES_MIB, POOLS = (65536, 20000) if REPEAT else (16384, 3000)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is put into the attackers."""
    require(platform.machine() == "x86_64", "the attackers' code is for x86-64")
    made = tmp_path_factory.mktemp("hostile") / "hostile.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-pthread", "-o", made, SOURCE], check=True)
    return made


@pytest.fixture(scope="module")
def known(qemu_host: None) -> Build:
    """What is in the executable of all of them."""
    with paused() as qemu:
        target = open_target(qemu.pid)
        return read_build(target.image_path, target.exe)


def flood(build: Build) -> str:
    """Made-up requests that are submitted and never done."""
    site = build.located.sites[SUBMIT]
    code = bytes.fromhex(site.code)
    assert site.offset is not None
    assert code[0] == 0xE8, "the probe is not on a call"
    return f"flood:{site.offset}:{site.offset + 5 + struct.unpack_from('<i', code, 1)[0]}"


def pools(build: Build) -> str:
    layout, callback = build.located.layout, build.located.functions["thread_pool_completion_bh"]
    half = layout.bottom_half
    places = (layout.pool.context, layout.pool.completion_bh, half.context, half.callback, half.opaque)
    return f"pools:{POOLS}:{callback - build.entry}:" + ":".join(map(str, places))


@contextmanager
def broken_into(library: Path, what: str, folder: Path) -> Iterator[Qemu]:
    """A QEMU in which that has begun."""
    ready = folder / f"ready-{what.split(':')[0]}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LD_PRELOAD", library), ("HOSTILE", what), ("HOSTILE_READY", ready)):
            patch.setenv(name, str(value))
        qemu = paused()
    with qemu:
        qemu.wait_until(ready.exists)
        yield qemu


@contextmanager
def endless_debug_file(folder: Path) -> Iterator[int]:
    """A program that calls itself QEMU, whose debug file must be read to its end, which is far; its pid."""
    source, program, debug = folder / "it.c", folder / "qemu-system-endless", folder / "it.debug"
    version = "QEMU emulator version 7.2.0 (it)\\n"
    source.write_text(f'#include <stdio.h>\nint main(void) {{ puts("{version}"); fflush(stdout); return getchar(); }}')
    subprocess.run(["gcc", "-Wl,--build-id=none", "-o", program, source], check=True)
    debug.write_bytes(program.read_bytes())
    os.truncate(debug, 1 << 41)
    link = folder / "link"
    link.write_bytes(b"it.debug".ljust(12, b"\0") + bytes(4))
    subprocess.run(["objcopy", f"--add-section=.gnu_debuglink={link}", program], check=True)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        yield process.pid
        process.kill()


@contextmanager
def honest() -> Iterator[list[Qemu]]:
    with ExitStack() as stack:
        found = [stack.enter_context(paused()) for _ in range(HONEST)]
        for qemu in found:
            qemu.request("d0", "write")  # so that it has its pool
        yield found


def everything(*options: str) -> Trace:
    """A trace of all QEMUs of this host, other tests' among them."""
    options = ("--deadline", "500ms", "--interval", "500ms", "--json", *options)
    return Trace.of([sys.executable, str(ROOT / "cli.py"), "--all", *options])


def await_all(trace: Trace, name: str, qemus: Sequence[Qemu]) -> dict[int, dict[str, object]]:
    """The first event of that name of each of them."""
    found: dict[int, dict[str, object]] = {}
    while not {qemu.pid for qemu in qemus} <= found.keys():
        event = trace.expect(name)
        found.setdefault(event["pid"], event)
    return found


def lose_and_be_told(trace: Trace, qemus: Sequence[Qemu]) -> None:
    """A lost completion of each, told while it is so; freed again."""
    for qemu in qemus:
        lost = faults.lose(qemu, "d0", "write")
        while (alert := trace.expect("alert"))["pid"] != qemu.pid:
            pass
        assert (int(alert["request"], 16), alert["cause"]) == (lost.request, "lost-wakeup")
        # Its deadline and once more: not what any of the attackers takes.
        assert alert["overdue_s"] <= 2.0
        lost.free()
        while trace.expect("resolved")["pid"] != qemu.pid:
            pass


def ended_by(trace: Trace, number: int) -> float:
    """How long it took."""
    began = time.monotonic()
    assert trace.finish(number) in (0, 1, 3)  # 1: one could not be watched
    return time.monotonic() - began


@pytest.mark.timeout(400)
def test_honest_guests_beside_hostile_ones(library: Path, known: Build, tmp_path: Path) -> None:
    """One of each kind, there before the honest ones: those are attached, told of in time, and all go on."""
    kinds = [flood(known), f"zeroes:{ZEROES_MIB}", pools(known), f"names:{tmp_path}"]
    with ExitStack() as stack:
        attackers = [stack.enter_context(broken_into(library, kind, tmp_path)).pid for kind in kinds]
        attackers.append(stack.enter_context(endless_debug_file(tmp_path)))
        qemus = stack.enter_context(honest())
        trace = stack.enter_context(everything())
        await_all(trace, "attached", qemus)
        await_all(trace, "interval", qemus)
        lose_and_be_told(trace, qemus)
        # One that comes later, too.
        late = stack.enter_context(paused())
        await_all(trace, "attached", [late])
        lose_and_be_told(trace, [late])
        assert ended_by(trace, signal.SIGTERM) < 10.0
        assert all(os.path.exists(f"/proc/{pid}/exe") for pid in (*attackers, *(qemu.pid for qemu in (*qemus, late))))
        assert {event["pid"] for event in trace.named("summary")} >= {qemu.pid for qemu in (*qemus, late)}
    lost = {event["pid"]: event["lost_records"] for event in trace.named("summary")}
    assert [lost[qemu.pid] for qemu in (*qemus, late)] == [0] * (HONEST + 1)


@pytest.mark.timeout(200)
def test_who_was_hurt_is_sampled(library: Path, known: Build, tmp_path: Path) -> None:
    """The process whose records do not fit is told of, and its lost completion is seen in memory."""
    with broken_into(library, flood(known), tmp_path) as qemu, everything() as trace:
        await_all(trace, "attached", [qemu])
        while "its memory is sampled" not in (event := trace.expect("error"))["message"]:
            pass
        assert event["pid"] == qemu.pid
        lost = faults.lose(qemu, "d0", "write")
        while (alert := trace.expect("alert"))["pid"] != qemu.pid or int(alert["request"], 16) != lost.request:
            pass
        assert alert["cause"] == "lost-wakeup"
        lost.free()
        trace.finish()


@pytest.mark.timeout(120 + 30 * REPEAT)
def test_it_ends_at_any_moment(library: Path, known: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it looks at what takes long: a signal ends it, and nothing is left that it began."""
    chance = random.Random(12)
    took = []
    token = f"of-{uuid4()}"
    with ExitStack() as stack:
        for kind in (f"zeroes:{ZEROES_MIB}", pools(known)):
            stack.enter_context(broken_into(library, kind, tmp_path))
        stack.enter_context(endless_debug_file(tmp_path))
        monkeypatch.setenv("AIO_TRACE_TEST", token)
        for _ in range(max(REPEAT, 3)):
            with everything() as trace:
                time.sleep(chance.uniform(0.3, 5.0))
                took.append(ended_by(trace, signal.SIGTERM))
                wait_until(lambda: begun_with(token) == [], PATIENCE_S, "its children to be gone")
    assert sorted(took)[len(took) // 2] < 2.0, took


def begun_with(token: str) -> list[int]:
    """The processes that have it in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if token.encode() in Path(f"/proc/{name}/environ").read_bytes() and int(name) != os.getpid():
                found.append(int(name))
    return found
