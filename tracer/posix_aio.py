"""What a request does: QEMU's RawPosixAIOData, which `ThreadPoolElement.arg` points to.

Knows: the structure of block/file-posix.c in the order it has since QEMU 4.0: bs 0, aio_type 8,
aio_fildes 12, aio_offset 16, aio_nbytes 24. Other users of the pool have other arguments: nothing is
believed unless the type is one operation and the file descriptor is open in the process.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tracer.errors import FaultError
from tracer.memory import MemoryReader
from tracer.target import Target

OPERATIONS = {
    0x01: "read",
    0x02: "write",
    0x04: "ioctl",
    0x08: "flush",
    0x10: "discard",
    0x20: "write-zeroes",
    0x30: "write-zeroes",  # that may unmap
    0x40: "copy-range",
    0x80: "truncate",
}
OPERATION_MASK = 0x7FF
KNOWN_BITS = 0x7FFF
WITHOUT_RANGE = ("ioctl", "flush")


@dataclass(frozen=True)
class Operation:
    """One operation on a file; None where it is not known or does not apply; bytes."""

    kind: str | None = None
    fd: int | None = None
    file: str | None = None
    offset: int | None = None
    bytes: int | None = None


def read_operation(memory: MemoryReader, target: Target, arg: int) -> Operation:
    """What the request with this `arg` does; all None where the argument does not prove itself."""
    try:
        kind_bits, fd, offset, size = struct.unpack("<IiqQ", memory.read(arg + 8, 24))
    except FaultError:
        return Operation()
    kind = OPERATIONS.get(kind_bits & OPERATION_MASK)
    if kind is None or kind_bits & ~KNOWN_BITS or fd < 0:
        return Operation()
    file = target.file_of(fd)
    if file is None:
        return Operation()
    if kind in WITHOUT_RANGE or offset < 0:
        return Operation(kind, fd, file)
    return Operation(kind, fd, file, offset, size)
