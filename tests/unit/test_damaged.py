"""Damaged ELF files: no crash, no hang, no wrong site.

A seeded mutator changes headers, tables, notes, code and debug information of real binaries. What comes
out must be refused with one sentence, or be located as the sound file is. Where the code of the thread
pool's functions itself was changed, the file is another program: then the layout and the functions must
still be those of the sound one. AIO_TRACE_MUTANTS sets how many there are.
"""

from __future__ import annotations

import io
import os
import random
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from tests.conftest import require
from tests.targets import Recipe, build, stripped, with_mini_debug_info
from tracer.check import check_file
from tracer.elf import Image
from tracer.errors import AioTraceError, ImageError, SitesNotFound
from tracer.report import TableWriter, as_json
from tracer.sites import locate
from tracer.sites.model import SITE_NAMES, Located

MUTANTS = int(os.environ.get("AIO_TRACE_MUTANTS", "240"))
EVERY = 8  # of them goes through the command, too, and is written for people and for programs
LONGEST_S = 5.0
EXTREMES = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


@dataclass(frozen=True)
class Subject:
    """A sound file: what it holds, where what lies in it, and what is right."""

    data: bytes
    areas: dict[str, tuple[int, int]]  # offset and size in the file
    truth: Located


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool")


def subject(path: Path) -> Subject:
    with Image.open(path) as image, path.open("rb") as file:
        truth = locate(image)
        elf = ELFFile(file)
        areas = {
            "header": (0, 64),
            "program headers": (elf["e_phoff"], elf["e_phentsize"] * elf["e_phnum"]),
            "section headers": (elf["e_shoff"], elf["e_shentsize"] * elf["e_shnum"]),
        }
        wanted = (
            ".dyn",
            ".gnu.hash",
            ".note",
            ".eh_frame",
            ".rela",
            ".symtab",
            ".strtab",
            ".debug",
            ".gnu_debug",
            ".got",
        )
        for section in elf.iter_sections():
            if section.name.startswith(wanted) and section["sh_type"] != "SHT_NOBITS" and section["sh_size"]:
                areas[section.name] = (section["sh_offset"], section["sh_size"])
        for name in ("worker_thread", "thread_pool_completion_bh", "thread_pool_submit_aio", "spawn_thread_bh_fn"):
            bounds = image.bounds(truth.functions[name])
            assert bounds is not None
            areas[f"code of {name}"] = (image.offset_of(bounds.start), bounds.end - bounds.start)
    return Subject(path.read_bytes(), areas, truth)


def mutated(data: bytes, start: int, size: int, dice: random.Random) -> bytes:
    """One to eight changes in an area: flipped bits, noise, extreme values, bytes moved about."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        at = start + dice.randrange(size)
        way = dice.randrange(5)
        if way == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif way == 1:
            changed[at] = dice.randrange(256)
        elif way == 2:
            at = start + dice.randrange(size) // 8 * 8
            changed[at : at + 8] = struct.pack("<Q", dice.choice(EXTREMES))[: len(changed) - at]
        elif way == 3:
            at = start + dice.randrange(size) // 4 * 4
            changed[at : at + 4] = struct.pack("<I", dice.choice(EXTREMES) & 0xFFFFFFFF)[: len(changed) - at]
        else:
            other = start + dice.randrange(size)
            changed[at : at + 4], changed[other : other + 4] = changed[other : other + 4], changed[at : at + 4]
    return bytes(changed)


def mutants(sound: Subject, count: int, seed: int) -> Iterator[tuple[str, int, bytes]]:
    for number in range(seed, seed + count):
        dice = random.Random(number)
        if dice.random() < 0.05:
            yield "end", number, sound.data[: dice.randrange(len(sound.data))]
            continue
        area = dice.choice(sorted(sound.areas))
        yield area, number, mutated(sound.data, *sound.areas[area], dice)


def told(found: Located) -> object:
    """What must not be wrong. A thread counter that was not found is no lie."""
    layout = asdict(found.layout)
    layout["pool"] = {name: offset for name, offset in layout["pool"].items() if not name.endswith("_threads")}
    del layout["source"]
    return layout, found.functions["worker_thread"], found.functions["thread_pool_completion_bh"]


def sites(found: Located) -> set[tuple[str, int, str]]:
    return {(site.name, site.address, site.register) for site in found.sites_of(*SITE_NAMES)}


def check(area: str, data: bytes, sound: Subject, right: set[tuple[str, int, str]]) -> bool:
    """Whether the mutant was located (else it was refused); fails if it was located wrongly."""
    try:
        image = Image.of_bytes("mutant", data)
        image.qemu_version()
        image.qemu_evidence()
        found = locate(image)
    except (ImageError, SitesNotFound) as error:
        return sentence(error.message)
    assert told(found) == told(sound.truth)
    if not area.startswith("code"):
        assert sites(found) <= right
        assert {name for name, _, _ in sites(found)} == set(SITE_NAMES)
    return True


def sentence(message: str) -> bool:
    """Refused, as it should be: False."""
    assert message
    assert "\n" not in message
    return False


def through_the_command(data: bytes) -> None:
    """What `check --exe` says of it: a report, or one sentence."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            found = check_file(file.name)
        except AioTraceError as error:
            sentence(error.message)
            return
        lines = TableWriter(io.StringIO(), lambda text: None)
        lines.write(found.event)
        as_json(found.event)
        if found.failure:
            sentence(found.failure.message)


def run(path: Path, count: int, seed: int) -> None:
    sound = subject(path)
    right = sites(sound.truth) | every_strategy(path)
    located = 0
    for area, number, data in mutants(sound, count, seed):
        started = time.process_time()
        try:
            located += check(area, data, sound, right)
            if number % EVERY == 0:
                through_the_command(data)
        except Exception as error:
            raise AssertionError(f"{path.name}: mutant {number}, changed in {area}") from error
        spent = time.process_time() - started
        assert spent < LONGEST_S, f"{path.name}: mutant {number} ({area}) took {spent:.1f} s"
    assert 0 < located < count, "some damage does no harm, and some does"


@cache
def every_strategy(path: Path) -> set[tuple[str, int, str]]:
    """The sites that any strategy takes in the sound file: damage may leave only some of them."""
    right: set[tuple[str, int, str]] = set()
    for only in ("usdt", "symbols", "code", "dwarf"):
        with Image.open(path) as image:
            try:
                right |= sites(locate(image, only))
            except SitesNotFound:
                continue
    return right


FORMS: dict[str, Callable[[Path], Path]] = {
    "full": lambda program: program,
    "stripped": stripped,
    "mini": with_mini_debug_info,
}


@pytest.mark.timeout(max(120, MUTANTS))
@pytest.mark.parametrize("form", FORMS)
def test_small_programs(folder: Path, form: str) -> None:
    program = build(Recipe(probes=True), folder)
    run(FORMS[form](program), MUTANTS // 4, seed=len(form) * 1_000_000)


@pytest.mark.timeout(max(120, MUTANTS))
@pytest.mark.parametrize("name", ["qemu-img", "qemu-storage-daemon"])
def test_real_binaries(name: str) -> None:
    path = Path("/usr/bin") / name
    require(path.exists(), f"{path} is not installed")
    run(path, MUTANTS // 8, seed=len(name) * 1_000_000)


def test_a_file_of_nothing_but_noise() -> None:
    dice = random.Random(7)
    for size in (0, 1, 63, 64, 65, 4096):
        noise = b"\x7fELF\x02\x01" + dice.randbytes(size)
        with pytest.raises((ImageError, SitesNotFound)):
            locate(Image.of_bytes("noise", noise))
