"""Names that come from outside, as they are shown; and commands as they can be pasted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tracer import report
from tracer.errors import AioTraceError, pasted
from tracer.report import as_typed, json_line
from tracer.target import open_target
from tracer.text import exact, printable, printable_lines


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/vm/disk 1.img", "/vm/disk 1.img"),
        ("/vm/磁盘.img", "/vm/磁盘.img"),
        ("a\n08:00:00 resolved", "a\\n08:00:00 resolved"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        (os.fsdecode(b"bad\xff\xfe"), "bad\\xff\\xfe"),
        ("c1\x9b31m del\x7f tab\t", "c1\\x9b31m del\\x7f tab\\t"),
        ("turned \u202e\u2066", "turned \\u202e\\u2066"),
        ("lines\u2028\u2029\x85\x0b", "lines\\u2028\\u2029\\x85\\x0b"),
        ("half \ud83d a letter", "half \\ud83d a letter"),
    ],
)
def test_what_can_be_shown(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable_lines(f"{name.splitlines()[0]}\nours") == f"{printable(name.splitlines()[0])}\nours"
    assert AioTraceError(name).message == shown


@pytest.mark.parametrize(
    "name", ["plain", "\x1b[31m\n", "a\u202eb", "\U0001f600", os.fsdecode(b"bad\xff"), "\ud83d", "\\ud800"]
)
def test_json_holds_it_for_every_reader(name: str) -> None:
    line = json_line({"file": name, name: [1.5, float("inf"), float("nan")]})
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line, parse_constant=pytest.fail)
    (other,) = (value for key, value in found.items() if key != "file")
    assert other == [1.5, None, None]
    found["file"].encode()  # no half of a letter
    assert found["file"] == exact(name)
    if not any("\ud800" <= letter <= "\udfff" for letter in name):
        assert found["file"] == name


@pytest.mark.parametrize("name", [b"a b", b"\x1b]0;title\x07", b"it's\nnew", b"\xff\xfe\\", "\u202e".encode()])
def test_a_hint_can_be_pasted(name: bytes) -> None:
    text = pasted(os.fsdecode(name))
    assert text.isprintable()
    assert text.isascii()
    done = subprocess.run(["bash", "-c", f"printf %s {text}"], capture_output=True, check=True)
    assert done.stdout == name


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
