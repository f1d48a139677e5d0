"""Stacks of small C programs that go on, call frame information against readelf, and damaged files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import require
from tests.targets import debug_file, stripped, with_mini_debug_info
from tracer.debug_files import Place
from tracer.eh_frame import EXPRESSION, OFFSET, UNDEFINED, VAL_EXPRESSION, FrameError, FrameTable, Row, evaluate
from tracer.elf import Image
from tracer.errors import AioTraceError
from tracer.lab.process import wait_until
from tracer.memory import LiveMemory
from tracer.target import Region, Target, open_target
from tracer.unwind import Unwinder, names
from tracer.view import Stack

# `framed` has a frame of a size that only its frame pointer knows; `innermost` does not save that.
SOURCE = r"""
#include <alloca.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define KEEP __attribute__((noinline, noclone))
volatile int sink;
KEEP void innermost(void) { poll(NULL, 0, -1); sink++; }
KEEP void framed(int size) { char *room = alloca(size); memset(room, size, size); sink = room[1]; innermost(); sink++; }
KEEP void plain(int size) { innermost(); sink += size; }
KEEP void outer(int kind) { if (kind == 'f') framed(100 + kind); else plain(kind); sink++; }
static void handler(int number) { innermost(); sink += number; }
static void *thread(void *kind) { outer((long)kind); sink++; return NULL; }
int main(int argc, char **argv) {
    int kind = argv[1][0];
    pthread_t one;
    if (kind == 't') { pthread_create(&one, NULL, thread, (void *)'p'); pthread_join(one, NULL); }
    else if (kind == 's') { signal(SIGUSR1, handler); raise(SIGUSR1); }
    else outer(kind);
    return sink;
}
"""


@dataclass(frozen=True)
class Process:
    """What the unwinder needs, live."""

    target: Target
    memory: LiveMemory

    @property
    def pid(self) -> int:
        return self.target.pid

    def regions(self) -> list[Region]:
        return self.target.regions()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program above, without frame pointers."""
    require(shutil.which("gcc"), "gcc is not installed")
    folder = tmp_path_factory.mktemp("unwind")
    source, binary = folder / "calls.c", folder / "calls"
    source.write_text(SOURCE)
    command = ["gcc", "-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls", "-pthread", "-o"]
    subprocess.run([*command, binary, source], check=True)
    return binary


@contextmanager
def sleeping(program: Path, kind: str) -> Iterator[Process]:
    """The program, when all its threads sleep."""
    with subprocess.Popen([program, kind]) as child:
        try:
            target = open_target(child.pid)
            call = "poll" if kind != "t" else "futex"
            wait_until(lambda: (found := target.thread(child.pid)) and found.syscall and found.syscall.name == call)
            if kind == "t":
                wait_until(lambda: {t.syscall.name for t in target.threads() if t.syscall} == {"poll", "futex"})
            with closing(LiveMemory(target)) as memory:
                yield Process(target, memory)
        finally:
            child.kill()


def stack_of(process: Process, tid: int, unwinder: Unwinder) -> Stack:
    thread = process.target.thread(tid)
    assert thread
    assert thread.syscall
    return unwinder.unwind(thread.syscall.pc, thread.syscall.sp)


def own(stack: Stack) -> list[str]:
    """Its frames in the program itself."""
    return [frame.function or "?" for frame in stack.frames if (frame.module or "").endswith("/calls")]


def install(program: Path, root: Path) -> None:
    """Put its debug file where a distribution does, below `root`."""
    with Image.open(program) as image:
        build_id = str(image.build_id)
    target = root / "usr/lib/debug/.build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    target.parent.mkdir(parents=True)
    shutil.copy(debug_file(program), target)


def functions_in(process: Process, place: Callable[[Region], Place | None] | None = None) -> list[str]:
    """The functions of the main thread's stack that lie in the program itself; "?" without a name."""
    own_file = os.path.realpath(process.target.exe)
    with closing(Unwinder(process, debug_place=place)) as unwinder:
        stack = stack_of(process, process.pid, unwinder)
        return [frame.function or "?" for frame in stack.frames if frame.module == own_file]


NAMED = ["innermost", "plain", "outer", "main"]


def test_mini_debug_info_names_functions(program: Path) -> None:
    """A binary as Fedora and RHEL ship it: no .symtab, and .gnu_debugdata in its place."""
    with sleeping(stripped(program), "p") as process:
        assert not set(functions_in(process)) & set(NAMED)
    with sleeping(with_mini_debug_info(program), "p") as process:
        assert functions_in(process)[:4] == NAMED


def test_mini_debug_info_has_bounds(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What unpacks to more than a program's symbols may take names nothing."""
    with sleeping(with_mini_debug_info(program), "p") as process:
        monkeypatch.setattr("tracer.unwind.MAX_MINI", 256)
        assert not set(functions_in(process)) & set(NAMED)
        monkeypatch.undo()
        monkeypatch.setattr("tracer.unwind.MAX_DEBUG_FILES", 0)
        assert not set(functions_in(process)) & set(NAMED)


def test_a_separate_debug_file_names_functions(program: Path, tmp_path: Path) -> None:
    install(program, tmp_path)
    with sleeping(stripped(program), "p") as process:
        found = functions_in(process, lambda region: Place(region.path, (str(tmp_path),), beside=False))
    assert found[:4] == NAMED


def test_a_debug_file_beside_a_running_program_is_not_believed(program: Path, tmp_path: Path) -> None:
    """Whoever made up the path may have put a file there; of a core's executable it is the user's own."""
    linked, beside = tmp_path / "calls", tmp_path / "calls.debug"
    shutil.copy(debug_file(program), beside)
    subprocess.run(["objcopy", f"--add-gnu-debuglink={beside}", stripped(program), linked], check=True)
    with sleeping(linked, "p") as process:
        assert not set(functions_in(process)) & set(NAMED)
        assert functions_in(process, lambda _region: Place(str(linked)))[:4] == NAMED


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("p", ["innermost", "plain", "outer", "main", "_start"]), ("s", ["innermost", "handler", "main", "_start"])],
)
def test_a_stack_that_saves_everything_is_complete(program: Path, kind: str, expected: list[str]) -> None:
    with sleeping(program, kind) as process, closing(Unwinder(process)) as unwinder:
        stack = stack_of(process, process.pid, unwinder)
    assert own(stack) == expected
    assert names(stack.frames)[0] == "poll"
    assert (stack.complete, stack.why_not) == (True, None)


def test_a_frame_pointer_that_nobody_saved_is_searched_for(program: Path) -> None:
    with sleeping(program, "f") as process, closing(Unwinder(process)) as unwinder:
        stack = stack_of(process, process.pid, unwinder)
    assert own(stack) == ["innermost", "framed", "outer", "main", "_start"]
    assert not stack.complete
    assert "search" in str(stack.why_not)


def test_a_thread_ends_where_it_began(program: Path) -> None:
    with sleeping(program, "t") as process, closing(Unwinder(process)) as unwinder:
        (tid,) = (thread.tid for thread in process.target.threads() if thread.tid != process.pid)
        stack = stack_of(process, tid, unwinder)
    assert own(stack) == ["innermost", "plain", "outer", "thread"]
    assert stack.complete


def test_a_deleted_file_is_still_read(program: Path, tmp_path: Path) -> None:
    copy = tmp_path / "calls"
    shutil.copy(program, copy)
    with sleeping(copy, "p") as process, closing(Unwinder(process)) as unwinder:
        copy.unlink()
        try:
            with open(f"/proc/{process.pid}/map_files/{_code(process)}", "rb"):
                pass
        except PermissionError as error:
            require(False, f"the files behind mappings may not be opened here: {error}")
        stack = stack_of(process, process.pid, unwinder)
    assert [name for name in names(stack.frames) if name in ("innermost", "plain", "outer")] == [
        "innermost",
        "plain",
        "outer",
    ]


def _code(process: Process) -> str:
    region = next(r for r in process.regions() if "calls" in r.path and "x" in r.permissions)
    return f"{region.start:x}-{region.end:x}"


def test_where_nothing_is_known_it_says_so(program: Path) -> None:
    with sleeping(program, "p") as process, closing(Unwinder(process)) as unwinder:
        stack = unwinder.unwind(0x1234, 0x5678)
    assert (len(stack.frames), stack.complete) == (1, False)
    assert stack.why_not


# Every row against readelf's reading of the same file.

_NUMBERS = {"rax": 0, "rdx": 1, "rcx": 2, "rbx": 3, "rsi": 4, "rdi": 5, "rbp": 6, "rsp": 7, "ra": 16, "rip": 16}
_NUMBERS |= {f"r{number}": number for number in range(8, 16)}


def _readelf_rows(path: str) -> Iterator[tuple[int, str, dict[int, str]]]:
    # Its status also tells of separate debug files that are not there.
    text = subprocess.run(["readelf", "-wF", path], capture_output=True, text=True, check=False).stdout
    columns: list[int] = []
    in_function = False
    for line in text.splitlines():
        words = line.split()
        if re.search(r"\b(FDE|CIE)\b", line):
            in_function = " FDE " in line
        elif words[:2] == ["LOC", "CFA"]:
            columns = [_NUMBERS[name] for name in words[2:]]
        elif in_function and len(words) == len(columns) + 2 and re.fullmatch("[0-9a-f]{16}", words[0]):
            yield int(words[0], 16), words[1], dict(zip(columns, words[2:]))


def _cfa(row: Row) -> str:
    if isinstance(row.cfa, bytes):
        return "exp"
    name = next(name for name, number in _NUMBERS.items() if number == row.cfa[0])
    return f"{name}{row.cfa[1]:+d}"


def _rule(row: Row, number: int) -> str:
    kind, value = row.registers.get(number, (UNDEFINED, 0))
    if kind == OFFSET:
        assert isinstance(value, int)
        return f"c{value:+d}"
    return {UNDEFINED: "u", EXPRESSION: "exp", VAL_EXPRESSION: "vexp"}[kind]


def test_rows_are_those_that_readelf_prints(program: Path) -> None:
    require(shutil.which("readelf"), "readelf is not installed")
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(/\S*libc\.so\S*)", libraries)
    assert found
    compared = 0
    for path in (str(program), found[1]):
        with Image.open(path) as image:
            table = FrameTable(image)
            for address, cfa, rules in _readelf_rows(path):
                row = table.row(address)
                if row is None:  # a row of a function of no length
                    continue
                compared += 1
                assert (_cfa(row), {number: _rule(row, number) for number in rules}) == (cfa, rules), hex(address)
    assert compared > 20000


# What is damaged is refused, not followed.


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_frames_raise_the_one_error(program: Path, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(program.read_bytes())
    with Image.open(program) as image:
        frames, header = image.section(".eh_frame"), image.section(".eh_frame_hdr")
    assert frames
    assert header
    places = [*range(frames.offset, frames.offset + frames.size), *range(header.offset, header.offset + header.size)]
    for place, value in changes:
        data[places[place % len(places)]] = value
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    with Image.open(damaged) as image:
        table = FrameTable(image)
        start = next(segment.vaddr for segment in image.segments if segment.executable)
        for address in range(start, start + 0x400, 3):
            try:
                table.row(address)
            except AioTraceError:
                continue


@given(st.binary(max_size=40))
def test_expressions_end(expression: bytes) -> None:
    def read(_address: int, size: int) -> bytes:
        return bytes(size)

    register: Callable[[int], int] = lambda number: number * 8  # noqa: E731
    with suppress(FrameError):
        assert 0 <= evaluate(expression, register, read) < 1 << 64


def test_an_expression_has_its_value() -> None:
    # What every PLT has: rsp + 8 + ((rip & 15) >= 11) << 3.
    plt = bytes([0x77, 8, 0x80, 0, 0x3F, 0x1A, 0x3B, 0x2A, 0x33, 0x24, 0x22])
    for rip, expected in ((0x100A, 0x5008), (0x100B, 0x5010), (0x1010, 0x5008)):
        assert evaluate(plt, {7: 0x5000, 16: rip}.__getitem__, lambda _a, size: bytes(size)) == expected
