"""The registers of every thread of a process, all at one moment: the one place that stops a process.

Knows: ptrace(2). The threads stand still from the first PTRACE_INTERRUPT to the last PTRACE_DETACH, a few
milliseconds; whatever `during` reads is read in that time. A thread that cannot be stopped (it sleeps in
the kernel without listening) is waited for only briefly; what /proc shows of it must do. The kernel lets
every thread go when its tracer ends, so nothing stays stopped, not even after a kill -9: the tracer is a
thread of its own that ends at once.

A system call that is interrupted so goes on by itself, but epoll_wait and io_uring_enter return EINTR: a
loop that sleeps in one of these comes round once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Generic, TypeVar

from tracer.errors import HostError, NotPermitted
from tracer.machine import HOST, X86_64
from tracer.records import dataclass
from tracer.target import Target, Thread, ended, read_text

PTRACE_DETACH, PTRACE_GETREGSET, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4204, 0x4206, 0x4207
NT_PRSTATUS, NT_PRFPREG = 1, 2
WALL = 0x40000000
#: How long threads are waited for that do not stop; seconds.
PATIENCE_S = 0.1
POLL_S = 0.0001
SVC_SIZE = 4  # of the instruction of a system call, aarch64

T = TypeVar("T")


@dataclass(frozen=True)
class ThreadRegisters:
    """One thread's registers by the names of user_regs_struct; `floating` is NT_PRFPREG, empty if unknown.

    `partial`: the thread could not be stopped, and only what /proc shows is there; all others are 0.
    """

    tid: int
    values: Mapping[str, int]
    floating: bytes = b""
    partial: bool = False


@dataclass(frozen=True)
class Taken(Generic[T]):
    """Every thread's registers, what was read at the same time, and how long that took."""

    threads: tuple[ThreadRegisters, ...]
    read: T
    stopped_s: float


def take_registers(target: Target, during: Callable[[tuple[ThreadRegisters, ...]], T]) -> Taken[T]:
    """Stop all threads, take their registers, run `during` with them, let all go.

    Raises NotPermitted, HostError (a debugger is there already) or TargetExited.
    """
    task: _Task[T] = _Task(target, during)
    thread = threading.Thread(target=task.run, name="registers")
    thread.start()
    thread.join()
    if task.error is not None:
        raise task.error
    assert task.taken is not None
    return task.taken


@dataclass
class _Task(Generic[T]):
    """The work of the thread that traces."""

    target: Target
    during: Callable[[tuple[ThreadRegisters, ...]], T]
    taken: Taken[T] | None = None
    error: BaseException | None = None
    _libc: ctypes.CDLL = field(default_factory=lambda: ctypes.CDLL(None, use_errno=True))

    def run(self) -> None:
        self._libc.ptrace.restype = ctypes.c_long
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        try:
            self.taken = self._take()
        except BaseException as error:
            self.error = error

    def _take(self) -> Taken[T]:
        seized = self._seize_all()
        began = time.monotonic()
        stopped: list[int] = []
        try:
            for tid in seized:
                self._ptrace(PTRACE_INTERRUPT, tid)
            stopped = self._wait(seized)
            threads = tuple(self._read(tid, tid in stopped) for tid in self._present(seized))
            if not threads:
                raise ended(self.target.pid)
            read = self.during(threads)
        finally:
            for tid in stopped:
                self._ptrace(PTRACE_DETACH, tid)
        return Taken(threads, read, time.monotonic() - began)

    def _seize_all(self) -> list[int]:
        """Seizing stops nothing. Threads that begin meanwhile are seized as well."""
        seized: list[int] = []
        for _ in range(8):
            new = [thread.tid for thread in self.target.threads() if thread.tid not in seized]
            if not new:
                break
            seized += [tid for tid in new if self._seize(tid)]
        if not seized:
            raise ended(self.target.pid)
        return seized

    def _seize(self, tid: int) -> bool:
        number = self._ptrace(PTRACE_SEIZE, tid)
        if number == errno.ESRCH:
            return False
        if number:
            raise self._refused(number)
        return True

    def _refused(self, number: int) -> HostError:
        pid = self.target.pid
        tracer = _tracer_of(pid)
        if tracer:
            return HostError(
                f"the registers of process {pid} cannot be taken: process {tracer} traces it already (a debugger?)",
                f"end process {tracer}, or leave --save away",
            )
        return NotPermitted(
            f"the registers of process {pid} may not be taken: {os.strerror(number)}",
            f"sudo aio-trace inspect --pid {pid}",
        )

    def _wait(self, tids: list[int]) -> list[int]:
        """The threads that stand still now."""
        stopped: list[int] = []
        waiting = list(tids)
        end = time.monotonic() + PATIENCE_S
        while waiting and time.monotonic() < end:
            for tid in list(waiting):
                try:
                    found, status = os.waitpid(tid, WALL | os.WNOHANG)
                except ChildProcessError:
                    waiting.remove(tid)
                    continue
                if found:
                    waiting.remove(tid)
                    if os.WIFSTOPPED(status):
                        stopped.append(tid)
            if waiting and all(_uninterruptible(self.target.thread(tid)) for tid in waiting):
                break
            if waiting:
                time.sleep(POLL_S)
        return stopped

    def _present(self, tids: list[int]) -> list[int]:
        return [tid for tid in tids if os.path.exists(f"/proc/{self.target.pid}/task/{tid}")]

    def _read(self, tid: int, stopped: bool) -> ThreadRegisters:
        if stopped:
            size = 8 * len(HOST.registers)
            data = self._register_set(tid, NT_PRSTATUS, size)
            if len(data) == size:
                words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
                floating = self._register_set(tid, NT_PRFPREG, HOST.floating_size)
                return ThreadRegisters(tid, dict(zip(HOST.registers, words)), floating)
        return _from_proc(tid, self.target.thread(tid))

    def _register_set(self, tid: int, kind: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), size)
        if self._ptrace(PTRACE_GETREGSET, tid, kind, ctypes.addressof(vector)):
            return b""
        return buffer.raw[: vector[1]]

    def _ptrace(self, request: int, tid: int, address: int = 0, data: int = 0) -> int:
        """0, or the errno."""
        ctypes.set_errno(0)
        return ctypes.get_errno() if self._libc.ptrace(request, tid, address, data) == -1 else 0


def _uninterruptible(thread: Thread | None) -> bool:
    return thread is not None and thread.state == "D"


def _from_proc(tid: int, thread: Thread | None) -> ThreadRegisters:
    """What /proc/PID/task/TID/syscall shows, as registers of a system call that was interrupted."""
    values = dict.fromkeys(HOST.registers, 0)
    call = thread.syscall if thread else None
    if HOST is X86_64:
        values["orig_rax"] = (1 << 64) - 1
    if call is not None and HOST is X86_64:
        values |= dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), call.args))
        values |= {"orig_rax": call.number, "rax": (1 << 64) - 4, "rip": call.pc, "rsp": call.sp}
    elif call is not None:  # at its instruction, where one stands that is to be made again
        values |= {f"x{number}": value for number, value in enumerate(call.args)}
        values |= {"x8": call.number, "pc": call.pc - SVC_SIZE, "sp": call.sp}
    return ThreadRegisters(tid, values, partial=True)


def _tracer_of(pid: int) -> int:
    try:
        found = re.search(r"^TracerPid:\s*(\d+)", read_text(f"/proc/{pid}/status"), re.M)
    except OSError:
        return 0
    return int(found[1]) if found else 0
