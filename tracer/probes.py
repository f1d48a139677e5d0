"""The probes: compile, load, attach, read maps. The only importer of bcc.

Knows: bpf/aio_trace.c and .h, BCC and how its errors read. Does not know ELF, QEMU's structures beyond
the offsets that it hands on, or verdicts.
"""

from __future__ import annotations

import atexit
import ctypes as ct
import errno
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from tracer.errors import BccMissing, NotPermitted, NoUprobes, ProbeError
from tracer.layout import ElementLayout
from tracer.posix_aio import SINCE_4_0, Order
from tracer.sites.model import CALLBACK, DONE, SUBMIT, Site

# The same as in bpf/aio_trace.h; tests/kernel compares the two.
KINDS = ("other", "read", "write", "ioctl", "flush", "discard", "write-zeroes", "copy-range", "truncate")
STAGES = ("submit_to_done", "done_to_callback", "total")
SUB_BUCKET_BITS = 2
BUCKETS = 43 << SUB_BUCKET_BITS
FLAG_NO_CALLBACK = 1
FLAG_BEFORE = 2
MAX_REQUESTS = 10240
BPF_NOEXIST, BPF_EXIST = 1, 2

#: Kinds times files whose counts are told apart; further files are counted by kind only.
MAX_STATISTICS = 1024
NO_FD = -1

#: bpf/aio_trace.c has as many programs for each site, one a register.
MAX_REGISTERS = 4
UPROBE_PMU = "/sys/bus/event_source/devices/uprobe/type"
CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 21, 38, 39


class RequestRecord(ct.Structure):
    """`struct request_record` of bpf/aio_trace.h; times in ns of CLOCK_MONOTONIC."""

    _fields_ = (
        ("submit_ns", ct.c_uint64),
        ("done_ns", ct.c_uint64),
        ("kind", ct.c_uint32),
        ("flags", ct.c_uint32),
        ("fd", ct.c_int32),
        ("reserved", ct.c_uint32),
    )


class StatisticsKey(ct.Structure):
    """`struct statistics_key` of bpf/aio_trace.h."""

    _fields_ = (("kind", ct.c_uint32), ("fd", ct.c_int32))


class StageStatistics(ct.Structure):
    """`struct stage_statistics` of bpf/aio_trace.h."""

    _fields_ = (
        ("count", ct.c_uint64),
        ("sum_ns", ct.c_uint64),
        ("max_ns", ct.c_uint64),
        ("buckets", ct.c_uint64 * BUCKETS),
    )


COUNTERS = ("submitted", "done", "completed", "cancelled", "no_callback", "before", "map_full", "late", "missed")


class KindStatistics(ct.Structure):
    """`struct statistics` of bpf/aio_trace.h: one kind on one file on one CPU."""

    _fields_ = (
        *((name, ct.c_uint64) for name in COUNTERS),
        ("stages", StageStatistics * len(STAGES)),
    )


@dataclass(frozen=True)
class Record:
    """A request under way as the probes saw it; its identity is all of its fields but `kind`.

    Times in ns of CLOCK_MONOTONIC, 0 where not (yet) seen. `before`: it was there when we came.
    """

    request: int
    submit_ns: int
    done_ns: int
    kind: str
    flags: int

    @property
    def before(self) -> bool:
        """It was in QEMU's memory already when we came; its times are when we first saw it."""
        return bool(self.flags & FLAG_BEFORE)


@dataclass
class Histogram:
    """Latencies of one stage: count, sum and maximum in ns, counts by bucket."""

    count: int = 0
    sum_ns: int = 0
    max_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, stage: StageStatistics) -> None:
        """Add what one CPU counted."""
        if not stage.count:
            return
        self.count += stage.count
        self.sum_ns += stage.sum_ns
        self.max_ns = max(self.max_ns, stage.max_ns)
        self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, stage.buckets, strict=True)]


@dataclass
class Statistics:
    """What the probes counted since they were attached: of one kind on one file, or of several."""

    submitted: int = 0
    done: int = 0
    completed: int = 0
    cancelled: int = 0
    no_callback: int = 0
    before: int = 0
    map_full: int = 0
    late: int = 0
    missed: int = 0
    stages: list[Histogram] = field(default_factory=lambda: [Histogram() for _ in STAGES])

    def add(self, cpu: KindStatistics) -> None:
        """Add what one CPU counted."""
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(cpu, name))
        for mine, theirs in zip(self.stages, cpu.stages, strict=True):
            mine.add(theirs)


#: A kind and the file descriptor that it is on, None where that is not known.
Subject = tuple[str, int | None]


def bucket_upper_ns(index: int) -> int:
    """The largest value in ns that falls into bucket `index`; bucket_of() of bpf/aio_trace.c reversed."""
    octave, part = index >> SUB_BUCKET_BITS, index & ((1 << SUB_BUCKET_BITS) - 1)
    if octave < SUB_BUCKET_BITS:
        return index
    width = 1 << (octave - SUB_BUCKET_BITS)
    return (1 << octave) + (part + 1) * width - 1


@dataclass(frozen=True)
class Parameters:
    """What the programs are compiled for besides sites and layout; `deadline_s` in seconds."""

    max_requests: int = MAX_REQUESTS
    deadline_s: float = 1.0
    order: Order = SINCE_4_0


DEFAULT_PARAMETERS = Parameters()


def check_host() -> None:
    """Raise NotPermitted, NoUprobes or BccMissing where probes cannot be attached on this host."""
    if not permitted():
        raise NotPermitted(
            "attaching probes needs root, or CAP_BPF and CAP_PERFMON with CAP_SYS_PTRACE",
            f"sudo {shlex.join(['aio-trace', *sys.argv[1:]])}",
        )
    if not os.path.exists(UPROBE_PMU):
        raise NoUprobes(
            "this kernel has no uprobes that perf can attach (CONFIG_UPROBE_EVENTS, since Linux 4.17)",
            "grep UPROBE /boot/config-$(uname -r)",
        )
    import_bcc()


def permitted() -> bool:
    """Whether this process may load and attach probes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read(), re.M)
    effective = int(found[1], 16) if found else 0
    return bool(effective >> CAP_SYS_ADMIN & 1) or bool(effective >> CAP_BPF & effective >> CAP_PERFMON & 1)


def import_bcc() -> Any:
    """The bcc package, or BccMissing."""
    try:
        import bcc
    except (ImportError, OSError) as error:
        raise BccMissing(
            f"Python's bcc package cannot be imported by {sys.executable} ({error})",
            "apt-get install python3-bpfcc    # Debian, Ubuntu;  RHEL, Fedora: dnf install python3-bcc",
        ) from error
    return bcc


class _Output:
    """What BCC, clang and the kernel's verifier printed."""

    text = ""

    def last_line(self) -> str:
        """The first line that says error, or else the last line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines[-1:] or [""])[0]


@contextmanager
def _quiet() -> Iterator[_Output]:
    """Catch what C code prints to standard output and error meanwhile."""
    output = _Output()
    with os.fdopen(os.memfd_create("output"), "rb") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        try:
            for fd, _ in saved:
                os.dup2(file.fileno(), fd)
            yield output
        finally:
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
            file.seek(0)
            output.text = file.read().decode(errors="replace")


def source_folder() -> Path:
    """The folder of the probe programs, wherever the package is installed."""
    return Path(str(resources.files("bpf")))


def compile_flags(sites: Sequence[Site], element: ElementLayout, what: Parameters, cmpxchg: bool) -> list[str]:
    """The -D parameters of bpf/aio_trace.c for these sites and offsets."""
    flags = {
        "REQUEST_CALLBACK": element.callback,
        "REQUEST_ARG": element.arg,
        "REQUEST_RET": element.ret,
        "ARG_AIO_TYPE": what.order.kind,
        "ARG_AIO_FILDES": what.order.fd,
        "MAX_REQUESTS": what.max_requests,
        "MAX_STATISTICS": MAX_STATISTICS,
        "DEADLINE_NS": f"{int(what.deadline_s * 1e9)}ULL",
        "WITH_SUBMIT": int(any(site.name == SUBMIT for site in sites)),
        "CALLBACK_MAY_BE_NULL": int(any(site.without_callback for site in sites)),
        "HAVE_CMPXCHG": int(cmpxchg),
    }
    registers = {program.upper().removeprefix("ON_"): register for program, (_, register) in programs(sites).items()}
    return [
        f"-I{source_folder()}",
        *(f"-D{name}={value}" for name, value in flags.items()),
        *(f"-D{name}_REGISTER={_member(register)}" for name, register in registers.items()),
    ]


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


class Probes:
    """The probes on one process; close() or the end of this process detaches them."""

    def __init__(
        self, pid: int, sites: Sequence[Site], element: ElementLayout, what: Parameters = DEFAULT_PARAMETERS
    ) -> None:
        """Compile and load; attach() follows. Raises BccMissing, NotPermitted or ProbeError."""
        self._pid = pid
        self._sites = sites
        self._max_requests = what.max_requests
        self._keys = (ct.c_uint64 * what.max_requests)()
        self._leaves = (RequestRecord * what.max_requests)()
        bcc = import_bcc()
        os.environ["BCC_KERNEL_SOURCE"] = str(source_folder())
        # What kernel developers build for is not what this machine is, but BCC would believe it.
        os.environ.pop("ARCH", None)
        self.log = ""
        for cmpxchg in (True, False):
            with _quiet() as output:
                error = self._load(bcc, compile_flags(sites, element, what, cmpxchg))
            self.log += output.text
            if error is None:
                break
        else:
            raise _translated("compile and load the probes", error, output)
        self._requests = self._bpf[b"requests"]
        self._statistics = self._bpf[b"statistics"]
        self._cpus = _possible_cpus()
        self._lib = bcc.libbcc.lib
        self._prepare()

    def _load(self, bcc: Any, flags: list[str]) -> Exception | None:
        source = str(source_folder() / "aio_trace.c")
        try:
            self._bpf = bcc.BPF(src_file=source.encode(), cflags=flags)
            for program in programs(self._sites):
                self._bpf.load_func(program.encode(), bcc.BPF.KPROBE)
        except Exception as error:  # bcc raises bare Exception
            return error
        return None

    def _prepare(self) -> None:
        """Counts by kind alone, for what is not on a file or on one file too many."""
        empty = (KindStatistics * self._cpus)()
        for kind in range(len(KINDS)):
            key = StatisticsKey(kind, NO_FD)
            self._lib.bpf_update_elem(self._statistics.map_fd, ct.byref(key), ct.byref(empty), BPF_NOEXIST)

    def attach(self) -> None:
        """Attach all sites: callback first, submit last, so that no stage is seen without the next one."""
        order = sorted(self._sites, key=lambda site: (CALLBACK, DONE, SUBMIT).index(site.name))
        with _quiet() as output:
            error = self._attach(order)
        self.log += output.text
        if error is not None:
            self.close()
            raise _translated("attach the probes", error, output)

    def _attach(self, sites: Sequence[Site]) -> Exception | None:
        exe = f"/proc/{self._pid}/exe".encode()
        try:
            names = {key: program.encode() for program, key in programs(self._sites).items()}
            for site in sites:
                name = names[site.name, site.register]
                self._bpf.attach_uprobe(name=exe, addr=site.address, fn_name=name, pid=self._pid)
        except Exception as error:  # bcc raises bare Exception
            return error
        return None

    def records(self) -> dict[int, Record]:
        """The requests under way, by address; one that is there all the while is never left out."""
        found = self._batches()
        return dict(self._walk()) if found is None else found

    def _batches(self) -> dict[int, Record] | None:
        """A few system calls for all; None where the kernel has no batches (before 5.6).

        Not bcc's items_lookup_batch(): it hands the kernel one variable both for the count and for the place
        to go on from.
        """
        found: dict[int, Record] = {}
        place, count = ct.c_uint32(), ct.c_uint32()
        started = False
        while True:
            count.value = self._max_requests
            failed = self._lib.bpf_lookup_batch(
                self._requests.map_fd,
                ct.byref(place) if started else None,
                ct.byref(place),
                self._keys,
                self._leaves,
                ct.byref(count),
            )
            if failed and ct.get_errno() != errno.ENOENT:
                return None
            keys, leaves = self._keys[: count.value], self._leaves[: count.value]
            found |= {key: _record(key, leaf) for key, leaf in zip(keys, leaves, strict=True)}
            if failed:
                return found
            started = True

    def _walk(self) -> Iterator[tuple[int, Record]]:
        """Entry by entry; bounded, since a busy map may start the walk over when an entry goes."""
        for key in islice(self._requests.keys(), 4 * self._max_requests):
            record = self.record(key.value)
            if record is not None:
                yield key.value, record

    def record(self, request: int) -> Record | None:
        """One request's record now, or None."""
        leaf = RequestRecord()
        key = ct.c_uint64(request)
        if self._lib.bpf_lookup_elem(self._requests.map_fd, ct.byref(key), ct.byref(leaf)) < 0:
            return None
        return _record(request, leaf)

    def adopt(self, request: int, kind: str, seen_ns: int, done: bool) -> None:
        """Follow a request that was there when we came, unless the probes follow it already."""
        known = self.record(request)
        if known and not (known.before and done and not known.done_ns):
            return
        submit_ns = known.submit_ns if known else seen_ns
        leaf = RequestRecord(submit_ns, seen_ns if done else 0, KINDS.index(kind), FLAG_BEFORE, NO_FD)
        key = ct.c_uint64(request)
        flags = BPF_EXIST if known else BPF_NOEXIST
        self._lib.bpf_update_elem(self._requests.map_fd, ct.byref(key), ct.byref(leaf), flags)

    def forget(self, record: Record) -> None:
        """Drop a record whose request memory shows to be gone, unless it has become another one."""
        if self.record(record.request) == record:
            key = ct.c_uint64(record.request)
            self._lib.bpf_delete_elem(self._requests.map_fd, ct.byref(key))

    def statistics(self) -> dict[Subject, Statistics]:
        """Counts since the start, by (kind, file descriptor or None)."""
        keys = list(islice(self._statistics.keys(), 2 * MAX_STATISTICS))
        subjects = sorted({(key.kind, key.fd) for key in keys if key.kind < len(KINDS)})
        return {(KINDS[kind], None if fd == NO_FD else fd): self._counts_of(kind, fd) for kind, fd in subjects}

    def _counts_of(self, kind: int, fd: int) -> Statistics:
        values = (KindStatistics * self._cpus)()
        key = StatisticsKey(kind, fd)
        total = Statistics()
        if self._lib.bpf_lookup_elem(self._statistics.map_fd, ct.byref(key), ct.byref(values)) == 0:
            for value in values:
                total.add(value)
        return total

    def close(self) -> None:
        """Detach and unload; what BCC prints about tracefs meanwhile is of no interest."""
        with _quiet() as output:
            for name in list(self._bpf.uprobe_fds):
                # Closing the descriptor detaches; what bcc does after it fails without tracefs, and would
                # leave the others attached.
                with suppress(Exception):
                    self._bpf.detach_uprobe_event(name)
                with suppress(KeyError):
                    self._bpf._del_uprobe_fd(name)
            with suppress(Exception):
                self._bpf.cleanup()
        # BCC would clean up again when Python ends, and fail noisily.
        atexit.unregister(self._bpf.cleanup)
        self.log += output.text


def _record(request: int, leaf: Any) -> Record:
    kind = KINDS[leaf.kind] if leaf.kind < len(KINDS) else KINDS[0]
    return Record(request, leaf.submit_ns, leaf.done_ns, kind, leaf.flags)


def _possible_cpus() -> int:
    """How many values a per-CPU map entry has: the highest possible CPU plus one."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(re.split("[-,]", text)[-1]) + 1


def _translated(what: str, error: Exception | None, output: _Output) -> ProbeError | NotPermitted:
    """BCC's bare exceptions as ours, with all that was printed as a note."""
    reason = output.last_line() or str(error)
    text = output.text.lower()
    translated: ProbeError | NotPermitted
    # The verifier answers "permission denied", too, but tells what it has looked at.
    if ("not permitted" in text or "permission denied" in text) and "processed " not in text:
        translated = NotPermitted(
            f"the kernel does not permit to {what}: {reason}",
            "cat /sys/kernel/security/lockdown /proc/sys/kernel/perf_event_paranoid",
        )
    else:
        hint = f"{shlex.join(['aio-trace', '-v', *sys.argv[1:]])}    # shows all that BCC printed"
        translated = ProbeError(f"could not {what}: {reason}", hint)
    translated.add_note(output.text)
    return translated
