"""The main job's own nudges: at an alert, by monitor, once a request, without holding up the trace.

Knows: that a nudge takes seconds where the monitor is slow, and so runs in a thread of its own, which hands its
events over by collect(). Does not know what a nudge does.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from tracer.build import Build
from tracer.errors import AioTraceError
from tracer.events import Alert, Event, Failure
from tracer.nudge import Nudge
from tracer.qmp import SocketMonitor
from tracer.target import Target
from tracer.verdict import LOST_KICK, LOST_WAKEUP

MOST_REMEMBERED = 4096


class NudgedRequests:
    """When what was at an address was nudged last: QEMU gives a request's memory to a later one. Seconds."""

    def __init__(self) -> None:
        self._when: dict[int, float] = {}

    def add(self, requests: Iterable[int], when: float) -> None:
        """These are nudged now."""
        for request in requests:
            self._when.pop(request, None)
            self._when[request] = when
        for request in list(self._when)[: max(0, len(self._when) - MOST_REMEMBERED)]:
            del self._when[request]

    def covers(self, request: int, since: float) -> bool:
        """Whether the request there, which is in its state since then, was nudged already."""
        return since < self._when.get(request, since)


class Nudger:
    """Nudges one process at its monitor's socket. `fd` becomes readable when there is something to collect."""

    def __init__(self, target: Target, build: Build, socket_path: str, say: Callable[[str], None]) -> None:
        self._target = target
        self._build = build
        self._path = socket_path
        self._say = say
        self._asked: queue.SimpleQueue[Alert | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._nudged = NudgedRequests()
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="nudger", daemon=True)
        self._thread.start()

    def ask(self, alert: Alert) -> None:
        """Nudge for this alert soon, if a nudge is for it."""
        if alert.cause in (LOST_WAKEUP, LOST_KICK):
            self._asked.put(alert)

    def collect(self) -> list[Event]:
        """What came of it since the last time."""
        with suppress(OSError):  # empty, or closed by now
            os.read(self.fd, 4096)
        events = []
        with suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def close(self, timeout_s: float = 0.5) -> None:
        """End after the nudge that is under way; one that hangs is left behind."""
        self._asked.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self.fd)
            os.close(self._write_fd)

    def _run(self) -> None:
        while (alert := self._asked.get()) is not None:
            if self._nudged.covers(alert.request, alert.time - alert.age_s):
                continue
            self._nudged.add([alert.request], time.time())
            try:
                events: list[Event] = list(self._nudge())
            except AioTraceError as error:
                events = [Failure(time.time(), self._target.pid, f"not nudged: {error.message}", error.hint)]
            for event in events:
                self._events.put(event)
            os.write(self._write_fd, b"x")

    def _nudge(self) -> list[Event]:
        nudge = Nudge(self._target, self._build, self._say)
        try:
            seen = nudge.diagnose()
            self._nudged.add([stuck.request.address for stuck in seen.curable], time.time())
            monitor = SocketMonitor(self._target, self._path)
            try:
                return list(nudge.by_monitor(seen, monitor))
            finally:
                monitor.close()
        finally:
            nudge.close()
