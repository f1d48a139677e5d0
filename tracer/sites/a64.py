"""A64 (aarch64) instructions as operations; knows capstone.

Knows: the instructions compilers use to carry pointers and constants about. Every other instruction
clobbers each register that it names and may write, and the memory that it may write. Does not know QEMU.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import capstone
from capstone import arm64

from tracer.sites.isa import (
    Add,
    Clobber,
    Compare,
    Control,
    Convention,
    Exchange,
    Imm,
    Instruction,
    Mem,
    Move,
    Operand,
    Operation,
    Reg,
)

_LINK = "x30"
CONVENTION = Convention(
    arguments=tuple(f"x{number}" for number in range(8)),
    result="x0",
    stack="sp",
    registers=(*(f"x{number}" for number in range(31)), "sp"),
    callee_saved=frozenset(f"x{number}" for number in range(19, 30)),
)

# Every general register's name, with its full name and width in bytes.
_NAMES = {
    **{f"x{number}": (f"x{number}", 8) for number in range(31)},
    **{f"w{number}": (f"x{number}", 4) for number in range(31)},
    "fp": ("x29", 8),
    "lr": (_LINK, 8),
    "sp": ("sp", 8),
    "wsp": ("sp", 4),
}
_ZERO_WIDTHS = {"xzr": 8, "wzr": 4}
_VECTOR_WIDTHS = {"q": 16, "v": 16, "d": 8, "s": 4, "h": 2, "b": 1}
_ZERO = Imm(0)

# Acquire and release change the order of accesses, not what is read or written. None: as wide as the register.
_WIDTHS = {"": None, "b": 1, "h": 2, "sb": 1, "sh": 2, "sw": 4}
_LOADS = {
    name + suffix: width
    for name in ("ldr", "ldur", "ldtr", "ldar", "ldlar", "ldapr", "ldapur", "ldxr", "ldaxr")
    for suffix, width in _WIDTHS.items()
}
_LOADS |= {"ldp": None, "ldnp": None, "ldpsw": 4}
_STORES = {
    name + suffix: _WIDTHS[suffix]
    for name in ("str", "stur", "sttr", "stlr", "stllr", "stlur")
    for suffix in ("", "b", "h")
}
_STORES |= {"stp": None, "stnp": None}
# The store-exclusive that ends a loop, and the single instructions of FEAT_LSE; both with release or without.
_EXCLUSIVE = re.compile(r"st(?P<release>l?)x[rp](?P<width>[bh]?)")
_ATOMIC = re.compile(r"(?:(?:ld|st)(?:add|clr|eor|set|[su]max|[su]min)|swp|casp?)a?(?P<release>l?)(?P<width>[bh]?)")
_ANY_WIDTH = 64  # no instruction writes more

_BRANCHES = ("cbz", "cbnz", "tbz", "tbnz")
_CALLS = ("bl", "blr", "blraa", "blraaz", "blrab", "blrabz")
_JUMPS = ("b", "br", "braa", "braaz", "brab", "brabz")
_TRAPS = ("brk", "hlt", "udf")
_SIGNING = ("pac", "aut", "xpac")
_NOTHING = frozenset(("nop", "bti", "hint", "yield", "csdb", "dmb", "dsb", "isb", "prfm", "prfum", "clrex", "esb"))
# What arch/arm64/kernel/probes/decode-insn.c simulates; the nop since Linux 6.13.
_SIMULATED = frozenset(("b", "bl", "br", "blr", "ret", "adr", "adrp", "nop", *_BRANCHES))

_LINKING = re.compile(rb"[\x94-\x97]")  # the last byte of a bl
_NEAR = 64  # bytes between an adrp and the add that belongs to it


class A64Decoder:
    """Decoder for aarch64."""

    convention = CONVENTION

    def __init__(self) -> None:
        self._engine: Any = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
        self._engine.detail = True

    def decode(self, code: bytes, address: int) -> list[Instruction]:
        """See isa.Decoder."""
        return [_instruction(raw) for raw in self._engine.disasm(code, address)]

    def references(self, code: bytes, address: int, targets: Collection[int]) -> Iterator[tuple[int, int]]:
        """(where, which) of each `add` that makes the address of one of `targets` from an `adrp` close before."""
        for target in targets:
            for at in _adds_of(code, target & 0xFFF):
                if _page_before(code, at, address) == target & ~0xFFF:
                    yield address + at, target

    def calls_to(self, code: bytes, address: int, target: int) -> Iterator[int]:
        """Where there are `bl` to `target`."""
        for found in _LINKING.finditer(code):
            at = found.start() - 3
            distance = (int.from_bytes(code[at : at + 4], "little") & 0x3FFFFFF) << 2
            distance -= (distance & 1 << 27) << 1
            if at % 4 == 0 and address + at + distance == target:
                yield address + at


def _adds_of(code: bytes, low: int) -> Iterator[int]:
    """Where there is an `add xd, xn, #low`, whichever the registers. The upper half is searched for, for speed."""
    upper = bytes((low >> 6, 0x91))
    found = code.find(upper)
    while found >= 0:
        at = found - 2
        if at >= 0 and at % 4 == 0 and code[at + 1] >> 2 == low & 0x3F:
            yield at
        found = code.find(upper, found + 1)


def _page_before(code: bytes, at: int, address: int) -> int | None:
    """What the nearest `adrp` before the `add` at `at` put into the register that it adds to."""
    register = int.from_bytes(code[at : at + 4], "little") >> 5 & 31
    for before in range(at - 4, max(at - _NEAR, 0) - 1, -4):
        word = int.from_bytes(code[before : before + 4], "little")
        if word & 0x9F00001F == 0x90000000 | register:
            page = (word >> 29 & 3) | (word >> 5 & 0x7FFFF) << 2
            return (address + before & ~0xFFF) + (page - ((page & 1 << 20) << 1) << 12)
    return None


def _instruction(raw: Any) -> Instruction:
    name = raw.mnemonic
    text = f"{name} {raw.op_str}".strip()
    conditional = name.startswith(("b.", "bc."))
    cheap = conditional or name in _SIMULATED
    if conditional or name in _BRANCHES or name in _CALLS or name in _JUMPS:
        return _transfer(raw, name, text, cheap)
    if name.startswith(("ret", "eret")):
        return Instruction(raw.address, raw.size, text, control=Control.RETURN, cheap=cheap)
    if name in _TRAPS:
        return Instruction(raw.address, raw.size, text, control=Control.STOP)
    return Instruction(raw.address, raw.size, text, _operations(raw, name), cheap=cheap)


def _transfer(raw: Any, name: str, text: str, cheap: bool) -> Instruction:
    """A call, jump or conditional jump; cbz and cbnz compare as well."""
    control = Control.CALL if name in _CALLS else Control.JUMP if name in _JUMPS else Control.BRANCH
    operands = [_operand(raw, operand) for operand in raw.operands]
    direct = control is Control.BRANCH or name in ("b", "bl")
    target, tested = operands[-1] if direct else None, operands[0] if name in ("cbz", "cbnz") else None
    return Instruction(
        raw.address,
        raw.size,
        text,
        (Compare(tested, _ZERO),) if tested is not None else (),
        control,
        target.value if isinstance(target, Imm) else None,
        None if direct else operands[0],
        cheap,
    )


def _operations(raw: Any, name: str) -> tuple[Operation, ...]:
    if name.startswith(_SIGNING) and not raw.operands:
        return (Clobber(Reg(_LINK)),)  # a return address is signed or checked
    if name in _NOTHING:
        return ()
    if name in _LOADS or name in _STORES:
        return _access(raw, name)
    for pattern in (_EXCLUSIVE, _ATOMIC):
        found = pattern.fullmatch(name)
        if found:
            return (*_exchange(raw, found["width"], bool(found["release"])), *_clobbered_registers(raw, name))
    operands = [_operand(raw, operand) for operand in raw.operands]
    simple = _simple(name, operands)
    return simple if simple is not None else _clobbers(raw, name)


def _operand(raw: Any, operand: Any) -> Operand | None:
    """None for what is not followed: vector registers, shifted and extended ones, indexed memory."""
    if operand.type == arm64.ARM64_OP_IMM:
        shifted = operand.shift.type == arm64.ARM64_SFT_LSL
        return Imm(operand.imm << operand.shift.value if shifted else operand.imm)
    if operand.type == arm64.ARM64_OP_REG:
        name = raw.reg_name(operand.reg)
        if operand.shift.type or operand.ext:
            return None
        if name in _ZERO_WIDTHS:
            return _ZERO
        return Reg(*_NAMES[name]) if name in _NAMES else None
    if operand.type == arm64.ARM64_OP_MEM and not operand.mem.index:
        known = _NAMES.get(raw.reg_name(operand.mem.base))
        return Mem(known[0], operand.mem.disp) if known else None
    return None


def _access(raw: Any, name: str) -> tuple[Operation, ...]:
    """Loads and stores of one register or two, with the base register's change if there is one."""
    stores = name in _STORES
    registers = [operand for operand in raw.operands if operand.type == arm64.ARM64_OP_REG]
    place = _place(raw)
    width = (_STORES if stores else _LOADS)[name]
    moves: list[Operation] = []
    offset = 0
    for operand in registers:
        register, full = _operand(raw, operand), _width(raw, operand)
        size = width or full
        memory = None if place is None else Mem(place.base, place.offset + offset, size)
        moves.extend(_store(register, memory) if stores else _load(register, memory))
        offset += size
    if not stores and place is not None and moves and isinstance(moves[0], Move):
        # The first of a pair may be loaded over the base; the second one's address is the old one's.
        moves.sort(key=lambda move: isinstance(move, Move) and move.target == Reg(place.base or ""))
    return (*moves, *_write_back(raw))


def _store(source: Operand | None, memory: Mem | None) -> tuple[Operation, ...]:
    if memory is None:
        return ()
    if isinstance(source, (Reg, Imm)):
        return (Move(memory, source),)
    return (Clobber(memory),)


def _load(target: Operand | None, memory: Mem | None) -> tuple[Operation, ...]:
    if not isinstance(target, Reg):
        return ()
    return (Clobber(target),) if memory is None else (Move(target, memory),)


def _place(raw: Any) -> Mem | None:
    """Where a load or store begins; a load from beside the code names the address itself."""
    memory = [operand for operand in raw.operands if operand.type == arm64.ARM64_OP_MEM]
    if not memory:
        literal = _operand(raw, raw.operands[-1])
        return Mem(None, literal.value) if isinstance(literal, Imm) else None
    place = _operand(raw, memory[0])
    if not isinstance(place, Mem):
        return None
    return Mem(place.base, 0) if _after(raw) is not None else place


def _after(raw: Any) -> Any:
    """The operand behind `[base]`, that is added to the base when the access is done; or None."""
    *rest, last = raw.operands
    behind = bool(rest) and rest[-1].type == arm64.ARM64_OP_MEM
    return last if raw.writeback and behind else None


def _write_back(raw: Any) -> tuple[Operation, ...]:
    """[base, #n]! and [base], #n leave the base register changed."""
    memory = next((operand for operand in raw.operands if operand.type == arm64.ARM64_OP_MEM), None)
    if memory is None or not raw.writeback:
        return ()
    base = Reg(*_NAMES[raw.reg_name(memory.mem.base)])
    after = _after(raw)
    change = Imm(memory.mem.disp) if after is None else _operand(raw, after)
    return (Add(base, change),) if isinstance(change, Imm) else (Clobber(base),)


def _width(raw: Any, operand: Any) -> int:
    name = raw.reg_name(operand.reg)
    if name in _ZERO_WIDTHS:
        return _ZERO_WIDTHS[name]
    return _NAMES[name][1] if name in _NAMES else _VECTOR_WIDTHS.get(name[0], _ANY_WIDTH)


def _exchange(raw: Any, suffix: str, release: bool) -> tuple[Operation, ...]:
    """An atomic access; only one with release orders what was stored before, which Exchange promises."""
    place = _place(raw)
    if place is None:
        return ()
    *_, source = (operand for operand in raw.operands if operand.type == arm64.ARM64_OP_REG)
    pair = raw.mnemonic.startswith(("stxp", "stlxp", "casp"))
    width = {"b": 1, "h": 2}.get(suffix) or _width(raw, source) * (2 if pair else 1)
    memory = Mem(place.base, place.offset, width)
    return (Exchange(memory), Clobber(memory)) if release else (Clobber(memory),)


def _simple(name: str, operands: list[Operand | None]) -> tuple[Operation, ...] | None:
    """The operations of the instructions that are followed; None for all others."""
    if None in operands or len(operands) < 2:
        return None
    target, left, *rest = operands
    if name in ("cmp", "tst") and target is not None and left is not None:
        return _comparison(name, target, left)
    if name in ("mov", "movz", "adr", "adrp"):
        return _set(target, left)
    if name in ("add", "adds", "sub", "subs") and len(rest) == 1 and left is not None and rest[0] is not None:
        tested = (Compare(left, rest[0]),) if name == "subs" else ()
        made = _added(target, left, rest[0], negative=name.startswith("sub"))
        return None if made is None else (*tested, *made)
    return None


def _comparison(name: str, left: Operand, right: Operand) -> tuple[Operation, ...]:
    if name == "cmp":
        return (Compare(left, right),)
    return (Compare(left, _ZERO),) if left == right else ()


def _set(target: Operand | None, source: Operand | None) -> tuple[Operation, ...] | None:
    if source is None or not isinstance(target, Reg):
        return None
    return (Move(target, source),)


def _added(target: Operand | None, left: Operand, right: Operand, negative: bool) -> tuple[Operation, ...] | None:
    """target = left + right, or left - right for a constant."""
    if negative:
        if not isinstance(right, Imm):
            return (Clobber(target),) if isinstance(target, Reg) else ()
        right = Imm(-right.value)
    if not isinstance(target, Reg):
        return ()  # the zero register
    if target == right:
        left, right = right, left
    return (Add(target, right),) if target == left else (Move(target, left), Add(target, right))


def _clobbers(raw: Any, name: str) -> tuple[Operation, ...]:
    """Every general register that may be written, and the memory."""
    if name in ("cmp", "cmn", "tst", "ccmp", "ccmn"):
        return ()
    place = _place(raw) if name.startswith("st") and raw.operands else None
    memory = () if place is None else (Clobber(Mem(place.base, place.offset, _ANY_WIDTH)),)
    return (*memory, *_clobbered_registers(raw, name))


def _clobbered_registers(raw: Any, name: str) -> tuple[Operation, ...]:
    """Capstone does not know what atomic accesses write, so all that such an instruction names is taken."""
    unsure = name.startswith(("ld", "st", "cas", "swp"))
    written = {raw.reg_name(register) for register in raw.regs_access()[1]}
    for operand in raw.operands:
        if operand.type == arm64.ARM64_OP_REG and (unsure or operand.access != capstone.CS_AC_READ):
            written.add(raw.reg_name(operand.reg))
        if operand.type == arm64.ARM64_OP_MEM and raw.writeback:
            written.add(raw.reg_name(operand.mem.base))
    return tuple(Clobber(Reg(full)) for full in sorted({_NAMES[each][0] for each in written if each in _NAMES}))
