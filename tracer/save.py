"""Evidence to send away: a core file without guest RAM, small enough to mail.

Knows: how to write an ELF core that gdb, drgn and tracer/core read, and what of a QEMU is worth it (tracer/own
tells what is its own): its data, heap, thread stacks; of mapped files their first pages (build ids) and what
was written to. Pages of zeros are holes. Beside what cores hold there is a note with what /proc knew: names of
threads, open files, eventfds. Memory is read first, since stopping a process can wake one of its loops; then it
stands still while registers and the upper ends of the stacks are taken. Does not know QEMU's structures.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from tracer import __version__
from tracer.corefile import (
    NT_AUXV,
    NT_FACTS,
    NT_FILE,
    NT_PRPSINFO,
    NT_PRSTATUS,
    OWN_NOTE,
    PF_R,
    PF_W,
    PF_X,
    PRPSINFO_NAME,
    PRPSINFO_PID,
    PRPSINFO_SIZE,
    PRSTATUS_PID,
    PRSTATUS_REGISTERS,
    PRSTATUS_REST,
    PT_LOAD,
    PT_NOTE,
)
from tracer.errors import FaultError, HostError, NotPermitted, pasted
from tracer.live import LiveView
from tracer.machine import HOST
from tracer.memory import CHUNK, PAGE, PAGE_PRESENT_OR_SWAPPED
from tracer.own import LeftOut, Own
from tracer.records import dataclass
from tracer.registers import NT_PRFPREG, ThreadRegisters, take_registers
from tracer.target import Region, ended, read_text

PAGE_OF_FILE = 1 << 61  # Documentation/admin-guide/mm/pagemap.rst: of a file, or shared
#: Pages that do not exist between ones that do are written as zeros up to that many; else left out.
GAP = 16
#: What is taken of each stack while the threads stand still (bytes), the red zone below it, and room for
#: the notes of threads that begin meanwhile.
STACK_TOP, RED_ZONE = 32 << 10, 128
SPARE_THREADS = 64
_PRSTATUS_SIZE = PRSTATUS_REGISTERS + 8 * len(HOST.registers) + PRSTATUS_REST
_NOTE_SIZE = _PRSTATUS_SIZE + HOST.floating_size + 2 * 20
MAX_LOADS = 60000
#: What is left free where the core is written, and how often that is looked at (bytes).
RESERVE, LOOK_EVERY = 32 << 20, 16 << 20
_ZEROS = bytes(PAGE)


@dataclass(frozen=True)
class Saved:
    """What was written, in bytes (`stored` without holes), what was not, and how long the process stood still."""

    path: str
    size: int
    stored: int
    left_out: LeftOut
    threads: int
    partial: int  # threads that could not be stopped
    stopped_s: float


@dataclass
class _Part:
    """One PT_LOAD: [start, end), of which `present` bytes go to the file at `offset`."""

    start: int
    end: int
    flags: int
    zeros_between: bool  # pages that do not exist are zeros
    wanted: bool
    offset: int = 0
    present: int = 0


def refuse_existing(*paths: str) -> None:
    """HostError if one of the files is there already, or their folder is not."""
    for path in paths:
        folder = os.path.dirname(os.path.abspath(path))
        if not os.path.isdir(folder):
            raise HostError(f"there is no folder {folder}", f"mkdir -p {pasted(folder)}")
        if os.path.lexists(path):
            raise _there_already(path)


def save(view: LiveView, path: str) -> Saved:
    """Write a core of the process to `path`, for its owner alone; on failure no file remains.

    Raises HostError where it cannot be written or is there already, and what take_registers raises.
    """
    refuse_existing(path)
    try:
        return _save(view, path)
    except PermissionError as error:
        command = f"sudo aio-trace inspect --pid {view.pid} --save {pasted(path)}"
        raise NotPermitted(f"process {view.pid} may not be looked at without root", command) from error
    except (ProcessLookupError, FileNotFoundError) as error:
        raise ended(view.pid) from error


def _there_already(path: str) -> HostError:
    return HostError(f"{path} is there already; it is not overwritten", f"ls -l {pasted(path)}    # or another name")


def _save(view: LiveView, path: str) -> Saved:
    regions = view.regions()
    own = Own(view, regions)
    parts = list(_parts(view.pid, regions, own))
    facts = _facts(view)
    threads = len(view.threads()) + SPARE_THREADS  # with a little for the facts, which grow by a mark
    fixed = _fixed_notes(view, regions)
    notes_at = 64 + 56 * (len(parts) + 1)
    data_at = notes_at + sum(map(len, fixed)) + threads * _NOTE_SIZE + len(facts) + PAGE & -PAGE
    size = _lay_out(parts, data_at)
    with _New(path) as file:
        _write_memory(view, parts, file)
        taken = take_registers(view.target, lambda found: _with_the_threads_stopped(view, regions, found))
        for address, data in taken.read:
            _overlay(parts, file, address, data)
        stopped_ms = round(taken.stopped_s * 1e3, 3)
        notes = _notes(view, taken.threads, fixed, facts, stopped_ms)
        if notes_at + len(notes) > data_at:
            raise HostError(f"process {view.pid} starts threads faster than they can be saved", "try again")
        file.write(notes_at, notes)
        file.write(0, _headers(parts, notes_at, len(notes)))
        stored = file.finish(size)
    partial = sum(thread.partial for thread in taken.threads)
    return Saved(path, size, stored, own.left_out, len(taken.threads), partial, taken.stopped_s)


def save_report(saved: Saved, path: str, text: str) -> None:
    """The report beside the core; without it the core is removed again."""
    try:
        with _New(path) as file:
            file.write(0, text.encode())
            file.finish(len(text.encode()))
    except BaseException:
        with suppress(OSError):
            os.unlink(saved.path)
        raise


# What is worth it.


def _parts(pid: int, regions: Sequence[Region], own: Own) -> Iterator[_Part]:
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    count = 0
    try:
        for region in regions:
            if region.path == "[vsyscall]":
                continue  # an address that programs have not
            ranges = own.ranges(region) if count < MAX_LOADS else ()
            parts = list(_parts_of(pagemap, region, ranges))
            count += len(parts)
            yield from parts
    finally:
        os.close(pagemap)


def _parts_of(pagemap: int, region: Region, ranges: Sequence[tuple[int, int]]) -> Iterator[_Part]:
    at = region.start
    for start, end in _wanted(pagemap, region, ranges):
        if at < start:
            yield _part(region, False, at, start)
        yield _part(region, True, start, end)
        at = end
    if at < region.end:
        yield _part(region, False, at, region.end)


def _wanted(pagemap: int, region: Region, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    whole = region.path == "[vdso]" or (region.inode and "w" in region.permissions)
    for start, end in ranges:
        part = replace(region, start=start, end=end, offset=region.offset + start - region.start)
        yield from [(start, end)] if whole else _runs(pagemap, part)


def _part(region: Region, wanted: bool, start: int = 0, end: int = 0) -> _Part:
    letters = (("r", PF_R), ("w", PF_W), ("x", PF_X))
    flags = sum(bit for letter, bit in letters if letter in region.permissions)
    return _Part(start or region.start, end or region.end, flags, not region.inode, wanted)


def _runs(pagemap: int, region: Region) -> Iterator[tuple[int, int]]:
    """Runs of pages that hold what no file holds; of a file's beginning the first page as well."""
    pages = array("Q")
    try:
        pages.frombytes(os.pread(pagemap, region.size // PAGE * 8, region.start // PAGE * 8))
    except (OSError, ValueError):
        yield region.start, region.end
        return
    start = end = -1
    for index, entry in enumerate(pages):
        of_file = region.inode and entry & PAGE_OF_FILE
        first = not index and region.inode and not region.offset
        if first or (entry & PAGE_PRESENT_OR_SWAPPED and not of_file):
            if start >= 0 and index - end <= (0 if region.inode else GAP):
                end = index + 1
                continue
            if start >= 0:
                yield region.start + start * PAGE, region.start + end * PAGE
            start, end = index, index + 1
    if start >= 0:
        yield region.start + start * PAGE, region.start + end * PAGE


def _lay_out(parts: list[_Part], at: int) -> int:
    """Give each part its place in the file; the file's size."""
    for part in parts:
        part.offset = at
        if part.wanted:
            at += part.end - part.start
    return at


# Memory.


class _New:
    """A new file that is removed again unless `finish` is reached; errors bear its name."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._finished = False
        self._unlooked = LOOK_EVERY

    def _check_room(self, size: int) -> None:
        """HostError rather than a full disk: others may need it, such as the guests' images."""
        self._unlooked += size
        if self._unlooked < LOOK_EVERY:
            return
        self._unlooked = 0
        found = os.statvfs(self._fd)
        room = found.f_bavail * found.f_frsize
        if room < RESERVE + LOOK_EVERY:
            raise HostError(
                f"{self._path} is not written: {room >> 20} MiB are free there, and {RESERVE >> 20} MiB must remain",
                f"df -h {self._folder}",
            )

    def __enter__(self) -> _New:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o600)
        except FileExistsError as error:
            raise _there_already(self._path) from error
        except OSError as error:
            raise self._not_written(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if not self._finished:
            with suppress(OSError):
                os.unlink(self._path)

    def write(self, offset: int, data: bytes) -> None:
        """All of `data` at `offset`, or HostError."""
        view = memoryview(data)
        try:
            self._check_room(len(data))
            while view:
                done = os.pwrite(self._fd, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise self._not_written(error) from error

    def write_pages(self, offset: int, data: bytes) -> None:
        """As write(), but pages of zeros stay holes, which read as zeros."""
        start = -1
        for at in range(0, len(data), PAGE):
            page = data[at : at + PAGE]
            empty = page == _ZEROS[: len(page)]
            if empty and start >= 0:
                self.write(offset + start, data[start:at])
                start = -1
            elif not empty and start < 0:
                start = at
        if start >= 0:
            self.write(offset + start, data[start:])

    def finish(self, size: int) -> int:
        """The file is whole; how much of it is on the disk, in bytes."""
        try:
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
            stored = os.fstat(self._fd).st_blocks * 512
        except OSError as error:
            raise self._not_written(error) from error
        self._finished = True
        return stored

    def _not_written(self, error: OSError) -> HostError:
        look = "df -h" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "ls -ld"
        return HostError(f"{self._path} cannot be written: {error.strerror}", f"{look} {self._folder}")

    @property
    def _folder(self) -> str:
        """As it is typed."""
        return pasted(os.path.dirname(os.path.abspath(self._path)))


def _write_memory(view: LiveView, parts: list[_Part], file: _New) -> None:
    """What vanished meanwhile is left out: a part ends where it can be read no more."""
    for part in parts:
        if not part.wanted:
            continue
        for address in range(part.start, part.end, CHUNK):
            try:
                data = view.memory.read(address, min(CHUNK, part.end - address))
            except FaultError:
                break
            file.write_pages(part.offset + address - part.start, data)
            part.present = address + len(data) - part.start
    if not any(part.present for part in parts):
        view.target.check_memory()
        raise ended(view.pid)


def _with_the_threads_stopped(
    view: LiveView, regions: Sequence[Region], threads: Sequence[ThreadRegisters]
) -> list[tuple[int, bytes]]:
    """What must be of the same instant as the registers; TargetExited where the rest is of another program."""
    view.target.check_memory()
    return list(_stack_tops(view, regions, threads))


def _stack_tops(
    view: LiveView, regions: Sequence[Region], threads: Sequence[ThreadRegisters]
) -> Iterator[tuple[int, bytes]]:
    """The part of each stack that belongs to the registers."""
    for thread in threads:
        sp = thread.values[HOST.sp]
        region = next((region for region in regions if region.start <= sp < region.end), None)
        if region is not None:
            start = max(region.start, sp - RED_ZONE)
            with suppress(FaultError):
                yield start, view.memory.read(start, min(region.end, sp + STACK_TOP) - start)


def _overlay(parts: list[_Part], file: _New, address: int, data: bytes) -> None:
    for part in parts:
        start, end = max(part.start, address), min(part.start + part.present, address + len(data))
        if start < end:
            file.write(part.offset + start - part.start, data[start - address : end - address])


# Headers and notes.


def _headers(parts: Sequence[_Part], notes_at: int, notes_size: int) -> bytes:
    count = len(parts) + 1
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 4, HOST.elf, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    rows = [struct.pack("<IIQQQQQQ", PT_NOTE, 0, notes_at, 0, 0, notes_size, 0, 4)]
    for part in parts:
        row = (PT_LOAD, part.flags, part.offset, part.start, 0, part.present, part.end - part.start, PAGE)
        rows.append(struct.pack("<IIQQQQQQ", *row))
    return head + b"".join(rows)


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    head = struct.pack("<III", len(name) + 1, len(data), kind)
    return head + (name + b"\0").ljust(len(name) + 4 & ~3, b"\0") + data.ljust(len(data) + 3 & ~3, b"\0")


def _fixed_notes(view: LiveView, regions: Sequence[Region]) -> tuple[bytes, ...]:
    """The notes that are known before the process is stopped."""
    with open(f"/proc/{view.pid}/auxv", "rb") as file:
        auxv = file.read()
    return (
        _note(b"CORE", NT_PRPSINFO, _process_info(view)),
        _note(b"CORE", NT_AUXV, auxv),
        _note(b"CORE", NT_FILE, _file_list(regions)),
    )


def _process_info(view: LiveView) -> bytes:
    """struct elf_prpsinfo."""
    data = bytearray(PRPSINFO_SIZE)
    main = view.thread(view.pid)
    data[1:2] = (main.state or "S").encode()[:1] if main else b"S"
    struct.pack_into("<i", data, PRPSINFO_PID, view.pid)
    name = view.target.name.encode()[:15]
    data[PRPSINFO_NAME : PRPSINFO_NAME + len(name)] = name
    arguments = " ".join(view.arguments()).encode()[:79]
    data[PRPSINFO_NAME + 16 : PRPSINFO_NAME + 16 + len(arguments)] = arguments
    return bytes(data)


def _file_list(regions: Sequence[Region]) -> bytes:
    mapped = [region for region in regions if region.inode and region.path.startswith("/")]
    triples = [struct.pack("<QQQ", region.start, region.end, region.offset // PAGE) for region in mapped]
    paths = [os.fsencode(region.path) + b"\0" for region in mapped]
    return struct.pack("<QQ", len(mapped), PAGE) + b"".join(triples) + b"".join(paths)


def _facts(view: LiveView) -> bytes:
    """What /proc tells and a core does not: tracer/core reads it."""
    files = view.files()
    counts = {fd: view.eventfd_count(fd) for fd, file in files.items() if "[eventfd]" in file}
    epolls = [fd for fd, file in files.items() if "[eventpoll]" in file]
    threads = {
        thread.tid: {
            "name": thread.name,
            "state": thread.state,
            "first_argument": thread.syscall.args[0] if thread.syscall else None,  # its result may take its place
            "asleep_s": view.asleep_s(thread.tid) if thread.syscall else None,
            "kernel_stack": list(view.kernel_stack(thread.tid)) if thread.state == "D" else [],
        }
        for thread in view.threads()
    }
    noted = {
        "saved_by": f"aio-trace {__version__}",
        "time": time.time(),
        "files": files,
        "eventfds": {fd: count for fd, count in counts.items() if count is not None},
        "epolls": {fd: _epoll_set(view.pid, fd) for fd in epolls},
        "threads": threads,
    }
    return json.dumps(noted).encode()


def _epoll_set(pid: int, fd: int) -> list[int]:
    try:
        return [int(number) for number in re.findall(r"^tfd:\s*(\d+)", read_text(f"/proc/{pid}/fdinfo/{fd}"), re.M)]
    except OSError:
        return []


def _notes(
    view: LiveView, threads: Sequence[ThreadRegisters], fixed: Sequence[bytes], facts: bytes, stopped_ms: float
) -> bytes:
    """All notes, the main thread's registers first."""
    in_order = sorted(threads, key=lambda thread: thread.tid != view.pid)
    noted = json.loads(facts)
    for thread in in_order:
        if thread.partial:
            noted["threads"].setdefault(str(thread.tid), {})["partial"] = True
    noted["stopped_ms"] = stopped_ms
    parts = [_registers_note(in_order[0]), *fixed]
    parts += [_registers_note(thread) for thread in in_order[1:]]
    parts.append(_note(OWN_NOTE, NT_FACTS, json.dumps(noted).encode()))
    return b"".join(parts)


def _registers_note(thread: ThreadRegisters) -> bytes:
    data = bytearray(_PRSTATUS_SIZE)
    struct.pack_into("<i", data, PRSTATUS_PID, thread.tid)
    values = [thread.values[name] for name in HOST.registers]
    struct.pack_into(f"<{len(values)}Q", data, PRSTATUS_REGISTERS, *values)
    struct.pack_into("<i", data, _PRSTATUS_SIZE - PRSTATUS_REST, int(bool(thread.floating)))
    note = _note(b"CORE", NT_PRSTATUS, bytes(data))
    return note + _note(b"CORE", NT_PRFPREG, thread.floating) if thread.floating else note
