"""Names that come from outside, as they are shown; and commands as they can be pasted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tracer import report
from tracer.report import as_typed
from tracer.target import open_target, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/vm/disk 1.img", "/vm/disk 1.img"),
        ("/vm/磁盘.img", "/vm/磁盘.img"),
        ("a\n08:00:00 resolved", "a\\n08:00:00 resolved"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        (os.fsdecode(b"bad\xff\xfe"), "bad\\xff\\xfe"),
    ],
)
def test_what_can_be_shown(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_open_files_have_such_names(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"a\nb\xff")
    with open(path, "wb") as file:
        assert open_target(os.getpid()).file_of(file.fileno()) == f"{tmp_path}/a\\nb\\xff"


def test_a_program_that_the_shell_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `make install` it is in no folder that the shell looks into."""
    program = tmp_path / "a folder" / "aio-trace"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    for path, typed in ((str(program.parent), "aio-trace"), ("/nowhere", f"'{program}'")):
        monkeypatch.setenv("PATH", path)
        report._program.cache_clear()
        assert as_typed("sudo aio-trace --pid 7") == f"sudo {typed} --pid 7"
        assert as_typed("aio-trace check --pid 7") == f"{typed} check --pid 7"
        assert as_typed("journalctl -t aio-trace") == "journalctl -t aio-trace"
    report._program.cache_clear()
