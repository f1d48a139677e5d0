"""Each strategy alone on small programs built in many ways.

What is right is told without the tracer's own code: by the symbols of the unstripped twin, by objdump,
and by the layout that the source and the ABI give. That the register is right too, tests/kernel shows
with real requests.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.targets import Recipe, build, debug_file, run, stripped, with_mini_debug_info
from tracer.debug_files import DebugFiles, Place
from tracer.elf import Image
from tracer.errors import SitesNotFound
from tracer.layout import BottomHalfLayout, ElementLayout
from tracer.sites import STRATEGIES, NoStrategyWorked, differences, locate
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES, SUBMIT, Located, Site
from tracer.sites.usdt import request_register

COMPILERS = ("gcc", "clang")
WAYS = [
    (level, lto)
    for level in ("-O0", "-O1", "-O2", "-O3")
    for lto in (False, True)
    if level in ("-O2", "-O3") or not lto
]
VERSIONS = (201, 502, 702, 1000)
FULL = [
    Recipe(compiler, level, lto, pie, version, probes)
    for compiler in COMPILERS
    for level, lto in WAYS
    for pie in (True, False)
    for version in VERSIONS
    for probes in (True, False)
]


def short_matrix() -> list[Recipe]:
    """Every compiler, level and LTO; the other choices take turns."""
    some = [
        Recipe(compiler, level, lto, pie=number % 3 != 2, version=VERSIONS[number % 4], probes=number % 2 == 0)
        for compiler in COMPILERS
        for number, (level, lto) in enumerate(WAYS)
    ]
    return [
        *some,
        *(Recipe(version=version, probes=True) for version in VERSIONS),
        *(Recipe(compiler, "-O3", True, version=version) for compiler in COMPILERS for version in (201, 1000)),
        Recipe(pie=False),
        Recipe(flags=("-fcf-protection=full",)),
        Recipe("gcc", "-O3", flags=("-fno-plt",)),
    ]


RECIPES = FULL if os.environ.get("AIO_TRACE_MATRIX") else list(dict.fromkeys(short_matrix()))

# At -O0 a register holds the request for an instruction or two only. Where that is none behind the DONE
# store, or a structure is filled through memcpy(), the build is refused.
REFUSED = re.compile(r"clang-O0-(?!201)|gcc-O0-1000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All programs, two at a time."""
    made = tmp_path_factory.mktemp("pool")
    there = [recipe for recipe in RECIPES if shutil.which(recipe.compiler)]
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda recipe: run(*recipe.command(made / str(recipe))), there))
    return made


@pytest.fixture(params=RECIPES, ids=str)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    found: Recipe = request.param
    return found


@pytest.fixture
def program(recipe: Recipe, folder: Path) -> Path:
    return build(recipe, folder)


@cache
def located(path: Path, strategy: str | None, place: Place | None = None) -> Located:
    with Image.open(path) as image:
        return locate(image, strategy, place)


def refused(path: Path, strategy: str, place: Place | None = None) -> str:
    with Image.open(path) as image, pytest.raises(NoStrategyWorked) as raised:
        locate(image, strategy, place)
    return raised.value.attempts[-1].outcome


@cache
def functions(program: Path) -> dict[str, tuple[int, int]]:
    """Where functions begin and end, by nm."""
    rows = (line.split() for line in run("nm", "--print-size", "--defined-only", str(program)).splitlines())
    return {row[3]: (int(row[0], 16), int(row[0], 16) + int(row[1], 16)) for row in rows if len(row) == 4}


@cache
def instructions(program: Path) -> dict[int, str]:
    """Every instruction, by objdump."""
    lines = run("objdump", "--disassemble", "--no-show-raw-insn", str(program)).splitlines()
    found = (re.match(r"\s*([0-9a-f]+):\t(.*)", line) for line in lines)
    return {int(match[1], 16): match[2] for match in found if match}


def holder(program: Path, address: int) -> str:
    """The name of the function at an address, without suffixes."""
    names = [name for name, (start, end) in functions(program).items() if start <= address < end]
    assert len(names) == 1, (hex(address), names)
    return names[0].partition(".")[0]


def element_layout(version: int) -> ElementLayout:
    """By the source and the ABI; tests/targets/pool/thread-pool.c."""
    common = 40 if version >= 202 else 32
    return ElementLayout(
        16, 24, common, common + 8, common + 16, common + 24, common + 28, next=common + 48, prev=common + 56
    )


def half_layout(version: int) -> BottomHalfLayout:
    if version >= 601:
        return BottomHalfLayout(0, 16, 24, 40, 4, 8)
    return BottomHalfLayout(0, 8, 16, 32, 4 if version >= 500 else 1)


def check(program: Path, version: int, found: Located) -> None:
    """Against the unstripped twin."""
    assert found.layout.element == element_layout(version)
    assert found.layout.bottom_half == half_layout(version)
    # Where aio_bh_poll(), the other half of the fix, has no name, an atomic mark alone does not say yes.
    assert found.barrier_fixed in ((True, None) if version >= 500 else (False,))
    check_functions(program, found)
    for site in found.sites_of(*SITE_NAMES):
        text = instructions(program)[site.address]  # an instruction begins there
        mnemonic = text.split()[0]
        cheap = (mnemonic[0] == "j" or mnemonic in ("call", "push") or mnemonic.startswith("nop")) and "*" not in text
        assert site.cheap == cheap, text
    check_done(program, found.layout.element.state, found.sites[DONE])


def check_functions(program: Path, found: Located) -> None:
    assert set(found.sites) == set(SITE_NAMES)
    assert holder(program, found.sites[DONE].address) == "worker_thread"
    assert {holder(program, site.address) for site in found.sites_of(CALLBACK)} == {"thread_pool_completion_bh"}
    submitters = {holder(program, site.address) for site in found.sites_of(SUBMIT)}
    assert all(name.startswith("thread_pool_submit") or name == "main" for name in submitters), submitters
    assert submitters == set(linking(program, found.layout.element.prev))
    for name in ("worker_thread", "thread_pool_completion_bh"):
        assert found.functions[name] == functions(program)[name][0]


def linking(program: Path, prev: int) -> Iterator[str]:
    """Functions that take the address of thread_pool_aiocb_info: they submit requests themselves."""
    start = functions(program)["thread_pool_aiocb_info"][0]
    names = re.compile(rf"\b(0x)?{start:x}\b")
    for address, text in instructions(program).items():
        if names.search(text) and re.match(r"(lea|mov)", text):
            yield holder(program, address)


def check_done(program: Path, state: int, site: Site) -> None:
    """A store of 2, to where the state is, stands in the same function; so does the call of func."""
    start, end = functions(program)["worker_thread"]
    texts = [text for at, text in instructions(program).items() if start <= at < end]
    if "-O0-" not in program.name:
        assert any(re.match(rf"movl\s+\$0x2,0x{state:x}\(", text) for text in texts)
    assert any(re.match(r"call\s+\*", text) for text in texts)


def test_the_code_alone(recipe: Recipe, program: Path) -> None:
    """Stripped, and of its names nothing is exported."""
    bare = stripped(program)
    with Image.open(bare) as image:
        assert image.exported("thread_pool_submit_aio") is None
    if REFUSED.match(str(recipe)):
        assert refused(bare, "code")
        return
    check(program, recipe.version, located(bare, "code"))


@pytest.mark.parametrize("strategy", ["symbols", "dwarf"])
def test_what_names_functions_finds_what_the_code_finds(recipe: Recipe, program: Path, strategy: str) -> None:
    if REFUSED.match(str(recipe)):
        assert refused(program, strategy)
        return
    found = located(program, strategy)
    check(program, recipe.version, found)
    assert differences(located(stripped(program), "code"), found) == ()


def test_mini_debug_info(recipe: Recipe, program: Path) -> None:
    mini = with_mini_debug_info(program)
    if REFUSED.match(str(recipe)):
        assert refused(mini, "symbols")
        return
    check(program, recipe.version, located(mini, "symbols"))
    assert "no .symtab" in refused(stripped(program), "symbols", Place(str(program), ("/nowhere",)))


@pytest.mark.parametrize("strategy", ["symbols", "dwarf"])
def test_a_separate_debug_file(recipe: Recipe, program: Path, strategy: str, tmp_path: Path) -> None:
    """By build id, under the root that the process sees."""
    place = Place("/usr/bin/pool", (str(tmp_path),))
    bare = stripped(program)
    assert "no separate debug file" in refused(bare, strategy, place)
    install(program, tmp_path)
    if REFUSED.match(str(recipe)):
        assert refused(bare, strategy, place)
        return
    check(program, recipe.version, located(bare, strategy, place))


def test_static_probes(recipe: Recipe, program: Path) -> None:
    """Where the note names a register, its nop is taken; gcc's do at all levels but -O0."""
    bare = stripped(program)
    if not recipe.probes:
        assert "no notes" in refused(bare, "usdt")
        return
    with Image.open(bare) as image:
        notes = [probe for probe in image.static_probes if probe.name == "thread_pool_submit"]
    assert notes
    if not any(request_register(note.arguments) for note in notes) or REFUSED.match(str(recipe)):
        assert refused(bare, "usdt")
        return
    found = located(bare, "usdt")
    check(program, recipe.version, found)
    submits = found.sites_of(SUBMIT)
    assert {(site.address, site.register) for site in submits} == {
        (note.address, request_register(note.arguments)) for note in notes
    }
    assert {(site.strategy, instructions(program)[site.address].split()[0]) for site in submits} == {("usdt", "nop")}


def test_all_together_agree(recipe: Recipe, program: Path) -> None:
    if REFUSED.match(str(recipe)):
        return
    found = located(program, None)
    worked = [attempt.strategy for attempt in found.attempts if attempt.ok]
    assert worked[-3:] == ["symbols", "code", "dwarf"]
    assert not any("does not agree" in attempt.outcome for attempt in found.attempts)
    check(program, recipe.version, found)


def install(program: Path, root: Path, as_build_id_of: Path | None = None) -> Path:
    """Put a program's debug file where a distribution does."""
    with Image.open(as_build_id_of or program) as image:
        build_id = str(image.build_id)
    target = root / "usr/lib/debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(debug_file(program), target)
    return target


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_main_context_where_lto_leaves_no_function_that_tells(compiler: str, folder: Path) -> None:
    """qemu_get_aio_context() is inlined; the symbol of the variable tells, and the other strategies take it over."""
    program = build(Recipe(compiler, "-O3", True, version=702), folder)
    with Image.open(program) as image:
        assert image.symbol("qemu_get_aio_context") is None
        rows = [row.split() for row in run("nm", "--defined-only", str(program)).splitlines()]
        expected = {int(row[0], 16) for row in rows if row[-1].split(".")[0] == "qemu_aio_context"}
        assert {locate(image).main_context} == expected
    assert located(stripped(program), None).main_context is None


# Debug files that are not ours.


@pytest.fixture
def ours(folder: Path) -> Path:
    return build(Recipe(), folder)


@pytest.fixture
def other(folder: Path) -> Path:
    return build(Recipe(pie=False), folder)


def test_a_debug_file_of_another_build_is_refused(ours: Path, other: Path, tmp_path: Path) -> None:
    install(other, tmp_path, as_build_id_of=ours)
    assert "another build" in refused(stripped(ours), "symbols", Place("/usr/bin/pool", (str(tmp_path),)))


def test_mini_debug_info_of_another_build_is_refused(ours: Path, other: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    packed = with_mini_debug_info(other).with_suffix(".xz")
    run("objcopy", f"--add-section=.gnu_debugdata={packed}", str(stripped(ours)), str(wrong))
    assert "another build" in refused(wrong, "symbols")


def test_a_debug_link_needs_the_right_checksum(ours: Path, tmp_path: Path) -> None:
    """Next to the executable; without build ids, so that only the checksum tells."""
    full, link = tmp_path / "full", tmp_path / "usr/bin/pool.debug"
    run("objcopy", "--remove-section=.note.gnu.build-id", str(ours), str(full))
    link.parent.mkdir(parents=True)
    run("objcopy", "--only-keep-debug", str(full), str(link))
    bare = tmp_path / "usr/bin/pool"
    run("objcopy", "--strip-all", f"--add-gnu-debuglink={link}", str(full), str(bare))
    place = Place("/usr/bin/pool", (str(tmp_path),))
    check(ours, 702, located(bare, "symbols", place))
    with link.open("ab") as file:
        file.write(b"\0")
    assert "checksum" in refused(bare, "symbols", place)


def test_a_debug_file_that_is_no_file_does_not_stop_us(ours: Path, tmp_path: Path) -> None:
    """A pipe in a container's /usr/lib/debug would be waited for forever."""
    target = install(ours, tmp_path)
    target.unlink()
    os.mkfifo(target)
    assert "no separate debug file" in refused(stripped(ours), "symbols", Place("/usr/bin/pool", (str(tmp_path),)))


def test_debug_data_that_is_damaged_is_refused(ours: Path, tmp_path: Path) -> None:
    mini = bytearray(with_mini_debug_info(ours).read_bytes())
    with Image.open(with_mini_debug_info(ours)) as image:
        section = image.section(".gnu_debugdata")
    assert section is not None
    mini[section.offset + section.size // 2] ^= 0xFF
    (tmp_path / "mini").write_bytes(mini)
    assert ".gnu_debugdata cannot be used" in refused(tmp_path / "mini", "symbols")


# Notes that lie.


@pytest.fixture
def probed(folder: Path) -> Path:
    return build(Recipe(probes=True), folder)


def changed(program: Path, target: Path, old: bytes, new: bytes) -> Path:
    data = program.read_bytes()
    assert data.count(old) == 1
    target.write_bytes(data.replace(old, new))
    return target


def note_of(program: Path, name: str) -> tuple[str, int]:
    with Image.open(program) as image:
        (probe,) = (probe for probe in image.static_probes if probe.name == name)
    return probe.arguments, probe.address


def test_a_note_with_the_wrong_register_is_refused(probed: Path, tmp_path: Path) -> None:
    arguments, _ = note_of(probed, "thread_pool_submit")
    words = arguments.split()
    swapped = " ".join([words[1], words[0], *words[2:]])
    old, new = (b"thread_pool_submit\0" + text.encode() for text in (arguments, swapped))
    reason = refused(changed(stripped(probed), tmp_path / "wrong", old, new), "usdt")
    assert "holds the request" in reason


def test_a_note_somewhere_else_is_refused(probed: Path, tmp_path: Path) -> None:
    _, address = note_of(probed, "thread_pool_submit")
    elsewhere = functions(probed)["qemu_bh_schedule"][0]
    old, new = (struct.pack("<Q", at) for at in (address, elsewhere))
    assert "not where the code submits" in refused(changed(stripped(probed), tmp_path / "wrong", old, new), "usdt")


def test_what_disagrees_is_named_and_the_proved_one_taken(probed: Path, tmp_path: Path) -> None:
    _, address = note_of(probed, "thread_pool_submit")
    old, new = (struct.pack("<Q", at) for at in (address, functions(probed)["qemu_bh_schedule"][0]))
    found = located(changed(probed, tmp_path / "wrong", old, new), None)
    assert [(attempt.strategy, attempt.ok) for attempt in found.attempts][:2] == [("usdt", False), ("symbols", True)]
    check(probed, 702, found)


def test_prelinked_notes_are_moved(probed: Path, tmp_path: Path) -> None:
    """Both the note's address and its idea of .stapsdt.base are off by as much."""
    with Image.open(probed) as image:
        section, base = image.section(".note.stapsdt"), image.section(".stapsdt.base")
        was = image.static_probes
    assert section is not None
    assert base is not None
    data = bytearray(probed.read_bytes())
    for at in range(section.offset, section.offset + section.size - 16, 4):
        address, told = struct.unpack_from("<QQ", data, at)
        if told == base.address and address in {probe.address for probe in was}:
            struct.pack_into("<QQQ", data, at, address + 4096, told + 4096, 0)
    (tmp_path / "moved").write_bytes(data)
    with Image.open(tmp_path / "moved") as image:
        assert [replace(probe, semaphore=0) for probe in was] == list(image.static_probes)


# Names that mislead.


def test_suffixes_and_cold_parts() -> None:
    from tracer.sites.symbols import _rank

    assert [_rank(suffix) for suffix in ("", ".isra.0", ".lto_priv.0", ".constprop.0.isra.0", ".part.0")] == [
        0,
        1,
        1,
        1,
        2,
    ]
    assert [_rank(suffix) for suffix in (".cold", ".isra.0.cold", ".part.0.cold", ".debug")] == [None] * 4


def test_strategies_are_those_of_the_command_line() -> None:
    from cli import aio_trace

    (option,) = (parameter for parameter in aio_trace.params if parameter.name == "locate_by")
    assert tuple(STRATEGIES) == tuple(getattr(option.type, "choices", ()))


def test_a_program_without_a_pool_is_refused_by_all() -> None:
    for strategy in STRATEGIES:
        with Image.open("/bin/true") as image, pytest.raises(SitesNotFound):
            locate(image, strategy)


def test_reasons_are_kept(ours: Path) -> None:
    with Image.open(stripped(ours)) as image:
        files = DebugFiles(image, Place("/nowhere/pool", ("/nowhere",)))
        assert files.mini is None
        assert files.separate is None
        assert len(files.reasons) == 2
        assert str(image.build_id) in files.reasons[1]
