"""How much the probes may cost, and which of them that pays for.

Knows: what a request costs with each set of probes, and how to go down quickly and up slowly. Pure: told of
rates and times, does not measure any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tracer.records import dataclass

#: How long the rate must be too high before fewer probes are used, and low enough before more are; seconds.
DOWN_AFTER_S, UP_AFTER_S = 4.0, 10.0
#: More probes are used where they would cost no more than this part of the budget.
UP_BELOW = 0.7
#: Without probes the rate is not known: they are tried again after a while, each time a longer one; seconds.
RETRY_S, RETRY_MOST_S = 30.0, 600.0


@dataclass(frozen=True)
class Decision:
    """`mode` is what to use from now on; `share` what was measured, as a part of one processor, if known."""

    mode: str
    share: float | None


class Budget:
    """Decides for one process. Modes are named from the dearest to the one that costs nothing."""

    def __init__(self, share: float, modes: Sequence[str], request_ns: Mapping[str, float]) -> None:
        """`share` of one processor; `request_ns` the processor time that a request costs in each mode."""
        self._share = share
        self._modes = tuple(modes)
        self._ns = request_ns
        self._since: float | None = None  # when the rate became too high, or low enough
        self._upwards = False
        self._retry_s = RETRY_S
        self._changed = float("-inf")

    def share_of(self, mode: str, per_s: float) -> float:
        """What this rate of requests costs in that mode, as a part of one processor."""
        return per_s * self._ns[mode] / 1e9

    def decide(self, now: float, mode: str, per_s: float | None) -> Decision:
        """`per_s`: requests a second of late, None where nobody counts them; `now` in seconds."""
        if per_s is None:
            if now - self._changed < self._retry_s:
                return Decision(mode, None)
            self._retry_s = min(2 * self._retry_s, RETRY_MOST_S)
            return self._go(now, self._modes[self._modes.index(mode) - 1], None)
        share = self.share_of(mode, per_s)
        wanted = self._affordable(mode, per_s)
        if wanted == mode:
            self._since = None
            return Decision(mode, share)
        upwards = self._modes.index(wanted) < self._modes.index(mode)
        if self._since is None or upwards != self._upwards:
            self._since, self._upwards = now, upwards
        if now - self._since < (UP_AFTER_S if upwards else DOWN_AFTER_S):
            return Decision(mode, share)
        if upwards:
            self._retry_s = RETRY_S
        return self._go(now, wanted, share)

    def _affordable(self, mode: str, per_s: float) -> str:
        """The dearest mode that the budget pays for; one that is dearer than now must be well below it."""
        here = self._modes.index(mode)
        for place, each in enumerate(self._modes):
            most = self._share * (UP_BELOW if place < here else 1.0)
            if self.share_of(each, per_s) <= most:
                return each
        return self._modes[-1]

    def _go(self, now: float, mode: str, share: float | None) -> Decision:
        self._since, self._changed = None, now
        return Decision(mode, share)
