"""Histograms into percentiles, and one snapshot of counts into the figures of a period.

Knows: how bpf/aio_trace.c buckets latencies. Does not know formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from tracer.events import Latency, Requests
from tracer.maps import COUNTERS, STAGES, Histogram, Statistics, bucket_upper_ns

Key = TypeVar("Key")


def combined(some: Iterable[Statistics]) -> Statistics:
    """Several counts together."""
    total = Statistics()
    for statistics in some:
        for name in COUNTERS:
            setattr(total, name, getattr(total, name) + getattr(statistics, name))
        for mine, theirs in zip(total.stages, statistics.stages):
            _merge(mine, theirs)
    return total


def grouped(by_subject: Mapping[Key, Statistics], group_of: Callable[[Key], str | None]) -> dict[str, Statistics]:
    """The counts by another name for each subject; what has none, or counted nothing, is left out."""
    groups: dict[str, list[Statistics]] = {}
    for subject, statistics in by_subject.items():
        name = group_of(subject)
        if name is not None and (statistics.done or statistics.completed):
            groups.setdefault(name, []).append(statistics)
    return {name: combined(some) for name, some in groups.items()}


def _merge(mine: Histogram, theirs: Histogram) -> None:
    if any(theirs.buckets):
        mine.max_ns = max(mine.max_ns, theirs.max_ns)
        mine.buckets = [a + b for a, b in zip(mine.buckets, theirs.buckets)]


def difference(now: Statistics, then: Statistics) -> Statistics:
    """What was counted between two snapshots of the same statistics."""
    result = Statistics()
    for name in COUNTERS:
        setattr(result, name, max(0, getattr(now, name) - getattr(then, name)))
    result.stages = [_difference(a, b) for a, b in zip(now.stages, then.stages)]
    return result


def _difference(now: Histogram, then: Histogram) -> Histogram:
    buckets = [max(0, a - b) for a, b in zip(now.buckets, then.buckets)]
    highest = max((index for index, count in enumerate(buckets) if count), default=None)
    if highest is None:
        return Histogram()
    # The maximum is kept since the start; in a period it is known as well as the buckets are fine.
    most = now.max_ns if now.max_ns > then.max_ns else min(bucket_upper_ns(highest), now.max_ns)
    return Histogram(most, buckets)


def latency(histogram: Histogram) -> Latency:
    """Percentiles of one stage in microseconds: the upper bound of the bucket, no more than the maximum."""
    buckets = [(bucket_upper_ns(i), count) for i, count in enumerate(histogram.buckets) if count]
    # The counters are read while the probes count on: the buckets are their own sum, and the maximum may
    # be older than they are.
    count = sum(n for _, n in buckets)
    highest = max((i for i, n in enumerate(histogram.buckets) if n), default=0)
    most = max(histogram.max_ns, bucket_upper_ns(highest - 1) + 1 if highest else 0)

    def percentile(share: float) -> float | None:
        rank, passed = share * count, 0
        for upper, n in buckets:
            passed += n
            if passed >= rank:
                return min(upper, most) / 1e3
        return None

    return Latency(
        count,
        percentile(0.50) if count else None,
        percentile(0.90) if count else None,
        percentile(0.99) if count else None,
        most / 1e3 if count else None,
        tuple((upper / 1e3, n) for upper, n in buckets),
    )


def latencies(statistics: Statistics, with_submit: bool) -> dict[str, Latency]:
    """Every stage that this mode measures."""
    measured = range(len(STAGES)) if with_submit else (STAGES.index("done_to_callback"),)
    return {STAGES[index]: latency(statistics.stages[index]) for index in measured}


def requests(statistics: Statistics, in_flight: int | None, with_submit: bool) -> Requests:
    """The counts of the contract."""
    return Requests(
        statistics.submitted if with_submit else None,
        statistics.done,
        statistics.completed,
        statistics.cancelled,
        in_flight,
    )
