"""QEMU's monitor: connected to, proved to be the right one, asked.

Knows: QMP by its socket, what goes wrong with that, and how people speak to it through libvirt. Does not know what
is asked or why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import shlex
import socket
import struct
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from tracer.errors import CommandRefused, MonitorBusy, MonitorDead, MonitorError, pasted
from tracer.target import Target, looks_like_qemu, read_text

TIMEOUT_S = 5.0
#: How long to wait for the connection itself to be given back.
GOODBYE_S = 1.0
# Columns of /proc/net/unix: flags of a socket that listens, state of one that is served.
LISTENS, SERVED = 0x10000, 0x03
GREETING = 4096
#: What the library raises where the connection is of no use; it asserts where the other side is gone at once.
_LOST = (QMPError, OSError, EOFError, AssertionError)

T = TypeVar("T")


class Monitor(Protocol):
    """Something that runs QMP commands in one QEMU."""

    #: What QEMU was asked before anybody else asked, as people know it.
    asked: list[str]

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the command returns. Raises CommandRefused, or another MonitorError."""
        ...

    def spelled(self, line: str) -> str:
        """How a person would send that line of the human monitor in the same way."""
        ...

    def close(self) -> None:
        """Give the monitor back."""
        ...


class SocketMonitor:
    """QMP on a UNIX socket that belongs to `target`."""

    def __init__(self, target: Target, path: str, timeout_s: float = TIMEOUT_S) -> None:
        self._target = target
        self._path = path
        self._timeout_s = timeout_s
        self.asked: list[str] = []
        # What goes wrong comes as exceptions; the library's log would say it twice.
        logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
        self._connection = connection = _connected(path, target, timeout_s)
        self._client = QMPClient("aio-trace")
        self._loop = asyncio.new_event_loop()
        try:
            self._check_greeting(connection)
            self._greet(connection)
        except BaseException:
            self.close()
            raise

    def _check_greeting(self, connection: socket.socket) -> None:
        """See without taking it that QMP's greeting has come: nobody else is served, and QEMU answers."""
        if not select.select([connection], [], [], self._timeout_s)[0]:
            raise self._silent(connection)
        if b'"QMP"' not in connection.recv(GREETING, socket.MSG_PEEK):
            raise MonitorError(
                f"{self._path} does not speak QMP; it may be a human monitor",
                "give the socket of QEMU's -qmp, or of a -mon with mode=control",
            )

    def _silent(self, connection: socket.socket) -> MonitorError:
        """Nobody greets: another client is served, or QEMU's main loop does not come round."""
        path = connection.getpeername()
        if any(row.path == path and row.state == SERVED for row in _sockets(self._target.pid)):
            return busy(self._path, self._target)
        return self._dead(f"the monitor at {self._path} does not answer within {self._timeout_s:g} s")

    def _dead(self, what: str) -> MonitorDead:
        return MonitorDead(f"{what}: QEMU's main loop does not come round", force_hint(self._target))

    def _greet(self, connection: socket.socket) -> None:
        try:
            self._run(self._client.connect(connection))
        except TimeoutError as error:
            what = f"the monitor at {self._path} greets, but does not answer within {self._timeout_s:g} s"
            raise self._dead(what) from error
        except _LOST as error:
            raise MonitorError(f"QMP cannot be begun at {self._path}: {short(error)}") from error

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, self._timeout_s))

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the command returns. Raises CommandRefused, MonitorDead (time is over) or MonitorError."""
        try:
            return self._run(self._client.execute(command, arguments))
        except TimeoutError as error:
            raise self._dead(f"the monitor did not answer {command} within {self._timeout_s:g} s") from error
        except ExecuteError as error:
            raise CommandRefused(f"the monitor refused {command}: {short(error)}") from error
        except _LOST as error:
            raise MonitorError(f"the monitor was lost during {command}: {short(error)}") from error

    def spelled(self, line: str) -> str:
        """As typed at a human monitor."""
        return line

    def close(self) -> None:
        """Give the monitor back, in whatever state it is; QEMU serves one client a socket at a time."""
        if self._loop.is_closed():
            return
        try:
            # After an interruption in the midst of the loop anything may fail here, once.
            with suppress(Exception):
                self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), GOODBYE_S))
            self._end_tasks()
        finally:
            self._loop.close()
            self._connection.close()

    def _end_tasks(self) -> None:
        """Cancel what still runs; twice, since a stop of the loop may be left from an interruption."""
        for _ in range(2):
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                with suppress(Exception):
                    self._loop.run_until_complete(asyncio.wait(tasks, timeout=GOODBYE_S))


def force_hint(target: Target) -> str:
    """What helps where the monitor does not."""
    return f"sudo aio-trace nudge --pid {target.pid} --force"


def monitor_hint(target: Target) -> str:
    """How its monitor is reached: libvirt holds that of a QEMU that it started."""
    way = "--qmp SOCKET" if target.domain is None else "--via virsh"
    return f"sudo aio-trace nudge --pid {target.pid} {way}"


def virsh_line(domain: str, line: str, uri: str | None = None) -> str:
    """What a person types to send a line of the human monitor through libvirt."""
    where = f"-c {shlex.quote(uri)} " if uri else ""
    return f"virsh {where}qemu-monitor-command {shlex.quote(domain)} --hmp {shlex.quote(line)}"


def busy(path: str, target: Target) -> MonitorBusy:
    """The error for a socket that somebody else holds, with the line to paste."""
    line = virsh_line(target.uuid or "DOMAIN", 'qemu-io DRIVE "aio_read 0 512"')
    where = f"sudo aio-trace nudge --pid {target.pid} --via virsh, or: {line}"
    return MonitorBusy(f"another client, usually libvirt, holds the monitor at {path}", where)


# The socket


def _connected(path: str, target: Target, timeout_s: float) -> socket.socket:
    """A connection to `path`, ours or the one in QEMU's container, proved to be the target's."""
    try:
        return _connected_at(path, path, target, timeout_s)
    except MonitorBusy:
        raise
    except MonitorError:
        inside = _inside(path, target)
        if inside is None:
            raise
        return _connected_at(inside, path, target, timeout_s)


def _inside(path: str, target: Target) -> str | None:
    """Where the container's own file of that path is to be found from here; None if there is none but ours."""
    inside = f"/proc/{target.pid}/root{path}"
    try:
        found = os.stat(inside) if path.startswith("/") else None
    except (OSError, ValueError):
        return None
    with suppress(OSError, ValueError):
        if found and os.path.samestat(found, os.stat(path)):
            return None
    return inside if found else None


def _connected_at(place: str, path: str, target: Target, timeout_s: float) -> socket.socket:
    """A connection to the socket at `place`, which people know as `path`."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(place)
        _check_owner(connection, target, path)
    except TimeoutError as error:
        connection.close()
        raise busy(path, target) from error
    except OSError as error:
        connection.close()
        raise _not_connected(path, target, error) from error
    except BaseException:
        connection.close()
        raise
    connection.setblocking(False)
    return connection


def _not_connected(path: str, target: Target, error: OSError) -> MonitorError:
    hint = _own_monitors(target)
    if isinstance(error, FileNotFoundError):
        return MonitorError(f"there is no socket {path}", hint)
    if isinstance(error, PermissionError):
        line = f"sudo aio-trace nudge --pid {target.pid} --qmp {pasted(path)}"
        return MonitorError(f"the socket {path} may not be used without root", line)
    if isinstance(error, BlockingIOError):
        return busy(path, target)
    if isinstance(error, ConnectionRefusedError):
        return MonitorError(f"nobody listens at {path}: it is no socket, or a QEMU that is gone left it", hint)
    return MonitorError(f"the socket {path} cannot be used: {error.strerror or error}", hint)


def _own_monitors(target: Target) -> str:
    """What shows the sockets on the process's own command line."""
    return f"tr '\\0' '\\n' </proc/{target.pid}/cmdline | grep -A1 -E 'qmp|mon|chardev'"


def _check_owner(connection: socket.socket, target: Target, path: str) -> None:
    """Raise MonitorError unless the target itself listens there.

    The kernel tells who called listen(). That may have been libvirt, which hands the listening socket
    on: then the target must have it among its files, and no other process listens at a socket of that name.
    """
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("3i", peer)[0]
    if pid == target.pid:
        return
    name = connection.getpeername()
    inodes = {row.inode for row in _sockets(target.pid) if row.path == name and row.flags & LISTENS}
    if not _has_sockets(target.pid, inodes):
        raise MonitorError(
            f"the socket {path} belongs to process {pid or 'unknown'}, not to {target.pid}; nothing was sent",
            f"sudo aio-trace nudge --pid {pid} --qmp {pasted(path)}" if looks_like_qemu(pid) else _own_monitors(target),
        )


class _Row:
    """One line of /proc/net/unix; ValueError or IndexError for what is none."""

    def __init__(self, line: str) -> None:
        fields = line.split(None, 7)
        self.flags, self.state, self.inode = int(fields[3], 16), int(fields[5], 16), int(fields[6])
        self.path = fields[7] if len(fields) > 7 else ""


def _sockets(pid: int) -> list[_Row]:
    """The UNIX sockets of the process's network namespace."""
    try:
        lines = read_text(f"/proc/{pid}/net/unix").split("\n")[1:]
    except OSError:
        return []
    rows = []
    for line in lines:
        # A socket's name may hold a newline: what is behind it is no line.
        with suppress(ValueError, IndexError):
            rows.append(_Row(line))
    return rows


def _has_sockets(pid: int, inodes: set[int]) -> bool:
    """Whether the process has all of these among its files, and there are any."""
    missing = {f"socket:[{inode}]" for inode in inodes}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                missing.discard(os.readlink(f"/proc/{pid}/fd/{name}"))
    return bool(inodes) and not missing


def short(error: object) -> str:
    """What went wrong in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "…"
