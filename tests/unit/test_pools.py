"""Pools and their lists, sound and torn. The memory is bytes packed as QEMU's structures are."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracer import pools
from tracer.errors import FaultError, LayoutError, OutOfBounds
from tracer.layout import BottomHalfLayout, ElementLayout, Layout, PoolLayout, RequestState
from tracer.memory import CHUNK
from tracer.pools import Pool, PoolReader, ThreadCounts

BASE = 0x5555_0000_0000
PAGE = 4096
COMPLETION_BH = 0x5554_1234_5678

MODERN = Layout(
    ElementLayout(0x10, 0x18, 0x28, 0x30, 0x38, 0x40, 0x44, 0x58, 0x60),
    PoolLayout(0x0, 0x8, 0xB8, 0xD0, 0xD4, 0xD8, 0xDC, 0xE4),
    BottomHalfLayout(0x0, 0x10, 0x18, 0x28, 4, 0x8),
    "by hand: 7.2",
)
OLD = Layout(
    ElementLayout(0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x3C, 0x50, 0x58),
    PoolLayout(0x0, 0x8, 0xC8, 0xE0, 0xE4, 0xE8, 0xEC, 0xB8),
    BottomHalfLayout(0x0, 0x8, 0x10, 0x20, 1, None),
    "by hand: 2.1",
)
BOTH = pytest.mark.parametrize("layout", [MODERN, OLD], ids=["7.2", "2.1"])


class Bytes:
    """Memory from BASE on; some pages cannot be read."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.unreadable: set[int] = set()
        self.reads = 0

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        start = address - BASE
        pages = range(start // PAGE, (start + size - 1) // PAGE + 1)
        if start < 0 or start + size > len(self.data) or self.unreadable.intersection(pages):
            raise FaultError(address, size)
        return bytes(self.data[start : start + size])

    def put(self, address: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, self.data, address - BASE, *values)


class World:
    """One AioContext, one pool with its bottom half, elements far enough apart for each to have a page."""

    def __init__(self, layout: Layout, count: int = 0, *, context: int = 0, at: int = BASE) -> None:
        self.layout = layout
        self.memory = Bytes((count + 4) * PAGE)
        self.context = context or at + 0x100
        self.pool = at + 0x400
        self.bottom_half = at + 0x800
        self.elements = [at + (index + 2) * PAGE for index in range(count)]
        self.make_pool()
        self.link(self.elements)

    def make_pool(self) -> None:
        pool, half = self.layout.pool, self.layout.bottom_half
        self.memory.put(self.pool + pool.context, "Q", self.context)
        self.memory.put(self.pool + pool.completion_bh, "Q", self.bottom_half)
        self.memory.put(self.bottom_half + half.context, "Q", self.context)
        self.memory.put(self.bottom_half + half.callback, "Q", COMPLETION_BH)
        self.memory.put(self.bottom_half + half.opaque, "Q", self.pool)

    def link(self, elements: Sequence[int]) -> None:
        """Make these the list, each THREAD_ACTIVE."""
        head = self.pool + self.layout.pool.head
        self.memory.put(head, "Q", elements[0] if elements else 0)
        for index, address in enumerate(elements):
            following = elements[index + 1] if index + 1 < len(elements) else 0
            before = elements[index - 1] + self.layout.element.next if index else head
            self.element(address, next=following, prev=before)

    def element(self, address: int, state: int = 1, ret: int = 0, **words: int) -> None:
        layout = self.layout.element
        values = {"pool": self.pool, "func": 0xF00, "arg": 0xA00, "callback": 0xC00, "opaque": 0xD00} | words
        for name, value in values.items():
            self.memory.put(address + getattr(layout, name), "Q", value)
        self.memory.put(address + layout.state, "i", state)
        self.memory.put(address + layout.ret, "i", ret)

    @property
    def reader(self) -> PoolReader:
        return PoolReader(self.memory, self.layout, COMPLETION_BH)

    @property
    def proved(self) -> Pool:
        return Pool(self.pool, self.context, self.bottom_half)

    def addresses(self) -> tuple[list[int], str | None]:
        listed = self.reader.requests(self.proved)
        return [request.address for request in listed.requests], listed.torn


# The pool


@BOTH
def test_a_pool_proves_itself(layout: Layout) -> None:
    world = World(layout)
    assert world.reader.pool(world.pool) == world.proved


@BOTH
@pytest.mark.parametrize("member", ["callback", "opaque", "context"])
def test_a_bottom_half_that_does_not_point_back(layout: Layout, member: str) -> None:
    world = World(layout)
    world.memory.put(world.bottom_half + getattr(layout.bottom_half, member), "Q", BASE + 0x10)
    with pytest.raises(LayoutError):
        world.reader.pool(world.pool)


@pytest.mark.parametrize("member", ["context", "completion_bh"])
def test_a_pool_with_a_null_pointer(member: str) -> None:
    world = World(MODERN)
    world.memory.put(world.pool + getattr(MODERN.pool, member), "Q", 0)
    with pytest.raises(LayoutError):
        world.reader.pool(world.pool)


def test_a_pool_that_cannot_be_read() -> None:
    world = World(MODERN)
    world.memory.unreadable = {0}
    with pytest.raises(FaultError):
        world.reader.pool(world.pool)


@BOTH
def test_pools_are_found_by_their_bottom_half(layout: Layout) -> None:
    """Two pools, a stale copy of a bottom half, and the bare value somewhere else."""
    world = World(layout)
    second = World(layout, at=BASE + PAGE)
    world.memory.data[PAGE : 2 * PAGE] = second.memory.data[PAGE : 2 * PAGE]
    size = 0x40
    copy = bytes(world.memory.data[0x800 : 0x800 + size])
    world.memory.data[0xA00 : 0xA00 + size] = copy
    world.memory.put(BASE + 0xF00, "Q", COMPLETION_BH)
    found = world.reader.find([(BASE, bytes(world.memory.data))])
    assert found == [world.proved, second.proved]


def test_the_value_at_the_edges_of_what_was_read() -> None:
    """A structure that would begin before the memory is no pool, and no error."""
    world = World(MODERN)
    world.memory.put(BASE, "Q", COMPLETION_BH)
    world.memory.put(BASE + len(world.memory.data) - 8, "Q", COMPLETION_BH)
    assert world.reader.find([(BASE, bytes(world.memory.data))]) == [world.proved]


@BOTH
@pytest.mark.parametrize("told", [False, True])
def test_the_bottom_half(layout: Layout, told: bool) -> None:
    """Pending alone is not being told."""
    world = World(layout)
    flags = layout.bottom_half.scheduled_mask if told else 0
    if layout is MODERN:
        flags |= layout.bottom_half.pending_mask
    # What stands behind the flags, up to 4.2 `idle` and `deleted`, is no part of them.
    form = "IB" if layout.bottom_half.flags_width == 4 else "BB"
    world.memory.put(world.bottom_half + layout.bottom_half.flags, form, flags, 0xFF)
    half = world.reader.bottom_half(world.proved)
    assert (half.scheduled, half.flags, half.address) == (told, flags, world.bottom_half)


def test_thread_counters() -> None:
    world = World(MODERN)
    world.memory.put(world.pool + 0xD0, "iiii", 7, 3, 2, 1)
    world.memory.put(world.pool + 0xE4, "i", 64)
    assert world.reader.threads(world.proved) == ThreadCounts(7, 3, 64, 2, 1)


@pytest.mark.parametrize("value", [-1, 1 << 30])
def test_what_is_no_counter_is_not_known(value: int) -> None:
    world = World(MODERN)
    world.memory.put(world.pool + 0xD0, "i", value)
    assert world.reader.threads(world.proved).current is None


def test_a_counter_that_was_not_found_is_not_known() -> None:
    world = World(replace(MODERN, pool=replace(MODERN.pool, max_threads=None)))
    assert world.reader.threads(world.proved).max is None


# One request


@BOTH
@pytest.mark.parametrize("state", RequestState)
def test_a_request(layout: Layout, state: RequestState) -> None:
    world = World(layout, 1)
    address = world.elements[0]
    world.element(address, state, -5, func=1, arg=2, callback=3, opaque=4)
    request = world.reader.request(address)
    assert (request.func, request.arg, request.callback, request.opaque) == (1, 2, 3, 4)
    assert (request.address, request.pool, request.state) == (address, world.pool, state)
    # Until it is done, ret is what the last user of the memory left there.
    assert request.ret == (-5 if state == RequestState.THREAD_DONE else None)


@pytest.mark.parametrize("state", [-1, 4, 1 << 24])
def test_a_state_that_is_none(state: int) -> None:
    world = World(MODERN, 1)
    world.element(world.elements[0], state)
    with pytest.raises(LayoutError):
        world.reader.request(world.elements[0])


def test_a_request_at_the_end_of_memory() -> None:
    world = World(MODERN)
    with pytest.raises(FaultError):
        world.reader.request(BASE + len(world.memory.data) - 8)


# The list


@BOTH
@pytest.mark.parametrize("count", [0, 1, 2, 64])
def test_a_sound_list(layout: Layout, count: int) -> None:
    world = World(layout, count)
    assert world.addresses() == (world.elements, None)


def test_a_list_that_goes_round_in_circles() -> None:
    """The links are all sound but the last, which leads back into the middle."""
    world = World(MODERN, 5)
    world.memory.put(world.elements[4] + MODERN.element.next, "Q", world.elements[2])
    found, torn = world.addresses()
    assert found == world.elements
    assert torn is not None
    assert "circles" in torn


def test_an_element_that_is_its_own_next() -> None:
    world = World(MODERN, 1)
    world.memory.put(world.elements[0] + MODERN.element.next, "Q", world.elements[0])
    found, torn = world.addresses()
    assert (found, torn is not None) == (world.elements, True)


@pytest.mark.parametrize("member", ["prev", "pool"])
def test_a_broken_back_link(member: str) -> None:
    """The element was freed and used again while the list was walked: what came before it is believed."""
    world = World(MODERN, 5)
    world.memory.put(world.elements[2] + getattr(MODERN.element, member), "Q", BASE + 8)
    found, torn = world.addresses()
    assert found == world.elements[:2]
    assert torn is not None
    assert f"{world.elements[2]:#x}" in torn


def test_an_element_of_another_pool() -> None:
    world = World(MODERN, 2)
    world.element(world.elements[0], pool=world.pool + 8, next=0, prev=world.pool + MODERN.pool.head)
    assert world.addresses()[0] == []


def test_a_freed_element() -> None:
    world = World(MODERN, 5)
    start = world.elements[3] - BASE
    world.memory.data[start : start + MODERN.element.size] = b"\xdd" * MODERN.element.size
    found, torn = world.addresses()
    assert found == world.elements[:3]
    assert torn is not None


@pytest.mark.parametrize("page", [0, 2, 4])
def test_pages_that_cannot_be_read(page: int) -> None:
    world = World(MODERN, 5)
    world.memory.unreadable = {page}
    found, torn = world.addresses()
    assert found == world.elements[: max(page - 2, 0)]
    assert torn is not None


def test_a_link_to_nowhere() -> None:
    world = World(MODERN, 2)
    world.memory.put(world.elements[1] + MODERN.element.next, "Q", 0xFFFF_FFFF_FFFF_FFF8)
    found, torn = world.addresses()
    assert (found, torn is not None) == (world.elements, True)


def test_an_endless_list_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MAX_REQUESTS", 10)
    world = World(MODERN, 50)
    found, torn = world.addresses()
    assert (found, torn is not None) == (world.elements[:10], True)


# Whether a request is there


def test_a_request_that_is_on_the_list() -> None:
    world = World(MODERN, 3)
    assert [world.reader.holds(world.proved, address) for address in world.elements] == [True] * 3


def test_a_request_that_is_gone() -> None:
    world = World(MODERN, 3)
    world.link(world.elements[:2])
    assert world.reader.holds(world.proved, world.elements[2]) is False


def test_nothing_is_gone_on_the_evidence_of_a_torn_list() -> None:
    world = World(MODERN, 3)
    world.memory.unreadable = {3}
    assert world.reader.holds(world.proved, world.elements[0]) is True
    assert world.reader.holds(world.proved, world.elements[2]) is None


class Moving(Bytes):
    """Memory that changes between two reads."""

    def __init__(self, before: Bytes, after: Bytes, reads: int) -> None:
        super().__init__(0)
        self.data, self._after, self._reads = before.data, after.data, reads

    def read(self, address: int, size: int) -> bytes:
        if self.reads == self._reads:
            self.data = self._after
        return super().read(address, size)


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_list_that_changes_while_it_is_walked(moment: int) -> None:
    """Whenever the first element leaves, the rest is found in the end, and is all that is told as whole."""
    before, after = World(MODERN, 4), World(MODERN, 4)
    after.link(after.elements[1:])
    reader = PoolReader(Moving(before.memory, after.memory, moment), MODERN, COMPLETION_BH)
    listed = reader.patient_requests(before.proved)
    assert listed.torn is None
    assert [request.address for request in listed.requests] in (before.elements, before.elements[1:])


def test_a_list_that_stays_torn_is_told_as_far_as_it_was_seen() -> None:
    world = World(MODERN, 4)
    world.memory.unreadable = {4}
    listed = world.reader.patient_requests(world.proved)
    assert [request.address for request in listed.requests] == world.elements[:2]
    assert listed.torn is not None


# Anything


@settings(max_examples=300, deadline=None)
@given(
    layout=st.sampled_from([MODERN, OLD]),
    count=st.integers(0, 6),
    bytes_at=st.dictionaries(st.integers(0, 10 * PAGE - 1), st.integers(0, 255), max_size=20),
    words_at=st.dictionaries(
        st.sampled_from(range(0, 10 * PAGE, 8)), st.integers(0, 10 * PAGE).map(lambda n: BASE + n), max_size=10
    ),
    unreadable=st.sets(st.integers(0, 9), max_size=2),
)
def test_mutated_memory_neither_crashes_nor_hangs(
    layout: Layout, count: int, bytes_at: dict[int, int], words_at: dict[int, int], unreadable: set[int]
) -> None:
    """What is told is proved: every request is of this pool and its links are sound up to it."""
    world = World(layout, count)
    mutate(world.memory, layout, bytes_at, words_at)
    world.memory.unreadable = unreadable
    check_whatever_is_read(world)


@settings(max_examples=300, deadline=None)
@given(count=st.integers(1, 6), data=st.data())
def test_mutated_links_neither_crash_nor_hang(count: int, data: st.DataObject) -> None:
    """The members that a walk rests on, one after the other."""
    world = World(MODERN, count)
    interesting = [world.pool, world.pool + MODERN.pool.head, 0, BASE, 1, 2**64 - 8, *world.elements]
    interesting += [address + MODERN.element.next for address in world.elements]
    for _ in range(data.draw(st.integers(1, 4))):
        address = data.draw(st.sampled_from(world.elements))
        member = data.draw(st.sampled_from(["next", "prev", "pool", "state"]))
        world.memory.put(address + getattr(MODERN.element, member), "Q", data.draw(st.sampled_from(interesting)))
    check_whatever_is_read(world)


def mutate(memory: Bytes, layout: Layout, bytes_at: dict[int, int], words_at: dict[int, int]) -> None:
    for offset, value in bytes_at.items():
        if offset < len(memory.data):
            memory.data[offset] = value
    for offset, value in words_at.items():
        if offset + 8 <= len(memory.data):
            memory.put(BASE + offset, "Q", value)


def check_whatever_is_read(world: World) -> None:
    reader, layout = world.reader, world.layout
    found = reader.find([(BASE, bytes(world.memory.data))])
    for pool in found:
        assert reader.pool(pool.address) == pool
    world.memory.reads = 0
    listed = reader.requests(world.proved)
    addresses = [request.address for request in listed.requests]
    assert world.memory.reads <= len(world.memory.data) // 8
    assert len(set(addresses)) == len(addresses)
    links = [world.pool + layout.pool.head, *(address + layout.element.next for address in addresses)]
    assert [request.prev for request in listed.requests] == links[:-1]
    assert all(request.pool == world.pool for request in listed.requests)
    if listed.torn is None:
        assert world.memory.read(links[-1], 8) == bytes(8)


@pytest.mark.parametrize("address", [COMPLETION_BH, 0x5554_1234_5600, 0x5554_0000_0000, 0x40_0000])
def test_found_wherever_the_function_stands(address: int) -> None:
    """An address may begin with zero bytes as well as end with them; what stands at no multiple of 8 is none."""
    world = World(MODERN)
    half = world.bottom_half + MODERN.bottom_half.callback
    world.memory.put(half, "Q", address)
    for place in (3, 9, 0xF01):
        world.memory.put(BASE + place, "Q", address)
    reader = PoolReader(world.memory, MODERN, address)
    assert reader.find([(BASE, bytes(world.memory.data))]) == [world.proved]


def test_empty_memory_is_passed_quickly() -> None:
    """A core that gdb took leaves every page of an arena there, full of zeroes, among which an address's own are none.

    Compared by the processor's time with the same search by bytes.find.
    """
    word = COMPLETION_BH & ~0xFF
    chunk = bytes(CHUNK)
    reader = PoolReader(Bytes(0), MODERN, word)

    def took(search: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            search()
            times.append(time.process_time() - began)
        return min(times)

    plain = took(lambda: [chunk.find(struct.pack("<Q", word)) for _ in range(8)])
    assert took(lambda: reader.find((BASE, chunk) for _ in range(8))) * 4 < plain
    short = chunk[: CHUNK // 2]
    assert took(lambda: reader.find((BASE, short) for _ in range(16))) * 4 < plain


def test_more_pools_than_any_qemu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is the process's own to fill: it is told of, not waited for."""
    world = World(MODERN)
    data = bytes(world.memory.data)
    monkeypatch.setattr(pools, "MAX_POOLS", 0)
    with pytest.raises(OutOfBounds, match="more than 0 thread pools"):
        world.reader.find([(BASE, data)])
    monkeypatch.undo()
    monkeypatch.setattr(pools, "MAX_CANDIDATES", 10)
    stale = struct.pack("<Q", COMPLETION_BH) * 10
    assert world.reader.find([(BASE, data), (BASE + (1 << 30), stale[:72])]) == [world.proved]
    with pytest.raises(OutOfBounds, match="what looks like one"):
        world.reader.find([(BASE, data), (BASE + (1 << 30), stale)])
