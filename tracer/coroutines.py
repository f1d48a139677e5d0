"""Every coroutine of a QEMU that is suspended, and where: without debug symbols, and without stopping it.

Knows: CoroutineUContext (util/coroutine-ucontext.c): `Coroutine base; void *stack; size_t stack_size;
sigjmp_buf env`, on the heap; that a coroutine's stack is 1 MiB with a guard page below it; and how glibc keeps
registers in a jmp_buf on x86-64 (sysdeps/x86_64/jmpbuf-offsets.h): rsp, rbp and pc are xored with the pointer
guard of the thread's control block and rotated by 17 bits. A guard is believed where the pc it yields is code and
the stack pointer lies on the coroutine's own stack. Does not know what a coroutine's functions mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

from tracer.errors import FaultError, TargetError
from tracer.machine import X86_64
from tracer.memory import PAGE
from tracer.records import dataclass
from tracer.target import Region
from tracer.view import ProcessView, Stack

#: COROUTINE_STACK_SIZE (include/qemu/coroutine_int.h) and the guard page that qemu_alloc_stack() adds; bytes.
STACK_SIZE = (1 << 20) + PAGE
_SIZE_BYTES = struct.pack("<Q", STACK_SIZE)
#: Its bytes that are not zero: a search for zeroes would find too much.
_NEEDLE_AT = next(at for at, byte in enumerate(_SIZE_BYTES) if byte)
_NEEDLE = _SIZE_BYTES.strip(b"\0")
RBX, RBP, RSP, RIP = (X86_64.dwarf[name] for name in ("rbx", "rbp", "rsp", "rip"))
#: stack, stack_size, and the eight words of __jmp_buf: rbx, rbp, r12 to r15, rsp, pc.
_SAVED = struct.Struct("<10Q")
_ROTATED = 17
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
        self.why_not = None if machine == "x86_64" else f"coroutines of {machine} are not read"

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
                found[place] = Suspended(place, registers, self._stack_bytes(registers[RSP], saved[0]))
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
        others = {number: value for number, value in coroutine.registers.items() if number not in (RIP, RSP)}
        return self._view.stack_at(coroutine.registers[RIP], coroutine.registers[RSP], others)

    def _saved(self, place: int) -> tuple[int, ...] | None:
        try:
            return _SAVED.unpack(self._view.memory.read(place, _SAVED.size))
        except FaultError:
            return None

    def _on_a_stack(self, place: int, stacks: set[int]) -> bool:
        saved = self._saved(place)
        return saved is not None and saved[0] in stacks

    def _registers(self, saved: tuple[int, ...], regions: list[Region], code: list[Region]) -> dict[int, int] | None:
        """The registers that `saved` holds, or None where they do not prove themselves."""
        guards = self._guards(regions) if self._guard is None else [self._guard]
        for guard in guards:
            rbp, sp, pc = (_plain(saved[at], guard) for at in (3, 8, 9))
            if saved[0] + PAGE <= sp < saved[0] + STACK_SIZE and any(r.start <= pc < r.end for r in code):
                self._guard = guard
                return {RBX: saved[2], RBP: rbp, **dict(enumerate(saved[4:8], 12)), RSP: sp, RIP: pc}
        return None

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


def _plain(mangled: int, guard: int) -> int:
    """A register as glibc's PTR_DEMANGLE gives it back."""
    return ((mangled >> _ROTATED | mangled << 64 - _ROTATED) & _WORD) ^ guard


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
