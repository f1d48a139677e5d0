"""A running QEMU as /proc shows it: identity, threads, files, mappings.

Knows: /proc. Does not know ELF contents or QEMU's structures. Nothing here stops or changes the
process.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from tracer.errors import NoSuchProcess, NotPermitted, NotQemu, TargetExited

AT_NULL = 0
AT_ENTRY = 9

# System calls in which a thread may sleep for long, by number; arch/x86/entry/syscalls/syscall_64.tbl.
SYSCALLS = {
    0: "read", 1: "write", 2: "open", 3: "close", 7: "poll", 8: "lseek", 16: "ioctl", 17: "pread64", 18: "pwrite64",
    19: "readv", 20: "writev", 23: "select", 35: "nanosleep", 42: "connect", 43: "accept", 44: "sendto",
    45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 61: "wait4", 73: "flock", 74: "fsync", 75: "fdatasync",
    76: "truncate", 77: "ftruncate", 101: "ptrace", 128: "rt_sigtimedwait", 130: "rt_sigsuspend",
    162: "sync", 202: "futex", 208: "io_getevents", 209: "io_submit", 230: "clock_nanosleep",
    232: "epoll_wait", 247: "waitid", 257: "openat", 270: "pselect6", 271: "ppoll", 277: "sync_file_range",
    281: "epoll_pwait", 285: "fallocate", 288: "accept4", 295: "preadv", 296: "pwritev", 299: "recvmmsg",
    306: "syncfs", 326: "copy_file_range", 327: "preadv2", 328: "pwritev2", 426: "io_uring_enter",
    437: "openat2", 441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip

#: System calls whose first argument is a file descriptor worth naming.
FILE_SYSCALLS = frozenset(
    {
        *("read", "write", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2", "pwritev2"),
        *("lseek", "fsync", "fdatasync", "sync_file_range", "syncfs", "fallocate", "ftruncate", "flock", "ioctl"),
        *("connect", "accept", "accept4", "sendto", "recvfrom", "sendmsg", "recvmsg", "recvmmsg"),
    }
)


@dataclass(frozen=True)
class SystemCall:
    """The system call in which a thread was found: number, its name, six arguments, stack and pc."""

    number: int
    name: str
    args: tuple[int, ...]
    sp: int
    pc: int


@dataclass(frozen=True)
class Thread:
    """One thread at one moment; `state` is the letter of proc(5), `syscall` None while it runs."""

    tid: int
    name: str
    state: str
    syscall: SystemCall | None
    switches: int  # voluntary context switches so far

    @property
    def stopped(self) -> bool:
        """Stopped by a signal or a debugger."""
        return self.state in "Tt"


@dataclass(frozen=True)
class Region:
    """One mapping of the address space: [start, end), permissions, device, inode, path."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _stat_fields(pid: int, tid: int | None = None) -> tuple[str, list[str]]:
    """(comm, fields from state on) of /proc/PID[/task/TID]/stat; comm may hold spaces and parentheses."""
    text = _read_text(f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat")
    return text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()


@dataclass(frozen=True)
class Target:
    """A process by pid and start time (clock ticks since boot): a recycled pid is another process."""

    pid: int
    start_time: int
    exe: str  # where /proc/PID/exe points, for people to read

    @property
    def image_path(self) -> str:
        """The executable that runs, even when it was deleted, replaced or is in a container."""
        return f"/proc/{self.pid}/exe"

    @property
    def alive(self) -> bool:
        """False when the process ended, is a zombie, or its pid belongs to another one."""
        try:
            _, fields = _stat_fields(self.pid)
        except OSError:
            return False
        return fields[0] not in "ZX" and int(fields[19]) == self.start_time

    def check_alive(self) -> None:
        """Raise TargetExited unless `alive`."""
        if not self.alive:
            raise TargetExited(f"process {self.pid} has ended")

    def thread(self, tid: int) -> Thread | None:
        """One thread now, or None when it is gone."""
        try:
            name, fields = _stat_fields(self.pid, tid)
            status = _read_text(f"/proc/{self.pid}/task/{tid}/status")
        except (OSError, ValueError):
            return None
        found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.M)
        return Thread(tid, name, fields[0], self._syscall(tid), int(found[1]) if found else 0)

    def threads(self) -> list[Thread]:
        """All threads now, the main thread first."""
        try:
            tids = sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/task"))
        except OSError:
            return []
        return [thread for tid in tids if (thread := self.thread(tid)) is not None]

    def _syscall(self, tid: int) -> SystemCall | None:
        try:
            words = _read_text(f"/proc/{self.pid}/task/{tid}/syscall").split()
        except OSError:
            return None
        if len(words) < 9:
            return None
        number = int(words[0])
        values = [int(word, 16) for word in words[1:]]
        name = SYSCALLS.get(number, f"system call {number}")
        return SystemCall(number, name, tuple(values[:6]), values[6], values[7])

    def regions(self) -> list[Region]:
        """The mappings of /proc/PID/maps, in order of address."""
        try:
            text = _read_text(f"/proc/{self.pid}/maps")
        except OSError as error:
            raise TargetExited(f"process {self.pid} has ended") from error
        return list(_parse_maps(text))

    def entry_address(self) -> int:
        """Where the executable's entry point was loaded (AT_ENTRY); less e_entry it is the load bias."""
        try:
            with open(f"/proc/{self.pid}/auxv", "rb") as file:
                data = file.read()
        except OSError as error:
            raise TargetExited(f"process {self.pid} has ended") from error
        for kind, value in struct.iter_unpack("QQ", data[: len(data) // 16 * 16]):
            if kind == AT_ENTRY:
                return int(value)
        raise TargetExited(f"process {self.pid} has ended")

    def file_of(self, fd: int) -> str | None:
        """What a file descriptor of the process refers to, or None."""
        with suppress(OSError):
            return os.readlink(f"/proc/{self.pid}/fd/{fd}")
        return None

    def eventfd_count(self, fd: int) -> int | None:
        """The counter of an eventfd of the process, None if it is none."""
        try:
            text = _read_text(f"/proc/{self.pid}/fdinfo/{fd}")
        except OSError:
            return None
        found = re.search(r"^eventfd-count:\s*([0-9a-f]+)", text, re.M)
        return int(found[1], 16) if found else None

    @cached_property
    def name(self) -> str:
        """The process's own name."""
        return _stat_fields(self.pid)[0]


def _parse_maps(text: str) -> Iterator[Region]:
    for line in text.splitlines():
        fields = line.split(None, 5)
        start, _, end = fields[0].partition("-")
        path = fields[5] if len(fields) > 5 else ""
        yield Region(int(start, 16), int(end, 16), fields[1], int(fields[4]), path)


def open_target(pid: int) -> Target:
    """The process `pid`, with its start time and executable.

    Raises NoSuchProcess, NotQemu (a thread id, a kernel thread, a zombie) or NotPermitted. Whether the
    executable really is a QEMU, its file tells (tracer/elf).
    """
    hint = "pgrep -a qemu"
    try:
        _, fields = _stat_fields(pid)
        status = _read_text(f"/proc/{pid}/status")
    except OSError as error:
        raise NoSuchProcess(f"there is no process {pid}", hint) from error
    found = re.search(r"^Tgid:\s*(\d+)", status, re.M)
    if found and int(found[1]) != pid:
        raise NotQemu(f"{pid} is a thread of process {found[1]}", f"aio-trace --pid {found[1]}")
    if fields[0] in "ZX":
        raise NotQemu(f"process {pid} has ended already (it is a zombie)", hint)
    try:
        exe = os.readlink(f"/proc/{pid}/exe")
    except PermissionError as error:
        raise NotPermitted(f"process {pid} may not be looked at without root", f"sudo aio-trace --pid {pid}") from error
    except OSError as error:
        raise NotQemu(f"process {pid} has no executable: it is a kernel thread or ends", hint) from error
    return Target(pid, int(fields[19]), exe)


def find_qemus() -> list[int]:
    """The pids of all processes whose executable's name says that they are a QEMU, lowest first."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError):
            if re.search("qemu|kvm", os.path.basename(os.readlink(f"/proc/{name}/exe"))):
                found.append(int(name))
    return sorted(found)
