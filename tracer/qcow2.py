"""Where a qcow2 image holds data, read from its file, so that a read there is answered from nothing else.

Knows: header, L1 and L2 tables of docs/interop/qcow2.txt. What QEMU still has to write is not in the file yet;
what was there stays where it is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from tracer.target import open_regular

T = TypeVar("T")

MAGIC = b"QFI\xfb"
OFFSET_MASK = 0x00FFFFFFFFFFFE00
COMPRESSED, ALL_ZEROES = 1 << 62, 1
EXTENDED_L2 = 1 << 4  # of the incompatible features: an entry has 8 more bytes, one bit a subcluster
MAX_L1 = 1 << 20
MAX_TABLES = 64


def holds(path: str) -> bool:
    """Whether the file there is a qcow2 image; False for what is no regular file, or cannot be read."""
    return bool(_opened(path, lambda fd: os.pread(fd, len(MAGIC), 0) == MAGIC))


def first_data(path: str) -> int | None:
    """The lowest guest offset of a cluster with plain data; None where there is none, or no qcow2."""
    return _opened(path, _search)


def _opened(path: str, read: Callable[[int], T]) -> T | None:
    with suppress(OSError, struct.error):
        fd = open_regular(path)
        try:
            return read(fd)
        finally:
            os.close(fd)
    return None


def _search(fd: int) -> int | None:
    header = os.pread(fd, 104, 0)
    magic, version, _, _, bits, _, _, l1_size, l1_offset = struct.unpack_from(">4sIQIIQIIQ", header)
    if magic != MAGIC or not 9 <= bits <= 22 or l1_size > MAX_L1:
        return None
    extended = version >= 3 and bool(struct.unpack_from(">Q", header, 72)[0] & EXTENDED_L2)
    width = 16 if extended else 8
    cluster: int = 1 << bits
    per_table = cluster // width
    tables = 0
    entry: int
    for number, (entry,) in enumerate(struct.iter_unpack(">Q", os.pread(fd, l1_size * 8, l1_offset))):
        if not entry & OFFSET_MASK:
            continue
        index = _first_in_table(os.pread(fd, cluster, entry & OFFSET_MASK), extended)
        if index is not None:
            return (number * per_table + index) * cluster
        tables += 1
        if tables >= MAX_TABLES:
            break
    return None


def _first_in_table(table: bytes, extended: bool) -> int | None:
    for index, words in enumerate(struct.iter_unpack(">QQ" if extended else ">Q", table)):
        if not words[0] & OFFSET_MASK or words[0] & COMPRESSED:
            continue
        if words[1] & 1 if extended else not words[0] & ALL_ZEROES:
            return index
    return None
