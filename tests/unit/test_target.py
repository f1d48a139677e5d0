"""Processes as /proc shows them: children of this test."""

from __future__ import annotations

import ctypes as ct
import mmap
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.errors import NoSuchProcess, NotPermitted, NotQemu, TargetExited
from tracer.lab.process import wait_until
from tracer.target import RESTART_SYSCALL, SYSCALLS, Target, Thread, find_qemus, is_qemu_name, open_target

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def wait_for(pid: int, state: str) -> None:
    """Until the process is in that state; the test's own time limit is the limit."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
        pass


def test_this_process() -> None:
    found = open_target(os.getpid())
    assert (found.pid, found.exe) == (os.getpid(), os.readlink("/proc/self/exe"))
    assert found.alive
    found.check_alive()


@pytest.mark.parametrize("pid", [2**22 + 1, 2**31, 10**20])
def test_no_such_process(pid: int) -> None:
    with pytest.raises(NoSuchProcess, match=f"there is no process {pid}"):
        open_target(pid)


def test_a_thread_is_no_process() -> None:
    """/proc/TID is there though it is not listed; the hint names the process."""
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    try:
        with pytest.raises(NotQemu) as caught:
            open_target(thread.native_id or 0)
    finally:
        leave.set()
        thread.join()
    assert f"thread of process {os.getpid()}" in caught.value.message
    assert caught.value.hint == f"sudo aio-trace --pid {os.getpid()}"


def test_a_zombie(child: subprocess.Popen[bytes]) -> None:
    before = open_target(child.pid)
    child.kill()
    wait_for(child.pid, "Z")
    assert not before.alive
    with pytest.raises(TargetExited):
        before.check_alive()
    with pytest.raises(NotQemu, match="zombie"):
        open_target(child.pid)


def test_a_process_that_is_gone(child: subprocess.Popen[bytes]) -> None:
    """Whatever is asked: TargetExited, nothing, or None, but no surprise."""
    gone = open_target(child.pid)
    child.kill()
    child.wait()
    assert not gone.alive
    assert gone.threads() == []
    assert gone.thread(child.pid) is None
    assert (gone.file_of(0), gone.eventfd_count(0)) == (None, None)
    for asked in (gone.check_alive, gone.regions, gone.entry_address):
        with pytest.raises(TargetExited):
            asked()


def test_a_pid_used_again(child: subprocess.Popen[bytes]) -> None:
    """Another start time is another process."""
    now = open_target(child.pid)
    assert not Target(child.pid, now.start_time - 1, now.exe).alive


def test_the_same_program_again(tmp_path: Path) -> None:
    """An exec: the number, the start time, the file and all addresses are the same, and nothing that was read is."""
    program = tmp_path / "again"
    source = tmp_path / "again.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        'int main(int n, char **words) { puts("up"); fflush(stdout); getchar(); return execv(words[0], words); }\n'
    )
    subprocess.run(["gcc", "-o", program, source], check=True)
    command = ["setarch", "--addr-no-randomize", str(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        target = open_target(process.pid)
        entry = target.entry_address()
        target.check_memory()
        process.stdin.write("\n")
        assert process.stdout.readline() == "up\n"
        assert (target.alive, target.entry_address()) == (True, entry)
        with pytest.raises(TargetExited, match="another program"):
            target.check_memory()
        open_target(process.pid).check_memory()
        process.kill()


def test_a_process_of_somebody_else() -> None:
    """Told with what to type instead; process 1 is root's."""
    require(os.geteuid() == 0 or os.stat("/proc/1").st_uid != os.geteuid(), "process 1 is not root's")
    code = (
        "import os, sys\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from tracer.target import open_target\n"
        "from tracer.errors import NotPermitted\n"
        "try: open_target(1)\n"
        "except NotPermitted as error: print(error.hint)\n"
    )
    # Modules are loaded before the privileges go: the tree may be root's alone.
    code = "import tracer.target, tracer.errors\n" + code
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert printed.stdout == "sudo aio-trace --pid 1\n"
    assert issubclass(NotPermitted, Exception)


def test_a_name_with_spaces_and_parentheses(tmp_path: Path) -> None:
    odd = tmp_path / "a (b) c) R 1"
    shutil.copy(shutil.which("sleep") or "sleep", odd)
    with subprocess.Popen([odd, "600"]) as process:
        try:
            found = open_target(process.pid)
            assert found.alive
            (thread,) = found.threads()
            assert (thread.name, thread.tid) == ("a (b) c) R 1", process.pid)
        finally:
            process.kill()


def thread_of(process: subprocess.Popen[bytes]) -> Thread:
    found = open_target(process.pid).thread(process.pid)
    assert found is not None
    return found


def test_a_sleeping_thread_and_its_system_call() -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.DEVNULL) as process:
        wait_for(process.pid, "S")
        thread = thread_of(process)
        while thread.syscall is None or thread.syscall.name != "read":
            thread = thread_of(process)
        assert (thread.state, thread.stopped) == ("S", False)
        assert thread.syscall.args[0] == 0
        assert open_target(process.pid).file_of(0) == os.readlink(f"/proc/self/fd/{reader}")
        region = next(
            region for region in open_target(process.pid).regions() if region.start <= thread.syscall.sp < region.end
        )
        assert region.path == "[stack]"
        # It comes round: the count of its sleeps says so.
        before = thread.switches
        os.write(writer, b"x")
        while thread_of(process).switches == before:
            pass
        process.kill()
    os.close(reader)
    os.close(writer)


def test_a_running_thread_is_in_no_system_call() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        thread = thread_of(process)
        while thread.state != "R" or thread.syscall is not None:
            thread = thread_of(process)
        process.kill()


def test_a_stopped_process(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    wait_for(child.pid, "T")
    assert all(thread.stopped for thread in open_target(child.pid).threads())


def test_a_frozen_process(cgroup: Path, child: subprocess.Popen[bytes]) -> None:
    """`docker pause`: its threads look as if they slept."""
    found = open_target(child.pid)
    (cgroup / "cgroup.procs").write_text(str(child.pid))
    assert not found.frozen
    (cgroup / "cgroup.freeze").write_text("1")
    while not found.frozen:
        assert "frozen 1" not in (cgroup / "cgroup.events").read_text() or found.frozen
    assert not any(thread.stopped for thread in found.threads())
    (cgroup / "cgroup.freeze").write_text("0")
    while found.frozen:
        assert "frozen 0" not in (cgroup / "cgroup.events").read_text() or not found.frozen
    child.kill()
    child.wait()
    assert not found.frozen


def test_eventfds() -> None:
    fd = ct.CDLL(None).eventfd(0, os.O_CLOEXEC)
    me = open_target(os.getpid())
    assert me.eventfd_count(fd) == 0
    os.write(fd, struct.pack("=Q", 0x1F))
    assert me.eventfd_count(fd) == 0x1F
    other = os.open("/dev/null", os.O_RDONLY)
    assert me.eventfd_count(other) is None
    assert me.eventfd_count(99999) is None
    os.close(fd)
    os.close(other)


def test_mappings_cover_what_is_mapped() -> None:
    me = open_target(os.getpid())
    regions = me.regions()
    assert regions == sorted(regions, key=lambda region: region.start)
    code = ct.cast(ct.CDLL(None).malloc, ct.c_void_p).value or 0
    (region,) = (region for region in regions if region.start <= code < region.end)
    assert "x" in region.permissions
    assert region.inode > 0
    assert os.path.exists(region.path)


def test_mapped_files_with_odd_names(tmp_path: Path) -> None:
    odd = tmp_path / "a  b\tc (deleted)"
    shutil.copy(shutil.which("sleep") or "sleep", odd)
    with subprocess.Popen([odd, "600"]) as process:
        try:
            # exec() closes what Popen waits for before it maps the new program.
            wait_until(lambda: any(r.path.startswith(str(tmp_path)) for r in open_target(process.pid).regions()))
        finally:
            process.kill()


def test_where_the_program_was_loaded(child: subprocess.Popen[bytes]) -> None:
    """The entry point less e_entry is the load bias: where the file's first segment is mapped."""
    found = open_target(child.pid)
    with open(found.image_path, "rb") as file:
        (entry,) = struct.unpack_from("<Q", file.read(64), 24)
    first = next(region.start for region in found.regions() if region.path == found.exe)
    assert found.entry_address() - entry in (first, 0)


@pytest.mark.parametrize(
    ("name", "is_qemu"),
    [
        ("qemu-system-x86_64", True),
        ("qemu-system-x86_64 (deleted)", True),
        (".qemu-system-x86_64-wrapped", True),
        ("qemu-kvm", True),
        ("kvm", True),
        ("qemu-storage-daemon", True),
        ("qemu-nbd", True),
        ("qemu-ga", False),
        ("qemu-aarch64-static", False),
        ("kvmtool", False),
        ("sleep", False),
    ],
)
def test_names_of_qemus(name: str, is_qemu: bool) -> None:
    assert is_qemu_name(name) == is_qemu


def test_qemus_are_found_by_their_executable(tmp_path: Path) -> None:
    """A process that merely calls itself so is none; one whose file is named so is."""
    program = tmp_path / "qemu-system-mips"
    shutil.copy(shutil.which("sleep") or "sleep", program)
    with (
        subprocess.Popen([program, "600"]) as named,
        subprocess.Popen(["qemu-system-mips", "600"], executable=shutil.which("sleep")) as called,
    ):
        try:
            found = find_qemus()
            assert named.pid in found
            assert called.pid not in found
            assert found == sorted(found)
        finally:
            named.kill()
            called.kill()


HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_of_system_calls(machine: str) -> None:
    """Against the kernel's own header."""
    path = next((path for path in HEADERS[machine] if os.path.exists(path)), None)
    require(path or platform.machine() != "x86_64", "the kernel's user-space headers are not installed: libc6-dev")
    if path is None:
        pytest.skip("another architecture's header")
    numbers = {
        name.removeprefix("3264_"): int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(path).read_text())
    }
    known = SYSCALLS[machine] | {RESTART_SYSCALL[machine]: "restart_syscall"}
    assert {name: numbers.get(name) for name in known.values()} == {name: number for number, name in known.items()}


NASTY = "x\v\f\r\x1c\x1d\x1e\x85\u2028\u2029 \t y"


def test_a_mapped_file_may_have_any_name(tmp_path: Path) -> None:
    """Python's own lines end at ten characters; the kernel's at a newline, which it writes as \\012 in a name."""
    names = [NASTY, f"{NASTY}\udcff ", "7f0000000000-7f0000001000 rw-p 00000000 00:00 0"]
    paths = [str(tmp_path / name) for name in names]
    maps = []
    for path in paths:
        with open(path, "w+b") as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            maps.append(mmap.mmap(file.fileno(), 0))
    found = {region.path for region in open_target(os.getpid()).regions()}
    assert set(paths) <= found


def test_a_thread_may_have_any_name() -> None:
    """What it says of itself is not what the kernel says of it."""
    leave, ready = threading.Event(), threading.Event()
    libc = ct.CDLL(None)

    def named() -> None:
        libc.prctl(15, b"\rTgid:\t1\rx\v\xff", 0, 0, 0)  # PR_SET_NAME
        ready.set()
        leave.wait()

    thread = threading.Thread(target=named)
    thread.start()
    ready.wait()
    try:
        with pytest.raises(NotQemu, match=f"is a thread of process {os.getpid()}$"):
            open_target(thread.native_id or 0)
        found = open_target(os.getpid()).thread(thread.native_id or 0)
        assert found is not None
        assert (found.name, found.stopped) == ("\\rTgid:\\t1\\rx\\x0b\\xff", False)
    finally:
        leave.set()
        thread.join()


def test_texts_of_the_kernel_are_no_lines_of_python() -> None:
    """Names of a target's choosing stand in them: read_text() is the one way to read them."""
    sources = [path for path in (ROOT / "tracer").rglob("*.py") if "lab" not in path.parts]
    wrong = [
        f"{path.name}: {line.strip()}"
        for path in sources
        for line in path.read_text().split("\n")
        if (".splitlines(" in line and path.name not in ("compiler.py", "host.py"))
        or (re.search(r'open\(f"/proc/', line) and not re.search(r'"[rw]b"|os\.open', line))
    ]
    assert wrong == []
