"""x86-64 instructions as operations; knows capstone.

Knows: the instructions compilers use to carry pointers and constants about. Every other instruction
clobbers what capstone says that it writes. Does not know QEMU.
"""

from __future__ import annotations

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

    def _operations(self, raw: Any, name: str, operands: list[Operand | None]) -> tuple[Operation, ...]:
        locked = raw.prefix[0] == x86.X86_PREFIX_LOCK
        if locked or name == "xchg":
            exchanges = (Exchange(operand) for operand in operands if isinstance(operand, Mem))
            return (*exchanges, *self._clobbers(raw, operands))
        if name in ("nop", "endbr64", "pause"):
            return ()
        simple = _simple(name, operands)
        return simple if simple is not None else self._clobbers(raw, operands)

    def _clobbers(self, raw: Any, operands: list[Operand | None]) -> tuple[Operation, ...]:
        _, written = raw.regs_access()
        names = {_NAMES[name][0] for name in map(raw.reg_name, written) if name in _NAMES}
        clobbers: list[Operation] = [Clobber(Reg(name)) for name in sorted(names)]
        for operand, access in zip(operands, raw.operands, strict=True):
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
    if not isinstance(target, Reg | Mem):
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
