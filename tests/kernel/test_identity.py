"""A hostile process gets no probe into another one's file, whatever its /proc/PID/exe names and when."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.kernel import swapper
from tests.kernel.attaching import Variant, use
from tests.kernel.miniature import X86
from tests.kernel.swapper import Swapper, breakpoints, swapping_when_opened
from tests.kernel.test_located import located, waiting
from tests.targets import Recipe, build, debug_file, run, stripped
from tracer.elf import Image
from tracer.errors import ProbeError
from tracer.events import Attached, Event, Failure
from tracer.executable import Executable
from tracer.probes import Parameters, Programs
from tracer.session import Options, Session, Stop
from tracer.sites.model import SITE_NAMES
from tracer.watch import Settings

HONEST, EVIL = 0, 1
NOP = b"\x90" if X86 else b"\x1f\x20\x03\xd5"
#: What each opening of the hostile process's executable finds; before the first it is the honest one.
ORDERS = {
    "evil at the first look": (EVIL, HONEST),
    "evil at the second look": (HONEST, EVIL, HONEST),
    "evil from the second look on": (HONEST, EVIL),
    "evil from the first look on": (EVIL,),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("identity")


@pytest.fixture(scope="module")
def nops(folder: Path) -> Path:
    """Code in which the kernel puts a probe at every place."""
    source = folder / "nops.s"
    source.write_text('.text\n.rept 4096\nnop\n.endr\n.section .note.GNU-stack,"",%progbits\n')
    return source


@pytest.fixture(scope="module")
def honest(folder: Path, nops: Path) -> Path:
    """The program that several processes run."""
    program = folder / "honest"
    run(*Recipe().command(program), str(nops))
    return program


@pytest.fixture(scope="module")
def evil(folder: Path, nops: Path, honest: Path) -> Path:
    """As much a QEMU as the honest one, which has nops where this one is probed."""
    program = folder / "evil"
    compiler, *others = Recipe().command(program)
    run(compiler, str(nops), *others)
    code = honest.read_bytes()
    assert all(code[place : place + len(NOP)] == NOP for place in places(program))
    return program


@pytest.fixture(scope="module")
def swapping(folder: Path) -> Path:
    return swapper.build(folder)


@pytest.fixture
def hostile(swapping: Path, honest: Path, evil: Path) -> Iterator[Swapper]:
    with Swapper(swapping, honest, evil) as running:
        yield running


def places(program: Path) -> set[int]:
    """Where in the file its sites are."""
    with Image.open(program) as image:
        return {image.offset_of(site.address) for site in located(program).sites_of(*SITE_NAMES)}


def change(program: Path, offset: int) -> None:
    """Another bit in the byte after that one: a call leads elsewhere."""
    with program.open("r+b") as file:
        file.seek(offset + 1)
        byte = file.read(1)[0]
        file.seek(offset + 1)
        file.write(bytes([byte ^ 1]))


def traced_together(*pids: int, look: Callable[[], object] = lambda: None) -> list[Event]:
    """What is said of these processes at first; `look` is called whenever one was attached."""
    stop, events = Stop(), list[Event]()

    def emit(event: Event) -> None:
        if isinstance(event, (Attached, Failure)):
            events.append(event)
            look()
        if {event.pid for event in events} >= set(pids):
            stop.request()

    Session(pids, Options(Settings(), interval_s=0), emit, stop).run(time.monotonic())
    return events


@pytest.mark.parametrize("multi", [True, False], ids=["multi", "perf events"])
@pytest.mark.parametrize("crowd", [5, 2], ids=["shared", "alone"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_what_the_link_names_changes_while_we_attach(
    honest: Path,
    hostile: Swapper,
    order: tuple[int, ...],
    crowd: int,
    multi: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others' probes are where their file has its sites and nowhere else, and they run to their end."""
    use(Variant(multi=multi), monkeypatch)
    seen = set[int]()
    with ExitStack() as stack:
        others = [stack.enter_context(waiting(honest)) for _ in range(crowd)]

        def look() -> None:
            seen.update(*(breakpoints(other.pid, honest) for other in others))

        with swapping_when_opened(hostile, order):
            traced_together(hostile.pid, *(other.pid for other in others), look=look)
        assert seen == places(honest)
        for other in others:
            assert breakpoints(other.pid, honest) == set()
            other.communicate("\n\n")
            assert other.returncode == 0


@pytest.mark.parametrize("multi", [True, False], ids=["multi", "perf events"])
def test_a_file_that_was_written_to_is_left_alone(
    honest: Path, tmp_path: Path, multi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte of the instruction is another; no site is attached then, those before it neither."""
    use(Variant(multi=multi), monkeypatch)
    program = Path(shutil.copy(honest, tmp_path))
    found = located(program)
    with Executable.open(program) as file:
        programs = Programs(file, found.sites_of(*SITE_NAMES), found.layout.element, Parameters(shared=True))
        with closing(programs):
            change(program, found.sites["submit"].offset or 0)
            with waiting(program) as process:
                with pytest.raises(ProbeError, match="written to after it was read"):
                    programs.attach(process.pid, SITE_NAMES)
                assert breakpoints(process.pid, program) == set()


def nameless(program: Path) -> Path:
    """A stripped copy without the strings that lead to the pool: its debug file must tell."""
    code = stripped(program).read_bytes()
    for string in (b"thread_pool_completion_bh", b"thread-pool.c", b"worker"):
        code = code.replace(string + b"\0", b"x" * len(string) + b"\0")
    made = Path(shutil.copy(program, program.with_suffix(".nameless")))
    made.write_bytes(code)
    return made


@pytest.mark.parametrize("needed", [True, False])
def test_a_process_has_no_say_in_what_is_found_for_others(folder: Path, tmp_path: Path, needed: bool) -> None:
    """The debug file under its own root serves itself, if nothing else tells, but no other that runs the file."""
    whole = build(Recipe(), folder)
    program = nameless(whole) if needed else stripped(whole)
    os.link(program, tmp_path / "program")
    for library in re.findall(r"(/\S+) \(0x", run("ldd", str(program))):
        place = tmp_path / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    with Image.open(program) as image:
        build_id = image.build_id or ""
    debug = tmp_path / f"usr/lib/debug/.build-id/{build_id[:2]}/{build_id[2:]}.debug"
    debug.parent.mkdir(parents=True)
    shutil.copy(debug_file(whole), debug)
    with waiting(Path("/program"), "chroot", str(tmp_path)) as inside, waiting(program) as outside:
        own, other = traced_together(inside.pid, outside.pid)
    assert isinstance(own, Attached)
    assert {probe.strategy for probe in own.probes} == {"symbols" if needed else "code"}
    if needed:
        assert isinstance(other, Failure)
        assert "not found" in other.message
    else:
        assert isinstance(other, Attached)
        assert other.probes == own.probes
