"""Reading a live process's memory: this very process, and a child that ends."""

from __future__ import annotations

import ctypes as ct
import mmap
import os
import subprocess
from collections.abc import Iterator

import pytest

from tracer.errors import FaultError, TargetExited
from tracer.memory import CHUNK, PAGE, LiveMemory, read_string, read_u64
from tracer.target import Region, open_target


@pytest.fixture
def memory() -> LiveMemory:
    """The memory of this process."""
    return LiveMemory(open_target(os.getpid()))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


class Mapping:
    """Some pages of our own."""

    def __init__(self, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = ct.c_char.from_buffer(self.map)
        self.start = ct.addressof(self._view)
        self.end = self.start + pages * PAGE
        # A huge page would make pages exist that nobody touched.
        self.map.madvise(mmap.MADV_NOHUGEPAGE)

    def put(self, offset: int, data: bytes) -> None:
        self.map[offset : offset + len(data)] = data

    @property
    def region(self) -> Region:
        return Region(self.start, self.end, "rw-p", 0, "")


def test_exact_bytes(memory: LiveMemory) -> None:
    mapping = Mapping(2)
    mapping.put(PAGE - 4, b"across two pages")
    assert memory.read(mapping.start + PAGE - 4, 16) == b"across two pages"
    mapping.put(0, (0x1122334455667788).to_bytes(8, "little"))
    assert read_u64(memory, mapping.start) == 0x1122334455667788


@pytest.mark.parametrize("address", [0, 8, -8, 1 << 63, 2**64 - 8, 1 << 70])
def test_addresses_that_cannot_be_read(memory: LiveMemory, address: int) -> None:
    with pytest.raises(FaultError) as caught:
        memory.read(address, 8)
    assert (caught.value.address, caught.value.size) == (address, 8)


def test_all_or_nothing(child: subprocess.Popen[bytes]) -> None:
    """Half of what was asked for, up to the end of a mapping, is no answer."""
    target = open_target(child.pid)
    regions = target.regions()
    region = next(a for a, b in zip(regions, regions[1:]) if a.end < b.start and a.permissions.startswith("r"))
    memory = LiveMemory(target)
    assert len(memory.read(region.end - 8, 8)) == 8
    with pytest.raises(FaultError):
        memory.read(region.end - 8, 16)


def test_strings(memory: LiveMemory) -> None:
    mapping = Mapping(2)
    mapping.put(PAGE - 3, b"/srv/\xc3\xa4\0rest")
    assert read_string(memory, mapping.start + PAGE - 3) == "/srv/ä"
    mapping.put(0, b"x" * 100)
    assert read_string(memory, mapping.start, limit=10).startswith("x" * 10)
    assert read_string(memory, 8) == ""


def test_a_string_that_is_none_is_bounded(memory: LiveMemory) -> None:
    mapping = Mapping(4)
    mapping.put(0, b"x" * 4 * PAGE)
    assert len(read_string(memory, mapping.start, limit=PAGE)) <= PAGE + 256


def test_pages_that_exist(memory: LiveMemory) -> None:
    """Only they are read, in runs; pages never touched stay untouched."""
    mapping = Mapping(16)
    for page in (3, 4, 9):
        mapping.put(page * PAGE, b"here")
    chunks = list(memory.chunks([mapping.region]))
    assert [(address - mapping.start, len(data)) for address, data in chunks] == [
        (3 * PAGE, 2 * PAGE),
        (9 * PAGE, PAGE),
    ]
    assert all(data.startswith(b"here") for _, data in chunks)
    assert len(list(memory.chunks([mapping.region]))) == 2


def test_long_runs_come_in_pieces(memory: LiveMemory) -> None:
    pages = 2 * CHUNK // PAGE + 1
    mapping = Mapping(pages)
    mapping.put(0, b"\1" * pages * PAGE)
    chunks = list(memory.chunks([mapping.region]))
    assert [len(data) for _, data in chunks] == [CHUNK, CHUNK, PAGE]
    assert [address for address, _ in chunks] == [mapping.start, mapping.start + CHUNK, mapping.start + 2 * CHUNK]


def test_a_region_that_went(memory: LiveMemory) -> None:
    """QEMU gave memory back after /proc/PID/maps was read."""
    gone = Region(0x10000, 0x10000 + 4 * PAGE, "rw-p", 0, "")
    assert list(memory.chunks([gone])) == []


def test_where_malloc_keeps_its_memory(memory: LiveMemory) -> None:
    """Small and large allocations of this process lie in heap regions; its code and shared memory do not."""
    malloc = ct.CDLL(None).malloc
    malloc.restype = ct.c_void_p
    small = malloc(100)
    regions = list(memory.heap_regions())

    def covered(address: int) -> bool:
        return any(region.start <= address < region.end for region in regions)

    assert covered(small)
    shared = mmap.mmap(-1, PAGE)
    assert not covered(ct.addressof(ct.c_char.from_buffer(shared)))
    assert not covered(ct.cast(ct.CDLL(None).malloc, ct.c_void_p).value or 0)


def test_guest_ram_is_left_out(memory: LiveMemory) -> None:
    ram = Mapping((65 << 20) // PAGE)
    # A neighbour of the same kind would be one region with it, and no smaller for that.
    assert all(not region.start <= ram.start < region.end for region in memory.heap_regions())


def test_a_process_that_ends(child: subprocess.Popen[bytes]) -> None:
    target = open_target(child.pid)
    memory = LiveMemory(target)
    region = next(region for region in target.regions() if region.permissions.startswith("r"))
    assert memory.read(region.start, 8)
    child.kill()
    child.wait()
    with pytest.raises(FaultError):
        memory.read(region.start, 8)
    with pytest.raises(TargetExited):
        list(memory.heap_regions())
    with pytest.raises(TargetExited):
        list(memory.chunks([region]))
    with pytest.raises(TargetExited):
        LiveMemory(target)
    memory.close()
