"""Core files of a process: memory, threads and what the kernel noted beside them.

Knows: ELF64 ET_CORE as the kernel, gdb's gcore and tracer/save write it (x86-64), and how to tell it from
what else is called a dump. Does not know QEMU's structures. The file is mapped, not read: a core of 64
GiB costs no more than one of 64 KiB. A truncated core is used as far as it goes; `damage` says what is
missing. What cannot be used at all raises CoreError with one sentence.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NoReturn

from tracer.errors import CoreError, FaultError, folder_hint, pasted
from tracer.memory import PAGE
from tracer.records import dataclass
from tracer.target import SystemCall, syscall_name

ET_CORE, EM_X86_64 = 4, 62
PT_LOAD, PT_NOTE, PN_XNUM = 1, 4, 0xFFFF
PF_X, PF_W, PF_R = 1, 2, 4
AT_NULL = 0
NT_PRSTATUS, NT_PRPSINFO, NT_AUXV, NT_FILE = 1, 3, 6, 0x46494C45
#: tracer/save's own note: what /proc tells beside memory, as JSON.
OWN_NOTE, NT_FACTS = b"aio-trace", 1

#: struct user_regs_struct (sys/user.h) and where it lies in struct elf_prstatus (sys/procfs.h).
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
PRSTATUS_SIZE, PRSTATUS_PID, PRSTATUS_REGISTERS = 336, 32, 112
PRPSINFO_SIZE, PRPSINFO_PID, PRPSINFO_NAME = 136, 24, 40
SYSCALL_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
#: What a system call that a signal, a debugger or the dump itself interrupted returns: EINTR, ENOSYS, ERESTART….
INTERRUPTED = frozenset({-4, -38, -512, -513, -514, -516})

#: Names of the notes that dump-guest-memory writes (dump/dump.c), and how far from the start they are sought.
GUEST_NOTES = (b"QEMU", b"VMCOREINFO")
_NOTES_AHEAD = 64 << 10
_MAX_HEADERS, _MAX_NOTES, _MAX_MAPPINGS = 1 << 20, 1 << 18, 1 << 18

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

    @property
    def syscall(self) -> SystemCall | None:
        """The system call it was in, None if it ran in user space or was about to."""
        number = _signed(self.registers["orig_rax"])
        if number < 0 or _signed(self.registers["rax"]) not in INTERRUPTED:
            return None
        arguments = tuple(self.registers[name] for name in SYSCALL_ARGUMENTS)
        return SystemCall(
            number, syscall_name(number, arguments), arguments, self.registers["rsp"], self.registers["rip"]
        )


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


class CoreFile:
    """An open core file; close it. Also a MemoryReader."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._damage: list[str] = []
        self._data = _map(path)
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
            begin = load.offset + at - load.start
            parts.append(self._data[begin : begin + step])
            at += step
            left -= step
        if size < 0:
            raise FaultError(address, size)
        return b"".join(parts)

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
        headers = list(self._program_headers(offset, size, count))
        self.loads = tuple(sorted(self._loads(headers), key=lambda load: load.start))
        notes: dict[tuple[bytes, int], list[bytes]] = {}
        for kind, start, length in ((h[0], h[2], h[5]) for h in headers):
            if kind == PT_NOTE:
                for name, number, data in self._notes(start, length):
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
        head = self._data[:64]
        if head[:4] != b"\x7fELF":
            self._refuse(head)
        if len(head) < 64:
            raise CoreError(f"{self.path} ends within its first header", _TAKE_ONE)
        if (head[4] != 2 or head[18] != EM_X86_64) and self._data.find(b"QEMU\0", 0, _NOTES_AHEAD) >= 0:
            raise self._of_the_guest()  # as the guest's CPUs are: of 16 or 32 bits, or of another machine
        if head[4] != 2 or head[5] != 1:
            raise CoreError(f"{self.path} is not a core of a 64-bit little-endian process", _TAKE_ONE)
        kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum = struct.unpack_from("<HHIQQQIHHH", head, 16)
        if kind != ET_CORE:
            raise CoreError(
                f"{self.path} is a program or library, not a core file",
                f"aio-trace inspect --core FILE --exe {pasted(self.path)}",
            )
        if machine != EM_X86_64:
            raise CoreError(
                f"{self.path} is the core of another machine's process ({machine}); x86-64 is read here",
                f"file {pasted(self.path)}",
            )
        if phnum == PN_XNUM and shoff + 48 <= len(self._data):
            phnum = struct.unpack_from("<I", self._data, shoff + 44)[0]
        if phentsize < 56 or phnum > _MAX_HEADERS:
            raise CoreError(f"{self.path} is damaged: program headers of {phentsize} bytes", _TAKE_ONE)
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
        for number in range(count):
            at = offset + number * size
            if at + 56 > len(self._data):
                self._damage.append(f"{count - number} of {count} program headers are missing")
                return
            yield struct.unpack_from("<IIQQQQQQ", self._data, at)

    def _loads(self, headers: list[tuple[int, ...]]) -> Iterator[Load]:
        missing = 0
        for kind, flags, offset, vaddr, _, filesz, memsz, _ in headers:
            if kind == PT_LOAD:
                there = max(0, min(filesz, len(self._data) - offset))
                missing += filesz - there
                yield Load(vaddr, max(memsz, there), offset, there, flags)
        if missing:
            self._damage.append(f"the core is cut off: {missing / (1 << 20):.1f} MiB of memory are missing at its end")

    def _notes(self, start: int, size: int) -> Iterator[tuple[bytes, int, bytes]]:
        end = min(start + size, len(self._data))
        if end < start + size:
            self._damage.append("the core is cut off within its notes")
        at = start
        for _ in range(_MAX_NOTES):
            if at + 12 > end:
                return
            namesz, descsz, kind = struct.unpack_from("<III", self._data, at)
            name = at + 12
            desc = name + (namesz + 3 & ~3)
            at = desc + (descsz + 3 & ~3)
            if desc + descsz > end:
                self._damage.append("a note is damaged or cut off")
                return
            yield self._data[name : name + namesz].rstrip(b"\0"), kind, self._data[desc : desc + descsz]

    def _threads(self, notes: list[bytes]) -> tuple[CoreThread, ...]:
        found: dict[int, CoreThread] = {}
        for data in notes:
            if len(data) < PRSTATUS_REGISTERS + 8 * len(REGISTERS):
                self._damage.append("a thread's registers are damaged")
                continue
            (tid,) = struct.unpack_from("<i", data, PRSTATUS_PID)
            values = struct.unpack_from(f"<{len(REGISTERS)}Q", data, PRSTATUS_REGISTERS)
            found.setdefault(tid, CoreThread(tid, dict(zip(REGISTERS, values))))
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
                facts = json.loads(data)
            except (ValueError, RecursionError):
                self._damage.append("the note on open files is damaged")
                continue
            if isinstance(facts, dict):
                return facts
        return None


def _map(path: str) -> mmap.mmap:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            # To open a named pipe would wait for ever.
            hint = f"cat {pasted(path)} >qemu.core" if stat.S_ISFIFO(mode) else _TAKE_ONE
            raise CoreError(f"{path} is not a file", hint)
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise CoreError(f"there is no file {path}", folder_hint(path)) from error
    except IsADirectoryError as error:
        raise CoreError(f"{path} is a folder, not a core file", _TAKE_ONE) from error
    except PermissionError as error:
        raise CoreError(
            f"{path} may not be read: {error.strerror}", f"sudo aio-trace inspect --core {pasted(path)}"
        ) from error
    except OSError as error:
        raise CoreError(f"cannot read {path}: {error.strerror}", _TAKE_ONE) from error
    except ValueError as error:
        raise CoreError(f"{path} is empty", _TAKE_ONE) from error


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
