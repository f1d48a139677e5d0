"""What the search for probe sites hands on: sites, attempts, and the build's facts.

Knows: addresses as the ELF file gives them (before relocation). Does not know bcc or processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from tracer.layout import Layout
from tracer.records import dataclass

SUBMIT = "submit"
DONE = "done"
CALLBACK = "callback"
SITE_NAMES = (SUBMIT, DONE, CALLBACK)


@dataclass(frozen=True)
class Site:
    """One proved place for a uprobe.

    `address` is the ELF virtual address; `register` holds the ThreadPoolElement there, named as the
    architecture's manual does ("rbp", "x19"), or the address of a member of it ("x19-0x44" is the element);
    `instruction` is its disassembly; `cheap` is true when the kernel emulates it (a nop, call, jmp, jcc
    or push), false when it must be single-stepped. `without_callback` tells of a callback site that it is
    reached for requests without a callback, too. `offset` is where the instruction is in the file, in bytes, and
    `code` what the file holds there, as hex: what is attached to is compared with it.
    """

    name: str
    address: int
    register: str
    instruction: str
    strategy: str
    cheap: bool
    without_callback: bool = False
    offset: int | None = None
    code: str = ""


@dataclass(frozen=True)
class Attempt:
    """One strategy's outcome, kept for `check` and for the error message."""

    strategy: str
    outcome: str
    ok: bool = False


@dataclass(frozen=True)
class Located:
    """Everything a build's file tells: sites, layout, functions, attempts.

    `functions` maps QEMU's function names to ELF addresses; always there:
    `thread_pool_completion_bh` and `worker_thread`; where found: `thread_pool_submit_aio`,
    `qemu_bh_schedule`, `spawn_thread_bh_fn`. `main_context` is the ELF address of the pointer that
    qemu_get_aio_context() loads, or None. `barrier_fixed` tells whether qemu_bh_schedule() marks the
    bottom half atomically, as it does since QEMU commit e8d3b1a25f (in v2.3); None if that was not seen.
    `sites` holds one site of each name; `more_sites` are further copies of one that compilers inlined.
    """

    sites: Mapping[str, Site]
    layout: Layout
    functions: Mapping[str, int]
    attempts: tuple[Attempt, ...]
    main_context: int | None = None
    barrier_fixed: bool | None = None
    notes: tuple[str, ...] = field(default=())
    more_sites: tuple[Site, ...] = ()

    def sites_of(self, *names: str) -> tuple[Site, ...]:
        """Every place to probe for these sites; all of them are needed to see every request."""
        return tuple(site for name in names for site in (self.sites[name], *self.more_sites) if site.name == name)
