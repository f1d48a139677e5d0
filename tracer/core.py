"""A core file as a ProcessView: what was running, by its registers, memory and mapped files.

Knows: how a core names the executable, and how to tell that a file at hand is the one that ran: by its
build id, which stands in the first page that cores hold of each file. Where no such file is at hand, the
code is taken from the core itself, if it was dumped. What a core cannot tell (names of threads, counts of
eventfds, open files) is None, unless tracer/save noted it. Does not know QEMU's structures.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from tracer.corefile import LOST_ARGUMENT, CoreFile, CoreThread, FileMapping, system_call
from tracer.elf import Image
from tracer.errors import CoreError, FaultError, ImageError, pasted
from tracer.machine import Machine
from tracer.memory import CHUNK, LARGEST_ARENA, PAGE, MemoryReader, read_string
from tracer.target import AT_ENTRY, Region, SystemCall, Thread
from tracer.unwind import Unwinder
from tracer.view import Stack

AT_PHDR, AT_PHNUM = 3, 5
#: brk's heap begins at most that far behind the executable (arch_randomize_brk()); bytes.
BRK_RANGE = (1 << 30) + (64 << 20)
#: Arguments and environment are at the end of the main thread's stack; bytes, and how many at most.
STACK_BOTTOM, MAX_ARGUMENTS = 1 << 20, 4096
_PT_LOAD, _PT_DYNAMIC, _PT_NOTE = 1, 2, 4
_NT_GNU_BUILD_ID = 3
#: Tags of the dynamic section whose values the loader relocates in place (elf/get-dynamic-info.h of glibc).
_RELOCATED_TAGS = frozenset({3, 4, 5, 6, 7, 23, 0x6FFFFEF5, 0x6FFFFFF0})
_LARGEST_IMAGE = 128 << 20
#: In auxv's direction from the end of the stack: how many NULLs may end argv, so that not all are tried.
_MAX_ENDS = 64
_MAX_FD_DIGITS = 9
_MAX_SEGMENTS = 64


class CoreView:
    """A core file; see ProcessView. `exe` is the executable, where it is not where the core says."""

    def __init__(self, path: str, exe: str | None = None) -> None:
        self.file = CoreFile(path)
        self._given_exe = exe
        self._unwinder: Unwinder | None = None
        self._threads = {thread.tid: thread for thread in self.file.threads}
        self._facts: dict[str, Any] = self.file.facts or {}

    # What it is.

    @property
    def pid(self) -> int:
        """The process, and its main thread."""
        return self.file.pid

    @property
    def machine(self) -> Machine:
        """What the core's header says."""
        return self.file.machine

    @property
    def core(self) -> str:
        """The core file's path."""
        return self.file.path

    @property
    def exe(self) -> str | None:
        """The executable's path as the core tells it, else the one that was given."""
        return self._exe_mapping.path if self._exe_mapping else self._given_exe

    @property
    def memory(self) -> MemoryReader:
        """What the core holds of the process's memory."""
        return self.file

    def close(self) -> None:
        """Give the files back."""
        if self._unwinder is not None:
            self._unwinder.close()
        self.file.close()

    # The executable.

    @cached_property
    def _files(self) -> tuple[FileMapping, ...]:
        """The mapped files; where the core does not tell, the executable that was given, where it is found."""
        return self.file.files or tuple(self._search_given())

    def _search_given(self) -> Iterator[FileMapping]:
        if self._given_exe is None:
            return
        with Image.open(self._given_exe) as image:
            bias = next(self._biases(image), None)
            if bias is not None:
                for segment in image.segments:
                    start, end = segment.vaddr & -PAGE, segment.vaddr + segment.filesz + PAGE - 1 & -PAGE
                    yield FileMapping(bias + start, bias + end, segment.offset & -PAGE, os.path.abspath(image.path))

    def _biases(self, image: Image) -> Iterator[int]:
        """Where memory holds a file with that build id, as what to add to its addresses."""
        for load in self.file.loads:
            if image.build_id and load.present and self._build_id_of(load.start) == image.build_id:
                yield _bias(self._program_headers(load.start), load.start)

    @cached_property
    def _exe_mapping(self) -> FileMapping | None:
        """The mapping of the executable's code, or its program headers."""
        if not self.file.files:
            return next(iter(self._files), None)
        for kind in (AT_ENTRY, AT_PHDR):
            address = self.file.auxv.get(kind)
            found = None if address is None else self._file_at(address)
            if found:
                return found
        return None

    def open_image(self) -> Image:
        """The executable that ran, proved by its build id. ImageError says why there is none."""
        mapping = self._exe_mapping
        if self._given_exe is not None:
            return self._open_given(self._given_exe, mapping)
        if mapping is None:
            raise ImageError(
                f"{self.core} does not tell which executable it is of",
                self._with_exe(),
            )
        return self._open_mapped(mapping)

    def _with_exe(self, which: str = "") -> str:
        """The same command with an executable."""
        return f"aio-trace inspect --core {pasted(self.core)} --exe FILE" + (f"    # {which}" if which else "")

    def _open_given(self, exe: str, mapping: FileMapping | None) -> Image:
        image = Image.open(exe)
        wanted = self._build_id(mapping)
        if wanted and image.build_id != wanted:
            image.close()
            its = f"its build id is {image.build_id}" if image.build_id else "it has no build id"
            raise ImageError(
                f"{exe} is not the executable of this core: {its}, the core's is {wanted}",
                self._with_exe(f"the file of build id {wanted}"),
            )
        if not wanted and (self.file.auxv.get(AT_ENTRY, image.entry) - image.entry) % PAGE:
            image.close()
            raise ImageError(
                f"{exe} is not the executable of this core: its entry point is elsewhere", self._with_exe()
            )
        return image

    def _open_mapped(self, mapping: FileMapping) -> Image:
        """The file behind a mapping: the very one at its path, or what the core itself holds of it."""
        wanted = self._build_id(mapping)
        why = "its first page is not in the core, so no file can be proved to be it"
        if wanted:
            for path in self._candidates(mapping.path):
                try:
                    image = Image.open(path)
                except ImageError as error:
                    why = error.message
                    continue
                if image.build_id == wanted:
                    return image
                image.close()
                why = f"{path} is another build of it ({image.build_id or 'without a build id'})"
        try:
            return self._image_in_core(mapping)
        except (FaultError, ImageError, struct.error):
            build = f" (build id {wanted})" if wanted else ""
            raise ImageError(
                f"the executable {mapping.path}{build} is not at hand, and the core does not hold its code: {why}",
                self._with_exe("the file from the host that it ran on"),
            ) from None

    def _candidates(self, path: str) -> Iterator[str]:
        """Where a file of the process may be: beside the executable that was given, else at its own path."""
        path = path.removesuffix(" (deleted)")
        mapping = self._exe_mapping
        if self._given_exe is not None and mapping is not None:
            own = mapping.path.removesuffix(" (deleted)")
            given = os.path.abspath(self._given_exe)
            if path == own:
                yield given
            elif given.endswith(own):
                yield given.removesuffix(own) + path
        yield path

    def entry_address(self) -> int:
        """AT_ENTRY; CoreError where the core does not tell."""
        entry = self.file.auxv.get(AT_ENTRY)
        if entry is None and self._given_exe is not None:
            with Image.open(self._given_exe) as image:
                entry = next((bias + image.entry for bias in self._biases(image)), None)
        if entry is None:
            raise CoreError(
                f"{self.core} does not tell where the executable was loaded: its auxiliary vector is missing",
                self._with_exe(),
            )
        return entry

    # Files that are mapped.

    def _file_at(self, address: int) -> FileMapping | None:
        at = bisect_right(self._starts, address) - 1
        return self._by_start[at] if at >= 0 and address < self._by_start[at].end else None

    @cached_property
    def _by_start(self) -> list[FileMapping]:
        return sorted(self._files, key=lambda mapping: mapping.start)

    @cached_property
    def _starts(self) -> list[int]:
        return [mapping.start for mapping in self._by_start]

    def _base(self, mapping: FileMapping) -> int | None:
        """Where the file's first byte is mapped."""
        starts = [m.start for m in self._files if m.path == mapping.path and not m.offset and m.start <= mapping.start]
        return max(starts, default=None)

    def _program_headers(self, base: int) -> list[tuple[int, ...]]:
        """Those of the file mapped at `base`, as the core holds them; FaultError or ImageError."""
        head = self.file.read(base, 64)
        if head[:5] != b"\x7fELF\x02":
            raise ImageError(f"there is no ELF file at {base:#x}")
        offset, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
        if size != 56 or count > _MAX_SEGMENTS:
            raise ImageError(f"the ELF file at {base:#x} is damaged")
        return [struct.unpack("<IIQQQQQQ", self.file.read(base + offset + size * row, 56)) for row in range(count)]

    def _build_id(self, mapping: FileMapping | None) -> str | None:
        """The build id of a mapped file, from the core's own memory."""
        base = self._base(mapping) if mapping else self.file.auxv.get(AT_PHDR, 0) & -PAGE
        return self._build_id_of(base) if base else None

    def _build_id_of(self, base: int) -> str | None:
        try:
            headers = self._program_headers(base)
            bias = _bias(headers, base)
            for kind, _, _, vaddr, _, size, _, _ in headers:
                if kind == _PT_NOTE and (found := self._build_id_in(bias + vaddr, min(size, PAGE))):
                    return found
        except (FaultError, ImageError, struct.error):
            pass
        return None

    def _build_id_in(self, address: int, size: int) -> str | None:
        data = self.file.read(address, size)
        at = 0
        while at + 16 <= len(data):
            namesz, descsz, kind = struct.unpack_from("<III", data, at)
            desc = at + 12 + (namesz + 3 & ~3)
            if kind == _NT_GNU_BUILD_ID and data[at + 12 : at + 16] == b"GNU\0":
                return data[desc : desc + descsz].hex()
            at = desc + (descsz + 3 & ~3)
        return None

    def _image_in_core(self, mapping: FileMapping) -> Image:
        """The file as far as the core holds it: all of its code and constants, or an error."""
        base = self._base(mapping)
        if base is None:
            raise ImageError(f"the beginning of {mapping.path} is not mapped")
        headers = self._program_headers(base)
        bias = _bias(headers, base)
        loads = [header for header in headers if header[0] == _PT_LOAD]
        size = max((header[2] + header[5] for header in loads), default=0)
        if not 0 < size <= _LARGEST_IMAGE:
            raise ImageError(f"{mapping.path} is damaged in the core")
        data = mmap.mmap(-1, size)
        for _, flags, offset, vaddr, _, filesz, _, _ in loads:
            self._fill(data, offset, bias + vaddr, filesz, partial=bool(flags & 2))
        data[40:48] = bytes(8)  # e_shoff: section headers are never mapped
        data[60:64] = bytes(4)
        for kind, _, offset, _, _, filesz, _, _ in headers:
            if kind == _PT_DYNAMIC and bias and offset + filesz <= size:
                _unrelocate(data, offset, filesz, bias)
        return Image(mapping.path, data)

    def _fill(self, data: mmap.mmap, offset: int, address: int, size: int, partial: bool) -> None:
        for at in range(0, size, CHUNK):
            step = min(CHUNK, size - at)
            try:
                data[offset + at : offset + at + step] = self.file.read(address + at, step)
            except FaultError:
                if not partial:
                    raise

    def _open_region(self, region: Region) -> Image:
        mapping = self._file_at(region.start)
        if mapping is None:
            raise ImageError("the core does not tell which file it is")
        if self._exe_mapping and mapping.path == self._exe_mapping.path:
            return self.open_image()
        return self._open_mapped(mapping)

    # Memory.

    def regions(self) -> list[Region]:
        """The mappings, in order of address."""
        return list(self._regions)

    @cached_property
    def _regions(self) -> tuple[Region, ...]:
        found = {load.start: self._region(load.start, load.end, load.permissions) for load in self.file.loads}
        for mapping in self._files:
            if self.file.load_at(mapping.start) is None:
                # gcore leaves out what can be read from the file, which is code above all.
                found[mapping.start] = Region(mapping.start, mapping.end, "r-xp", 1, mapping.path, mapping.offset)
        return tuple(sorted(found.values(), key=lambda region: region.start))

    def _region(self, start: int, end: int, permissions: str) -> Region:
        mapping = self._file_at(start)
        if mapping is not None:
            return Region(start, end, permissions, 1, mapping.path, mapping.offset + start - mapping.start)
        main = self._threads.get(self.pid)
        if main is not None and start <= main.registers[self.machine.sp] < end:
            return Region(start, end, permissions, 0, "[stack]")
        return Region(start, end, permissions, 0, "[heap]" if self._is_heap(start, permissions) else "")

    def _is_heap(self, start: int, permissions: str) -> bool:
        end = self._exe_end
        return end is not None and permissions.startswith("rw") and end <= start < end + BRK_RANGE

    @cached_property
    def _exe_end(self) -> int | None:
        exe = self._exe_mapping
        return None if exe is None else max(mapping.end for mapping in self._files if mapping.path == exe.path)

    def heap_chunks(self) -> Iterable[tuple[int, bytes]]:
        """malloc's memory as far as the core holds it, without guest RAM."""
        for region in self._regions:
            if region.inode or not region.permissions.startswith("rw"):
                continue
            if region.size <= LARGEST_ARENA or region.path == "[heap]":
                yield from self._chunks(region)

    def _chunks(self, region: Region) -> Iterator[tuple[int, bytes]]:
        load = self.file.load_at(region.start)
        for start, end in self.file.extents(load) if load else ():
            for address in range(start, end, CHUNK):
                with suppress(FaultError):
                    yield address, self.file.read(address, min(CHUNK, end - address))

    def missing(self) -> tuple[str, ...]:
        """What was cut off or damaged, and whether the heap is there at all."""
        if any(True for _ in self.heap_chunks()):
            return self.file.damage
        return (*self.file.damage, "the core holds none of the process's heap (/proc/PID/coredump_filter?)")

    def arguments(self) -> tuple[str, ...]:
        """The command line, from the bottom of the main thread's stack; empty where that is not in the core."""
        auxv = struct.pack("<QQ", AT_ENTRY, self.file.auxv.get(AT_ENTRY, 0))
        main = next((region for region in self._regions if region.path == "[stack]"), None)
        if main is None:
            return ()
        start = max(main.start, main.end - STACK_BOTTOM)
        try:
            data = self.file.read(start, main.end - start)
            words = struct.unpack_from(f"<{data.rindex(auxv) // 8}Q", data)
        except (FaultError, ValueError, struct.error):
            return ()
        return tuple(read_string(self.file, address) for address in _argument_vector(words))

    # Threads.

    def thread(self, tid: int) -> Thread | None:
        """One thread as the core holds it; it has no name unless tracer/save noted one."""
        thread = self._threads.get(tid)
        return None if thread is None else self._thread(thread)

    def threads(self) -> list[Thread]:
        """All threads, the main thread first."""
        return [
            self._thread(self._threads[tid]) for tid in sorted(self._threads, key=lambda tid: (tid != self.pid, tid))
        ]

    def _thread(self, thread: CoreThread) -> Thread:
        noted = _member(_member(self._facts, "threads"), str(thread.tid))
        name = noted.get("name")
        state = noted.get("state")
        call = self._system_call(thread, noted)
        return Thread(
            thread.tid,
            name if isinstance(name, str) else self.file.name if thread.tid == self.pid else "",
            state if isinstance(state, str) and len(state) == 1 else "S" if call else "R",
            call,
            None,
        )

    def _system_call(self, thread: CoreThread, noted: dict[str, Any]) -> SystemCall | None:
        """Where the first argument was lost, tracer/save may have noted it."""
        call = system_call(self.machine, thread.registers, self._instruction)
        first = noted.get("first_argument")
        if call is None or call.args[0] != LOST_ARGUMENT or not isinstance(first, int):
            return call
        return replace(call, args=(first, *call.args[1:]))

    def _instruction(self, address: int) -> bytes:
        """Four bytes of code: gcore leaves out what the files have."""
        try:
            return self.file.read(address, 4)
        except FaultError:
            module = self._stacks.module_at(address)
            if module is None:
                raise
            return module.image.read(address - module.bias, 4)

    def stack(self, tid: int) -> Stack:
        """A thread's stack from all its registers."""
        thread = self._threads.get(tid)
        if thread is None:
            return Stack(why_not="the core does not hold that thread")
        registers = {number: thread.registers[name] for name, number in self.machine.dwarf.items()}
        noted = _member(_member(self._facts, "threads"), str(tid))
        if noted.get("partial") is True:
            registers = {}  # it could not be stopped when the core was saved
        call = self._system_call(thread, noted)
        pc = call.pc if call else thread.registers[self.machine.pc]
        return self._stacks.unwind(pc, thread.registers[self.machine.sp], registers)

    def stack_at(self, pc: int, sp: int, others: Mapping[int, int] | None = None) -> Stack:
        """The stack from there on."""
        return self._stacks.unwind(pc, sp, others)

    def stack_above(self, address: int) -> Stack:
        """The stack from where a return address leads that is saved there."""
        return self._stacks.unwind_above(address)

    def function_at(self, address: int) -> tuple[str, int] | None:
        """(function, offset) by the symbols of the files at hand."""
        return self._stacks.function_at(address)

    @property
    def _stacks(self) -> Unwinder:
        if self._unwinder is None:
            self._unwinder = Unwinder(self, self._open_region, self.machine, lambda _region: None)
        return self._unwinder

    # What only tracer/save notes.

    @property
    def frozen(self) -> bool:
        """A core does not tell."""
        return False

    def knows_files(self) -> bool:
        """Only of a core that tracer/save made."""
        return "files" in self._facts

    def files(self) -> dict[int, str]:
        """Every open file descriptor, where noted."""
        noted = _member(self._facts, "files")
        return {int(fd): path for fd, path in noted.items() if _is_number(fd) and isinstance(path, str)}

    def file_of(self, fd: int) -> str | None:
        """What a file descriptor referred to, where noted."""
        return self.files().get(fd)

    def eventfd_count(self, fd: int) -> int | None:
        """The counter of an eventfd, where noted."""
        count = _member(self._facts, "eventfds").get(str(fd))
        return count if isinstance(count, int) and 0 <= count < 1 << 64 else None

    def epoll_holds(self, epoll_fd: int, fd: int) -> bool | None:
        """Whether an epoll set held `fd`, where noted."""
        held = _member(self._facts, "epolls").get(str(epoll_fd))
        return fd in held if isinstance(held, list) else None

    def kernel_stack(self, tid: int) -> tuple[str, ...]:
        """The thread's kernel functions, where noted."""
        noted = _member(_member(self._facts, "threads"), str(tid)).get("kernel_stack")
        return tuple(name for name in noted if isinstance(name, str)) if isinstance(noted, list) else ()

    def asleep_s(self, tid: int) -> float | None:
        """How long a thread had not run, where noted."""
        noted = _member(_member(self._facts, "threads"), str(tid)).get("asleep_s")
        return float(noted) if isinstance(noted, (int, float)) else None


def _is_number(text: str) -> bool:
    return len(text) <= _MAX_FD_DIGITS and text.isascii() and text.isdecimal()


def _argument_vector(words: tuple[int, ...]) -> tuple[int, ...]:
    """argv out of argc, argv, NULL, envp, NULL, the beginning of auxv; empty where it is not that."""
    nulls = [index for index, word in enumerate(words) if not word]
    for end in reversed(nulls[:-1][-_MAX_ENDS:]):
        # The number of arguments stands before them.
        for count in range(1, min(end, MAX_ARGUMENTS)):
            if words[end - count - 1] == count:
                return words[end - count : end]
    return ()


def _member(facts: dict[str, Any], name: str) -> dict[str, Any]:
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def _bias(headers: list[tuple[int, ...]], base: int) -> int:
    """What to add to the file's addresses, its first byte being at `base`."""
    for kind, _, offset, vaddr, _, _, _, _ in headers:
        if kind == _PT_LOAD and offset < PAGE:
            return base - (vaddr - offset)
    raise ImageError(f"the ELF file at {base:#x} is damaged")


def _unrelocate(data: mmap.mmap, offset: int, size: int, bias: int) -> None:
    """Take the loader's relocation off the addresses in the dynamic section."""
    for at in range(offset, offset + size - 15, 16):
        tag, value = struct.unpack_from("<QQ", data, at)
        if tag in _RELOCATED_TAGS and value >= bias:
            struct.pack_into("<Q", data, at + 8, value - bias)


def open_core(path: str, exe: str | None = None) -> CoreView:
    """The core at `path`, of the executable at `exe` or where the core says. Raises CoreError."""
    return CoreView(path, exe)
