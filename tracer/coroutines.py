"""Every coroutine of a QEMU that is suspended, and where: without debug symbols, and without stopping it.

Knows: CoroutineUContext (util/coroutine-ucontext.c): `Coroutine base; void *stack; size_t stack_size;
sigjmp_buf env`, on the heap; that a coroutine's stack is 1 MiB with a guard page below it; and how glibc keeps
registers in a jmp_buf (jmpbuf-offsets.h of sysdeps/x86_64 and sysdeps/aarch64): stack pointer and pc, on x86-64
also rbp, are xored with a guard, which is in each thread's control block on x86-64 and hidden on aarch64; but the
pc is known to be where qemu_coroutine_switch called sigsetjmp. A guard is believed where the pc it yields is code
and the stack pointer lies on the coroutine's own stack. Does not know what a coroutine's functions mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from tracer.elf import Image
from tracer.errors import AioTraceError, FaultError, TargetError
from tracer.machine import AARCH64, X86_64, Machine
from tracer.memory import PAGE
from tracer.records import dataclass
from tracer.target import Region
from tracer.unwind import branch_with_link
from tracer.view import ProcessView, Stack

#: COROUTINE_STACK_SIZE (include/qemu/coroutine_int.h) and the guard page that qemu_alloc_stack() adds; bytes.
STACK_SIZE = (1 << 20) + PAGE
_SIZE_BYTES = struct.pack("<Q", STACK_SIZE)
#: Its bytes that are not zero: a search for zeroes would find too much.
_NEEDLE_AT = next(at for at, byte in enumerate(_SIZE_BYTES) if byte)
_NEEDLE = _SIZE_BYTES.strip(b"\0")
#: What suspends a coroutine.
_SWITCH = "qemu_coroutine_switch"
_WORD = (1 << 64) - 1
#: fs:0x30, tcbhead_t.pointer_guard of glibc's sysdeps/x86_64/nptl/tls.h; bytes.
_POINTER_GUARD = 0x30
#: A thread's control block stands this near to the end of its stack's mapping; bytes.
_TLS_SIZE = 64 << 10
#: No more than this is kept of a stack to tell whether it moved; bytes.
_LARGEST_STACK = 64 << 10
#: More coroutines than QEMU makes; a bound for damaged memory.
MOST = 65536


@dataclass(frozen=True)
class _JumpBuffer:
    """__jmp_buf of a machine: the registers in its words, those that are hidden, by how many bits they are rotated."""

    machine: Machine
    words: tuple[str, ...]  # "" is something else
    hidden: frozenset[str]
    rotated: int

    @property
    def saved(self) -> struct.Struct:
        """stack, stack_size and the words."""
        return struct.Struct(f"<{2 + len(self.words)}Q")

    def registers(self, words: Sequence[int], guard: int) -> dict[str, int]:
        """What the words hold, by name."""
        found = {name: word for name, word in zip(self.words, words) if name}
        return {name: self.plain(word) ^ guard if name in self.hidden else word for name, word in found.items()}

    def plain(self, mangled: int) -> int:
        """A hidden word, still xored with the guard."""
        return (mangled >> self.rotated | mangled << 64 - self.rotated) & _WORD


_JUMP_BUFFERS = {
    X86_64.name: _JumpBuffer(
        X86_64,
        ("rbx", "rbp", "r12", "r13", "r14", "r15", "rsp", "rip"),
        frozenset({"rbp", "rsp", "rip"}),
        17,
    ),
    AARCH64.name: _JumpBuffer(
        AARCH64,
        (*(f"x{number}" for number in range(19, 30)), "pc", "", "sp"),
        frozenset({"pc", "sp"}),
        0,
    ),
}


@dataclass(frozen=True)
class Suspended:
    """One coroutine as it was left: where its stack pair stands, its registers by DWARF's numbers, its stack's bytes.

    Two that are equal stand still: neither registers nor a byte of the stack in use differ.
    """

    address: int
    registers: Mapping[int, int]
    bytes: bytes


class Coroutines:
    """The coroutines of one process. `why_not` says why none can be seen, or is None."""

    def __init__(self, view: ProcessView, machine: str) -> None:
        self._view = view
        self._places: list[int] = []
        self._guard: int | None = None
        self._buffer = _JUMP_BUFFERS[machine]
        self._pc, self._sp = (view.machine.dwarf[name] for name in (view.machine.pc, view.machine.sp))
        self.why_not: str | None = None

    def passing(self, chunks: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """The same chunks of malloc's memory, looked through on their way for what may be a CoroutineUContext."""
        for base, data in chunks:
            at = data.find(_NEEDLE)
            while at >= 0 and len(self._places) < MOST:
                place = base + at - _NEEDLE_AT - 8
                if place % 8 == 0 and data[at - _NEEDLE_AT : at - _NEEDLE_AT + 8] == _SIZE_BYTES:
                    self._places.append(place)
                at = data.find(_NEEDLE, at + 1)
            yield base, data

    def suspended(self) -> dict[int, Suspended]:
        """Those that are suspended now, by address; empty where `why_not` says why."""
        if self.why_not is not None or not self._places:
            return {}
        try:
            regions = self._view.regions()
        except TargetError:
            return {}
        stacks = _stacks(regions)
        code = [region for region in regions if "x" in region.permissions]
        found: dict[int, Suspended] = {}
        for place in self._places:
            saved = self._saved(place)
            if saved is None or saved[0] not in stacks:
                continue
            registers = self._registers(saved, regions, code)
            if registers is not None:
                found[place] = Suspended(place, registers, self._stack_bytes(registers[self._sp], saved[0]))
        if (
            stacks
            and not found
            and self._guard is None
            and any(self._on_a_stack(place, stacks) for place in self._places)
        ):
            self.why_not = "the pointer guard that hides coroutines' registers was not found"
        return found

    def stack(self, coroutine: Suspended) -> Stack:
        """Its frames, innermost first, down to coroutine_trampoline."""
        others = dict(coroutine.registers)
        return self._view.stack_at(others.pop(self._pc), others.pop(self._sp), others)

    def _saved(self, place: int) -> tuple[int, ...] | None:
        try:
            saved = self._buffer.saved
            return saved.unpack(self._view.memory.read(place, saved.size))
        except FaultError:
            return None

    def _on_a_stack(self, place: int, stacks: set[int]) -> bool:
        saved = self._saved(place)
        return saved is not None and saved[0] in stacks

    def _registers(self, saved: tuple[int, ...], regions: list[Region], code: list[Region]) -> dict[int, int] | None:
        """The registers that `saved` holds, or None where they do not prove themselves."""
        machine = self._buffer.machine
        for guard in self._possible_guards(saved, regions) if self._guard is None else [self._guard]:
            found = self._buffer.registers(saved[2:], guard)
            sp, pc = found[machine.sp], found[machine.pc]
            if saved[0] + PAGE <= sp < saved[0] + STACK_SIZE and any(r.start <= pc < r.end for r in code):
                self._guard = guard
                return {machine.dwarf[name]: value for name, value in found.items()}
        return None

    def _possible_guards(self, saved: tuple[int, ...], regions: list[Region]) -> list[int]:
        if self._buffer.machine is X86_64:
            return self._guards(regions)
        hidden = self._buffer.plain(saved[2 + self._buffer.words.index(self._buffer.machine.pc)])
        return [hidden ^ address for address in self._switch_addresses]

    @cached_property
    def _switch_addresses(self) -> tuple[int, ...]:
        """Where sigsetjmp returns to in qemu_coroutine_switch; none where that is not exported."""
        try:
            with self._view.open_image() as image:
                bias = self._view.entry_address() - image.entry
                return tuple(address + bias for address in _behind_setjmp(image))
        except AioTraceError:
            return ()

    def _stack_bytes(self, sp: int, stack: int) -> bytes:
        size = min(stack + STACK_SIZE - sp, _LARGEST_STACK)
        try:
            return self._view.memory.read(sp, size)
        except FaultError:
            return b""

    def _guards(self, regions: list[Region]) -> list[int]:
        """What may be the pointer guard: a control block's words at 0 and 16 are its own address."""
        guards: dict[int, None] = {}
        for region in regions:
            if region.permissions.startswith("rw") and not region.inode:
                start = max(region.start, region.end - _TLS_SIZE)
                for guard in self._guards_in(start, region.end - start):
                    guards[guard] = None
        return list(guards)

    def _guards_in(self, start: int, size: int) -> Iterator[int]:
        try:
            data = self._view.memory.read(start, size)
        except FaultError:
            return
        words = struct.unpack(f"<{size // 8}Q", data[: size // 8 * 8])
        for at in range(0, len(words) - 6, 2):
            if words[at] == start + 8 * at == words[at + 2]:
                yield words[at + _POINTER_GUARD // 8]


def _behind_setjmp(image: Image) -> Iterator[int]:
    symbol = image.symbol(_SWITCH)
    bounds = image.bounds(symbol.address) if symbol else None
    for at in range(bounds.start, bounds.end, 4) if bounds else ():
        target = branch_with_link(image.read(at, 4), at)
        if target and "setjmp" in (image.plt_name(target) or ""):
            yield at + 4


def _stacks(regions: list[Region]) -> set[int]:
    """Where a guard page begins with a stack's room behind it."""
    return {
        guard.start
        for guard, room in ((regions[at], regions[at + 1]) for at in range(len(regions) - 1))
        if guard.permissions.startswith("---")
        and guard.size == PAGE
        and room.start == guard.end
        and room.size >= STACK_SIZE - PAGE
    }
