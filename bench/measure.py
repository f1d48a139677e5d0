"""The rounds: tracers come and go around one running load, each between two untraced slices.

Knows: the order of slices, what a row is made of. Does not know which tracers and loads there are, nor how
figures are shown.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.figures import Estimate, Pair, Slice, estimate, neighbours, ratio
from bench.loads import Load
from bench.tracers import Target, Tracer, TracerFailed, attached, changed_sites
from tracer.errors import LabError

UNTRACED = "untraced"
SETTLE_S = 0.2
#: A tracer that says that it saw less of the requests than this has lost some.
SEES_ALL = 0.95

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One slice with a tracer: with its neighbours, and what the tracer itself took."""

    pair: Pair
    startup_s: float
    detach_s: float
    rss_mib: float
    peak_mib: float
    seen_share: float | None
    #: Sites at which the target's code was changed during the slice, and after the tracer's end.
    probed_sites: int | None = None
    left_sites: int = 0


@dataclass
class Row:
    """One tracer on one load: its samples by round, or why there are none."""

    key: str
    label: str
    note: str = ""
    samples: dict[int, Sample] = field(default_factory=dict)
    failure: str | None = None

    def of(self, value: Callable[[Sample], float | None]) -> Estimate | None:
        """The estimate of one figure, None where it was not measured."""
        values = [found for sample in self.samples.values() if (found := value(sample)) is not None]
        return estimate(values) if values else None

    @property
    def added_us(self) -> Estimate | None:
        """Microseconds added to each request."""
        return self.of(lambda sample: sample.pair.added_us)

    @property
    def iops_ratio(self) -> Estimate | None:
        """Requests a second against untraced."""
        return self.of(lambda sample: sample.pair.iops_ratio)

    def remarks(self) -> list[str]:
        """What the table should say beside the figures."""
        found = [self.note] if self.note else []
        shares = [sample.seen_share for sample in self.samples.values() if sample.seen_share is not None]
        if shares and median(shares) < SEES_ALL:
            found.append(f"saw {100 * median(shares):.0f} % of the requests")
        if left := sum(sample.left_sites > 0 for sample in self.samples.values()):
            found.append(f"left the target's code changed in {left} of {len(self.samples)} rounds")
        if self.failure:
            found.append(f"{'stopped' if self.samples else 'could not run'}: {self.failure}")
        return found


@dataclass
class Table:
    """All rows on one load, measured in the same rounds."""

    load: str
    rows: dict[str, Row]
    untraced: list[Slice] = field(default_factory=list)

    def added_ratio(self, above: str, below: str) -> Estimate | None:
        """Microseconds added by one tracer against those by another, in the rounds that have both."""
        rounds = [number for number in self.samples_of(above) if number in self.samples_of(below)]
        if not rounds:
            return None
        values = [[self.samples_of(key)[number].pair.added_us for number in rounds] for key in (above, below)]
        return ratio(*values)

    def samples_of(self, key: str) -> Mapping[int, Sample]:
        """The samples of a row, none where it is not there."""
        return self.rows[key].samples if key in self.rows else {}


@dataclass(frozen=True)
class Plan:
    """How long and how often: seconds a slice, rounds of the quick rows and of the slow ones."""

    slice_s: float
    rounds: int
    slow_rounds: int


@dataclass(frozen=True)
class Place:
    """A load, perhaps a special one for some tracer."""

    load: Load
    target: Target


def run_table(
    place: Place,
    tracers: Sequence[Tracer],
    plan: Plan,
    folder: Path,
    say: Say,
    replacements: Mapping[str, tuple[str, Load]] | None = None,
) -> Table:
    """Measure all tracers on one load. `replacements` are rows that need a load of their own: label and load
    by key; these are held while others are measured.
    """
    own = dict(replacements or {})
    rows = {tracer.key: Row(tracer.key, tracer.label, tracer.note) for tracer in tracers}
    rows |= {key: Row(key, label) for key, (label, _) in own.items()}
    table = Table(place.load.name, rows)
    by_key = {tracer.key: tracer for tracer in tracers}
    for _, load in own.values():
        load.hold()
    _rehearse(place, tracers, rows, folder, say)
    generator = random.Random(len(tracers))
    for number in range(plan.rounds):
        order = list(_due(by_key, own, rows, number, plan))
        generator.shuffle(order)
        say(f"  {place.load.name}: round {number + 1} of {plan.rounds}, {len(order)} rows")
        _round(number, order, place, by_key, own, table, plan, folder)
    return table


def _due(
    tracers: Mapping[str, Tracer], own: Mapping[str, object], rows: Mapping[str, Row], number: int, plan: Plan
) -> Iterator[str]:
    for key in (*tracers, *own):
        slow = key in tracers and tracers[key].slow
        if rows[key].failure is None and (not slow or number < plan.slow_rounds):
            yield key


def _rehearse(place: Place, tracers: Sequence[Tracer], rows: Mapping[str, Row], folder: Path, say: Say) -> None:
    """Attach each once without measuring: caches are warm after that, and who cannot run is known."""
    for tracer in tracers:
        try:
            with attached(tracer, place.target, folder) as run:
                time.sleep(SETTLE_S)
                run.detach()
        except TracerFailed as error:
            rows[tracer.key].failure = str(error)
            say(f"  {tracer.label}: could not run: {error}")


def _round(
    number: int,
    order: Sequence[str],
    place: Place,
    tracers: Mapping[str, Tracer],
    own: Mapping[str, tuple[str, Load]],
    table: Table,
    plan: Plan,
    folder: Path,
) -> None:
    """untraced, one, untraced, another, …, untraced."""
    slices: list[tuple[str, Slice]] = [(UNTRACED, _untraced(place, plan))]
    makings: dict[str, Callable[[Pair], Sample]] = {}
    for key in order:
        try:
            if key in own:
                found, makings[key] = _alone(own[key][1], place.load, plan), _without_tracer
            else:
                found, makings[key] = _traced(place, tracers[key], plan, folder)
            slices.append((key, found))
        except TracerFailed as error:
            table.rows[key].failure = str(error)
        slices.append((UNTRACED, _untraced(place, plan)))
    table.untraced += [slice_ for key, slice_ in slices if key == UNTRACED]
    for key, pair in neighbours(slices, UNTRACED).items():
        table.rows[key].samples[number] = makings[key](pair)


def _without_tracer(pair: Pair) -> Sample:
    return Sample(pair, 0.0, 0.0, 0.0, 0.0, None)


def _untraced(place: Place, plan: Plan) -> Slice:
    if not place.load.alive():
        raise LabError(f"the load {place.load.name} ended")
    time.sleep(SETTLE_S)
    return place.load.measure(plan.slice_s)


def _traced(place: Place, tracer: Tracer, plan: Plan, folder: Path) -> tuple[Slice, Callable[[Pair], Sample]]:
    """The slice, and how to make the sample of it once its neighbours are known."""
    with attached(tracer, place.target, folder) as run:
        before = place.load.requests()
        time.sleep(SETTLE_S)
        found = place.load.measure(plan.slice_s, run.pids)
        run.look()
        probed = changed_sites(place.target)
        during = place.load.requests() - before
        run.detach()
        left = changed_sites(place.target)
        seen = tracer.seen(run)
    share = None if seen is None else seen / max(1, during)

    def sample(pair: Pair) -> Sample:
        return Sample(pair, run.startup_s, run.detach_s, run.rss_mib, run.peak_mib, share, probed, left)

    return found, sample


def _alone(special: Load, usual: Load, plan: Plan) -> Slice:
    """A slice of another load, while the usual one is held."""
    usual.hold()
    try:
        special.release()
        try:
            time.sleep(SETTLE_S)
            return special.measure(plan.slice_s)
        finally:
            special.hold()
    finally:
        usual.release()
