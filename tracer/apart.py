"""Work on a target in a process of its own, which can be given up at any moment.

Knows: fork, a pipe, what a child inherits and must not keep. Does not know what is done there. Whatever a target makes
of its files and memory, it holds up only the child: the parent never waits, for its end neither, since what the kernel
reads on its behalf may never come.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import select
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from tracer.errors import AioTraceError, HostError

_PR_SET_PDEATHSIG = 1
_PIECE = 1 << 16
#: What a child may tell, and what memory of its own it may have; bytes.
MAX_TOLD, MAX_MEMORY = 64 << 20, 2 << 30
#: What a child tells first, and how long that is waited for at most; seconds.
APART, APART_S = b"\0", 2.0
#: How much less than others a child gets of a processor once it is slow.
NICE = 10

_prctl = ctypes.CDLL(None).prctl
#: Those that were given up and have not ended yet.
_left: set[int] = set()


class Errand:
    """Something that is done in a child process; `fd` becomes readable when there is more of the outcome."""

    def __init__(self, work: Callable[[], Any], keep: Iterable[int] = ()) -> None:
        """Begin. What `work` gives must be a value that pickle takes; `keep` are the descriptors that it needs.

        Raises OSError where there can be no more processes or files.
        """
        _reap()
        self.fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._told = bytearray()
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except BaseException:
            os.close(self.fd)
            os.close(write_fd)
            raise
        if self._pid == 0:
            _be_child(work, write_fd, {*keep}, parent)
        os.close(write_fd)
        self._wait_until_apart()

    def _wait_until_apart(self) -> None:
        """Until the child has given back what it inherited, probes above all: else they would outlive us for a moment.

        It has not looked at the target by then, so nothing but the host's load holds it up.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        try:
            if poll.poll(APART_S * 1e3):
                os.read(self.fd, len(APART))
        except BaseException:
            self.abandon()
            raise

    def ready(self) -> bool:
        """Take what has come; whether that is all. Never waits."""
        try:
            while part := os.read(self.fd, _PIECE):
                self._told += part
                if len(self._told) > MAX_TOLD:
                    self._told.clear()
                    return True
        except BlockingIOError:
            return False
        return True

    def outcome(self) -> Any:
        """What the work gave, when it is ready(); raises what it raised, HostError if it ended otherwise."""
        told = bytes(self._told).removeprefix(APART)  # one that came too late to be waited for
        self.abandon()
        try:
            done, value = pickle.loads(told)
        except Exception as error:  # it was killed while it told, or before
            raise HostError(
                "what was done apart ended before it was finished; it may have had too little memory"
            ) from (error)
        if done:
            return value
        raise value

    def be_nice(self) -> None:
        """From now on others come first."""
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._pid, NICE)

    def abandon(self) -> None:
        """End it, wherever it is; a second time is no error."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            _left.add(self._pid)
            _reap()


def _reap() -> None:
    for pid in list(_left):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        _left.discard(pid)


def _be_child(work: Callable[[], Any], write_fd: int, keep: set[int], parent: int) -> NoReturn:
    """Never returns into what the parent was doing."""
    status = 1
    try:
        _become_apart(write_fd, keep, parent)
        _tell(write_fd, APART)
        try:
            told = (True, work())
        except AioTraceError as error:
            told = (False, error)
        except MemoryError:
            told = (False, HostError("it takes more memory than any QEMU should need"))
        except Exception as error:  # whatever a target has come up with; it is that one's affair
            told = (False, HostError(f"it cannot be looked at: {type(error).__name__}: {error}"))
        _tell(write_fd, pickle.dumps(told))
        status = 0
    finally:
        os._exit(status)


def _become_apart(write_fd: int, keep: set[int], parent: int) -> None:
    """Nothing of the parent's is kept that outlives it or that others wait for."""
    signal.set_wakeup_fd(-1)
    # The interruption of a terminal is for the parent, which ends us; before that our end is not its.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != write_fd and fd not in keep:
            with suppress(OSError):
                os.close(fd)
    os.set_blocking(write_fd, True)
    # What is there already is shared with the parent while nobody writes to it.
    gc.freeze()
    for limit, most in ((resource.RLIMIT_DATA, MAX_MEMORY), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))
    with suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
        file.write(b"1000")


def _tell(fd: int, told: bytes) -> None:
    view = memoryview(told)
    while view:
        view = view[os.write(fd, view) :]
