"""RawPosixAIOData, believed only where it proves itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_pools import BASE, Bytes
from tracer.live import LiveView
from tracer.posix_aio import OPERATIONS, Operation, read_operation
from tracer.probes import KINDS
from tracer.target import open_target

ARG = BASE + 0x40
BLKDEV = 0x2000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    """A file that is open in this process, which stands for the QEMU."""
    fd = os.open(tmp_path / "disk.img", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def read(aio_type: int, fd: int, offset: int = 65536, size: int = 4096, arg: int = ARG) -> Operation:
    view = LiveView(open_target(os.getpid()))
    memory = Bytes(4096)
    memory.data[0x40:0x60] = struct.pack("<QIiqQ", BASE, aio_type, fd, offset, size)[:32]
    # The files are this process's own; its memory is laid out here.
    vars(view)["memory"] = memory
    return read_operation(view, arg)


def path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize(("bit", "kind"), OPERATIONS.items())
@pytest.mark.parametrize("flags", [0, BLKDEV])
def test_operations(disk: int, bit: int, kind: str, flags: int) -> None:
    found = read(bit | flags, disk)
    extent = (None, None) if kind in ("flush", "ioctl") else (65536, 4096)
    assert found == Operation(kind, disk, path_of(disk), *extent)


def test_kinds_are_those_of_the_probes() -> None:
    """One list for what memory shows and what the probes count, in the order of the bits."""
    plain = {bit: kind for bit, kind in OPERATIONS.items() if not bit & (bit - 1)}
    assert tuple(plain.values()) == KINDS[1:]
    assert list(plain) == [1 << index for index in range(len(plain))]
    assert OPERATIONS.keys() - plain.keys() == {0x30}  # write zeroes, and unmap where that can be done


@pytest.mark.parametrize("aio_type", [0, 0x3, 0x100, 0x8001, 0xFFFFFFFF])
def test_types_that_are_none(disk: int, aio_type: int) -> None:
    """qcow2's compression and its like have sizes and pointers there."""
    assert read(aio_type, disk) == Operation()


@pytest.mark.parametrize("fd", [-1, 99999, 2**31 - 1])
def test_files_that_are_not_open(fd: int) -> None:
    assert read(0x02, fd) == Operation()


def test_an_offset_that_is_none(disk: int) -> None:
    """The argument is another structure then: nothing of it is believed."""
    assert read(0x02, disk, offset=-1) == Operation()


@pytest.mark.parametrize("arg", [0, 8, BASE + 4090, BASE - 16, 2**64 - 4])
def test_arguments_that_cannot_be_read(disk: int, arg: int) -> None:
    assert read(0x02, disk, arg=arg) == Operation()
