"""What is tried inside: aio-trace on this system's own QEMU, under this system's own kernel.

Runs as root in a machine that is there for nothing else. Each check is one line of JSON on standard output; the
host's tests read them (tests/kernels/test_kernels.py). A check that raises has failed, and the next one is run.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.qemu.cores import SAME_OF_A_REQUEST
from tests.qemu.nudging import by_force, by_monitor
from tests.qemu.tracing import ROOT, Trace, traced
from tracer import kernel
from tracer.build import read_build
from tracer.compiler import bcc_version
from tracer.lab import faults
from tracer.lab.process import peek, wait_until
from tracer.lab.qemu import SYSTEM, Qemu, paused
from tracer.target import open_target

KINDS = ("write", "read", "flush", "discard")
MODES = ("full", "alert", "none")
ROUNDS = 60
MANY = 7
#: Under an emulator everything takes many times as long; what is asked is whether, not when.
PATIENCE_S = 120.0
WARNING = re.compile(r"WARNING:|BUG:|Oops|Call Trace|general protection|rcu.*stall|trace type BPF")
WARNINGS = 4  # the level in /dev/kmsg

BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}
#: bpf(2): BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID, BPF_LINK_GET_NEXT_ID.
NEXT_NUMBER = {"programs": 11, "maps": 12, "links": 31}

Found = dict[str, Any]


def command(*words: str) -> list[str]:
    """aio-trace as a user starts it."""
    return [sys.executable, str(ROOT / "cli.py"), *words]


def run(*words: str) -> tuple[int, Found]:
    """Exit status and the one object that it prints."""
    done = subprocess.run(command(*words, "--json"), capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout or "{}") | {"stderr": done.stderr}


# The checks


def system() -> Found:
    """What this is, and what the kernel can; `check` calls it ready."""
    status, found = run("check", "--exe", str(shutil.which(SYSTEM)))
    assert (status, found["ready"]) == (0, True), found
    flags = set(re.findall(r"\S+", Path("/proc/cpuinfo").read_text()))
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "bcc": bcc_version(),
        "qemu": found["version"],
        "uprobe_multi": kernel.has_multi(),
        "atomics": kernel.has_atomics(),
        "hashes_allocate": kernel.may_allocate(),
        "processor": sorted(flags & {"avx", "avx2", "avx512f", "amx_tile", "paca", "bti", "atomics"}),
    }


def counts_of(mode: str) -> Callable[[Qemu], Found]:
    """As many requests as QEMU's own trace tells of; one thread submits, others do them."""

    def counts(qemu: Qemu) -> Found:
        with traced(qemu.pid, "--probes", mode) as trace:
            before = qemu.trace_counts()
            for start in range(0, ROUNDS, 4):
                handles = [qemu.submit("d0", KINDS[i % 4], i % 64 * 4096) for i in range(start, start + 4)]
                for handle in handles:
                    qemu.finish("d0", handle)
            assert trace.finish() == 0, trace.errors
            after = qemu.trace_counts()
        requests, asked = trace.summary["requests"], after.completed - before.completed
        assert asked >= ROUNDS
        expected = {"full": asked, "alert": asked, "none": None}[mode]
        assert requests["completed"] == expected, requests
        assert requests["submitted"] == (asked if mode == "full" else None), requests
        assert trace.summary["lost_records"] in (0, None)
        return {"asked": asked, "requests": requests, "startup_s": trace.named("attached")[0]["startup_s"]}

    return counts


def bundle(qemu: Qemu) -> Found:
    """The bundle, unpacked as README says, traces on a machine without a network: nothing of the trial's is used."""
    assert {path.name for path in Path("/sys/class/net").iterdir()} <= {"lo"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-C", folder, "-xf", str(ROOT.parent / "bundle.tar.gz")], check=True)
        (program,) = Path(folder).glob("aio-trace-*/aio-trace")
        start = ["env", "-i", f"XDG_CACHE_HOME={folder}", str(program), "--pid", str(qemu.pid), "--json"]
        # Its Python begins isolated: neither the trial's folder nor its libraries can be imported.
        with Trace.of(start) as trace:
            attached = trace.expect("attached", PATIENCE_S)
            before = qemu.trace_counts()
            for number in range(ROUNDS):
                qemu.request("d0", KINDS[number % 4])
            asked = qemu.trace_counts().completed - before.completed
            assert trace.finish() == 0, trace.errors
    requests = trace.summary["requests"]
    assert asked >= ROUNDS
    assert (requests["submitted"], requests["completed"]) == (asked, asked), requests
    return {"bundle": program.parent.name, "asked": asked, "startup_s": attached["startup_s"]}


def alert_of(mode: str) -> Callable[[Qemu], Found]:
    """A completion that is lost under our eyes is told, and so is its end."""

    def alert(qemu: Qemu) -> Found:
        with traced(qemu.pid, "--deadline", "500ms", "--probes", mode) as trace:
            lost = faults.lose(qemu, "d0", "write")
            told = trace.expect("alert", PATIENCE_S)
            assert (told["cause"], told["kind"], told["state"]) == ("lost-wakeup", "write", "THREAD_DONE"), told
            assert int(told["request"], 16) == lost.request
            lost.free()
            assert trace.expect("resolved", PATIENCE_S)["request"] == told["request"]
            assert trace.finish() == 3
        return {"overdue_s": told["overdue_s"], "seen_from": told["seen_from"]}

    return alert


def inspect(qemu: Qemu) -> Found:
    """The same from memory alone, with the stacks of who waits, and once more from a core of a few megabytes."""
    core = qemu.folder / "core"
    lost = faults.lose(qemu, "d0", "flush")
    status, found = run("inspect", "--pid", str(qemu.pid), "--save", str(core))
    lost.free()
    assert (status, found["verdict"]) == (3, "lost-wakeup"), found
    (request,) = (request for pool in found["pools"] for request in pool["requests"])
    assert os.path.basename(request["file"]) == "d0.img"
    assert any("bdrv_co_flush" in frame for frame in request["coroutine_stack"]), request
    main = found["threads"][0]
    assert any("main_loop_wait" in frame for frame in main["stack"]), main
    status, again = run("inspect", "--core", str(core))
    # Not how many workers there are: one that is idle ends meanwhile.
    assert (status, again["verdict"], again["threads"][0]["stack"]) == (3, found["verdict"], main["stack"]), again
    assert [pool["pool"] for pool in again["pools"]] == [pool["pool"] for pool in found["pools"]]
    assert _requests(again) == _requests(found)
    size = core.stat().st_size
    core.unlink()
    return {"verdict": found["verdict"], "explanation": found["explanation"], "stack": main["stack"], "core": size}


def _requests(found: Found) -> list[Found]:
    return [{name: each[name] for name in SAME_OF_A_REQUEST} for pool in found["pools"] for each in pool["requests"]]


def nudge_by_monitor(qemu: Qemu) -> Found:
    """A lost completion is freed by one read."""
    lost = faults.lose(qemu, "d0", "write")
    done = by_monitor(qemu)
    assert done.status == 0, done.errors
    assert not lost.still_lost()
    return {"said": done.errors}


def nudge_by_force(qemu: Qemu) -> Found:
    """A lost completion is freed by a call inside; QEMU lives and goes on. Where that cannot be, it is not touched."""
    lost = faults.lose(qemu, "d0", "write")
    done = by_force(qemu)
    if platform.machine() != "x86_64":
        assert (done.status, lost.still_lost()) == (1, True), done
        assert "is for x86-64 only" in done.errors
        lost.free()
        return {"said": done.errors}
    assert done.status == 0, done.errors
    assert not lost.still_lost()
    qemu.request("d0", "read")
    return {"pause_ms": [event["pause_ms"] for event in done.nudges]}


def all_of_them(qemu: Qemu) -> Found:
    """--all: each is counted by itself, and the one that loses a completion is named."""
    with contextlib.ExitStack() as stack:
        qemus = [qemu, *(stack.enter_context(paused()) for _ in range(MANY - 1))]
        options = ("--json", "--deadline", "1s", "--interval", "0")
        with Trace.of(command("--all", *options)) as trace:
            assert {trace.expect("attached", PATIENCE_S)["pid"] for _ in qemus} == {each.pid for each in qemus}
            before = {each.pid: each.trace_counts().completed for each in qemus}
            for number, each in enumerate(qemus):
                for _ in range(number + 1):
                    each.request("d0", "write")
            lost = faults.lose(qemus[3], "d0", "write")
            assert trace.expect("alert", PATIENCE_S)["pid"] == qemus[3].pid
            lost.free()
            trace.expect("resolved", PATIENCE_S)
            assert trace.finish() == 3, trace.errors
            asked = {each.pid: each.trace_counts().completed - before[each.pid] for each in qemus}
        told = {event["pid"]: event["requests"]["completed"] for event in trace.named("summary")}
        assert told == asked, (told, asked)
        assert [event["pid"] for event in trace.named("alert")] == [qemus[3].pid]
    return {"asked": list(asked.values())}


def killed(qemu: Qemu) -> Found:
    """kill -9 of a trace, and the code is as it was; no program, map or link is left in the kernel."""
    before, original = objects_in_the_kernel(), code_at_sites(qemu)
    with traced(qemu.pid) as trace:
        assert not set(code_at_sites(qemu).items()) & set(original.items())
        assert objects_in_the_kernel() != before
        trace.process.send_signal(signal.SIGKILL)
        trace.process.wait(PATIENCE_S)
        # The kernel takes things apart when their last user has gone, a little later.
        wait_until(lambda: code_at_sites(qemu) == original, PATIENCE_S, "the probes to be gone")
        wait_until(lambda: objects_in_the_kernel() == before, PATIENCE_S, "what was loaded to be gone")
    qemu.request("d0", "write")
    return {"left": objects_in_the_kernel()}


def code_at_sites(qemu: Qemu) -> dict[str, bytes]:
    """The bytes where each probe goes."""
    target = open_target(qemu.pid)
    build = read_build(target.image_path, target.exe)
    bias = target.entry_address() - build.entry
    return {name: peek(qemu.pid, bias + site.address, 4) for name, site in build.located.sites.items()}


def objects_in_the_kernel() -> dict[str, list[int]]:
    """The numbers of all that is loaded: BPF programs, maps and links."""
    return {kind: list(numbers(operation)) for kind, operation in NEXT_NUMBER.items()}


def numbers(operation: int) -> Iterator[int]:
    """Those that the kernel gives for one of NEXT_NUMBER."""
    block = ctypes.create_string_buffer(128)
    number = 0
    while True:
        struct.pack_into("<II", block, 0, number, 0)
        if ctypes.CDLL(None, use_errno=True).syscall(BPF_SYSCALL[platform.machine()], operation, block, 128):
            return
        (number,) = struct.unpack_from("<I", block, 4)
        yield number


def quiet() -> Found:
    """The kernel has warned of nothing since the trial began."""
    lines = messages()
    assert not [line for _, line in lines if WARNING.search(line)], lines
    grave = [line for level, line in lines if level < WARNINGS]
    assert not grave, grave
    assert Path("/proc/sys/kernel/tainted").read_text().strip() == "0"
    return {"warnings": [line for level, line in lines if level == WARNINGS]}


def messages() -> list[tuple[int, str]]:
    """(level, text) of all that the kernel said so far."""
    found = []
    with contextlib.suppress(BlockingIOError):
        reader = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        while True:
            head, _, text = os.read(reader, 8192).decode(errors="replace").partition(";")
            found.append((int(head.split(",")[0]) & 7, text.splitlines()[0]))
    return found


# One after the other


def tell(name: str, began: float, **what: Any) -> None:
    """One line for the host."""
    print(json.dumps({"check": name, "took_s": round(time.monotonic() - began, 1), **what}), flush=True)


def attempt(name: str, check: Callable[..., Found], *arguments: Any) -> None:
    """Run a check and tell what came of it."""
    began = time.monotonic()
    try:
        tell(name, began, ok=True, found=check(*arguments))
    except Exception:
        tell(name, began, ok=False, error=traceback.format_exc()[-4000:])


def checks() -> dict[str, Callable[[Qemu], Found]]:
    """Those of one QEMU by name, in an order in which each finds it well."""
    found = {f"counts-{mode}": counts_of(mode) for mode in MODES}
    found.update({f"alert-{mode}": alert_of(mode) for mode in MODES})
    if platform.machine() == "x86_64":  # as is all that a bundle holds
        found["bundle"] = bundle
    for check in (inspect, nudge_by_monitor, nudge_by_force, killed, all_of_them):
        found[check.__name__.replace("_", "-")] = check
    return found


def names() -> list[str]:
    """What the host may ask for."""
    return ["system", *checks(), "quiet"]


def main() -> None:
    """All of them; the last line says that this was all."""
    began = time.monotonic()
    attempt("system", system)
    with paused() as qemu:
        qemu.request("d0", "write")
        for name, check in checks().items():
            attempt(name, check, qemu)
    attempt("quiet", quiet)
    tell("end", began, ok=True)


if __name__ == "__main__":
    main()
