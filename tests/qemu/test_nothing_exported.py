"""The main job on a QEMU that exports no function: strings and shapes lead to its sites."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import require
from tests.qemu.tracing import traced
from tracer.elf import Image
from tracer.lab import faults
from tracer.lab.qemu import Qemu, paused

MICROVM = "qemu-system-x86_64-microvm"  # in the same package as qemu-system-x86_64


@pytest.fixture
def microvm() -> Iterator[Qemu]:
    path = shutil.which(MICROVM)
    require(path, f"{MICROVM} is not installed")
    with Image.open(str(path)) as image:
        assert image.exported("qemu_bh_schedule") is None
    with paused(exe=MICROVM) as machine:
        machine.request("d0", "write")
        yield machine


def test_counts_are_those_of_qemus_own_trace(microvm: Qemu) -> None:
    with traced(microvm.pid) as trace:
        before = microvm.trace_counts()
        for index in range(23):
            microvm.request("d0", "write", index * 65536)
        assert trace.finish() == 0
        witness = microvm.trace_counts()
    requests = trace.summary["requests"]
    assert witness.submitted - before.submitted == 23
    assert (requests["submitted"], requests["done"], requests["completed"]) == (23, 23, 23)
    assert (requests["in_flight"], trace.summary["lost_records"]) == (0, 0)


def test_a_lost_completion_is_named(microvm: Qemu) -> None:
    """The cause needs the home thread, and so the main context, which no name tells either."""
    pool = faults.pool_of(microvm, "d0")
    with traced(microvm.pid, "--deadline", "200ms") as trace:
        lost = faults.lose(microvm, "d0", "write", pool)
        alert = trace.expect("alert")
        assert (alert["cause"], int(alert["request"], 16)) == ("lost-wakeup", lost.request)
        assert alert["evidence"]["barrier_fixed"] is True  # by the shape of aio_bh_poll()
        lost.free()
        assert trace.expect("resolved")["request"] == alert["request"]
        assert trace.finish() == 3
