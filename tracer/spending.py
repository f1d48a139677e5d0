"""What the probes on one process cost at the present rate, measured, and what the budget says to it.

Knows: when to look, and that the price of a hit is measured only once somebody might spend too much. Does not
know how to change the probes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from tracer import hit_cost
from tracer.budget import Budget, Decision
from tracer.hit_cost import ASSUMED_NS, PROGRAM_NS
from tracer.records import dataclass

CHECK_S = 2.0
#: Where the price is not known yet, a hit on an instruction that the kernel must step over is taken for this much
#: dearer: what virtual machines were seen to need; on bare metal it is about twice.
DEAR = 45.0


@dataclass(frozen=True)
class Price:
    """ns of processor time for a hit on an instruction that the kernel emulates, and on any other."""

    cheap: float
    dear: float

    def of(self, sites: Sequence[bool]) -> float:
        """ns for a hit at each of these; true is cheap."""
        return sum(self.cheap if cheap else self.dear for cheap in sites)


ASSUMED = Price(ASSUMED_NS, DEAR * ASSUMED_NS)


class HitPrice:
    """What a hit costs on this host; measured by a thread of its own when it is first asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._measured: Price | None = None

    def get(self) -> Price | None:
        """The price, or None while it is being measured."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._measure, name="hit-cost", daemon=True)
            self._thread.start()
        return self._measured

    def _measure(self) -> None:
        cheap, dear = hit_cost.measure(), hit_cost.measure(cheap=False)
        self._measured = Price(
            ASSUMED.cheap if cheap is None else cheap + PROGRAM_NS,
            ASSUMED.dear if dear is None else dear + PROGRAM_NS,
        )


class Spending:
    """Looks every CHECK_S at what one process has spent."""

    def __init__(self, share: float, hits: Mapping[str, Sequence[bool]], price: HitPrice) -> None:
        """`share` of one processor; `hits` for each mode, the dearest first: of each site whether it is cheap."""
        self._share = share
        self._hits = hits
        self._price = price
        self._budget: Budget | None = None
        self._last: tuple[float, int] | None = None
        self._next = time.monotonic()

    def due(self) -> float:
        """When to look next, on the monotonic clock."""
        return self._next

    def look(self, now: float, mode: str, completed: int | None) -> Decision:
        """`completed`: requests that were counted since the start, None without probes."""
        self._next = now + CHECK_S
        last, self._last = self._last, None if completed is None else (now, completed)
        per_s = None
        if completed is not None:
            if last is None or completed < last[1]:
                return Decision(mode, None)
            per_s = (completed - last[1]) / max(now - last[0], 1e-3)
        if self._budget is None:
            self._budget = self._made(per_s)
        if self._budget is None:
            return Decision(mode, None)
        decision = self._budget.decide(now, mode, per_s)
        if decision.mode != mode:
            self._last = None
        return decision

    def _made(self, per_s: float | None) -> Budget | None:
        """The budget, once it is worth knowing what a hit costs, and known."""
        if per_s is not None and per_s * max(map(ASSUMED.of, self._hits.values())) / 1e9 < self._share:
            return None
        price = self._price.get()
        if price is None:
            return None
        return Budget(self._share, list(self._hits), {mode: price.of(sites) for mode, sites in self._hits.items()})
