"""x86-64 instructions as operations; knows capstone.

Knows: the instructions compilers use to carry pointers and constants about. Every other instruction
clobbers what capstone says that it writes. Does not know QEMU.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import capstone
from capstone import x86

from tracer.sites.isa import (
    Add,
    AddressOf,
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

_LEGACY = ("ax", "bx", "cx", "dx", "si", "di", "bp", "sp")
_NUMBERED = tuple(f"r{number}" for number in range(8, 16))
CONVENTION = Convention(
    arguments=("rdi", "rsi", "rdx", "rcx", "r8", "r9"),
    result="rax",
    stack="rsp",
    registers=tuple("r" + name for name in _LEGACY) + _NUMBERED,
    callee_saved=frozenset(("rbx", "rbp", "r12", "r13", "r14", "r15")),
)


def _names() -> dict[str, tuple[str, int]]:
    """Every general register's name, with its full name and width in bytes."""
    names = {}
    for name in _LEGACY:
        names.update({"r" + name: ("r" + name, 8), "e" + name: ("r" + name, 4), name: ("r" + name, 2)})
        short = name[0] if name.endswith("x") else name
        names[short + "l"] = ("r" + name, 1)
        if name.endswith("x"):
            names[short + "h"] = ("r" + name, 1)
    for name in _NUMBERED:
        names.update({name: (name, 8), name + "d": (name, 4), name + "w": (name, 2), name + "b": (name, 1)})
    return names


_NAMES = _names()
_ONE = Imm(1)
_MINUS_ONE = Imm(-1)
_ZERO = Imm(0)
_STACK = Reg("rsp")
_TRAPS = frozenset(("ud2", "ud1", "ud0", "hlt", "int3"))


# Instructions that move 8 or 16 bytes as they are, and those that put two halves together.
_VECTOR_MOVES = frozenset(("movq", "movd", "movaps", "movups", "movapd", "movupd", "movdqa", "movdqu"))
_VECTOR_PAIRS = frozenset(("punpcklqdq", "movlhps", "unpcklpd", "movhps", "movhpd", "pxor", "xorps", "xorpd"))
_LEA = re.compile(rb"[\x48\x4c]\x8d[\x05\x0d\x15\x1d\x25\x2d\x35\x3d]", re.S)
_CALL = re.compile(rb"\xe8", re.S)
_IMMEDIATE_OPCODES = frozenset(range(0xB8, 0xC0))


class X86Decoder:
    """Decoder for x86-64."""

    convention = CONVENTION

    def __init__(self) -> None:
        self._engine: Any = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._engine.detail = True

    def decode(self, code: bytes, address: int) -> list[Instruction]:
        """See isa.Decoder."""
        return [self._instruction(raw) for raw in self._engine.disasm(code, address)]

    def _instruction(self, raw: Any) -> Instruction:
        name = raw.mnemonic.rpartition(" ")[2]  # without bnd, lock, notrack
        text = f"{raw.mnemonic} {raw.op_str}".strip()
        operands = [self._operand(raw, operand) for operand in raw.operands]
        if name == "call" or name == "jmp" or raw.group(capstone.CS_GRP_JUMP):
            return _transfer(raw, name, text, operands)
        if name.startswith("ret"):
            return Instruction(raw.address, raw.size, text, control=Control.RETURN)
        if name in _TRAPS:
            return Instruction(raw.address, raw.size, text, control=Control.STOP)
        cheap = name == "nop" or (name == "push" and raw.opcode[0] & 0xF8 == 0x50)
        return Instruction(raw.address, raw.size, text, self._operations(raw, name, operands), cheap=cheap)

    def references(self, code: bytes, address: int, targets: Collection[int]) -> Iterator[tuple[int, int]]:
        """See isa.Decoder: `lea target(%rip)` anywhere, and `mov $target` where addresses are absolute."""
        for found in _LEA.finditer(code):
            at = address + found.start()
            target = at + 7 + int.from_bytes(code[found.start() + 3 : found.start() + 7], "little", signed=True)
            if target in targets:
                yield at, target
        for target in targets:
            if 0 < target < 1 << 31:
                yield from _immediates(code, address, target)

    def calls_to(self, code: bytes, address: int, target: int) -> Iterator[int]:
        """See isa.Decoder."""
        for found in _CALL.finditer(code):
            at = found.start()
            if address + at + 5 + int.from_bytes(code[at + 1 : at + 5], "little", signed=True) == target:
                yield address + at

    def _operations(self, raw: Any, name: str, operands: list[Operand | None]) -> tuple[Operation, ...]:
        locked = raw.prefix[0] == x86.X86_PREFIX_LOCK
        if locked or name == "xchg":
            exchanges = (Exchange(operand) for operand in operands if isinstance(operand, Mem))
            return (*exchanges, *self._clobbers(raw, operands))
        if name in ("nop", "endbr64", "pause"):
            return ()
        simple = _simple(name, operands)
        if simple is None and name in _VECTOR_MOVES | _VECTOR_PAIRS:
            simple = self._vector(raw, name)
        return simple if simple is not None else self._clobbers(raw, operands)

    def _vector(self, raw: Any, name: str) -> tuple[Operation, ...] | None:
        """Compilers store neighbouring pointers together, by way of a vector register's two halves."""
        if len(raw.operands) != 2:
            return None
        target, source = (self._halves(raw, operand) for operand in raw.operands)
        if target is None or source is None:
            return None
        (low, high), (first, second) = target, source
        if name in ("movq", "movd"):
            return (Move(low, first), *((Move(high, _ZERO),) if isinstance(high, Reg) else ()))
        if name in _VECTOR_MOVES:
            return (Move(low, first), Move(high, second)) if high and second else None
        if name == "movhps" or name == "movhpd":
            return (Move(high, first),) if isinstance(high, Reg) else (Move(low, second),) if second else None
        if name == "punpcklqdq" or name == "movlhps" or name == "unpcklpd":
            return (Move(high, first),) if high else None
        same = raw.operands[0].type == raw.operands[1].type == x86.X86_OP_REG and low == first
        return (Move(low, _ZERO), Move(high, _ZERO)) if same and high else None

    def _halves(self, raw: Any, operand: Any) -> tuple[Reg | Mem, Reg | Mem | None] | None:
        """The low and high eight bytes of an operand; a general register has no high half."""
        if operand.type == x86.X86_OP_REG:
            name = raw.reg_name(operand.reg)
            if name.startswith("xmm"):
                return Reg(name), Reg(name + ".high")
            known = _NAMES.get(name)
            return (Reg(*known), None) if known and known[1] == 8 else None
        whole = self._operand(raw, operand)
        if not isinstance(whole, Mem) or operand.size not in (8, 16):
            return None
        return Mem(whole.base, whole.offset), Mem(whole.base, whole.offset + 8)

    def _clobbers(self, raw: Any, operands: list[Operand | None]) -> tuple[Operation, ...]:
        _, written = raw.regs_access()
        touched = [raw.reg_name(register) for register in written]
        names = {_NAMES[name][0] for name in touched if name in _NAMES}
        names.update(half for name in touched if name[1:3] == "mm" for half in _vector_halves(name))
        clobbers: list[Operation] = [Clobber(Reg(name)) for name in sorted(names)]
        for operand, access in zip(operands, raw.operands):
            if isinstance(operand, Mem) and access.access & capstone.CS_AC_WRITE:
                clobbers.append(Clobber(operand))
        return tuple(clobbers)

    def _operand(self, raw: Any, operand: Any) -> Operand | None:
        """None for what is not followed: vector registers, segments, scaled indices."""
        if operand.type == x86.X86_OP_IMM:
            return Imm(operand.imm)
        if operand.type == x86.X86_OP_REG:
            known = _NAMES.get(raw.reg_name(operand.reg))
            return None if known is None else Reg(*known)
        memory = operand.mem
        if memory.segment or memory.index:
            return None
        if memory.base == x86.X86_REG_RIP:
            return Mem(None, raw.address + raw.size + memory.disp, operand.size)
        if not memory.base:
            return Mem(None, memory.disp, operand.size)
        known = _NAMES.get(raw.reg_name(memory.base))
        return Mem(known[0], memory.disp, operand.size) if known and known[1] == 8 else None


def _vector_halves(name: str) -> tuple[str, str]:
    full = "xmm" + name[3:]
    return full, full + ".high"


def _immediates(code: bytes, address: int, target: int) -> Iterator[tuple[int, int]]:
    """`mov $target,%r32` and `mov $target,mem` or `%r64` (whose instruction begins a little before)."""
    pattern = target.to_bytes(4, "little")
    at = code.find(pattern)
    while at > 0:
        if code[at - 1] in _IMMEDIATE_OPCODES or 0xC7 in code[max(at - 7, 0) : at]:
            yield address + at - 1, target
        at = code.find(pattern, at + 1)


def _transfer(raw: Any, name: str, text: str, operands: list[Operand | None]) -> Instruction:
    """A call, jump or conditional jump. The kernel emulates the direct ones (branch_setup_xol_ops)."""
    control = {"call": Control.CALL, "jmp": Control.JUMP}.get(name, Control.BRANCH)
    operand = operands[0] if operands else None
    direct = isinstance(operand, Imm)
    return Instruction(
        raw.address,
        raw.size,
        text,
        control=control,
        target=operand.value if isinstance(operand, Imm) else None,
        via=None if direct else operand,
        cheap=direct and raw.bytes[0] in (0xE8, 0xE9, 0xEB, 0x0F, *range(0x70, 0x80)),
    )


def _simple(name: str, operands: list[Operand | None]) -> tuple[Operation, ...] | None:
    """The operations of the instructions that are followed; None for all others."""
    target = operands[0] if operands else None
    source = operands[1] if len(operands) > 1 else None
    if name in ("push", "pop"):
        return _stack(name, target)
    if name == "leave":
        frame = Reg("rbp")
        return (Move(_STACK, frame), Move(frame, Mem("rsp", 0)), Add(_STACK, Imm(8)))
    if name in ("cmp", "test") and target is not None and source is not None:
        return _comparison(name, target, source)
    if not isinstance(target, (Reg, Mem)):
        return None
    if name in ("inc", "dec"):
        return (Add(target, _ONE if name == "inc" else _MINUS_ONE),)
    if source is None:
        return None
    if name in ("mov", "movabs"):
        return (Move(target, source),)
    if name in ("movzx", "movsx", "movsxd") and isinstance(source, Mem):
        return (Move(target, source),)
    if name == "lea" and isinstance(target, Reg) and isinstance(source, Mem):
        return (AddressOf(target, source),)
    if name == "add":
        return (Add(target, source),)
    if name == "sub" and isinstance(source, Imm):
        return (Add(target, Imm(-source.value)),)
    if name == "xor" and target == source:
        return (Move(target, _ZERO),)
    return None


def _stack(name: str, operand: Operand | None) -> tuple[Operation, ...]:
    slot = Mem("rsp", 0)
    if name == "push":
        store: Operation = Clobber(slot) if operand is None else Move(slot, operand)
        return (Add(_STACK, Imm(-8)), store)
    load: tuple[Operation, ...] = (Move(operand, slot),) if isinstance(operand, Reg) else ()
    return (*load, Add(_STACK, Imm(8)))


def _comparison(name: str, left: Operand, right: Operand) -> tuple[Operation, ...]:
    if name == "cmp":
        return (Compare(left, right),)
    return (Compare(left, _ZERO),) if left == right else ()
