"""tracer.posix_aio and tracer.coroutine on bytes laid out as QEMU's structures are."""

from __future__ import annotations

import struct
from typing import Any, cast

import pytest

from tracer.coroutine import read_waiter
from tracer.errors import FaultError
from tracer.machine import HOST
from tracer.posix_aio import (
    SINCE_4_0,
    UP_TO_3_1,
    Operation,
    Order,
    kind_of,
    order_of,
    outlives_worker,
    read_node,
    read_operation,
)
from tracer.target import Region
from tracer.view import Frame, ProcessView, Stack

ARG, BS, OTHER_BS = 0x10000, 0x20000, 0x40000
ENTRY, CODE = 0x7000, Region(0x7000, 0x9000, "r-xp", 1, "/qemu")


class Memory:
    """Pieces of memory; all else faults."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self.pieces = {address: bytearray(data) for address, data in pieces.items()}

    def read(self, address: int, size: int) -> bytes:
        for start, data in self.pieces.items():
            if start <= address and address + size <= start + len(data):
                return bytes(data[address - start : address - start + size])
        raise FaultError(address, size)


class View:
    """As much of a process as is asked for here."""

    def __init__(self, pieces: dict[int, bytes], files: dict[int, str] | None, function: str | None = None) -> None:
        self.machine = HOST
        self.memory = Memory(pieces)
        self._files = files
        self._function = function
        self.stacks: dict[int, tuple[Frame, ...]] = {}

    def file_of(self, fd: int) -> str | None:
        return (self._files or {}).get(fd)

    def knows_files(self) -> bool:
        return self._files is not None

    def function_at(self, address: int) -> tuple[str, int] | None:
        return (self._function, 0) if self._function else None

    def stack_above(self, address: int) -> Stack:
        pc = int.from_bytes(self.memory.read(address, 8), "little")
        return Stack(self.stacks.get(pc, ()), False, "ends in __start_context")


def data_of(order: Order, bits: int, fd: int, offset: int, size: int) -> bytes:
    data = bytearray(64)
    struct.pack_into("<Q", data, 0, BS)
    struct.pack_into("<I", data, order.kind, bits)
    struct.pack_into("<i", data, order.fd, fd)
    struct.pack_into("<q", data, order.offset, offset)
    struct.pack_into("<Q", data, order.size, size)
    return bytes(data)


def operation(data: bytes, files: dict[int, str] | None, function: str | None = None, **more: Any) -> Operation:
    view = View({ARG: data, BS: bytes(64)}, files, function)
    return read_operation(cast(ProcessView, view), ARG, 0x1234, **more)


@pytest.mark.parametrize("order", [SINCE_4_0, UP_TO_3_1])
@pytest.mark.parametrize("first", [SINCE_4_0, UP_TO_3_1])
@pytest.mark.parametrize(
    ("bits", "kind"), [(0x1, "read"), (0x1002, "write"), (0x2010, "discard"), (0x20, "write-zeroes")]
)
def test_both_orders(order: Order, first: Order, bits: int, kind: str) -> None:
    found = operation(data_of(order, bits, 11, 4096, 512), {11: "/d0.img"}, first=first)
    assert found == Operation(kind, 11, "/d0.img", 4096, 512)


def test_a_flush_has_no_range() -> None:
    assert operation(data_of(SINCE_4_0, 8, 11, 0, 0), {11: "/d0.img"}) == Operation("flush", 11, "/d0.img")


@pytest.mark.parametrize(
    "data",
    [
        data_of(SINCE_4_0, 0x3, 11, 0, 512),  # two operations
        data_of(SINCE_4_0, 0x10001, 11, 0, 512),  # an unknown bit
        data_of(SINCE_4_0, 0x1, 12, 0, 512),  # not open
        data_of(SINCE_4_0, 0x1, -1, 0, 512),
        data_of(SINCE_4_0, 0x1, 11, -4096, 512),
        data_of(SINCE_4_0, 0x1, 11, 0, 1 << 63),
        bytes(8) + data_of(SINCE_4_0, 0x1, 11, 0, 512)[8:],  # no bs
        b"\x01" + data_of(SINCE_4_0, 0x1, 11, 0, 512)[1:],  # bs is no address of a structure
    ],
)
def test_what_does_not_prove_itself_is_not_believed(data: bytes) -> None:
    assert operation(data, {11: "/d0.img"}) == Operation()


def test_the_function_names_what_no_file_operation_is() -> None:
    data = data_of(SINCE_4_0, 0x1, 11, 0, 512)
    assert operation(data, {11: "/d0.img"}, "qcow2_compress_pool_func") == Operation("other")
    assert operation(bytes(64), {11: "/d0.img"}, "handle_aiocb_flush.lto_priv.0") == Operation("flush")
    assert operation(data, {11: "/d0.img"}, "handle_aiocb_flush") == Operation("flush")  # the data is not its own
    assert operation(data, {11: "/d0.img"}, "handle_aiocb_rw").kind == "read"


def test_a_core_knows_no_files() -> None:
    assert operation(data_of(SINCE_4_0, 0x2, 11, 0, 512), None) == Operation("write", 11, None, 0, 512)


@pytest.mark.parametrize(
    ("version", "order"), [("2.1.2", UP_TO_3_1), ("3.1.0", UP_TO_3_1), ("4.0", SINCE_4_0), (None, SINCE_4_0)]
)
def test_the_version_is_a_hint(version: str | None, order: Order) -> None:
    assert order_of(version) == order


def state_of(name: bytes, at: int, path: bytes = b"/d0.img") -> bytearray:
    state = bytearray(8192)
    state[64 : 64 + len(path)] = path
    state[2048:2051] = b"raw"  # backing_format: a name, too, but in no list
    state[at : at + len(name)] = name
    struct.pack_into("<QQ", state, at + 39 & ~7, 0, OTHER_BS + at + 32)
    return state


@pytest.mark.parametrize("at", [3000, 6552, 4100])
def test_a_node_is_named_where_the_list_points_back(at: int) -> None:
    other = bytearray(8192)
    struct.pack_into("<Q", other, at + 32, BS)
    pieces = {ARG: struct.pack("<Q", BS), BS: bytes(state_of(b"drive-0", at)), OTHER_BS: bytes(other)}
    node = read_node(Memory(pieces), ARG)
    assert node
    assert (node.name, node.file) == ("drive-0", "/d0.img")
    assert read_node(Memory(pieces | {OTHER_BS: bytes(8192)}), ARG) is None


def test_a_coroutine_and_its_stack() -> None:
    opaque, coroutine, back = 0x30000, 0x50000, 0x8100
    local = struct.pack("<QQQQ", coroutine, 0, 0x8004, back) + bytes(1024)
    view = View({opaque: local, coroutine: struct.pack("<QQQ", ENTRY, 5, 0)}, {})
    frames = (Frame(back, "bdrv_co_flush", 3), Frame(ENTRY + 16), Frame(0x8800), Frame(0x999999))
    view.stacks = {0x8004: (Frame(0x8004), Frame(0x1)), back: frames}
    found = read_waiter(cast(ProcessView, view), [CODE], opaque)
    assert found
    assert (found.coroutine, found.entry, found.entry_arg, found.caller) == (coroutine, ENTRY, 5, 0)
    assert [str(frame) for frame in found.stack.frames] == ["bdrv_co_flush+0x3", "entry+0x10", "coroutine_trampoline"]


@pytest.mark.parametrize(
    "coroutine",
    [struct.pack("<QQQ", 0x1000, 5, 0), struct.pack("<QQQ", ENTRY, 5, 0xDEAD0), struct.pack("<QQQ", ENTRY, 5, 3)],
)
def test_what_is_no_coroutine(coroutine: bytes) -> None:
    view = View({0x30000: struct.pack("<Q", 0x50000) + bytes(2048), 0x50000: coroutine}, {})
    assert read_waiter(cast(ProcessView, view), [CODE], 0x30000) is None


@pytest.mark.parametrize(
    ("arg", "opaque", "there"),
    [
        (0x7F0000101F40, 0x7F0000101E80, True),  # both on the coroutine's stack (since 4.0)
        (0x55550000A000, 0x7F0000101E80, False),  # aio_worker() has freed it (up to 3.1)
        (0x7F0000101F40, 0, False),
    ],
)
def test_an_argument_that_the_worker_frees_is_not_believed(arg: int, opaque: int, there: bool) -> None:
    assert outlives_worker(arg, opaque) is there


@pytest.mark.parametrize(
    ("functions", "kind"),
    [
        (("bdrv_aio_flush_co_entry", "bdrv_co_flush"), "flush"),  # the vendor's article
        (("bdrv_co_do_rw", "bdrv_co_do_pwritev", "bdrv_aligned_pwritev"), "write"),
        (("bdrv_co_do_rw", "bdrv_co_do_preadv"), "read"),
        (("bdrv_rw_co_entry", "bdrv_co_preadv"), "read"),
        ((None, "qemu_coroutine_yield", "bdrv_co_pdiscard"), "discard"),
        ((None, "bdrv_co_do_write_zeroes", "bdrv_co_writev"), "write-zeroes"),
        (("thread_start",), None),
        ((), None),
    ],
)
def test_the_coroutine_tells_the_kind(functions: tuple[str | None, ...], kind: str | None) -> None:
    assert kind_of(functions) == kind
