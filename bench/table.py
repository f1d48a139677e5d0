"""The report: Markdown tables that fit a terminal, and which aims they meet.

Knows: words, widths, columns. Takes figures, measures nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.experiments import Alerts, Start, start_ratio
from bench.figures import ENOUGH_ROUNDS, Aim, Estimate
from bench.measure import Row, Table

WIDTH = 99
GUEST = "guest"
FLOORS = ("floor-perf", "floor-multi")
ALERT_LIMIT_MS = 20.0

FULL_TO_FLOOR = Aim("full / three empty uprobes, us added", 1.3)
FULL_TO_BPFTRACE = Aim("full / bpftrace script, us added", 0.1)
ALERT_TO_FULL = Aim("alert / full, us added", 0.7)
NONE_IOPS = Aim("none / untraced, IOPS", 0.99, least=True)
CPU_PERCENT = Aim("CPU of aio-trace full, % of a core", 1.0)
STARTUP = Aim("start, warm / bpftrace script", 1.0)
RSS = Aim("VmRSS / bpftrace script", 1.0)
PEAK = Aim("VmHWM / bpftrace script", 1.0)
ALERT_MS = Aim("alert after deadline, 99 of 100, ms", ALERT_LIMIT_MS)
MANY_TO_ONE = Aim("16 watched / 1, us added", 1.1)
ALL_TO_ONE = Aim("--all / 1, us added", 1.1)


@dataclass
class Results:
    """Everything that one run of the bench found; what did not run is not there."""

    header: Mapping[str, str]
    tables: dict[str, Table] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)
    cpu: dict[str, Estimate] = field(default_factory=dict)
    cpu_load: str = ""
    alerts: Alerts | None = None
    many: Table | None = None
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Judged:
    """An aim, where it was looked at, what was found."""

    aim: Aim
    where: str
    found: Estimate

    @property
    def verdict(self) -> str:
        """Met, not met, or open."""
        return self.aim.verdict(self.found)


def floor_of(table: Table) -> str | None:
    """The cheaper of the two floors, None where neither ran."""
    known = [(row.added_us.value, key) for key in FLOORS if (row := table.rows.get(key)) and row.added_us]
    return min(known)[1] if known else None


def judge(results: Results) -> list[Judged]:
    """All aims that this run can say something about."""
    found: list[tuple[Aim, str, Estimate | None]] = []
    for section, table in results.tables.items():
        if section == GUEST:  # an emulated CPU: differences of microseconds are below its spread
            none = table.rows.get("none")
            found.append((NONE_IOPS, section, none.iops_ratio if none else None))
            continue
        floor = floor_of(table)
        none = table.rows.get("none")
        found += [
            (FULL_TO_FLOOR, section, table.added_ratio("full", floor) if floor else None),
            (FULL_TO_BPFTRACE, section, table.added_ratio("full", "bpftrace-requests")),
            (ALERT_TO_FULL, section, table.added_ratio("alert", "full")),
            (NONE_IOPS, section, none.iops_ratio if none else None),
        ]
    found.append((CPU_PERCENT, "cpu", results.cpu.get("full")))
    for aim, name in ((STARTUP, "startup_s"), (RSS, "rss_mib"), (PEAK, "peak_mib")):
        found.append((aim, "starts", start_ratio(results.starts, "full", "bpftrace-requests", name)))
    if results.alerts:
        late = results.alerts.p99_ms
        found.append((ALERT_MS, "alerts", Estimate(late, late, late, len(results.alerts.overdue_ms))))
    if results.many:
        for aim, key in ((MANY_TO_ONE, "watch-many"), (ALL_TO_ONE, "watch-all")):
            found.append((aim, "many", results.many.added_ratio(key, "watch-1")))
    return [Judged(aim, where, estimate) for aim, where, estimate in found if estimate]


# Cells


def number(value: float) -> str:
    """Three digits, no exponent: 0.0123, 1.23, 12.3, 123, 1234."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{value:.{digits}f}"


def with_spread(found: Estimate | None) -> str:
    """The median and its interval: `1.23 (1.20…1.27)`."""
    if found is None:
        return "-"
    if not math.isfinite(found.low) or not math.isfinite(found.high):
        return number(found.value)
    return f"{number(found.value)} ({number(found.low)}…{number(found.high)})"


def median_of(found: Estimate | None) -> str:
    """The median alone."""
    return "-" if found is None else number(found.value)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table with columns as wide as they need; all but the first to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(cells, widths))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width + 1) + ":") if index else "-" * (width + 2) for index, width in enumerate(widths)]
    return [line(head), f"|{'|'.join(rule)}|", *(line(row) for row in rows)]


def bullets(texts: Iterable[str]) -> list[str]:
    """A list, wrapped."""
    return [line for text in texts for line in textwrap.wrap(text, WIDTH, initial_indent="* ", subsequent_indent="  ")]


# Sections


def render(results: Results) -> str:
    """The whole report."""
    lines = ["# What tracing costs", ""]
    lines += [f"{name}: {value}  " for name, value in results.header.items()]
    lines += [
        "",
        "Figures are medians; (low…high) is where the median lies by 95 % (bootstrap over rounds). Each",
        "slice is compared with the untraced ones immediately before and after it. CPU/req: user and",
        f"system time of the target for each request. An aim with fewer than {ENOUGH_ROUNDS} rounds has no verdict.",
    ]
    for section, table in results.tables.items():
        lines += ["", f"## {section}: {table.load}", "", *load_table(table)]
    if results.many:
        lines += ["", "## many: QEMUs of one executable, one of them loaded", "", *load_table(results.many)]
    if results.starts:
        lines += ["", "## starts: start, memory and end on an idle daemon", "", *start_table(results.starts)]
    if results.cpu:
        lines += ["", f"## cpu: the tracer's own, on {results.cpu_load}", "", *cpu_table(results.cpu)]
    if results.alerts:
        lines += ["", "## alerts: from the deadline to the alert", "", *alert_lines(results.alerts)]
    lines += ["", "## Aims", "", *aim_table(judge(results))]
    if results.failures:
        lines += ["", "## Could not run", "", *bullets(results.failures)]
    return "\n".join(lines) + "\n"


def load_table(table: Table) -> list[str]:
    """One load: its rows, and remarks below."""
    head = ("tracer", "IOPS ratio", "µs added/req", "its CPU %", "peak MiB", "start s", "end s")
    rows = [_load_row(row) for row in table.rows.values()]
    remarks = bullets(f"{row.label}: {remark}" for row in table.rows.values() for remark in row.remarks())
    return [_untraced_line(table), "", *markdown(head, rows), *([""] if remarks else []), *remarks]


def _untraced_line(table: Table) -> str:
    if not table.untraced:
        return "Untraced: not measured"
    iops = sorted(slice_.iops for slice_ in table.untraced)
    cost = sorted(slice_.us_per_request for slice_ in table.untraced)
    middle = len(iops) // 2
    return (
        f"Untraced: {iops[middle]:.0f} IOPS ({iops[0]:.0f}…{iops[-1]:.0f}), "
        f"{number(cost[middle])} µs CPU/req ({number(cost[0])}…{number(cost[-1])}), {len(iops)} slices"
    )


def _load_row(row: Row) -> list[str]:
    if not row.samples:
        return [row.label, *["-"] * 6]
    cells = [row.label, with_spread(row.iops_ratio), with_spread(row.added_us)]
    if not any(sample.startup_s for sample in row.samples.values()):
        return [*cells, *["-"] * 4]
    return [
        *cells,
        median_of(row.of(lambda sample: sample.pair.traced.tracer_percent)),
        median_of(row.of(lambda sample: sample.peak_mib)),
        median_of(row.of(lambda sample: sample.startup_s)),
        median_of(row.of(lambda sample: sample.detach_s)),
    ]


def start_table(starts: Mapping[str, Start]) -> list[str]:
    """How each starts and ends."""
    head = ("tracer", "start s", "end s", "VmRSS MiB", "VmHWM MiB")
    names = ("startup_s", "detach_s", "rss_mib", "peak_mib")
    rows = [[start.label, *(with_spread(start.of(name)) for name in names)] for start in starts.values()]
    failures = bullets(f"{start.label}: could not run: {start.failure}" for start in starts.values() if start.failure)
    return [*markdown(head, rows), *([""] if failures else []), *failures]


def cpu_table(cpu: Mapping[str, Estimate]) -> list[str]:
    """Percent of one core."""
    return markdown(("tracer", "% of a core"), [[key, with_spread(found)] for key, found in cpu.items()])


def alert_lines(alerts: Alerts) -> list[str]:
    """How late the alerts came."""
    count = len(alerts.overdue_ms)
    share = 100 * alerts.share_within(ALERT_LIMIT_MS)
    return [
        f"{count} completions lost: the alert came {number(min(alerts.overdue_ms))} to "
        f"{number(max(alerts.overdue_ms))} ms after the deadline,",
        f"99 of 100 within {number(alerts.p99_ms)} ms; {share:.0f} % within {ALERT_LIMIT_MS:g} ms; "
        f"{alerts.wrong} of another cause or request.",
    ]


def aim_table(judged: Sequence[Judged]) -> list[str]:
    """Each aim with its verdict."""
    rows = [[j.aim.name, j.where, with_spread(j.found), j.aim.wanted, j.verdict] for j in judged]
    return markdown(("aim", "where", "found", "wanted", ""), rows) if rows else ["none was looked at"]
