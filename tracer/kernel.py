"""bpf(2) and perf_event_open(2): maps, programs and uprobes as file descriptors, and nothing else.

Knows: the kernel's calling conventions (include/uapi/linux/bpf.h, perf_event.h). Does not know QEMU, what
the programs do, or who compiled them. Everything raises OSError; a program that the verifier refuses has
the verifier's words as its note.
"""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import mmap
import os
import platform
import resource
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Final

from tracer.errors import add_note

UPROBE_PMU = "/sys/bus/event_source/devices/uprobe/type"

_CALLS: Final = {"x86_64": (321, 298), "aarch64": (280, 241)}
_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD = range(6)
_LOOKUP_BATCH, _LINK_CREATE = 24, 28
_ATTRIBUTES_SIZE = 128
_PROG_TYPE_KPROBE, _PROG_TYPE_PERF_EVENT = 2, 7
_UPROBE_MULTI = 48
_LOG_SIZE = 1 << 20
_PERF_SET_BPF, _PERF_ENABLE = 0x40042408, 0x2400
_PERF_CLOEXEC = 8

ANY, NOEXIST, EXIST = 0, 1, 2
NO_PREALLOC, MMAPABLE = 1, 1024
_HASH, _MAP_FD = 1, 1

#: A whole program.
RETURN_0: Final = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
_COMPARE_AND_EXCHANGE: Final = (
    struct.pack("<BBhi", 0xB7, 1, 0, 0)  # r1 = 0
    + struct.pack("<BBhi", 0x7B, 0x1A, -8, 0)  # *(r10 - 8) = r1
    + struct.pack("<BBhi", 0xB7, 0, 0, 0)  # r0 = 0
    + struct.pack("<BBhi", 0xDB, 0x1A, -8, 0xF1)  # compare and exchange *(r10 - 8): if it is r0, then r1
    + RETURN_0
)

_libc = ct.CDLL(None, use_errno=True)


def _call(number: int, *arguments: int | ct.Array[ct.c_char] | ct.c_long) -> int:
    result = int(_libc.syscall(ct.c_long(number), *arguments))
    if result < 0:
        raise OSError(ct.get_errno(), os.strerror(ct.get_errno()))
    return result


def _numbers() -> tuple[int, int]:
    try:
        return _CALLS[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, f"the bpf system call's number is not known for {platform.machine()}") from None


def _bpf(command: int, attributes: bytes) -> int:
    block = ct.create_string_buffer(attributes, _ATTRIBUTES_SIZE)
    return _call(_numbers()[0], ct.c_long(command), block, ct.c_long(_ATTRIBUTES_SIZE))


class Map:
    """One BPF map; close() or the end of this process gives it back once no program uses it."""

    def __init__(self, kind: int, key_size: int, value_size: int, entries: int, flags: int) -> None:
        """Make it: `kind` is the kernel's BPF_MAP_TYPE_*, sizes in bytes."""
        self.key_size, self.value_size, self.entries = key_size, value_size, entries
        attributes = struct.pack("<5I", kind, key_size, value_size, entries, flags)
        try:
            self.fd = _bpf(_MAP_CREATE, attributes)
        except PermissionError:
            _lift_memory_lock()
            self.fd = _bpf(_MAP_CREATE, attributes)
        self._key = ct.create_string_buffer(key_size)
        self._next = ct.create_string_buffer(key_size)
        self._value = ct.create_string_buffer(value_size)
        self._element = struct.pack("<IIQQQ", self.fd, 0, ct.addressof(self._key), ct.addressof(self._value), 0)

    def lookup(self, key: bytes) -> bytes | None:
        """The value now, or None."""
        self._key.raw = key
        try:
            _bpf(_LOOKUP, self._element)
        except FileNotFoundError:
            return None
        return self._value.raw

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> bool:
        """Set a value; False where NOEXIST or EXIST forbids it, or the map is full."""
        self._key.raw, self._value.raw = key, value
        try:
            _bpf(_UPDATE, self._element[:24] + struct.pack("<Q", flags))
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOENT, errno.E2BIG):
                return False
            raise
        return True

    def delete(self, key: bytes) -> bool:
        """Take an entry out; whether it was there."""
        self._key.raw = key
        try:
            _bpf(_DELETE, self._element[:16])
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> Iterator[bytes]:
        """Every key; one may come twice, or the walk start over, when entries go meanwhile: it is bounded."""
        return islice(self._walk(), 4 * self.entries)

    def _walk(self) -> Iterator[bytes]:
        attributes = struct.pack("<IIQQ", self.fd, 0, 0, ct.addressof(self._next))
        while True:
            try:
                _bpf(_NEXT_KEY, attributes)
            except FileNotFoundError:
                return
            key = self._next.raw
            yield key
            self._key.raw = key
            attributes = struct.pack("<IIQQ", self.fd, 0, ct.addressof(self._key), ct.addressof(self._next))

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Every entry that is there all the while, and perhaps others."""
        if next(self._walk(), None) is None:
            return iter(())
        found = self._batches()
        if found is not None:
            return iter(found.items())
        pairs = ((key, self.lookup(key)) for key in self.keys())
        return ((key, value) for key, value in pairs if value is not None)

    def _batches(self) -> dict[bytes, bytes] | None:
        """A few system calls for all; None where the kernel has no batches (before 5.6)."""
        found: dict[bytes, bytes] = {}
        place = ct.create_string_buffer(max(self.key_size, 8))
        keys = ct.create_string_buffer(self.key_size * self.entries)
        values = ct.create_string_buffer(self.value_size * self.entries)
        started = False
        while True:
            block = ct.create_string_buffer(_ATTRIBUTES_SIZE)
            struct.pack_into(
                "<QQQQIIQQ",
                block,
                0,
                ct.addressof(place) if started else 0,
                ct.addressof(place),
                ct.addressof(keys),
                ct.addressof(values),
                self.entries,
                self.fd,
                0,
                0,
            )
            ended = False
            try:
                _call(_numbers()[0], ct.c_long(_LOOKUP_BATCH), block, ct.c_long(_ATTRIBUTES_SIZE))
            except FileNotFoundError:
                ended = True
            except OSError:
                return None
            (count,) = struct.unpack_from("<I", block, 32)
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(count):
                key = raw_keys[index * self.key_size : (index + 1) * self.key_size]
                found[key] = raw_values[index * self.value_size : (index + 1) * self.value_size]
            if ended:
                return found
            started = True

    def mapped(self) -> mmap.mmap:
        """All values of an array that was made with MMAPABLE, to be read without a system call."""
        size = -(-((self.value_size + 7 & ~7) * self.entries) // mmap.PAGESIZE) * mmap.PAGESIZE
        return mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


def _lift_memory_lock() -> None:
    """Before Linux 5.11 maps and programs count as locked memory."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def load(instructions: bytes, multi: bool) -> int:
    """Load one program, for has_multi()'s links or for perf events; its descriptor."""
    code = ct.create_string_buffer(instructions, len(instructions))
    way = _UPROBE_MULTI if multi else 0
    try:
        return _load(code, _PROG_TYPE_KPROBE, way)
    except OSError as error:
        log = ct.create_string_buffer(_LOG_SIZE)
        try:
            return _load(code, _PROG_TYPE_KPROBE, way, log)
        except OSError:
            add_note(error, log.value.decode(errors="replace"))
            raise error from None


def _load(code: ct.Array[ct.c_char], kind: int, way: int, log: ct.Array[ct.c_char] | None = None) -> int:
    try:
        return _load_once(code, kind, way, log)
    except PermissionError:
        _lift_memory_lock()
        return _load_once(code, kind, way, log)


def _load_once(code: ct.Array[ct.c_char], kind: int, way: int, log: ct.Array[ct.c_char] | None) -> int:
    # What the helpers that read memory and time ask for; BCC says the same.
    licence = ct.create_string_buffer(b"GPL")
    told = (1, _LOG_SIZE, ct.addressof(log)) if log is not None else (0, 0, 0)
    attributes = struct.pack(
        "<IIQQIIQII16sII",
        kind,
        len(code) // 8,
        ct.addressof(code),
        ct.addressof(licence),
        *told,
        0,
        0,
        b"aio_trace",
        0,
        way,
    )
    return _bpf(_PROG_LOAD, attributes)


# What this kernel can do, found by trying: distributions take over what newer kernels have.


def has_multi() -> bool:
    """Whether the kernel attaches one program to many places at once, and only for one process if asked.

    Before 6.6 it takes the program and refuses every link as invalid; those that have it look at the file first.
    Until 6.10 they take the id of a process for that of a thread, and look for a negative one, which the others
    refuse before all else.
    """
    try:
        program = load(RETURN_0, multi=True)
    except OSError:
        return False
    try:
        return [_refusal(program, pid) for pid in (0, -1)] == [errno.EBADF, errno.EINVAL]
    finally:
        os.close(program)


def _refusal(program: int, pid: int) -> int:
    """The errno of a link to what is no file."""
    try:
        os.close(attach_multi(program, "/", [0], pid))
    except OSError as error:
        return error.errno or 0
    return 0


def has_atomics() -> bool:
    """Whether programs may compare and exchange: since 5.12, where the compiler to machine code knows it."""
    return _is_taken(_COMPARE_AND_EXCHANGE, _PROG_TYPE_KPROBE)


def may_allocate() -> bool:
    """Whether programs at probes may use hashes whose elements are made when they are needed: since 6.1.

    Before, the kernel warns when it takes such a program (and may be told to panic by that), or refuses it where
    it is one for real time. Programs on perf events it refuses without a warning, for the same reason.
    """
    try:
        made = Map(_HASH, 4, 4, 1, NO_PREALLOC)
    except OSError:
        return False
    try:
        named = struct.pack("<BBhiBBhi", 0x18, _MAP_FD << 4 | 1, 0, made.fd, 0, 0, 0, 0)
        return _is_taken(named + RETURN_0, _PROG_TYPE_PERF_EVENT)
    finally:
        made.close()


def _is_taken(instructions: bytes, kind: int) -> bool:
    try:
        os.close(_load(ct.create_string_buffer(instructions, len(instructions)), kind, 0))
    except OSError:
        return False
    return True


def attach_multi(program: int, path: str, offsets: Sequence[int], pid: int) -> int:
    """One link for all the places of a file, in one process or (pid 0) in every one that maps it."""
    name = ct.create_string_buffer(os.fsencode(path))
    places = (ct.c_uint64 * len(offsets))(*offsets)
    attributes = struct.pack("<IIII", program, 0, _UPROBE_MULTI, 0)
    attributes += struct.pack("<QQQQIIi", ct.addressof(name), ct.addressof(places), 0, 0, len(offsets), 0, pid)
    return _bpf(_LINK_CREATE, attributes)


def attach_perf(program: int, path: str, offset: int, pid: int) -> int:
    """One perf event for one place of a file, in one process or (pid 0) in every one that maps it."""
    with open(UPROBE_PMU, encoding="ascii") as file:
        kind = int(file.read())
    name = ct.create_string_buffer(os.fsencode(path))
    # struct perf_event_attr: type, size, config, sample_period, …, config1 (the path), config2 (the offset).
    block = ct.create_string_buffer(struct.pack("<IIQQQQQIIQQ", kind, 112, 0, 1, 0, 0, 0, 0, 0, 0, 0), 112)
    struct.pack_into("<QQ", block, 56, ct.addressof(name), offset)
    fd = _call(
        _numbers()[1],
        block,
        ct.c_long(pid or -1),
        ct.c_long(-1 if pid else 0),
        ct.c_long(-1),
        ct.c_long(_PERF_CLOEXEC),
    )
    try:
        fcntl.ioctl(fd, _PERF_SET_BPF, program)
        fcntl.ioctl(fd, _PERF_ENABLE, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd
