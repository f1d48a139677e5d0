"""What differs from machine to machine in threads, stacks and core files.

Knows: the registers as NT_PRSTATUS and PTRACE_GETREGSET have them (struct user_regs_struct of x86-64's
sys/user.h, struct user_pt_regs of arm64's asm/ptrace.h), DWARF's numbers of them (psABI of x86-64, figure 3.36;
aadwarf64), and what an address of code looks like. Does not know code (tracer/sites) or processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tracer.records import dataclass


@dataclass(frozen=True)
class Machine:
    """One kind of processor; `name` is that of uname(2), `elf` the e_machine of its files.

    `preserved` and `frame_pointer` are DWARF's numbers: what a function gives back as it was.
    `floating_size` is that of NT_PRFPREG in bytes. Where return addresses are signed (arm64's pointer
    authentication), the signature is above the lowest `code_bits`.
    """

    name: str
    elf: int
    registers: tuple[str, ...]
    pc: str
    sp: str
    dwarf: Mapping[str, int]
    preserved: tuple[int, ...]
    frame_pointer: int
    floating_size: int
    code_bits: int

    def code_address(self, word: int) -> int:
        """Where a saved return address leads to: less its signature, if it has one."""
        return word & ((1 << self.code_bits) - 1)


X86_64 = Machine(
    name="x86_64",
    elf=62,
    registers=(
        *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
        *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
    ),
    pc="rip",
    sp="rsp",
    dwarf={"rax": 0, "rdx": 1, "rcx": 2, "rbx": 3, "rsi": 4, "rdi": 5, "rbp": 6, "rsp": 7, "rip": 16}
    | {f"r{number}": number for number in range(8, 16)},
    preserved=(3, 6, 12, 13, 14, 15),
    frame_pointer=6,
    floating_size=512,
    code_bits=64,
)

AARCH64 = Machine(
    name="aarch64",
    elf=183,
    registers=(*(f"x{number}" for number in range(31)), "sp", "pc", "pstate"),
    pc="pc",
    sp="sp",
    dwarf={**{f"x{number}": number for number in range(31)}, "sp": 31, "pc": 32},
    preserved=tuple(range(19, 30)),
    frame_pointer=29,
    floating_size=528,
    # Where programs get more (52), the kernel gives addresses above these only to who asks for them.
    code_bits=48,
)

MACHINES = (X86_64, AARCH64)
#: The machine that this runs on, and so what every live process here is for.
HOST = next((machine for machine in MACHINES if machine.name == os.uname().machine), X86_64)
