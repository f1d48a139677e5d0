"""A live process as a ProcessView: /proc, its memory, and stacks without stopping it.

Knows: that a thread that sleeps in a system call shows its stack pointer and program counter in
/proc/PID/task/TID/syscall, from which its stack can be unwound while it sleeps on. Does not know
QEMU's structures.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from tracer.elf import Image
from tracer.machine import HOST
from tracer.memory import LiveMemory
from tracer.target import Region, Target, Thread, read_text
from tracer.view import Stack

if TYPE_CHECKING:
    from tracer.unwind import Unwinder

#: So many descriptors are looked at.
MAX_FILES = 10000
#: How often a thread that runs is looked at for its stack, and how long to wait in between (seconds).
ATTEMPTS, PAUSE_S = 4, 0.0005


class LiveView:
    """A running process; see ProcessView."""

    core = None
    machine = HOST

    def __init__(self, target: Target) -> None:
        self.target = target
        self.memory = LiveMemory(target)
        self._unwinder: Unwinder | None = None

    @property
    def pid(self) -> int:
        """The process, and its main thread."""
        return self.target.pid

    @property
    def exe(self) -> str:
        """Where /proc/PID/exe points."""
        return self.target.exe

    def open_image(self) -> Image:
        """The executable that runs, even when it was deleted or replaced."""
        return Image.open(self.target.image_path)

    def entry_address(self) -> int:
        """Where the executable's entry point was loaded."""
        return self.target.entry_address()

    def regions(self) -> list[Region]:
        """The mappings now."""
        return self.target.regions()

    def heap_chunks(self) -> Iterable[tuple[int, bytes]]:
        """malloc's memory, without guest RAM."""
        return self.memory.chunks(self.memory.heap_regions())

    def thread(self, tid: int) -> Thread | None:
        """One thread now."""
        return self.target.thread(tid)

    def threads(self) -> list[Thread]:
        """All threads now, the main thread first."""
        threads = self.target.threads()
        return sorted(threads, key=lambda thread: thread.tid != self.pid)

    def stack(self, tid: int) -> Stack:
        """The stack of a thread that sleeps in a system call; where it woke meanwhile, the next one."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S)
            before = self.target.thread(tid)
            if before is None:
                return Stack(why_not="the thread is gone")
            if before.syscall is None:
                continue
            stack = self._stacks().unwind(before.syscall.pc, before.syscall.sp)
            after = self.target.thread(tid)
            if after is not None and (after.syscall, after.switches) == (before.syscall, before.switches):
                return stack
        return Stack(why_not="the thread runs; its registers cannot be read without stopping it")

    def stack_at(self, pc: int, sp: int, others: Mapping[int, int] | None = None) -> Stack:
        """The stack from a program counter and a stack pointer on."""
        return self._stacks().unwind(pc, sp, others)

    def stack_above(self, address: int) -> Stack:
        """The stack from where a return address leads that is saved there."""
        return self._stacks().unwind_above(address)

    def function_at(self, address: int) -> tuple[str, int] | None:
        """(function, offset) by the symbols of the files that are mapped."""
        return self._stacks().function_at(address)

    def _stacks(self) -> Unwinder:
        if self._unwinder is None:
            from tracer.unwind import Unwinder

            self._unwinder = Unwinder(self)
        return self._unwinder

    @property
    def frozen(self) -> bool:
        """Stopped with its whole cgroup."""
        return self.target.frozen

    def knows_files(self) -> bool:
        """Always: /proc tells."""
        return True

    def files(self) -> dict[int, str]:
        """Every open file descriptor now."""
        return self.files_but(frozenset())

    def files_but(self, others: Collection[int]) -> dict[int, str]:
        """As files(), without these."""
        try:
            numbers = sorted({int(name) for name in os.listdir(f"/proc/{self.pid}/fd")}.difference(others))
        except OSError:
            return {}
        # To look at all that a process may open would take seconds.
        return {fd: file for fd in numbers[:MAX_FILES] if (file := self.target.file_of(fd)) is not None}

    def file_of(self, fd: int) -> str | None:
        """What a file descriptor refers to, or None."""
        return self.target.file_of(fd)

    def eventfd_count(self, fd: int) -> int | None:
        """The counter of an eventfd, or None."""
        return self.target.eventfd_count(fd)

    def epoll_holds(self, epoll_fd: int, fd: int) -> bool | None:
        """Whether that epoll set holds `fd`."""
        try:
            return re.search(rf"^tfd:\s*{fd}\b", read_text(f"/proc/{self.pid}/fdinfo/{epoll_fd}"), re.M) is not None
        except OSError:
            return None

    def kernel_stack(self, tid: int) -> tuple[str, ...]:
        """/proc/PID/task/TID/stack where that may be read, else the one function that wchan names."""
        folder = f"/proc/{self.pid}/task/{tid}"
        for name, pattern in (("stack", r"^\[<[^>]*>\]\s+([^\s+/]+)"), ("wchan", r"^([A-Za-z_]\w+)")):
            with suppress(OSError):
                found = re.findall(pattern, read_text(f"{folder}/{name}"), re.M)
                if found:
                    return tuple(found)
        return ()

    def missing(self) -> tuple[str, ...]:
        """Nothing: all of the process is there."""
        return ()

    def arguments(self) -> tuple[str, ...]:
        """The command line."""
        try:
            with open(f"/proc/{self.pid}/cmdline", "rb") as file:
                return tuple(part.decode(errors="replace") for part in file.read().split(b"\0") if part)
        except OSError:
            return ()

    def asleep_s(self, tid: int) -> float | None:
        """How long the thread has not run, by the scheduler's clock; None where /proc does not tell."""
        cpu, theirs = self.target.last_cpu(tid), _last_ran_ms(f"/proc/{self.pid}/task/{tid}/sched")
        own = _now_ms(cpu) if cpu is not None and theirs is not None else None
        if own is None or theirs is None:
            return None
        return max(0.0, own - theirs) / 1e3

    def close(self) -> None:
        """Give the file descriptors back."""
        if self._unwinder is not None:
            self._unwinder.close()
        self.memory.close()


def _now_ms(cpu: int) -> float | None:
    """That CPU's clock of the scheduler, a moment ago: each has one of its own, and they drift apart.

    A thread that runs on it shows it; that is this one then.
    """
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError:
        return None
    try:
        return _last_ran_ms("/proc/thread-self/sched")
    finally:
        os.sched_setaffinity(0, allowed)


def _last_ran_ms(path: str) -> float | None:
    try:
        found = re.search(r"^se\.exec_start\s*:\s*([\d.]+)", read_text(path), re.M)
    except OSError:
        return None
    return float(found[1]) if found else None
