"""ELF images, read straight from the file.

Knows: segments, the dynamic section, symbols, notes, the unwind table's function bounds, PLT stubs
and the version string QEMU prints. Addresses are those of the file, before relocation. Does not know
/proc (a path is a path), instructions, or what QEMU's functions do. Everything is read with struct
through one descriptor, and only where it is asked for: a QEMU of 30 MB costs a few milliseconds. A damaged
file raises ImageError, whatever is wrong with it, and so does one that is cut short meanwhile.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import cached_property
from types import TracebackType

from tracer.errors import ImageError, folder_hint, pasted
from tracer.records import dataclass

EM_X86_64 = 62
EM_AARCH64 = 183
_MACHINES = {EM_X86_64: "x86_64", EM_AARCH64: "aarch64"}

_ET_DYN = 3
_PT_LOAD, _PT_DYNAMIC, _PT_NOTE, _PT_GNU_EH_FRAME = 1, 2, 4, 0x6474E550
_PF_X = 1
_SHT_SYMTAB, _SHT_NOBITS = 2, 8
_DT_PLTRELSZ, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ = 2, 4, 5, 6, 7, 8
_DT_STRSZ, _DT_JMPREL, _DT_GNU_HASH = 10, 23, 0x6FFFFEF5
_NT_GNU_BUILD_ID = 3
_NT_STAPSDT = 3
_STT_FUNC = 2
_STT_OBJECT = 1
_SYMBOL_SIZE = _RELA_SIZE = 24

# A walk that a sound file ends long before; a damaged one must not take hours.
_MAX_CHAIN = 4096
_MAX_HITS = 4096
_MAX_TABLE = 1 << 20
# Bytes that are read at once, and of a whole file: a few times what any QEMU has in one section, and with all
# of its debug information. A file with holes may claim to be as large as it likes.
_MAX_READ = 1 << 26
_MAX_WHOLE = 1 << 28

# What each program prints for --version: system/vl.c, qemu-img.c, storage-daemon/qemu-storage-daemon.c,
# qemu-io.c, and qemu-nbd.c and scsi/qemu-pr-helper.c. The last three print their own name with %s.
_VERSION_STRINGS = (
    (b"QEMU emulator version ", b""),
    (b"qemu-storage-daemon version ", b""),
    (b"qemu-img version ", b""),
    (b"%s version ", b"QEMU Project developers"),
    (b"%s ", b"QEMU Project developers"),
)
_VERSION = rb"(\d+\.\d+(?:\.\d+)?[^\n\0]{0,120}?)(?=, Copyright|[\n\0])"
_TEXT_LIMIT = 200


@dataclass(frozen=True)
class Segment:
    """One PT_LOAD: where it lies in memory and in the file; sizes in bytes."""

    vaddr: int
    offset: int
    filesz: int
    memsz: int
    flags: int

    @property
    def executable(self) -> bool:
        return bool(self.flags & _PF_X)


@dataclass(frozen=True)
class Section:
    """One section header; `offset` and `size` in bytes of the file."""

    name: str
    kind: int
    address: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class Symbol:
    """A defined symbol; `size` is 0 where the file does not say."""

    name: str
    address: int
    size: int


@dataclass(frozen=True)
class StaticProbe:
    """One NT_STAPSDT note (a USDT probe, as <sys/sdt.h> makes them); `semaphore` is 0 where there is none."""

    provider: str
    name: str
    address: int
    semaphore: int
    arguments: str


@dataclass(frozen=True)
class Bounds:
    """A function's (or a part's) first address and the one after its last."""

    start: int
    end: int

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end


@dataclass(frozen=True)
class _SymbolTable:
    """File ranges of a symbol table and its strings."""

    offset: int
    size: int
    strings: int
    strings_size: int


class _OpenFile:
    """A file's bytes. They are not mapped: to touch what was cut off meanwhile would end this process."""

    def __init__(self, fd: int) -> None:
        """The descriptor is ours from now on."""
        self.fd = fd
        self._size = os.fstat(fd).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        return os.pread(self.fd, part.stop - part.start, part.start)

    def close(self) -> None:
        os.close(self.fd)


class Image:
    """A read-only ELF file; use Image.open(). Close it, or use it as a context manager."""

    def __init__(self, path: str, data: mmap.mmap | bytes | _OpenFile, debug: bool = False) -> None:
        """`debug`: a file that holds symbols and debug information only; its segments may lack their bytes."""
        self._path = path
        self._data = data
        ident = self._bytes(0, 16)
        if ident[:4] != b"\x7fELF":
            raise ImageError(f"{path} is not an ELF file")
        if ident[4] != 2 or ident[5] != 1:
            raise ImageError(f"{path} is not a 64-bit little-endian ELF file")
        (self._type, machine, _, self._entry, phoff, self._shoff, _, _, phentsize, phnum) = self._unpack(
            "<HHIQQQIHHH", 16
        )
        if machine not in _MACHINES:
            raise ImageError(f"{path} is for machine {machine}, not x86-64 or aarch64")
        self._machine = _MACHINES[machine]
        self._debug = debug
        if not debug and self._has_no_code():
            raise ImageError(
                f"{path} is a debug file: it has names and debug information, but no code",
                "give the executable itself; its debug file is found below /usr/lib/debug, or beside it",
            )
        self._headers = tuple(self._program_headers(phoff, phentsize, phnum))
        self._raw_headers = self._bytes(0, 64) + self._bytes(phoff, phentsize * phnum)
        self._segments = tuple(
            Segment(vaddr, offset, filesz, memsz, flags)
            for kind, flags, offset, vaddr, filesz, memsz in self._headers
            if kind == _PT_LOAD
        )
        if not self._segments:
            raise ImageError(f"{path} has no loadable segment")

    @classmethod
    def open(cls, path: str | os.PathLike[str], debug: bool = False) -> Image:
        """Map the file (a path such as /proc/PID/exe will do); ImageError if that cannot be."""
        name = os.fspath(path)
        try:
            # To open a named pipe would wait for ever, and to open a device may do something.
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise ImageError(f"{name} is not a file", f"ls -ld {pasted(name)}")
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ImageError(f"cannot read {name}: {error.strerror}", folder_hint(name)) from error
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ImageError(f"cannot read {name}: {reason}", f"ls -l {pasted(name)}") from error
        return cls.of_descriptor(fd, name, debug)

    @classmethod
    def of_descriptor(cls, fd: int, name: str, debug: bool = False) -> Image:
        """The file behind `fd`, which is the image's from now on, also where this fails; `name` is for errors."""
        data = _OpenFile(fd)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError(f"{name} is not a file", f"ls -ld {pasted(name)}")
            if not len(data):
                raise ImageError(f"cannot read {name}: the file is empty", f"ls -l {pasted(name)}")
            return cls(name, data, debug)
        except ImageError as error:
            data.close()
            error.hint = error.hint or f"file -L {pasted(name)}"
            raise
        except BaseException:
            data.close()
            raise

    @classmethod
    def of_bytes(cls, name: str, data: bytes, debug: bool = False) -> Image:
        """An ELF file in memory; `name` is what errors call it."""
        return cls(name, data, debug)

    def close(self) -> None:
        if not isinstance(self._data, bytes):
            self._data.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What the headers say.

    @property
    def path(self) -> str:
        return self._path

    @property
    def machine(self) -> str:
        """ "x86_64" or "aarch64"."""
        return self._machine

    @property
    def is_pie(self) -> bool:
        return bool(self._type == _ET_DYN)

    @property
    def entry(self) -> int:
        return int(self._entry)

    @property
    def headers(self) -> bytes:
        """The ELF header and the program headers, as they are in the file."""
        return self._raw_headers

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    @cached_property
    def build_id(self) -> str | None:
        """The NT_GNU_BUILD_ID note as hex, or None."""
        for kind, _, offset, _, size, _ in self._headers:
            if kind == _PT_NOTE:
                found = self._build_id_in(offset, offset + size)
                if found:
                    return found
        return None

    @cached_property
    def static_probes(self) -> tuple[StaticProbe, ...]:
        """The probes of .note.stapsdt, wherever prelink has moved them to."""
        notes = self.section(".note.stapsdt")
        if notes is None:
            return ()
        base = self.section(".stapsdt.base")
        raw = self.section_bytes(notes)
        return tuple(_static_probes(raw, base.address if base else None))

    def section(self, name: str) -> Section | None:
        """The section of that name; None if there is none (or no section headers)."""
        return next((section for section in self._sections if section.name == name), None)

    def whole(self) -> bytes:
        """All of the file; ImageError where that is too much."""
        return self._bytes(0, len(self._data), _MAX_WHOLE)

    def chunks(self, size: int) -> Iterator[bytes]:
        """All of the file, `size` bytes at a time."""
        for at in range(0, len(self._data), size):
            yield self._bytes(at, min(size, len(self._data) - at))

    def section_bytes(self, section: Section) -> bytes:
        return b"" if section.kind == _SHT_NOBITS else self._bytes(section.offset, section.size)

    # Memory as the loader will lay it out.

    def segment_at(self, vaddr: int) -> Segment | None:
        return next((s for s in self._segments if s.vaddr <= vaddr < s.vaddr + s.memsz), None)

    def offset_of(self, vaddr: int, size: int = 1) -> int:
        """The file offset behind `vaddr`; ImageError unless `size` bytes there come from the file."""
        segment = self.segment_at(vaddr)
        if segment is None or size < 0 or vaddr + size > segment.vaddr + segment.filesz:
            raise ImageError(f"{self._path}: {size} bytes at {vaddr:#x} are not in the file")
        return vaddr - segment.vaddr + segment.offset

    def read(self, vaddr: int, size: int) -> bytes:
        """Exactly `size` bytes at `vaddr`, or ImageError."""
        return self._bytes(self.offset_of(vaddr, size), size)

    def is_executable(self, vaddr: int) -> bool:
        segment = self.segment_at(vaddr)
        return segment is not None and segment.executable

    def string_at(self, vaddr: int) -> str | None:
        """The C string at `vaddr`, or None if that is no short printable one."""
        segment = self.segment_at(vaddr)
        if segment is None:
            return None
        size = min(_TEXT_LIMIT, segment.vaddr + segment.filesz - vaddr)
        text, end, _ = self.read(vaddr, size).partition(b"\0") if size > 0 else (b"", b"", b"")
        return text.decode("ascii") if end and text.isascii() else None

    # Symbols.

    def symbol(self, name: str) -> Symbol | None:
        """The defined symbol of that name: .dynsym (by its hash table), then .symtab."""
        exported = self.exported(name)
        if exported is not None:
            return exported
        return next((found for found in self._in_symtab(name.encode()) if found.name == name), None)

    def exported(self, name: str) -> Symbol | None:
        """The defined symbol of that name in .dynsym."""
        for index in self._dynamic_candidates(name.encode()):
            found = self._symbol_at(self._dynsym, index)
            if found is not None and found.name == name:
                return found
        return None

    def strings(self, wanted: bytes, whole: bool = True) -> tuple[int, ...]:
        """The addresses of a C string in the read-only data; unless `whole`, of those that end with it.

        Linkers keep one copy of strings with a common end, so its address may lie inside a longer one.
        """
        found = []
        for start, data in self._constant_parts():
            at = data.find(wanted + b"\0")
            for _ in range(_MAX_HITS):
                if at < 0:
                    break
                begin = at if whole else data.rfind(b"\0", 0, at) + 1
                found.append(start + begin)
                at = data.find(wanted + b"\0", at + 1)
        return tuple(found)

    @property
    def has_symtab(self) -> bool:
        """Whether there is a .symtab, which names the functions that are not exported, too."""
        return self._symtab is not None

    def functions_named(self, name: str) -> tuple[Symbol, ...]:
        """All functions in .dynsym and .symtab of that name, or with a suffix to it such as `.isra.0`."""
        exported = self.exported(name)
        found = [] if exported is None else [exported]
        table = self._symtab
        if table is not None:
            found += self._suffixed(table, name.encode())
        return tuple(dict.fromkeys(found))

    def variables_named(self, name: str) -> tuple[Symbol, ...]:
        """All variables in .symtab of that name, or with a suffix to it."""
        table = self._symtab
        return () if table is None else tuple(dict.fromkeys(self._suffixed(table, name.encode(), _STT_OBJECT)))

    def _suffixed(self, table: _SymbolTable, name: bytes, kind: int = _STT_FUNC) -> Iterator[Symbol]:
        rows = self._bytes(table.offset, table.size)
        strings = self._bytes(table.strings, table.strings_size)
        at = strings.find(name)
        for _ in range(_MAX_HITS):
            if at < 0:
                return
            if strings[at + len(name) : at + len(name) + 1] in (b"\0", b"."):
                for index in _rows(rows, _SYMBOL_SIZE, 0, struct.pack("<I", at)):
                    found = self._symbol_at(table, index)
                    if found is not None and rows[index * _SYMBOL_SIZE + 4] & 15 == kind:
                        yield found
            at = strings.find(name, at + 1)

    def symbol_names_at(self, address: int) -> tuple[str, ...]:
        """Names of all symbols defined at exactly that address."""
        pattern = struct.pack("<Q", address & (1 << 64) - 1)
        names = []
        for table in self._tables:
            for index in _rows(self._bytes(table.offset, table.size), _SYMBOL_SIZE, 8, pattern):
                found = self._symbol_at(table, index)
                if found is not None and found.name not in names:
                    names.append(found.name)
        return tuple(names)

    def plt_name(self, address: int) -> str | None:
        """The import that the PLT stub (.plt, .plt.got, .plt.sec) at `address` jumps to, or None."""
        try:
            slot = self._plt_slot(address)
        except (ImageError, struct.error):
            return None
        return None if slot is None else self.import_at(slot)

    def import_at(self, slot: int) -> str | None:
        """The symbol whose address the loader writes to `slot` (an entry of the GOT), or None."""
        pattern = struct.pack("<Q", slot & (1 << 64) - 1)
        for table in self._relocations:
            for index in _rows(table, _RELA_SIZE, 0, pattern):
                number = struct.unpack_from("<Q", table, index * _RELA_SIZE + 8)[0] >> 32
                if number:
                    return self._symbol_name(self._dynsym, number)
        return None

    def bounds(self, address: int) -> Bounds | None:
        """The function (or cold part) around `address`, by the unwind table; else by a symbol's size."""
        found = self._unwind_bounds(address)
        if found is not None:
            return found
        for name in self.symbol_names_at(address):
            symbol = self.symbol(name)
            if symbol is not None and symbol.size:
                return Bounds(symbol.address, symbol.address + symbol.size)
        return None

    def frame_entry(self, address: int) -> tuple[int, int] | None:
        """(start, entry): the last function that starts at or before `address`, and its entry in .eh_frame."""
        if self._unwind_table is None:
            return None
        base, _, table = self._unwind_table
        row = bisect_right(_Starts(table), address - base) - 1
        if row < 0:
            return None
        start, frame = struct.unpack_from("<ii", table, row * 8)
        return base + start, base + frame

    def functions_in(self, start: int, end: int) -> tuple[int, ...]:
        """The starts of the functions and parts between two addresses, by the unwind table."""
        if self._unwind_table is None:
            return ()
        base, _, table = self._unwind_table
        starts = _Starts(table)
        first, last = (bisect_left(starts, address - base) for address in (start, end))
        return tuple(base + starts[row] for row in range(first, min(last, first + _MAX_HITS)))

    # QEMU's own mark.

    @cached_property
    def _version(self) -> str | None:
        for data in self._constants():
            for prefix, after in _VERSION_STRINGS:
                found = _version_in(data, prefix, after)
                if found:
                    return found
        return None

    def qemu_version(self) -> str | None:
        """What this QEMU prints for --version, for example "7.2.22 (Debian 1:7.2+dfsg-7)"; or None."""
        return self._version

    def qemu_evidence(self) -> str | None:
        """Why this file is believed to be a QEMU, or None: then it is none (NotQemu)."""
        version = self.qemu_version()
        if version is not None:
            return f"prints QEMU version {version}"
        for name in ("qemu_bh_schedule", "qemu_aio_get", "qemu_init_main_loop"):
            if self.symbol(name) is not None:
                return f"defines {name}"
        if any(b"thread-pool.c\0" in data for data in self._constants()):
            return "names its source file thread-pool.c"
        return None

    # The inside.

    def _bytes(self, offset: int, size: int, most: int = _MAX_READ) -> bytes:
        if size > most:
            raise ImageError(f"{self._path} is damaged: it claims to hold {size >> 20} MiB where no QEMU has that much")
        if offset < 0 or size < 0 or offset + size > len(self._data):
            raise self._too_short(offset + size)
        try:
            found = self._data[offset : offset + size]
        except OSError as error:
            raise ImageError(f"cannot read {self._path}: {error.strerror}") from error
        if len(found) != size:
            raise self._too_short(offset + size)
        return found

    def _too_short(self, end: int) -> ImageError:
        return ImageError(f"{self._path} is damaged: it ends before {end:#x}")

    def _unpack(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(form, self._bytes(offset, struct.calcsize(form)))

    def _program_headers(self, offset: int, size: int, count: int) -> Iterator[tuple[int, ...]]:
        if size != 56:
            raise ImageError(f"{self._path} is damaged: program headers of {size} bytes")
        for number in range(count):
            kind, flags, start, vaddr, _, filesz, memsz = self._unpack("<IIQQQQQ", offset + number * size)
            if kind == _PT_LOAD and start + filesz > len(self._data) and not self._debug:
                raise ImageError(f"{self._path} is damaged: a segment ends behind the file")
            yield kind, flags, start, vaddr, filesz, memsz

    def _has_no_code(self) -> bool:
        """Whether `objcopy --only-keep-debug` or its like has left out what the code's section held."""
        try:
            text = self.section(".text")
        except (ImageError, struct.error):
            return False
        return text is not None and text.kind == _SHT_NOBITS

    @cached_property
    def _sections(self) -> tuple[Section, ...]:
        size, count, names = self._unpack("<HHH", 58)
        if not self._shoff or not count or size < 64:
            return ()
        rows = [self._unpack("<IIQQQQII", self._shoff + number * size) for number in range(count)]
        if names >= count:
            return ()
        _, _, _, _, start, length, _, _ = rows[names]
        return tuple(
            Section(self._string(start, length, name), kind, address, offset, length_, link)
            for name, kind, _, address, offset, length_, link, _ in rows
        )

    def _string(self, table: int, size: int, offset: int) -> str:
        if offset >= size:
            return ""
        text = self._bytes(table + offset, min(size - offset, len(self._data) - table - offset, 4096))
        return text.partition(b"\0")[0].decode("utf-8", "replace")

    def _build_id_in(self, offset: int, end: int) -> str | None:
        for _ in range(64):
            if offset + 12 > end:
                return None
            namesz, descsz, kind = self._unpack("<III", offset)
            desc = offset + 12 + (namesz + 3 & ~3)
            if kind == _NT_GNU_BUILD_ID and namesz == 4 and self._bytes(offset + 12, 4) == b"GNU\0":
                return self._bytes(desc, min(descsz, 64)).hex()
            offset = desc + (descsz + 3 & ~3)
        return None

    def _constants(self) -> Iterator[bytes]:
        """The read-only data: what is loaded from the file neither writable nor executable."""
        return (data for _, data in self._constant_parts())

    def _constant_parts(self) -> Iterator[tuple[int, bytes]]:
        section = self.section(".rodata")
        if section is not None:
            yield section.address, self.section_bytes(section)
            return
        for segment in self._segments:
            if not segment.flags & 2:
                yield segment.vaddr, self._bytes(segment.offset, segment.filesz)

    @cached_property
    def _dynamic(self) -> dict[int, int]:
        for kind, _, offset, _, size, _ in self._headers:
            if kind == _PT_DYNAMIC:
                raw = self._bytes(offset, min(size, _MAX_TABLE) & ~15)
                return dict(reversed(list(_until_null(raw))))
        return {}

    @cached_property
    def _dynsym(self) -> _SymbolTable:
        tags = self._dynamic
        if _DT_SYMTAB not in tags or _DT_STRTAB not in tags:
            return _SymbolTable(0, 0, 0, 0)
        start = self.offset_of(tags[_DT_SYMTAB])
        strings = self.offset_of(tags[_DT_STRTAB])
        # Nothing in the dynamic section tells the table's size; linkers put its strings behind it.
        section = self.section(".dynsym")
        size = section.size if section and section.offset == start else max(strings - start, 0)
        return _SymbolTable(start, size - size % _SYMBOL_SIZE, strings, tags.get(_DT_STRSZ, 0))

    @cached_property
    def _symtab(self) -> _SymbolTable | None:
        for section in self._sections:
            if section.kind == _SHT_SYMTAB and section.link < len(self._sections):
                strings = self._sections[section.link]
                size = section.size - section.size % _SYMBOL_SIZE
                return _SymbolTable(section.offset, size, strings.offset, strings.size)
        return None

    @property
    def _tables(self) -> tuple[_SymbolTable, ...]:
        return (self._dynsym,) if self._symtab is None else (self._dynsym, self._symtab)

    @cached_property
    def _relocations(self) -> tuple[bytes, ...]:
        tags = self._dynamic
        wanted = ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ))
        return tuple(self.read(tags[at], tags[size]) for at, size in wanted if {at, size} <= tags.keys())

    def _symbol_name(self, table: _SymbolTable, index: int) -> str | None:
        name = self._unpack("<I", table.offset + index * _SYMBOL_SIZE)[0]
        return self._string(table.strings, table.strings_size, name) or None

    def _symbol_at(self, table: _SymbolTable, index: int) -> Symbol | None:
        name, _, _, section, value, size = self._unpack("<IBBHQQ", table.offset + index * _SYMBOL_SIZE)
        text = self._string(table.strings, table.strings_size, name)
        return Symbol(text, value, size) if section and text else None

    def _dynamic_candidates(self, name: bytes) -> Iterator[int]:
        """Indices in .dynsym that may bear `name`."""
        if _DT_GNU_HASH in self._dynamic:
            yield from self._gnu_chain(name, self.offset_of(self._dynamic[_DT_GNU_HASH]))
        elif _DT_HASH in self._dynamic:
            yield from self._sysv_chain(name, self.offset_of(self._dynamic[_DT_HASH]))

    def _gnu_chain(self, name: bytes, table: int) -> Iterator[int]:
        wanted = 5381
        for byte in name:
            wanted = wanted * 33 + byte & 0xFFFFFFFF
        buckets, first, bloom, _ = self._unpack("<IIII", table)
        bucket = table + 16 + bloom * 8
        start = self._unpack("<I", bucket + 4 * (wanted % buckets))[0] if buckets else 0
        if start < max(first, 1):
            return
        for index in range(start, start + _MAX_CHAIN):
            found = self._unpack("<I", bucket + 4 * (buckets + index - first))[0]
            if found | 1 == wanted | 1:
                yield index
            if found & 1:
                return

    def _sysv_chain(self, name: bytes, table: int) -> Iterator[int]:
        wanted = 0
        for byte in name:
            wanted = (wanted << 4) + byte
            wanted = (wanted ^ (wanted & 0xF0000000) >> 24) & 0x0FFFFFFF
        buckets = self._unpack("<II", table)[0]
        index = self._unpack("<I", table + 8 + 4 * (wanted % buckets))[0] if buckets else 0
        for _ in range(_MAX_CHAIN):
            if not index:
                return
            yield index
            index = self._unpack("<I", table + 8 + 4 * (buckets + index))[0]

    def _in_symtab(self, name: bytes) -> Iterator[Symbol]:
        table = self._symtab
        if table is None:
            return
        rows = self._bytes(table.offset, table.size)
        strings = self._bytes(table.strings, table.strings_size)
        at = strings.find(name + b"\0")
        for _ in range(16):  # linkers share the tails of names: the first find may be inside another
            if at < 0:
                return
            for index in _rows(rows, _SYMBOL_SIZE, 0, struct.pack("<I", at)):
                found = self._symbol_at(table, index)
                if found is not None:
                    yield found
            at = strings.find(name + b"\0", at + 1)

    def _plt_slot(self, address: int) -> int | None:
        if not self.is_executable(address):
            return None
        code = self.read(address, 16)
        if self._machine == "aarch64":
            return _plt_slot_aarch64(code, address)
        at = 4 if code.startswith(b"\xf3\x0f\x1e\xfa") else 0  # endbr64
        at += code[at] == 0xF2  # bnd
        if code[at : at + 2] != b"\xff\x25":
            return None
        return int(address + at + 6 + struct.unpack_from("<i", code, at + 2)[0])

    @cached_property
    def _unwind_table(self) -> tuple[int, int, bytes] | None:
        """.eh_frame_hdr: its address, the file offset behind .eh_frame's table, and the sorted table."""
        for kind, _, offset, vaddr, _, _ in self._headers:
            if kind == _PT_GNU_EH_FRAME:
                form, pointer, count = self._unpack("<IiI", offset)
                if form == 0x3B031B01:  # version 1; pcrel sdata4, udata4, datarel sdata4: all linkers'
                    return vaddr, pointer, self._bytes(offset + 12, 8 * count)
        return None

    def _unwind_bounds(self, address: int) -> Bounds | None:
        found = self.frame_entry(address)
        if found is None:
            return None
        start, frame = found
        size = self._frame_size(frame)
        return Bounds(start, start + size) if size and address < start + size else None

    def _frame_size(self, frame: int) -> int | None:
        """The address range of the frame description entry at `frame`, in bytes."""
        length, back = struct.unpack("<II", self.read(frame, 8))
        if length in (0, 0xFFFFFFFF) or not back:
            return None
        if self.read(frame + 4 - back + 9, 1) != b"z":
            return None  # without augmentation: absolute pointers, which no compiler writes here
        return int(struct.unpack("<I", self.read(frame + 12, 4))[0])


class _Starts:
    """The function starts of a binary search table, as bisect wants them."""

    def __init__(self, table: bytes) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table) // 8

    def __getitem__(self, row: int) -> int:
        return int(struct.unpack_from("<i", self._table, row * 8)[0])


def _static_probes(raw: bytes, base: int | None) -> Iterator[StaticProbe]:
    at = 0
    while at + 12 <= len(raw):
        namesz, descsz, kind = struct.unpack_from("<III", raw, at)
        start = at + 12 + (namesz + 3 & ~3)
        end = start + descsz
        if end > len(raw):
            return
        texts = raw[start + 24 : end].split(b"\0")
        if kind == _NT_STAPSDT and raw[at + 12 : at + 12 + namesz] == b"stapsdt\0" and len(texts) >= 3:
            address, was, semaphore = struct.unpack_from("<QQQ", raw, start)
            moved = base - was if base and was else 0
            provider, name, arguments = (text.decode("utf-8", "replace") for text in texts[:3])
            yield StaticProbe(provider, name, address + moved, semaphore + moved if semaphore else 0, arguments)
        at = start + (descsz + 3 & ~3)


def _rows(table: bytes, row: int, column: int, pattern: bytes) -> Iterator[int]:
    """Indices of the table's whole rows that hold `pattern` at `column`."""
    end = len(table) - len(table) % row
    at = table.find(pattern, 0, end)
    for _ in range(_MAX_HITS):
        if at < 0:
            return
        if at % row == column:
            yield at // row
        at = table.find(pattern, at + 1, end)


def _until_null(raw: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in struct.iter_unpack("<QQ", raw):
        if not tag:
            return
        yield tag, value


def _version_in(data: bytes, prefix: bytes, after: bytes) -> str | None:
    at = data.find(prefix)
    for _ in range(_MAX_HITS):
        if at < 0:
            return None
        found = re.compile(_VERSION).match(data, at + len(prefix))
        if found and after in data[at : at + _TEXT_LIMIT]:
            return found[1].decode("utf-8", "replace").strip()
        at = data.find(prefix, at + 1)
    return None


def _plt_slot_aarch64(code: bytes, address: int) -> int | None:
    """adrp x16, page; ldr x17, [x16, #offset] (after an optional bti c)."""
    at = 4 if code[:4] == b"\x5f\x24\x03\xd5" else 0
    adrp, ldr = struct.unpack_from("<II", code, at)
    if adrp & 0x9F00001F != 0x90000010 or ldr & 0xFFC003FF != 0xF9400211:
        return None
    page = (adrp >> 29 & 3) | (adrp >> 5 & 0x7FFFF) << 2
    page -= (page & 1 << 20) << 1
    return int((address + at & ~0xFFF) + (page << 12) + (ldr >> 10 & 0xFFF) * 8)
