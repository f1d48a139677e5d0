"""Builds kept from one trace to the next, on the distribution's QEMUs: what is not true of a file is not believed."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tracer import cache, kept
from tracer.build import Build, build_of
from tracer.debug_files import Place
from tracer.elf import Image
from tracer.executable import Executable
from tracer.sites.placing import INSTRUCTION

ROOT = Path(__file__).resolve().parents[2]
QEMU = "/usr/bin/qemu-img"
PLACE = Place(QEMU)
#: What only the search for sites needs, or only what comes after the attaching.
NOT_NEEDED = (
    *(
        "capstone",
        "elftools",
        "bcc",
        "drgn",
        "qemu",
        "tabulate",
        "textwrap",
        *(() if sys.version_info < (3, 10) else ("subprocess",)),  # the module `platform` needed it
        "hashlib",
        "asyncio",
    ),
    *("tracer.sites.locating", "tracer.sites.flow", "tracer.sites.x86", "tracer.unwind", "tracer.inspect"),
)

Json = dict[str, Any]


class Fresh(Exception):
    """The sites would be located afresh."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require(Path(QEMU).exists(), f"{QEMU} is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache.refusals.clear()
    return tmp_path / "cache" / "aio-trace" / kept.KIND


@pytest.fixture
def located(folder: Path) -> Build:
    """What was found in QEMU, and is kept now."""
    build = known(QEMU)
    assert len(list(folder.iterdir())) == 1
    return build


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would locate afresh fails."""

    def fresh(*_arguments: object) -> Build:
        raise Fresh

    monkeypatch.setattr(kept, "build_of", fresh)


def known(path: str, place: Place = PLACE) -> Build:
    """What is known of that file by now."""
    with Executable.open(path) as file:
        return kept.read_build(file, path, place)


def key_of(path: str, place: Place = PLACE) -> bytes:
    with Executable.open(path) as file, file.image() as image:
        key = kept._key(image, file, place)
    assert key is not None
    return key


def edit(change: Callable[[Json], object]) -> None:
    """Change what is kept of QEMU, as if it had been kept so."""
    content = cache.load(kept.KIND, key_of(QEMU))
    assert content is not None
    value = json.loads(content)
    change(value)
    cache.store(kept.KIND, key_of(QEMU), json.dumps(value).encode())


def test_what_was_kept_is_what_is_found(located: Build) -> None:
    with Image.open(QEMU) as image:
        assert located == build_of(image, QEMU, None, PLACE)


def test_a_file_that_was_met_before_is_not_searched(located: Build, no_search: None) -> None:
    assert known(QEMU) == located


def test_nothing_kept_is_searched(no_search: None) -> None:
    with pytest.raises(Fresh):
        known(QEMU)


@pytest.mark.parametrize("name", ["qemu-system-x86_64", "qemu-storage-daemon", "qemu-nbd", "qemu-io"])
def test_every_program_of_qemu_can_be_kept(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/usr/bin/{name}"
    require(Path(path).exists(), f"{path} is not installed")
    first = known(path, Place(path))
    monkeypatch.setattr(kept, "build_of", None)
    assert known(path, Place(path)) == first


def moved(by: int, *way: str) -> Callable[[Json], object]:
    def change(value: Json) -> None:
        for step in way[:-1]:
            value = value[step]
        value[way[-1]] += by

    return change


def instruction_moved(value: Json) -> None:
    """A site beside the right one, with its instruction told as the file has it."""
    address = value["sites"]["done"]["address"] = value["sites"]["done"]["address"] - (1 << 16)
    with Image.open(QEMU) as image:
        value["sites"]["done"] |= {"offset": image.offset_of(address), "code": image.read(address, INSTRUCTION).hex()}


EDITS: dict[str, Callable[[Json], object]] = {
    **{f"{name} one byte on": moved(1, "sites", name, "address") for name in ("submit", "done", "callback")},
    "a site one byte back": moved(-1, "sites", "done", "address"),
    "a site far away": moved(1 << 40, "sites", "done", "address"),
    "a site in other code": instruction_moved,
    "no site": lambda value: value["sites"].pop("callback"),
    "a site of another name": lambda value: value["sites"]["done"].update(name="submit"),
    "a site with more to it": lambda value: value["sites"]["done"].update(more=1),
    "a register": lambda value: value["sites"]["done"].update(register="rbx; exit"),
    "no instruction": lambda value: value["sites"]["done"].update(code=""),
    "no place": lambda value: value["sites"]["done"].pop("offset"),
    "another place": moved(16, "sites", "done", "offset"),
    "worker_thread moved": moved(16, "functions", "worker_thread"),
    "worker_thread gone": lambda value: value["functions"].pop("worker_thread"),
    "bounds moved": lambda value: value["bounds"].update(worker_thread=[16, 32]),
    "no bounds": lambda value: value["bounds"].clear(),
    "no code": lambda value: value["code"].clear(),
    "other code": lambda value: value["code"][0].__setitem__(2, "0" * 64),
    "an endless function": lambda value: value["code"][0].__setitem__(1, 1 << 62),
    "the other way round": lambda value: value["code"][0].reverse(),
    "a variable nowhere": lambda value: value.update({"main context": 1 << 50}),
    "a layout before its structure": lambda value: value["layout"]["element"].update(state=-8),
    "a layout without end": lambda value: value["layout"]["pool"].update(head=1 << 40),
    "a layout of words": lambda value: value["layout"]["bottom_half"].update(flags="16"),
    "a member too few": lambda value: value["layout"]["element"].pop("ret"),
    "nothing": lambda value: value.clear(),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_entry_that_was_edited_is_not_believed(name: str, located: Build) -> None:
    edit(EDITS[name])
    assert known(QEMU) == located
    assert cache.refusals
    # And what was found in its place is kept.
    cache.refusals.clear()
    assert known(QEMU) == located
    assert not cache.refusals


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_entry_leads_to_a_search(name: str, located: Build, no_search: None) -> None:
    edit(EDITS[name])
    with pytest.raises(Fresh):
        known(QEMU)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"1", b"\xff", b"{", b'{"sites": []}', b"[" * 100_000])
def test_no_entry_at_all(content: bytes, located: Build, no_search: None) -> None:
    cache.store(kept.KIND, key_of(QEMU), content)
    with pytest.raises(Fresh):
        known(QEMU)


def test_one_byte_of_the_code_is_another(located: Build, tmp_path: Path, no_search: None) -> None:
    """What was kept of QEMU is told to be of a file that differs in one byte of worker_thread."""
    with Image.open(QEMU) as image:
        worker = image.offset_of(located.located.functions["worker_thread"])
    other = tmp_path / "qemu-img"
    shutil.copy(QEMU, other)
    content = cache.load(kept.KIND, key_of(QEMU))
    assert content
    cache.store(kept.KIND, key_of(str(other)), content)
    assert known(str(other)) == located
    with other.open("r+b") as file:
        file.seek(worker + 40)
        byte = file.read(1)
        file.seek(worker + 40)
        file.write(bytes([byte[0] ^ 1]))
    cache.store(kept.KIND, key_of(str(other)), content)
    with pytest.raises(Fresh):
        known(str(other))
    assert "is another" in cache.refusals[-1]


def test_the_same_code_in_other_functions(located: Build, tmp_path: Path, no_search: None) -> None:
    """A file with the identity of one that was met, and its code, but another unwind table: instructions in the
    middle of this one's instructions, perhaps."""
    with Image.open(QEMU) as image:
        worker = located.located.functions["worker_thread"]
        header, _, table = image._unwind_table or (0, 0, b"")
        row = next(row for row in range(0, len(table), 8) if struct.unpack_from("<i", table, row)[0] == worker - header)
        place = image.offset_of(header) + 12 + row
    other = tmp_path / "qemu-img"
    shutil.copy(QEMU, other)
    with other.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<i", worker - header + 1))
    content = cache.load(kept.KIND, key_of(QEMU))
    assert content
    cache.store(kept.KIND, key_of(str(other)), content)
    with pytest.raises(Fresh):
        known(str(other))
    assert "there is no function from" in cache.refusals[-1]


def test_each_file_has_a_key_of_its_own(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for copy in (one, other):
        shutil.copy(QEMU, copy)
        os.utime(copy, ns=(1, 1))
    keys = {key_of(QEMU), key_of(str(one)), key_of(str(other))}
    assert len(keys) == 3
    os.utime(one, ns=(1, 1))  # touched, nothing else
    assert key_of(str(one)) not in keys


def test_a_debug_file_that_comes_or_goes_changes_the_key(tmp_path: Path) -> None:
    place = Place(QEMU, (str(tmp_path),))
    before = key_of(QEMU, place)
    with Image.open(QEMU) as image:
        build_id = image.build_id or ""
    file = tmp_path / "usr/lib/debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    file.parent.mkdir(parents=True)
    assert key_of(QEMU, place) == before
    file.write_text("not even an ELF file")
    assert key_of(QEMU, place) != before


def test_a_newer_program_has_other_keys(tmp_path: Path) -> None:
    """A copy of the package, one of its files touched."""
    shutil.copytree(ROOT / "tracer", tmp_path / "tracer")
    program = f"""
from tracer import kept
from tracer.debug_files import Place
from tracer.executable import Executable
with Executable.open({QEMU!r}) as file, file.image() as image:
    print(kept._key(image, file, Place({QEMU!r})))
"""

    def key() -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = key()
    assert key() == before
    os.utime(tmp_path / "tracer" / "sites" / "flow.py")
    assert key() != before


def test_what_a_known_build_does_not_need_is_not_imported(located: Build) -> None:
    """All that the main job imports before it is attached, but for the probes' own needs."""
    program = f"""
import sys
import cli, tracer.report, tracer.session, tracer.kept
from tracer.debug_files import Place
before = set(sys.modules)
tracer.kept.read_build(tracer.executable.Executable.open({QEMU!r}), "", Place({QEMU!r}))
print([name for name in {NOT_NEEDED!r} if name in sys.modules], sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
