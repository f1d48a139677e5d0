"""Files that somebody sent: whatever they claim, one clear sentence, in little time and memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from tests.fuzzing import core_file
from tests.targets import Recipe, build
from tracer.core import CoreView
from tracer.corefile import (
    NT_FACTS,
    NT_PRSTATUS,
    OWN_NOTE,
    PF_R,
    PF_W,
    PRSTATUS_REGISTERS,
    PRSTATUS_REST,
    PT_LOAD,
    PT_NOTE,
    CoreFile,
)
from tracer.elf import Image
from tracer.errors import AioTraceError, FaultError, TargetError
from tracer.inspect import diagnose
from tracer.machine import HOST
from tracer.report import json_line
from tracer.save import _note
from tracer.target import AT_ENTRY
from tracer.text import read_json

ROOT = Path(__file__).resolve().parents[2]
MOST_MIB = 300
GIB = 1 << 30
PAGE = 4096


def core(path: Path, headers: list[tuple[int, ...]], content: bytes, size: int) -> Path:
    """A core of these program headers, `content` behind them, and holes up to `size` bytes."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, len(headers), 0, 0, 0)
    with path.open("wb") as file:
        file.write(head + b"".join(struct.pack("<IIQQQQQQ", *header) for header in headers) + content)
        file.truncate(max(size, file.tell()))
    return path


def noted(path: Path, facts: bytes, loads: list[tuple[int, ...]] | None = None, size: int = 2 * PAGE) -> Path:
    """A core of one thread, with that note of ours, and one page of memory unless other segments are given."""
    status_size = PRSTATUS_REGISTERS + 8 * len(HOST.registers) + PRSTATUS_REST
    notes = _note(b"CORE", NT_PRSTATUS, struct.pack("<32xi", 7).ljust(status_size, b"\0")) + _note(
        OWN_NOTE, NT_FACTS, facts
    )
    loads = loads or [(PT_LOAD, PF_R | PF_W, 0, 0x10000, 0, PAGE, PAGE, PAGE)]
    at = 64 + 56 * (len(loads) + 1)
    return core(path, [(PT_NOTE, 0, at, 0, 0, len(notes), 0, 4), *loads], notes, size)


def _guarded() -> None:
    """A test that fails must not take the machine's memory from others."""
    resource.setrlimit(resource.RLIMIT_AS, (GIB, GIB))


def run(*arguments: str) -> tuple[int, str, int]:
    """Exit status, standard error and the most memory (MiB) of a command of aio-trace."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=_guarded) as child:
        assert child.stderr
        told = child.stderr.read().decode()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    assert "Traceback" not in told
    assert "there is not enough memory" not in told
    return child.returncode, told, used.ru_maxrss >> 10


def refused(*arguments: str) -> str:
    """What is said to it: one sentence, with a hint perhaps, and in little memory."""
    status, told, mib = run(*arguments)
    assert status == 1, told
    assert told.startswith("aio-trace: ")
    assert len(told.splitlines()) <= 2, told
    assert mib < MOST_MIB
    return told


def test_many_notes_over_one_hole(tmp_path: Path) -> None:
    """4 KiB on the disk."""
    notes = [(PT_NOTE, 0, 0x1000, 0, 0, 2 * GIB, 0, 4)] * 60
    path = core(tmp_path / "core", notes, b"", 4 * GIB)
    assert path.stat().st_blocks * 512 <= 8192
    assert "holds no memory" in refused("inspect", "--core", str(path))
    with pytest.raises(AioTraceError):
        CoreFile(str(path))


def test_one_note_as_large_as_the_file(tmp_path: Path) -> None:
    note = struct.pack("<III", 5, 4 * GIB - 512, NT_PRSTATUS) + b"CORE\0\0\0\0"
    path = core(tmp_path / "core", [(PT_NOTE, 0, 120, 0, 0, 4 * GIB, 0, 4)], note, 5 * GIB)
    refused("inspect", "--core", str(path))


def test_segments_over_one_hole(tmp_path: Path) -> None:
    """Each could be a heap; they are one, and a hole has nothing to look through."""
    size = 63 << 20
    loads = [(PT_LOAD, PF_R | PF_W, 1 << 20, GIB + number * size, 0, size, size, PAGE) for number in range(2000)]
    path = noted(tmp_path / "core", b"{}", loads, GIB)
    refused("inspect", "--core", str(path))
    with closing(CoreView(str(path))) as view:
        assert list(view.heap_chunks()) == []
        assert any("share bytes of the file" in text for text in view.missing())
        assert view.memory.read(GIB, 16) == bytes(16)


@pytest.mark.parametrize(
    "number", ["9" * 5000, "-" + "9" * 5000, "1e999", "Infinity", "-Infinity", "NaN", "1" * 500 + ".5"]
)
def test_numbers_that_are_none(number: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="number"):
        read_json(f'{{"a": {number}}}')
    facts = f'{{"files": {{"7": "disk"}}, "eventfds": {{"7": {number}}}, "threads": {{"7": {{"asleep_s": {number}}}}}}}'
    with closing(CoreView(str(noted(tmp_path / "core", facts.encode())))) as view:
        assert (view.asleep_s(7), view.eventfd_count(7)) == (None, None)
        assert "the note on open files is damaged" in view.file.damage


def test_names_of_files_that_are_no_numbers(tmp_path: Path) -> None:
    facts = {"files": {"9" * 5000: "a", "\u0663": "b", "7": "c", "-1": "d", "8": 8}, "eventfds": {"7": -1, "8": True}}
    with closing(CoreView(str(noted(tmp_path / "core", json_line(facts).encode())))) as view:
        assert view.files() == {7: "c"}
        assert view.eventfd_count(7) is None


def test_a_core_that_shrinks_meanwhile(tmp_path: Path) -> None:
    """To touch what is gone of a mapped file is the end of the process."""
    path = noted(
        tmp_path / "core", b"{}", [(PT_LOAD, PF_R | PF_W, PAGE, 0x10000, 0, 64 * PAGE, 64 * PAGE, PAGE)], 65 * PAGE
    )
    with closing(CoreView(str(path))) as view:
        assert view.memory.read(0x10000, 8) == bytes(8)
        os.truncate(path, PAGE + 16)
        assert view.memory.read(0x10000, 8) == bytes(8)
        for address in (0x10000 + 12, 0x10000 + 8 * PAGE):
            with pytest.raises(FaultError):
                view.memory.read(address, 8)
        assert list(view.heap_chunks()) == []


# Executables


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(Recipe(), tmp_path_factory.mktemp("pool")).read_bytes()


def section_header(data: bytes, name: str, path: Path) -> int:
    """Where the header of that section is in the file."""
    path.write_bytes(data)
    with Image.open(path) as image:
        found = image.section(name)
        assert found
        rows = struct.pack("<QQ", found.offset, found.size)
    return data.index(rows, struct.unpack_from("<Q", data, 40)[0]) - 24


@pytest.mark.parametrize("name", [".rodata", ".text", ".symtab", ".debug_str"])
def test_a_section_that_is_a_hole(program: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    header = section_header(program, name, path)
    with path.open("r+b") as file:
        file.seek(header + 24)
        file.write(struct.pack("<QQ", 1 << 20, 2 * GIB))
        file.truncate(3 * GIB)
    status, _, mib = run("check", "--exe", str(path))
    assert status in (0, 1)
    assert mib < MOST_MIB
    refused("inspect", "--core", str(noted(tmp_path / "core", b"{}")), "--exe", str(path))


@pytest.mark.parametrize("entry", [(1 << 64) - 1, 1 << 63])
def test_an_entry_point_beyond_everything(program: bytes, entry: int, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_bytes(program[:24] + struct.pack("<Q", entry) + program[32:])
    status, _, _ = run("check", "--exe", str(path))
    assert status in (0, 1)
    refused("inspect", "--core", str(noted(tmp_path / "core", b"{}")), "--exe", str(path))


@pytest.mark.parametrize(("entry", "refused"), [(0, False), ((1 << 64) - 1, True)])
def test_a_core_of_a_process_that_cannot_be(entry: int, refused: bool, tmp_path: Path) -> None:
    """Loaded where no address is."""
    path, found, _ = core_file(tmp_path, build(Recipe(), tmp_path))
    with closing(CoreView(str(path))) as view:
        assert diagnose(view, found).pools
        view.file.auxv[AT_ENTRY] = entry
        with pytest.raises(TargetError, match="entry point") if refused else nullcontext():
            diagnose(view, found)


def test_a_file_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/zero", str(tmp_path)):
        refused("inspect", "--core", path)
        refused("check", "--exe", path)


def test_json_is_read_as_ever() -> None:
    value = {"a": [1, -(1 << 63), (1 << 64) - 1, 1.5, 1e300, None, True, "\u20ac"], "b": {}}
    assert read_json(json.dumps(value)) == value
