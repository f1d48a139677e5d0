"""The audit line: who did what to which QEMU, and what came of it, in the system's log.

Knows: the log's socket, which is the journal's where systemd runs, and who stands behind this process. Names that
others chose cannot add a line or a field, no log can keep us waiting, and nothing here raises: what was done was done.
Does not know what a nudge is.
"""

from __future__ import annotations

import errno
import os
import pwd
import re
import socket
import time
from collections.abc import Mapping

from tracer.text import printable

SOCKET = "/dev/log"
#: authpriv.notice, as a line of syslog says it (RFC 3164).
PRIORITY = 10 << 3 | 5
#: For how long a log is waited for that does not read; seconds.
PATIENCE_S = 1.0
RETRY_S = 0.01
#: Letters of one value, before what must be written otherwise is: a path may have 4096 bytes.
LONGEST_VALUE = 1200
#: What stands in a line without quotes.
_PLAIN = re.compile(r"[\w./:@%+,-]+", re.ASCII)
NOBODY = 0xFFFFFFFF


def line(fields: Mapping[str, str]) -> str:
    """`nudge`, the fields, and who: one line of printable letters, in which no value can pass for another field."""
    told = {name: value(text) for name, text in fields.items()}
    return " ".join(["nudge", *(f"{name}={text}" for name, text in told.items()), who()])


def value(text: str) -> str:
    """Text as it stands in the line: plain where it is harmless, else in single quotes, with backslashes."""
    if _PLAIN.fullmatch(text) and len(text) <= LONGEST_VALUE:
        return text
    shown = printable(text[:LONGEST_VALUE].replace("\\", "\\\\").replace("'", "\\'"))
    return f"'{shown}{'...' if len(text) > LONGEST_VALUE else ''}'"


def who() -> str:
    """Two fields: `by`, who called sudo, else the login user, else who we are; `login`, who logged in.

    The first is what our caller's environment says, the second the kernel's word.
    """
    login = _login_uid()
    name, uid = os.environ.get("SUDO_USER"), os.environ.get("SUDO_UID", "")
    if name:
        by = f"{value(name)}(uid {uid if re.fullmatch('[0-9]{1,10}', uid) else '?'})"
    else:
        by = _user(os.getuid() if login is None else login)
    return f"by={by} login={'nobody' if login is None else _user(login)}"


def _user(uid: int) -> str:
    try:
        return f"{value(pwd.getpwuid(uid).pw_name)}(uid {uid})"
    except (KeyError, OSError, ValueError):
        return f"uid {uid}"


def _login_uid() -> int | None:
    """Who logged in, by the kernel's own audit id, which is passed on through sudo; None where nobody did."""
    try:
        with open("/proc/self/loginuid", encoding="ascii") as file:
            number = int(file.read())
    except (OSError, ValueError):
        return None
    return None if number == NOBODY else number


def write(text: str) -> bool:
    """One line to the log; False where none listens on this host or it did not take it in time."""
    stamp = time.strftime("%b %e %H:%M:%S")
    message = f"<{PRIORITY}>{stamp} aio-trace[{os.getpid()}]: {text}".encode(errors="backslashreplace")
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        try:
            with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as log:
                _connect(log)
                # Lines of a stream end with a zero; a datagram is a line.
                return _sent(log, message if kind == socket.SOCK_DGRAM else message + b"\0")
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                return False
    return False


def _connect(log: socket.socket) -> None:
    """Raises OSError, also where a log does not answer in time."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return log.connect(SOCKET)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(RETRY_S)


def _sent(log: socket.socket, message: bytes) -> bool:
    """Whether the log took all of it."""
    end = time.monotonic() + PATIENCE_S
    while message:
        try:
            message = message[log.send(message) :]
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(RETRY_S)
    return True
