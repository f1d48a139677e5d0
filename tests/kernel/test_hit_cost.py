"""What a hit costs is measured by real probes on code of our own, and nothing of them stays."""

from __future__ import annotations

import os
import threading

import pytest

from tests.kernel.attaching import open_kernel_objects
from tracer import hit_cost, kernel
from tracer.hit_cost import ASSUMED_NS, measure
from tracer.spending import ASSUMED, HitPrice


@pytest.mark.parametrize("multi", [True, False], ids=["as the kernel can", "perf events"])
def test_stepping_over_an_instruction_is_dearer(monkeypatch: pytest.MonkeyPatch, multi: bool) -> None:
    if not multi:
        monkeypatch.setattr(kernel, "has_multi", lambda: False)
    held, files = open_kernel_objects(), len(os.listdir("/proc/self/fd"))
    cheap, dear = measure(), measure(cheap=False)
    assert cheap is not None
    assert dear is not None
    assert 0 < cheap < dear
    assert (open_kernel_objects(), len(os.listdir("/proc/self/fd"))) == (held, files)


def test_code_without_a_probe_costs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is the probe's: beside it, the loop's own few nanoseconds do not show."""
    monkeypatch.setattr(hit_cost, "_probed", lambda _path, _site, loop: hit_cost._best(loop))
    without, probed = measure(), ASSUMED_NS
    assert without is not None
    assert without < probed / 10


def test_where_it_cannot_be_measured_it_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def refused(*_: object, **__: object) -> int:
        assert answered.wait(10)
        raise PermissionError("no")

    monkeypatch.setattr(kernel, "load", refused)
    price = HitPrice()
    assert price.get() is None, "who asks does not wait"
    answered.set()
    assert measure() is None
    assert price._thread is not None
    price._thread.join()
    assert price.get() == ASSUMED
