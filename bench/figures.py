"""From slices to figures: pure arithmetic, no clock, no process.

Knows: how a slice becomes microseconds a request, which untraced slices a traced one is compared with, medians
and their intervals, ratios within a run, when an aim is met. Does not know where slices come from.

Machines drift: a slice is only ever compared with the untraced slices immediately before and after it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

RESAMPLES = 2000
CONFIDENCE = 0.95
MET, NOT_MET, OPEN, FEW = "met", "NOT MET", "open", "few rounds"
#: With fewer rounds an interval says little, and nothing is called met.
ENOUGH_ROUNDS = 5


@dataclass(frozen=True)
class Slice:
    """A stretch of a running load: how long, how many requests, CPU time of the target and of the tracer."""

    seconds: float
    requests: int
    target_cpu_s: float
    tracer_cpu_s: float | None = None

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    @property
    def us_per_request(self) -> float:
        """Microseconds of the target's CPU time, user plus system, for each request; inf where none was done."""
        return self.target_cpu_s * 1e6 / self.requests if self.requests else math.inf

    @property
    def tracer_percent(self) -> float | None:
        """The tracer's CPU time, in percent of one core."""
        return None if self.tracer_cpu_s is None else 100 * self.tracer_cpu_s / self.seconds


@dataclass(frozen=True)
class Pair:
    """A slice with a tracer attached, and the untraced ones next to it."""

    traced: Slice
    untraced: tuple[Slice, ...]

    @property
    def added_us(self) -> float:
        """Microseconds of the target's CPU time that the tracer added to each request."""
        return self.traced.us_per_request - fmean(slice_.us_per_request for slice_ in self.untraced)

    @property
    def iops_ratio(self) -> float:
        """Requests a second, traced against untraced."""
        return self.traced.iops / fmean(slice_.iops for slice_ in self.untraced)


@dataclass(frozen=True)
class Estimate:
    """A median of `count` values with the interval in which it lies by 95 %."""

    value: float
    low: float
    high: float
    count: int


def neighbours(slices: Sequence[tuple[str, Slice]], untraced: str) -> dict[str, Pair]:
    """Each traced slice of one round with the untraced ones immediately before and after it.

    `slices` is the round in the order of time, as (name, slice). A traced slice that has no untraced neighbour
    is left out: there is nothing to compare it with.
    """
    pairs = {}
    for index, (name, slice_) in enumerate(slices):
        if name == untraced:
            continue
        around = [slices[place] for place in (index - 1, index + 1) if 0 <= place < len(slices)]
        beside = tuple(other for other_name, other in around if other_name == untraced)
        if beside:
            pairs[name] = Pair(slice_, beside)
    return pairs


def _resampled(count: int, statistic: Callable[[Sequence[int]], float]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic of indices; the same on every call."""
    if count < 2:
        return -math.inf, math.inf
    generator = random.Random(count)
    found = sorted(statistic(generator.choices(range(count), k=count)) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return found[int(tail * RESAMPLES)], found[int((1 - tail) * RESAMPLES) - 1]


def estimate(values: Iterable[float]) -> Estimate:
    """The median and its bootstrap interval; ValueError without a value. One value has an endless interval."""
    known = list(values)
    if not known:
        raise ValueError("there is nothing to take the median of")
    low, high = _resampled(len(known), lambda places: median(known[place] for place in places))
    return Estimate(median(known), low, high, len(known))


def quotient(above: float, below: float) -> float:
    """above / below; inf where `below` is nothing or less and `above` is something."""
    if below > 0:
        return above / below
    return math.inf if above > 0 else 0.0


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The ratio of two medians. Values of one round belong together and are resampled together."""
    if len(above) != len(below) or not above:
        raise ValueError("a ratio needs the same rounds of both, and at least one")

    def of(places: Sequence[int]) -> float:
        return quotient(median(above[place] for place in places), median(below[place] for place in places))

    low, high = _resampled(len(above), of)
    return Estimate(of(range(len(above))), low, high, len(above))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of the values does not exceed."""
    if not values:
        raise ValueError("there is nothing to take the percentile of")
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


@dataclass(frozen=True)
class Aim:
    """What a figure should be: at most (or, if `least`, at least) `limit`."""

    name: str
    limit: float
    least: bool = False

    def verdict(self, found: Estimate) -> str:
        """Met or not met if the whole interval is on one side of the limit, else open."""
        if found.count < ENOUGH_ROUNDS:
            return FEW
        low, high = found.low, found.high
        if self.least:
            return MET if low >= self.limit else NOT_MET if high < self.limit else OPEN
        return MET if high <= self.limit else NOT_MET if low > self.limit else OPEN

    @property
    def wanted(self) -> str:
        """The limit as it is written in the table."""
        return f"{'>=' if self.least else '<='} {self.limit:g}"
