"""A call put into a sleeping thread: it is made, and the thread has everything back as it was."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import require
from tracer import inject
from tracer.errors import InjectionRefused
from tracer.inject import Call, call_in_thread
from tracer.lab.process import wait_until
from tracer.memory import LiveMemory, read_u64
from tracer.target import Target, open_target

CALLS = 50
SOURCE = Path(__file__).with_name("sleeper.c")


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled."""
    require(os.geteuid() == 0, "these tests need root")
    require(platform.machine() == "x86_64", "calls are made on x86-64 only")
    require(shutil.which("gcc"), "gcc is not installed")
    program = tmp_path_factory.mktemp("sleeper") / "sleeper"
    subprocess.run(["gcc", "-O1", "-mavx", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True)
    return program


class Sleeper:
    """The running program, asleep."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child
        assert child.stdout
        function, self.counter = (int(word, 16) for word in child.stdout.readline().split())
        self.call = Call(function, self.counter)
        self.target: Target = open_target(child.pid)
        self.memory = LiveMemory(self.target)
        wait_until(self.asleep, what="the program to sleep")

    def asleep(self) -> bool:
        """Whether it is in a poll."""
        thread = self.target.thread(self.target.pid)
        return thread is not None and thread.syscall is not None and "poll" in thread.syscall.name

    def calls(self) -> int:
        """How often its function was called."""
        return read_u64(self.memory, self.counter)

    def end(self) -> str:
        """Let it go, and what it says became of its registers."""
        out, _ = self.child.communicate("x", timeout=30)
        return out.strip()


@contextmanager
def running(program: Path, how: str) -> Iterator[Sleeper]:
    """The program for the time of the block."""
    with subprocess.Popen([program, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield Sleeper(child)
        finally:
            child.kill()


@pytest.mark.parametrize(("how", "interrupted"), [("ppoll", 0), ("poll", CALLS), ("epoll_wait", CALLS)])
def test_the_thread_has_everything_back(sleeper: Path, how: str, interrupted: int) -> None:
    """A system call that the kernel would start again is, the others end with EINTR as with any signal."""
    with running(sleeper, how) as sleeping:
        for number in range(1, CALLS + 1):
            call_in_thread(sleeping.target, sleeping.memory, sleeping.target.pid, sleeping.call, lambda: None)
            wait_until(lambda number=number: sleeping.calls() == number, what="the call")
        wait_until(sleeping.asleep, what="the program to sleep again")
        assert sleeping.end() == f"calls {CALLS} interrupted {interrupted} usr1 0"


def _state(thread: inject._Stopped) -> str:
    found = thread._target.thread(thread._tid)
    return found.state if found else ""


@pytest.mark.parametrize("request_", [inject.PTRACE_INTERRUPT, inject.PTRACE_SETREGS, inject.PTRACE_DETACH])
def test_signals_are_not_lost(sleeper: Path, request_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes right before one of the steps is handled once."""
    plain = inject._Stopped._ptrace
    due, sent = False, 0

    def ptrace(thread: inject._Stopped, request: int, address: int = 0, data: int = 0) -> None:
        nonlocal due, sent
        if request == request_ and due:
            os.kill(thread._tid, signal.SIGUSR1)
            due, sent = False, sent + 1
            if request == inject.PTRACE_INTERRUPT:  # so that it stops for the signal first
                wait_until(lambda: _state(thread) == "t", what="the thread to stop")
        plain(thread, request, address, data)

    monkeypatch.setattr(inject._Stopped, "_ptrace", ptrace)
    with running(sleeper, "ppoll") as sleeping:
        for number in range(1, CALLS + 1):
            due = True
            call_in_thread(sleeping.target, sleeping.memory, sleeping.target.pid, sleeping.call, lambda: None)
            wait_until(lambda number=number: sleeping.calls() == number, what="the call")
            wait_until(sleeping.asleep, what="the program to sleep again")
        words = sleeping.end().split()
        assert (words[0], int(words[1]), int(words[5])) == ("calls", CALLS, sent)
        assert sent == CALLS


def test_what_the_check_raises_forbids_the_call(sleeper: Path) -> None:
    def forbid() -> None:
        raise InjectionRefused("forbidden")

    with running(sleeper, "ppoll") as sleeping:
        with pytest.raises(InjectionRefused, match="forbidden"):
            call_in_thread(sleeping.target, sleeping.memory, sleeping.target.pid, sleeping.call, forbid)
        assert sleeping.end() == "calls 0 interrupted 0 usr1 0"


def test_a_debugged_process_is_refused(sleeper: Path) -> None:
    require(shutil.which("gdb"), "gdb is not installed")
    with running(sleeper, "ppoll") as sleeping:
        pid = sleeping.target.pid
        command = ["gdb", "-q", "-p", str(pid)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as gdb:
            status = Path(f"/proc/{pid}/status")
            wait_until(lambda: f"TracerPid:\t{gdb.pid}" in status.read_text(), what="gdb to attach")
            with pytest.raises(InjectionRefused, match=f"debugged by process {gdb.pid}"):
                call_in_thread(sleeping.target, sleeping.memory, pid, sleeping.call, lambda: None)
            gdb.communicate(b"detach\nquit\n", timeout=30)
        assert sleeping.end() == "calls 0 interrupted 0 usr1 0"
