"""The main job's own nudges: at an alert, by monitor, once a request, without holding up the trace.

Knows: that a nudge takes seconds where the monitor is slow, and so runs in a thread of its own, which hands its
events over by collect(). Does not know what a nudge does.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from tracer.build import Build
from tracer.errors import AioTraceError
from tracer.events import Alert, Event, Failure
from tracer.nudge import Nudge
from tracer.qmp import SocketMonitor
from tracer.target import Target
from tracer.verdict import LOST_KICK, LOST_WAKEUP


class Nudger:
    """Nudges one process at its monitor's socket. `fd` becomes readable when there is something to collect."""

    def __init__(self, target: Target, build: Build, socket_path: str, say: Callable[[str], None]) -> None:
        self._target = target
        self._build = build
        self._path = socket_path
        self._say = say
        self._asked: queue.SimpleQueue[Alert | None] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._done: set[int] = set()
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="nudger", daemon=True)
        self._thread.start()

    def ask(self, alert: Alert) -> None:
        """Nudge for this alert soon, if a nudge is for it."""
        if alert.cause in (LOST_WAKEUP, LOST_KICK):
            self._asked.put(alert)

    def went_on(self, request: int) -> None:
        """The request at this address is over: what comes there next is another one."""
        self._done.discard(request)

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
            if alert.request in self._done:
                continue
            self._done.add(alert.request)
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
            self._done.update(stuck.request.address for stuck in seen.curable)
            monitor = SocketMonitor(self._target, self._path)
            try:
                return list(nudge.by_monitor(seen, monitor))
            finally:
                monitor.close()
        finally:
            nudge.close()
