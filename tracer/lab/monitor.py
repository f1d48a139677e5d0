"""The lab's connection to QEMU's monitor: one socket, one command at a time.

Knows: QMP's lines. qemu.qmp's event loop cannot stand in for it: an exception that a signal handler raises
in one of the loop's callbacks is swallowed there, or leaves a task that nobody wakes again, for which
disconnect() then waits for ever. Here it leaves a socket, and that is closed.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracer.errors import LabError


def qmp_line(command: str, arguments: Mapping[str, object], number: int | None = None) -> bytes:
    """A command as QMP wants it; its answer bears the same `number`."""
    message = {"execute": command, "arguments": dict(arguments)} | ({} if number is None else {"id": number})
    return json.dumps(message).encode() + b"\n"


class LabMonitor:
    """QMP on a UNIX socket; each answer is waited for at most `timeout` seconds. OSError where nobody listens."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._timeout = timeout
        self._received = b""
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            self._message(time.monotonic() + timeout)  # the greeting
            self.execute("qmp_capabilities", {})
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: Mapping[str, object]) -> Any:
        """What the command returns; LabError if QEMU refuses it, TimeoutError or another OSError if it is silent."""
        self._number += 1
        end = time.monotonic() + self._timeout
        self._socket.settimeout(self._timeout)
        self._socket.sendall(qmp_line(command, arguments, self._number))
        # What lies before it are events, and answers that nobody waited for to the end.
        while (answer := self._message(end)).get("id") != self._number:
            pass
        if "error" in answer:
            raise LabError(f"{command} failed: {answer['error']['desc']}")
        return answer["return"]

    def _message(self, end: float) -> dict[str, Any]:
        """The next line, if it comes before `end` of the monotonic clock."""
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            part = self._socket.recv(65536)
            if not part:
                raise ConnectionResetError("the monitor is gone")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Hang up; waits for nothing."""
        self._socket.close()
