"""Whether two looks saw the same request. The memory is bytes packed as QEMU's structures are."""

from __future__ import annotations

import pytest

from tests.unit.test_pools import BASE, COMPLETION_BH, MODERN, PAGE, World
from tracer.layout import RequestState
from tracer.pools import PoolReader
from tracer.posix_aio import RAW_SIZE
from tracer.sampling import WALKS, MemorySampler

DONE, ACTIVE = RequestState.THREAD_DONE, RequestState.THREAD_ACTIVE
#: Where the elements' arguments are: in each one's page, behind it.
ABOUT = 0x800


class Sampled(World):
    """A pool whose requests each have an argument of their own, under a sampler that looks once a second."""

    def __init__(self, count: int, apart: int = 64) -> None:
        """`apart`: from the argument to what `opaque` points to; on one stack they are neighbours."""
        super().__init__(MODERN, count)
        self.apart = apart
        self.sampler = MemorySampler(self.memory, PoolReader(self.memory, MODERN, COMPLETION_BH), [self.proved])
        self.seconds = 0

    def set(self, *states: RequestState, elements: list[int] | None = None) -> None:
        """Make `elements` the list, in these states."""
        listed = self.elements if elements is None else elements
        self.link(listed)
        for address, state in zip(listed, states):
            self.memory.put(address + MODERN.element.state, "i", state)
            self.memory.put(address + MODERN.element.arg, "Q", address + ABOUT)
            self.memory.put(address + MODERN.element.opaque, "Q", address + ABOUT + self.apart)

    def look(self) -> dict[int, tuple[int, int]]:
        """One more look: (seconds of submit, of done) by element, seconds from 1 on."""
        self.seconds += 1
        self.sampler.sample(self.seconds)
        return {address: (record.submit_ns, record.done_ns) for address, record in self.sampler.records().items()}


def test_what_stands_still_keeps_its_age() -> None:
    world = Sampled(3)
    a, b, c = world.elements
    world.set(ACTIVE, ACTIVE, DONE)
    world.look()
    world.set(DONE, ACTIVE, DONE)
    assert world.look() == {a: (1, 2), b: (1, 0), c: (1, 1)}
    assert world.look() == {a: (1, 2), b: (1, 0), c: (1, 1)}


def test_new_requests_change_nothing_for_the_old_ones() -> None:
    world = Sampled(3)
    a, b, c = world.elements
    world.set(DONE, DONE, elements=[b, c])
    world.look()
    world.set(ACTIVE, DONE, DONE)
    assert world.look() == {a: (2, 0), b: (1, 1), c: (1, 1)}


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_what_is_finished_is_another_request_once_one_left_the_list(gone: int) -> None:
    """The bottom half that takes one off the list takes all that are finished."""
    world = Sampled(3)
    world.set(DONE, DONE, DONE)
    world.look()
    left = [address for place, address in enumerate(world.elements) if place != gone]
    world.set(DONE, DONE, elements=left)
    assert world.look() == dict.fromkeys(left, (2, 2))


def test_an_active_request_stays_when_others_leave() -> None:
    world = Sampled(3)
    a, b, _ = world.elements
    world.set(DONE, ACTIVE, DONE)
    world.look()
    world.set(ACTIVE, ACTIVE, elements=[a, b])
    assert world.look() == {a: (2, 0), b: (1, 0)}


def test_the_same_memory_about_something_else() -> None:
    """At another offset of the file: not the same, and the finished one behind it is not either."""
    world = Sampled(2)
    a, b = world.elements
    world.set(DONE, DONE)
    world.look()
    world.memory.put(a + ABOUT + 16, "Q", 4096)
    assert world.look() == {a: (2, 2), b: (2, 2)}


def test_an_argument_that_was_freed_tells_nothing() -> None:
    """Up to QEMU 3.1 the worker frees it: what is written there later makes no other request of a finished one."""
    world = Sampled(2, apart=1 << 32)
    a, b = world.elements
    world.set(ACTIVE, DONE)
    world.look()
    world.set(DONE, DONE)
    world.memory.put(a + ABOUT + 16, "Q", 4096)
    assert world.look() == {a: (1, 2), b: (1, 1)}


def test_a_request_that_overtook_another_is_a_later_one() -> None:
    world = Sampled(2)
    a, b = world.elements
    world.set(ACTIVE, ACTIVE)
    world.look()
    world.set(ACTIVE, ACTIVE, elements=[b, a])
    assert world.look()[b] == (2, 0)


def test_a_state_does_not_go_back() -> None:
    world = Sampled(1)
    world.set(DONE)
    world.look()
    world.set(ACTIVE)
    assert list(world.look().values()) == [(2, 0)]


def test_what_a_torn_list_hides_stays_as_long_as_it_is_linked() -> None:
    world = Sampled(4)
    a, b, c, d = world.elements
    world.set(ACTIVE, ACTIVE, DONE, DONE)
    world.look()
    world.memory.unreadable = {(b - BASE) // PAGE}
    assert world.look() == {a: (1, 0), d: (2, 2)}
    # Now a list that leads on into what has left it.
    world.memory.unreadable = set()
    world.set(ACTIVE, DONE, elements=[a, d])
    world.memory.put(a + MODERN.element.next, "Q", c)
    world.memory.put(c + MODERN.element.prev, "Q", BASE)
    assert set(world.look()) == {a}


def test_a_pool_that_is_none_any_more_is_left_out() -> None:
    world = Sampled(1)
    world.set(ACTIVE)
    world.look()
    world.memory.data[:PAGE] = b"\xdd" * PAGE
    assert world.look() == {}
    assert world.sampler.pools == []


def test_a_finished_request_is_dated_back_to_the_look_that_saw_it_unfinished() -> None:
    world = Sampled(1)
    (address,) = world.elements
    world.set(ACTIVE)
    for _ in range(8):
        world.look()
    world.set(DONE)
    assert world.look() == {address: (1, 9)}
    world.sampler.finished_by(address, 3)
    assert world.look() == {address: (1, 8)}
    world.sampler.finished_by(address, 20)
    assert world.look() == {address: (1, 8)}


def test_what_was_several_counts_from_then_on() -> None:
    world = Sampled(2)
    a, b = world.elements
    world.set(DONE, DONE)
    world.look()
    world.sampler.restart(a, 5)
    assert world.look() == {a: (5, 5), b: (1, 1)}
    assert world.sampler.pools_of({a}) == [world.proved]
    assert world.sampler.pools_of({1}) == []


@pytest.mark.parametrize("torn", [False, True])
def test_a_look_reads_little(torn: bool) -> None:
    """Two reads a request and one for the head; of a torn list no more than so many walks and looks at each."""
    world = Sampled(64)
    world.set(*[DONE] * 64)
    world.look()
    if torn:
        world.memory.put(world.elements[32] + MODERN.element.prev, "Q", BASE)
    world.memory.reads = 0
    world.look()
    assert len(world.memory.data) // PAGE >= 64
    assert world.memory.reads <= (1 + 64 * 2 if not torn else WALKS * (1 + 64) + 3 * 64 + 5)
    assert RAW_SIZE < 100
