"""Names and texts that would do something to a terminal or forge a line, through every command that shows them.

The QEMU is a stock one under a path of an attacker's choice, with a version of its own, disks and threads likewise.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.qemu.cores import gcore
from tracer.errors import MonitorError
from tracer.lab import faults
from tracer.lab.qemu import SYSTEM, Drive, Qemu, paused
from tracer.qmp import SocketMonitor
from tracer.target import open_target

ROOT = Path(__file__).resolve().parents[2]
#: The title of a terminal, a colour by C1, a line of its own, a turned direction, and what is no UTF-8.
EVIL = b"\x1b]0;owned\x07\xc2\x9b31m\nFORGED line\r\xe2\x80\xae\x7f\xff"
VERSION = b"(\x1b[31mowned"


@pytest.fixture
def evil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Qemu]:
    """With a lost write on a disk of such a name; its main thread is called as its file is."""
    modules = next(Path("/usr/lib").glob("**/qemu/accel-tcg-*.so"), None)
    if modules is not None:  # else it looks for them beside its file
        monkeypatch.setenv("QEMU_MODULE_DIR", str(modules.parent))
    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(os.fsencode(place), EVIL)
        os.mkdir(folder)
        exe, disk = os.path.join(folder, EVIL + b"qemu"), os.path.join(folder, b"disk.img")
        whole = Path(str(shutil.which(SYSTEM))).read_bytes()
        sound = re.search(rb"QEMU emulator version [^\0]*?(\([^\0)]{12})", whole)
        assert sound, "this QEMU prints no name of its packager"
        with open(exe, "wb") as copy:
            copy.write(whole[: sound.start(1)] + VERSION.ljust(sound.end(1) - sound.start(1)) + whole[sound.end(1) :])
        os.chmod(exe, 0o755)
        with open(disk, "wb") as image:
            image.truncate(1 << 20)
        with paused([Drive(file=Path(os.fsdecode(disk)))], exe=os.fsdecode(exe)) as qemu:
            faults.lose(qemu, "d0", "write")
            yield qemu


def run(*arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    return subprocess.run(command, capture_output=True, timeout=100, check=False, stdin=subprocess.DEVNULL)


def harmless(text: bytes) -> str:
    """Lines of letters that do nothing, none of them the target's own."""
    lines = text.decode().split("\n")  # UTF-8
    for line in lines:
        assert line.isprintable(), line
        assert not line.startswith("FORGED"), line
    assert b"owned" not in text or b"\\x1b" in text
    return "\n".join(lines)


def valid(text: bytes) -> list[dict[str, object]]:
    """JSON of ASCII alone, a line each, of letters that there are."""
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.decode("ascii").splitlines()]
    for each in found:
        json.dumps(each, ensure_ascii=False).encode()
    return found


COMMANDS: Sequence[tuple[str, ...]] = (
    ("--pid", "{pid}", "--duration", "2s", "-v"),
    ("--pid", "{pid}", "--duration", "2s", "--probes", "none"),
    ("inspect", "--pid", "{pid}", "-v"),
    ("check", "--pid", "{pid}"),
    ("check", "--exe", "/proc/{pid}/exe"),
    ("nudge", "--pid", "{pid}", "--qmp", "/no/socket", "-v"),
)


@pytest.mark.timeout(300)
def test_every_command_shows_only_letters(evil: Qemu) -> None:
    told = ""
    for command in COMMANDS:
        arguments = [word.format(pid=evil.pid) for word in command]
        done = run(*arguments)
        told += harmless(done.stderr) + harmless(done.stdout)
        assert "Traceback" not in told
        done = run(*arguments[: -1 if arguments[-1] == "-v" else None], "--json")
        harmless(done.stderr)
        for event in valid(done.stdout):
            if "exe" in event and command[0] != "check":
                # Exact, but for what is no UTF-8.
                assert event["exe"] == os.readlink(f"/proc/{evil.pid}/exe").replace("\udcff", "\\xff")
    assert "\\x1b]0;owned\\x07\\x9b31m\\nFORGED line\\r\\u202e\\x7f\\xff" in told
    assert "(\\x1b[31mowned" in told


def test_the_question_before_force(evil: Qemu) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / "cli.py"), "nudge", "--pid", str(evil.pid), "--force"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
        os.write(ours, b"n\n")
        _, errors = asked.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert "--force will, in process" in harmless(errors)
    assert "\\x1b]0;owned" in harmless(errors)
    assert b"Do it?" in errors


@pytest.mark.timeout(300)
def test_cores_of_it(evil: Qemu, tmp_path: Path) -> None:
    debugger = shutil.which("gcore")
    saved = os.path.join(os.fsencode(tmp_path), b"core" + EVIL.replace(b"\n", b""))  # a name of our own
    done = run("inspect", "--pid", str(evil.pid), "--save", saved)
    assert done.returncode == 3, done.stderr
    harmless(done.stderr)
    valid(Path(os.fsdecode(saved + b".json")).read_bytes())
    cores = [saved]
    if debugger:
        cores.append(os.fsencode(gcore(evil)))
    os.kill(evil.pid, signal.SIGKILL)
    for core in cores:
        for exe in ((), ("--exe", b"/no/" + EVIL), ("--exe", "/bin/true")):
            done = run("inspect", "--core", core, *exe, "-v")
            assert done.stderr or done.stdout
            harmless(done.stderr)
            harmless(done.stdout)
            valid(run("inspect", "--core", core, *exe, "--json").stdout)


def test_what_the_monitor_answers(evil: Qemu) -> None:
    """A refusal that repeats what was sent."""
    monitor = SocketMonitor(open_target(evil.pid), str(evil.spare_monitor))
    with closing(monitor), pytest.raises(MonitorError, match="owned") as refused:
        monitor.execute("blockdev-del", {"node-name": "\x1b]0;owned\x07\u202e"})
    harmless(refused.value.message.encode())
