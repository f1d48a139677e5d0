"""One call of one function of one argument inside a running process, as if a signal had come.

Knows: ptrace and the signal frame of Linux on x86-64. Does not know QEMU. The thread is stopped in a system
call that can be restarted; below its stack a frame is laid such as the kernel makes for a signal handler,
and its registers are set to run the function. What the function returns to is the C library's own way out
of signal handlers, rt_sigreturn, which gives the thread back every register and starts the system call
again. So nothing has to be undone: the registers change in one system call of ours, before it
nothing has happened, after it all will happen, and being killed at any point does no harm.

The frame proves itself first: the thread is sent through it without any call, stopped at the end of rt_sigreturn,
and every register is compared with what it was. Only then the call is made, from that very stop.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import platform
import re
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from tracer import xstate
from tracer.errors import FaultError, InjectionRefused
from tracer.memory import LiveMemory
from tracer.records import dataclass
from tracer.target import Region, Target, read_text

PTRACE_SETREGS, PTRACE_GETREGS, PTRACE_DETACH, PTRACE_CONT = 13, 12, 17, 7
PTRACE_SYSCALL = 24
PTRACE_GETREGSET, PTRACE_SETREGSET, PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4204, 0x4205, 0x4206, 0x4207
PTRACE_GETSIGMASK, PTRACE_SETSIGMASK = 0x420A, 0x420B
PTRACE_O_TRACESYSGOOD = 1
PTRACE_EVENT_STOP = 128
NT_X86_XSTATE = 0x202
WALL = 0x40000000
SIGTRAP = 5
#: How waitpid shows the beginning or the end of a system call.
AT_SYSCALL = SIGTRAP | 0x80

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
NO_SYSCALL = (1 << 64) - 1  # in orig_rax: none that is to be started again
#: mov $15,%rax; syscall: __restore_rt of glibc and musl, of which debuggers know the very bytes.
RESTORER = bytes.fromhex("48c7c00f0000000f05")
#: How much of a mapping of code is searched for it, bytes, and how many mappings.
LARGEST_CODE, MOST_CODE = 64 << 20, 1000
STOP_TIMEOUT_S = 2.0
#: Signals that are to end us; they are held back while a thread stands still.
ENDINGS = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
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
    with suppress(OSError):
        return read_text(f"/proc/{pid}/status")
    return ""


def find_restorer(target: Target, memory: LiveMemory) -> int:
    """Where the C library returns from signal handlers; InjectionRefused if that is not found."""
    code = [region for region in target.regions() if "x" in region.permissions and region.path]
    code.sort(key=lambda region: not re.search(r"/(libc[.-]|ld-musl)", region.path))
    for region in code[:MOST_CODE]:
        with suppress(FaultError):
            at = memory.read(region.start, min(region.size, LARGEST_CODE)).find(RESTORER)
            if at >= 0:
                return region.start + at
    raise InjectionRefused("the C library's way out of signal handlers was not found in the process")


def call_in_thread(
    target: Target,
    memory: LiveMemory,
    tid: int,
    call: Call,
    check: Callable[[], None],
    made: Callable[[], None] = lambda: None,
) -> Pause:
    """Run `call` in the thread, which must be asleep in the poll of its event loop, and let go of it.

    `check` runs while the thread stands still, before it is touched and right before the call; what it raises
    forbids the call. `made` runs once the call cannot be taken back, before any signal of ours is handled. The
    thread is on its way when this returns; what came of it is for the caller to see. Only the one
    thread stands still. Raises InjectionRefused; then nothing was called.
    """
    check_machine(target)
    means = _Means(find_restorer(target, memory), target.regions(), xstate.areas())
    for _ in range(ATTEMPTS):
        pause = _attempt(target, tid, call, check, made, means)
        if pause is not None:
            return pause
        time.sleep(0.01)
    raise InjectionRefused(f"thread {tid} was never found asleep in its poll in {ATTEMPTS} attempts")


@dataclass(frozen=True)
class _Means:
    """What a frame needs and can be known while the thread still runs."""

    restorer: int  # the address of the C library's way out of signal handlers
    regions: list[Region]
    areas: Mapping[int, xstate.Area]


def _attempt(
    target: Target, tid: int, call: Call, check: Callable[[], None], made: Callable[[], None], means: _Means
) -> Pause | None:
    with _undisturbed(), _Stopped(target, tid) as thread:
        registers = thread.registers()
        if not thread.still or registers["orig_rax"] not in LOOP_CALLS:
            return None
        check()
        held = _Held(registers, thread.signal_mask(), thread.xstate())
        frame, stack = _frame(held, means)
        _check_stack(means.regions, stack, held.registers["rsp"])
        thread.write(stack, frame)
        # As a handler returns: its ret has taken the address of the restorer from the stack.
        if not _rehearse(thread, held, _redirected(held.registers, stack + 8, means.restorer)):
            return None
        check()
        called = _redirected(held.registers, stack, call.function)
        thread.set_registers({**called, "rdi": call.argument})
        made()
    return Pause(tid, thread.pause_s)


def _redirected(registers: dict[str, int], stack: int, code: int) -> dict[str, int]:
    flags = registers["eflags"] & ~(FLAG_TRAP | FLAG_DIRECTION)
    return {**registers, "rsp": stack, "rip": code, "rax": 0, "orig_rax": NO_SYSCALL, "eflags": flags}


def _rehearse(thread: _Stopped, held: _Held, way_back: dict[str, int]) -> bool:
    """Send the thread through its frame to the end of rt_sigreturn; False if a signal came, which it handles first.

    Raises InjectionRefused where it did not get everything back from the frame; we give it that then.
    """
    thread.set_registers(way_back)
    if not (thread.to_syscall() and thread.to_syscall()):
        return False
    wrong = _spoiled(held, thread)
    if wrong is None:
        return True
    thread.set_xstate(held.xstate)
    thread.set_signal_mask(held.mask)
    thread.set_registers({**held.registers, **_resumed(held.registers), "orig_rax": NO_SYSCALL})
    left = _spoiled(held, thread)
    raise InjectionRefused(
        f"nothing was called: tried without a call, this kernel did not give thread {thread.tid} back {wrong}; "
        + ("they have been put back since" if left is None else f"nor could {left} be put back in another way")
    )


def _spoiled(held: _Held, thread: _Stopped) -> str | None:
    """What of the thread differs from what it had when it was to make its system call again; None: nothing."""
    expected = {**held.registers, **_resumed(held.registers), "orig_rax": NO_SYSCALL}
    now = thread.registers()
    names = [name for name in REGISTERS if now[name] != expected[name]]
    if names:
        return f"its registers ({', '.join(names)})"
    if thread.signal_mask() != held.mask:
        return "its signal mask"
    return None if xstate.same_state(thread.xstate(), held.xstate) else "its floating-point or vector registers"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No other program of the host comes between the steps, no garbage collection, so that the pause is short.

    Nor does Ctrl-C: whoever is interrupted knows whether the call was made.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
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
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _check_stack(regions: list[Region], bottom: int, top: int) -> None:
    for region in regions:
        if region.start <= bottom and top < region.end and "w" in region.permissions:
            if bottom - region.start >= STACK_NEEDED:
                return
            break
    raise InjectionRefused("there is too little room on the thread's stack")


@dataclass(frozen=True)
class _Held:
    """All that a thread has in registers, at the stop in which it was found asleep."""

    registers: dict[str, int]
    mask: int  # of its signals
    xstate: bytes  # as PTRACE_GETREGSET gives it


def _frame(held: _Held, means: _Means) -> tuple[bytes, int]:
    """struct rt_sigframe (arch/x86/include/asm/sigframe.h) with its FPU state, and where it is to stand.

    It brings the thread back to where it was: at the system call, about to make it.
    """
    state = xstate.signal_state(held.xstate, means.areas)
    fpu_at = (held.registers["rsp"] - RED_ZONE - len(state)) & ~63
    # A function finds its stack as a call leaves it: 8 short of a multiple of 16.
    start = ((fpu_at - 8 - UCONTEXT_SIZE - SIGINFO_SIZE) & ~15) - 8
    restored = {**held.registers, **_resumed(held.registers)}
    words = struct.pack("<18Q", *(restored[name] for name in SIGCONTEXT))
    selectors = struct.pack("<4H", restored["cs"] & 0xFFFF, restored["gs"] & 0xFFFF, restored["fs"] & 0xFFFF,
                            restored["ss"] & 0xFFFF)  # fmt: skip
    context = words + selectors + struct.pack("<4Q", 0, 0, 0, 0) + struct.pack("<Q", fpu_at) + bytes(64)
    flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    ucontext = struct.pack("<QQQiiQ", flags, 0, 0, SS_LEAVE_ALONE, 0, 0) + context + struct.pack("<Q", held.mask)
    body = struct.pack("<Q", means.restorer) + ucontext
    return body + bytes(fpu_at - start - len(body)) + state, start


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
        self.tid = tid
        self._stood = 0.0
        self._signal = 0
        self._memory: int | None = None
        self.still = False
        self.pause_s = 0.0

    def __enter__(self) -> _Stopped:
        self._ptrace(PTRACE_SEIZE, data=PTRACE_O_TRACESYSGOOD)
        try:
            self._prove()
            self._ptrace(PTRACE_INTERRUPT)
            stop = self._wait()
            self._stood = time.monotonic()
            self.still = stop >> 8 == PTRACE_EVENT_STOP and stop & 0xFF == SIGTRAP
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._detach()

    def _prove(self) -> None:
        """That the thread is the target's. It keeps its number from the moment it is seized, whatever becomes of it.

        Raises InjectionRefused or TargetExited, and the thread was not stopped.
        """
        try:
            self._memory = os.open(f"/proc/{self._target.pid}/task/{self.tid}/mem", os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            why = f"thread {self.tid} is none of process {self._target.pid} any more"
            raise InjectionRefused(why) from error
        except OSError as error:
            raise InjectionRefused(f"the thread's stack cannot be written to: {error.strerror}") from error
        self._target.check_alive()

    def _detach(self) -> None:
        # A thread that does not stand cannot be let go; it is let go when we end.
        with suppress(InjectionRefused):
            self._ptrace(PTRACE_DETACH, data=self._signal)
        self.pause_s = time.monotonic() - self._stood
        if self._memory is not None:
            os.close(self._memory)

    def to_syscall(self) -> bool:
        """Let it run to where its next system call begins, or the one that it is in ends.

        False if it stands before that: for a signal, which is then handed on when it is let go.
        """
        self._ptrace(PTRACE_SYSCALL)
        return self._wait() == AT_SYSCALL

    def _wait(self) -> int:
        """Wait until it stands: the signal, and above that the event. A signal of its own is kept for it."""
        end = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < end:
            pid, status = os.waitpid(self.tid, WALL | os.WNOHANG)
            if not pid:
                if signal.sigpending() & ENDINGS:
                    raise InjectionRefused("interrupted")  # which our own handler says once it may run
                time.sleep(POLL_S)  # it needs a processor to stop on, which may be ours
                continue
            if not os.WIFSTOPPED(status):
                raise InjectionRefused(f"thread {self.tid} ended")
            number, event = os.WSTOPSIG(status), status >> 16
            if not event and number != AT_SYSCALL:
                self._signal = number
            return number | event << 8
        raise InjectionRefused(f"thread {self.tid} could not be stopped within {STOP_TIMEOUT_S:g} s")

    def registers(self) -> dict[str, int]:
        values = (ctypes.c_uint64 * len(REGISTERS))()
        self._ptrace(PTRACE_GETREGS, data=ctypes.addressof(values))
        return dict(zip(REGISTERS, values))

    def set_registers(self, registers: dict[str, int]) -> None:
        values = (ctypes.c_uint64 * len(REGISTERS))(*(registers[name] for name in REGISTERS))
        self._ptrace(PTRACE_SETREGS, data=ctypes.addressof(values))

    def signal_mask(self) -> int:
        mask = ctypes.c_uint64()
        self._ptrace(PTRACE_GETSIGMASK, 8, ctypes.addressof(mask))
        return mask.value

    def set_signal_mask(self, mask: int) -> None:
        value = ctypes.c_uint64(mask)
        self._ptrace(PTRACE_SETSIGMASK, 8, ctypes.addressof(value))

    def xstate(self) -> bytes:
        """The XSAVE area, as large as this processor's."""
        buffer = ctypes.create_string_buffer(64 << 10)
        vector = _Vector(ctypes.addressof(buffer), len(buffer))
        self._ptrace(PTRACE_GETREGSET, NT_X86_XSTATE, ctypes.addressof(vector))
        return buffer.raw[: vector.size]

    def set_xstate(self, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state, len(state))
        vector = _Vector(ctypes.addressof(buffer), len(buffer))
        self._ptrace(PTRACE_SETREGSET, NT_X86_XSTATE, ctypes.addressof(vector))

    def write(self, address: int, data: bytes) -> None:
        """To the thread's own stack, where nothing stands."""
        assert self._memory is not None
        try:
            written = os.pwrite(self._memory, data, address)
        except OSError as error:
            raise InjectionRefused(f"the thread's stack cannot be written to: {error.strerror}") from error
        if written != len(data):
            raise InjectionRefused("the thread's stack cannot be written to")

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self.tid, address, data) == -1:
            number = ctypes.get_errno()
            if number == errno.EPERM:
                raise InjectionRefused(
                    f"thread {self.tid} may not be stopped: no root, or a debugger has it",
                    "end the debugger, use sudo",
                )
            raise InjectionRefused(f"thread {self.tid} cannot be stopped: {os.strerror(number)}")


@contextmanager
def stopped_thread(target: Target, tid: int) -> Iterator[None]:
    """One thread stands still for the time of the block, all others go on."""
    with _Stopped(target, tid):
        yield
