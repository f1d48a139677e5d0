"""One call of one function of one argument inside a running process, as if a signal had come.

Knows: ptrace and the signal frame of Linux on x86-64. Does not know QEMU. The thread is stopped in a system
call that can be restarted; below its stack a frame is laid such as the kernel makes for a signal handler,
and its registers are set to run the function. What the function returns to is the C library's own way out
of signal handlers, rt_sigreturn, which gives the thread back every register and starts the system call
again. So nothing has to be waited for or undone: the registers change in one system call of ours, before it
nothing has happened, after it all will happen, and being killed at any point does no harm.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tracer.errors import FaultError, InjectionRefused
from tracer.memory import LiveMemory
from tracer.records import dataclass
from tracer.target import Region, Target

PTRACE_SETREGS, PTRACE_GETREGS, PTRACE_DETACH, PTRACE_CONT = 13, 12, 17, 7
PTRACE_GETREGSET, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_GETSIGMASK = 0x4204, 0x4206, 0x4207, 0x420A
PTRACE_EVENT_STOP = 128
NT_X86_XSTATE = 0x202
WALL = 0x40000000
SIGTRAP = 5

# struct user_regs_struct, arch/x86/include/uapi/asm/ptrace.h
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
# struct sigcontext_64, arch/x86/include/uapi/asm/sigcontext.h
SIGCONTEXT = (
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx"),
    *("rsp", "rip", "eflags"),
)
UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS = 1, 2, 4
FP_XSTATE_MAGIC1, FP_XSTATE_MAGIC2 = 0x46505853, 0x46505845
XSTATE_SW_RESERVED, XSTATE_LEAST = 464, 576  # of the XSAVE area: where software may write; with its header
#: do_sigaltstack() refuses these flags and leaves the thread's alternate stack as it is.
SS_LEAVE_ALONE = 4
UCONTEXT_SIZE, SIGINFO_SIZE = 304, 128

# What the kernel leaves in rax of a system call that it would start again; include/linux/errno.h.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
EINTR = 4
RESTARTED = frozenset((-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND))
SYSCALL_SIZE = 2  # bytes of the instruction
# poll, ppoll, epoll_wait, epoll_pwait, io_uring_enter, epoll_pwait2: what an event loop sleeps in.
LOOP_CALLS = frozenset((7, 271, 232, 281, 426, 441))

RED_ZONE = 128
#: Stack that must be there below the thread's own: the frame, and what the function needs.
STACK_NEEDED = 32 << 10
FLAG_TRAP, FLAG_DIRECTION = 1 << 8, 1 << 10
#: mov $15,%rax; syscall: __restore_rt of glibc and musl, of which debuggers know the very bytes.
RESTORER = bytes.fromhex("48c7c00f0000000f05")
STOP_TIMEOUT_S = 2.0
POLL_S = 20e-6
ATTEMPTS = 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@dataclass(frozen=True)
class Call:
    """What to run: the function's address in the process and its one argument."""

    function: int
    argument: int


@dataclass(frozen=True)
class Pause:
    """What the call cost: for how long the thread stood still; seconds.

    Not counted is the time that it took, asleep until then, to get a processor to stop on.
    """

    tid: int
    seconds: float


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def check_machine(target: Target) -> None:
    """Raise InjectionRefused where a call cannot be made at all."""
    if platform.machine() != "x86_64":
        raise InjectionRefused(f"--force is for x86-64 only, not for {platform.machine()}")
    text = _status(target.pid)
    tracer = re.search(r"^TracerPid:\s*(\d+)", text, re.M)
    if tracer and int(tracer[1]):
        raise InjectionRefused(f"process {target.pid} is being debugged by process {tracer[1]}", "end the debugger")
    if re.search(r"^x86_Thread_features:.*\bshstk\b", text, re.M):
        raise InjectionRefused(f"process {target.pid} runs with a shadow stack; no call can be put into it")


def _status(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return file.read()
    return ""


def find_restorer(target: Target, memory: LiveMemory) -> int:
    """Where the C library returns from signal handlers; InjectionRefused if that is not found."""
    code = [region for region in target.regions() if "x" in region.permissions and region.path]
    code.sort(key=lambda region: not re.search(r"/(libc[.-]|ld-musl)", region.path))
    for region in code:
        with suppress(FaultError):
            at = memory.read(region.start, region.size).find(RESTORER)
            if at >= 0:
                return region.start + at
    raise InjectionRefused("the C library's way out of signal handlers was not found in the process")


def call_in_thread(target: Target, memory: LiveMemory, tid: int, call: Call, check: Callable[[], None]) -> Pause:
    """Run `call` in the thread, which must be asleep in the poll of its event loop, and let go of it.

    `check` runs while the thread stands still, right before the call; what it raises forbids the call. The
    thread is on its way when this returns; what came of it is for the caller to see. Only the one
    thread stands still. Raises InjectionRefused; then nothing was called.
    """
    check_machine(target)
    restorer = find_restorer(target, memory)
    regions = target.regions()
    for _ in range(ATTEMPTS):
        pause = _attempt(target, tid, call, check, restorer, regions)
        if pause is not None:
            return pause
        time.sleep(0.01)
    raise InjectionRefused(f"thread {tid} was never found asleep in its poll in {ATTEMPTS} attempts")


def _attempt(
    target: Target, tid: int, call: Call, check: Callable[[], None], restorer: int, regions: list[Region]
) -> Pause | None:
    with _undisturbed(), _Stopped(target, tid) as thread:
        registers = thread.registers()
        if not thread.still or registers["orig_rax"] not in LOOP_CALLS:
            return None
        check()
        frame, stack = _frame(registers, thread.signal_mask(), thread.xstate(), restorer)
        _check_stack(regions, stack, registers["rsp"])
        thread.write(stack, frame)
        changed = registers | {
            "rsp": stack,
            "rip": call.function,
            "rdi": call.argument,
            "rax": 0,
            "orig_rax": (1 << 64) - 1,
            "eflags": registers["eflags"] & ~(FLAG_TRAP | FLAG_DIRECTION),
        }
        thread.set_registers(changed)
    return Pause(tid, thread.pause_s)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No other program of the host comes between the steps, and no garbage collection, so that the pause is short."""
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)
        if collecting:
            gc.enable()


def _check_stack(regions: list[Region], bottom: int, top: int) -> None:
    for region in regions:
        if region.start <= bottom and top < region.end and "w" in region.permissions:
            if bottom - region.start >= STACK_NEEDED:
                return
            break
    raise InjectionRefused("there is too little room on the thread's stack")


def _frame(registers: dict[str, int], mask: int, xstate: bytes, restorer: int) -> tuple[bytes, int]:
    """struct rt_sigframe (arch/x86/include/asm/sigframe.h) with its FPU state, and where it is to stand.

    It brings the thread back to where it was: at the system call, about to make it.
    """
    state = _fpu_state(xstate)
    fpu_at = (registers["rsp"] - RED_ZONE - len(state)) & ~63
    # A function finds its stack as a call leaves it: 8 short of a multiple of 16.
    start = ((fpu_at - 8 - UCONTEXT_SIZE - SIGINFO_SIZE) & ~15) - 8
    restored = registers | _resumed(registers)
    words = struct.pack("<18Q", *(restored[name] for name in SIGCONTEXT))
    selectors = struct.pack("<4H", restored["cs"] & 0xFFFF, restored["gs"] & 0xFFFF, restored["fs"] & 0xFFFF,
                            restored["ss"] & 0xFFFF)  # fmt: skip
    context = words + selectors + struct.pack("<4Q", 0, 0, 0, 0) + struct.pack("<Q", fpu_at) + bytes(64)
    flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    ucontext = struct.pack("<QQQiiQ", flags, 0, 0, SS_LEAVE_ALONE, 0, 0) + context + struct.pack("<Q", mask)
    body = struct.pack("<Q", restorer) + ucontext
    return body + bytes(fpu_at - start - len(body)) + state, start


def _fpu_state(xstate: bytes) -> bytes:
    """The thread's FPU state as the kernel lays it on the stack of a signal handler."""
    (features,) = struct.unpack_from("<Q", xstate, XSTATE_SW_RESERVED)
    size = len(xstate)
    reserved = struct.pack("<IIQI7I", FP_XSTATE_MAGIC1, size + 4, features, size, *[0] * 7)
    head, tail = xstate[:XSTATE_SW_RESERVED], xstate[XSTATE_SW_RESERVED + len(reserved) :]
    return head + reserved + tail + struct.pack("<I", FP_XSTATE_MAGIC2)


def _resumed(registers: dict[str, int]) -> dict[str, int]:
    """rax and rip as the kernel sets them after a signal handler: the system call again, or its EINTR."""
    result = registers["rax"] - (1 << 64) if registers["rax"] >> 63 else registers["rax"]
    if result in RESTARTED:
        return {"rax": registers["orig_rax"], "rip": registers["rip"] - SYSCALL_SIZE}
    if result == -ERESTART_RESTARTBLOCK:  # poll(2): rt_sigreturn ends what restart_syscall would continue
        return {"rax": (1 << 64) - EINTR}
    return {}


class _Stopped:
    """One thread that stands still for the time of the block; it goes on afterwards whatever happens."""

    def __init__(self, target: Target, tid: int) -> None:
        self._target = target
        self._tid = tid
        self._stood = 0.0
        self._signal = 0
        self.still = False
        self.pause_s = 0.0

    def __enter__(self) -> _Stopped:
        self._ptrace(PTRACE_SEIZE)
        try:
            self._ptrace(PTRACE_INTERRUPT)
            self._wait()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()

    def _detach(self) -> None:
        # A thread that does not stand cannot be let go; it is let go when we end.
        with suppress(InjectionRefused):
            self._ptrace(PTRACE_DETACH, data=self._signal)
        self.pause_s = time.monotonic() - self._stood

    def _wait(self) -> None:
        """Wait until it stands. If a signal came first it is handed on, and `still` stays False."""
        end = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < end:
            pid, status = os.waitpid(self._tid, WALL | os.WNOHANG)
            if not pid:
                time.sleep(POLL_S)  # it needs a processor to stop on, which may be ours
                continue
            self._stood = time.monotonic()
            if not os.WIFSTOPPED(status):
                raise InjectionRefused(f"thread {self._tid} ended")
            if status >> 16 != PTRACE_EVENT_STOP:
                self._signal = os.WSTOPSIG(status)
            elif os.WSTOPSIG(status) == SIGTRAP:
                self.still = True
            return
        raise InjectionRefused(f"thread {self._tid} could not be stopped within {STOP_TIMEOUT_S:g} s")

    def registers(self) -> dict[str, int]:
        values = (ctypes.c_uint64 * len(REGISTERS))()
        self._ptrace(PTRACE_GETREGS, data=ctypes.addressof(values))
        return dict(zip(REGISTERS, values, strict=True))

    def set_registers(self, registers: dict[str, int]) -> None:
        values = (ctypes.c_uint64 * len(REGISTERS))(*(registers[name] for name in REGISTERS))
        self._ptrace(PTRACE_SETREGS, data=ctypes.addressof(values))

    def signal_mask(self) -> int:
        mask = ctypes.c_uint64()
        self._ptrace(PTRACE_GETSIGMASK, 8, ctypes.addressof(mask))
        return mask.value

    def xstate(self) -> bytes:
        """The XSAVE area, as large as this processor's."""
        buffer = ctypes.create_string_buffer(64 << 10)
        vector = _Vector(ctypes.addressof(buffer), len(buffer))
        self._ptrace(PTRACE_GETREGSET, NT_X86_XSTATE, ctypes.addressof(vector))
        if vector.size < XSTATE_LEAST:
            raise InjectionRefused("the thread's floating-point state could not be read")
        return buffer.raw[: vector.size]

    def write(self, address: int, data: bytes) -> None:
        """To the thread's own stack, where nothing stands."""
        try:
            with open(f"/proc/{self._target.pid}/mem", "wb", buffering=0) as file:
                written = os.pwrite(file.fileno(), data, address)
        except OSError as error:
            raise InjectionRefused(f"the thread's stack cannot be written to: {error.strerror}") from error
        if written != len(data):
            raise InjectionRefused("the thread's stack cannot be written to")

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self._tid, address, data) == -1:
            number = ctypes.get_errno()
            if number == errno.EPERM:
                raise InjectionRefused(
                    f"thread {self._tid} may not be stopped: no root, or a debugger has it",
                    "end the debugger, use sudo",
                )
            raise InjectionRefused(f"thread {self._tid} cannot be stopped: {os.strerror(number)}")


@contextmanager
def stopped_thread(target: Target, tid: int) -> Iterator[None]:
    """One thread stands still for the time of the block, all others go on."""
    with _Stopped(target, tid):
        yield
