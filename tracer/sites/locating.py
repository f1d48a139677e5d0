"""The search for probe sites: an ordered list of strategies, each of which proves what it finds.

Knows: the order, that every failed attempt keeps its reason, and that strategies must agree. Does not
know how any one works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from tracer.debug_files import Place
from tracer.elf import Image
from tracer.errors import SitesNotFound, UsageError
from tracer.sites import code, dwarf, symbols, usdt
from tracer.sites.model import SUBMIT, Attempt, Located
from tracer.sites.placing import placed
from tracer.sites.proof import NotProved
from tracer.sites.search import Search


class NoStrategyWorked(SitesNotFound):
    """SitesNotFound with `attempts`: every strategy that was tried, and why it failed."""

    def __init__(self, message: str, attempts: tuple[Attempt, ...]) -> None:
        super().__init__(message)
        self.attempts = attempts


Strategy = Callable[[Search], Located]

# A strategy is a function that returns what it found and proved, or raises NotProved with the reason.
STRATEGIES: dict[str, Strategy] = {
    usdt.NAME: usdt.locate,
    symbols.NAME: symbols.locate,
    code.NAME: code.locate,
    dwarf.NAME: dwarf.locate,
}


def locate(image: Image, only: str | None = None, place: Place | None = None) -> Located:
    """Sites and layout by the first strategy that succeeds, with the others as witnesses; or by `only`.

    `place` tells where the image's debug files may be, if its path does not. SitesNotFound, with every
    attempt and its reason, if no strategy succeeds; ImageError for a damaged file.
    """
    if only is not None and only not in STRATEGIES:
        raise UsageError(f"there is no strategy {only!r}", "strategies: " + ", ".join(STRATEGIES))
    search = Search(image, place)
    try:
        return _best(search, (only,) if only else tuple(STRATEGIES))
    finally:
        search.close()


def _best(search: Search, names: tuple[str, ...]) -> Located:
    best: Located | None = None
    attempts: list[Attempt] = []
    notes: list[str] = []
    for name in names:
        try:
            found = STRATEGIES[name](search)
        except NotProved as reason:
            attempts.append(Attempt(name, str(reason)))
            continue
        different = differences(best, found) if best else ()
        if different:
            told = f"{name} does not agree with {_source(best)}, which is taken: {'; '.join(different)}"
            attempts.append(Attempt(name, told))
            notes.append(told)
            continue
        attempts += found.attempts
        best = found if best is None else _completed(best, found)
    if best is None:
        raise _not_found(search.image, tuple(attempts))
    image = search.image
    return replace(
        best,
        sites={name: placed(image, site) for name, site in best.sites.items()},
        more_sites=tuple(placed(image, site) for site in best.more_sites),
        attempts=tuple(attempts),
        notes=(*best.notes, *notes),
    )


def _completed(best: Located, other: Located) -> Located:
    """With what only the other one, which agrees with it, could tell."""
    main = other.main_context if best.main_context is None else best.main_context
    barrier = other.barrier_fixed if best.barrier_fixed is None else best.barrier_fixed
    return replace(best, main_context=main, barrier_fixed=barrier)


def _source(located: Located | None) -> str:
    return located.layout.source if located else ""


def differences(one: Located, other: Located) -> tuple[str, ...]:
    """What two strategies tell differently; they may well take other instructions of the same functions."""
    functions = (
        f"{name} is at {one.functions[name]:#x} or {other.functions[name]:#x}"
        for name in ("thread_pool_completion_bh", "worker_thread")
        if one.functions[name] != other.functions[name]
    )
    copies = [len(each.sites_of(SUBMIT)) for each in (one, other)]
    counts = [f"submit is in {copies[0]} or {copies[1]} places"] if copies[0] != copies[1] else []
    mine, theirs = (asdict(each.layout) for each in (one, other))
    members = (
        f"{structure}.{member} is {offset} or {theirs[structure][member]}"
        for structure in ("element", "pool", "bottom_half")
        for member, offset in mine[structure].items()
        if None not in (offset, theirs[structure][member]) and offset != theirs[structure][member]
    )
    return (*functions, *counts, *members)


def _not_found(image: Image, attempts: tuple[Attempt, ...]) -> NoStrategyWorked:
    reasons = "; ".join(f"{attempt.strategy}: {attempt.outcome}" for attempt in attempts)
    return NoStrategyWorked(f"the probe sites were not found in {image.path} ({reasons})", attempts)
