"""A probe that counts, on a few instructions of our own: proof that this kernel does what a trace needs.

Knows: a map, a program and an attachment such as those of a trace, in the way this kernel has them, and how far it
got. Touches no other process, and nothing stays. Does not know QEMU, or how it is told.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack

from tracer import kernel
from tracer.hit_cost import OwnCode, own_code
from tracer.kernel import Map
from tracer.records import dataclass

CALLS = 100
MAP, LOAD, CODE, ATTACH, HIT = "map", "load", "code", "attach", "hit"
_ARRAY = 2
#: As much as a trace takes: before Linux 5.11 that counts as locked memory, of which little may be allowed.
_ENTRIES = 1 << 16


@dataclass(frozen=True)
class Trial:
    """How far it got: `failed` is the step that failed (None: none did), and why; `words` are the verifier's.

    `multi`: attached by one uprobe_multi link, not by perf events; None where it did not get there.
    """

    failed: str | None
    error: OSError | None
    words: str
    multi: bool | None


def run() -> Trial:
    """Make a map, load a program, attach it to our own code, run that, and see each run counted."""
    step, multi = MAP, None
    try:
        with ExitStack() as undo:
            counts = Map(_ARRAY, 4, 8, _ENTRIES, 0)
            undo.callback(counts.close)
            step = LOAD
            multi = kernel.has_multi()
            program = kernel.load(_counting(counts.fd), multi)
            undo.callback(os.close, program)
            step = CODE
            code = undo.enter_context(own_code())
            step = ATTACH
            link = _attach(program, code, multi)
            undo.callback(os.close, link)
            step = HIT
            code.loop(CALLS)
            seen = int.from_bytes(counts.lookup(bytes(4)) or b"", "little")
            if seen != CALLS:
                raise OSError(0, f"{seen} of {CALLS} hits were counted")
    except OSError as error:
        return Trial(step, error, "\n".join(getattr(error, "__notes__", ())), multi)
    return Trial(None, None, "", multi)


def _attach(program: int, code: OwnCode, multi: bool) -> int:
    if multi:
        return kernel.attach_multi(program, code.path, [code.emulated], os.getpid())
    return kernel.attach_perf(program, code.path, code.emulated, os.getpid())


def _counting(map_fd: int) -> bytes:
    """A program that adds 1 to the first entry of an array; include/uapi/linux/bpf.h."""
    lines = (
        (0x62, 10, -4, 0),  # *(u32 *)(r10 - 4) = 0
        (0x18, 0x11, 0, map_fd),  # r1 = the map
        (0, 0, 0, 0),
        (0xBF, 0xA2, 0, 0),  # r2 = r10
        (0x07, 2, 0, -4),  # r2 += -4
        (0x85, 0, 0, 1),  # r0 = bpf_map_lookup_elem(r1, r2)
        (0x15, 0, 2, 0),  # if r0 == 0 skip 2
        (0xB7, 1, 0, 1),  # r1 = 1
        (0xDB, 0x10, 0, 0),  # lock *(u64 *)r0 += r1
        (0xB7, 0, 0, 0),  # r0 = 0
        (0x95, 0, 0, 0),  # exit
    )
    return b"".join(struct.pack("<BBhi", *line) for line in lines)
