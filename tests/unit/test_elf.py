"""tracer.elf against the distribution's own files, with pyelftools and the programs as witnesses."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile

from tests.conftest import require
from tracer.elf import Image
from tracer.errors import ImageError

TRUE = Path("/bin/true")
QEMU_IMG = Path("/usr/bin/qemu-img")
QEMUS = [
    Path("/usr/bin") / name for name in ("qemu-system-x86_64", "qemu-storage-daemon", "qemu-nbd", "qemu-img", "qemu-io")
]


@pytest.fixture(params=QEMUS, ids=lambda path: str(path.name))
def qemu(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    require(path.exists(), f"{path} is not installed")
    return path


@pytest.fixture
def qemu_img() -> Path:
    require(QEMU_IMG.exists(), f"{QEMU_IMG} is not installed")
    return QEMU_IMG


def section(elf: ELFFile, name: str) -> Any:
    """pyelftools' section of that name, which must be there."""
    found = elf.get_section_by_name(name)
    assert found is not None, name
    return found


def dynamic_symbols(elf: ELFFile) -> list[Any]:
    """pyelftools' view of all defined symbols in .dynsym."""
    symbols = section(elf, ".dynsym").iter_symbols()
    return [symbol for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"]


def test_headers_agree_with_pyelftools(qemu: Path) -> None:
    with Image.open(qemu) as image, qemu.open("rb") as file:
        elf = ELFFile(file)
        loads = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
        notes = section(elf, ".note.gnu.build-id").iter_notes()
        assert image.machine == "x86_64"
        assert image.is_pie == (elf["e_type"] == "ET_DYN")
        assert image.entry == elf["e_entry"]
        assert image.build_id == next(iter(notes))["n_desc"]
        assert [(s.vaddr, s.offset, s.filesz, s.memsz) for s in image.segments] == [
            (s["p_vaddr"], s["p_offset"], s["p_filesz"], s["p_memsz"]) for s in loads
        ]


def test_symbols_agree_with_pyelftools(qemu: Path) -> None:
    with Image.open(qemu) as image, qemu.open("rb") as file:
        symbols = dynamic_symbols(ELFFile(file))
        for symbol in random.Random(1).sample(symbols, 100):
            found = image.symbol(symbol.name)
            assert found is not None, symbol.name
            assert (found.address, found.size) == (symbol["st_value"], symbol["st_size"])
            assert symbol.name in image.symbol_names_at(found.address)


def test_absent_and_undefined_symbols_are_not_found(qemu_img: Path) -> None:
    with Image.open(qemu_img) as image:
        assert image.symbol("thread_pool_submit_ai") is None
        assert image.symbol("g_malloc") is None  # an import: named there, defined elsewhere
        assert image.symbol_names_at(image.entry + 1) == ()


def test_function_bounds_agree_with_the_unwind_entries(qemu_img: Path) -> None:
    with Image.open(qemu_img) as image, qemu_img.open("rb") as file:
        entries = ELFFile(file).get_dwarf_info().EH_CFI_entries()
        functions = [entry.header for entry in entries if isinstance(entry, FDE)]
        assert len(functions) > 1000
        for header in random.Random(2).sample(functions, 200):
            start, size = header["initial_location"], header["address_range"]
            for address in (start, start + size // 2, start + size - 1):
                bounds = image.bounds(address)
                assert bounds is not None
                assert (bounds.start, bounds.end) == (start, start + size)


def test_plt_stubs_are_named(qemu: Path) -> None:
    """Every stub that jumps through the slot of an import bears its name, and code does not."""
    with Image.open(qemu) as image, qemu.open("rb") as file:
        elf = ELFFile(file)
        symbols = section(elf, ".dynsym")
        imports = {
            relocation["r_offset"]: symbols.get_symbol(relocation["r_info_sym"]).name
            for name in (".rela.plt", ".rela.dyn")
            for relocation in section(elf, name).iter_relocations()
            if relocation["r_info_sym"]
        }
        names = set()
        for stubs in map(elf.get_section_by_name, (".plt", ".plt.got", ".plt.sec")):
            if stubs is not None:
                for address, slot in jumps_through(stubs.data(), stubs["sh_addr"]):
                    assert image.plt_name(address) == imports.get(slot)
                    names.add(imports.get(slot))
        assert {"g_malloc", "__stack_chk_fail"} <= names
        submit = image.symbol("thread_pool_submit_aio")
        assert submit is not None
        assert image.plt_name(submit.address) is None


def jumps_through(code: bytes, address: int) -> list[tuple[int, int]]:
    """(address, slot) of each `jmp *slot(%rip)`."""
    return [
        (address + found.start(), address + found.end() + struct.unpack("<i", found[1])[0])
        for found in re.finditer(rb"\xff\x25(....)", code, re.DOTALL)
    ]


def test_version_is_what_the_program_prints(qemu: Path) -> None:
    printed = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    with Image.open(qemu) as image:
        version = image.qemu_version()
        assert version is not None
        assert version in printed.splitlines()[0]
        assert re.match(r"\d+\.\d+\.\d+( \(.+\))?$", version)
        assert version in str(image.qemu_evidence())


def test_other_programs_are_no_qemu() -> None:
    for path in (TRUE, Path("/bin/bash"), Path("/proc/self/exe")):
        with Image.open(path) as image:
            assert image.qemu_version() is None
            assert image.qemu_evidence() is None


def test_read_gives_exactly_the_bytes_of_the_file(qemu_img: Path) -> None:
    data = qemu_img.read_bytes()
    with Image.open(qemu_img) as image:
        for segment in image.segments:
            offset = image.offset_of(segment.vaddr)
            assert image.read(segment.vaddr, 64) == data[offset : offset + 64]
        code = next(segment for segment in image.segments if segment.executable)
        assert image.is_executable(code.vaddr)
        assert not image.is_executable(code.vaddr + code.memsz)


def test_memory_that_is_not_in_the_file_is_not_read(qemu_img: Path) -> None:
    with Image.open(qemu_img) as image:
        last = image.segments[-1]
        assert last.memsz > last.filesz, "this test needs a .bss"
        for address in (last.vaddr + last.filesz, last.vaddr + last.filesz - 1, 1 << 63, -8):
            with pytest.raises(ImageError):
                image.read(address, 8)


@pytest.mark.parametrize(
    ("offset", "patch"),
    [
        pytest.param(0, b"\x7fELG", id="magic"),
        pytest.param(4, b"\x01", id="32 bit"),
        pytest.param(5, b"\x02", id="big-endian"),
        pytest.param(18, struct.pack("<H", 8), id="MIPS"),
        pytest.param(32, struct.pack("<Q", 1 << 40), id="program headers behind the end"),
        pytest.param(54, struct.pack("<H", 8), id="tiny program headers"),
        pytest.param(56, struct.pack("<H", 0), id="no program headers"),
    ],
)
def test_foreign_and_damaged_headers_are_refused(tmp_path: Path, offset: int, patch: bytes) -> None:
    data = bytearray(TRUE.read_bytes())
    data[offset : offset + len(patch)] = patch
    (tmp_path / "elf").write_bytes(data)
    with pytest.raises(ImageError):
        Image.open(tmp_path / "elf")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "absent", tmp_path):
        with pytest.raises(ImageError, match=re.escape(str(path))):
            Image.open(path)


def test_a_file_that_is_cut_short_meanwhile(tmp_path: Path) -> None:
    """Whose file it is may do that at any moment. Were the file mapped, this would be the end of us."""
    path = tmp_path / "elf"
    path.write_bytes(TRUE.read_bytes())
    with Image.open(path) as image:
        os.truncate(path, 4096)
        with pytest.raises(ImageError, match="ends before"):
            image.whole()


def ask_everything(path: Path) -> None:
    with Image.open(path) as image:
        image.qemu_evidence()
        image.plt_name(image.entry)
        image.symbol_names_at(image.entry)
        image.symbol("main")
        image.bounds(image.entry)
        assert image.build_id is None or bytes.fromhex(image.build_id) is not None


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_raises_image_error_only(tmp_path: Path, seed: int) -> None:
    """Whatever is overwritten or cut off: an answer or ImageError, never another exception or a hang."""
    whole = TRUE.read_bytes()
    chance = random.Random(seed)
    path = tmp_path / "elf"
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 4, 32))):
            at = chance.choice((chance.randrange(1024), chance.randrange(len(data))))
            data[at : at + 8] = chance.choice((b"\xff" * 8, b"\0" * 8, chance.randbytes(8), b"\x7f"))
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            ask_everything(path)
        except ImageError:
            refused += 1
    assert 0 < refused < 250, "the damage must matter, but not always"
