"""How a function's caller is found: the call frame information of .eh_frame.

Knows: common and frame description entries, their programs (DWARF 5, section 6.4) and the expressions
that PLT stubs and libc's signal frame use. Addresses are the file's. Does not know processes; what a
rule reads comes by a function. A program that it does not understand raises FrameError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Union

from tracer.elf import Image
from tracer.errors import AioTraceError, ImageError
from tracer.records import dataclass

MASK = (1 << 64) - 1
_MAX_ENTRY = 1 << 16
_MAX_STACK = 64

# Rules for a register: DWARF 5, section 6.4.1.
UNDEFINED, SAME, OFFSET, VAL_OFFSET, REGISTER, EXPRESSION, VAL_EXPRESSION = range(7)
Rule = tuple[int, Union[int, bytes]]

# Lengths of the pointer encodings that have a fixed one (low four bits); 0 is an absolute pointer.
_POINTER_SIZES = {0x0: 8, 0x2: 2, 0x3: 4, 0x4: 8, 0xA: 2, 0xB: 4, 0xC: 8}
_OMITTED = 0xFF


class FrameError(AioTraceError):
    """Call frame information that is damaged or of a kind that is not understood."""


@dataclass(frozen=True)
class Row:
    """Where the caller's registers are at one address of the code.

    `cfa` is (register, offset) or an expression; `registers` holds a rule for each register that has one.
    """

    cfa: tuple[int, int] | bytes
    registers: Mapping[int, Rule]
    return_register: int
    start: int  # of the function, or its part
    signal_frame: bool


@dataclass(frozen=True)
class _Common:
    """A common information entry; `program` holds its initial instructions."""

    code_factor: int
    data_factor: int
    return_register: int
    pointer_size: int
    has_augmentation: bool
    signal_frame: bool
    program: bytes


class _Cursor:
    """Bytes read one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    @property
    def more(self) -> bool:
        return self.at < len(self._data)

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self._data):
            raise FrameError("call frame information ends in the middle of an entry")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def uleb(self) -> int:
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or shift > 70:
                return value & MASK

    def sleb(self) -> int:
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or shift > 70:
                return value - (1 << shift) if byte & 0x40 else value

    def block(self) -> bytes:
        return self.take(self.uleb())

    def text(self) -> bytes:
        end = self._data.find(b"\0", self.at)
        if end < 0:
            raise FrameError("call frame information with an endless string")
        return self.take(end + 1 - self.at)[:-1]

    def rest(self) -> bytes:
        return self.take(len(self._data) - self.at)


class FrameTable:
    """The call frame information of one file; entries are kept once they were read."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._commons: dict[int, _Common] = {}
        self._rows: dict[int, Row | None] = {}

    def row(self, address: int) -> Row | None:
        """The row for `address`, or None where no entry covers it. Raises FrameError."""
        if address not in self._rows:
            try:
                self._rows[address] = self._read_row(address)
            except ImageError as error:
                raise FrameError(error.message) from error
        return self._rows[address]

    def _read_row(self, address: int) -> Row | None:
        found = self._image.frame_entry(address)
        if found is None:
            return None
        start, entry = found
        body = _Cursor(self._entry(entry))
        common = self._common(entry + 4 - body.number(4))
        body.take(common.pointer_size)  # the start, which the search table gave us
        size = body.number(common.pointer_size)
        if not start <= address < start + size:
            return None
        if common.has_augmentation:
            body.block()
        return _run(common, body.rest(), start, address)

    def _entry(self, address: int) -> bytes:
        """What follows an entry's length."""
        (length,) = struct.unpack("<I", self._image.read(address, 4))
        if not 4 <= length <= _MAX_ENTRY:
            raise FrameError(f"call frame information with an entry of {length} bytes")
        return self._image.read(address + 4, length)

    def _common(self, address: int) -> _Common:
        if address not in self._commons:
            self._commons[address] = _read_common(self._entry(address))
        return self._commons[address]


def _read_common(data: bytes) -> _Common:
    body = _Cursor(data)
    if body.number(4) != 0:
        raise FrameError("a frame entry that does not lead to its common entry")
    version = body.number(1)
    if version not in (1, 3):
        raise FrameError(f"call frame information of version {version}")
    augmentation = body.text()
    code_factor, data_factor = body.uleb(), body.sleb()
    return_register = body.number(1) if version == 1 else body.uleb()
    pointer_size = 8
    if augmentation.startswith(b"z"):
        extra = _Cursor(body.block())
        for letter in augmentation[1:]:
            if letter == ord("R"):
                pointer_size = _pointer_size(extra.number(1))
            elif letter == ord("P"):
                extra.take(_pointer_size(extra.number(1)))
            elif letter == ord("L"):
                extra.take(1)
    elif augmentation:
        raise FrameError("call frame information with an augmentation that is not known")
    signal_frame = b"S" in augmentation
    return _Common(
        code_factor, data_factor, return_register, pointer_size, bool(augmentation), signal_frame, body.rest()
    )


def _pointer_size(encoding: int) -> int:
    if encoding == _OMITTED or encoding & 0x0F not in _POINTER_SIZES:
        raise FrameError(f"call frame information with pointers of encoding {encoding:#x}")
    return _POINTER_SIZES[encoding & 0x0F]


@dataclass
class _State:
    """What a program builds up."""

    cfa: tuple[int, int] | bytes = (0, 0)
    registers: dict[int, Rule] = field(default_factory=dict)


def _run(common: _Common, program: bytes, start: int, address: int) -> Row:
    state = _State()
    machine = _Machine(common, state, {})
    machine.run(common.program, start, MASK)
    initial = dict(state.registers)
    machine = _Machine(common, state, initial)
    machine.run(program, start, address)
    return Row(state.cfa, state.registers, common.return_register, start, common.signal_frame)


class _Machine:
    """Runs call frame instructions up to the address that is asked for."""

    def __init__(self, common: _Common, state: _State, initial: Mapping[int, Rule]) -> None:
        self._common = common
        self._state = state
        self._initial = initial
        self._remembered: list[tuple[tuple[int, int] | bytes, dict[int, Rule]]] = []

    def run(self, program: bytes, location: int, address: int) -> None:
        cursor = _Cursor(program)
        while cursor.more:
            code = cursor.number(1)
            advance = self._advance(code, cursor)
            if advance is not None:
                location += advance * self._common.code_factor
                if location > address:
                    return
            else:
                self._step(code, cursor)

    def _advance(self, code: int, cursor: _Cursor) -> int | None:
        if code & 0xC0 == 0x40:
            return code & 0x3F
        return cursor.number({2: 1, 3: 2, 4: 4}[code]) if code in (2, 3, 4) else None

    def _step(self, code: int, cursor: _Cursor) -> None:
        rules = self._state.registers
        if code & 0xC0 == 0x80:
            rules[code & 0x3F] = (OFFSET, cursor.uleb() * self._common.data_factor)
        elif code & 0xC0 == 0xC0:
            self._restore(code & 0x3F)
        elif code in (0x00, 0x2D):
            pass  # nop; aarch64's negate_ra_state
        elif code == 0x2E:
            cursor.uleb()  # GNU_args_size
        elif code == 0x0A:
            self._remember()
        elif code == 0x0B:
            self._recall()
        elif 0x0C <= code <= 0x0F or code in (0x12, 0x13):
            self._define_cfa(code, cursor)
        else:
            self._rule(code, cursor.uleb(), cursor)

    def _remember(self) -> None:
        if len(self._remembered) >= _MAX_STACK:
            raise FrameError("call frame information that remembers too much")
        self._remembered.append((self._state.cfa, dict(self._state.registers)))

    def _recall(self) -> None:
        if not self._remembered:
            raise FrameError("call frame information that restores what it did not remember")
        self._state.cfa, rules = self._remembered.pop()
        self._state.registers.clear()
        self._state.registers.update(rules)

    def _restore(self, register: int) -> None:
        self._state.registers.pop(register, None)
        if register in self._initial:
            self._state.registers[register] = self._initial[register]

    def _define_cfa(self, code: int, cursor: _Cursor) -> None:
        if code == 0x0F:
            self._state.cfa = cursor.block()
        elif code == 0x0C:
            self._state.cfa = (cursor.uleb(), cursor.uleb())
        elif code == 0x12:
            self._state.cfa = (cursor.uleb(), cursor.sleb() * self._common.data_factor)
        elif isinstance(self._state.cfa, bytes):
            raise FrameError("call frame information that changes an expression")
        elif code == 0x0D:
            self._state.cfa = (cursor.uleb(), self._state.cfa[1])
        elif code == 0x0E:
            self._state.cfa = (self._state.cfa[0], cursor.uleb())
        else:
            self._state.cfa = (self._state.cfa[0], cursor.sleb() * self._common.data_factor)

    def _rule(self, code: int, register: int, cursor: _Cursor) -> None:
        factor = self._common.data_factor
        if code == 0x06:
            self._restore(register)
            return
        rules: dict[int, Callable[[], Rule]] = {
            0x05: lambda: (OFFSET, cursor.uleb() * factor),
            0x07: lambda: (UNDEFINED, 0),
            0x08: lambda: (SAME, 0),
            0x09: lambda: (REGISTER, cursor.uleb()),
            0x10: lambda: (EXPRESSION, cursor.block()),
            0x11: lambda: (OFFSET, cursor.sleb() * factor),
            0x14: lambda: (VAL_OFFSET, cursor.uleb() * factor),
            0x15: lambda: (VAL_OFFSET, cursor.sleb() * factor),
            0x16: lambda: (VAL_EXPRESSION, cursor.block()),
            0x2F: lambda: (OFFSET, -cursor.uleb() * factor),
        }
        if code not in rules:
            raise FrameError(f"call frame instruction {code:#x} is not known")
        self._state.registers[register] = rules[code]()


# Expressions: DWARF 5, section 2.5.

_FIXED = {0x08: (1, False), 0x09: (1, True), 0x0A: (2, False), 0x0B: (2, True), 0x0C: (4, False), 0x0D: (4, True)}
_FIXED |= {0x0E: (8, False), 0x0F: (8, True)}
_BINARY: dict[int, Callable[[int, int], int]] = {
    0x1A: lambda a, b: a & b,
    0x1C: lambda a, b: a - b,
    0x1E: lambda a, b: a * b,
    0x21: lambda a, b: a | b,
    0x22: lambda a, b: a + b,
    0x24: lambda a, b: a << min(b, 64),
    0x25: lambda a, b: a >> min(b, 64),
    0x27: lambda a, b: a ^ b,
    0x29: lambda a, b: int(_signed(a) == _signed(b)),
    0x2A: lambda a, b: int(_signed(a) >= _signed(b)),
    0x2B: lambda a, b: int(_signed(a) > _signed(b)),
    0x2C: lambda a, b: int(_signed(a) <= _signed(b)),
    0x2D: lambda a, b: int(_signed(a) < _signed(b)),
    0x2E: lambda a, b: int(_signed(a) != _signed(b)),
}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def evaluate(
    expression: bytes, register: Callable[[int], int], read: Callable[[int, int], bytes], first: int | None = None
) -> int:
    """The value of a DWARF expression; `first` is what the stack begins with.

    `register` and `read` raise what they like; FrameError where the expression is not understood.
    """
    cursor = _Cursor(expression)
    stack = [] if first is None else [first]
    while cursor.more:
        try:
            _operate(cursor.number(1), cursor, stack, register, read)
        except IndexError as error:
            raise FrameError("a frame's expression takes more than there is") from error
        if len(stack) > _MAX_STACK:
            raise FrameError("a frame's expression that does not end")
    if not stack:
        raise FrameError("a frame's expression without a value")
    return stack[-1]


def _operate(
    code: int,
    cursor: _Cursor,
    stack: list[int],
    register: Callable[[int], int],
    read: Callable[[int, int], bytes],
) -> None:
    if 0x30 <= code <= 0x4F:
        stack.append(code - 0x30)
    elif 0x70 <= code <= 0x8F:
        stack.append(register(code - 0x70) + cursor.sleb() & MASK)
    elif code == 0x92:
        stack.append(register(cursor.uleb()) + cursor.sleb() & MASK)
    elif code in _FIXED:
        size, signed = _FIXED[code]
        stack.append(cursor.number(size, signed) & MASK)
    elif code in (0x10, 0x11):
        stack.append((cursor.uleb() if code == 0x10 else cursor.sleb()) & MASK)
    elif code in (0x06, 0x94):
        size = 8 if code == 0x06 else cursor.number(1)
        stack.append(int.from_bytes(read(stack.pop(), size), "little"))
    elif code == 0x12:
        stack.append(stack[-1])
    elif code == 0x13:
        stack.pop()
    elif code == 0x16:
        stack[-1], stack[-2] = stack[-2], stack[-1]
    elif code == 0x23:
        stack.append(stack.pop() + cursor.uleb() & MASK)
    elif code in _BINARY:
        second, one = stack.pop(), stack.pop()
        stack.append(_BINARY[code](one, second) & MASK)
    elif code != 0x96:
        raise FrameError(f"operation {code:#x} in a frame's expression is not known")
