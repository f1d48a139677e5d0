"""What of a process's memory is QEMU's own, and what the guest's: nothing of the guest may leave the host.

Knows: that QEMU tells the kernel of every block of guest memory, be it RAM, video memory or ROM, not to hand it to
child processes (MADV_DONTFORK, in ram_block_add(), system/physmem.c; softmmu/ or exec.c in older versions), and of
nothing else; /proc/PID/smaps shows that as `dc`, and the kernel keeps such memory in mappings of its own. Where no
mapping has the mark (there is no guest, or qtest runs it), only what proves itself is QEMU's: the heap, malloc's
arenas, stacks of threads and coroutines, data of programs and libraries. Large blocks of malloc are buffers, such as
a copy of the screen or of a disk's sectors, and are left out as well. Does not know QEMU's structures: a processor's
registers, and what small requests carry, are on the heap, and stay.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property

from tracer.errors import FaultError
from tracer.live import LiveView
from tracer.memory import LARGEST_ARENA, PAGE
from tracer.records import dataclass
from tracer.target import Region, ended

#: Files that are memory: nothing of them is taken, whatever they hold.
_MEMORY_FILES = re.compile(r"/memfd:|/dev/shm/|/dev/hugepages|/anon_hugepage|/dev/zero")
_HEADER = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) [r-][w-][x-][ps] ")
_READ = 1 << 20
#: malloc gives larger blocks a mapping of their own (M_MMAP_THRESHOLD, as it begins); bytes.
BUFFER = 128 << 10
_IS_MMAPPED = 2
#: Where such a block's head may stand in its first page: plain, or aligned to a page.
_HEADS = (0, PAGE - 16)
#: The end of a stack that is looked at for its beginning: a thread's descriptor, a coroutine's first frame; bytes.
_TOP = 16 << 10
_FIRST_FRAME = 256
#: Where the first head of an arena (struct heap_info, malloc/arena.c of glibc) points: into the same mapping.
_HEAD_SIZES = range(16, 256)
#: No RAM or video memory is that small, only what a guest is given to read, such as ROMs; the loader's lists are.
SMALL = 64 << 10


@dataclass
class LeftOut:
    """Bytes of mappings that are not saved. `marked` tells whether QEMU marks its guest's memory."""

    marked: bool
    guest: int = 0
    buffers: int = 0
    unproved: int = 0


class Own:
    """Asked of each mapping of a live process, in order of address; `left_out` sums up what was refused."""

    def __init__(self, view: LiveView, regions: Sequence[Region]) -> None:
        """Raises TargetExited."""
        self._view = view
        self._memory = view.memory
        self._regions = regions
        self._marks = list(_marked(view.pid))
        self.left_out = LeftOut(bool(self._marks))

    def ranges(self, region: Region) -> list[tuple[int, int]]:
        """[start, end) of what may be taken of it, in order."""
        if self._is_marked(region):
            self.left_out.guest += region.size
            return []
        if not _may_be_own(region):
            return []
        if region.path in ("[heap]", "[stack]", "[vdso]") or (region.inode and "w" not in region.permissions):
            return [(region.start, region.end)]
        if region.inode:
            return self._proved(region, region.path in self._programs)
        if not self._marks and not self._proves_itself(region):
            return self._proved(region, False)
        return list(self._without_buffers(region))

    def _proved(self, region: Region, proved: bool) -> list[tuple[int, int]]:
        if not proved:
            self.left_out.unproved += region.size
        return [(region.start, region.end)] if proved else []

    def _is_marked(self, region: Region) -> bool:
        """Any part of it: mappings may have changed since they were listed."""
        at = bisect_right(self._marks, (region.end - 1, 1 << 64)) - 1
        return at >= 0 and self._marks[at][1] > region.start

    @cached_property
    def _programs(self) -> frozenset[str]:
        """Files with code in them, whose data is a program's."""
        return frozenset(region.path for region in self._regions if region.inode and "x" in region.permissions)

    # Buffers.

    def _without_buffers(self, region: Region) -> Iterator[tuple[int, int]]:
        at = region.start
        while at < region.end and (size := self._buffer_at(at, region.end)):
            if size < BUFFER:
                yield at, at + size
            else:
                self.left_out.buffers += size
            at += size
        if at < region.end:
            yield at, region.end

    def _buffer_at(self, address: int, end: int) -> int:
        """The size of a mapping that malloc made for one block alone (malloc/malloc.c of glibc), or 0."""
        for head in _HEADS:
            try:
                before, size = struct.unpack("<QQ", self._memory.read(address + head, 16))
            except FaultError:
                return 0
            whole = (size & ~7) + head
            if before == head and size & 7 == _IS_MMAPPED and not whole % PAGE and 0 < whole <= end - address:
                return int(whole)
        return 0

    # Proofs, where nothing is marked.

    def _proves_itself(self, region: Region) -> bool:
        if region.size <= SMALL or self._follows_data(region) or self._is_arena(region.start):
            return True
        if any(region.start <= sp < region.end for sp in self._stack_pointers):
            return True
        return self._ends_as_a_stack(region)

    def _follows_data(self, region: Region) -> bool:
        """What a program's file does not hold of its data: zeros at first."""
        return any(
            before.end == region.start and before.path in self._programs and "w" in before.permissions
            for before in self._regions
        )

    def _is_arena(self, start: int) -> bool:
        if start % LARGEST_ARENA:
            return False
        try:
            arena, before, size, usable = struct.unpack("<QQQQ", self._memory.read(start, 32))
        except FaultError:
            return False
        first = arena - arena % LARGEST_ARENA
        known = any(region.start == first for region in self._regions)
        return (
            known
            and arena - first in _HEAD_SIZES
            and size <= usable <= LARGEST_ARENA
            and (not before) == (first == start)
        )

    @cached_property
    def _stack_pointers(self) -> tuple[int, ...]:
        return tuple(thread.syscall.sp for thread in self._view.threads() if thread.syscall)

    def _ends_as_a_stack(self, region: Region) -> bool:
        """A thread's descriptor holds its own address, twice; a coroutine's first frame returns into a library."""
        start = max(region.start, region.end - _TOP)
        try:
            words = struct.unpack(f"<{(region.end - start) // 8}Q", self._memory.read(start, region.end - start))
        except FaultError:
            return False
        for index in range(0, len(words) - 2, 2):
            if words[index] == words[index + 2] == start + index * 8:
                return True
        return any(self._is_code(self._view.machine.code_address(word)) for word in words[-_FIRST_FRAME // 8 :])

    def _is_code(self, address: int) -> bool:
        return any(
            region.start <= address < region.end and region.inode and "x" in region.permissions
            for region in self._regions
        )


def _may_be_own(region: Region) -> bool:
    """Whether anything of a mapping can be QEMU's: it is private, of moderate size, and of no file in memory."""
    if "r" not in region.permissions or "s" in region.permissions or region.path.startswith(("[vvar", "[vsyscall")):
        return False
    if region.path in ("[heap]", "[stack]", "[vdso]"):
        return True
    if _MEMORY_FILES.match(region.path):
        return False
    if not region.inode and "x" in region.permissions:
        return False  # translated guest code
    return region.size <= LARGEST_ARENA


def _marked(pid: int) -> Iterator[tuple[int, int]]:
    """[start, end) of the mappings that child processes do not get, in order of address."""
    try:
        with open(f"/proc/{pid}/smaps", "rb", buffering=_READ) as file:
            start = end = 0
            for line in file:
                if line.startswith(b"VmFlags:"):
                    if b"dc" in line.split():
                        yield start, end
                elif found := _HEADER.match(line):
                    start, end = int(found[1], 16), int(found[2], 16)
    except OSError as error:
        raise ended(pid, error) from error
