"""The budget: quickly down, slowly up, never up and down for ever at one rate."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.budget import DOWN_AFTER_S, RETRY_MOST_S, RETRY_S, UP_AFTER_S, Budget

MODES = ("full", "alert", "none")
REQUEST_NS = {"full": 2000.0, "alert": 1300.0, "none": 0.0}
STEP_S = 2.0


def course(rates: Iterable[float], mode: str = "full", share: float = 0.05) -> list[str]:
    """The mode after each look, STEP_S apart, at these requests a second."""
    budget, modes = Budget(share, MODES, REQUEST_NS), []
    for number, rate in enumerate(rates):
        mode = budget.decide(number * STEP_S, mode, None if mode == "none" else rate).mode
        modes.append(mode)
    return modes


def test_a_rate_that_it_pays_for() -> None:
    assert set(course([20_000] * 100)) == {"full"}


def test_a_moment_is_no_reason() -> None:
    """Only what lasts is too dear."""
    assert set(course([1_000_000, 100] * 50)) == {"full"}


@pytest.mark.parametrize(("rate", "mode"), [(30_000, "alert"), (50_000, "none"), (1e6, "none")])
def test_what_it_pays_for_instead(rate: float, mode: str) -> None:
    modes = course([rate] * 10)
    assert modes[0] == "full"
    assert modes[int(DOWN_AFTER_S / STEP_S)] == mode


def test_up_again_when_there_is_less_to_do() -> None:
    modes = course([30_000] * 10 + [1000] * 10)
    assert modes[9] == "alert"
    assert modes[9 + int(UP_AFTER_S / STEP_S)] == "alert"
    assert modes[-1] == "full"


def test_not_up_where_it_would_be_too_dear_at_once() -> None:
    """24,000 a second would cost 4.8 % with all probes: not far enough below 5 %."""
    assert set(course([30_000] * 10 + [24_000] * 100)[10:]) == {"alert"}


def test_without_probes_they_are_tried_again_ever_more_rarely() -> None:
    modes = course([1e6] * 2000)
    tried = [number * STEP_S for number, mode in enumerate(modes) if mode == "alert"]
    starts = [time for time in tried if time - STEP_S not in tried]
    waits = [later - earlier for earlier, later in zip(starts, starts[1:])]
    assert starts[0] >= RETRY_S
    assert waits == sorted(waits)
    assert RETRY_MOST_S <= waits[-1] <= RETRY_MOST_S + 10 * STEP_S


def test_the_load_has_gone_when_they_are_tried_again() -> None:
    modes = course([1e6] * 4 + [1000] * 200)
    assert modes[4] == "none"
    assert modes[-1] == "full"


@given(st.floats(0, 1e7), st.sampled_from(MODES[:2]))
def test_one_rate_leads_to_one_mode(rate: float, first: str) -> None:
    """No swinging between probes at a rate that stays, but for the tries from none."""
    modes = course([rate] * 40, first)
    changes = [mode for mode, before in zip(modes, [first, *modes]) if mode != before]
    assert changes in ([], ["alert"], ["full"], ["none"], ["none", "alert", "none"], ["none", "alert"])


@given(st.lists(st.floats(0, 1e6), max_size=60))
def test_it_never_stays_with_what_is_too_dear(rates: list[float]) -> None:
    """At a rate that lasts, whatever was before; a try from none lasts a moment."""
    assert "none" in course([*rates, *[40_000.0] * 10])[-4:]
