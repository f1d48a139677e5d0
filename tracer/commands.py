"""The user's command at alerts: few at once, however many alerts there are.

Knows: the command, its environment, how many run. What comes while as many run as may is put together, by process: the
last alert stands for all of them, and AIO_TRACE_ALERTS says how many they are. Does not know what an alert is about.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress

from tracer.events import Alert

#: So many commands run at once, and so many for one process.
AT_ONCE, AT_ONCE_FOR_ONE = 8, 2


class Commands:
    """Runs one command; `fds` become readable when one of those that run has ended."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._running: dict[int, tuple[int | None, subprocess.Popen[bytes]]] = {}  # by pidfd: for which process
        self._waiting: dict[int | None, tuple[Alert, int]] = {}

    @property
    def fds(self) -> list[int]:
        """To be waited for."""
        return list(self._running)

    def run(self, alert: Alert) -> None:
        """Start the command for this alert, now or when others have ended. Raises OSError where it cannot be run."""
        _, before = self._waiting.pop(alert.pid, (alert, 0))
        self._waiting[alert.pid] = alert, before + 1
        self.go_on()

    def go_on(self, ending: bool = False) -> None:
        """Start what waits and may; with `ending` all of it, one for each process. Raises OSError."""
        for fd, (_, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[fd]
                os.close(fd)
        for pid in list(self._waiting):
            others = [owner for owner, _ in self._running.values()]
            if ending or (len(others) < AT_ONCE and others.count(pid) < AT_ONCE_FOR_ONE):
                self._start(*self._waiting.pop(pid))

    def _start(self, alert: Alert, count: int) -> None:
        process = subprocess.Popen(
            self._command, shell=True, env=os.environ | _environment(alert, count), stdin=subprocess.DEVNULL, stdout=2
        )
        self._running[os.pidfd_open(process.pid)] = alert.pid, process

    def close(self) -> None:
        """Start what still waits; nothing is waited for."""
        with suppress(OSError):
            self.go_on(ending=True)
        for fd in self._running:
            os.close(fd)
        self._running = {}


def _environment(alert: Alert, count: int) -> dict[str, str]:
    values = {
        "PID": alert.pid,
        "REQUEST": f"{alert.request:#x}",
        "CAUSE": alert.cause,
        "KIND": alert.kind,
        "FILE": alert.file,
        "STATE": alert.state,
        "EXPLANATION": alert.explanation,
        "ALERTS": count,
    }
    # No variable can hold a zero byte.
    return {f"AIO_TRACE_{name}": str(value).replace("\0", "") for name, value in values.items() if value is not None}
