"""What is written: the contract's fields in JSON, tables that fit a terminal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from tracer.events import (
    Alert,
    Attached,
    Counts,
    Event,
    Failure,
    Latency,
    PoolInfo,
    ProbeInfo,
    Requests,
    Resolved,
    TargetEnded,
)
from tracer.report import JsonWriter, TableWriter, as_json, microseconds, rfc3339, size

NOON = 1_700_000_000.25
BIG = Latency(123_456_789, 85.0, 1_234.0, 999_999.0, 59_999_999.0, ((85.0, 123_456_789),))
PROBES = tuple(ProbeInfo(site, 0x9A0010, "symbols", True) for site in ("submit", "done", "callback"))
ATTACHED = Attached(
    NOON,
    4711,
    "/usr/bin/qemu-system-x86_64",
    "7.2.22",
    "full",
    PROBES,
    (PoolInfo(0x5500, 0x5600, 4711, "qemu-system-x86"), PoolInfo(0x7700, 0x7800, None, None)),
    3,
    0.4321,
)
COUNTS = Counts(
    NOON,
    4711,
    False,
    5.0,
    Requests(123_456_789, 123_456_780, 123_456_770, 9, 10),
    2,
    0,
    {"submit_to_done": BIG, "done_to_callback": BIG, "total": BIG},
    {"write-zeroes": {"submit_to_done": BIG, "done_to_callback": BIG, "total": BIG}},
)
ALERT = Alert(
    NOON,
    4711,
    0x5559BEEF,
    0x5500,
    0x5600,
    "write",
    "/srv/disk.img",
    65536,
    4096,
    "THREAD_DONE",
    0,
    1.25,
    1.0,
    "lost-wakeup",
    "The worker finished this write on /srv/disk.img 1.2 s ago, but nobody was told: its bottom half is not "
    "scheduled, and thread 4711 (qemu-system-x86) sleeps in ppoll. This is a lost wake-up, a bug of QEMU.",
    {"bottom_half_scheduled": False},
    "probes",
    1.5,
)
EVENTS: tuple[Event, ...] = (
    ATTACHED,
    COUNTS,
    replace(COUNTS, final=True),
    ALERT,
    Resolved(NOON, 4711, 0x5559BEEF, 0x5500, 2.5, "lost-wakeup"),
    TargetEnded(NOON, 4711, "process 4711 has ended"),
    Failure(NOON, 4712, "there is no process 4712", "pgrep -a qemu"),
)

# The contract's fields; what is here beyond it is promised from now on.
LATENCY = {"count", "p50", "p90", "p99", "max", "buckets"}
COUNTS_FIELDS = {"event", "time", "pid", "requests", "alerts", "lost_records", "latency_us", "by_kind"}
COUNTS_FIELDS |= {"period_s", "notes", "by_file", "late"}
FIELDS = {
    "attached": {
        *("event", "time", "pid", "exe", "version", "probes", "pools", "in_flight", "startup_s"),
        *("mode", "notes"),
    },
    "interval": COUNTS_FIELDS,
    "summary": COUNTS_FIELDS,
    "alert": {
        *("event", "time", "pid", "request", "pool", "context", "kind", "file", "offset", "bytes", "state", "ret"),
        *("age_s", "deadline_s", "overdue_s", "cause", "explanation", "evidence", "draining", "seen_from"),
        "submit_age_s",
    },
    "resolved": {"event", "time", "pid", "request", "pool", "after_s"},
    "ended": {"event", "time", "pid", "reason"},
    "error": {"event", "time", "pid", "message", "hint"},
}


def written(*events: Event) -> list[dict[str, Any]]:
    """The JSON objects of these events."""
    out = io.StringIO()
    for event in events:
        JsonWriter(out).write(event)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def told(*events: Event, several: bool = False, verbose: bool = False) -> tuple[str, list[str]]:
    """The table on standard output, and the messages."""
    out, messages = io.StringIO(), list[str]()
    writer = TableWriter(out, messages.append, several, verbose)
    for event in events:
        writer.write(event)
    return out.getvalue(), messages


def test_every_event_has_the_fields_of_the_contract() -> None:
    objects = written(*EVENTS)
    assert {found["event"]: set(found) for found in objects} == FIELDS
    assert len(objects) == len(EVENTS)


def test_counts_in_json() -> None:
    (found,) = written(COUNTS)
    assert found["event"] == "interval"
    assert set(found["requests"]) == {"submitted", "done", "completed", "cancelled", "in_flight"}
    for stages in (found["latency_us"], found["by_kind"]["write-zeroes"]):
        assert set(stages) == {"submit_to_done", "done_to_callback", "total"}
        assert all(set(latency) == LATENCY for latency in stages.values())
    assert found["latency_us"]["total"]["buckets"] == [[85.0, 123_456_789]]


def test_attached_in_json() -> None:
    (found,) = written(ATTACHED)
    assert found["probes"][0] == {"site": "submit", "address": "0x9a0010", "strategy": "symbols", "cheap": True}
    assert all(pool.keys() >= {"pool", "context"} for pool in found["pools"])
    assert found["pools"][1] == {"pool": "0x7700", "context": "0x7800", "home_tid": None, "home": None}


def test_an_alert_in_json() -> None:
    (found,) = written(ALERT)
    assert (found["request"], found["pool"], found["context"]) == ("0x5559beef", "0x5500", "0x5600")
    assert (found["age_s"], found["deadline_s"], found["overdue_s"]) == (1.25, 1.0, 0.25)


def test_what_is_not_known_is_null() -> None:
    unknown = replace(
        ALERT, pool=None, context=None, kind=None, file=None, offset=None, bytes=None, ret=None, submit_age_s=None
    )
    (found,) = written(unknown)
    assert {name for name, value in found.items() if value is None} == {
        *("pool", "context", "kind", "file", "offset", "bytes", "ret", "submit_age_s", "draining")
    }
    (sampled,) = written(replace(COUNTS, requests=Requests(None, None, None, None, None)))
    assert set(sampled["requests"].values()) == {None}


def test_an_event_of_no_process_names_none() -> None:
    assert "pid" not in as_json(Failure(NOON, None, "no", None))


def test_one_object_is_one_line_whatever_is_in_it() -> None:
    nasty = replace(ALERT, file='/srv/a\nb"\x1b[31m\udcff', explanation="one\ntwo")
    out = io.StringIO()
    JsonWriter(out).write(nasty)
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().isascii()
    assert json.loads(out.getvalue())["file"] == '/srv/a\nb"\x1b[31m\\xff'  # a lone surrogate is no JSON for many


class Counting(io.StringIO):
    """Counts how often it is flushed."""

    flushed = 0

    def flush(self) -> None:
        self.flushed += 1
        super().flush()


def test_each_event_leaves_at_once() -> None:
    """Whoever reads the pipe reads an alert when it happens."""
    for writer in (JsonWriter, lambda out: TableWriter(out, lambda text: None)):
        out = Counting()
        writer(out).write(ALERT)
        assert out.flushed >= 1


@pytest.mark.parametrize("verbose", [False, True])
def test_the_table_fits_a_terminal(verbose: bool) -> None:
    noted = replace(COUNTS, lost_records=99999, notes=("more than could be followed were under way: " + "word " * 30,))
    table, _ = told(ATTACHED, noted, replace(noted, final=True), ALERT, *EVENTS[4:], verbose=verbose)
    assert max(map(len, table.splitlines())) < 80
    assert len(table.splitlines()) > 15


def test_the_table_shows_the_counts() -> None:
    table, _ = told(replace(COUNTS, final=True))
    text = " ".join(table.split())
    assert "submitted 123456789, done 123456780, completed 123456770, cancelled 9, in flight 10, alerts 2" in text
    assert "submit to done 123456789 85us 1.2ms 1000.0ms 60.0s" in text
    assert "write-zeroes 123456789" in text


def test_kinds_are_in_the_summary_and_in_verbose_tables() -> None:
    assert "write-zeroes" not in told(COUNTS)[0]
    assert "write-zeroes" in told(COUNTS, verbose=True)[0]


def test_a_mode_that_does_not_count_says_nothing_of_it() -> None:
    table, _ = told(replace(COUNTS, requests=Requests(None, 1, 1, 0, None), latency={}, by_kind={}))
    assert "submitted" not in table
    assert "in flight" not in table
    assert "None" not in table


def test_lost_records_are_said() -> None:
    assert "lost" not in told(COUNTS)[0]
    assert "17 records were lost" in told(replace(COUNTS, lost_records=17))[0]


def test_an_alert_says_all_a_tired_person_needs() -> None:
    table, messages = told(ALERT)
    text = " ".join(table.split())
    for part in ("ALERT lost-wakeup", "write on /srv/disk.img (4k at 65536)", "0x5559beef", "THREAD_DONE for 1.25 s"):
        assert part in text
    assert " ".join(ALERT.explanation.split()) in text
    assert messages == []


def test_the_advice_is_force_where_the_main_loop_polls_inside_a_callback() -> None:
    """No name may tell that it drains; the monitor is as dead."""
    table, _ = told(replace(ALERT, evidence={"draining": None, "nested_poll": True}))
    assert "nudge --pid 4711 --force" in table
    assert "--qmp" not in table


def test_the_line_to_paste_goes_where_the_monitor_is() -> None:
    """libvirt holds the monitor of a QEMU that it started; where something drains, no monitor answers."""
    lines = {
        "--qmp SOCKET": ALERT,
        "--via virsh": replace(ALERT, by_libvirt=True),
        "--force": replace(ALERT, by_libvirt=True, evidence={"draining": "bdrv_drain_all_begin"}),
    }
    for way, alert in lines.items():
        assert f"\n  sudo aio-trace nudge --pid 4711 {way}\n" in told(alert)[0]


def test_many_alerts_alike_are_one_line_each() -> None:
    table, _ = told(*[ALERT] * 10)
    assert table.count("ALERT lost-wakeup") == 10
    assert table.count("THREAD_DONE") == TableWriter.MOST_ALIKE
    assert told(*[ALERT] * 10, verbose=True)[0].count("THREAD_DONE") == 10
    assert told(*[ALERT] * 10, replace(ALERT, cause="loop-busy"))[0].count("THREAD_DONE") == TableWriter.MOST_ALIKE + 1


def test_several_processes_are_told_apart() -> None:
    assert "4711" not in told(COUNTS)[0]
    assert "[4711]" in told(COUNTS, several=True)[0]
    assert "[4712]" in told(EVENTS[-1], several=True)[1][0]


def test_messages_are_not_results() -> None:
    """Standard output is for results alone."""
    table, messages = told(ATTACHED, *EVENTS[5:])
    assert table == ""
    text = "\n".join(messages)
    for part in ("QEMU 7.2.22", "0x5500", "0.43 s", "there is no process 4712", "pgrep -a qemu", "has ended"):
        assert part in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.4, "0us"),
        (85.4, "85us"),
        (999.4, "999us"),
        (1500.0, "1.5ms"),
        (3_400_000.0, "3.4s"),
    ],
)
def test_latencies_for_people(value: float | None, text: str) -> None:
    assert microseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (512, "512"), (4096, "4k"), (65536 + 512, "66048"), (1 << 20, "1M"), (3 << 30, "3G")]
)
def test_sizes_for_people(value: int, text: str) -> None:
    assert size(value) == text


def test_times_are_utc() -> None:
    assert rfc3339(NOON) == "2023-11-14T22:13:20.250Z"
    assert rfc3339(0.0) == "1970-01-01T00:00:00.000Z"
