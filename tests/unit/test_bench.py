"""The bench's arithmetic: what it claims is only as good as this."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import TRACE_LOG, all_tracers, as_json, settings_from
from bench.experiments import Alerts
from bench.figures import (
    FEW,
    MET,
    NOT_MET,
    OPEN,
    Aim,
    Estimate,
    Pair,
    Slice,
    estimate,
    neighbours,
    percentile,
    quotient,
    ratio,
)
from bench.loads import requests_from_io
from bench.measure import Row, Sample, Table
from bench.table import WIDTH, Results, judge, markdown, number, render, with_spread
from bench.tracers import events_in, reason_in


def of(us: float, iops: int = 1000) -> Slice:
    """A slice of one second."""
    return Slice(1.0, iops, us * iops / 1e6)


def sample(added_us: float, untraced_us: float = 10.0) -> Sample:
    pair = Pair(of(untraced_us + added_us), (of(untraced_us),))
    return Sample(pair, 1.0, 0.5, 100.0, 120.0, 1.0)


def test_a_slice() -> None:
    slice_ = Slice(seconds=2.0, requests=1000, target_cpu_s=0.01, tracer_cpu_s=0.02)
    assert slice_.iops == 500
    assert slice_.us_per_request == pytest.approx(10)
    assert slice_.tracer_percent == pytest.approx(1)
    assert Slice(1.0, 0, 0.1).us_per_request == math.inf
    assert Slice(1.0, 1, 0.1).tracer_percent is None


def test_a_pair_is_compared_with_the_mean_of_its_neighbours() -> None:
    pair = Pair(of(15, iops=600), (of(10, iops=1000), of(12, iops=2000)))
    assert pair.added_us == pytest.approx(4)
    assert pair.iops_ratio == pytest.approx(0.4)


def test_neighbours_are_those_beside_in_time() -> None:
    slices = [("-", of(1)), ("a", of(5)), ("-", of(2)), ("b", of(6)), ("c", of(7)), ("-", of(3))]
    pairs = neighbours(slices, "-")
    assert {key: [round(u.us_per_request) for u in pair.untraced] for key, pair in pairs.items()} == {
        "a": [1, 2],
        "b": [2],
        "c": [3],
    }
    assert neighbours([("a", of(5))], "-") == {}


def test_an_estimate() -> None:
    found = estimate([3.0, 1.0, 2.0, 100.0, 2.5])
    assert found.value == 2.5
    assert 1.0 <= found.low <= 2.5 <= found.high <= 100.0
    assert found == estimate([3.0, 1.0, 2.0, 100.0, 2.5])
    assert estimate([4.0]) == Estimate(4.0, -math.inf, math.inf, 1)
    with pytest.raises(ValueError, match="nothing"):
        estimate([])


@given(st.lists(st.floats(0.1, 1e6), min_size=2, max_size=12))
def test_the_interval_holds_the_median_and_stays_within_the_values(values: list[float]) -> None:
    found = estimate(values)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)


def test_the_interval_narrows_with_rounds() -> None:
    few, many = estimate([1.0, 2.0, 3.0] * 2), estimate([1.0, 2.0, 3.0] * 40)
    assert many.high - many.low < few.high - few.low


def test_a_ratio_is_of_medians_with_rounds_kept_together() -> None:
    below = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = ratio([3 * value for value in below], below)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))  # exact: rounds belong together
    assert ratio([2.0, 2.0], [0.0, -1.0]).value == math.inf
    assert quotient(0.0, 0.0) == 0.0
    with pytest.raises(ValueError, match="same rounds"):
        ratio([1.0], [])


def test_percentiles() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 100
    assert percentile([5.0], 0.99) == 5
    alerts = Alerts(tuple(values), 0)
    assert (alerts.p99_ms, alerts.share_within(20.0)) == (99, 0.2)


@pytest.mark.parametrize(
    ("low", "high", "count", "most", "least"),
    [
        (0.5, 0.9, 5, MET, NOT_MET),
        (1.1, 1.2, 5, NOT_MET, MET),
        (0.9, 1.1, 5, OPEN, OPEN),
        (-math.inf, math.inf, 5, OPEN, OPEN),
        (0.5, 0.9, 4, FEW, FEW),
    ],
)
def test_an_aim_is_met_only_by_the_whole_interval(low: float, high: float, count: int, most: str, least: str) -> None:
    found = Estimate(1.0, low, high, count)
    assert Aim("x", 1.0).verdict(found) == most
    assert Aim("x", 1.0, least=True).verdict(found) == least


def test_requests_are_told_from_eventfd_reads() -> None:
    text = "rchar: {}\nwchar: 99\nsyscr: {}\nsyscw: 7\nread_bytes: 0\n"
    for requests, wakeups in ((0, 0), (1, 0), (23, 17), (10**9, 10**9)):
        assert requests_from_io(text.format(requests * 4096 + wakeups * 8, requests + wakeups)) == requests


def test_a_table_compares_the_rounds_that_both_have() -> None:
    rows = {
        "full": Row("full", "full", samples={0: sample(2.0), 1: sample(4.0), 2: sample(6.0)}),
        "floor-perf": Row("floor-perf", "floor", samples={1: sample(2.0), 2: sample(3.0)}),
    }
    table = Table("x", rows)
    found = table.added_ratio("full", "floor-perf")
    assert found
    assert (found.value, found.count) == (pytest.approx(2), 2)
    assert table.added_ratio("full", "nobody") is None


def test_the_floor_is_the_cheaper_one() -> None:
    rows = {
        key: Row(key, key, samples={number: sample(us) for number in range(5)})
        for key, us in (("full", 3.0), ("floor-perf", 3.0), ("floor-multi", 2.0))
    }
    (judged,) = judge(Results({}, tables={"bench-32": Table("x", rows)}))
    assert judged.found.value == pytest.approx(1.5)
    assert judged.verdict == NOT_MET


def test_a_row_that_failed_says_why() -> None:
    rows = {
        "a": Row("a", "tool a", failure="no such thing " * 20),
        "b": Row("b", "tool b", samples={0: sample(1e6), 1: sample(-1e6)}),
        "c": Row("c", "tool c", samples={0: Sample(Pair(of(2), (of(1),)), 1, 1, 1, 1, 0.5, 3, 1)}),
    }
    text = render(Results({"kernel": "x"}, tables={"bench-32": Table("load", rows, [of(1)])}))
    assert "tool a: could not run: no such thing" in text
    assert "tool c: saw 50 % of the requests" in text
    assert "tool c: left the target's code changed in 1 of 1 rounds" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_cells() -> None:
    assert [number(value) for value in (0.0123, 1.234, 12.34, 123.4, -3.456, math.inf)] == [
        *("0.01", "1.23", "12.3", "123", "-3.46", "∞"),
    ]
    assert with_spread(Estimate(1.0, 0.5, 1.5, 3)) == "1.00 (0.50…1.50)"
    assert with_spread(Estimate(1.0, -math.inf, math.inf, 1)) == "1.00"
    assert with_spread(None) == "-"
    assert markdown(("a", "b"), [("long", "1")]) == ["| a    | b |", "|------|--:|", "| long | 1 |"]


def test_settings() -> None:
    rows = [*all_tracers(Path()), TRACE_LOG]
    default = settings_from({}, rows)
    assert (default.plan.rounds, default.lesser.rounds, default.alerts) == (7, 5, 100)
    some = settings_from({"BENCH_ONLY": "guest,full", "BENCH_ROUNDS": "1", "BENCH_SLICE_S": "0.3"}, rows)
    assert (list(some.sections), some.chosen(["full", "none"]), some.plan.slice_s) == (["guest"], ["full"], 0.3)
    assert some.lesser.rounds == some.least.rounds == 1
    with pytest.raises(ValueError, match="there is no nonsense"):
        settings_from({"BENCH_ONLY": "nonsense"}, rows)
    for wrong in ({"BENCH_ROUNDS": "0"}, {"BENCH_SLICE_S": "0"}, {"BENCH_ROUNDS": "many"}):
        with pytest.raises(ValueError, match=r"BENCH|invalid"):
            settings_from(wrong, rows)


def test_what_tracers_print() -> None:
    output = '{"event": "attached", "pid": 1}\nnoise\n{"event": "summ'
    assert events_in(output, "attached") == [{"event": "attached", "pid": 1}]
    assert events_in(output, "summary") == []
    assert (
        reason_in("ERROR: couldn't set RLIMIT_MEMLOCK\nAttaching\nERROR: no such symbol\n") == "ERROR: no such symbol"
    )


def test_json_has_no_infinity() -> None:
    assert as_json({"a": (math.inf, 1.5), "b": Estimate(1.0, -math.inf, 2.0, 1)}) == {
        "a": [None, 1.5],
        "b": {"value": 1.0, "low": None, "high": 2.0, "count": 1},
    }
