"""Events into text: a table for people, JSON lines for programs. The only importer of tabulate.

Knows: formats. Does not know where values come from.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from datetime import datetime, timezone
from functools import cache
from typing import Any, Protocol, TextIO, TypeVar

from tracer.errors import pasted
from tracer.events import (
    Alert,
    Attached,
    Checked,
    Counts,
    Event,
    Failure,
    HostNeed,
    Latency,
    Nudged,
    PoolInfo,
    Resolved,
    Stepped,
    TargetEnded,
)
from tracer.known_bugs import BugNote
from tracer.layout import Layout
from tracer.text import exact, printable, printable_lines
from tracer.verdict import LOST_WAKEUP, NESTED_POLL

STAGE_TITLES = {
    "submit_to_done": "submit to done",
    "done_to_callback": "done to callback",
    "total": "total",
}


ADVICE_LOST_WAKEUP = (
    "Any new request in the same pool frees it, or the line below. Until then avoid what drains (stop, dump, "
    "snapshot, shutdown): QEMU's monitor would hang, too."
)
#: What drains holds the big lock, or is in the main loop: no monitor answers.
ADVICE_DRAINING = (
    "QEMU waits in {} for it, and its monitor answers no more: no command of the monitor frees it, but the line "
    "below does."
)
WIDTH = 79
NAME = "aio-trace"

T = TypeVar("T")
_NO_SPACE = "\N{BRAILLE PATTERN BLANK}"  # looks like one, and is as wide


def shown(value: T) -> T:
    """An event, or any part of one, with all its text as it may be shown to people: see tracer/text."""
    made: Any = value
    if isinstance(value, str):
        made = printable(value)
    elif isinstance(value, Mapping):
        made = {shown(name): shown(member) for name, member in value.items()}
    elif isinstance(value, (tuple, list)):
        made = type(value)(map(shown, value))
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value)}
        made = replace(value, **{name: shown(part) for name, part in parts.items()})
    result: T = made
    return result


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON, of ASCII alone; what JSON cannot say is None."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = "\\ud"
    # A pair of them is a letter, and a backslash may stand for itself: exact() knows.
    return text if "\\ud" not in text else json.dumps(exact(value), allow_nan=False)


def as_typed(command: str) -> str:
    """A command line of ours that can be pasted: with the path of the program where the shell would not find it."""
    return re.sub(r"^(sudo )?aio-trace\b", lambda found: (found[1] or "") + _program(), command)


@cache
def _program() -> str:
    path = os.path.abspath(sys.argv[0])
    found = (os.access(os.path.join(folder, NAME), os.X_OK) for folder in os.get_exec_path())
    return NAME if os.path.basename(path) != NAME or any(found) else pasted(path)


def wrapped(text: str) -> str:
    """Indented lines of at most WIDTH characters; long names are not cut."""
    return _filled(text, initial_indent="  ", break_long_words=False, break_on_hyphens=False)


def _filled(text: str, **how: Any) -> str:
    import textwrap

    return textwrap.fill(text, WIDTH, subsequent_indent="  ", **how)


def _get_ready() -> None:
    """Import what tables need, which takes long, now that it has been told that all is attached."""
    import textwrap  # noqa: F401

    import tabulate  # noqa: F401


class Writer(Protocol):
    """One format."""

    def write(self, event: Event) -> None:
        """Write one event, whole and at once."""
        ...


def rfc3339(time: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(time, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_hex(value: int | None) -> str | None:
    """An address as the contract writes it, None where not known."""
    return None if value is None else f"{value:#x}"


class JsonWriter:
    """One JSON object a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def write(self, event: Event) -> None:
        """Write one event, whole and at once."""
        self._out.write(json_line(as_json(event)) + "\n")
        self._out.flush()


def as_json(event: Event) -> dict[str, Any]:
    """An event as the contract's JSON object."""
    name, body = _body(event)
    head: dict[str, Any] = {"event": name, "time": rfc3339(event.time)}
    if event.pid is not None:
        head["pid"] = event.pid
    return head | body


def _body(event: Event) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Attached):
        return "attached", _attached_body(event)
    if isinstance(event, Counts):
        return ("summary" if event.final else "interval"), _counts_body(event)
    if isinstance(event, Alert):
        return "alert", _alert_body(event)
    if isinstance(event, Resolved):
        after = round(event.after_s, 6)
        return "resolved", {"request": as_hex(event.request), "pool": as_hex(event.pool), "after_s": after}
    if isinstance(event, Stepped):
        return "budget", _stepped_body(event)
    if isinstance(event, Nudged):
        return "nudge", _nudged_body(event)
    if isinstance(event, Failure):
        return "error", {"message": event.message, "hint": event.hint}
    if isinstance(event, Checked):
        return "check", _checked_body(event)
    if isinstance(event, TargetEnded):
        return "ended", {"reason": event.reason}
    raise TypeError(f"no JSON for {type(event).__name__}")


def _attached_body(event: Attached) -> dict[str, Any]:
    return {
        "exe": event.exe,
        "version": event.version,
        "mode": event.mode,
        "probes": [
            {"site": p.site, "address": as_hex(p.address), "strategy": p.strategy, "cheap": p.cheap}
            for p in event.probes
        ],
        "pools": [
            {
                "pool": as_hex(p.pool),
                "context": as_hex(p.context),
                "home_tid": p.home_tid,
                "home": p.home_name,
            }
            for p in event.pools
        ],
        "in_flight": event.in_flight,
        "startup_s": round(event.startup_s, 3),
        "notes": list(event.notes),
    }


def _stepped_body(event: Stepped) -> dict[str, Any]:
    return {
        "from": event.before,
        "to": event.mode,
        "cost_percent": None if event.share is None else round(100 * event.share, 2),
        "budget_percent": round(100 * event.budget, 2),
    }


def _nudged_body(event: Nudged) -> dict[str, Any]:
    return {
        "request": as_hex(event.request),
        "pool": as_hex(event.pool),
        "cause": event.cause,
        "command": event.command,
        "freed": event.freed,
        "pause_ms": None if event.pause_ms is None else round(event.pause_ms, 3),
    }


def _latency_json(latency: Latency) -> dict[str, Any]:
    return {
        "count": latency.count,
        "p50": latency.p50,
        "p90": latency.p90,
        "p99": latency.p99,
        "max": latency.max,
        "buckets": [list(bucket) for bucket in latency.buckets],
    }


def _stages_json(stages: Mapping[str, Latency]) -> dict[str, Any]:
    return {stage: _latency_json(latency) for stage, latency in stages.items()}


def _counts_body(event: Counts) -> dict[str, Any]:
    requests = event.requests
    return {
        "period_s": round(event.period_s, 3),
        "requests": {
            "submitted": requests.submitted,
            "done": requests.done,
            "completed": requests.completed,
            "cancelled": requests.cancelled,
            "in_flight": requests.in_flight,
        },
        "alerts": event.alerts,
        "lost_records": event.lost_records,
        "late": event.late,
        "latency_us": _stages_json(event.latency),
        "by_kind": _groups_json(event.by_kind),
        "by_file": _groups_json(event.by_file),
        "notes": list(event.notes),
    }


def _groups_json(groups: Mapping[str, Mapping[str, Latency]] | None) -> dict[str, Any] | None:
    return None if groups is None else {name: _stages_json(stages) for name, stages in groups.items()}


def _alert_body(event: Alert) -> dict[str, Any]:
    return {
        "request": as_hex(event.request),
        "pool": as_hex(event.pool),
        "context": as_hex(event.context),
        "kind": event.kind,
        "file": event.file,
        "offset": event.offset,
        "bytes": event.bytes,
        "state": event.state,
        "ret": event.ret,
        "age_s": round(event.age_s, 6),
        "deadline_s": event.deadline_s,
        "overdue_s": round(event.overdue_s, 6),
        "cause": event.cause,
        "explanation": event.explanation,
        "evidence": dict(event.evidence),
        "draining": event.evidence.get("draining"),
        "seen_from": event.seen_from,
        "submit_age_s": None if event.submit_age_s is None else round(event.submit_age_s, 6),
    }


def bugs_json(bugs: Sequence[BugNote] | None) -> list[dict[str, Any]] | None:
    """Known bugs as the contract writes them; None where the version is not known."""
    if bugs is None:
        return None
    return [
        {
            "commit": note.bug.commit,
            "class": note.bug.kind,
            "versions": note.bug.versions,
            "title": note.bug.title,
            "fixed": note.fixed,
        }
        for note in bugs
    ]


def _checked_body(event: Checked) -> dict[str, Any]:
    return {
        "exe": event.exe,
        "version": event.version,
        "build_id": event.build_id,
        "machine": event.machine,
        "known_bugs": bugs_json(event.known_bugs),
        "barrier_fixed": event.barrier_fixed,
        "sites": [
            {
                "site": site.name,
                "address": as_hex(site.address),
                "register": site.register,
                "instruction": site.instruction,
                "strategy": site.strategy,
                "cheap": site.cheap,
            }
            for site in event.sites
        ],
        "layout": None if event.layout is None else asdict(event.layout),
        "attempts": [
            {"strategy": attempt.strategy, "outcome": attempt.outcome, "ok": attempt.ok} for attempt in event.attempts
        ],
        "host": [asdict(need) for need in event.host],
        "ready": event.ready,
        "notes": list(event.notes),
    }


def microseconds(value: float | None) -> str:
    """A latency for people: 85us, 1.2ms, 3.4s; a dash where there is none."""
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f}us"
    if value < 1e6:
        return f"{value / 1e3:.1f}ms"
    return f"{value / 1e6:.1f}s"


def size(value: int) -> str:
    """A length for people: 512, 64k, 1M where it is round, else bytes."""
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if value and value % unit == 0:
            return f"{value // unit}{name}"
    return str(value)


class TableWriter:
    """For people, under 80 columns where names allow; what is not asked for goes to `progress` (stderr)."""

    #: How many alerts of one cause and pool in a row are written in full.
    MOST_ALIKE = 3

    def __init__(
        self, out: TextIO, progress: Callable[[str], None], several: bool = False, verbose: bool = False
    ) -> None:
        self._out = out
        self._progress = progress
        self._several = several
        self._verbose = verbose
        self._alike: tuple[str, int | None] | None = None
        self._alike_count = 0

    def write(self, event: Event) -> None:
        """Write one event, whole and at once; of its text nothing does more than stand there."""
        event = shown(event)
        if isinstance(event, Attached):
            self._attached(event)
        elif isinstance(event, Counts):
            self._print(self._counts(event))
        elif isinstance(event, Alert):
            self._alert(event)
        elif isinstance(event, Resolved):
            self._print(self._resolved(event))
        elif isinstance(event, Checked):
            self._print(checked_text(event, self._verbose))
        elif isinstance(event, Nudged):
            self._print(self._nudged(event))
        elif isinstance(event, Stepped):
            self._print(self._stepped(event))
        elif isinstance(event, TargetEnded):
            self._progress(f"{self._of(event)}{event.reason}")
        elif isinstance(event, Failure):
            self._progress(f"aio-trace: {self._of(event)}{event.message}")
            if event.hint:
                self._progress(f"  try: {as_typed(event.hint)}")

    def _print(self, text: str) -> None:
        self._out.write(printable_lines(text) + "\n")
        self._out.flush()

    def _of(self, event: Event) -> str:
        return f"[{event.pid}] " if self._several and event.pid is not None else ""

    def _when(self, event: Event) -> str:
        return datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S") + " " + self._of(event)

    def _attached(self, event: Attached) -> None:
        version = f"QEMU {event.version}" if event.version else "QEMU (version not found)"
        self._progress(f"{self._of(event)}{event.exe}: {version}")
        for probe in event.probes if self._verbose else ():
            cost = "cheap" if probe.cheap else "DEAR"
            self._progress(f"  {probe.site:9s} {probe.address:#x}  by {probe.strategy}, {cost}")
        for pool in event.pools:
            self._progress(f"  pool {pool.pool:#x}, run by {_home_of(pool)}")
        for note in event.notes:
            self._progress(f"  note: {note}")
        probes = f"{len(event.probes)} probes" if event.probes else "no probe, memory is sampled"
        self._progress(
            f"{self._of(event)}attached to {event.pid} in {event.startup_s:.2f} s: {probes}, "
            f"{event.in_flight} requests in flight. Ctrl-C ends it."
        )
        _get_ready()

    def _counts(self, event: Counts) -> str:
        requests = event.requests
        parts = [
            f"{name} {value}"
            for name, value in (
                ("submitted", requests.submitted),
                ("done", requests.done),
                ("completed", requests.completed),
                ("cancelled", requests.cancelled),
                ("in flight", requests.in_flight),
                ("late", event.late),
                ("alerts", event.alerts),
            )
            if value is not None and (value or name not in ("cancelled", "late"))
        ]
        title = f"summary of {event.period_s:.1f} s" if event.final else f"last {event.period_s:.1f} s"
        lines = [_filled(f"{self._when(event)}{title}: " + ", ".join(parts))]
        table = self._latencies(event)
        if table:
            lines.append(table)
        if event.lost_records:
            lines.append(f"{event.lost_records} records were lost: the counts above are too low.")
        lines += [_filled(f"note: {note}") for note in event.notes]
        return "\n".join(lines)

    def _latencies(self, event: Counts) -> str:
        rows = [_row(STAGE_TITLES[stage], latency) for stage, latency in event.latency.items()]
        for group in (event.by_kind or {}, event.by_file or {}):
            # One of one says nothing that the total does not.
            for name, stages in group.items() if len(group) > 1 or event.final or self._verbose else ():
                latency = stages.get("total") or stages.get("done_to_callback")
                if latency:
                    rows.append(_row(f"  {shortened(name)}", latency))
        rows = [row for row in rows if row[1]]
        if not rows:
            return ""
        return _table(rows, ["", "requests", "p50", "p90", "p99", "max"], colalign=("left", *["right"] * 5))

    def _alert(self, event: Alert) -> None:
        alike = (event.cause, event.pool)
        self._alike_count = self._alike_count + 1 if alike == self._alike else 1
        self._alike = alike
        if self._alike_count > self.MOST_ALIKE and not self._verbose:
            self._print(f"{self._when(event)}ALERT {event.cause}: the same for {self._what(event)}")
            return
        deadline = f"deadline {event.deadline_s:g} s"
        lines = [
            f"{self._when(event)}ALERT {event.cause}: {self._what(event)}",
            wrapped(event.explanation),
            f"  request {event.request:#x}, {event.state} for {event.age_s:.2f} s ({deadline})"
            + ("" if event.ret is None else f", ret {event.ret}"),
        ]
        if event.there_before:
            lines.append("  It was there when aio-trace came: it may have been late for long.")
        if event.cause == LOST_WAKEUP:
            drains = event.evidence.get("draining") or (NESTED_POLL if event.evidence.get("nested_poll") else None)
            lines.append(wrapped(ADVICE_DRAINING.format(drains) if drains else ADVICE_LOST_WAKEUP))
            way = "--force" if drains else "--via virsh" if event.by_libvirt else "--qmp SOCKET"
            lines.append("  " + as_typed(f"sudo aio-trace nudge --pid {event.pid} {way}"))
        self._print("\n".join(lines))

    def _what(self, event: Alert) -> str:
        place = f" on {event.file}" if event.file else ""
        extent = ""
        if event.bytes is not None and event.offset is not None:
            extent = f" ({size(event.bytes)} at {event.offset})"
        return f"{event.kind or 'request'}{place}{extent}"

    def _stepped(self, event: Stepped) -> str:
        what = {
            "full": "all three probes again",
            "alert": "done and callback only: no submit times",
            "none": "no probe, memory is sampled: alerts still come, counts and latencies do not",
        }[event.mode]
        cost = "" if event.share is None else f"the probes cost {100 * event.share:.1f} % of a processor, "
        text = f"{self._when(event)}budget: {cost}{100 * event.budget:g} % are allowed; from now on {what}"
        return f"{text}\n  --budget none lets them cost what they cost"

    def _nudged(self, event: Nudged) -> str:
        outcome = "went on: it is free" if event.freed else "is still stuck: NOT freed"
        text = f"{self._when(event)}nudge: request {event.request:#x} ({event.cause}) {outcome}"
        if event.pause_ms is not None:
            text += f"\n  its thread stood still for {event.pause_ms:.2f} ms"
        return text

    def _resolved(self, event: Resolved) -> str:
        self._alike = None
        return f"{self._when(event)}resolved: request {event.request:#x} went on after {event.after_s:.2f} s"


def shortened(path: str, width: int = 30) -> str:
    """The end of a long path, which is the part that differs."""
    return path if len(path) <= width else "…" + path[1 - width :]


def _home_of(pool: PoolInfo) -> str:
    if pool.home_tid is None:
        return "a thread that could not be found out"
    return f"thread {pool.home_tid} ({pool.home_name})"


def _row(title: str, latency: Latency) -> list[str | int]:
    figures = (latency.p50, latency.p90, latency.p99, latency.max)
    return [title, latency.count, *(microseconds(value) for value in figures)]


# -- check ------------------------------------------------------------------------------------------

BARRIER_TEXTS = {
    True: "there: bottom halves are scheduled with the barriers of e8d3b1a25f",
    False: "MISSING: without e8d3b1a25f, completions can be lost (cause lost-wakeup)",
    None: "not to be seen in this build's code",
}


def checked_text(event: Checked, verbose: bool = False) -> str:
    """The findings of `check` for people; `verbose`: with what the kernel and the compiler said."""
    event = shown(event)
    version = f"QEMU {event.version}" if event.version else "QEMU (version not found)"
    parts = [f"{event.exe}: {version}\n  {event.machine}, build id {event.build_id or 'none'}"]
    parts.append("probe sites\n" + (_sites_table(event) if event.sites else "  none was found"))
    tried = [[f"  {a.strategy}", "ok" if a.ok else "no", a.outcome] for a in event.attempts]
    parts.append("ways to find them\n" + _rows(tried, ["  way", "", "outcome"]))
    if event.layout is not None:
        parts.append(_layout_text(event.layout))
    parts.append(f"barriers  {BARRIER_TEXTS[event.barrier_fixed]}")
    parts.append(_bugs_text(event.known_bugs))
    needs = [[f"  {need.need}", _answer(need), need.detail] for need in event.host]
    parts.append("this host\n" + _rows(needs, ["  need", "", ""]))
    parts += [_said(need) for need in event.host if verbose and need.words]
    parts += [f"note:\n{wrapped(note)}" for note in event.notes]
    parts.append(_readiness(event))
    return "\n\n".join(parts)


def _rows(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A plain table whose last column is wrapped at WIDTH."""
    columns = list(zip(headers, *rows))
    taken = sum(max(len(cell) for cell in column) + 2 for column in columns[:-1])
    wrap = [None] * (len(headers) - 1) + [WIDTH - taken]
    return _table(rows, headers, maxcolwidths=wrap, disable_numparse=True)


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str], **form: Any) -> str:
    """A plain table; a first column that is indented stays so.

    tabulate takes spaces away, and how it is told not to depends on its version: so they are none meanwhile.
    """
    from tabulate import tabulate

    def held(text: object) -> str:
        return re.sub("^ +", lambda indent: _NO_SPACE * len(indent[0]), str(text))

    marked = [[held(first), *rest] for first, *rest in rows]
    table = tabulate(marked, [held(headers[0]), *headers[1:]], tablefmt="plain", **form)
    return table.replace(_NO_SPACE, " ")


def _sites_table(event: Checked) -> str:
    rows = [
        [f"  {s.name}", f"{s.address:#x}", s.register, s.strategy, "cheap" if s.cheap else "DEAR", s.instruction]
        for s in event.sites
    ]
    return _rows(rows, ["  site", "address", "request in", "by", "cost", "instruction"])


def _layout_text(layout: Layout) -> str:
    rows = []
    for name, part in (
        ("ThreadPoolElement", layout.element),
        ("ThreadPool", layout.pool),
        ("QEMUBH", layout.bottom_half),
    ):
        members = [f"{member} {value:#x}" for member, value in asdict(part).items() if value is not None]
        rows.append([f"  {name}", ", ".join(members)])
    proof = f"layout, by {layout.source}: functions agree on it; live structures must prove it again"
    return f"{proof}\n" + _rows(rows, ["  structure", "offsets"])


def _bugs_text(bugs: Sequence[BugNote] | None) -> str:
    if bugs is None:
        return "known bugs  cannot be told without a version"
    if not bugs:
        return "known bugs  none of those that aio-trace knows, by this version"
    rows = []
    for note in bugs:
        fixed = {True: " (its fix is in the code)", False: " (its fix is NOT in the code)", None: ""}[note.fixed]
        rows.append([f"  {note.bug.commit}", note.bug.kind, note.bug.versions, note.bug.title + fixed])
    title = "fixes that this version may lack (distributions take fixes into older versions)"
    return f"{title}\n" + _rows(rows, ["  commit", "class", "versions", "what"])


def _answer(need: HostNeed) -> str:
    if need.ok is None:
        return "?"
    return "ok" if need.ok else ("NO" if need.required else "no")


def _said(need: HostNeed) -> str:
    return f"what was said of {need.need}:\n" + "\n".join(f"  {line}" for line in need.words)


def _readiness(event: Checked) -> str:
    if event.ready:
        target = event.pid if event.pid is not None else "PID"
        return "ready: " + as_typed(f"sudo aio-trace --pid {target}")
    lacking = [need.need for need in event.host if need.required and need.ok is False]
    unknown = [need.need for need in event.host if need.required and need.ok is None]
    if not event.sites:
        lacking.insert(0, "probe sites")
    parts = [f"{word}: {', '.join(names)}" for word, names in (("missing", lacking), ("not proved", unknown)) if names]
    return "not ready; " + "; ".join(parts)
