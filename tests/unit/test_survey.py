"""When a finished request that reads the same may be another one, by the pool's list."""

from __future__ import annotations

import threading

import pytest

from tests.unit.test_pools import MODERN, World
from tracer import survey
from tracer.layout import RequestState

DONE = int(RequestState.THREAD_DONE)


class Finished(World):
    """Three finished requests on the pool's list."""

    def __init__(self) -> None:
        super().__init__(MODERN, 6)
        self.first = self.elements[3:]
        self.finish(self.first)

    def finish(self, elements: list[int]) -> None:
        """Make these the list, newest first, all of them finished."""
        self.link(elements)
        for address in elements:
            self.memory.put(address + MODERN.element.state, "i", DONE)


def stay(world: Finished, later: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that stay where the list becomes `later` after the first check."""
    held = [(world.proved, request) for request in world.reader.requests(world.proved).requests]
    changed = threading.Event()

    def pause(_seconds: float) -> None:
        if not changed.is_set():
            world.finish(later)
            changed.set()

    monkeypatch.setattr(survey.time, "sleep", pause)
    return [request.address for _, request in survey._that_stay(world.reader, held)]


@pytest.mark.parametrize(
    ("newer", "kept", "stays"),
    [
        ([], [0, 1, 2], [0, 1, 2]),
        ([0, 1], [0, 1, 2], [0, 1, 2]),  # new ones come at the head, and nobody leaves
        ([], [0, 1], []),  # one left: so did all that were finished then
        ([0], [0, 2], []),
        ([], [1, 0, 2], []),  # one was overtaken: it came again
    ],
)
def test_while_one_stays_none_leaves(
    newer: list[int], kept: list[int], stays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Finished()
    later = [world.elements[at] for at in newer] + [world.first[at] for at in kept]
    assert stay(world, later, monkeypatch) == [world.first[at] for at in stays]
