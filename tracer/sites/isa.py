"""What an instruction does, said the same way for every architecture.

Knows: the few operations that carry a pointer from one place to another, and where control goes.
Whatever else an instruction does to a register is Clobber: its value is then unknown, never guessed.
A decoder (tracer/sites/x86.py) makes these; tracer/sites/flow.py runs them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, Union


@dataclass(frozen=True)
class Reg:
    """A register by its full-width name; `width` bytes of it are meant.

    Vector registers come in halves of 8 bytes ("xmm0", "xmm0.high"); no probe can read those.
    """

    name: str
    width: int = 8


@dataclass(frozen=True)
class Imm:
    """A constant."""

    value: int


@dataclass(frozen=True)
class Mem:
    """`width` bytes at register `base` (None: at an absolute address) plus `offset`."""

    base: str | None
    offset: int
    width: int = 8


Operand = Union[Reg, Imm, Mem]


@dataclass(frozen=True)
class Move:
    target: Reg | Mem
    source: Operand


@dataclass(frozen=True)
class Add:
    """target += source; a subtraction of a constant is an addition of its negative."""

    target: Reg | Mem
    source: Operand


@dataclass(frozen=True)
class AddressOf:
    target: Reg
    source: Mem


@dataclass(frozen=True)
class Compare:
    left: Operand
    right: Operand


@dataclass(frozen=True)
class Exchange:
    """An atomic read-modify-write of memory: a full barrier on x86."""

    target: Mem


@dataclass(frozen=True)
class Clobber:
    """The target takes a value that is not followed."""

    target: Reg | Mem


Operation = Union[Move, Add, AddressOf, Compare, Exchange, Clobber]


# Prefixes on x86; on aarch64 what does not work out of line (arch/arm64/kernel/probes/decode-insn.c).
_REFUSED = (
    *("lock ", "rep", "xacquire", "xrelease"),
    *("ldxr", "ldaxr", "ldxp", "ldaxp", "stxr", "stlxr", "stxp", "stlxp", "mrs", "msr", "svc", "pac", "aut"),
)


class Control(Enum):
    """Where control goes after an instruction."""

    NEXT = "next"
    JUMP = "jump"
    BRANCH = "branch"  # to the target or on
    CALL = "call"
    RETURN = "return"
    STOP = "stop"  # it traps


@dataclass(frozen=True)
class Instruction:
    """One decoded instruction.

    `target` is where a direct jump or call goes, `via` the operand of an indirect one; `cheap` is
    true when the kernel's uprobes emulate it.
    """

    address: int
    size: int
    text: str
    operations: tuple[Operation, ...] = ()
    control: Control = Control.NEXT
    target: int | None = None
    via: Operand | None = None
    cheap: bool = False

    @property
    def probeable(self) -> bool:
        """Whether the kernel takes a probe here: it refuses some prefixes, and prefers not to be asked."""
        return not self.text.startswith(_REFUSED)

    @property
    def next(self) -> int:
        return self.address + self.size


@dataclass(frozen=True)
class Convention:
    """How functions call one another on an architecture."""

    arguments: tuple[str, ...]
    result: str
    stack: str
    registers: tuple[str, ...]
    callee_saved: frozenset[str] = field(default=frozenset())


class Decoder(Protocol):
    """One architecture's instructions."""

    convention: Convention

    def decode(self, code: bytes, address: int) -> list[Instruction]:
        """The instructions from `address` on, one behind the other, up to the first undecodable byte."""
        ...

    def references(self, code: bytes, address: int, targets: Collection[int]) -> Iterator[tuple[int, int]]:
        """(where, which) of what looks like an instruction that takes the address of one of `targets`.

        It is found by its bytes, without decoding: whoever uses it must prove it.
        """
        ...

    def calls_to(self, code: bytes, address: int, target: int) -> Iterator[int]:
        """Where there seem to be direct calls of `target`; found by their bytes, too."""
        ...
