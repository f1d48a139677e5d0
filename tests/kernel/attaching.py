"""Probes on the pool in miniature, in every way in which they are compiled and attached; and what they count."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from tests.kernel.miniature import ELEMENT, Miniature
from tracer import probes
from tracer.figures import combined
from tracer.layout import ElementLayout
from tracer.maps import COUNTERS, Statistics
from tracer.probes import Parameters, Probes
from tracer.sites.model import SITE_NAMES, Site

ALERT_ONLY = ("done", "callback")


@dataclass(frozen=True)
class Variant:
    """One of the ways: for kernels with compare and exchange, for many processes, with uprobe_multi links.

    Kernels without the first want the memory of hashes beforehand, too.
    """

    atomics: bool = True
    shared: bool = False
    multi: bool = True


VARIANTS = {
    "atomics": Variant(),
    "no atomics": Variant(atomics=False),
    "shared": Variant(shared=True),
}
ATTACHED_OTHERWISE = {
    "perf events": Variant(multi=False),
    "shared perf events": Variant(shared=True, multi=False),
    "shared, no atomics": Variant(atomics=False, shared=True),
}
PARAMETERS = Parameters()


def use(variant: Variant, patch: pytest.MonkeyPatch) -> None:
    """What is attached from now on is attached in this way."""
    flags = probes.compile_flags

    def with_atomics(sites: Sequence[Site], element: ElementLayout, what: Parameters, _atomics: bool) -> list[str]:
        return flags(sites, element, what, variant.atomics)

    patch.setattr(probes, "compile_flags", with_atomics)
    if not variant.atomics:
        patch.setattr(probes, "_may_allocate", lambda: False)
    if not variant.multi:
        patch.setattr(probes, "_has_multi", lambda: False)
    patch.setattr(sys.modules[__name__], "PARAMETERS", Parameters(shared=variant.shared))


def in_every_way(test: Callable[..., None]) -> Callable[..., None]:
    """For a test of what also depends on how the programs are attached."""
    every = VARIANTS | ATTACHED_OTHERWISE
    return pytest.mark.parametrize("variant", every.values(), ids=every.keys(), indirect=True)(test)


def small(set_bits: int = 1, max_requests: int = 4) -> Parameters:
    """Room for few: two sets, and four requests besides."""
    return replace(PARAMETERS, set_bits=set_bits, max_requests=max_requests)


def load(pool: Miniature, names: tuple[str, ...] = SITE_NAMES, what: Parameters | None = None) -> Probes:
    """Probes for the pool's sites of those names, not attached yet."""
    return Probes(pool.pid, pool.file, [pool.sites[name] for name in names], ELEMENT, what or PARAMETERS)


@contextmanager
def attached(pool: Miniature, names: tuple[str, ...] = SITE_NAMES, what: Parameters | None = None) -> Iterator[Probes]:
    """The same, attached."""
    loaded = load(pool, names, what)
    try:
        loaded.attach()
        yield loaded
    finally:
        loaded.close()


def total(loaded: Probes) -> Statistics:
    """All that was counted, over all kinds and files."""
    return combined(loaded.statistics().values())


def counts(loaded: Probes) -> dict[str, int]:
    """All counters that are not zero."""
    seen = total(loaded)
    return {name: value for name in COUNTERS if (value := getattr(seen, name))}


def open_kernel_objects(pid: int | str = "self") -> int:
    """How many BPF and perf descriptors a process has."""
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return sum(1 for link in links if re.search(r"bpf|perf_event", link))
