"""A running QEMU as /proc shows it: identity, threads, files, mappings.

Knows: /proc. Does not know ELF contents or QEMU's structures. Nothing here stops or changes the
process.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property

from tracer import cgroup
from tracer.errors import OUT_OF_FILES, HostError, NoSuchProcess, NotPermitted, NotQemu, TargetExited
from tracer.machine import AARCH64, HOST, X86_64, Machine
from tracer.records import dataclass
from tracer.rights import WHOLE_CONTAINER, in_pid_namespace, refusal
from tracer.text import printable

AT_ENTRY, AT_RANDOM = 9, 25
_RANDOM_SIZE = 16
#: In the middle of an exec the vector is not whole yet.
_LOADING = b"\0"
_LOADING_LOOKS, _LOADING_S = 10, 0.001

# System calls in which a thread may sleep for long, by number; arch/x86/entry/syscalls/syscall_64.tbl.
_SYSCALLS_X86_64 = {
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

# The same for the architectures that came later; include/uapi/asm-generic/unistd.h.
_SYSCALLS_GENERIC = {
    2: "io_submit", 4: "io_getevents", 22: "epoll_pwait", 29: "ioctl", 32: "flock", 45: "truncate",
    46: "ftruncate", 47: "fallocate", 56: "openat", 57: "close", 62: "lseek", 63: "read", 64: "write", 65: "readv",
    66: "writev", 67: "pread64", 68: "pwrite64", 69: "preadv", 70: "pwritev", 72: "pselect6", 73: "ppoll",
    81: "sync", 82: "fsync", 83: "fdatasync", 84: "sync_file_range", 95: "waitid", 98: "futex",
    101: "nanosleep", 115: "clock_nanosleep", 117: "ptrace", 133: "rt_sigsuspend", 137: "rt_sigtimedwait",
    202: "accept", 203: "connect", 206: "sendto", 207: "recvfrom", 211: "sendmsg", 212: "recvmsg",
    242: "accept4", 243: "recvmmsg", 260: "wait4", 267: "syncfs", 285: "copy_file_range", 286: "preadv2",
    287: "pwritev2", 426: "io_uring_enter", 437: "openat2", 441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip

SYSCALLS = {X86_64.name: _SYSCALLS_X86_64, AARCH64.name: _SYSCALLS_GENERIC}

RESTART_SYSCALL = {X86_64.name: 219, AARCH64.name: 128}
_FUTEX_WAIT_BITSET = (0x89, 0x189)
_MATCH_ANY = 0xFFFFFFFF
_MAX_POLL_SET = 65536
#: Threads that are looked at, and bytes of a text of /proc: a process may make as many as it likes.
MAX_THREADS, MAX_TEXT = 4096, 64 << 20
LAST_CPU = 36  # proc(5): /proc/PID/stat's 39th field; here they count from the third
PAGE_ZERO = 4096  # no address is below it

#: System calls whose first argument is a file descriptor worth naming.
FILE_SYSCALLS = frozenset(
    {
        *("read", "write", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2", "pwritev2"),
        *("lseek", "fsync", "fdatasync", "sync_file_range", "syncfs", "fallocate", "ftruncate", "flock", "ioctl"),
        *("connect", "accept", "accept4", "sendto", "recvfrom", "sendmsg", "recvmsg", "recvmmsg"),
    }
)


def syscall_name(number: int, args: Sequence[int], machine: Machine = HOST) -> str:
    """The name of a system call; of one that goes on after a stop, the one that it was."""
    if number != RESTART_SYSCALL[machine.name]:
        return SYSCALLS[machine.name].get(number, f"system call {number}")
    # Only these have a restart block, and the registers still hold their arguments.
    if args[1] in _FUTEX_WAIT_BITSET and args[5] & _MATCH_ANY == _MATCH_ANY:
        return "futex"
    if args[0] < PAGE_ZERO:
        return "clock_nanosleep"
    return "poll" if machine is X86_64 and args[1] < _MAX_POLL_SET else "nanosleep"


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
    """One thread at one moment; `state` is the letter of proc(5), `syscall` None while it runs.

    A core file knows no switches, and not every state.
    """

    tid: int
    name: str
    state: str | None
    syscall: SystemCall | None
    switches: int | None  # voluntary context switches so far
    ran_s: float | None = None  # on a CPU so far
    waited_s: float | None = None  # ready to run, but without a CPU, so far

    @property
    def stopped(self) -> bool:
        """Stopped by a signal or a debugger."""
        return self.state in ("T", "t")


@dataclass(frozen=True)
class Region:
    """One mapping of the address space: [start, end), permissions, device, inode, path."""

    start: int
    end: int
    permissions: str
    inode: int
    path: str
    offset: int = 0  # of `start` in the file, bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


#: What stands for a path that the kernel does not tell because it does not fit into a page.
LONG_NAME = "(a file whose path is longer than 4 KiB)"

#: Programs of QEMU, by the executable's name, that have no thread pool: helpers, and emulators of user programs.
NO_POOL = (
    r"^qemu-(ga|pr-helper|bridge-helper|vmsr-helper|keymap|edid|"
    r"(?!system|storage|img|nbd|io|kvm|dm)[a-z0-9_]+(-static)?)$"
)


def ended(pid: int, error: OSError | None = None) -> TargetExited | HostError:
    """The error for a process that is gone; or what `error` from its /proc folder says else: no more open files."""
    if error is not None and error.errno in OUT_OF_FILES:
        return HostError("aio-trace may open no more files", "ulimit -n 65536")
    return TargetExited(f"process {pid} has ended", "pgrep -a qemu")


def trace_line(*pids: int) -> str:
    """How a trace of these processes is begun."""
    return " ".join(["sudo aio-trace", *(f"--pid {pid}" for pid in pids)])


def read_text(path: str) -> str:
    """A text of /proc as it is, or its first 64 MiB.

    Its lines end with a newline alone, and names in it may hold any other byte; Python's own lines end at ten
    characters, of which a file's or a thread's name may be made.
    """
    with open(path, "rb") as file:
        return os.fsdecode(file.read(MAX_TEXT))


#: proc(5), /proc/PID/stat: a name of any bytes, a letter, and numbers; how many there are grows with the kernel.
_STAT = re.compile(r"\d{1,10} \((.*)\) ([A-Za-z](?: -?[0-9]{1,20}){37,64})\n?", re.DOTALL | re.ASCII)
#: proc(5), /proc/PID/maps; for an end of line in a path the kernel writes \\012.
_MAPPING = re.compile(
    r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) (\S{4}) ([0-9a-f]{1,16}) \S+ ([0-9]{1,20})(?: +(.*))?", re.DOTALL
)
_MOST_DIGITS = 20


def _number(text: str, base: int = 10) -> int:
    """A number as the kernel writes it, of at most 64 bits; ValueError for anything else."""
    if len(text) > _MOST_DIGITS or not text.isalnum() or not text.isascii():
        raise ValueError(f"{text[:_MOST_DIGITS]!r} is no number")
    value = int(text, base)
    if value >> 64:
        raise ValueError(f"{text} is no number of 64 bits")
    return value


def open_regular(path: str) -> int:
    """A regular file opened for reading, its descriptor; OSError for anything else, which is not opened at all.

    Somebody else named the path: a FIFO would hold us up, and a device may do something when it is opened.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(place)


def inner_numbers(pid: int, tid: int | None = None) -> list[int]:
    """The numbers of a thread (the process's main one) in our PID namespace and in each of those within, ours first."""
    tid = pid if tid is None else tid
    with suppress(OSError, ValueError):
        found = re.search(r"^NSpid:\s*(.+)$", read_text(f"/proc/{pid}/task/{tid}/status"), re.M)
        return [int(number) for number in found[1].split()] if found else [tid]
    return [tid]


def _stat_fields(pid: int, tid: int | None = None) -> tuple[str, list[str]]:
    """(comm, fields from state on) of /proc/PID[/task/TID]/stat; comm may hold spaces and parentheses."""
    text = read_text(f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat")
    found = _STAT.fullmatch(text)
    if found is None:
        raise OSError(errno.EPROTO, "a text of the kernel that is none", f"/proc/{pid}/stat")
    return found[1], found[2].split()


def _schedule(pid: int, tid: int) -> tuple[float | None, float | None]:
    """Seconds on a CPU and waiting for one, of /proc/PID/task/TID/schedstat; None where the kernel has none."""
    try:
        ran, waited, _slices = map(_number, read_text(f"/proc/{pid}/task/{tid}/schedstat").split())
    except (OSError, ValueError):
        return None, None
    return ran / 1e9, waited / 1e9


@dataclass(frozen=True)
class Target:
    """A process by pid and start time (clock ticks since boot): a recycled pid is another process.

    `program` is what the kernel gave to the program that ran when the process was opened: where it begins, and the
    random bytes that each exec draws anew. None where that could not be read.
    """

    pid: int
    start_time: int
    exe: str  # where /proc/PID/exe points, for people to read
    program: bytes | None = None

    @property
    def image_path(self) -> str:
        """The executable that runs, even when it was deleted, replaced or is in a container."""
        return f"/proc/{self.pid}/exe"

    @property
    def alive(self) -> bool:
        """False when the process ended, is a zombie, or its pid belongs to another one."""
        try:
            _, fields = _stat_fields(self.pid)
        except ValueError:
            return False
        except OSError as error:
            return error.errno in OUT_OF_FILES  # then it is not known
        return fields[0] not in "ZX" and int(fields[19]) == self.start_time

    @property
    def frozen(self) -> bool:
        """Stopped with its whole cgroup, as `docker pause` does it; the threads look asleep then."""
        return cgroup.frozen(self.pid)

    def go_on_line(self) -> str:
        """What to type to make a process that is stopped go on."""
        if self.frozen:
            thaw = cgroup.thaw_line(self.pid) or "docker unpause CONTAINER"
            return f"{thaw}    # its control group is frozen, as docker pause does it"
        with suppress(OSError):
            found = re.search(r"^TracerPid:\s*([1-9]\d*)", read_text(f"/proc/{self.pid}/status"), re.M)
            if found:
                return f"ps -p {found[1]}    # this debugger holds it"
        return f"kill -CONT {self.pid}"

    def check_alive(self) -> None:
        """Raise TargetExited unless `alive`."""
        if not self.alive:
            raise ended(self.pid)

    def check_memory(self) -> None:
        """Raise TargetExited unless `alive` with its memory, which goes before the number does, and in `program` still.

        An exec leaves the number and the start time, and nothing else of what was seen.
        """
        try:
            program = _program_of(self.pid)
        except PermissionError:
            program = None
        except OSError as error:
            raise ended(self.pid, error) from error
        if program == b"":
            raise ended(self.pid)
        # What was seen of it until now was not seen of another one.
        self.check_alive()
        if None not in (program, self.program) and program != self.program:
            raise TargetExited(f"process {self.pid} runs another program now", qemu_hint(self.pid))

    def thread(self, tid: int) -> Thread | None:
        """One thread now, or None when it is gone."""
        try:
            name, fields = _stat_fields(self.pid, tid)
            status = read_text(f"/proc/{self.pid}/task/{tid}/status")
        except (OSError, ValueError):
            return None
        found = re.search(r"^voluntary_ctxt_switches:\s*([0-9]{1,20})$", status, re.M)
        return Thread(
            tid,
            printable(name),
            fields[0],
            self._syscall(tid),
            int(found[1]) if found else 0,
            *_schedule(self.pid, tid),
        )

    def last_cpu(self, tid: int) -> int | None:
        """The CPU that the thread runs on or ran on last, or None when it is gone."""
        try:
            return int(_stat_fields(self.pid, tid)[1][LAST_CPU])
        except (OSError, ValueError, IndexError):
            return None

    @property
    def uid(self) -> int:
        """The user it runs as; 0 where that is not known."""
        with suppress(OSError):
            found = re.search(r"^Uid:\s*\d+\s+(\d+)", read_text(f"/proc/{self.pid}/status"), re.M)
            return int(found[1]) if found else 0
        return 0

    @property
    def domain(self) -> str | None:
        """libvirt's name of the process, from its own command line (-name guest=NAME,…), or None."""
        found = re.match(r"guest=((?:[^,]|,,)+)", self._option("-name") or "")
        return found[1].replace(",,", ",") if found else None

    @property
    def uuid(self) -> str | None:
        """The UUID on the process's own command line, in lower case, or None."""
        found = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", (self._option("-uuid") or "").lower())
        return found[0] if found else None

    def _option(self, name: str) -> str | None:
        """The word after that one on the process's command line, or None."""
        with suppress(OSError, ValueError, IndexError):
            words = read_text(f"/proc/{self.pid}/cmdline").split("\0")
            return words[words.index(name) + 1]
        return None

    def tids(self) -> list[int]:
        """The numbers of all threads now, in order."""
        try:
            return sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/task"))
        except OSError:
            return []

    def threads(self) -> list[Thread]:
        """All threads now, the main thread first; of more than any QEMU has, the oldest."""
        return [thread for tid in self.tids()[:MAX_THREADS] if (thread := self.thread(tid)) is not None]

    def _syscall(self, tid: int) -> SystemCall | None:
        try:
            words = read_text(f"/proc/{self.pid}/task/{tid}/syscall").split()
            if len(words) < 9:
                return None
            number = _number(words[0])
            values = [_number(word[2:] if word.startswith("0x") else word, 16) for word in words[1:]]
        except (OSError, ValueError):
            return None
        return SystemCall(number, syscall_name(number, values[:6]), tuple(values[:6]), values[6], values[7])

    def regions(self) -> list[Region]:
        """The mappings of /proc/PID/maps, in order of address."""
        try:
            text = read_text(f"/proc/{self.pid}/maps")
        except OSError as error:
            raise ended(self.pid, error) from error
        return list(_parse_maps(text[: text.rfind("\n") + 1]))

    def entry_address(self) -> int:
        """Where the executable's entry point was loaded (AT_ENTRY); less e_entry it is the load bias."""
        try:
            entry = _auxiliary(_auxv(self.pid), AT_ENTRY)
        except OSError as error:
            raise ended(self.pid, error) from error
        if entry is None:
            raise ended(self.pid)
        return entry

    def file_of(self, fd: int) -> str | None:
        """What a file descriptor of the process refers to, by a name that can be shown; None if it is not open."""
        try:
            return printable(os.readlink(f"/proc/{self.pid}/fd/{fd}"))
        except OSError as error:
            return LONG_NAME if error.errno == errno.ENAMETOOLONG else None

    def eventfd_count(self, fd: int) -> int | None:
        """The counter of an eventfd of the process, None if it is none."""
        try:
            text = read_text(f"/proc/{self.pid}/fdinfo/{fd}")
        except OSError:
            return None
        found = re.search(r"^eventfd-count:\s*([0-9a-f]{1,16})$", text, re.M)
        return int(found[1], 16) if found else None

    @cached_property
    def name(self) -> str:
        """The process's own name. Raises TargetExited."""
        try:
            return _stat_fields(self.pid)[0]
        except OSError as error:
            raise ended(self.pid, error) from error


def _auxv(pid: int) -> bytes:
    with open(f"/proc/{pid}/auxv", "rb") as file:
        return file.read()


def _auxiliary(vector: bytes, wanted: int) -> int | None:
    words = struct.iter_unpack("QQ", vector[: len(vector) // 16 * 16])
    return next((int(value) for kind, value in words if kind == wanted), None)


def _program_of(pid: int) -> bytes:
    """See Target.program; nothing where the process has no memory any more. OSError where that is not told."""
    vector = _auxv(pid)
    entry, place = _auxiliary(vector, AT_ENTRY), _auxiliary(vector, AT_RANDOM)
    if entry is None or place is None:
        return _LOADING if vector else b""
    told = struct.pack("<QQ", entry, place)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        try:
            return told + os.pread(memory.fileno(), _RANDOM_SIZE, place)
        except (OSError, OverflowError):
            return told  # it is its own to take away


def _parse_maps(text: str) -> Iterator[Region]:
    for line in text.split("\n"):
        if found := _MAPPING.fullmatch(line):
            start, end, permissions, offset, inode, path = found.groups("")
            yield Region(int(start, 16), int(end, 16), permissions, int(inode), path, int(offset, 16))


def open_target(pid: int, line: Callable[..., str] = trace_line) -> Target:
    """The process `pid`, with its start time and executable; `line` is what hints tell to type for a process.

    Raises NoSuchProcess, NotQemu (a thread id, a kernel thread, a zombie) or NotPermitted. Whether the
    executable really is a QEMU, its file tells (tracer/elf).
    """
    try:
        _, fields = _stat_fields(pid)
        status = read_text(f"/proc/{pid}/status")
    except OSError as error:
        if _is_hidden(pid):
            raise NotPermitted(f"process {pid} may not be looked at without root", line(pid)) from error
        raise NoSuchProcess(f"there is no process {pid}{_here()}", qemu_hint(pid, line)) from error
    found = re.search(r"^Tgid:\s*([0-9]{1,10})$", status, re.M)
    if found and int(found[1]) != pid:
        raise NotQemu(f"{pid} is a thread of process {found[1]}", line(int(found[1])))
    if fields[0] in "ZX":
        raise NotQemu(f"process {pid} has ended already (it is a zombie)", qemu_hint(pid, line))
    try:
        exe = _exe_of(pid)
    except PermissionError as error:
        refused = refusal(pid, memory=False)
        message = f"process {pid} may not be looked at {refused.reason}"
        raise NotPermitted(message, _outside(pid, line) or refused.hint or line(pid)) from error
    except OSError as error:
        why = f"process {pid} has no executable: it is a kernel thread or ends"
        raise NotQemu(why, qemu_hint(pid, line)) from error
    return Target(pid, int(fields[19]), exe, _program_if_told(pid))


def _program_if_told(pid: int) -> bytes | None:
    """A process that was just started may still be at its exec."""
    try:
        for _ in range(_LOADING_LOOKS):
            program = _program_of(pid)
            if program != _LOADING:
                return program or None
            time.sleep(_LOADING_S)
    except OSError:
        pass
    return None


def _exe_of(pid: int) -> str:
    """Where /proc/PID/exe points; OSError if it points nowhere or may not be read.

    The kernel writes that into one page. A longer path, or one that " (deleted)" makes longer, is told in
    full by the mapping of the program's entry point alone.
    """
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
    target = Target(pid, 0, "")
    try:
        entry = target.entry_address()
        return next(region.path for region in target.regions() if region.start <= entry < region.end)
    except (TargetExited, StopIteration):
        return LONG_NAME


def find_qemus() -> list[int]:
    """The pids of all processes whose executable's name says that they are a QEMU, lowest first."""
    return sorted(pid for pid in list_pids() if looks_like_qemu(pid))


def list_pids() -> list[int]:
    """Every process."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def looks_like_qemu(pid: int) -> bool:
    """Whether the name of its executable says that it is a QEMU."""
    try:
        return is_qemu_name(os.path.basename(_exe_of(pid)))
    except OSError:
        return False


def is_qemu_name(name: str) -> bool:
    """Whether a program of that name may have QEMU's block layer in it."""
    name = name.removesuffix(" (deleted)")
    return re.search(r"qemu|^kvm\b", name) is not None and not re.match(NO_POOL, name)


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process, and /proc does not show it (hidepid)."""
    try:
        os.kill(pid, 0)  # sends nothing
    except PermissionError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _here() -> str:
    return " in this container" if in_pid_namespace() else ""


def no_qemu() -> NoSuchProcess:
    """The error where no QEMU is found at all."""
    if in_pid_namespace():
        return NoSuchProcess(
            "no QEMU was found in this container, which does not see the processes of its host", WHOLE_CONTAINER
        )
    return NoSuchProcess("no QEMU was found on this host", "pgrep -af 'qemu|kvm'    # one under another name?")


def qemu_hint(pid: int, line: Callable[..., str] = trace_line) -> str:
    """What to type instead where `pid` is no QEMU: the one that has this number inside its container, if any."""
    found = _outside(pid, line)
    if found is None and in_pid_namespace() and not find_qemus():
        return WHOLE_CONTAINER
    return found or "pgrep -a qemu"


def _outside(pid: int, line: Callable[..., str]) -> str | None:
    inside = [
        outer for outer in list_pids() if outer != pid and _innermost_pid(outer) == pid and looks_like_qemu(outer)
    ]
    if not inside:
        return None
    return f"{line(*sorted(inside))}    # its number on this host; {pid} is inside its container"


def _innermost_pid(pid: int) -> int | None:
    """The number of a process in its own pid namespace, where that is not this one's; else None."""
    with suppress(OSError):
        found = re.search(r"^NSpid:\s*[0-9]+.*\s([0-9]{1,10})$", read_text(f"/proc/{pid}/status"), re.M)
        return int(found[1]) if found else None
    return None
