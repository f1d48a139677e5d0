"""The search for probe sites: an ordered list of strategies, each of which proves what it finds.

Knows: the order, and that every failed attempt keeps its reason. Does not know how any one works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tracer.elf import Image
from tracer.errors import SitesNotFound, UsageError
from tracer.sites import code
from tracer.sites.model import Attempt, Located
from tracer.sites.proof import NotProved


class NoStrategyWorked(SitesNotFound):
    """SitesNotFound with `attempts`: every strategy that was tried, and why it failed."""

    def __init__(self, message: str, attempts: tuple[Attempt, ...]) -> None:
        super().__init__(message)
        self.attempts = attempts


Strategy = Callable[[Image], Located]

# A strategy is a function that returns what it found and proved, or raises NotProved with the reason.
STRATEGIES: dict[str, Strategy] = {
    code.NAME: code.locate,
}


def locate(image: Image, only: str | None = None) -> Located:
    """Sites and layout by the first strategy that succeeds, or by strategy `only`.

    SitesNotFound, with every attempt and its reason, if none does; ImageError for a damaged file.
    """
    if only is not None and only not in STRATEGIES:
        raise UsageError(f"there is no strategy {only!r}", "strategies: " + ", ".join(STRATEGIES))
    attempts: list[Attempt] = []
    for name, strategy in STRATEGIES.items():
        if only not in (None, name):
            continue
        try:
            found = strategy(image)
        except NotProved as reason:
            attempts.append(Attempt(name, str(reason)))
        else:
            return replace(found, attempts=(*attempts, *found.attempts))
    raise _not_found(image, tuple(attempts))


def _not_found(image: Image, attempts: tuple[Attempt, ...]) -> NoStrategyWorked:
    reasons = "; ".join(f"{attempt.strategy}: {attempt.outcome}" for attempt in attempts)
    return NoStrategyWorked(f"the probe sites were not found in {image.path} ({reasons})", attempts)


__all__ = ["STRATEGIES", "NoStrategyWorked", "Strategy", "locate"]
