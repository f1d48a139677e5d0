"""Which requests were nudged already."""

from __future__ import annotations

from tracer.nudger import MOST_REMEMBERED, NudgedRequests


def test_once_a_request() -> None:
    nudged = NudgedRequests()
    assert not nudged.covers(0xA0, 100.0)
    nudged.add([0xA0], 101.0)
    assert nudged.covers(0xA0, 100.0)  # alerted again, for another cause
    assert not nudged.covers(0xB0, 100.0)


def test_a_later_request_at_the_same_address() -> None:
    """Freed with the one that was alerted, before its own deadline: nobody was told of it."""
    nudged = NudgedRequests()
    nudged.add([0xA0, 0xB0], 101.0)
    assert nudged.covers(0xB0, 100.5)
    assert not nudged.covers(0xB0, 3600.0)
    nudged.add([0xB0], 3601.0)
    assert nudged.covers(0xB0, 3600.0)


def test_it_does_not_grow() -> None:
    nudged = NudgedRequests()
    nudged.add(range(2 * MOST_REMEMBERED), 101.0)
    assert not nudged.covers(0, 100.0)
    assert nudged.covers(2 * MOST_REMEMBERED - 1, 100.0)
    assert len(nudged._when) == MOST_REMEMBERED
