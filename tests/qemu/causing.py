"""What a trace says while faults come and go, for tests of causes on any QEMU.

Knows: how to put a fault in and take it out again under a trace, and what the trace said meanwhile. Does
not know which cause a fault has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

from tests.qemu.tracing import PATIENCE_S, Json, Trace
from tracer.lab import causes
from tracer.lab.causes import Scene
from tracer.lab.process import wait_until

#: How often each fault comes and goes; 20 for the long form.
REPEAT = int(os.environ.get("AIO_TRACE_REPEAT", "2"))
DEADLINES = ("--deadline", "300ms", "--slow", "500ms")
#: A late request is judged anew after a second; seconds.
SECOND_LOOK_S = 1.3
KINDS = ("write", "read", "flush", "discard")

Fault = Callable[[Scene, str], AbstractContextManager[int]]

#: Faults that leave a finished request, and what they are called.
DONE_FAULTS: tuple[tuple[Fault, str], ...] = (
    (causes.lost_kick, "lost-kick"),
    (causes.unpolled_kick, "unpolled-kick"),
    (causes.blocked_in_storage, "loop-blocked"),
    (causes.spinning, "loop-busy"),
)
#: QEMU starts no worker for a second request while an idle one wakes: it waits behind what the storage holds.
HELD_WORKERS = (causes.missed_spawn, "worker-stuck")
#: Faults that leave a request nobody takes, and what they are called.
QUEUE_FAULTS = ((causes.sleeping_workers, "queue-stalled"), (causes.lost_spawn, "queue-stalled"), HELD_WORKERS)


class Said:
    """What a trace says from now on."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._from = len(trace.events)

    def fresh(self) -> Said:
        """What it says from now on, without what it said so far."""
        return Said(self._trace)

    def named(self, name: str) -> list[Json]:
        """All events of that name so far."""
        return [event for event in self._trace.events[self._from :] if event["event"] == name]

    def wait(self, name: str, requests: Collection[int], cause: str | None = None) -> list[Json]:
        """The events of that name (and cause) about these requests, once each has had one."""
        wanted = {hex(request) for request in requests}

        def come() -> list[Json]:
            found = [event for event in self.named(name) if event["request"] in wanted]
            found = [event for event in found if cause in (None, event.get("cause"))]
            return found if {event["request"] for event in found} == wanted else []

        return wait_until(come, PATIENCE_S, f"{name} for {len(wanted)} requests") if wanted else []

    def causes(self, state: str | None = None) -> set[str]:
        """The causes of all alerts, or of those about requests in one state."""
        return {alert["cause"] for alert in self.named("alert") if state in (None, alert["state"])}


def queued_causes(said: Said, cause: str) -> set[str]:
    """The causes told of requests that nobody took, where `cause` is to be told.

    On a slow machine one is late while the lab still holds the idle worker that is to take it; that is told, too.
    """
    queued = [alert for alert in said.named("alert") if alert["state"] == "THREAD_QUEUED"]
    late = [a for a in queued if a["cause"] == cause or "workers are idle" not in a["explanation"]]
    return {alert["cause"] for alert in late}


def repeat(
    on: Scene,
    said: Said,
    fault: Fault,
    kinds: Collection[str] = ("write",),
    times: int = REPEAT,
    cause: str | None = None,
) -> list[Json]:
    """Put the fault in and take it out again, so many times or once a kind.

    The alerts on what it yields; of them the first with `cause`, if one is named.
    """
    alerts = []
    for turn in range(max(times, len(kinds))):
        here = said.fresh()
        with fault(on, list(kinds)[turn % len(kinds)]) as request:
            alerts += here.wait("alert", [request], cause)
            if turn == 0:
                time.sleep(SECOND_LOOK_S)
        here.wait("resolved", [request])
    assert [alert["kind"] for alert in alerts[: len(kinds)]] == list(kinds)
    return alerts
