"""Core files of a process: memory, threads and what the kernel noted beside them.

Knows: ELF64 ET_CORE as the kernel, gdb's gcore and tracer/save write it (x86-64, aarch64), and how to tell it
from what else is called a dump. Does not know QEMU's structures. The file is read where it is asked for: a core of
64 GiB costs no more than one of 64 KiB, and one that shrinks meanwhile just ends earlier. A truncated core is
used as far as it goes; `damage` says what is missing. Nothing is believed of how much there is: each byte of the
file is part of one segment, and notes have bounds in number and size. What cannot be used at all raises
CoreError with one sentence.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, NoReturn

from tracer.errors import AioTraceError, CoreError, FaultError, folder_hint, pasted
from tracer.machine import MACHINES, X86_64, Machine
from tracer.memory import PAGE
from tracer.records import dataclass
from tracer.target import SystemCall, syscall_name
from tracer.text import read_json

ET_CORE = 4
PT_LOAD, PT_NOTE, PN_XNUM = 1, 4, 0xFFFF
PF_X, PF_W, PF_R = 1, 2, 4
AT_NULL = 0
NT_PRSTATUS, NT_PRPSINFO, NT_AUXV, NT_FILE = 1, 3, 6, 0x46494C45
#: tracer/save's own note: what /proc tells beside memory, as JSON.
OWN_NOTE, NT_FACTS = b"aio-trace", 1
_NOTES = frozenset({*((b"CORE", kind) for kind in (NT_PRSTATUS, NT_PRPSINFO, NT_AUXV, NT_FILE)), (OWN_NOTE, NT_FACTS)})

#: Where the registers lie in struct elf_prstatus (sys/procfs.h), and what stands behind them.
PRSTATUS_PID, PRSTATUS_REGISTERS, PRSTATUS_REST = 32, 112, 8
PRPSINFO_SIZE, PRPSINFO_PID, PRPSINFO_NAME = 136, 24, 40
#: The instruction of a system call on aarch64, and what stands for its first argument where the result took its
#: place: no file descriptor, no address.
SVC, LOST_ARGUMENT = bytes.fromhex("010000d4"), (1 << 64) - 1
#: What a system call that a signal, a debugger or the dump itself interrupted returns: EINTR, ENOSYS, ERESTART….
INTERRUPTED = frozenset({-4, -38, -512, -513, -514, -516})

#: Names of the notes that dump-guest-memory writes (dump/dump.c), and how far from the start they are sought.
GUEST_NOTES = (b"QEMU", b"VMCOREINFO")
_NOTES_AHEAD = 64 << 10
_MAX_HEADERS, _MAX_NOTES, _MAX_MAPPINGS, _MAX_THREADS = 1 << 18, 1 << 18, 1 << 18, 1 << 14
#: Bytes of the notes that are read, of all together; and of tracer/save's own.
_NOTES_SIZE, _FACTS_SIZE = 64 << 20, 4 << 20
#: Bytes of the file that are read at once.
_AT_ONCE = 64 << 10
_ADDRESSES = 1 << 64

_OTHER_DUMPS = (
    (b"KDUMP   ", "a dump of the guest's memory (kdump-compressed)"),
    (b"makedumpfile", "a dump of the guest's memory (makedumpfile)"),
    (b"LibvirtQemud", "a saved guest (virsh save or dump)"),
    (b"QEVM", "a saved guest (QEMU's migration stream)"),
)
_PACKED = (
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -d"),
    (b"\x1f\x8b", "gzip", "gunzip -k"),
    (b"\xfd7zXZ", "xz", "xz -dk"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -d"),
    (b"BZh", "bzip2", "bunzip2 -k"),
)
_READ = {machine.elf: machine for machine in MACHINES}
_TAKE_ONE = "gcore -o qemu.core PID"


@dataclass(frozen=True)
class Load:
    """One PT_LOAD: addresses in the process, and how many bytes of it are in the file."""

    start: int
    size: int
    offset: int
    present: int
    flags: int

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def permissions(self) -> str:
        """As in /proc/PID/maps; a core does not tell shared from private."""
        letters = ((PF_R, "r"), (PF_W, "w"), (PF_X, "x"))
        return "".join(letter if self.flags & bit else "-" for bit, letter in letters) + "p"


@dataclass(frozen=True)
class FileMapping:
    """One entry of NT_FILE: a mapped file; `offset` in bytes."""

    start: int
    end: int
    offset: int
    path: str


@dataclass(frozen=True)
class CoreThread:
    """One NT_PRSTATUS: a thread and its registers by name."""

    tid: int
    registers: Mapping[str, int]


def system_call(machine: Machine, registers: Mapping[str, int], code: Callable[[int], bytes]) -> SystemCall | None:
    """The system call that a thread was in by its registers, None if it ran in user space or was about to.

    `code` gives the instruction of four bytes at an address; it may raise what AioTraceError is the parent of.
    """
    found = _of_x86_64(registers) if machine is X86_64 else _of_aarch64(registers, code)
    if found is None:
        return None
    number, arguments, pc = found
    return SystemCall(number, syscall_name(number, arguments, machine), arguments, registers[machine.sp], pc)


_Call = tuple[int, tuple[int, ...], int]  # number, arguments, where the thread goes on


def _of_x86_64(registers: Mapping[str, int]) -> _Call | None:
    number = _signed(registers["orig_rax"])
    if number < 0 or _signed(registers["rax"]) not in INTERRUPTED:
        return None
    arguments = tuple(registers[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))
    return number, arguments, registers["rip"]


def _of_aarch64(registers: Mapping[str, int], code: Callable[[int], bytes]) -> _Call | None:
    """A call that will be made again stands at its instruction, with its arguments; else x0 has its result.

    It goes on behind the instruction, which is where a live thread shows itself.
    """
    arguments, pc = tuple(registers[f"x{number}"] for number in range(6)), registers["pc"]
    with suppress(AioTraceError):
        if code(pc) == SVC:
            return registers["x8"], arguments, pc + len(SVC)
        if code(pc - len(SVC)) == SVC and _signed(registers["x0"]) in INTERRUPTED:
            return registers["x8"], (LOST_ARGUMENT, *arguments[1:]), pc
    return None


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


class CoreFile:
    """An open core file; close it. Also a MemoryReader."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._damage: list[str] = []
        self._data = _open(path)
        try:
            self._read()
        except BaseException:
            self._data.close()
            raise

    def close(self) -> None:
        """Give the file back."""
        self._data.close()

    @property
    def damage(self) -> tuple[str, ...]:
        """What is missing or could not be understood, in words."""
        return tuple(self._damage)

    # Memory.

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes at `address`, or FaultError where the core does not hold them."""
        parts = []
        at, left = address, size
        while left > 0:
            load = self.load_at(at)
            there = load.start + load.present - at if load else 0
            if load is None or there <= 0:
                raise FaultError(address, size)
            step = min(left, there)
            found = self._data.read(load.offset + at - load.start, step)
            if len(found) != step:
                raise FaultError(address, size)
            parts.append(found)
            at += step
            left -= step
        if size < 0:
            raise FaultError(address, size)
        return b"".join(parts)

    def extents(self, load: Load) -> Iterator[tuple[int, int]]:
        """[start, end) of the addresses in it of which the file has more than a hole, which reads as zeros."""
        for start, end in self._data.extents(load.offset, load.present):
            yield load.start + start - load.offset, load.start + end - load.offset

    def load_at(self, address: int) -> Load | None:
        """The segment around `address`, or None."""
        index = bisect_right(self._starts, address) - 1
        found = self.loads[index] if index >= 0 else None
        return found if found and address < found.end else None

    @cached_property
    def _starts(self) -> list[int]:
        return [load.start for load in self.loads]

    # The inside.

    def _read(self) -> None:
        offset, size, count = self._header()
        headers = [header for header in self._program_headers(offset, size, count) if header[0] in (PT_LOAD, PT_NOTE)]
        self.loads = tuple(sorted(self._loads(headers), key=lambda load: load.start))
        notes: dict[tuple[bytes, int], list[bytes]] = {}
        for name, number, data in self._notes([(h[2], h[5]) for h in headers if h[0] == PT_NOTE]):
            notes.setdefault((name, number), []).append(data)
        if any(name in GUEST_NOTES for name, _ in notes):
            raise self._of_the_guest()
        self.auxv = _auxiliary(notes.get((b"CORE", NT_AUXV), []))
        self.threads = self._threads(notes.get((b"CORE", NT_PRSTATUS), []))
        self.files = self._files(notes.get((b"CORE", NT_FILE), []))
        self.pid, self.name = self._process(notes.get((b"CORE", NT_PRPSINFO), []))
        self.facts = self._facts(notes.get((OWN_NOTE, NT_FACTS), []))
        if not any(load.present for load in self.loads):
            raise CoreError(f"{self.path} holds no memory: it is cut off or damaged", _TAKE_ONE)
        if not self.threads:
            self._damage.append("its notes are missing or cut off, and with them threads, registers and names of files")

    def _header(self) -> tuple[int, int, int]:
        """Where the program headers are: offset, size of one, count."""
        head = self._data.read(0, 64)
        if head[:4] != b"\x7fELF":
            self._refuse(head)
        if len(head) < 64:
            raise CoreError(f"{self.path} ends within its first header", _TAKE_ONE)
        if (head[4] != 2 or head[18] not in _READ) and b"QEMU\0" in self._data.read(0, _NOTES_AHEAD):
            raise self._of_the_guest()  # as the guest's CPUs are: of 16 or 32 bits, or of another machine
        if head[4] != 2 or head[5] != 1:
            raise CoreError(f"{self.path} is not a core of a 64-bit little-endian process", _TAKE_ONE)
        kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum = struct.unpack_from("<HHIQQQIHHH", head, 16)
        if kind != ET_CORE:
            raise CoreError(
                f"{self.path} is a program or library, not a core file",
                f"aio-trace inspect --core FILE --exe {pasted(self.path)}",
            )
        if machine not in _READ:
            raise CoreError(
                f"{self.path} is the core of another machine's process ({machine}); x86-64 and aarch64 are read here",
                f"file {pasted(self.path)}",
            )
        self.machine = _READ[machine]
        if phnum == PN_XNUM and len(count := self._data.read(shoff + 44, 4)) == 4:
            phnum = struct.unpack("<I", count)[0]
        if phentsize != 56 or phnum > _MAX_HEADERS:
            raise CoreError(f"{self.path} is damaged: {phnum} program headers of {phentsize} bytes", _TAKE_ONE)
        return phoff, phentsize, phnum

    def _of_the_guest(self) -> CoreError:
        return CoreError(
            f"{self.path} holds the guest's memory (virsh dump --memory-only, dump-guest-memory), not QEMU's own",
            f"{_TAKE_ONE}; or, far smaller: aio-trace inspect --pid PID --save FILE",
        )

    def _refuse(self, head: bytes) -> NoReturn:
        for magic, what in _OTHER_DUMPS:
            if head.startswith(magic):
                raise CoreError(f"{self.path} is {what}, not a core of QEMU itself", _TAKE_ONE)
        for magic, packer, command in _PACKED:
            if head.startswith(magic):
                raise CoreError(f"{self.path} is compressed ({packer})", f"{command} {pasted(self.path)}")
        raise CoreError(f"{self.path} is not a core file", _TAKE_ONE)

    def _program_headers(self, offset: int, size: int, count: int) -> Iterator[tuple[int, ...]]:
        at_once = max(1, _AT_ONCE // size)
        for first in range(0, count, at_once):
            data = self._data.read(offset + first * size, min(at_once, count - first) * size)
            for number in range(first, min(first + at_once, count)):
                at = (number - first) * size
                if at + 56 > len(data):
                    self._damage.append(f"{count - number} of {count} program headers are missing")
                    return
                yield struct.unpack_from("<IIQQQQQQ", data, at)

    def _loads(self, headers: list[tuple[int, ...]]) -> Iterator[Load]:
        missing = shared = outside = taken = 0
        loads = (header for header in headers if header[0] == PT_LOAD)
        for _, flags, offset, vaddr, _, filesz, memsz, _ in sorted(loads, key=lambda header: header[2]):
            there = max(0, min(filesz, len(self._data) - offset))
            missing += filesz - there
            if there and offset < taken:
                shared, there = shared + there, 0
            taken = max(taken, offset + there)
            if vaddr + max(memsz, there) > _ADDRESSES:
                outside += 1
                continue
            yield Load(vaddr, max(memsz, there), offset, there, flags)
        if missing:
            self._damage.append(f"the core is cut off: {missing / (1 << 20):.1f} MiB of memory are missing at its end")
        if shared or outside:
            self._damage.append("the core is damaged: segments share bytes of the file, or lie outside of any memory")

    def _notes(self, places: list[tuple[int, int]]) -> Iterator[tuple[bytes, int, bytes]]:
        """Name, kind and content of those that are of use here. Of a sound core's, all are within the bounds."""
        left, size_left = _MAX_NOTES, _NOTES_SIZE
        for start, size in places:
            at, end = start, min(start + size, len(self._data))
            if end < start + size:
                self._damage.append("the core is cut off within its notes")
            while at + 12 <= end:
                head = self._data.read(at, 12 + 16)
                if len(head) < 12:
                    break
                namesz, descsz, kind = struct.unpack_from("<III", head)
                desc = at + 12 + (namesz + 3 & ~3)
                at = desc + (descsz + 3 & ~3)
                name = head[12 : 12 + namesz].rstrip(b"\0")
                wanted = name in GUEST_NOTES or (name, kind) in _NOTES
                left, size_left = left - 1, size_left - descsz * wanted
                if left < 0 or size_left < 0:
                    self._damage.append("the core is damaged: it has more notes than any process could need")
                    return
                if desc + descsz > end:
                    self._damage.append("a note is damaged or cut off")
                    break
                if wanted:
                    yield name, kind, self._data.read(desc, descsz)

    def _threads(self, notes: list[bytes]) -> tuple[CoreThread, ...]:
        found: dict[int, CoreThread] = {}
        names = self.machine.registers
        if len(notes) > _MAX_THREADS:
            self._damage.append(f"the core has {len(notes)} threads, of which {_MAX_THREADS} are looked at")
        for data in notes[:_MAX_THREADS]:
            if len(data) < PRSTATUS_REGISTERS + 8 * len(names):
                self._damage.append("a thread's registers are damaged")
                continue
            (tid,) = struct.unpack_from("<i", data, PRSTATUS_PID)
            values = struct.unpack_from(f"<{len(names)}Q", data, PRSTATUS_REGISTERS)
            found.setdefault(tid, CoreThread(tid, dict(zip(names, values))))
        return tuple(found.values())

    def _process(self, notes: list[bytes]) -> tuple[int, str]:
        """pid and name; without the note, the main thread is the one with the lowest id."""
        for data in notes:
            if len(data) >= PRPSINFO_NAME + 16:
                (pid,) = struct.unpack_from("<i", data, PRPSINFO_PID)
                name = data[PRPSINFO_NAME : PRPSINFO_NAME + 16].partition(b"\0")[0].decode("utf-8", "replace")
                if any(thread.tid == pid for thread in self.threads):
                    return pid, name
        return min((thread.tid for thread in self.threads), default=0), ""

    def _files(self, notes: list[bytes]) -> tuple[FileMapping, ...]:
        for data in notes:
            try:
                return tuple(_file_mappings(data))
            except (struct.error, IndexError, OverflowError):
                self._damage.append("the list of mapped files is damaged")
        return ()

    def _facts(self, notes: list[bytes]) -> dict[str, Any] | None:
        for data in notes:
            try:
                facts = read_json(data[: _FACTS_SIZE + 1])  # one that is longer is cut, and so damaged
            except (ValueError, RecursionError):
                self._damage.append("the note on open files is damaged")
                continue
            if isinstance(facts, dict):
                return facts
        return None


class _Bytes:
    """A file's bytes. They are not mapped: to touch what was cut off meanwhile would end this process."""

    def __init__(self, fd: int) -> None:
        """The descriptor is ours from now on."""
        self._fd = fd
        self._size = os.fstat(fd).st_size

    def __len__(self) -> int:
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes: fewer where the file ends, or cannot be read."""
        size = max(0, min(size, self._size - offset))
        parts = []
        while size > 0:
            try:
                part = os.pread(self._fd, size, offset)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def extents(self, start: int, size: int) -> Iterator[tuple[int, int]]:
        """[start, end) of what is no hole, as far as the file system tells."""
        end = min(start + size, self._size)
        while start < end:
            try:
                first = os.lseek(self._fd, start, os.SEEK_DATA)
                last = os.lseek(self._fd, first, os.SEEK_HOLE) if first < end else end
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole is left
                    return
                first, last = start, end
            if first < min(last, end):
                yield first, min(last, end)
            start = max(last, start + 1)

    def close(self) -> None:
        os.close(self._fd)


def _open(path: str) -> _Bytes:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            # To open a named pipe would wait for ever.
            hint = f"cat {pasted(path)} >qemu.core" if stat.S_ISFIFO(mode) else _TAKE_ONE
            raise CoreError(f"{path} is not a file", hint)
        if stat.S_ISDIR(mode):
            raise CoreError(f"{path} is a folder, not a core file", _TAKE_ONE)
        found = _Bytes(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise CoreError(f"there is no file {path}", folder_hint(path)) from error
    except PermissionError as error:
        raise CoreError(
            f"{path} may not be read: {error.strerror}", f"sudo aio-trace inspect --core {pasted(path)}"
        ) from error
    except OSError as error:
        raise CoreError(f"cannot read {path}: {error.strerror}", _TAKE_ONE) from error
    except ValueError as error:
        raise CoreError(f"{path!r} is no name of a file", _TAKE_ONE) from error
    if not len(found):
        found.close()
        raise CoreError(f"{path} is empty", _TAKE_ONE)
    return found


def _auxiliary(notes: list[bytes]) -> dict[int, int]:
    found: dict[int, int] = {}
    for data in notes:
        for kind, value in struct.iter_unpack("<QQ", data[: len(data) // 16 * 16]):
            if kind == AT_NULL:
                break
            found.setdefault(kind, value)
    return found


def _file_mappings(data: bytes) -> Iterator[FileMapping]:
    """NT_FILE: count, page size, triples of start, end, offset in pages; then the paths."""
    count, page = struct.unpack_from("<QQ", data)
    if count > _MAX_MAPPINGS or not 0 < page <= 1 << 30:
        raise IndexError(count)
    paths = data[16 + 24 * count :].split(b"\0")
    for number in range(count):
        start, end, offset = struct.unpack_from("<QQQ", data, 16 + 24 * number)
        if start < end:
            yield FileMapping(start, end, offset * page, os.fsdecode(paths[number]))


def aligned(address: int) -> int:
    """The start of the page around `address`."""
    return address & ~(PAGE - 1)
