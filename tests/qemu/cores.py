"""A hang made in the lab, looked at live and in its core file: what must agree. For any QEMU, chrooted or not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from tracer.lab import faults
from tracer.lab.qemu import Drive, Qemu, paused
from tracer.live import LiveView
from tracer.target import open_target

ROOT = Path(__file__).resolve().parents[2]
#: The translator's buffer is 1 GiB otherwise, all of which gcore writes out.
SMALL = ("-accel", "tcg,tb-size=32")
Json = dict[str, Any]

#: What a request is, and what is said of it: the same live and in a core. Ages and files are not: a core
#: is one moment, and does not hold the names of open files.
SAME_OF_A_REQUEST = ("request", "pool", "context", "kind", "offset", "bytes", "state", "ret", "cause")
SAME_OF_A_REQUEST += ("func", "callback", "opaque", "coroutine", "coroutine_entry")


def run(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """`aio-trace inspect`, as a user types it."""
    command = [*prefix, sys.executable, str(ROOT / "cli.py"), "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def inspect(*arguments: str, prefix: Sequence[str] = ()) -> Json:
    """The object that `inspect --json` prints, with its exit status as `status`."""
    done = run(*arguments, "--json", prefix=prefix)
    assert done.stdout, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = done.stdout.splitlines()
    found: Json = json.loads(line)
    return found | {"status": done.returncode}


def gcore(qemu: Qemu) -> Path:
    """The core that gdb takes of it."""
    name = qemu.folder / "core"
    subprocess.run(["gcore", "-o", name, str(qemu.pid)], check=True, capture_output=True, timeout=60)
    return name.with_name(f"core.{qemu.pid}")


# Hangs: each keeps a QEMU in one until the end of the block.


@contextmanager
def lost_flush(chroot: Path | None) -> Iterator[Qemu]:
    with paused(chroot=chroot, extra=SMALL) as qemu:
        faults.lose(qemu, "d0", "flush")
        yield qemu


@contextmanager
def lost_write_in_iothread(chroot: Path | None) -> Iterator[Qemu]:
    with paused([Drive("d0", iothread="io0"), Drive("d1")], chroot=chroot, extra=SMALL) as qemu:
        qemu.request("d1", "write")
        faults.lose(qemu, "d0", "write")
        yield qemu


@contextmanager
def drain(chroot: Path | None) -> Iterator[Qemu]:
    """The vendor's second picture: `stop` after a lost flush never returns."""
    with lost_flush(chroot) as qemu, ExitStack() as stack:
        qemu.qmp("cont")
        stack.enter_context(faults._raw_monitor(qemu)).sendall(b'{"execute": "stop"}\n')
        qemu.wait_until(lambda: "bdrv_drain_all_begin" in main_functions(qemu), what="the monitor to hang")
        yield qemu


@contextmanager
def stuck_loop(chroot: Path | None) -> Iterator[Qemu]:
    with (
        paused(chroot=chroot, extra=SMALL) as qemu,
        faults.stalled_completion(qemu, "d0", faults.pool_of(qemu, "d0")),
    ):
        yield qemu


HANGS: dict[str, tuple[str, Callable[[Path | None], Any]]] = {
    "lost flush": ("lost-wakeup", lost_flush),
    "lost write in an iothread": ("lost-wakeup", lost_write_in_iothread),
    "drain after a lost flush": ("lost-wakeup", drain),
    "stuck loop": ("loop-blocked", stuck_loop),
}


def main_functions(qemu: Qemu) -> tuple[str, ...]:
    """The main thread's stack."""
    with closing(LiveView(open_target(qemu.pid))) as view:
        return view.stack(qemu.pid).functions()


# What must agree.


def core_agrees(hang: str, chroot: Path | None = None, exe: Path | None = None) -> tuple[Json, Json]:
    """Make the hang, look at it live and in a gcore of it; what was found, live and in the core."""
    verdict, make = HANGS[hang]
    with make(chroot) as qemu:
        live = inspect("--pid", str(qemu.pid))
        core = gcore(qemu)
        found = inspect("--core", str(core), *(["--exe", str(exe)] if exe else []))
    assert (live["verdict"], live["status"]) == (verdict, 3), live
    agree(live, found)
    return live, found


def agree(live: Json, found: Json) -> None:
    """Verdict, drain, every pool and request and every stack are the same."""
    assert (found["verdict"], found["draining"], found["status"]) == (
        live["verdict"],
        live["draining"],
        live["status"],
    ), (live, found)
    assert [_pool(pool) for pool in found["pools"]] == [_pool(pool) for pool in live["pools"]]
    assert [thread["tid"] for thread in found["threads"]] == [thread["tid"] for thread in live["threads"]]
    # A worker may have ended its idle wait meanwhile; the main thread did not move.
    assert found["threads"][0]["stack"] == live["threads"][0]["stack"]


def _pool(pool: Json) -> Json:
    same = {name: pool[name] for name in ("pool", "context", "bottom_half", "threads")}
    return same | {"requests": [{n: request[n] for n in SAME_OF_A_REQUEST} for request in pool["requests"]]}
