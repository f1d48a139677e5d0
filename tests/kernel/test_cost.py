"""What a request costs in map operations: the numbers of bpf/aio_trace.c's header comment and docs/cost.md, exactly.

Time is measured elsewhere (make bench) and is another one on each machine; these numbers are the same on all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.attaching import ALERT_ONLY, Variant, counts
from tests.kernel.miniature import ELEMENT, Miniature
from tracer.probes import Parameters, Probes, Programs
from tracer.sites.model import SITE_NAMES

REQUESTS = 1000
# Operations on hashes and on arrays.
Cost = tuple[float, float]
FULL: dict[Variant, Cost] = {Variant(): (1, 4), Variant(shared=True): (2, 3), Variant(atomics=False): (6, 3)}
ALERT: dict[Variant, Cost] = {Variant(): (1, 3), Variant(shared=True): (2, 2), Variant(atomics=False): (5, 2)}
UNWATCHED: dict[tuple[str, ...], Cost] = {SITE_NAMES: (3, 2), ALERT_ONLY: (2, 2)}
MODES = pytest.mark.parametrize("names", [SITE_NAMES, ALERT_ONLY], ids=["full", "alert"])


@contextmanager
def counting(pool: Miniature, names: tuple[str, ...], shared: bool) -> Iterator[tuple[Programs, Probes]]:
    """Attached programs that count what they do."""
    what = Parameters(shared=shared, extra_flags=("-DCOUNT_OPERATIONS=1",))
    sites = [pool.sites[name] for name in names]
    programs = Programs(pool.file, sites, ELEMENT, what)
    probes = Probes(pool.pid, pool.file, sites, ELEMENT, what, loaded=programs)
    try:
        probes.attach()
        yield programs, probes
    finally:
        probes.close()
        programs.close()


def cost(pool: Miniature, programs: Programs) -> Cost:
    """Of one request, once there are counts of its kind and file."""
    pool.do("s0 d0 c0")
    before = programs.operations()
    pool.do("s0 d0 c0 " * REQUESTS)
    hashes, arrays = (b - a for a, b in zip(before, programs.operations()))
    return hashes / REQUESTS, arrays / REQUESTS


@MODES
def test_map_operations_of_a_request(pool: Miniature, variant: Variant, names: tuple[str, ...]) -> None:
    with counting(pool, names, variant.shared) as (programs, probes):
        found = cost(pool, programs)
        assert counts(probes)["completed"] == REQUESTS + 1
    assert found == (FULL if names == SITE_NAMES else ALERT)[variant]


@MODES
def test_map_operations_of_a_process_that_is_not_watched(
    program: Path, pool: Miniature, names: tuple[str, ...]
) -> None:
    """Where the probes are shared, it has them all the same."""
    with Miniature(program) as other, counting(pool, names, shared=True) as (programs, _probes):
        assert cost(other, programs) == UNWATCHED[names]
