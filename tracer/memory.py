"""Reading a target's memory: exact bytes or FaultError.

Knows: /proc/PID/mem. Does not know layouts. Reading stops nothing and changes nothing; what was read
may be torn, since the process goes on.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import Protocol

from tracer.errors import FaultError, NotPermitted
from tracer.rights import refusal
from tracer.target import Region, Target, ended, trace_line

PAGE = os.sysconf("SC_PAGE_SIZE")
CHUNK = 1 << 20
PAGE_PRESENT_OR_SWAPPED = (1 << 63) | (1 << 62)  # Documentation/admin-guide/mm/pagemap.rst
_EXISTS = bytes(highest << 56 & PAGE_PRESENT_OR_SWAPPED != 0 for highest in range(256))  # by an entry's last byte
#: A malloc arena of glibc is at most 64 MiB; anything larger is guest RAM or a cache of such a kind.
LARGEST_ARENA = 64 << 20


class MemoryReader(Protocol):
    """What a live process and a core file have in common."""

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes at `address`, or FaultError."""
        ...


def read_u64(memory: MemoryReader, address: int) -> int:
    """One 64-bit word; FaultError if it cannot be read."""
    value: int = struct.unpack("<Q", memory.read(address, 8))[0]
    return value


def read_string(memory: MemoryReader, address: int, limit: int = 4096) -> str:
    """A C string of at most `limit` bytes; what can be read of it."""
    text = b""
    while len(text) < limit:
        step = min(256, PAGE - (address + len(text)) % PAGE)
        try:
            part = memory.read(address + len(text), step)
        except FaultError:
            break
        end = part.find(b"\0")
        if end >= 0:
            return (text + part[:end]).decode(errors="replace")
        text += part
    return text.decode(errors="replace")


class LiveMemory:
    """The memory of a running process, read through /proc/PID/mem."""

    def __init__(self, target: Target) -> None:
        self._target = target
        try:
            self._fd = os.open(f"/proc/{target.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            refused = refusal(target.pid, memory=True)
            message = f"the memory of process {target.pid} may not be read {refused.reason}"
            raise NotPermitted(message, refused.hint or trace_line(target.pid)) from error
        except OSError as error:
            raise ended(target.pid, error) from error

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes at `address`, or FaultError."""
        try:
            data = os.pread(self._fd, size, address)
        except (OSError, OverflowError) as error:
            raise FaultError(address, size) from error
        if len(data) != size:
            raise FaultError(address, size)
        return data

    def close(self) -> None:
        """Give the file descriptor back."""
        os.close(self._fd)

    def heap_regions(self) -> Iterator[Region]:
        """Where malloc's memory is: writable anonymous mappings up to the size of an arena, [heap] first."""
        regions = [r for r in self._target.regions() if r.permissions.startswith("rw") and not r.inode]
        yield from (r for r in regions if r.path == "[heap]")
        yield from (
            r
            for r in regions
            if (not r.path or r.path.startswith("[anon")) and r.size <= LARGEST_ARENA and "s" not in r.permissions
        )

    def chunks(self, regions: Iterable[Region]) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) of all pages that exist; pages never touched stay untouched."""
        try:
            pagemap = os.open(f"/proc/{self._target.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ended(self._target.pid, error) from error
        try:
            for region in regions:
                for start, end in _existing(pagemap, region):
                    yield from self._read_run(start, end)
        finally:
            os.close(pagemap)

    def _read_run(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        for address in range(start, end, CHUNK):
            try:
                yield address, self.read(address, min(CHUNK, end - address))
            except FaultError:
                continue


def _existing(pagemap: int, region: Region) -> Iterator[tuple[int, int]]:
    """Runs [start, end) of pages that are in memory or in swap."""
    try:
        entries = os.pread(pagemap, region.size // PAGE * 8, region.start // PAGE * 8)
    except (OSError, ValueError):
        yield region.start, region.end
        return
    # A byte for each page, so that runs are found without a look at each: most of an arena was never touched.
    exists = entries[7::8].translate(_EXISTS)
    start = exists.find(1)
    while start >= 0:
        end = exists.find(0, start)
        if end < 0:
            end = len(exists)
        yield region.start + start * PAGE, region.start + end * PAGE
        start = exists.find(1, end)
