"""Child processes that cannot outlive the lab, and what may be done to them.

Knows: how to start a process so that it dies with the lab, how to tell such a process from any
other, its threads, its memory. Does not know QEMU. Whatever writes, stops or kills asks
`refuse_foreign` first: only direct children of this process that carry this lab's token pass.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TypeVar

from tracer.errors import LabError

MARKER = "AIO_TRACE_LAB"
TOKEN = secrets.token_hex(8)
PR_SET_PDEATHSIG = 1
CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000

#: How long a killed process may take: a thread in fdatasync(2) dies only when the storage has answered.
END_S = 30.0

T = TypeVar("T")


def wait_until(probe: Callable[[], T], timeout: float = 30.0, what: str = "the condition") -> T:
    """Poll `probe` until it returns something true, and return that; LabError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while True:
        if result := probe():
            return result
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s for {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def spawn(
    argv: Sequence[str], output: IO[bytes], chroot: Path | None = None, contained: bool = False
) -> subprocess.Popen[bytes]:
    """Start `argv` (inside `chroot`), both outputs to `output`, so that it is killed when the lab ends.

    `contained` gives it mount and pid namespaces of its own, as a container has.

    The kernel sends that signal when the *thread* ends that started the child, so only the main
    thread may. A session of its own keeps a terminal's Ctrl-C for the lab, which then cleans up.
    """
    if threading.current_thread() is not threading.main_thread():
        raise LabError("the lab starts processes from the main thread only")
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The lab died before the line above. (Process 1 of a pid namespace sees no parent: 0.)
        if os.getppid() != (0 if contained else parent):
            os._exit(1)
        if contained and (libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)):
            os._exit(1)
        if chroot is not None:
            os.chroot(chroot)
            os.chdir("/")

    try:
        with _new_pid_namespace(libc) if contained else nullcontext():
            return subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARKER: TOKEN},
                preexec_fn=in_child,
                start_new_session=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise LabError(f"cannot start {argv[0]}: {error}", f"install {Path(argv[0]).name}") from error


@contextmanager
def _new_pid_namespace(libc: ctypes.CDLL) -> Iterator[None]:
    """The next child is process 1 of a pid namespace of its own; no thread can be started meanwhile."""
    with open("/proc/self/ns/pid", "rb") as own:
        if libc.unshare(CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), "no new pid namespace")
        try:
            yield
        finally:
            libc.setns(own.fileno(), CLONE_NEWPID)


def end(child: subprocess.Popen[bytes], timeout: float = END_S) -> None:
    """Kill a child of the lab and reap it; LabError if it has not ended after `timeout` seconds.

    By pid: an exception out of a signal handler may have left Popen's own lock taken for ever.
    """
    if child.returncode is not None or _reaped(child):
        return
    os.kill(child.pid, signal.SIGKILL)
    try:
        wait_until(lambda: _reaped(child), timeout)
    except LabError as error:
        raise LabError(
            f"process {child.pid} was killed, but has not ended after {timeout:g} s: {_asleep_in(child.pid)}",
            f"cat /proc/{child.pid}/task/*/stack",
        ) from error


def _reaped(child: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; what is left of it is taken away then."""
    try:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
    except ChildProcessError:  # by somebody else
        pid, status = child.pid, 0
    if pid == child.pid:
        child.returncode = os.waitstatus_to_exitcode(status)
    return pid == child.pid


def _asleep_in(pid: int) -> str:
    """The threads that do not die, in words."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found.append(f"{thread.name} {_stat_fields(thread / 'stat')[0]} in {(thread / 'wchan').read_text()}")
    return ", ".join(found) or "no thread of it is left"


#: (pid, start time) of those that others started at this lab's order.
_adopted: set[tuple[int, str]] = set()


def adopt(pid: int) -> None:
    """Take a process for the lab's own that a daemon of the lab started at its order."""
    _adopted.add((pid, _start_time(pid)))


def _start_time(pid: int) -> str:
    return _stat_fields(Path(f"/proc/{pid}/stat"))[19]


def is_own(pid: int) -> bool:
    """Whether this lab started the process: it carries the token and is our child, or it was adopted."""
    try:
        if (pid, _start_time(pid)) in _adopted:
            return True
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        parent = int(_stat_fields(Path(f"/proc/{pid}/stat"))[1])
    except (OSError, IndexError):
        return False
    return f"{MARKER}={TOKEN}".encode() in environment and parent == os.getpid()


def refuse_foreign(pid: int) -> None:
    """LabError unless `pid` is a living process that this lab started."""
    if not is_own(pid):
        raise LabError(f"process {pid} was not started by this lab (or has ended); it will not be touched")


def peek(pid: int, address: int, size: int) -> bytes:
    """Exactly `size` bytes of an own process's memory."""
    refuse_foreign(pid)
    return _peek(pid, address, size)


def _peek(pid: int, address: int, size: int) -> bytes:
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, address)
    except (OSError, OverflowError) as error:
        raise LabError(f"cannot read {size} bytes at {address:#x} of process {pid}: {error}") from error
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise LabError(f"read {len(data)} of {size} bytes at {address:#x} of process {pid}")
    return data


def poke(pid: int, address: int, data: bytes) -> None:
    """Write to an own process's memory."""
    refuse_foreign(pid)
    descriptor = os.open(f"/proc/{pid}/mem", os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, address)
    finally:
        os.close(descriptor)


def stop_process(pid: int) -> None:
    """SIGSTOP an own process and wait until every thread of it stands."""
    refuse_foreign(pid)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: set(thread_states(pid)) <= set("Tt"), what=f"process {pid} to stop")


def continue_process(pid: int) -> None:
    """SIGCONT an own process and wait until no thread of it is stopped."""
    refuse_foreign(pid)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: "T" not in thread_states(pid), what=f"process {pid} to continue")


def thread_states(pid: int) -> list[str]:
    """The state letter of every thread, as in `ps`."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            states.append(_stat_fields(stat)[0])
        except OSError:  # the thread ended meanwhile
            continue
    return states


def _stat_fields(path: Path) -> list[str]:
    """The fields of a /proc stat file after the name: state, parent, …"""
    return path.read_text(errors="replace").rpartition(")")[2].split()
