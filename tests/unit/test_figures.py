"""Histograms and periods: what the kernel counted is what people read."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from tracer import figures
from tracer.figures import combined, difference, latencies, latency, requests
from tracer.maps import BUCKETS, COUNTERS, STAGES, SUB_BUCKET_BITS, Histogram, Statistics, bucket_upper_ns

LONGEST_NS = (1 << 64) - 1


def bucket_of(ns: int) -> int:
    """bucket_of() of bpf/aio_trace.c in Python; tests/kernel compares the C text with bucket_upper_ns()."""
    octave = max(ns.bit_length() - 1, 0)
    if octave < SUB_BUCKET_BITS:
        return ns
    return octave << SUB_BUCKET_BITS | (ns >> (octave - SUB_BUCKET_BITS)) & 3


def histogram(*values_ns: int) -> Histogram:
    """As the probes would have counted it."""
    made = Histogram(max(values_ns, default=0))
    for value in values_ns:
        made.buckets[bucket_of(value)] += 1
    return made


def statistics(*values_ns: int, **counters: int) -> Statistics:
    """Counters, and all stages with these values."""
    return Statistics(**counters, stages=[histogram(*values_ns) for _ in STAGES])


durations = st.integers(0, LONGEST_NS)


@given(durations)
def test_a_bucket_holds_its_values(ns: int) -> None:
    index = bucket_of(ns)
    assert ns <= bucket_upper_ns(index)
    assert index in (0, 8) or ns > bucket_upper_ns(index - 1)


@given(durations)
def test_a_bucket_is_a_quarter_of_its_octave(ns: int) -> None:
    """A percentile told as the bucket's end is at most a quarter too high."""
    assert bucket_upper_ns(bucket_of(ns)) <= ns + ns // 4


def test_the_buckets_hold_every_latency() -> None:
    assert bucket_of(LONGEST_NS) == BUCKETS - 1
    assert bucket_upper_ns(BUCKETS - 1) == LONGEST_NS


@given(st.lists(durations, min_size=1, max_size=50))
def test_percentiles(values: list[int]) -> None:
    """No lower than the true one, at most a quarter above it, in order, and never above the maximum."""
    found = latency(histogram(*values))
    values.sort()
    percentiles = [told for told in (found.p50, found.p90, found.p99) if told is not None]
    for told, share in zip(percentiles, (50, 90, 99)):
        true = values[-(-share * len(values) // 100) - 1]
        slack = 1e-3 + true * sys.float_info.epsilon
        assert true <= told * 1e3 + slack
        assert told * 1e3 <= true + true // 4 + slack
    assert found.max is not None
    assert percentiles == sorted(percentiles)
    assert max(percentiles) <= found.max == max(values) / 1e3
    assert found.count == len(values) == sum(count for _, count in found.buckets)


def test_no_value_has_no_percentile() -> None:
    """Not known is None, never 0."""
    found = latency(Histogram())
    assert (found.count, found.p50, found.p90, found.p99, found.max, found.buckets) == (0, None, None, None, None, ())


def test_buckets_are_told_with_their_ends_in_microseconds() -> None:
    assert latency(histogram(1000, 1000, 64_000)).buckets == ((1.023, 2), (65.535, 1))


def test_a_maximum_older_than_its_buckets() -> None:
    """The kernel counts on while the maximum, then the buckets are read: the latency was not 0."""
    torn = histogram(500_000)
    torn.max_ns = 0
    found = latency(torn)
    assert found.max is not None
    assert found.p50 is not None
    assert 400 < found.p50 <= found.max <= 525


def test_all_kinds_together() -> None:
    total = combined([statistics(1000, 5000, done=2), statistics(9000, done=1, missed=4)])
    assert (total.done, total.missed, total.submitted) == (3, 4, 0)
    assert total.stages[0] == histogram(1000, 5000, 9000)


def test_putting_kinds_together_leaves_them_alone() -> None:
    reads = statistics(1000, done=1)
    combined([reads, statistics(9000, done=1)])
    assert reads == statistics(1000, done=1)


@given(st.lists(durations, max_size=20), st.lists(durations, max_size=20))
def test_a_period_is_what_came_in_it(first: list[int], second: list[int]) -> None:
    period = difference(statistics(*first, *second), statistics(*first))
    for stage in period.stages:
        expected = histogram(*second)
        assert (stage.count, stage.buckets) == (len(second), expected.buckets)
        # Its maximum is kept since the start only: exact when it is the highest so far, else its bucket's end.
        assert expected.max_ns <= stage.max_ns <= bucket_upper_ns(bucket_of(expected.max_ns))
        if max(second, default=0) > max(first, default=0):
            assert stage.max_ns == expected.max_ns


def test_a_count_that_was_read_behind_an_earlier_one() -> None:
    """What is read while the kernel counts on may be behind; nothing is ever counted less than not at all."""
    now, then = statistics(1000, done=3), statistics(1000, 1000, 5000, done=4)
    period = difference(now, then)
    assert period.done == 0
    assert all(stage.count == 0 and stage.max_ns == 0 for stage in period.stages)


def test_a_histogram_is_counted_by_its_buckets() -> None:
    assert (histogram().count, histogram(1, 1, 70).count) == (0, 3)


def test_counters_of_a_period() -> None:
    now, then = Statistics(), Statistics()
    for index, name in enumerate(COUNTERS):
        setattr(now, name, 10 + index)
        setattr(then, name, 3)
    period = difference(now, then)
    assert [getattr(period, name) for name in COUNTERS] == [7 + index for index in range(len(COUNTERS))]


def test_stages_of_a_mode() -> None:
    """Without the submit probe there is one stage that can be known."""
    assert list(latencies(statistics(1), with_submit=True)) == ["submit_to_done", "done_to_callback", "total"]
    assert list(latencies(statistics(1), with_submit=False)) == ["done_to_callback"]


def test_counts_of_a_mode() -> None:
    seen = Statistics(submitted=5, done=4, completed=3, cancelled=1)
    full = requests(seen, 2, with_submit=True)
    assert (full.submitted, full.done, full.completed, full.cancelled, full.in_flight) == (5, 4, 3, 1, 2)
    alert_only = requests(seen, None, with_submit=False)
    assert (alert_only.submitted, alert_only.in_flight) == (None, None)


def test_no_figure_depends_on_the_order_of_kinds() -> None:
    one, other = statistics(1000, done=1), statistics(9000, done=2)
    assert figures.combined([one, other]) == figures.combined([other, one])
