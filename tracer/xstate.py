"""A thread's extended processor state (x87, SSE, AVX, AVX-512, AMX) as Linux lays it into signal frames.

Knows: the XSAVE area of x86-64, in the standard format that PTRACE_GETREGSET gives and signal frames have, and
which part of it belongs into the frame of one thread. PTRACE_GETREGSET gives room for all that the processor
has; a thread's own frames have none for a state that the kernel gives on demand (AMX's tiles) until the thread
first uses it. rt_sigreturn (arch/x86/kernel/fpu/signal.c) takes a frame that claims more room than that for one
of the old kind, restores the first 512 bytes, clears the rest, and says nothing. Does not know ptrace.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
from collections.abc import Callable, Iterator, Mapping

from tracer.errors import InjectionRefused
from tracer.records import dataclass

FP_XSTATE_MAGIC1, FP_XSTATE_MAGIC2 = 0x46505853, 0x46505845
#: Of the XSAVE area: where software may write, its header, and where that ends; bytes.
SW_RESERVED, HEADER, EXTENDED = 464, 512, 576
#: The first two states, x87 and SSE, have no area of their own.
LEGACY = 3
#: What says nothing: the last floating-point instruction's and operand's place, which processors keep or not as
#: they like, and what is reserved.
_POINTERS = slice(6, 24)
_REGISTERS_END = 416

# void cpuid(unsigned leaf, unsigned subleaf, unsigned result[4]): push %rbx; mov %edi,%eax; mov %esi,%ecx;
# mov %rdx,%r8; cpuid; mov %eax,(%r8); mov %ebx,4(%r8); mov %ecx,8(%r8); mov %edx,12(%r8); pop %rbx; ret
_CPUID = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")
_XSAVE_LEAF = 0xD
_SUPERVISOR, _ON_DEMAND = 1 << 0, 1 << 2  # of ecx


@dataclass(frozen=True)
class Area:
    """Where one state stands in the XSAVE area, bytes; `on_demand`: a thread has it only once it has used it."""

    offset: int
    size: int
    on_demand: bool


def area_of(eax: int, ebx: int, ecx: int) -> Area | None:
    """What cpuid(0xd, NUMBER) says about state NUMBER; None where there is none, or it is the kernel's own."""
    if not eax or ecx & _SUPERVISOR:
        return None
    return Area(ebx, eax, bool(ecx & _ON_DEMAND))


def areas() -> Mapping[int, Area]:
    """The states of this processor by their number, from 2 on. Raises InjectionRefused where it does not tell."""
    if platform.machine() != "x86_64":
        raise InjectionRefused(f"{platform.machine()} has no XSAVE area")
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(_CPUID)
            return _areas(page)
    except OSError as error:
        why = "what the processor's registers are cannot be asked: no memory for code may be had here"
        raise InjectionRefused(why) from error


def _areas(page: mmap.mmap) -> Mapping[int, Area]:
    held = ctypes.c_char.from_buffer(page)
    try:
        cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(ctypes.addressof(held))
        found = {number: area for number in range(2, 63) if (area := _asked(cpuid, number)) is not None}
    finally:
        del held  # or the page could not be given back
    return found


def _asked(cpuid: Callable[[int, int, ctypes.Array[ctypes.c_uint32]], object], number: int) -> Area | None:
    result = (ctypes.c_uint32 * 4)()
    cpuid(_XSAVE_LEAF, number, result)
    return area_of(*result[:3])


def signal_state(regset: bytes, known: Mapping[int, Area]) -> bytes:
    """What of a thread's NT_X86_XSTATE belongs into a signal frame of this thread, with the frame's own marks.

    Its features and size are those of the frames that the kernel lays for this thread. Where the thread has
    given back what it had on demand the kernel's would be larger; it takes this one as well, and the state is
    none in either. Raises InjectionRefused for what could not be restored whole.
    """
    if len(regset) < EXTENDED:
        raise InjectionRefused("the thread's floating-point state could not be read")
    (features,) = struct.unpack_from("<Q", regset, SW_RESERVED)
    used, compacted = struct.unpack_from("<QQ", regset, HEADER)
    if compacted or used & ~(features | LEGACY):
        raise InjectionRefused(f"the thread's floating-point state is of an unknown kind: {used:#x} of {features:#x}")
    features = _of_this_thread(features, used, known)
    size = max((known[number].offset + known[number].size for number in _numbers(features)), default=EXTENDED)
    if size > len(regset):
        raise InjectionRefused(f"the thread's floating-point state has {len(regset)} bytes, not the {size} it needs")
    marks = struct.pack("<IIQI7I", FP_XSTATE_MAGIC1, size + 4, features, size, *[0] * 7)
    header = struct.pack("<Q", used | LEGACY)
    rest = regset[HEADER + len(header) : size]
    return regset[:SW_RESERVED] + marks + header + rest + struct.pack("<I", FP_XSTATE_MAGIC2)


def _of_this_thread(features: int, used: int, known: Mapping[int, Area]) -> int:
    """The features without those that the thread does not have because it does not use them."""
    for number in _numbers(features):
        if number not in known:
            raise InjectionRefused(f"the processor does not tell about its state {number}; it could not be restored")
        if known[number].on_demand and not used >> number & 1:
            features &= ~(1 << number)
    return features


def _numbers(features: int) -> Iterator[int]:
    """The states that have an area of their own."""
    return (number for number in range(2, 64) if features >> number & 1)


def same_state(one: bytes, other: bytes) -> bool:
    """Whether two readings of NT_X86_XSTATE have the same in every register."""
    return _registers(one) == _registers(other)


def _registers(regset: bytes) -> tuple[bytes, ...]:
    return regset[: _POINTERS.start], regset[_POINTERS.stop : _REGISTERS_END], regset[EXTENDED:]
