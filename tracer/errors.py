"""The one error tree.

Knows: every situation in which aio-trace cannot go on, as a class with one clear sentence, a hint
that can be pasted, and the exit status of the command. Knows nothing of where they are printed.
"""

from __future__ import annotations

import errno
from typing import Any

from tracer.text import printable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ALERT = 3

OUT_OF_FILES = frozenset((errno.EMFILE, errno.ENFILE))


class AioTraceError(Exception):
    """Base of all expected failures: `message` (one sentence, one line), `hint` (or None), `status`."""

    status = EXIT_FAILED

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = printable(message)
        super().__init__(self.message)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """How pickle takes it to another process: as it is, without its constructor."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[AioTraceError], arguments: tuple[Any, ...], members: dict[str, Any]) -> AioTraceError:
    made = kind.__new__(kind, *arguments)
    made.__dict__.update(members)
    return made


class UsageError(AioTraceError):
    """The command line cannot be understood."""

    status = EXIT_USAGE


class TargetError(AioTraceError):
    """Something about the process or file to look at."""


class NoSuchProcess(TargetError):
    """No process has that pid (any more)."""


class NotQemu(TargetError):
    """The process or file is not a QEMU."""


class TargetExited(TargetError):
    """The process ended, or its pid now belongs to another one."""


class OutOfBounds(TargetError):
    """The process holds more than any QEMU does, or takes longer to be looked at."""


class CoreError(TargetError):
    """A file is no core of a process, or what it holds cannot be used."""


class ImageError(AioTraceError):
    """An ELF file is damaged, truncated or of a kind that is not supported."""


class SitesNotFound(AioTraceError):
    """No strategy found (and proved) all probe sites."""


class LayoutError(AioTraceError):
    """QEMU's structures are not where the layout says; nothing read by it may be believed."""


class AbsentMember(LayoutError):
    """A structure member that this build does not have, or that was not found, was asked for."""


class FaultError(AioTraceError):
    """Memory of the target could not be read at `address`."""

    def __init__(self, address: int, size: int = 0) -> None:
        super().__init__(f"cannot read {size} bytes at {address:#x}")
        self.address = address
        self.size = size


class HostError(AioTraceError):
    """Something the host lacks: permission, kernel feature, package."""


class NotPermitted(HostError):
    """Neither root nor the capabilities that are needed."""


class NoUprobes(HostError):
    """The kernel has no uprobes, or /sys does not show them."""


class BccMissing(HostError):
    """The bcc Python package is not importable."""


class ProbeError(HostError):
    """BCC could not compile, load or attach the probes."""


class ToolMissing(HostError):
    """A program that this command needs is not installed."""


class MonitorError(AioTraceError):
    """QEMU's monitor could not be used; nothing but what was said before was sent."""


class MonitorBusy(MonitorError):
    """Somebody else, usually libvirt, holds the monitor's socket."""


class MonitorDead(MonitorError):
    """The monitor does not answer: the main loop does not come round."""


class CommandRefused(MonitorError):
    """The monitor answered a command with an error."""


class NudgeRefused(AioTraceError):
    """There is nothing that a nudge is for, or nothing that it could do; nothing was done."""


class NothingLost(NudgeRefused):
    """No finished request waits for its callback."""


class InjectionRefused(NudgeRefused):
    """The call could not safely be made inside the process; it was not made."""


class LabError(AioTraceError):
    """The lab could not start, fault or free its own throw-away QEMU."""


def add_note(error: BaseException, text: str) -> None:
    """What `-v` shows besides the message; as the method of that name that exceptions have since Python 3.11."""
    error.__dict__.setdefault("__notes__", []).append(text)


def folder_hint(path: str) -> str:
    """What shows what there is instead of a file that is not."""
    return f"ls -l {pasted(path.rstrip('/').rpartition('/')[0] or ('/' if path.startswith('/') else '.'))}"


def pasted(path: str) -> str:
    """A path or other word as it must be typed in a shell, and is no option; for hints."""
    import shlex  # of no use until something fails

    path = f"./{path}" if path.startswith("-") else path
    return shlex.quote(path) if path.isprintable() else _quoted(path)


def _quoted(path: str) -> str:
    """As bash, zsh and others take what cannot be typed: $'\\x1b'."""
    try:
        raw = path.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # no name of a file
        raw = path.encode(errors="backslashreplace")
    letters = (chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in raw)
    return "$'" + "".join(f"\\{letter}" if letter in ("\\", "'") else letter for letter in letters) + "'"
