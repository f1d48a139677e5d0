"""One thread of a QEMU of the lab, held by ptrace(2) while all others go on.

Knows: x86-64 registers and its breakpoint instruction. Does not know QEMU. A thread that is held must
be let go by the very thread of ours that took it, and is let go by the kernel if we die.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator

from tracer.errors import LabError
from tracer.lab.process import peek, poke, refuse_foreign, wait_until

SEIZE, INTERRUPT, CONT, DETACH, GETREGS, SETREGS = 0x4206, 0x4207, 7, 17, 12, 13
WALL = 0x40000000
BREAKPOINT = b"\xcc"


class Registers(ctypes.Structure):
    """struct user_regs_struct of sys/user.h, x86-64."""

    _fields_ = tuple(
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )


class HeldThread:
    """A thread that stands still; made by held_thread()."""

    def __init__(self, pid: int, tid: int) -> None:
        refuse_foreign(pid)
        self.pid, self.tid = pid, tid
        _ptrace(SEIZE, tid)
        _ptrace(INTERRUPT, tid)
        self._wait()

    def _wait(self, timeout: float = 10.0) -> None:
        def stands() -> bool:
            found, status = os.waitpid(self.tid, os.WNOHANG | WALL)
            if found and not os.WIFSTOPPED(status):
                raise LabError(f"thread {self.tid} has ended")
            return bool(found)

        wait_until(stands, timeout, f"thread {self.tid} to stand still")

    @property
    def registers(self) -> Registers:
        """Its registers now."""
        registers = Registers()
        _ptrace(GETREGS, self.tid, ctypes.addressof(registers))
        return registers

    @registers.setter
    def registers(self, registers: Registers) -> None:
        _ptrace(SETREGS, self.tid, ctypes.addressof(registers))

    @contextlib.contextmanager
    def run_to(self, address: int) -> Iterator[None]:
        """Let it run during the block, until it comes by `address`; no other thread may come by there."""
        original = peek(self.pid, address, 1)
        poke(self.pid, address, BREAKPOINT)
        try:
            _ptrace(CONT, self.tid)
            yield
            self._wait()
        except BaseException:
            _ptrace(INTERRUPT, self.tid)
            self._wait()
            raise
        finally:
            poke(self.pid, address, original)
            registers = self.registers
            if registers.rip == address + len(BREAKPOINT):
                registers.rip = address
                self.registers = registers

    def call_first(self, function: int, *arguments: int) -> None:
        """When it goes on, it calls `function` before it does what it stands at: right after a call."""
        registers = self.registers
        registers.rsp -= 8
        poke(self.pid, registers.rsp, struct.pack("<Q", registers.rip))
        for name, value in zip(("rdi", "rsi", "rdx"), arguments):
            setattr(registers, name, value)
        registers.rip = function
        self.registers = registers

    def release(self) -> None:
        """Let go of it."""
        _ptrace(DETACH, self.tid)


@contextlib.contextmanager
def held_thread(pid: int, tid: int) -> Iterator[HeldThread]:
    """The thread stands still for the time of the block; a sleeping system call is resumed after it."""
    thread = HeldThread(pid, tid)
    try:
        yield thread
    finally:
        with contextlib.suppress(LabError, ProcessLookupError):
            thread.release()


def _ptrace(request: int, tid: int, data: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, tid, None, data) < 0:
        raise LabError(f"ptrace of thread {tid} failed: {os.strerror(ctypes.get_errno())}")
