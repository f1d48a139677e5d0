"""The main job on a QEMU that exports no function: strings and shapes lead to its sites."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.conftest import require
from tests.qemu.test_inspect import inspect, requests_of
from tests.qemu.tracing import traced
from tracer.elf import Image
from tracer.lab import faults
from tracer.lab.qemu import Qemu, paused
from tracer.live import LiveView
from tracer.target import open_target
from tracer.verdict import nested_poll

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


def test_a_drain_without_a_name_is_a_poll_in_the_loops_own_dispatch(microvm: Qemu) -> None:
    """The monitor is dead then, though nothing tells by which function."""
    faults.lose(microvm, "d0", "flush")
    before = requests_of(inspect(microvm.pid)[0])[0]["evidence"]
    assert (before["draining"], before["nested_poll"]) == (None, False)
    microvm.qmp("cont")
    with faults._raw_monitor(microvm) as monitor:
        monitor.sendall(b'{"execute": "stop"}\n')
        microvm.wait_until(lambda: polls_inside(microvm.pid), what="the monitor to hang")
        found, status = inspect(microvm.pid)
    assert (found["verdict"], found["draining"], status) == ("lost-wakeup", None, 3)
    assert requests_of(found)[0]["evidence"]["nested_poll"] is True
    assert "the monitor answers no more" in found["explanation"]


def polls_inside(pid: int) -> bool:
    with closing(LiveView(open_target(pid))) as view:
        return nested_poll(view.stack(pid).functions())
