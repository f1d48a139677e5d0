"""Stacks of threads that nobody stops: pc and stack pointer in, frames out.

Knows: the files that are mapped, their call frame information (tracer/eh_frame) and symbols, and what calls
look like on x86-64 and aarch64. A live thread that sleeps shows only its pc and sp; the other registers are
unknown until a frame tells where it saved them. Where a frame needs one that is unknown, the stack is searched
for the caller: a return address behind a call, from which the frames lead to the thread's beginning. Such a
stack is not `complete`, and says so. Names are those of symbols that stand exactly where a function of the unwind
table begins: the file's own, its mini debug info's, its separate debug file's. Does not know QEMU, nor how long
the memory it reads stays as it is.

On aarch64 a function that calls none (glibc's system calls since 2.41) has its return address in x30 alone. Its
caller is the one place that calls it and whose own frame, laid at this very stack pointer by its rules, holds a
return address behind a call of the function that this place is in: that is proof, not a search.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from functools import partial
from typing import Protocol

from tracer.debug_files import DebugFiles, Place
from tracer.eh_frame import (
    EXPRESSION,
    MASK,
    OFFSET,
    REGISTER,
    SAME,
    UNDEFINED,
    VAL_OFFSET,
    FrameError,
    FrameTable,
    Row,
    Rule,
    evaluate,
)
from tracer.elf import Image
from tracer.errors import AioTraceError, FaultError, ImageError
from tracer.machine import HOST, X86_64, Machine
from tracer.memory import PAGE, MemoryReader
from tracer.records import dataclass
from tracer.target import Region
from tracer.view import Frame, Stack

MAX_NAMES = 4096
MAX_FRAMES = 256
#: How much of a stack is searched for a caller (bytes), and how many possible ones are followed.
SCAN_SIZE = 64 << 10
MAX_CANDIDATES = 64
MAX_SCANS = 4
#: The frame of what calls a system call is no larger; bytes.
LEAF_CALLER_SIZE = 1024
_LARGEST_VDSO = 1 << 20
#: Of no more files than these the debug information is looked at, and of each no more mini debug info; bytes.
MAX_DEBUG_FILES = 16
MAX_MINI = 16 << 20

Registers = Mapping[int, int]  # by DWARF's numbers; one that is not in it is unknown


class Mapped(Protocol):
    """What the unwinder needs of a process; a ProcessView has it."""

    @property
    def pid(self) -> int: ...

    @property
    def memory(self) -> MemoryReader: ...

    def regions(self) -> list[Region]: ...


@dataclass
class Module:
    """One mapped file: its image, and what to add to its addresses."""

    path: str
    image: Image
    bias: int
    frames: FrameTable
    more: Callable[[], tuple[Image, ...]] = tuple  # what else names the file's functions
    names: dict[int, str | None] = field(default_factory=dict)  # by the function's start, in the file

    def name_of(self, start: int) -> str | None:
        """The function that starts at that address of the file, by its symbols, else by its debug files'."""
        if start not in self.names:
            self.names[start] = next((name for each in self._images() if (name := _name_in(each, start))), None)
        return self.names[start]

    def _images(self) -> Iterator[Image]:
        yield self.image
        yield from self.more()


@dataclass(frozen=True)
class _Step:
    """One frame's registers; `scanned` tells that it was found by searching the stack."""

    registers: Registers
    lookup: int  # the address by which its function is found: inside the call, not behind it
    scanned: bool = False


class _NeedsRegister(Exception):
    """The rule of a frame needs a register that is not known."""


class _Outermost(Exception):
    """The frame has no caller."""


class Unwinder:
    """Unwinds stacks of one process; files and rules are kept, memory is not. Close it."""

    def __init__(
        self,
        process: Mapped,
        open_file: Callable[[Region], Image] | None = None,
        machine: Machine = HOST,
        debug_place: Callable[[Region], Place | None] | None = None,
    ) -> None:
        """`debug_place` tells where a mapped file's debug file may be (None: also beside the file that was opened);
        without it that is the host's /usr/lib/debug alone.
        """
        self._process = process
        self._debug_place = debug_place or host_place
        self._debug: dict[Image, DebugFiles] = {}
        self._machine = machine
        self._pc, self._sp = machine.dwarf[machine.pc], machine.dwarf[machine.sp]
        self._memory = process.memory
        self._open_file = open_file or self._open_live
        self._regions: list[Region] | None = None
        self._modules: dict[tuple[int, str], Module | str] = {}
        self._images: dict[str, Image] = {}
        self._names: dict[tuple[int, int], Frame] = {}

    def close(self) -> None:
        """Give the files back."""
        for debug in self._debug.values():
            debug.close()
        self._debug = {}
        for image in self._images.values():
            image.close()
        self._images = {}
        self._modules = {}

    # Names.

    def function_at(self, address: int) -> tuple[str, int] | None:
        """(function, offset) of the code at `address` by the symbols of its file, or None."""
        found = self._named(address, address)
        return None if found.function is None else (found.function, found.offset or 0)

    def module_at(self, address: int) -> Module | None:
        """The mapped file whose code is at `address`, or None where it is none or cannot be read."""
        region = self._region_at(address)
        found = None if region is None else self._module(region)
        return found if isinstance(found, Module) else None

    def _named(self, address: int, lookup: int) -> Frame:
        """The frame with its function's name; the same few return addresses come again and again."""
        found = self._names.get((address, lookup))
        if found is None:
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            found = self._names[address, lookup] = self._looked_up(address, lookup)
        return found

    def _looked_up(self, address: int, lookup: int) -> Frame:
        region = self._region_at(lookup)
        if region is None:
            return Frame(address)
        module = self._module(region)
        if isinstance(module, str):
            return Frame(address, module=region.path or None)
        try:
            bounds = module.image.bounds(lookup - module.bias)
        except ImageError:
            bounds = None
        start = bounds.start if bounds else lookup - module.bias
        name = module.name_of(start)
        return Frame(address, name, address - module.bias - start if name else None, module.path)

    # Stacks.

    def unwind(self, pc: int, sp: int, registers: Registers | None = None) -> Stack:
        """The stack from there on, innermost frame first; `registers` are those that are known besides."""
        if self._region_at(pc) is None or self._region_at(sp) is None:
            self._regions = None  # mappings come and go
            self._names = {}
        return self._from(_Step({**(registers or {}), self._pc: pc, self._sp: sp}, pc))

    def unwind_above(self, address: int) -> Stack:
        """The stack from the function on that the return address saved at `address` leads back into."""
        if self._region_at(address) is None:
            self._regions = None
            self._names = {}
        # On x86-64 a frame pointer stands there only where a function has one.
        lowest = address if self._machine is X86_64 else 0
        try:
            return self._from(self._saved_at(address, lowest))
        except FaultError as error:
            return Stack(why_not=error.message)

    def _from(self, first: _Step) -> Stack:
        steps, why = self._walk([first])
        for _ in range(MAX_SCANS):
            if why is None or len(steps) >= MAX_FRAMES:
                break
            found = self._scan(steps[-1])
            if not found:
                break
            steps, why = self._walk([*steps, *found])
        frames = tuple(self._named(step.registers[self._pc], step.lookup) for step in steps)
        return self._stack(frames, steps, why)

    def _stack(self, frames: tuple[Frame, ...], steps: list[_Step], why: str | None) -> Stack:
        if why is not None:
            return Stack(frames, False, why)
        scanned = [frame for frame, step in zip(frames, steps) if step.scanned]
        if scanned:
            return Stack(frames, False, f"found by a search of the stack, not by a saved register: {scanned[0]}")
        return Stack(frames, True)

    def _walk(self, steps: list[_Step]) -> tuple[list[_Step], str | None]:
        """Append callers as far as they are certain; why it ended, or None at the outermost frame."""
        steps = list(steps)
        while len(steps) < MAX_FRAMES:
            try:
                steps.append(self._caller(steps[-1]))
            except _Outermost:
                return steps, None
            except _NeedsRegister:
                return steps, "a frame needs a register that is not known"
            except AioTraceError as error:
                return steps, error.message
        return steps, f"more than {MAX_FRAMES} frames"

    def _caller(self, step: _Step) -> _Step:
        row = self._row(step.lookup)
        registers = step.registers
        cfa = self._cfa(row, registers)
        rule = self._return_rule(row)
        if rule[0] == UNDEFINED:
            raise _Outermost
        pc = self._restored(rule, row.return_register, cfa, registers)
        if pc is None:
            raise _NeedsRegister
        if not pc:
            raise _Outermost
        caller = {
            number: value
            for number in (*self._machine.preserved, *row.registers)
            if (value := self._restored(row.registers.get(number, (SAME, 0)), number, cfa, registers)) is not None
        }
        caller.pop(row.return_register, None)
        if self._sp not in row.registers:
            caller[self._sp] = cfa
        sp = caller.get(self._sp)
        # Stacks grow down: a caller that is not above leads round in circles. Signal handlers may change stacks,
        # and a function that saves nothing has no stack of its own.
        lowest = registers[self._sp] + (rule[0] != SAME)
        if sp is None or (sp < lowest and not row.signal_frame):
            raise FrameError(f"the frame at {registers[self._pc]:#x} does not lead upwards")
        pc = caller[self._pc] = self._machine.code_address(pc)
        return _Step(caller, pc if row.signal_frame else pc - 1)

    def _return_rule(self, row: Row) -> Rule:
        """Where the return address is; where no rule tells, it is still in its register, if that is not the pc."""
        other = (UNDEFINED, 0) if row.return_register == self._pc else (SAME, 0)
        return row.registers.get(row.return_register, other)

    def _row(self, lookup: int) -> Row:
        region = self._region_at(lookup)
        if region is None or "x" not in region.permissions:
            raise FrameError(f"{lookup:#x} is no code")
        module = self._module(region)
        if isinstance(module, str):
            raise FrameError(module)
        row = module.frames.row(lookup - module.bias)
        if row is None:
            raise FrameError(f"{self._named(lookup, lookup)} has no call frame information")
        return row

    def _cfa(self, row: Row, registers: Registers) -> int:
        if isinstance(row.cfa, bytes):
            return evaluate(row.cfa, _known(registers), self._memory.read)
        number, offset = row.cfa
        return _known(registers)(number) + offset & MASK

    def _restored(self, rule: tuple[int, int | bytes], number: int, cfa: int, registers: Registers) -> int | None:
        """A register's value in the caller, None where it is not known."""
        kind, value = rule
        try:
            if isinstance(value, bytes):
                result = evaluate(value, _known(registers), self._memory.read, cfa)
                return self._word(result) if kind == EXPRESSION else result
            if kind == OFFSET:
                return self._word(cfa + value & MASK)
        except _NeedsRegister:
            return None
        if kind == VAL_OFFSET:
            return cfa + value & MASK
        if kind == UNDEFINED:
            return None
        return registers.get(value if kind == REGISTER else number)

    def _word(self, address: int) -> int:
        word: int = struct.unpack("<Q", self._memory.read(address, 8))[0]
        return word

    # Where the rules end: a search of the stack.

    def _scan(self, step: _Step) -> list[_Step]:
        """The likeliest caller of `step` and its callers, found behind it on the stack.

        The first from which the rules lead to the thread's beginning; else the one that leads farthest.
        """
        if caller := self._caller_of_leaf(step):
            return [caller]
        best: list[_Step] = []
        for candidate in self._candidates(step):
            steps, why = self._walk([candidate])
            if why is None:
                return steps
            if len(steps) > max(len(best), 1):
                best = steps
        return best

    def _candidates(self, step: _Step) -> Iterator[_Step]:
        """Possible callers: those whose direct call is one of this very function first."""
        start = self._start(step.lookup)
        likely: list[_Step] = []
        possible: list[_Step] = []
        sp = step.registers[self._sp]
        for address, word in self._stack_words(sp):
            target = self._called_before(self._machine.code_address(word))
            if target is not None:
                (likely if target == start else possible).append(self._saved_at(address, sp))
            if len(likely) + len(possible) >= MAX_CANDIDATES:
                break
        yield from likely
        yield from possible

    def _saved_at(self, address: int, sp: int = 0) -> _Step:
        """What a return address saved at `address` leads back into; FaultError.

        gcc saves a frame pointer right below it, which is used unless it is below `sp`.
        """
        pc = self._machine.code_address(self._word(address))
        registers = {self._pc: pc, self._sp: address + 8}
        if address - 8 >= sp:
            registers |= self._saved_frame_pointer(address - 8)
        if self._machine is not X86_64:
            registers |= self._by_frame_pointer(pc, registers)
        return _Step(registers, pc - 1, scanned=True)

    def _saved_frame_pointer(self, address: int) -> dict[int, int]:
        try:
            value = self._word(address)
        except FaultError:
            return {}
        return {self._machine.frame_pointer: value} if address < value < address + SCAN_SIZE else {}

    def _by_frame_pointer(self, pc: int, registers: Registers) -> dict[int, int]:
        """The stack pointer of a function whose frame pointer is known.

        Return addresses are not next to their caller's frame here, but the frame pointer points to where the
        function saved its caller's, and its rules say where that is in its frame.
        """
        frame = registers.get(self._machine.frame_pointer)
        try:
            row = self._row(pc - 1)
        except FrameError:
            return {}
        kind, offset = row.registers.get(self._machine.frame_pointer, (UNDEFINED, 0))
        if frame is None or kind != OFFSET or isinstance(offset, bytes) or isinstance(row.cfa, bytes):
            return {}
        register, size = row.cfa
        return {self._sp: frame - offset - size & MASK} if register == self._sp else {}

    def _caller_of_leaf(self, step: _Step) -> _Step | None:
        """The caller of a function whose return address is in a register only, where it proves itself alone."""
        sp, start = step.registers[self._sp], self._start(step.lookup)
        try:
            row = self._row(step.lookup)
        except FrameError:
            return None
        if start is None or row.cfa != (self._sp, 0) or self._return_rule(row)[0] != SAME:
            return None
        found: list[_Step] = []
        for address, word in self._stack_words(sp):
            if address > sp + LEAF_CALLER_SIZE:
                break
            function = self._called_before(self._machine.code_address(word))
            if function:
                sites = self._calls(function, start, {**step.registers, self._machine.frame_pointer: address - 8})
                found += (site for site in sites if self._returns_by(site) == address)
        return found[0] if len(found) == 1 else None

    def _calls(self, function: int, callee: int, registers: Registers) -> Iterator[_Step]:
        """Where the function at `function` calls `callee`; `registers` are those that are known then, but the pc."""
        module, other = self.module_at(function), self.module_at(callee)
        if module is None or other is None:
            return
        name = other.name_of(callee - other.bias)
        try:
            bounds = module.image.bounds(function - module.bias)
            code = module.image.read(bounds.start, bounds.end - bounds.start) if bounds else b""
            for at in range(4, len(code) + 1, 4):
                target = branch_with_link(code[at - 4 : at], function + at - 4)
                if target == callee or (target and name and module.image.plt_name(target - module.bias) == name):
                    yield _Step({**registers, self._pc: function + at}, function + at - 1)
        except ImageError:
            return

    def _returns_by(self, step: _Step) -> int | None:
        """Where a function saved its return address, by its rules."""
        try:
            row = self._row(step.lookup)
            kind, offset = self._return_rule(row)
            return self._cfa(row, step.registers) + offset if kind == OFFSET and isinstance(offset, int) else None
        except (AioTraceError, _NeedsRegister):
            return None

    def _stack_words(self, sp: int) -> Iterator[tuple[int, int]]:
        """(address, word) where a return address may be: the stack is aligned to 16 bytes before a call."""
        start = (sp + 7 & ~15) + 8 if sp % 16 else sp + 8
        region = self._region_at(sp)
        end = min(start + SCAN_SIZE, region.end if region else start + SCAN_SIZE)
        address = start
        while address + 8 <= end:
            size = min(PAGE - address % PAGE, end - address)
            try:
                data = self._memory.read(address, size)
            except FaultError:
                return
            for at in range(0, len(data) - 7, 16):
                yield address + at, struct.unpack_from("<Q", data, at)[0]
            address += (size + 15) & ~15

    def _called_before(self, address: int) -> int | None:
        """What the call that ends at `address` calls; 0 where that does not show, None without a call."""
        module = self.module_at(address - 1)
        if module is None:
            return None
        try:
            code = module.image.read(address - module.bias - 7, 7)
        except ImageError:
            return None
        if self._machine is not X86_64:
            target = None if address % 4 else branch_with_link(code[3:], address - 4)
            return target if not target or self.module_at(target) is not None else None
        if code[2] == 0xE8:
            target = address + int.from_bytes(code[3:], "little", signed=True) & MASK
            if self.module_at(target) is not None:
                return target
        return 0 if _is_indirect_call(code) else None

    def _start(self, lookup: int) -> int | None:
        try:
            return self._row(lookup).start + (module.bias if (module := self.module_at(lookup)) else 0)
        except FrameError:
            return None

    # Files.

    def _region_at(self, address: int) -> Region | None:
        if self._regions is None:
            self._regions = self._process.regions()
        low, high = 0, len(self._regions)
        while low < high:
            middle = (low + high) // 2
            if self._regions[middle].end <= address:
                low = middle + 1
            else:
                high = middle
        found = self._regions[low] if low < len(self._regions) else None
        return found if found and found.start <= address else None

    def _module(self, region: Region) -> Module | str:
        """The file behind a mapping of code, or why it cannot be had."""
        key = (region.start, region.path)
        if key not in self._modules:
            self._modules[key] = self._open_module(region)
        return self._modules[key]

    def _open_module(self, region: Region) -> Module | str:
        if "x" not in region.permissions or not region.path:
            return f"{region.start:#x} is no code of a file"
        try:
            image = self._image(region)
        except (AioTraceError, OSError, ValueError) as error:
            return f"the code of {region.path} is not at hand: {error}"
        if image.machine != self._machine.name:
            return f"{region.path} is for {image.machine}"
        bias = load_bias(image, region)
        if bias is None:
            return f"{region.path} is not the file that was mapped"
        return Module(region.path, image, bias, FrameTable(image), partial(self._debug_images, region, image))

    def _debug_images(self, region: Region, image: Image) -> tuple[Image, ...]:
        """The mini debug info and the separate debug file, where they are at hand."""
        if image not in self._debug:
            if len(self._debug) >= MAX_DEBUG_FILES or region.path.startswith("["):
                return ()
            self._debug[image] = DebugFiles(image, self._debug_place(region), MAX_MINI)
        debug = self._debug[image]
        return tuple(each for each in (debug.mini, debug.separate) if each is not None)

    def _image(self, region: Region) -> Image:
        key = region.path if region.inode or region.path.startswith("[") else f"{region.path}@{region.start:x}"
        if key not in self._images:
            self._images[key] = self._open_file(region)
        return self._images[key]

    def _open_live(self, region: Region) -> Image:
        """The very file that is mapped, though it be deleted, replaced or in a container."""
        if region.path.startswith("["):
            return image_in_memory(self._memory, region)
        folder = f"/proc/{self._process.pid}"
        try:
            return Image.open(f"{folder}/map_files/{region.start:x}-{region.end:x}")
        except ImageError:
            if region.path.endswith(" (deleted)") or not os.path.isabs(region.path):
                raise
            return Image.open(f"{folder}/root{region.path}")


def host_place(region: Region) -> Place:
    """Only the host's own: what lies beside a mapped file, or under a process's root, others may have put there."""
    return Place(region.path.removesuffix(" (deleted)"), beside=False)


def _name_in(image: Image, start: int) -> str | None:
    """Of several names that of a program's own source; "$x" and the like (of aarch64) mark code and name nothing."""
    try:
        found = [name for name in image.symbol_names_at(start) if not name.startswith("$")]
    except ImageError:
        return None
    return min(found, key=lambda name: (name.startswith("_"), "." in name), default=None)


def _known(registers: Registers) -> Callable[[int], int]:
    def value(number: int) -> int:
        if number not in registers:
            raise _NeedsRegister
        return registers[number]

    return value


def load_bias(image: Image, region: Region) -> int | None:
    """What to add to the file's addresses in that mapping of its code; None where it is another file's."""
    for segment in image.segments:
        if segment.executable and segment.offset - PAGE < region.offset < segment.offset + segment.filesz:
            return region.start - region.offset + segment.offset - segment.vaddr
    return None


def image_in_memory(memory: MemoryReader, region: Region) -> Image:
    """The file that the kernel made up ([vdso]), as it stands in memory. ImageError or FaultError."""
    if region.size > _LARGEST_VDSO:
        raise ImageError(f"{region.path} is too large")
    data = mmap.mmap(-1, region.size)
    data.write(memory.read(region.start, region.size))
    return Image(region.path, data)


def branch_with_link(code: bytes, address: int) -> int | None:
    """What a call of A64, four bytes at `address`, calls; 0 where a register tells, None where it is no call."""
    word = int.from_bytes(code, "little")
    if word & 0xFC000000 == 0x94000000:  # bl
        offset = (word & 0x3FFFFFF) - ((word & 0x2000000) << 1)
        return address + 4 * offset & MASK
    if word & 0xFEFFF000 == 0xD63F0000:  # blr, blraa and its relatives
        return 0
    return None


def _is_indirect_call(code: bytes) -> bool:
    """Whether seven bytes of x86-64 end with a `call *` of some form (opcode FF /2)."""
    for length in (2, 3, 6):
        opcode, mode = code[7 - length], code[8 - length]
        if opcode == 0xFF and mode & 0x38 == 0x10 and _operand_length(mode) == length - 2:
            return True
    for length in (3, 4, 7):  # with a scaled index
        opcode, mode = code[7 - length], code[8 - length]
        if opcode == 0xFF and mode & 0x3F == 0x14 and {0: 3, 1: 4, 2: 7}.get(mode >> 6) == length:
            return True
    return False


def _operand_length(mode: int) -> int:
    """Bytes of displacement behind a ModRM byte without a scaled index."""
    if mode >> 6 == 0:
        return 4 if mode & 7 == 5 else 0
    return {1: 1, 2: 4, 3: 0}[mode >> 6] if mode >> 6 == 3 or mode & 7 != 4 else -1


def names(frames: Iterable[Frame]) -> list[str]:
    """The frames' functions, innermost first; "?" where there is no name."""
    return [frame.function or "?" for frame in frames]
