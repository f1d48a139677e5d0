"""Wherever QEMU runs and whatever became of its file: chroot, container, overlay, deleted, replaced, long names."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.qemu.nudging import nudge
from tests.qemu.tracing import ROOT, Trace, traced
from tracer.lab import faults
from tracer.lab.qemu import STORAGE_DAEMON, SYSTEM, Drive, Qemu, paused, storage_daemon
from tracer.target import LONG_NAME, find_qemus, open_target

NAME_LIMIT, PATH_LIMIT = 255, 4095


def installed(program: str = SYSTEM) -> Path:
    path = shutil.which(program)
    assert path is not None
    return Path(path).resolve()


def copied(folder: Path, program: str = SYSTEM) -> Path:
    """The program in a place of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(installed(program), folder / program))


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Debian's QEMU has its accelerators in modules, and looks for them relative to where it runs."""
    found = list(Path("/usr/lib").glob("*/qemu/accel-*.so"))
    if found:
        monkeypatch.setenv("QEMU_MODULE_DIR", str(found[0].parent))
    return found


@pytest.fixture
def small_root(tmp_path: Path, modules: list[Path]) -> Path:
    """A folder to chroot into: the program, its libraries, and nothing else."""
    root = tmp_path / "root"
    for folder in ("tmp", "dev"):
        (root / folder).mkdir(parents=True)
    os.mknod(root / "dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    copied(root / "usr/bin")
    listed = subprocess.run(["ldd", installed(), *modules], capture_output=True, text=True, check=True).stdout
    for library in {*re.findall(r"(/\S+) \(0x", listed), *map(str, modules)}:
        place = root / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, place)
    return root


@contextmanager
def overlay(folder: Path, lower: Path) -> Iterator[Path]:
    """`lower` seen through an overlay."""
    require("overlay" in Path("/proc/filesystems").read_text(), "this kernel has no overlayfs")
    places = {name: folder / name for name in ("upper", "work", "merged")}
    for place in places.values():
        place.mkdir()
    options = f"lowerdir={lower},upperdir={places['upper']},workdir={places['work']}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, places["merged"]], check=True)
    try:
        yield places["merged"]
    finally:
        subprocess.run(["umount", "--lazy", places["merged"]], check=True)


@contextmanager
def long_folder(base: Path, length: int) -> Iterator[Path]:
    """A folder whose path has exactly `length` characters."""
    path = str(base)
    while length - len(path) > NAME_LIMIT + 2:
        path += "/" + "n" * NAME_LIMIT
    rest = length - len(path) - 1
    for part in (rest,) if rest <= NAME_LIMIT else (rest // 2, rest - rest // 2 - 1):
        path += "/" + "n" * part
    assert len(path) == length
    os.makedirs(path)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(base / ("n" * NAME_LIMIT))


def check(qemu: Qemu) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "cli.py"), "check", "--json", "--pid", str(qemu.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_traced(qemu: Qemu) -> dict[str, Any]:
    """Everything works there: counts, an alert under our eyes, and one after the fact; returns the latter."""
    assert qemu.pid in find_qemus()
    found = check(qemu)
    assert found["ready"] is True
    qemu.request("d0", "write")
    with traced(qemu.pid, "--deadline", "300ms") as trace:
        before = qemu.trace_counts()
        for index in range(7):
            qemu.request("d0", "write", index * 4096)
        lost = faults.lose(qemu, "d0", "write")
        alert = trace.expect("alert")
        assert (alert["cause"], alert["seen_from"], int(alert["request"], 16)) == (
            *("lost-wakeup", "probes"),
            lost.request,
        )
        lost.free()
        trace.expect("resolved")
        assert trace.finish() == 3
        after = qemu.trace_counts()
    requests = trace.summary["requests"]
    assert requests["submitted"] == requests["completed"] == after.submitted - before.submitted
    lost = faults.lose(qemu, "d0", "write")
    with Trace(qemu.pid, "--deadline", "300ms") as trace:
        late = trace.expect("alert")
        assert (late["cause"], late["seen_from"], int(late["request"], 16)) == ("lost-wakeup", "memory", lost.request)
        lost.free()
        assert trace.finish() == 3
    return late


def test_in_a_chroot(small_root: Path) -> None:
    with paused(chroot=small_root, exe=f"/usr/bin/{SYSTEM}") as qemu:
        assert_traced(qemu)


def test_in_a_container(small_root: Path) -> None:
    """Mount and pid namespaces of its own, as process 1."""
    with paused(chroot=small_root, exe=f"/usr/bin/{SYSTEM}", contained=True) as qemu:
        for kind in ("mnt", "pid"):
            assert os.readlink(f"/proc/{qemu.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        assert_traced(qemu)


@pytest.mark.parametrize("contained", [False, True])
def test_its_file_was_deleted(small_root: Path, contained: bool) -> None:
    with paused(chroot=small_root, exe=f"/usr/bin/{SYSTEM}", contained=contained) as qemu:
        (small_root / "usr/bin" / SYSTEM).unlink()
        assert_traced(qemu)
        found = check(qemu)
        assert found["exe"].endswith(" (deleted)")
        assert "replaced" in found["notes"][0]


def test_its_file_was_replaced(tmp_path: Path) -> None:
    """By another build, as an upgrade does: what runs must be read, not what has its name now."""
    program = copied(tmp_path / "bin")
    with paused(exe=str(program)) as qemu:
        before = check(qemu)
        os.replace(copied(tmp_path / "new", STORAGE_DAEMON), program)
        after = check(qemu)
        assert (after["build_id"], after["sites"]) == (before["build_id"], before["sites"])
        assert_traced(qemu)


@pytest.mark.parametrize("layer", ["lower", "upper"])
def test_in_an_overlay(tmp_path: Path, small_root: Path, layer: str) -> None:
    with overlay(tmp_path, small_root) as merged:
        program = merged / "usr/bin" / SYSTEM
        if layer == "upper":
            os.utime(program)  # copies it up
        assert (tmp_path / "upper/usr/bin" / SYSTEM).exists() == (layer == "upper")
        with paused(chroot=merged, exe=f"/usr/bin/{SYSTEM}", contained=True) as qemu:
            assert_traced(qemu)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_path_of_4_kib(tmp_path: Path, deleted: bool) -> None:
    """As long as the kernel takes; " (deleted)" behind it is too long for /proc/PID/exe to tell."""
    with long_folder(tmp_path, PATH_LIMIT - len(SYSTEM) - 1) as folder:
        program = copied(folder)
        disk = folder / ("d" * len(SYSTEM))
        disk.write_bytes(bytes(1 << 20))
        with paused([Drive(file=disk)], exe=str(program)) as qemu:
            if deleted:
                program.unlink()
                disk.unlink()
            found = check(qemu)
            assert found["exe"] == str(program) + (" (deleted)" if deleted else "")
            late = assert_traced(qemu)
            assert late["kind"] == "write"
            assert late["file"] == (LONG_NAME if deleted else str(disk))


def test_several_builds_at_once(small_root: Path) -> None:
    """A system emulator in a container, its file deleted, and a storage daemon: each has its own alert."""
    with ExitStack() as stack:
        emulator = stack.enter_context(paused(chroot=small_root, exe=f"/usr/bin/{SYSTEM}", contained=True))
        daemon = stack.enter_context(storage_daemon())
        (small_root / "usr/bin" / SYSTEM).unlink()
        both = {emulator.pid, daemon.pid}
        assert both <= set(find_qemus())
        for qemu in (emulator, daemon):
            qemu.request("d0", "write")
        trace = stack.enter_context(Trace(emulator.pid, "--pid", str(daemon.pid), "--deadline", "300ms"))
        attached = [trace.expect("attached") for _ in both]
        assert {event["pid"] for event in attached} == both
        assert len({event["exe"] for event in attached}) == 2
        for qemu in (emulator, daemon):
            lost = faults.lose(qemu, "d0", "write")
            alert = trace.expect("alert")
            assert (alert["cause"], alert["pid"], int(alert["request"], 16)) == ("lost-wakeup", qemu.pid, lost.request)
            lost.free()
            assert trace.expect("resolved")["pid"] == qemu.pid
        assert trace.finish() == 3
        assert {event["pid"]: event["alerts"] for event in trace.named("summary")} == dict.fromkeys(both, 1)


def test_a_number_from_inside_a_container_is_explained(small_root: Path) -> None:
    """Process 1 here is no QEMU; the hint names the QEMU that is process 1 in its container."""
    with paused(chroot=small_root, exe=f"/usr/bin/{SYSTEM}", contained=True) as qemu:
        for command in (["check", "--pid", "1"], ["--pid", "1", "--duration", "1s"]):
            done = subprocess.run(
                [sys.executable, str(ROOT / "cli.py"), *command],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 1
            assert f"--pid {qemu.pid}" in done.stderr.splitlines()[-1]


def test_a_monitor_is_found_in_its_container(small_root: Path) -> None:
    """By the path on QEMU's own command line, also where this host has another socket of that path."""
    with paused(chroot=small_root, exe=f"/usr/bin/{SYSTEM}", contained=True) as qemu, ExitStack() as undo:
        inside = "/" + str(qemu.spare_monitor.relative_to(small_root))
        for foreign in (False, True):
            if foreign:
                Path(inside).parent.mkdir(parents=True)
                undo.callback(shutil.rmtree, Path(inside).parent)
                other = undo.enter_context(closing(socket.socket(socket.AF_UNIX)))
                other.bind(inside)
                other.listen()
            lost = faults.lose(qemu, "d0", "write")
            done = nudge(qemu.pid, "--qmp", inside)
            assert done.status == 0, done.errors
            assert not lost.still_lost()
        lost = faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--qmp", f"{inside}.not")
        assert done.status == 1
        assert "there is no socket" in done.errors
        lost.free()


def test_helpers_of_qemu_are_not_taken_for_one(tmp_path: Path) -> None:
    """--all must not try a guest agent or an emulator of user programs."""
    for name, expected in (("qemu-ga", False), ("qemu-aarch64-static", False), ("qemu-kvm", True), ("qemu-nbd", True)):
        program = Path(shutil.copy2("/bin/sleep", tmp_path / name))
        with subprocess.Popen([program, "60"]) as process:
            try:
                assert open_target(process.pid).exe.endswith(name)
                assert (process.pid in find_qemus()) is expected
            finally:
                process.kill()
