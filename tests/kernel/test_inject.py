"""A call put into a sleeping thread: it is made, and the thread has everything back as it was."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import require
from tracer import inject, xstate
from tracer.errors import InjectionRefused, TargetExited
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
        function, counter, self.states = child.stdout.readline().strip().split(None, 2)
        self.counter = int(counter, 16)
        self.call = Call(int(function, 16), self.counter)
        self.target: Target = open_target(child.pid)
        self.memory = LiveMemory(self.target)
        wait_until(self.asleep, what="the program to sleep")

    def asleep(self) -> bool:
        """Whether it is in a poll."""
        thread = self.target.thread(self.target.pid)
        return thread is not None and thread.syscall is not None and "poll" in thread.syscall.name

    def marks(self) -> str:
        """What the kernel wrote into the first signal frame of the program, sw_reserved of its FPU state, in hex."""
        assert self.child.stdout
        return self.child.stdout.readline().strip()

    def calls(self) -> int:
        """How often its function was called."""
        return read_u64(self.memory, self.counter)

    def end(self) -> str:
        """Let it go, and what it says became of its registers."""
        out, _ = self.child.communicate("x", timeout=30)
        return out.strip()


@contextmanager
def running(program: Path, how: str, *options: str) -> Iterator[Sleeper]:
    """The program for the time of the block."""
    with subprocess.Popen([program, how, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield Sleeper(child)
        finally:
            child.kill()


@pytest.mark.parametrize("options", [(), ("tiles",)], ids=["plain", "tiles where there are any"])
@pytest.mark.parametrize(("how", "interrupted"), [("ppoll", 0), ("poll", CALLS), ("epoll_wait", CALLS)])
def test_the_thread_has_everything_back(
    sleeper: Path, how: str, interrupted: int, options: tuple[str, ...], covered: Callable[[str], None]
) -> None:
    """A system call that the kernel would start again is, the others end with EINTR as with any signal."""
    with running(sleeper, how, *options) as sleeping:
        covered(sleeping.states)
        for number in range(1, CALLS + 1):
            call_in_thread(sleeping.target, sleeping.memory, sleeping.target.pid, sleeping.call, lambda: None)
            wait_until(lambda number=number: sleeping.calls() == number, what="the call")
        wait_until(sleeping.asleep, what="the program to sleep again")
        assert sleeping.end() == f"calls {CALLS} interrupted {interrupted} usr1 0"


def test_a_frame_that_does_not_bring_all_back_is_never_used(sleeper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame too large for the thread, for which the kernel clears what is beyond the first 512 bytes."""

    def too_large(regset: bytes, _areas: object) -> bytes:
        room = len(regset) + 64
        marks = struct.pack("<IIQI7I", xstate.FP_XSTATE_MAGIC1, room + 4, 7, room, *[0] * 7)
        state = regset[: xstate.SW_RESERVED] + marks + regset[xstate.HEADER :] + bytes(64)
        return state + struct.pack("<I", xstate.FP_XSTATE_MAGIC2)

    monkeypatch.setattr(xstate, "signal_state", too_large)
    with running(sleeper, "ppoll") as sleeping:
        with pytest.raises(InjectionRefused, match=r"give thread .* back its floating-point or vector registers; they"):
            call_in_thread(sleeping.target, sleeping.memory, sleeping.target.pid, sleeping.call, lambda: None)
        assert sleeping.end() == "calls 0 interrupted 0 usr1 0"


def test_the_frame_is_as_large_as_the_kernels_own(sleeper: Path) -> None:
    """The program's signal handler tells what the kernel laid for it."""
    with running(sleeper, "ppoll") as sleeping:
        with inject._Stopped(sleeping.target, sleeping.target.pid) as thread:
            state = xstate.signal_state(thread.xstate(), xstate.areas())
        os.kill(sleeping.target.pid, signal.SIGUSR2)
        assert state[xstate.SW_RESERVED : xstate.HEADER] == bytes.fromhex(sleeping.marks())
        assert sleeping.end() == "calls 0 interrupted 1 usr1 0"


def test_a_thread_of_another_process_is_refused(sleeper: Path) -> None:
    """A number may have passed on to somebody else since it was looked up."""
    with running(sleeper, "ppoll") as sleeping, running(sleeper, "ppoll") as other:
        with pytest.raises(InjectionRefused, match=f"{other.target.pid} is none of process {sleeping.target.pid}"):
            call_in_thread(sleeping.target, sleeping.memory, other.target.pid, sleeping.call, lambda: None)
        successor = dataclasses.replace(sleeping.target, start_time=sleeping.target.start_time - 1)
        with pytest.raises(TargetExited):
            call_in_thread(successor, sleeping.memory, sleeping.target.pid, sleeping.call, lambda: None)
        assert (sleeping.asleep(), other.asleep()) == (True, True)
        assert sleeping.end() == other.end() == "calls 0 interrupted 0 usr1 0"


def _state(thread: inject._Stopped) -> str:
    found = thread._target.thread(thread.tid)
    return found.state if found else ""


@pytest.mark.parametrize(
    "request_", [inject.PTRACE_INTERRUPT, inject.PTRACE_SETREGS, inject.PTRACE_SYSCALL, inject.PTRACE_DETACH]
)
def test_signals_are_not_lost(sleeper: Path, request_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes right before one of the steps is handled once."""
    plain = inject._Stopped._ptrace
    due, sent = False, 0

    def ptrace(thread: inject._Stopped, request: int, address: int = 0, data: int = 0) -> None:
        nonlocal due, sent
        if request == request_ and due:
            os.kill(thread.tid, signal.SIGUSR1)
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
