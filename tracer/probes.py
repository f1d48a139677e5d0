"""The probes: load, attach, read what they count, by process.

Knows: bpf/aio_trace.c and .h, and when a program that was compiled before will do. Does not know ELF beyond
where an address is in the file, QEMU's structures beyond the offsets that it hands on, or verdicts.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import platform
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache as remember
from functools import partial
from typing import TYPE_CHECKING

import bpf
from tracer import cache, kernel
from tracer.compiler import BccNotFound, Compiled, CompilerFailed, CompilerKilled, bcc_version, compile_apart
from tracer.errors import BccMissing, HostError, NotPermitted, NoUprobes, ProbeError, add_note
from tracer.executable import Executable
from tracer.kernel import EXIST, NOEXIST, UPROBE_PMU, Map
from tracer.layout import ElementLayout
from tracer.maps import (
    CALLED,
    FLAG_BEFORE,
    FLAG_OVERFLOW,
    KINDS,
    MODE_ALERT,
    MODE_FULL,
    MODE_NONE,
    NO_FD,
    THE_PROCESS,
    WAYS,
    KindStatistics,
    Process,
    Record,
    RequestKey,
    RequestRecord,
    RequestSet,
    Share,
    Statistics,
    StatisticsKey,
    Subject,
    record_of,
    set_of,
    statistics_of,
)
from tracer.posix_aio import SINCE_4_0, Order
from tracer.records import dataclass
from tracer.rights import FIRST_PID_NAMESPACE, INSTEAD_OF_ROOT, TO_ATTACH, WHOLE_CONTAINER, may_attach
from tracer.sites.model import CALLBACK, DONE, SUBMIT, Site

if TYPE_CHECKING:
    from pathlib import Path

SET_BITS = 12
MAX_REQUESTS = 10240
MAX_PROCESSES = 1024
#: Processes times kinds times files whose counts are told apart; further files are counted by kind only.
MAX_STATISTICS = 16384
#: The same, for one process and shared, where the kernel wants the memory of all (6 KiB each) beforehand.
PREALLOCATED_STATISTICS, PREALLOCATED_SHARED = 512, 4096
#: What one process may take of what all share is one part in so many; of the sets it is half of each.
SHARES = 16
#: How long a worker may take from QEMU's bottom half to its own probe when its callback has overtaken it.
CALLED_FOR_NS = 100_000_000
#: How long after probes are attached a callback may be of a request whose done hit they did not see.
SETTLING_NS = 1_000_000_000

#: bpf/aio_trace.c has as many programs for each site, one a register.
MAX_REGISTERS = 4
IN_THE_WAY_S = (0.05, 0.2)
SYSFS_PMUS = "/sys/bus/event_source/devices"
#: The kind of what is kept about compilations that came to nothing.
NOT_COMPILED = "not compiled"

_ARRAY_KEY = struct.pack("<I", 0)
_RECORD_SIZE, _SET_SIZE = ct.sizeof(RequestRecord), ct.sizeof(RequestSet)
_WORDS = _RECORD_SIZE // 8
_COUNTERS_FROM, _COUNTERS_TO = KindStatistics.completed.offset, KindStatistics.stages.offset


@dataclass(frozen=True)
class Parameters:
    """What the programs are compiled for besides sites and layout.

    `deadline_s` and `fresh_s` in seconds: what was read is good for the others that ask within `fresh_s`.
    `shared`: the probes are in every process of the executable, and a map says which are watched; one of them has one
    part in `shares` of what all share at most.
    """

    max_requests: int = MAX_REQUESTS
    deadline_s: float = 1.0
    order: Order = SINCE_4_0
    shared: bool = False
    fresh_s: float = 0.0
    set_bits: int = SET_BITS
    shares: int = 1
    extra_flags: tuple[str, ...] = ()

    @property
    def overflow_of_one(self) -> int:
        """So many requests of one process are in the map `overflow` at most."""
        return max(self.max_requests // self.shares, 1)


DEFAULT_PARAMETERS = Parameters()


def check_host() -> None:
    """Raise NotPermitted or NoUprobes where probes cannot be attached on this host."""
    if not may_attach():
        raise _not_permitted()
    lacking = no_uprobes()
    # One link for many places does without perf, and so without /sys.
    if lacking is not None and not _has_multi():
        raise lacking


def _not_permitted() -> NotPermitted:
    import shlex

    if os.geteuid() == 0:
        lacks = f"root here lacks {TO_ATTACH}, as in most containers"
        return NotPermitted(f"attaching probes is not permitted: {lacks}", WHOLE_CONTAINER)
    return NotPermitted(
        f"attaching probes needs root, or {INSTEAD_OF_ROOT}",
        f"sudo {shlex.join(['aio-trace', *sys.argv[1:]])}",
    )


def no_uprobes() -> NoUprobes | None:
    """The error where perf shows no uprobes; None where it does."""
    if os.path.exists(UPROBE_PMU):
        return None
    if not os.path.isdir(SYSFS_PMUS):
        return NoUprobes(
            "/sys is not mounted here, or not whole, so that the kernel's uprobes cannot be seen",
            "mount -t sysfs sysfs /sys    # a container: docker run -v /sys:/sys:ro --privileged --pid=host",
        )
    return NoUprobes(
        "this kernel has no uprobes that perf can attach (CONFIG_UPROBE_EVENTS, since Linux 4.17)",
        "grep UPROBE /boot/config-$(uname -r)",
    )


def source_folder() -> Path:
    """The folder of the probe programs, wherever the package is installed."""
    from pathlib import Path

    return Path(bpf.__path__[0])


def compile_flags(sites: Sequence[Site], element: ElementLayout, what: Parameters, atomics: bool) -> list[str]:
    """The -D parameters of bpf/aio_trace.c for these sites and offsets."""
    flags = {
        "REQUEST_CALLBACK": element.callback,
        "REQUEST_ARG": element.arg,
        "REQUEST_RET": element.ret,
        "ARG_AIO_TYPE": what.order.kind,
        "ARG_AIO_FILDES": what.order.fd,
        "SET_BITS": what.set_bits,
        "MAX_REQUESTS": what.max_requests,
        "MAX_PROCESSES": MAX_PROCESSES,
        "MAX_STATISTICS": _max_statistics(what),
        "PREALLOCATED": int(not _may_allocate()),
        "CALLED_FOR_NS": CALLED_FOR_NS,
        "CALLBACK_MAY_BE_NULL": int(any(site.without_callback for site in sites)),
        "HAVE_ATOMICS": int(atomics),
        "SHARED": int(what.shared),
        "WAYS_OF_ONE": WAYS // min(what.shares, 2),
        "OVERFLOW_OF_ONE": what.overflow_of_one,
        "STATISTICS_OF_ONE": _max_statistics(what) // what.shares,
    }
    registers = {program.upper().removeprefix("ON_"): register for program, (_, register) in programs(sites).items()}
    return [
        f"-I{bpf.__path__[0]}",
        *(f"-D{name}={value}" for name, value in flags.items()),
        *(f"-D{name}_REGISTER={_member(register)}" for name, register in registers.items()),
        *what.extra_flags,
    ]


def _max_statistics(what: Parameters) -> int:
    if _may_allocate():
        return MAX_STATISTICS
    return PREALLOCATED_SHARED if what.shared else PREALLOCATED_STATISTICS


def programs(sites: Sequence[Site]) -> dict[str, tuple[str, str]]:
    """The programs that these sites need, with site name and register: one for each pair of the two.

    Copies of a site that compilers inlined may hold the request in different registers.
    """
    found: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(site.name for site in sites):
        registers = list(dict.fromkeys(site.register for site in sites if site.name == name))
        if len(registers) > MAX_REGISTERS:
            raise ProbeError(f"the copies of the site {name} hold the request in {len(registers)} registers")
        for number, register in enumerate(registers):
            found[f"on_{name}" + (f"_{number + 1}" if number else "")] = name, register
    return found


def _member(register: str) -> str:
    """The member of struct pt_regs (bpf/aio_trace.c): rbp -> bp, x19 -> regs[19], x19-0x44 -> regs[19]-0x44."""
    name = re.split("[+-]", register)[0]
    number = name[1:]
    member = f"regs[{number}]" if name.startswith("x") else name if number.isdigit() else number
    return member + register[len(name) :]


# What is compiled, or was before


def _compiled(flags: Sequence[str], names: Sequence[str], trust: bool) -> tuple[Compiled, str]:
    """The programs, and what bcc printed; with `trust`, those that the same compilation gave before."""
    key = _key(flags, names)
    kept = cache.load("programs", key) if trust else None
    if kept is not None:
        with suppress(ValueError, KeyError, TypeError):
            known = Compiled.from_bytes(kept)
            if set(known.programs) == set(names):
                return known, ""
    folder = source_folder()
    made, printed = compile_apart(folder / "aio_trace.c", folder, flags, names)
    cache.store("programs", key, made.to_bytes())
    return made, printed


def _key(flags: Sequence[str], names: Sequence[str]) -> bytes:
    """All that decides what comes of a compilation: sources, flags, bcc, and the kernel that it looks at."""
    found = [(at, name) for at, _, files in os.walk(bpf.__path__[0]) for name in files]
    sources = sorted(os.path.join(at, name) for at, name in found if name.endswith((".c", ".h")))
    parts = [str(bcc_version()), platform.release(), platform.version(), platform.machine(), *flags, "", *names, ""]
    texts = [_bytes_of(path) for path in sources]
    return b"\0".join([*(part.encode(errors="surrogateescape") for part in parts), *texts])


def _bytes_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@remember
def _has_multi() -> bool:
    return kernel.has_multi()


@remember
def _has_atomics() -> bool:
    return kernel.has_atomics()


@remember
def _may_allocate() -> bool:
    return kernel.may_allocate()


class Programs:
    """The programs for one build, loaded, with their maps: for one process or, shared, for many."""

    def __init__(
        self,
        file: Executable | None,
        sites: Sequence[Site],
        element: ElementLayout,
        what: Parameters = DEFAULT_PARAMETERS,
    ) -> None:
        """Compile if need be, and load. `file` is what is attached to, and stays its owner's. Raises HostError.

        Without a file they are loaded only.
        """
        self._file = file
        self._sites = tuple(sites)
        self._what = what
        self.log = ""
        self._maps: dict[str, Map] = {}
        self._programs: dict[str, int] = {}
        self._lasting = False  # the compiler failed, and would again
        self._shared_links: dict[str, list[int]] = {}
        self._watched: dict[int, int] = {}  # mode by process
        self._read: tuple[float, dict[int, dict[int, Record]]] = (0.0, {})
        self._keys: tuple[float, dict[int, list[StatisticsKey]]] = (0.0, {})
        self._multi = _has_multi()
        self._load_best(element)
        self._mapped = self._maps["requests"].mapped() if "requests" in self._maps else None
        template = KindStatistics(deadline_ns=int(what.deadline_s * 1e9))
        self._template = bytes(template)
        self._maps["template"].update(_ARRAY_KEY, self._template)

    # -- load ---------------------------------------------------------------------------------------

    def _load_best(self, element: ElementLayout) -> None:
        """With compare and exchange where both kernel and compiler have it, else without. Raises HostError."""
        extra = _namespace_flags() if self._what.shared else []
        with_atomics, without = (
            [*compile_flags(self._sites, element, self._what, atomics), *extra] for atomics in (True, False)
        )
        key = _key(with_atomics, list(programs(self._sites)))
        worth_trying = _has_atomics() and cache.load(NOT_COMPILED, key) is None
        if worth_trying and self._load_any(with_atomics) is None:
            return
        failed = self._lasting
        error = self._load_any(without)
        if error is not None:
            raise error
        if failed:
            # To fail takes the compiler as long as not to, and it would do so at every start.
            cache.store(NOT_COMPILED, key, b"")

    def _load_any(self, flags: Sequence[str]) -> HostError | None:
        """Load what was compiled before; if that will not do, what is compiled now."""
        error: HostError | None = None
        for trust in (True, False):
            try:
                made, printed = _compiled(flags, list(programs(self._sites)), trust)
                self.log += printed
            except BccNotFound as missing:
                raise BccMissing(
                    f"no Python here can import the bcc package ({missing})",
                    "apt-get install python3-bpfcc    # Debian, Ubuntu;  RHEL, Fedora: dnf install python3-bcc",
                ) from missing
            except CompilerKilled as killed:
                raise ProbeError(f"could not compile the probes: {killed}", _without_probes()) from killed
            except CompilerFailed as failed:
                self._lasting = failed.lasting
                return _translated("compile and load the probes", str(failed), _notes(failed))
            try:
                self._load(made)
            except OSError as failed:
                self._unload()
                error = _translated("compile and load the probes", failed.strerror or str(failed), _notes(failed))
                if isinstance(error, NotPermitted):
                    raise error from failed
                continue
            return None
        return error

    def _load(self, made: Compiled) -> None:
        for shape in made.maps:
            self._maps[shape.name] = Map(shape.kind, shape.key_size, shape.value_size, shape.entries, shape.flags)
        fds = [self._maps[shape.name].fd for shape in made.maps]
        for name in made.programs:
            self._programs[name] = kernel.load(made.instructions(name, fds), self._multi)

    def _unload(self) -> None:
        for fd in self._programs.values():
            os.close(fd)
        for each in self._maps.values():
            each.close()
        self._programs, self._maps = {}, {}

    # -- attach -------------------------------------------------------------------------------------

    def _number(self, pid: int) -> int:
        """What the programs call the process."""
        return pid if self._what.shared else THE_PROCESS

    def _process_key(self, pid: int) -> bytes:
        return struct.pack("<I", pid if self._what.shared else 0)

    def enter(self, pid: int, mode: int) -> None:
        """Count for this process from now on, where its probes are attached. Raises ProbeError."""
        if pid not in self._watched:
            self._make_room(pid)
        known = self._process(pid)
        if known.mode == MODE_NONE:
            known.settled_ns = time.monotonic_ns() + SETTLING_NS
        known.mode = mode
        if self._what.shared:
            self._maps["shares"].update(self._process_key(pid), bytes(Share()), NOEXIST)
        self._maps["processes"].update(self._process_key(pid), bytes(known))
        self._watched[pid] = mode

    def _make_room(self, pid: int) -> None:
        """Counts by kind alone, for what is not on a file or on one file too many."""
        statistics = self._maps["statistics"]
        keys = [bytes(StatisticsKey(self._number(pid), kind, 0, NO_FD)) for kind in range(len(KINDS))]
        for key in keys:
            if not statistics.update(key, self._template, NOEXIST) and statistics.lookup(key) is None:
                for made in keys[: keys.index(key)]:
                    statistics.delete(made)
                raise ProbeError(
                    f"there is no room for the counts of process {pid} beside those of {len(self._watched)} others",
                    f"sudo aio-trace --pid {pid}    # by itself",
                )

    def attach(self, pid: int, names: Sequence[str]) -> dict[str, list[int]]:
        """Attach these sites for the process: callback first, submit last, so that no stage lacks the next one.

        The descriptors by site name; with shared probes they are ours, and none is given.
        """
        order = [name for name in (CALLBACK, DONE, SUBMIT) if name in names]
        links = self._shared_links if self._what.shared else {}
        added: dict[str, list[int]] = {}
        try:
            for name in order:
                if name not in links:
                    added[name] = []
                    self._attach_site(name, pid, added[name])
        except ProbeError:
            close_links(added)
            raise
        except OSError as error:
            close_links(added)
            raise _translated("attach the probes", _reason(error), "") from error
        if not self._what.shared:
            return added
        self._shared_links |= added
        return {}

    def _attach_site(self, name: str, pid: int, links: list[int]) -> None:
        assert self._file is not None
        owner, path = 0 if self._what.shared else pid, self._file.path
        for program, (site_name, register) in programs(self._sites).items():
            if site_name != name:
                continue
            copies = [site for site in self._sites if (site.name, site.register) == (name, register)]
            places = [_place_in(self._file, site) for site in copies]
            fd = self._programs[program]
            if self._multi:
                links.append(patient(partial(kernel.attach_multi, fd, path, places, owner)))
                continue
            for place in places:
                links.append(patient(partial(kernel.attach_perf, fd, path, place, owner)))

    def leave(self, pid: int) -> None:
        """Count no more for this process, and forget what was counted; the last one takes shared probes with it."""
        if self._watched.pop(pid, None) is None:
            return
        if not self._what.shared:
            return
        self.detach_unwanted()
        self._maps["processes"].delete(self._process_key(pid))
        self._maps["shares"].delete(self._process_key(pid))
        self._keys, self._read = (0.0, {}), (0.0, {})
        for key in self._statistics_keys(pid):
            self._maps["statistics"].delete(bytes(key))
        self._forget_all(pid)

    def _forget_all(self, pid: int) -> None:
        """Requests, and what stands for those whose callback came first."""
        number = self._number(pid)
        for key in set(self._maps["overflow"].keys()):
            if RequestKey.from_buffer_copy(key).process == number:
                self._maps["overflow"].delete(key)
        if self._mapped is None:
            return
        first = RequestRecord.process.offset // 4
        owners = memoryview(self._mapped[:]).cast("I")[first :: _RECORD_SIZE // 4].tolist()
        for index in [index for index, owner in enumerate(owners) if owner == number]:
            self._free(index * _RECORD_SIZE)

    def detach_unwanted(self) -> None:
        """Take those shared probes away that nobody wants any more."""
        modes = self._watched.values()
        if MODE_FULL not in modes:
            self._detach_shared(SUBMIT)
        if not any(modes):
            self._detach_shared(DONE, CALLBACK)

    def _detach_shared(self, *names: str) -> None:
        close_links({name: self._shared_links.pop(name) for name in names if name in self._shared_links})

    @property
    def is_shared(self) -> bool:
        """Whether the probes are in every process of the executable."""
        return self._what.shared

    def close(self) -> None:
        """Detach and unload; a second time is no error."""
        self._watched = {}
        self._detach_shared(SUBMIT, DONE, CALLBACK)
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None
        self._unload()

    # -- read ---------------------------------------------------------------------------------------

    def _process(self, pid: int) -> Process:
        raw = self._maps["processes"].lookup(self._process_key(pid))
        return Process.from_buffer_copy(raw) if raw else Process()

    def lost(self, pid: int) -> tuple[int, int]:
        """(map_full, missed) of bpf/aio_trace.h."""
        process = self._process(pid)
        return process.map_full, process.missed

    def records(self, pid: int) -> dict[int, Record]:
        """The requests of a process under way, by address; one that is there all the while is never left out."""
        when, found = self._read
        if not self._what.fresh_s or time.monotonic() - when > self._what.fresh_s:
            found = {}
            self._read_overflow(found)
            self._read_sets(found)
            self._read = time.monotonic(), found
        return found.get(self._number(pid), {})

    def refresh(self) -> None:
        """What was read before is not fresh any more."""
        self._read = 0.0, {}
        self._keys = 0.0, {}

    def settled(self, pid: int) -> None:
        """Every request that was done before the probes came is known, or has been called back."""
        process = self._process(pid)
        process.settled_ns = time.monotonic_ns()
        self._maps["processes"].update(self._process_key(pid), bytes(process))

    def spare_overflow(self, pid: int) -> None:
        """The programs need not look into the map `overflow` once nothing of the process is in it any more."""
        process = self._process(pid)
        number = self._number(pid)
        if process.overflow and not any(RequestKey.from_buffer_copy(k).process == number for k in self._overflow()):
            process.overflow = 0
            self._maps["processes"].update(self._process_key(pid), bytes(process))

    def _overflow(self) -> Iterator[bytes]:
        return self._maps["overflow"].keys()

    def _read_overflow(self, found: dict[int, dict[int, Record]]) -> None:
        for _, value in self._maps["overflow"].items():
            raw = RequestRecord.from_buffer_copy(value)
            if raw.done_ns != CALLED:
                found.setdefault(raw.process, {})[raw.request] = record_of(raw)

    def _read_sets(self, found: dict[int, dict[int, Record]]) -> None:
        if self._mapped is None:
            return
        data = self._mapped[:]
        addresses = memoryview(data).cast("Q")[::_WORDS].tolist()
        for index in [index for index, address in enumerate(addresses) if address]:
            raw = RequestRecord.from_buffer_copy(data, index * _RECORD_SIZE)
            if not raw.process or raw.done_ns == CALLED:
                continue
            of_process = found.setdefault(raw.process, {})
            if raw.request in of_process:
                # A request from before that has gone unseen, and a later one at its address.
                self._take_out(raw.request, raw.process)
            of_process[raw.request] = record_of(raw)

    def _way_of(self, pid: int, request: int) -> int | None:
        """Where in the mapped sets the request is, in bytes."""
        if self._mapped is None:
            return None
        number = self._number(pid)
        first = set_of(request, number, self._what.set_bits) * _SET_SIZE
        for place in range(first, first + WAYS * _RECORD_SIZE, _RECORD_SIZE):
            raw = RequestRecord.from_buffer_copy(self._mapped, place)
            if (raw.request, raw.process) == (request, number):
                return place
        return None

    def _raw(self, pid: int, request: int) -> RequestRecord | None:
        place = self._way_of(pid, request)
        if place is not None and self._mapped is not None:
            return RequestRecord.from_buffer_copy(self._mapped, place)
        raw = self._maps["overflow"].lookup(bytes(RequestKey(request, self._number(pid))))
        return RequestRecord.from_buffer_copy(raw) if raw else None

    def record(self, pid: int, request: int) -> Record | None:
        """One request's record now, or None."""
        raw = self._raw(pid, request)
        return None if raw is None or raw.done_ns == CALLED else record_of(raw)

    def adopt(self, pid: int, record: Record, known: bool) -> bool:
        """Follow a request that the probes did not see from its submit on; False where there is no room for it."""
        flags = record.flags | FLAG_OVERFLOW
        number, kind = self._number(pid), KINDS.index(record.kind)
        raw = RequestRecord(record.request, record.submit_ns, record.done_ns, number, NO_FD, kind, flags)
        key = bytes(RequestKey(record.request, number))
        if known:
            self._maps["overflow"].update(key, bytes(raw), EXIST)
            return True
        process = self._process(pid)
        if self._what.shared and self._in_overflow(pid, process) >= self._what.overflow_of_one:
            return False
        process.overflow = 1
        self._maps["processes"].update(self._process_key(pid), bytes(process))
        put = self._maps["overflow"].update(key, bytes(raw), NOEXIST)
        if put and self._what.shared:
            self._add_taken(pid, -1)
        return put or self._maps["overflow"].lookup(key) is not None

    def forget(self, pid: int, record: Record) -> bool:
        """Drop a record, unless it has become another one; whether it was there."""
        place = self._way_of(pid, record.request)
        if place is None or self._mapped is None:
            found = self.record(pid, record.request) == record
            if found:
                self._take_out(record.request, self._number(pid))
            return found
        if record_of(RequestRecord.from_buffer_copy(self._mapped, place)) != record:
            return False
        self._free(place)
        return True

    def _take_out(self, request: int, number: int) -> None:
        """Out of the map `overflow`, by what the programs call the process; they know how many are there."""
        if self._maps["overflow"].delete(bytes(RequestKey(request, number))) and self._what.shared:
            self._add_taken(number, 1)

    def _in_overflow(self, pid: int, process: Process) -> int:
        raw = self._maps["shares"].lookup(self._process_key(pid))
        share = Share.from_buffer_copy(raw) if raw else Share()
        return int(share.entered - share.left - process.taken)

    def _add_taken(self, pid: int, count: int) -> None:
        process = self._process(pid)
        if process.mode or pid in self._watched:
            process.taken += count
            self._maps["processes"].update(self._process_key(pid), bytes(process))

    def _free(self, place: int) -> None:
        assert self._mapped is not None
        struct.pack_into("<I", self._mapped, place + RequestRecord.process.offset, 0)
        struct.pack_into("<Q", self._mapped, place, 0)

    def _statistics_keys(self, pid: int) -> list[StatisticsKey]:
        when, found = self._keys
        if not self._what.fresh_s or time.monotonic() - when > self._what.fresh_s:
            found = {}
            for raw in set(self._maps["statistics"].keys()):
                key = StatisticsKey.from_buffer_copy(raw)
                if key.kind < len(KINDS):
                    found.setdefault(key.process, []).append(key)
            self._keys = time.monotonic(), found
        return found.get(self._number(pid), [])

    def ended(self, pid: int) -> dict[Subject, Statistics]:
        """What ended since the start, by (kind, file descriptor or None)."""
        found = {}
        for key in self._statistics_keys(pid):
            value = self._maps["statistics"].lookup(bytes(key))
            if value is not None and any(value[_COUNTERS_FROM:_COUNTERS_TO]):
                subject = KINDS[key.kind], None if key.fd == NO_FD else int(key.fd)
                found[subject] = statistics_of(KindStatistics.from_buffer_copy(value))
        return dict(sorted(found.items(), key=str))

    def completed(self, pid: int) -> int:
        """How many requests were called back, over all kinds."""
        values = (self._maps["statistics"].lookup(bytes(key)) for key in self._statistics_keys(pid))
        place = KindStatistics.completed.offset
        return sum(int.from_bytes(value[place : place + 8], "little") for value in values if value)

    def operations(self) -> tuple[int, int]:
        """How many operations on hashes and on arrays; only of programs that were compiled to count them."""
        hashes, arrays = (self._maps["operations"].lookup(struct.pack("<I", kind)) or b"" for kind in range(2))
        return int.from_bytes(hashes, "little"), int.from_bytes(arrays, "little")


class Probes:
    """The probes on one process; close() or the end of this process detaches them."""

    def __init__(
        self,
        pid: int,
        file: Executable,
        sites: Sequence[Site],
        element: ElementLayout,
        what: Parameters = DEFAULT_PARAMETERS,
        loaded: Programs | None = None,
    ) -> None:
        """Load, unless there are `loaded` programs for these sites of `file`; attach() follows. Raises HostError."""
        self._pid = pid
        self._names = tuple(dict.fromkeys(site.name for site in sites))
        self._counts_submits = SUBMIT in self._names
        self._own = loaded is None
        self._programs = loaded or Programs(file, sites, element, what)
        self._links: dict[str, list[int]] = {}
        self._entered = False
        self._dropped_submitted = self._dropped_done = 0
        self._highest: dict[Subject, tuple[int, int]] = {}

    @property
    def log(self) -> str:
        """What bcc printed."""
        return self._programs.log

    @property
    def with_submit(self) -> bool:
        """Whether requests are followed from their submit on."""
        return SUBMIT in self._names

    @property
    def _mode(self) -> int:
        return MODE_FULL if self.with_submit else MODE_ALERT if self._names else MODE_NONE

    def attach(self) -> None:
        """Attach all sites; HostError where that cannot be, and then none is attached."""
        self._programs.enter(self._pid, self._mode)
        self._entered = True
        try:
            self._links |= self._programs.attach(self._pid, self._names)
        except BaseException:
            self.close()
            raise

    def step(self, names: Sequence[str]) -> None:
        """Go on with these sites only, or with these again; none at all is possible."""
        gone = [name for name in self._names if name not in names]
        added = [name for name in names if name not in self._names]
        self._names = tuple(names)
        self._programs.enter(self._pid, self._mode)
        close_links({name: self._links.pop(name) for name in gone if name in self._links})
        self._programs.detach_unwanted()
        self._links |= self._programs.attach(self._pid, added)

    def records(self) -> dict[int, Record]:
        """The requests under way, by address; one that is there all the while is never left out."""
        return self._programs.records(self._pid)

    def under_way(self) -> dict[int, Record]:
        """As records(), without those that ended since shared records were read for another process."""
        found = self.records()
        if not self._programs.is_shared:
            return found
        return {request: record for request, record in found.items() if self.record(request) == record}

    def record(self, request: int) -> Record | None:
        """One request's record now, or None."""
        return self._programs.record(self._pid, request)

    def adopt(self, request: int, kind: str, seen_ns: int, done: bool) -> bool:
        """Follow a request that was there when we came, unless the probes follow it already.

        False where there is no room for it.
        """
        known = self.record(request)
        if known and not (known.before and done and not known.done_ns):
            return True
        submit_ns = known.submit_ns if known else seen_ns
        made = Record(request, submit_ns, seen_ns if done else 0, kind, FLAG_BEFORE)
        return self._programs.adopt(self._pid, made, known is not None)

    def lost(self) -> int:
        """How many requests could not be followed."""
        return self._programs.lost(self._pid)[0]

    def settled(self) -> None:
        """All requests that were there when we came were adopted that are there still."""
        self._programs.settled(self._pid)

    def spare_overflow(self) -> None:
        """None of those that were adopted is there any more."""
        self._programs.spare_overflow(self._pid)

    def forget(self, record: Record) -> None:
        """Drop a record whose request memory shows to be gone, unless it has become another one."""
        if self._programs.forget(self._pid, record) and not record.before:
            self._dropped_submitted += 1
            self._dropped_done += bool(record.done_ns)

    def statistics(self) -> dict[Subject, Statistics]:
        """Counts since the start, by (kind, file descriptor or None).

        The kernel counts what ended; what was submitted and done is that and what is under way. Counts that
        are read while it counts on may be behind, and never go back.
        """
        found = self._programs.ended(self._pid)
        for record in self.under_way().values():
            if not record.before:
                counts = found.setdefault(record.subject, Statistics())
                counts.submitted += 1
                counts.done += bool(record.done_ns)
        self._add_lost(found.setdefault((KINDS[0], None), Statistics()))
        for subject, counts in found.items():
            submitted, done = self._highest.get(subject, (0, 0))
            counts.submitted, counts.done = max(submitted, counts.submitted), max(done, counts.done)
            self._highest[subject] = counts.submitted, counts.done
            counts.submitted *= self._counts_submits
        return found

    def _add_lost(self, counts: Statistics) -> None:
        counts.map_full, counts.missed = self._programs.lost(self._pid)
        lost = counts.map_full + counts.missed
        counts.submitted += lost + self._dropped_submitted
        counts.done += self._dropped_done + (0 if self.with_submit else lost)

    def completed(self) -> int:
        """How many requests were called back."""
        return self._programs.completed(self._pid)

    def close(self) -> None:
        """Detach; the programs are unloaded with their last process."""
        close_links(self._links)
        self._links = {}
        if self._entered:
            self._programs.leave(self._pid)
            self._entered = False
        if self._own:
            self._programs.close()


def _place_in(file: Executable, site: Site) -> int:
    """Where in the file the site is; ProbeError unless the file still holds what it was found by."""
    code = bytes.fromhex(site.code)
    if site.offset is None or not code or file.read(site.offset, len(code)) != code:
        raise ProbeError(
            f"{file.name} was written to after it was read: there is other code at the place of the probe "
            f"{site.name!r}, which was not attached"
        )
    return site.offset


def patient(attach: Callable[[], int]) -> int:
    """Attach; another tool that is just leaving the same place may be in the way for a moment."""
    for wait_s in IN_THE_WAY_S:
        try:
            return attach()
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        time.sleep(wait_s)
    return attach()


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.EINVAL:
        # The kernel wants all probes at a place to name the same semaphore; bcc's Python names one at random.
        reason += "; another tool, one of bcc's perhaps, may hold a probe at the same place"
    return reason


def close_links(links: Mapping[str, Sequence[int]]) -> None:
    """Detach; submit first, so that no request is followed whose end will not be seen."""
    for name in (SUBMIT, DONE, CALLBACK):
        for fd in links.get(name, ()):
            os.close(fd)


def _namespace_flags() -> list[str]:
    """How the programs know processes by the ids that user space knows, which may be in a container."""
    own = os.stat("/proc/self/ns/pid")
    if own.st_ino == FIRST_PID_NAMESPACE:
        return []
    return [f"-DPID_NAMESPACE_DEVICE={own.st_dev}ULL", f"-DPID_NAMESPACE_INODE={own.st_ino}ULL"]


def can_be_shared(pid: int) -> bool:
    """Whether shared programs can tell that process by the id that we know it by."""
    own = os.stat("/proc/self/ns/pid")
    try:
        theirs = os.stat(f"/proc/{pid}/ns/pid")
    except OSError:
        return True
    return own.st_ino in (FIRST_PID_NAMESPACE, theirs.st_ino)


def _without_probes() -> str:
    """The same command, and no compiler is needed."""
    import shlex

    words = sys.argv[1:]
    if "--probes" in words[:-1]:
        at = words.index("--probes")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("--probes=")]
    return f"{shlex.join(['aio-trace', *words, '--probes', 'none'])}    # samples memory and compiles nothing"


def _notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def _translated(what: str, reason: str, output: str) -> ProbeError | NotPermitted:
    """What bcc or the kernel says as ours, with all that was printed as a note."""
    text = f"{reason}\n{output}".lower()
    translated: ProbeError | NotPermitted
    # The verifier answers "permission denied", too, but tells what it has looked at.
    if ("not permitted" in text or "permission denied" in text) and "processed " not in text:
        translated = NotPermitted(
            f"the kernel does not permit to {what}: {reason}",
            "cat /sys/kernel/security/lockdown /proc/sys/kernel/perf_event_paranoid",
        )
    else:
        import shlex

        hint = f"{shlex.join(['aio-trace', '-v', *sys.argv[1:]])}    # shows all that BCC printed"
        translated = ProbeError(f"could not {what}: {reason}", hint)
    add_note(translated, output)
    return translated
