"""What one hit of a probe costs on this host, measured on a few instructions of our own.

Knows: how to call code that stands in a file in memory, with an empty probe and without. The target is not
touched. Does not know what is made of the figure.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tracer import kernel
from tracer.records import dataclass

ROUNDS, CALLS = 5, 400
#: What our programs do at a hit, over an empty one (docs/cost.md), and a hit where it cannot be measured; ns.
PROGRAM_NS, ASSUMED_NS = 150.0, 1500.0

# long loop(int n) { do { callee(); } while (--n); } with the places of the call, which is what QEMU has at a cheap
# site, and of the decrement, over which the kernel must step.
_CODE = {
    # call +5; dec %edi; jnz -9; ret; (callee) ret
    "x86_64": (bytes.fromhex("e805000000ffcf75f7c3c3"), 0, 5),
    # stp x29, x30, [sp, -16]!; bl +20; subs w0, w0, 1; b.ne -8; ldp x29, x30, [sp], 16; ret; (callee) ret
    "aarch64": (
        struct.pack("<7I", 0xA9BF7BFD, 0x94000005, 0x71000400, 0x54FFFFC1, 0xA8C17BFD, 0xD65F03C0, 0xD65F03C0),
        4,
        8,
    ),
}


@dataclass(frozen=True)
class OwnCode:
    """Code of ours in a file in memory: its path, where probes can be, and the loop that passes them."""

    path: str
    emulated: int  # offset in the file of an instruction that the kernel emulates
    stepped: int  # and of one over which it steps
    loop: Callable[[int], int]  # passes both so many times


@contextmanager
def own_code() -> Iterator[OwnCode]:
    """It is there for the time of the block. Raises OSError, also on a machine for which there is none."""
    if platform.machine() not in _CODE:
        raise OSError(errno.ENOSYS, f"there is no code for {platform.machine()}")
    code, emulated, stepped = _CODE[platform.machine()]
    file = os.memfd_create("aio-trace")
    try:
        os.write(file, code)
        with mmap.mmap(file, len(code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC):
            loop = ct.CFUNCTYPE(ct.c_long, ct.c_int)(_address_of(file))
            yield OwnCode(f"/proc/self/fd/{file}", emulated, stepped, loop)
    finally:
        os.close(file)


def measure(cheap: bool = True) -> float | None:
    """ns of CPU time that an empty probe adds; None where that cannot be measured. Takes some 50 ms.

    `cheap`: on an instruction that the kernel emulates.
    """
    try:
        with own_code() as code:
            before = _best(code.loop)
            probed = _probed(code.path, code.emulated if cheap else code.stepped, code.loop)
        return max(0.0, probed - before)
    except (OSError, ValueError, AttributeError):
        return None


def _address_of(file: int) -> int:
    """Where the file is mapped: Python does not tell of what it cannot write to."""
    inode = b"%d" % os.fstat(file).st_ino
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            words = line.split()
            if words[4] == inode and b"memfd:aio-trace" in line:
                return int(words[0].split(b"-")[0], 16)
    raise OSError("the code is not mapped")


def _probed(path: str, site: int, loop: Callable[[int], int]) -> float:
    multi = kernel.has_multi()
    program = kernel.load(kernel.RETURN_0, multi)
    try:
        pid = os.getpid()
        attach = (
            kernel.attach_multi(program, path, [site], pid) if multi else kernel.attach_perf(program, path, site, pid)
        )
        try:
            return _best(loop)
        finally:
            os.close(attach)
    finally:
        os.close(program)


def _best(loop: Callable[[int], int]) -> float:
    """ns a call; the quickest of some rounds, since others use the processor, too."""
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time_ns()
        loop(CALLS)
        times.append((time.thread_time_ns() - start) / CALLS)
    return min(times)
