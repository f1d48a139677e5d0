"""Core files of a small C program: what they tell, with and without the executable, damaged, refused."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.core import CoreView
from tracer.corefile import CoreFile
from tracer.elf import Image
from tracer.errors import AioTraceError, CoreError, FaultError, ImageError
from tracer.lab.process import wait_until
from tracer.target import open_target
from tracer.view import Stack

SOURCE = r"""
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#define KEEP __attribute__((noinline, noclone))
volatile int sink;
char *mark;
KEEP void innermost(void) { poll(NULL, 0, -1); sink++; }
KEEP void outer(int kind) { innermost(); sink += kind; }
static void *thread(void *kind) { outer((long)kind); sink++; return NULL; }
int main(int argc, char **argv) {
    pthread_t one;
    mark = malloc(64);
    strcpy(mark, "what the heap holds");
    pthread_create(&one, NULL, thread, (void *)1);
    outer(argc);
    return sink;
}
"""
#: /proc/PID/coredump_filter: private anonymous and file-backed memory, ELF headers.
WITH_CODE, WITHOUT_CODE = "0x3f", "0x33"
MUTATIONS = int(os.environ.get("AIO_TRACE_MUTATIONS", "150"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("gcc", "gcore"):
        require(shutil.which(tool), f"{tool} is not installed")
    return tmp_path_factory.mktemp("core")


def build(folder: Path, name: str, *options: str) -> Path:
    source, binary = folder / f"{name}.c", folder / name
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-O2", "-Wl,--build-id", "-pthread", *options, "-o", binary, source], check=True)
    return binary


def gcore(program: Path, core: Path, coredump_filter: str, *arguments: str) -> tuple[Path, int]:
    """The core that gdb takes of the program when both its threads sleep, and the pid."""
    with subprocess.Popen([program, *arguments]) as child:
        try:
            Path(f"/proc/{child.pid}/coredump_filter").write_text(coredump_filter)
            target = open_target(child.pid)
            wait_until(lambda: [t.syscall.name for t in target.threads() if t.syscall] == ["poll", "poll"])
            subprocess.run(["gcore", "-o", core, str(child.pid)], check=True, capture_output=True)
        finally:
            child.kill()
    return core.with_name(f"{core.name}.{child.pid}"), child.pid


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return build(folder, "sleeper")


@pytest.fixture(scope="module")
def core(folder: Path, program: Path) -> tuple[Path, int]:
    return gcore(program, folder / "plain", WITHOUT_CODE, "one", "two words")


@pytest.fixture
def view(core: tuple[Path, int]) -> Iterator[CoreView]:
    with closing(CoreView(str(core[0]))) as found:
        yield found


def own(stack: Stack) -> list[str]:
    return [frame.function or "?" for frame in stack.frames if (frame.module or "").endswith("/sleeper")]


def test_it_tells_what_ran(view: CoreView, core: tuple[Path, int], program: Path) -> None:
    assert (view.pid, view.exe) == (core[1], str(program))
    assert view.arguments() == (str(program), "one", "two words")
    assert view.missing() == ()
    with view.open_image() as image, Image.open(program) as there:
        assert image.build_id == there.build_id


def test_its_threads_sleep_where_they_slept(view: CoreView) -> None:
    main, other = view.threads()
    assert (main.tid, main.syscall and main.syscall.name, other.syscall and other.syscall.name) == (
        view.pid,
        "poll",
        "poll",
    )
    assert own(view.stack(main.tid)) == ["innermost", "outer", "main", "_start"]
    assert own(view.stack(other.tid)) == ["innermost", "outer", "thread"]
    assert view.stack(main.tid).complete
    assert view.stack(other.tid).complete
    assert main.syscall
    function = view.function_at(main.syscall.pc)
    assert function
    assert function[0].strip("_") == "poll"


def test_its_memory_is_there_or_a_fault(view: CoreView) -> None:
    with view.open_image() as image:
        mark = image.symbol("mark")
        assert mark
        address = view.entry_address() - image.entry + mark.address
    (heap,) = struct.unpack("<Q", view.memory.read(address, 8))
    assert view.memory.read(heap, 19) == b"what the heap holds"
    assert any(start <= heap < start + len(data) for start, data in view.heap_chunks())
    for nowhere in (0, 8, 1 << 46, (1 << 64) - 4):
        with pytest.raises(FaultError):
            view.memory.read(nowhere, 8)


def test_what_a_core_cannot_tell_is_none(view: CoreView) -> None:
    assert (view.knows_files(), view.files(), view.file_of(1)) == (False, {}, None)
    assert (view.eventfd_count(1), view.epoll_holds(1, 2), view.asleep_s(view.pid)) == (None, None, None)


# The executable


def test_another_build_is_refused(core: tuple[Path, int], folder: Path) -> None:
    other = build(folder, "other", "-DOTHER", "-O1")
    with (
        closing(CoreView(str(core[0]), str(other))) as view,
        pytest.raises(ImageError, match="is not the executable of this core: its build id is"),
    ):
        view.open_image()


def test_a_debug_file_is_not_taken_for_another_build(core: tuple[Path, int], folder: Path, tmp_path: Path) -> None:
    """It has the core's own build id; what is wrong is that it holds no code."""
    debug = tmp_path / "sleeper.debug"
    subprocess.run(["objcopy", "--only-keep-debug", build(folder, "other"), debug], check=True)
    with (
        closing(CoreView(str(core[0]), str(debug))) as view,
        pytest.raises(ImageError, match="is a debug file") as told,
    ):
        view.open_image()
    assert "give the executable itself" in str(told.value.hint)
    with Image.open(debug, debug=True) as image:
        assert image.has_symtab


def test_a_copy_of_the_executable_will_do(folder: Path, tmp_path: Path) -> None:
    gone = build(folder, "gone")
    core, _ = gcore(gone, tmp_path / "gone", WITHOUT_CODE)
    copy = tmp_path / "sleeper"
    gone.rename(copy)
    with closing(CoreView(str(core))) as view, pytest.raises(ImageError, match="is not at hand") as caught:
        view.open_image()
    assert "--exe" in str(caught.value.hint)
    with closing(CoreView(str(core), str(copy))) as view:
        names = view.stack(view.pid).functions()
    assert names[1:4] == ("innermost", "outer", "main")


def test_code_that_was_dumped_stands_in_for_the_executable(folder: Path, tmp_path: Path) -> None:
    gone = build(folder, "dumped", "-rdynamic")
    core, _ = gcore(gone, tmp_path / "dumped", WITH_CODE)
    gone.unlink()
    with closing(CoreView(str(core))) as view:
        names = view.stack(view.pid).functions()
        assert names[1:4] == ("innermost", "outer", "main")
        assert view.stack(view.pid).complete
        with view.open_image() as image:
            outer = image.symbol("outer")
            assert outer
            assert image.bounds(outer.address + 1)


# Damage and refusals


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"some text\n" * 20, "is not a core file"),
        (b"\x7fELF\x02\x01\x01", "ends within its first header"),
        (b"\x7fELF\x01\x01\x01" + bytes(60), "64-bit"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), r"compressed \(zstd\)"),
        (b"KDUMP   " + bytes(99), "guest's memory"),
        (b"LibvirtQemudSave" + bytes(99), "saved guest"),
        (b"QEVM" + bytes(99), "saved guest"),
    ],
)
def test_what_is_no_core_is_refused_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    with pytest.raises(CoreError, match=sentence) as caught:
        CoreFile(str(file))
    assert "\n" not in caught.value.message


def test_a_program_or_a_folder_is_refused(program: Path, tmp_path: Path) -> None:
    for path, sentence in ((program, "not a core file"), (tmp_path, "folder"), (tmp_path / "none", "no file")):
        with pytest.raises(CoreError, match=sentence):
            CoreFile(str(path))


def test_what_is_no_file_is_not_waited_for(core: tuple[Path, int], tmp_path: Path) -> None:
    pipe = tmp_path / "it's a pipe"
    os.mkfifo(pipe)
    with pytest.raises(CoreError, match="is not a file") as caught:
        CoreFile(str(pipe))
    assert caught.value.hint == f"cat {shlex.quote(str(pipe))} >qemu.core"
    with closing(CoreView(str(core[0]), str(pipe))) as view, pytest.raises(ImageError, match="is not a file"):
        view.open_image()
    with closing(CoreFile(f"/proc/self/fd/{os.open(core[0], os.O_RDONLY)}")) as file:
        assert file.threads


def test_hints_can_be_pasted(core: tuple[Path, int], tmp_path: Path) -> None:
    packed = tmp_path / "a core"
    packed.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99))
    with pytest.raises(CoreError) as caught:
        CoreFile(str(packed))
    assert caught.value.hint == f"zstd -d '{packed}'"
    with pytest.raises(CoreError) as caught:
        CoreFile(str(tmp_path / "no folder" / "core"))
    assert caught.value.hint == f"ls -l '{tmp_path}/no folder'"
    for name, sentence in ((packed, "is not an ELF file"), ("/bin/true", "is not the executable of this core")):
        with closing(CoreView(str(core[0]), str(name))) as view, pytest.raises(ImageError, match=sentence) as refused:
            view.open_image()
        hint = str(refused.value.hint)
        assert hint.startswith(
            f"file -L '{packed}'" if name == packed else f"aio-trace inspect --core {core[0]} --exe "
        )


def test_a_program_without_a_build_id_is_said_to_have_none(core: tuple[Path, int], folder: Path) -> None:
    without = build(folder, "without", "-Wl,--build-id=none")
    with closing(CoreView(str(core[0]), str(without))) as view, pytest.raises(ImageError, match="has no build id, the"):
        view.open_image()


def guest_memory(notes: bytes) -> bytes:
    """An ELF core as dump-guest-memory writes it: notes of CPUs under QEMU's name, physical memory."""
    head = struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    at = 64 + 2 * 56
    rows = struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(notes), 0, 0)
    rows += struct.pack("<IIQQQQQQ", 1, 0, at + len(notes), 0, 0, 4096, 4096, 0)
    return b"\x7fELF\x02\x01\x01" + bytes(9) + head + rows + notes + bytes(4096)


def test_a_dump_of_the_guest_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "memory-only"
    note = struct.pack("<III", 5, 440, 0) + b"QEMU\0\0\0\0" + bytes(440)
    file.write_bytes(guest_memory(note))
    with pytest.raises(CoreError, match="virsh dump --memory-only") as caught:
        CoreFile(str(file))
    assert "gcore" in str(caught.value.hint)


def test_a_core_that_is_cut_off_is_used_as_far_as_it_goes(
    core: tuple[Path, int], program: Path, tmp_path: Path
) -> None:
    """gdb writes the notes last: what is cut off lacks them first, and the executable must be named."""
    data = core[0].read_bytes()
    with closing(CoreFile(str(core[0]))) as whole:
        last = max(whole.loads, key=lambda load: load.offset * bool(load.present))
    cut = tmp_path / "cut"
    cut.write_bytes(data[: last.offset + 16])
    with closing(CoreView(str(cut))) as view:
        assert any("cut off" in text for text in view.missing())
        assert view.memory.read(last.start, 16) == data[last.offset : last.offset + 16]
        with pytest.raises(FaultError):
            view.memory.read(last.start, 17)
        with pytest.raises(ImageError, match="does not tell which executable"):
            view.open_image()
    with closing(CoreView(str(cut), str(program))) as view, closing(CoreView(str(core[0]))) as whole_view:
        assert view.entry_address() == whole_view.entry_address()
        assert view.function_at(view.entry_address()) == ("_start", 0)
        assert view.threads() == []
    cut.write_bytes(data[:600])
    with pytest.raises(CoreError, match="no memory"):
        CoreFile(str(cut))


def look_at_all(path: Path, program: Path) -> None:
    """Everything that a diagnosis asks of a core."""
    with closing(CoreView(str(path), str(program))) as view:
        view.regions()
        view.arguments()
        view.missing()
        view.files()
        for thread in view.threads():
            view.stack(thread.tid)
            view.asleep_s(thread.tid)
        view.entry_address()
        view.open_image().close()


def test_damaged_cores_raise_the_one_error(core: tuple[Path, int], program: Path, tmp_path: Path) -> None:
    """Wrong headers, notes and pages, lengths and addresses of every kind: no crash, no hang."""
    data = core[0].read_bytes()
    dice = random.Random(4)
    notes = data.index(b"CORE\0")
    damaged = tmp_path / "damaged"
    for _ in range(MUTATIONS):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 8)):
            at = dice.choice(
                [
                    dice.randrange(64),
                    dice.randrange(64, 4096),
                    dice.randrange(notes, notes + 16384),
                    dice.randrange(len(data)),
                ]
            )
            size = dice.choice([1, 4, 8])
            value = dice.choice([0, 1, (1 << 63) - 1, (1 << 64) - 1, dice.getrandbits(64), dice.randrange(len(data))])
            changed[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        damaged.write_bytes(changed[: dice.choice([len(data), dice.randrange(len(data))])])
        with suppress(AioTraceError):
            look_at_all(damaged, program)
