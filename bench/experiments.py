"""What is not a load with rows: start and memory on an idle target, the tracer's own CPU, alerts, many QEMUs.

Knows: which slices answer which of these questions. Does not know how figures are shown.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.figures import Estimate, Pair, estimate, percentile, ratio
from bench.loads import Load, daemon, idle_daemon, make_image
from bench.measure import SETTLE_S, Place, Plan, Row, Sample, Say, Table, run_table
from bench.tracers import AioTrace, Run, Target, Tracer, TracerFailed, attached, events_in, target_of
from tracer.lab import faults
from tracer.lab.process import wait_until
from tracer.lab.qemu import Drive, Qemu, paused

INTERVAL_S = 5.0
ALERT_DEADLINE_S = 0.2
ALERT_TIMEOUT_S = 30.0
LOOK_AFTER_S = 0.3
MANY = 16
BORN_WARM_REQUESTS = 30_000


# Start, memory, end


@dataclass
class Start:
    """How one tracer starts and ends on a target that has nothing to do; by round."""

    key: str
    label: str
    startup_s: list[float] = field(default_factory=list)
    detach_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    failure: str | None = None

    def of(self, name: str) -> Estimate | None:
        """The estimate of one of its lists."""
        values = getattr(self, name)
        return estimate(values) if values else None


def starts(tracers: Sequence[Tracer], rounds: int, folder: Path, say: Say) -> dict[str, Start]:
    """Start and end each tracer in every round, in random order, on an idle qemu-storage-daemon."""
    found = {tracer.key: Start(tracer.key, tracer.label) for tracer in tracers}
    generator = random.Random(rounds)
    with idle_daemon(folder) as load:
        target = target_of(load.pid, load.exe)
        for number in range(-1, rounds):  # the first is to warm up
            say(f"  starts: round {number + 1} of {rounds}")
            for tracer in generator.sample(tracers, len(tracers)):
                if found[tracer.key].failure is None:
                    _start_once(tracer, target, folder, found[tracer.key], number >= 0)
    return found


def _start_once(tracer: Tracer, target: Target, folder: Path, into: Start, keep: bool) -> None:
    try:
        with attached(tracer, target, folder) as run:
            time.sleep(LOOK_AFTER_S)  # what it does immediately after it attached is part of its memory
            run.look()
            run.detach()
    except TracerFailed as error:
        into.failure = str(error)
        return
    if keep:
        into.startup_s.append(run.startup_s)
        into.detach_s.append(run.detach_s)
        into.rss_mib.append(run.rss_mib)
        into.peak_mib.append(run.peak_mib)


def start_ratio(found: dict[str, Start], above: str, below: str, name: str) -> Estimate | None:
    """One figure of one tracer against another's, by round."""
    if above not in found or below not in found:
        return None
    pairs = list(zip(getattr(found[above], name), getattr(found[below], name)))
    return ratio([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


# The tracer's own CPU


def tracer_cpu(load: Load, tracers: Sequence[Tracer], windows: int, folder: Path, say: Say) -> dict[str, Estimate]:
    """The tracer's CPU time in percent of one core, over whole intervals of 5 s each; no row where it failed."""
    target = target_of(load.pid, load.exe)
    found = {}
    for tracer in tracers:
        say(f"  CPU of {tracer.label}: {windows} windows of {INTERVAL_S:g} s on {load.name}")
        try:
            with attached(tracer, target, folder) as run:
                time.sleep(SETTLE_S)
                slices = [load.measure(INTERVAL_S, run.pids) for _ in range(windows)]
                run.detach()
        except TracerFailed as error:
            say(f"  {tracer.label}: could not run: {error}")
            continue
        found[tracer.key] = estimate(percent for slice_ in slices if (percent := slice_.tracer_percent) is not None)
    return found


# Alerts


@dataclass(frozen=True)
class Alerts:
    """How long after the deadline each alert came, in ms: by its own `overdue_s`, and until it was read here."""

    overdue_ms: tuple[float, ...]
    wrong: int  # alerts of another cause or request

    @property
    def p99_ms(self) -> float:
        """99 of 100 came no later than this."""
        return percentile(self.overdue_ms, 0.99)

    def share_within(self, limit_ms: float) -> float:
        """The share that came within so many ms."""
        return sum(value <= limit_ms for value in self.overdue_ms) / len(self.overdue_ms)


def alerts(count: int, programs: Path, folder: Path, say: Say) -> Alerts:
    """Lose that many completions one after the other, on a QEMU of the lab."""
    overdue, wrong = [], 0
    options = ("--deadline", f"{1000 * ALERT_DEADLINE_S:g}ms", "--interval", "0")
    tracer = AioTrace("full", programs, options=options)
    with paused([Drive(file=make_image(folder))]) as machine:
        machine.request("d0", "write")
        pool = faults.pool_of(machine, "d0")
        target = target_of(machine.pid, os.readlink(f"/proc/{machine.pid}/exe"))
        with attached(tracer, target, folder) as run:
            for number in range(count):
                if number % 25 == 0:
                    say(f"  alerts: {number} of {count}")
                alert, lost = _lose_one(machine, pool, run, number)
                overdue.append(1000 * float(alert["overdue_s"]))
                wrong += alert["cause"] != "lost-wakeup" or int(alert["request"], 16) != lost
            run.detach()
    return Alerts(tuple(overdue), wrong)


def _lose_one(machine: Qemu, pool: faults.PoolHandle, run: Run, number: int) -> tuple[dict[str, Any], int]:
    """Its alert, and the address of the lost request; it is free again afterwards."""
    lost = faults.lose(machine, "d0", "write", pool)
    alert = _nth_event(run, "alert", number)
    lost.free()
    _nth_event(run, "resolved", number)
    return alert, lost.request


def _nth_event(run: Run, name: str, number: int) -> dict[str, Any]:
    def come() -> list[dict[str, Any]]:
        return events_in(run.output(), name)[number:]

    return wait_until(come, ALERT_TIMEOUT_S, f"{name} number {number + 1}")[0]


# Many QEMUs


def many(plan: Plan, programs: Path, folder: Path, say: Say, count: int = MANY) -> Table:
    """One loaded daemon among idle ones of the same executable: watched alone, with others, or not at all."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(idle_daemon(folder)) for _ in range(count)]
        load = stack.enter_context(daemon(folder))
        others = [other.pid for other in idle]
        watched = {
            ("watch-1", "it alone is watched"): [load.pid],
            ("watch-many", f"{count} watched, --pid"): [load.pid, *others[1:]],
            ("watch-all", f"all {count + 1} watched, --all"): [],
            ("unwatched-1", "unwatched, 1 other is"): others[:1],
            ("unwatched-many", f"unwatched, {count} others"): others,
        }
        tracers = [
            AioTrace("full", programs, key=key, label=label, watch=pids) for (key, label), pids in watched.items()
        ]
        table = run_table(Place(load, target_of(load.pid, load.exe)), tracers, plan, folder, say)
        load.close()
        for key, row in table.rows.items():
            if key.startswith("unwatched"):
                probed = max((sample.probed_sites or 0 for sample in row.samples.values()), default=0)
                row.note = f"{probed} of 3 sites of its code were changed"
        table.rows["born-later"] = _born_later(idle[0], plan, programs, folder, say)
    return table


def _born_later(other: Load, plan: Plan, programs: Path, folder: Path, say: Say) -> Row:
    """A daemon that was started after a trace with --all, against itself after that trace ended."""
    row = Row("born-later", "unwatched, began after --all")
    tracer = AioTrace("full", programs, watch=())
    for number in range(plan.rounds):
        say(f"  {row.label}: round {number + 1} of {plan.rounds}")
        try:
            with attached(tracer, target_of(other.pid, other.exe), folder) as run, daemon(folder) as load:
                load.warm_up(BORN_WARM_REQUESTS)
                traced = load.measure(plan.slice_s, run.pids)
                run.look()
                run.detach()
                time.sleep(SETTLE_S)
                pair = Pair(traced, (load.measure(plan.slice_s),))
        except TracerFailed as error:
            row.failure = str(error)
            break
        row.samples[number] = Sample(pair, run.startup_s, run.detach_s, run.rss_mib, run.peak_mib, None)
    return row
