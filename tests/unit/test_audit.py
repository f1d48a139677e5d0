"""The audit line: no name forges one, no log keeps us waiting, and nothing raises."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from tracer import audit

EVIL = [
    "/bin/q\udcff\udcfe",
    "/bin/q\nnudge pid=1 exe=/bin/other freed=yes",
    "/bin/q after=gone freed=yes by=root",
    "/bin/q' after='gone",
    "/bin/q\\' after=gone",
    "\x1b[2J\x1b]0;title\x07",
    "\u202etxt.exe\u2028\x85\x7f",
    "\ud800",
    "",
    "x" * 5000,
]


def fields(line: str) -> dict[str, str]:
    """The line read again, by the rule of its values."""
    pattern = r"(\w+)=((?:'(?:[^'\\]|\\.)*'|[\w./:@%+,-]+)(?:\(uid [0-9?]+\))?|uid [0-9]+)(?: |$)"
    assert re.fullmatch(rf"nudge (?:{pattern})+", line), line
    return {found[1]: found[2] for found in re.finditer(pattern, line)}


@pytest.mark.parametrize("name", EVIL)
def test_no_name_forges_a_line_or_a_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.os, "environ", {"SUDO_USER": name, "SUDO_UID": "0) after=gone ("})
    line = audit.line({"pid": "7", "exe": name, "after": "lost-wakeup"})
    assert line.isprintable()
    told = fields(line)
    assert list(told) == ["pid", "exe", "after", "by", "login"]
    assert told["after"] == "lost-wakeup"
    assert len(line) < 4 * audit.LONGEST_VALUE
    if name:
        assert told["by"].endswith("(uid ?)")


def test_two_names_never_read_alike() -> None:
    assert len({audit.value(name) for name in [*EVIL, "a\\x1b", "a\x1b", "a'", "a\\'", "a\\\\'"]}) == len(EVIL) + 5


def test_the_login_user_stands_beside_sudos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can set SUDO_USER; the kernel keeps who logged in."""
    monkeypatch.setenv("SUDO_USER", "operator")
    monkeypatch.setenv("SUDO_UID", "4711")
    monkeypatch.setattr(audit, "_login_uid", lambda: 0)
    assert audit.who() == "by=operator(uid 4711) login=root(uid 0)"
    monkeypatch.setattr(audit, "_login_uid", lambda: 999_999_999)
    assert audit.who() == "by=operator(uid 4711) login=uid 999999999"
    monkeypatch.setattr(audit, "_login_uid", lambda: None)
    assert audit.who() == "by=operator(uid 4711) login=nobody"
    monkeypatch.delenv("SUDO_USER")
    assert audit.who().startswith("by=")
    assert str(os.getuid()) in audit.who()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_log_of_either_kind_gets_the_line(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SOCKET", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, kind) as log:
        log.bind(audit.SOCKET)
        if kind == socket.SOCK_STREAM:
            log.listen()
        assert audit.write("nudge \udcff")
        reader = log.accept()[0] if kind == socket.SOCK_STREAM else log
        with reader:
            message = reader.recv(4096).rstrip(b"\0").decode()
    assert re.fullmatch(rf"<85>\w{{3}} [ \d]\d \d\d:\d\d:\d\d aio-trace\[{os.getpid()}\]: nudge \\udcff", message)


def test_a_log_that_does_not_read_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it lose the line: the caller is told that it has to say it."""
    monkeypatch.setattr(audit, "SOCKET", str(tmp_path / "log"))
    monkeypatch.setattr(audit, "PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(audit.SOCKET)
        taken = 0
        while audit.write(f"line {taken}"):
            taken += 1
        assert [log.recv(4096).split(b" ")[-1] for _ in range(taken)] == [b"%d" % number for number in range(taken)]
        assert audit.write("again")


def test_a_full_stream_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SOCKET", str(tmp_path / "log"))
    monkeypatch.setattr(audit, "PATIENCE_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as log:
        log.bind(audit.SOCKET)
        log.listen(1)
        assert not audit.write("x" * (8 << 20))
        for _ in range(20):
            audit.write("one more that nobody accepts")


def test_a_socket_that_nobody_listens_at_is_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "SOCKET", str(tmp_path / "log"))
    assert not audit.write("nudge")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(audit.SOCKET)
    assert not audit.write("nudge")
    (tmp_path / "log").unlink()
    (tmp_path / "log").write_text("")
    assert not audit.write("nudge")
