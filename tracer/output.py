"""Text to whoever reads, for as long as that takes, but not beyond the end.

Knows: that a pipe or terminal that is ready takes a page without blocking. Python would repeat a write that
a signal interrupts, so one to a reader who does not read could not be ended by anything but SIGKILL.
"""

from __future__ import annotations

import errno
import io
import os
import select
from typing import Any

#: What is written at once: PIPE_BUF, pipe(7).
AT_ONCE = 4096
#: How long a reader has once the end is asked for; seconds.
GRACE_S = 0.2


class PatientOutput(io.RawIOBase):
    """A file descriptor to write to, which stays the caller's. `ending_fd` becomes readable when all is to end."""

    def __init__(self, fd: int, ending_fd: int) -> None:
        self._fd = fd
        self._ending_fd = ending_fd

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def write(self, data: Any) -> int:
        """Write some of it. BrokenPipeError where nobody has read until the end, or will."""
        if not self._room():
            raise BrokenPipeError(errno.EPIPE, "nobody reads")
        return os.write(self._fd, memoryview(data)[:AT_ONCE])

    def _room(self) -> bool:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        poller.register(self._ending_fd, select.POLLIN)
        ready = dict(poller.poll())
        if self._fd in ready:
            return True
        poller.unregister(self._ending_fd)
        return bool(poller.poll(GRACE_S * 1000))


def text(fd: int, ending_fd: int) -> io.TextIOWrapper:
    """The descriptor for text; what UTF-8 cannot say is written with backslashes."""
    buffered = io.BufferedWriter(PatientOutput(fd, ending_fd))
    return io.TextIOWrapper(buffered, encoding="utf-8", errors="backslashreplace")
