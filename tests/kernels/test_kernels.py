"""Debian's releases with their own kernels: all that aio-trace does, on the hypervisor that its users have."""

from __future__ import annotations

import pytest

from tests.kernels import trial
from tests.kernels.boards import AMD64
from tests.kernels.images import System
from tests.kernels.machine import Outcome

# An image takes two minutes to make, a trial three; on a busy machine several times that.
pytestmark = pytest.mark.timeout(2400)

CHECKS = trial.names()


def test_it_is_the_system_that_was_meant(outcome: Outcome, system: System) -> None:
    """And its kernel answers what its kind is known to answer; on it depends how it is attached to."""
    found = outcome.check("system")["found"]
    assert found["kernel"].startswith(system.version)
    answers = {name for name in ("uprobe_multi", "atomics", "hashes_allocate") if found[name]}
    assert answers == system.can


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_guest(outcome: Outcome, system: System, check: str) -> None:
    if check == "bundle" and system.board is not AMD64:
        pytest.skip("the bundle is for x86-64")
    told = outcome.check(check)
    assert told["ok"], told["error"]
    print(told)  # for the report: pytest -rP


def test_it_came_to_its_end(outcome: Outcome) -> None:
    """No panic on the way, which any warning of the kernel would have been, and it was switched off in time."""
    assert outcome.check("end")["ok"]
    assert not outcome.hung
    assert "Kernel panic" not in outcome.console
    print(f"{outcome.took_s:.0f} s")


def test_what_is_told_of_a_guest_that_tells_nothing() -> None:
    """One that hangs or panics fails every check with the end of its console."""
    silent = Outcome(({"check": "system", "ok": True},), 900.0, "Kernel panic - not syncing: panic_on_warn", hung=True)
    with pytest.raises(AssertionError, match=r"hung.*900 s.*nothing of inspect \(but of: system\)(?s:.*)panic_on_warn"):
        silent.check("inspect")
