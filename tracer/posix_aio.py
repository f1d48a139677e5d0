"""What a request does: QEMU's RawPosixAIOData, which `ThreadPoolElement.arg` points to.

Knows: the structure of block/file-posix.c in both orders that it has had (block/raw-posix.c before
2.10), the names of the functions that it is handed to, and how BlockDriverState names its node. Other
users of the pool have other arguments: nothing is believed unless the type is one operation, the file
descriptor is open in the process and `bs` is the address of something.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

from tracer.errors import FaultError
from tracer.memory import MemoryReader, read_u64
from tracer.records import dataclass
from tracer.view import ProcessView

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
MAX_FD = 1 << 20
MAX_OFFSET = 1 << 62

#: handle_aiocb_*() of block/file-posix.c (since QEMU 4.0), where the function tells the kind by itself.
KIND_OF_FUNCTION = {
    "handle_aiocb_flush": "flush",
    "handle_aiocb_ioctl": "ioctl",
    "handle_aiocb_discard": "discard",
    "handle_aiocb_write_zeroes": "write-zeroes",
    "handle_aiocb_write_zeroes_unmap": "write-zeroes",
    "handle_aiocb_copy_range": "copy-range",
    "handle_aiocb_truncate": "truncate",
}
#: Functions that serve several kinds: there the data must tell. aio_worker is that of all up to 3.1.
FILE_FUNCTIONS = frozenset((*KIND_OF_FUNCTION, "handle_aiocb_rw", "aio_worker"))
#: What is called neither is a user of the pool that is no file's: compression, encryption, 9pfs, TPM, …
OTHER = "other"

NODE_NAME_SIZE = 32  # BlockDriverState.node_name, include/block/block_int-common.h
#: BlockDriverState holds four paths of PATH_MAX bytes before node_name; bytes.
BDS_SIZE = 24 << 10
#: Shorter ones might be the bytes of a pointer.
_PATH = rb"(?<=[\0\1])(/[\x20-\x7e\x80-\xff]{6,4094})\0\0"
_NODE_NAME = rb"[A-Za-z#_][\x21-\x7e]{0,30}\0+"


@dataclass(frozen=True)
class Order:
    """Offsets in RawPosixAIOData; bytes."""

    kind: int
    fd: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Bytes that hold every member."""
        return max(self.kind + 4, self.fd + 4, self.offset + 8, self.size + 8)


#: Since QEMU commit d57c44d00ee1 (in v4.0): bs, aio_type, aio_fildes, aio_offset, aio_nbytes.
SINCE_4_0 = Order(kind=8, fd=12, offset=16, size=24)
#: Before: bs, aio_fildes, iov or buffer, aio_niov, aio_nbytes, aio_offset, aio_type.
UP_TO_3_1 = Order(kind=48, fd=8, offset=40, size=32)
ORDERS = (SINCE_4_0, UP_TO_3_1)
RAW_SIZE = max(order.end for order in ORDERS)


@dataclass(frozen=True)
class Operation:
    """One operation on a file; None where it is not known or does not apply; bytes."""

    kind: str | None = None
    fd: int | None = None
    file: str | None = None
    offset: int | None = None
    bytes: int | None = None


def order_of(version: str | None) -> Order:
    """The order to try first; the version is a hint, the proof is in read_operation."""
    found = re.match(r"(\d+)\.", version or "")
    return UP_TO_3_1 if found and int(found[1]) < 4 else SINCE_4_0


def read_operation(view: ProcessView, arg: int, func: int = 0, first: Order = SINCE_4_0) -> Operation:
    """What the request with this `arg` and `func` does; None for what does not prove itself."""
    named = view.function_at(func) if func else None
    function = named[0].split(".")[0] if named and named[1] == 0 else None
    if function is not None and function not in FILE_FUNCTIONS:
        return Operation(OTHER)
    for order in sorted(ORDERS, key=lambda order: order != first):
        found = _read(view, arg, order)
        if found is not None and KIND_OF_FUNCTION.get(function or "", found.kind) == found.kind:
            return found
    return Operation(KIND_OF_FUNCTION.get(function or ""))


#: The structure and what waits for it stand in the same frames, at most so far apart; bytes.
NEIGHBOURS = 4096
#: Functions of the block layer by which a coroutine's stack tells its kind (block.c, block/io.c).
_BLOCK_LAYER = re.compile(r"(bdrv|blk|raw|qcow2)_")
_KINDS_BY_NAME = (
    ("flush", re.compile(r"flush")),
    ("discard", re.compile(r"discard")),
    ("write-zeroes", re.compile(r"write_zeroes")),
    ("ioctl", re.compile(r"ioctl")),
    ("write", re.compile(r"p?write(v|_)|write$")),
    ("read", re.compile(r"p?read(v|_)|read$")),
)


def outlives_worker(arg: int, opaque: int) -> bool:
    """Whether RawPosixAIOData at `arg` is still there when the request is finished.

    Since QEMU commit 999e6b69ce (in v4.0) it is a local variable of the coroutine that waits, as what `opaque`
    points to is. Before that aio_worker() frees it, and somebody else's bytes stand there.
    """
    return abs(arg - opaque) < NEIGHBOURS


def kind_of(functions: Iterable[str | None]) -> str | None:
    """The kind that these functions' names tell, the first that does: a coroutine's entry, then its stack."""
    for name in functions:
        for kind, pattern in _KINDS_BY_NAME:
            if name is not None and _BLOCK_LAYER.match(name) and pattern.search(name):
                return kind
    return None


def read_raw(memory: MemoryReader, arg: int) -> bytes:
    """The bytes that tell one operation from another, in either order; none where they cannot be read."""
    try:
        return memory.read(arg, RAW_SIZE)
    except FaultError:
        return b""


def _read(view: ProcessView, arg: int, order: Order) -> Operation | None:
    try:
        data = view.memory.read(arg, order.end)
        (bs,) = struct.unpack_from("<Q", data)
        if not bs or bs % 8:
            return None
        view.memory.read(bs, 8)
    except FaultError:
        return None
    (bits,) = struct.unpack_from("<I", data, order.kind)
    (fd,) = struct.unpack_from("<i", data, order.fd)
    offset, size = (struct.unpack_from("<q", data, at)[0] for at in (order.offset, order.size))
    kind = OPERATIONS.get(bits & OPERATION_MASK)
    if kind is None or bits & ~KNOWN_BITS or not 0 <= fd < MAX_FD:
        return None
    file = view.file_of(fd)
    if file is None and view.knows_files():
        return None
    if kind in WITHOUT_RANGE:
        return Operation(kind, fd, file)
    if not (0 <= offset < MAX_OFFSET and 0 <= size < MAX_OFFSET):
        return None
    return Operation(kind, fd, file, offset, size)


@dataclass(frozen=True)
class Node:
    """A block node (BlockDriverState): its name and the file that it was opened by, where that is a path."""

    name: str
    file: str | None


def read_node(memory: MemoryReader, arg: int) -> Node | None:
    """The block node that the request with this `arg` is for, or None.

    `bs` is the first member in both orders. BlockDriverState's other offsets differ from build to build,
    but right behind node_name stands its entry in the list of all named nodes: what comes before it there
    points back to this very `bs`. The first path ahead of it is `filename`.
    """
    try:
        bs = read_u64(memory, arg)
        data = _as_much(memory, bs, BDS_SIZE)
    except FaultError:
        return None
    for found in re.finditer(_NODE_NAME, data):
        name, end = found.start(), found.start() + NODE_NAME_SIZE
        entry = end + 7 & ~7  # pointers are aligned, characters need not be
        if name % 4 or entry + 16 > len(data) or data[found.end() - 1 : end].strip(b"\0"):
            continue
        (back,) = struct.unpack_from("<Q", data, entry + 8)
        if _points_to(memory, back, bs):
            path = re.compile(_PATH).search(data, 0, name)
            file = path[1].decode(errors="replace") if path else None
            return Node(data[name:end].rstrip(b"\0").decode("ascii"), file)
    return None


def _points_to(memory: MemoryReader, address: int, value: int) -> bool:
    try:
        return bool(address) and read_u64(memory, address) == value
    except FaultError:
        return False


def _as_much(memory: MemoryReader, address: int, size: int) -> bytes:
    """`size` bytes, or as many pages of them as there are."""
    data = b""
    while len(data) < size:
        try:
            data += memory.read(address + len(data), 4096 - (address + len(data)) % 4096)
        except FaultError:
            if not data:
                raise
            break
    return data[:size]
