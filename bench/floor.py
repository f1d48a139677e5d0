"""The floor: empty BPF programs on given places of one process, and nothing else.

    python -m bench.floor perf|multi PID EXE OFFSET...

`perf` attaches each by a perf event, as BCC and bpftrace do; `multi` all by one link (uprobe_multi, since Linux
6.6). Offsets are those in the file. Says "attached", and detaches at SIGINT. Raw bpf(2), so that what it weighs
and how long it takes is the kernel's part alone.
"""

from __future__ import annotations

import ctypes as ct
import fcntl
import os
import platform
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

BPF_PROG_LOAD, BPF_LINK_CREATE = 5, 28
BPF_PROG_TYPE_KPROBE, BPF_TRACE_UPROBE_MULTI = 2, 48
PERF_EVENT_IOC_ENABLE, PERF_EVENT_IOC_SET_BPF = 0x2400, 0x40042408
PERF_FLAG_FD_CLOEXEC = 8
PERF_ATTR_SIZE, BPF_ATTR_SIZE = 128, 128
SYSCALLS = {"x86_64": (321, 298), "aarch64": (280, 241)}  # bpf, perf_event_open
UPROBE_PMU = "/sys/bus/event_source/devices/uprobe/type"
EMPTY = bytes.fromhex("b700000000000000 9500000000000000")  # r0 = 0; exit

_libc = ct.CDLL(None, use_errno=True)
_BPF, _PERF_EVENT_OPEN = SYSCALLS.get(platform.machine(), (-1, -1))


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ct.get_errno(), f"{what}: {os.strerror(ct.get_errno())}")
    return result


def _bpf(command: int, attributes: bytes, what: str) -> int:
    buffer = ct.create_string_buffer(attributes, BPF_ATTR_SIZE)
    return _checked(_libc.syscall(_BPF, command, buffer, BPF_ATTR_SIZE), what)


def load(attach_type: int) -> int:
    """The descriptor of a loaded empty program."""
    instructions, licence = ct.create_string_buffer(EMPTY, len(EMPTY)), ct.create_string_buffer(b"GPL")
    head = struct.pack(
        "=IIQQ", BPF_PROG_TYPE_KPROBE, len(EMPTY) // 8, ct.addressof(instructions), ct.addressof(licence)
    )
    # No log, no version, no flags, no name, no interface; then how it will be attached.
    rest = struct.pack("=IIQII16sII", 0, 0, 0, 0, 0, b"", 0, attach_type)
    return _bpf(BPF_PROG_LOAD, head + rest, "load")


def by_perf_events(pid: int, exe: str, offsets: Sequence[int]) -> None:
    """One perf event and one program for each place."""
    kind = int(Path(UPROBE_PMU).read_text(encoding="ascii"))
    path = ct.create_string_buffer(os.fsencode(exe))
    for offset in offsets:
        attributes = ct.create_string_buffer(PERF_ATTR_SIZE)
        # type, size, config, sample_period, sample_type, read_format, flags, wakeup, bp_type, config1, config2
        fields = (kind, PERF_ATTR_SIZE, 0, 1, 0, 0, 0, 0, 0, ct.addressof(path), offset)
        struct.pack_into("=IIQQQQQIIQQ", attributes, 0, *fields)
        event = _libc.syscall(_PERF_EVENT_OPEN, attributes, pid, -1, -1, PERF_FLAG_FD_CLOEXEC)
        _checked(event, "perf_event_open")
        fcntl.ioctl(event, PERF_EVENT_IOC_SET_BPF, load(0))
        fcntl.ioctl(event, PERF_EVENT_IOC_ENABLE, 0)


def by_one_link(pid: int, exe: str, offsets: Sequence[int]) -> None:
    """One link and one program for all places."""
    path = ct.create_string_buffer(os.fsencode(exe))
    places = (ct.c_uint64 * len(offsets))(*offsets)
    head = struct.pack("=IIII", load(BPF_TRACE_UPROBE_MULTI), 0, BPF_TRACE_UPROBE_MULTI, 0)
    rest = struct.pack("=QQQQIII", ct.addressof(path), ct.addressof(places), 0, 0, len(offsets), 0, pid)
    _bpf(BPF_LINK_CREATE, head + rest, "uprobe_multi")


WAYS = {"perf": by_perf_events, "multi": by_one_link}


def main() -> None:
    """Attach, say so, wait for SIGINT; closing the descriptors detaches."""
    way, pid, exe, *offsets = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        WAYS[way](int(pid), exe, [int(offset, 0) for offset in offsets])
    except OSError as error:
        sys.exit(error.strerror)
    print("attached", flush=True)
    signal.sigwait((signal.SIGINT, signal.SIGTERM))


if __name__ == "__main__":
    main()
