"""Cores of aarch64 processes, made here as the kernel makes them: threads, system calls, stacks.

The program is compiled for aarch64 and never run: its stack is laid by hand, each frame where the program's own
call frame information says. Return addresses bear signatures, as those of code with pointer authentication do.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import pytest

from tests.conftest import require
from tracer.core import CoreView
from tracer.corefile import (
    LOST_ARGUMENT,
    NT_AUXV,
    NT_FACTS,
    NT_FILE,
    NT_PRPSINFO,
    NT_PRSTATUS,
    OWN_NOTE,
    PT_LOAD,
    PT_NOTE,
)
from tracer.coroutines import STACK_SIZE as STACK_AND_GUARD
from tracer.coroutines import Coroutines
from tracer.eh_frame import OFFSET, UNDEFINED, FrameTable
from tracer.elf import Image
from tracer.errors import FaultError
from tracer.machine import AARCH64
from tracer.memory import PAGE
from tracer.target import AT_ENTRY, Region
from tracer.view import ProcessView, Stack

# As glibc 2.41 has it: the function with the system call saves nothing, its caller calls it at one place.
SOURCE = r"""
#define KEEP __attribute__((noinline))
extern long leaf(long number, void *set, long count);
volatile long sink;
__asm__(".globl leaf\n.type leaf, %function\nleaf:\n.cfi_startproc\nmov x8, x0\nmov x0, x1\nmov x1, x2\n"
        "svc #0\nret\n.cfi_endproc\n.size leaf, .-leaf\n");
KEEP long internal(long number, void *set) { long done = leaf(number, set, 1); return done + sink; }
KEEP long polled(void *set) { long done = internal(73, set); return done + sink; }
KEEP long outer(void) { char set[400]; sink = (long)set; return polled(set) + sink; }
__asm__(".globl _start\n.type _start, %function\n_start:\n.cfi_startproc\n.cfi_undefined x30\nbl outer\n"
        "mov x8, #93\nsvc #0\n.cfi_endproc\n.size _start, .-_start\n");
"""
CALLERS = ("_start", "outer", "polled", "internal", "leaf")
SIGNATURE = 0x2A5 << 52
STACK, STACK_SIZE = 0xFFFFF0000000, 1 << 16
PID, PPOLL, EINTR = 4711, 73, (1 << 64) - 4
SVC_AT = 3  # instructions of `leaf` ahead of the system call's


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("aarch64"), SOURCE)


def build(folder: Path, text: str, *options: str) -> Path:
    for tool in ("clang", "ld.lld"):
        require(shutil.which(tool), f"{tool} is not installed")
    source, binary = folder / "sleeper.c", folder / "sleeper"
    source.write_text(text)
    command = ["clang", "--target=aarch64-linux-gnu", "-O2", "-fasynchronous-unwind-tables", "-fno-omit-frame-pointer"]
    command += ["-mbranch-protection=standard", "-ffreestanding", "-nostdlib", "-fuse-ld=lld"]
    subprocess.run(
        [*command, *(options or ["-static"]), "-Wl,--build-id,--eh-frame-hdr", "-o", binary, source], check=True
    )
    return binary


def address_of(image: Image, name: str) -> int:
    return next(symbol.address for symbol in image.functions_named(name))


def code_of(image: Image, name: str) -> tuple[int, list[int]]:
    """Where a function starts, and its instructions."""
    bounds = image.bounds(address_of(image, name))
    assert bounds
    code = image.read(bounds.start, bounds.end - bounds.start)
    return bounds.start, [word for (word,) in struct.iter_unpack("<I", code)]


def behind_the_call(image: Image, caller: str, callee: str) -> int:
    """Behind the first `bl` in `caller` that calls `callee`."""
    start, words = code_of(image, caller)
    offset = (address_of(image, callee) - start) // 4
    at = next(at for at, word in enumerate(words) if word == 0x94000000 | (offset - at & 0x3FFFFFF))
    return start + 4 * at + 4


def frame_size(image: Image, name: str) -> int:
    """What a function takes off the stack pointer, by its code; in bytes."""
    for word in code_of(image, name)[1]:
        if word & 0xFFC003FF == 0xD10003FF:  # sub sp, sp, #
            return word >> 10 & 0xFFF
        if word & 0xFFC07FFF == 0xA9807BFD:  # stp x29, x30, [sp, #-]!
            return 8 * (128 - (word >> 15 & 0x7F))
    return 0


def lay(image: Image) -> tuple[bytes, dict[str, int]]:
    """The stack from _start down to the system call, and the registers there."""
    stack, frames = bytearray(STACK_SIZE), FrameTable(image)
    sp, frame_pointer, returns_to = STACK + STACK_SIZE - 256, 0, 0
    for at, caller in enumerate(CALLERS[:-1]):
        row = frames.row(behind_the_call(image, caller, CALLERS[at + 1]) - 1)
        assert row
        for number, value in ((29, frame_pointer), (30, returns_to | SIGNATURE)):
            kind, offset = row.registers.get(number, (OFFSET, -8))
            assert kind == UNDEFINED or isinstance(offset, int)
            if kind == OFFSET and caller != CALLERS[0]:
                struct.pack_into("<Q", stack, sp + int(offset) - STACK, value)
                frame_pointer = sp + int(offset) if number == 29 else frame_pointer
        sp -= frame_size(image, caller)
        returns_to = behind_the_call(image, caller, CALLERS[at + 1])
    registers = {"x29": frame_pointer, "x30": returns_to | SIGNATURE, "sp": sp, "x8": PPOLL, "x1": 1, "x0": 4096}
    return bytes(stack), dict.fromkeys(AARCH64.registers, 0) | registers


def note(name: bytes, kind: int, data: bytes) -> bytes:
    head = struct.pack("<III", len(name) + 1, len(data), kind)
    return head + (name + b"\0").ljust(len(name) + 4 & ~3, b"\0") + data.ljust(len(data) + 3 & ~3, b"\0")


def core_of(program: Path, registers: dict[str, int], stack: bytes, facts: dict[str, object]) -> bytes:
    """A core of one thread, laid out as the kernel's (fs/binfmt_elf.c) on arm64."""
    status = bytearray(112 + 8 * len(AARCH64.registers) + 8)
    struct.pack_into("<i", status, 32, PID)
    struct.pack_into(f"<{len(AARCH64.registers)}Q", status, 112, *registers.values())
    process = bytearray(136)
    struct.pack_into("<i", process, 24, PID)
    file = program.read_bytes()
    with Image.open(program) as image:
        segments, entry = [segment for segment in image.segments if segment.filesz], image.entry
    loads = [(part.vaddr & -PAGE, file[part.offset & -PAGE : part.offset + part.filesz], 5) for part in segments]
    rows = [(at, at + len(data), part.offset // PAGE) for part, (at, data, _) in zip(segments, loads)]
    files = struct.pack("<QQ", len(rows), PAGE) + b"".join(struct.pack("<QQQ", *row) for row in rows)
    files += (os.fsencode(program) + b"\0") * len(rows)
    notes = note(b"CORE", NT_PRSTATUS, bytes(status)) + note(b"CORE", NT_PRPSINFO, bytes(process))
    notes += note(b"CORE", NT_AUXV, struct.pack("<QQQQ", AT_ENTRY, entry, 0, 0)) + note(b"CORE", NT_FILE, files)
    notes += note(OWN_NOTE, NT_FACTS, json.dumps({"threads": {str(PID): facts}}).encode())
    loads.append((STACK, stack, 6))
    at = 64 + 56 * (1 + len(loads))
    headers = struct.pack("<IIQQQQQQ", PT_NOTE, 0, at, 0, 0, len(notes), 0, 4)
    body = notes
    for address, data, flags in loads:
        headers += struct.pack("<IIQQQQQQ", PT_LOAD, flags, at + len(body), address, 0, len(data), len(data), PAGE)
        body += data
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 4, 183, 1, 0, 64, 0, 0, 64, 56, 1 + len(loads), 0, 0, 0)
    return head + headers + body


@contextmanager
def opened(program: Path, tmp_path: Path, facts: dict[str, object], **registers: int) -> Iterator[CoreView]:
    """A core of the program in its system call."""
    with Image.open(program) as image:
        stack, values = lay(image)
        values["pc"] = address_of(image, "leaf") + 4 * SVC_AT
    values.update((name, values["pc"] + value if name == "pc" else value) for name, value in registers.items())
    core = tmp_path / "core"
    core.write_bytes(core_of(program, values, stack, facts))
    with closing(CoreView(str(core))) as view:
        yield view


@pytest.mark.parametrize("partial", [False, True], ids=["all registers", "sp and pc alone"])
def test_a_stack_leads_to_where_the_thread_began(program: Path, tmp_path: Path, partial: bool) -> None:
    """As of a core, and as of a live thread, of which /proc shows no other registers."""
    with opened(program, tmp_path, {"partial": partial}) as view:
        stack = view.stack(PID)
    assert (stack.functions(), stack.complete, stack.why_not) == (CALLERS[::-1], True, None)


def test_of_two_calls_neither_is_believed(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """A search finds the callers above, and the stack does not claim to be whole."""
    twice = SOURCE.replace(
        "return done + sink; }\nKEEP long polled", "return done + sink + leaf(done, set, 2); }\nKEEP long polled"
    )
    program = build(tmp_path_factory.mktemp("twice"), twice)
    with opened(program, tmp_path, {"partial": True}) as view:
        stack = view.stack(PID)
    assert (stack.functions(), stack.complete) == (("leaf", "polled", "outer", "_start"), False)


def test_a_return_address_leads_on_from_where_it_is_saved(program: Path, tmp_path: Path) -> None:
    """Which is how a coroutine's stack is begun: no register is known, and the address bears a signature."""
    with opened(program, tmp_path, {}) as view:
        record = view.file.threads[0].registers["x29"]
        assert int.from_bytes(view.memory.read(record + 8, 8), "little") >> 48
        assert view.stack_above(record + 8).functions() == ("polled", "outer", "_start")


@pytest.mark.parametrize(
    ("facts", "registers", "expected"),
    [
        ({}, {}, ("ppoll", 4096)),  # to be made again: pc at the instruction, x0 the argument
        ({}, {"pc": 4, "x0": EINTR}, ("ppoll", LOST_ARGUMENT)),
        ({"first_argument": 4096}, {"pc": 4, "x0": EINTR}, ("ppoll", 4096)),
        ({}, {"pc": 4, "x0": 0}, None),  # it returned
        ({}, {"pc": -4}, None),  # it did not come to it
        ({}, {"x8": 128, "x1": 0x89, "x5": (1 << 32) - 1}, ("futex", 4096)),  # restart_syscall
    ],
)
def test_the_system_call(
    program: Path,
    tmp_path: Path,
    facts: dict[str, object],
    registers: dict[str, int],
    expected: tuple[str, int] | None,
) -> None:
    with opened(program, tmp_path, facts, **registers) as view:
        (thread,) = view.threads()
        behind = view.file.threads[0].registers["pc"] + 4 - registers.get("pc", 0)
    assert (thread.syscall and (thread.syscall.name, thread.syscall.args[0])) == expected
    assert (thread.syscall and thread.syscall.pc) == (behind if expected else None)


# Coroutines: registers in a jmp_buf, two of which are hidden by a guard that is nowhere to be read.

SWITCH = r"""
int __sigsetjmp(void *, int);
void other(void *);
int qemu_coroutine_switch(void *env) { other(env); if (!__sigsetjmp(env, 0)) other(env); return 1; }
"""
HEAP, ROOM, GUARD, BIAS = 0xAAAA00000000, 0xFFFF80000000, 0x5EED5EED5EED5E00, 0xAAAA10000000


class Process:
    """As much of a process as the search for coroutines asks for."""

    machine = AARCH64

    def __init__(self, library: Path, pieces: dict[int, bytes]) -> None:
        self.library, self.pieces, self.memory = library, pieces, self
        self.asked: list[tuple[int, int, dict[int, int]]] = []

    def read(self, address: int, size: int) -> bytes:
        for start, data in self.pieces.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise FaultError(address, size)

    def regions(self) -> list[Region]:
        return [
            Region(BIAS, BIAS + (1 << 20), "r-xp", 1, "/qemu"),
            Region(ROOM, ROOM + PAGE, "---p", 0, ""),
            Region(ROOM + PAGE, ROOM + STACK_AND_GUARD, "rw-p", 0, ""),
        ]

    def open_image(self) -> Image:
        return Image.open(self.library)

    def entry_address(self) -> int:
        with self.open_image() as image:
            return image.entry + BIAS

    def stack_at(self, pc: int, sp: int, others: dict[int, int]) -> Stack:
        self.asked.append((pc, sp, others))
        return Stack()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("switch"), SWITCH, "-shared", "-fPIC")


@pytest.mark.parametrize("away", [0, 64], ids=["on its stack", "on no stack of its own"])
def test_a_coroutine_is_found_where_it_was_suspended(library: Path, away: int) -> None:
    with Image.open(library) as image:
        start, words = code_of(image, "qemu_coroutine_switch")
    (_, at, _) = (at for at, word in enumerate(words) if word & 0xFC000000 == 0x94000000)
    pc, sp = start + 4 * at + 4 + BIAS, ROOM + STACK_AND_GUARD - 512 + 16 * away
    saved = [*range(19, 30), pc ^ GUARD, 0, sp ^ GUARD]
    heap = struct.pack("<40x16Q", ROOM, STACK_AND_GUARD, *saved)
    process = Process(library, {HEAP: heap, ROOM + PAGE: bytes(STACK_AND_GUARD - PAGE)})
    coroutines = Coroutines(cast(ProcessView, process), "aarch64")
    assert list(coroutines.passing([(HEAP, heap)])) == [(HEAP, heap)]
    found = coroutines.suspended()
    assert list(found) == ([] if away else [HEAP + 40])
    for suspended in found.values():
        coroutines.stack(suspended)
        assert process.asked == [(pc, sp, {number: number for number in range(19, 30)})]
