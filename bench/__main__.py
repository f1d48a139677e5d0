"""`make bench`: measures everything, prints the tables, saves them and all slices.

Knows: which tracers meet which loads, how long it all takes, the environment variables:

    BENCH_ROUNDS=7       rounds of the quick rows (fewer on the lesser loads and for slow rows)
    BENCH_SLICE_S=1      seconds of one slice
    BENCH_ONLY=a,b       only these sections or these rows (untraced slices are always there); a word that does
                         not exist shows which do
    BENCH_OUT=FOLDER     where results.json and results.md go; bench/results by default
    BENCH_QUICK=1        three minutes: fewer rounds and sections; shows that it works, proves nothing
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench import experiments, host, loads, table, tracers
from bench.measure import Place, Plan, run_table
from tracer.errors import AioTraceError

BEGAN = time.monotonic()
HERE = Path(__file__).resolve().parent
ONE_CPU = ("one-cpu-1", "one-cpu-32", "one-cpu-64")
SECTIONS = ("bench-32", "bench-1", "bench-64", *ONE_CPU, "nbd", "guest", "starts", "cpu", "alerts", "many")
QUICK_SECTIONS = ("bench-32", "one-cpu-32", "starts", "cpu", "alerts")
#: Rows on every load; the rest is measured where it hurts most.
COMMON_ROWS = ("floor-perf", "floor-multi", "full", "alert", "none", "bpftrace-requests")
GUEST_ROWS = ("floor-perf", "floor-multi", "full", "alert", "none")
START_ROWS = ("full", "full-cold", "alert", "none", "bpftrace-requests", "bpftrace-sites", "floor-perf", "floor-multi")
CPU_ROWS = ("full", "alert", "none", "bpftrace-requests")
TRACE_LOG = "trace-log"


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    plan: Plan
    lesser: Plan
    least: Plan
    sections: Collection[str]
    rows: Collection[str] | None  # None: all
    out: Path
    alerts: int
    windows: int

    def chosen(self, keys: Sequence[str]) -> list[str]:
        """Those of the rows that are asked for."""
        return [key for key in keys if self.rows is None or key in self.rows]


def settings_from(environment: Mapping[str, str], rows: Collection[str]) -> Settings:
    """Read BENCH_*; ValueError with one sentence where a value makes no sense. `rows` are those there are."""
    quick = environment.get("BENCH_QUICK", "0") not in ("", "0")
    rounds = int(environment.get("BENCH_ROUNDS") or (2 if quick else 7))
    slice_s = float(environment.get("BENCH_SLICE_S") or (0.5 if quick else 1.0))
    if rounds < 1 or not 0.05 <= slice_s <= 600:
        raise ValueError("BENCH_ROUNDS is at least 1, BENCH_SLICE_S between 0.05 and 600")
    only = environment.get("BENCH_ONLY", "").replace(",", " ").split()
    if unknown := [word for word in only if word not in (*SECTIONS, *rows)]:
        known = " ".join((*SECTIONS, *rows))
        raise ValueError(f"BENCH_ONLY: there is no {' '.join(unknown)}; there are {known}")
    sections = [word for word in only if word in SECTIONS]
    return Settings(
        plan=Plan(slice_s, rounds, min(rounds, 1 if quick else 3)),
        lesser=Plan(slice_s, math.ceil(rounds * 0.7), 1),
        least=Plan(slice_s, math.ceil(rounds * 0.4), 1),
        sections=sections or (QUICK_SECTIONS if quick else SECTIONS),
        rows=[word for word in only if word in rows] or None,
        out=Path(environment.get("BENCH_OUT") or HERE / "results"),
        alerts=10 if quick else 100,
        windows=1 if quick else 5,
    )


def all_tracers(programs: Path) -> dict[str, tracers.Tracer]:
    """Every tracer that there is, by key."""
    found: list[tracers.Tracer] = [
        tracers.Floor("perf"),
        tracers.Floor("multi"),
        *(tracers.AioTrace(mode, programs) for mode in ("full", "alert", "none")),
        tracers.AioTrace("full", None),
        tracers.Bpftrace("requests", "bpftrace script"),
        tracers.Bpftrace("sites", "bpftrace, by address"),
        tracers.Funclatency(),
        tracers.Trace(),
        tracers.PerfRecord(),
        tracers.Strace(),
        tracers.Gdb(),
    ]
    return {tracer.key: tracer for tracer in found}


def say(text: str) -> None:
    """Progress, to people, with the seconds since the start."""
    print(f"{time.monotonic() - BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)


class Bench:
    """One run; results fill up as it goes on, so that what was measured before an error is not lost."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.programs = folder / "programs"
        self.tracers = all_tracers(self.programs)
        self.results = table.Results(host.header())

    def run(self) -> None:
        """All sections that are asked for; one that fails does not spoil the others."""
        sections: dict[str, Callable[[], None]] = {
            "bench-32": self._worst_case,
            "bench-1": lambda: self._image_bench("bench-1", 1, self.settings.least),
            "bench-64": lambda: self._image_bench("bench-64", 64, self.settings.least),
            "one-cpu-1": lambda: self._image_bench("one-cpu-1", 1, self.settings.lesser),
            "one-cpu-32": lambda: self._image_bench("one-cpu-32", 32, self.settings.lesser),
            "one-cpu-64": lambda: self._image_bench("one-cpu-64", 64, self.settings.lesser),
            "nbd": lambda: self._load("nbd", loads.daemon(self.folder), COMMON_ROWS, self.settings.lesser),
            "guest": lambda: self._load("guest", loads.linux_guest(self.folder), GUEST_ROWS, self.settings.lesser),
            "starts": self._starts,
            "cpu": self._cpu,
            "alerts": self._alerts,
            "many": self._many,
        }
        for name in SECTIONS:
            if name not in self.settings.sections:
                continue
            say(f"{name}:")
            try:
                sections[name]()
            except (AioTraceError, tracers.TracerFailed, OSError) as error:
                self.results.failures.append(f"{name}: {error}")
                say(f"  {name} could not run: {error}")

    def _pick(self, keys: Sequence[str]) -> list[tracers.Tracer]:
        return [self.tracers[key] for key in self.settings.chosen(keys)]

    def _worst_case(self) -> None:
        keys = [key for key in self.tracers if key != "full-cold"]
        with contextlib.ExitStack() as stack:
            special = {}
            if self.settings.chosen([TRACE_LOG]):
                traced = stack.enter_context(loads.image_bench(self.folder, 32, self.folder / "trace.log"))
                special[TRACE_LOG] = ("QEMU's own -trace", traced)
            load = stack.enter_context(loads.image_bench(self.folder, 32))
            place = Place(load, tracers.target_of(load.pid, load.exe))
            found = run_table(place, self._pick(keys), self.settings.plan, self.folder, say, special)
            self.results.tables["bench-32"] = found

    def _image_bench(self, name: str, depth: int, plan: Plan) -> None:
        load = loads.image_bench(self.folder, depth, one_cpu=name in ONE_CPU)
        self._load(name, load, COMMON_ROWS, plan)

    def _load(self, name: str, started: loads.Load, keys: Sequence[str], plan: Plan) -> None:
        with started as load:
            place = Place(load, tracers.target_of(load.pid, load.exe))
            self.results.tables[name] = run_table(place, self._pick(keys), plan, self.folder, say)

    def _starts(self) -> None:
        self.results.starts = experiments.starts(self._pick(START_ROWS), self.settings.plan.rounds, self.folder, say)

    def _cpu(self) -> None:
        with loads.image_bench(self.folder, 64) as load:
            self.results.cpu_load = load.name
            chosen = self._pick(CPU_ROWS)
            self.results.cpu = experiments.tracer_cpu(load, chosen, self.settings.windows, self.folder, say)

    def _alerts(self) -> None:
        self.results.alerts = experiments.alerts(self.settings.alerts, self.programs, self.folder, say)

    def _many(self) -> None:
        self.results.many = experiments.many(self.settings.lesser, self.programs, self.folder, say)


def as_json(value: object) -> Any:
    """What json.dumps() may have: no infinite numbers, no tuples for keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save(results: table.Results, out: Path) -> None:
    """results.md, and results.json with every slice."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.md").write_text(table.render(results), encoding="utf-8")
    judged = [as_json(found) | {"verdict": found.verdict} for found in table.judge(results)]
    text = json.dumps(as_json(results) | {"aims": judged}, indent=1)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")


def _interrupt(_number: int, _frame: object) -> NoReturn:
    # Cleaning up must not be interrupted in its turn.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Run, print, save; after Ctrl-C print what there is."""
    if os.geteuid():
        sys.exit("this needs root: sudo make bench")
    # A shell's background job would have it ignored, and so would all tracers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        settings = settings_from(os.environ, [*all_tracers(Path()), TRACE_LOG])
    except ValueError as error:
        sys.exit(str(error))
    status = 0
    with loads.bench_folder() as folder:
        bench = Bench(settings, folder)
        try:
            bench.run()
        except KeyboardInterrupt:
            say("interrupted")
            status = 130
        finally:
            print(table.render(bench.results))
            save(bench.results, settings.out)
            say(f"saved in {settings.out}")
    sys.exit(status)


if __name__ == "__main__":
    main()
