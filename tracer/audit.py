"""The audit line: who did what to which QEMU, and what came of it, in the system's log.

Knows: syslog, which is the journal where systemd runs. Does not know what a nudge is.
"""

from __future__ import annotations

import os
import pwd
import syslog

SOCKET = "/dev/log"


def who() -> str:
    """The person behind this process: who called sudo, else the login user, else the uid."""
    name, uid = os.environ.get("SUDO_USER"), os.environ.get("SUDO_UID")
    if name:
        return f"{name}(uid {uid or '?'})"
    number = _login_uid()
    try:
        return f"{pwd.getpwuid(number).pw_name}(uid {number})"
    except KeyError:
        return f"uid {number}"


def _login_uid() -> int:
    """Who logged in, by the kernel's own audit id; where nobody did, who we are."""
    try:
        with open("/proc/self/loginuid", encoding="ascii") as file:
            number = int(file.read())
    except (OSError, ValueError):
        return os.getuid()
    return os.getuid() if number == 0xFFFFFFFF else number


def write(text: str) -> bool:
    """One line to syslog, with `who`; False where no log listens on this host."""
    syslog.openlog("aio-trace", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_NOTICE, f"{text} by={who()}")
    syslog.closelog()
    return os.path.exists(SOCKET)
