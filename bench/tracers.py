"""Whatever is attached to a load: aio-trace, the floor, and what others would use instead.

Knows: command lines, how each says that it is attached, how many requests it says it saw. Does not know loads
beyond a process, its executable and the probe sites, nor what is made of the figures.

Every tracer runs as a process of its own that dies with the bench, and is ended by SIGINT, as people end it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from tracer.elf import Image
from tracer.errors import LabError
from tracer.lab.process import end, spawn
from tracer.target import find_qemus

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = HERE / "scripts"
AIO_TRACE = (sys.executable, "-c", "from cli import main; main()")
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0
POLL_S = 0.002
MIB = 1 << 20
SITE_NAMES = ("submit", "done", "callback")
TRACEFS = "/sys/kernel/tracing"
EVENT_GROUP = "aio_trace_bench"
NEVER = 1_000_000_000  # hits of a breakpoint that gdb passes over


class TracerFailed(Exception):
    """A tracer could not be attached, or did not end; the text is the reason."""


@dataclass(frozen=True)
class Site:
    """One of the three places: its ELF address, its offset in the file, the register with the request."""

    name: str
    address: int
    offset: int
    register: str


@dataclass(frozen=True)
class Target:
    """What is traced."""

    pid: int
    exe: str
    sites: Mapping[str, Site]


@cache
def sites_of(exe: str) -> Mapping[str, Site]:
    """aio-trace's three sites in that file, as its `check` tells them."""
    command = [*AIO_TRACE, "check", "--exe", exe, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"no probe sites in {exe}: {done.stderr.strip()[-300:]}")
    found = {}
    with Image.open(exe) as image:
        for site in json.loads(done.stdout)["sites"]:
            address = int(site["address"], 16)
            found[site["site"]] = Site(site["site"], address, image.offset_of(address), site["register"])
    return {name: found[name] for name in SITE_NAMES}


def target_of(pid: int, exe: str) -> Target:
    """A target with its sites."""
    return Target(pid, exe, sites_of(exe))


class Tracer:
    """How one tracer is run; subclasses say what is special. Stateless: one object serves all rounds."""

    key = ""
    label = ""
    #: So slow, or so dear in its end, that fewer rounds must do.
    slow = False
    #: What it prints once everything is attached.
    marker = ""
    #: What ends it.
    stop = signal.SIGINT
    #: What the table should say about it.
    note = ""

    def command(self, target: Target, folder: Path) -> list[str]:
        """The command line; `folder` is for files of this one run."""
        raise NotImplementedError

    def environment(self, folder: Path) -> dict[str, str]:
        """What is added to its environment."""
        return {}

    def prepare(self, target: Target, folder: Path) -> None:
        """What must be done before it starts."""

    def clean_up(self, folder: Path) -> None:
        """Undo prepare(), after any end."""

    def attached(self, run: Run) -> bool:
        """Whether everything is attached."""
        return self.marker in run.output()

    def seen(self, run: Run) -> int | None:
        """How many requests it says that it saw, after its end; None if it does not say."""
        return None


@dataclass
class Run:
    """A tracer that is attached; a context manager that ends it whatever happens."""

    tracer: Tracer
    target: Target
    folder: Path
    startup_s: float = 0.0
    detach_s: float = 0.0
    rss_mib: float = 0.0
    peak_mib: float = 0.0
    pids: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] = field(init=False)

    def __enter__(self) -> Run:
        self.folder.mkdir(parents=True)
        try:
            self.tracer.prepare(self.target, self.folder)
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def _start(self) -> None:
        command = self.tracer.command(self.target, self.folder)
        settings = [f"{name}={value}" for name, value in self.tracer.environment(self.folder).items()]
        if shutil.which(command[0]) is None:
            raise TracerFailed(f"{command[0]} is not installed")
        with open(self.folder / "output", "wb") as output:
            began = time.monotonic()
            self.process = spawn(["env", *settings, *command], output)
        while not self.tracer.attached(self):
            if self.process.poll() is not None:
                raise TracerFailed(self._reason())
            if time.monotonic() - began > START_TIMEOUT_S:
                raise TracerFailed(f"not attached within {START_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        self.startup_s = time.monotonic() - began
        self.look()

    def look(self) -> None:
        """Take its processes and their memory now."""
        self.pids = family(self.process.pid)
        self.rss_mib = sum(memory_mib(pid, "VmRSS") for pid in self.pids)
        self.peak_mib = sum(memory_mib(pid, "VmHWM") for pid in self.pids)

    def output(self) -> str:
        """What it printed so far."""
        return (self.folder / "output").read_text(errors="replace")

    def _reason(self) -> str:
        return reason_in(self.output()) or f"ended with status {self.process.returncode}"

    def detach(self) -> None:
        """Tell it to end, and wait until it is gone; TracerFailed if it does not go or had gone before."""
        if self.process.poll() is not None:
            raise TracerFailed(f"ended by itself: {self._reason()}")
        began = time.monotonic()
        self.process.send_signal(self.tracer.stop)
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TracerFailed(f"did not end within {END_TIMEOUT_S:g} s of {self.tracer.stop.name}") from None
        self.detach_s = time.monotonic() - began

    def _close(self) -> None:
        try:
            if hasattr(self, "process"):
                end(self.process)
        finally:
            self.tracer.clean_up(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()


def reason_in(output: str) -> str:
    """The line of a failed tracer's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and "RLIMIT_MEMLOCK" not in line]
    telling = [line for line in lines if re.search(r"error|cannot|failed|not permitted|unable", line, re.IGNORECASE)]
    return (telling or lines or [""])[0][:200]


def family(pid: int) -> tuple[int, ...]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += parents.get(member, [])
    return tuple(found)


def memory_mib(pid: int, name: str) -> float:
    """VmRSS or VmHWM of a process; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return 0.0
    found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 / MIB if found else 0.0


# aio-trace


class AioTrace(Tracer):
    """aio-trace itself. `programs` is where compiled programs are kept; None: a new folder every time, cold.

    `watch` are processes to watch instead of the target; empty: --all.
    """

    def __init__(
        self,
        mode: str,
        programs: Path | None,
        *,
        key: str = "",
        label: str = "",
        watch: Sequence[int] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.mode, self.programs, self.watch, self.options = mode, programs, watch, options
        self.key = key or (mode if programs else f"{mode}-cold")
        self.label = label or f"aio-trace {mode}{'' if programs else ', cold'}"
        self._expected = 1

    def command(self, target: Target, folder: Path) -> list[str]:
        """At the default interval, so that what the tables cost is part of it."""
        pids = [target.pid] if self.watch is None else self.watch
        chosen = [word for pid in pids for word in ("--pid", str(pid))] or ["--all"]
        # What is measured is the mode that is asked for, not what the budget would make of it.
        return [*AIO_TRACE, *chosen, "--json", "--probes", self.mode, "--budget", "none", *self.options]

    def environment(self, folder: Path) -> dict[str, str]:
        """A cache of the bench's own; and Python may keep what it compiled, as where it is installed it has."""
        return {"XDG_CACHE_HOME": str(self.programs or folder / "cache"), "PYTHONDONTWRITEBYTECODE": ""}

    def prepare(self, target: Target, folder: Path) -> None:
        """With --all, other people's QEMUs would be traced, too: refuse where there are any."""
        self._expected = 1 if self.watch is None else len(self.watch) or len(own_qemus())

    def attached(self, run: Run) -> bool:
        """One event for each process."""
        return len(events_in(run.output(), "attached")) >= self._expected

    def seen(self, run: Run) -> int | None:
        """What the summary says of the target."""
        for event in events_in(run.output(), "summary"):
            if event["pid"] == run.target.pid and (completed := event["requests"]["completed"]) is not None:
                return int(completed)
        return None


def own_qemus() -> list[int]:
    """Every QEMU on this host; TracerFailed if one of them is not the bench's."""
    found, ours = find_qemus(), set(family(os.getpid()))
    if foreign := [pid for pid in found if pid not in ours]:
        raise TracerFailed(f"--all would trace QEMUs that are not the bench's: {', '.join(map(str, foreign))}")
    return found


def events_in(output: str, name: str) -> list[dict[str, Any]]:
    """aio-trace's JSON objects of that name; a line that is not written to its end yet is left out."""
    found = []
    for line in output.splitlines():
        if line.startswith("{") and f'"{name}"' in line:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return [event for event in found if event["event"] == name]


# The floor


class Floor(Tracer):
    """Empty programs on the three sites."""

    marker = "attached"

    def __init__(self, way: str) -> None:
        self.way, self.key = way, f"floor-{way}"
        self.label = {"perf": "3 empty uprobes, perf events", "multi": "3 empty uprobes, one link"}[way]

    def command(self, target: Target, folder: Path) -> list[str]:
        """A process of its own, so that its end is an end like the others'."""
        offsets = [hex(site.offset) for site in target.sites.values()]
        return [sys.executable, "-m", "bench.floor", self.way, str(target.pid), target.exe, *offsets]


# Others


class Bpftrace(Tracer):
    """bpftrace with one of the scripts."""

    marker = "attached\n"

    def __init__(self, script: str, label: str) -> None:
        self.script, self.key, self.label = script, f"bpftrace-{script}", label

    def command(self, target: Target, folder: Path) -> list[str]:
        """--unsafe allows an address inside a function without a name."""
        text = (SCRIPTS / f"{self.script}.bt").read_text(encoding="utf-8").replace("EXE", target.exe)
        for site in target.sites.values():
            text = text.replace(f"{site.name.upper()}_ADDRESS", hex(site.address))
            text = text.replace(f"{site.name.upper()}_REGISTER", site.register.removeprefix("r"))
        unsafe = ["--unsafe"] if "_ADDRESS" in (SCRIPTS / f"{self.script}.bt").read_text(encoding="utf-8") else []
        return ["bpftrace", *unsafe, "-p", str(target.pid), "-e", text]

    def seen(self, run: Run) -> int | None:
        """The script's own count."""
        found = re.search(r"^@seen: (\d+)", run.output(), re.MULTILINE)
        return int(found[1]) if found else None


class BccTool(Tracer):
    """One of bcc's stock tools."""

    slow = True

    def prepare(self, target: Target, folder: Path) -> None:
        """Without kernel headers it would not compile: give it ours."""
        if not self._kernel_has_headers():
            shutil.copytree(ROOT / "bpf", folder / "headers")
            shutil.copytree(SCRIPTS / "headers", folder / "headers", dirs_exist_ok=True)

    @staticmethod
    def _kernel_has_headers() -> bool:
        return Path(f"/lib/modules/{os.uname().release}/build").is_dir()

    def environment(self, folder: Path) -> dict[str, str]:
        """Where BCC finds headers; Python prints at once."""
        where = {} if self._kernel_has_headers() else {"BCC_KERNEL_SOURCE": str(folder / "headers")}
        return {"PYTHONUNBUFFERED": "1", **where}


class Funclatency(BccTool):
    """funclatency: how long one function takes. It cannot time from one function to another."""

    key, label, marker = "funclatency", "bcc funclatency", "Hit Ctrl-C"
    note = "times thread_pool_submit_aio only: it cannot time from one function to another"

    def command(self, target: Target, folder: Path) -> list[str]:
        """The function that submits."""
        return ["funclatency-bpfcc", "-p", str(target.pid), f"{target.exe}:thread_pool_submit_aio"]

    def seen(self, run: Run) -> int | None:
        """Its count of calls."""
        found = re.search(r"count: (\d+)", run.output())
        return int(found[1]) if found else None


class Trace(BccTool):
    """trace: a line for each hit."""

    key, label, marker = "trace", "bcc trace", "PID "
    stop = signal.SIGTERM
    note = "prints each submit and qemu_bh_schedule, no latencies; under load Ctrl-C does not end it, SIGTERM does"

    def command(self, target: Target, folder: Path) -> list[str]:
        """The request that is returned, and each bottom half that is scheduled."""
        submit = f'r:{target.exe}:thread_pool_submit_aio "request %llx", retval'
        schedule = f'p:{target.exe}:qemu_bh_schedule "bottom half %llx", arg1'
        return ["trace-bpfcc", "-t", "-p", str(target.pid), submit, schedule]

    def seen(self, run: Run) -> int | None:
        """Its lines of submits."""
        return len(re.findall(r"request [0-9a-f]+$", run.output(), re.MULTILINE))


class PerfRecord(Tracer):
    """perf record on the three sites. perf's own way to make such events needs a file system that it mounts
    for itself alone; the events are the whole kernel's, so they have a name that only this bench uses."""

    key, label = "perf-record", "perf record, 3 sites"

    def prepare(self, target: Target, folder: Path) -> None:
        """Make the events, and the two pipes by which perf says that it is ready."""
        self.clean_up(folder)
        places = [f"p:{EVENT_GROUP}/{s.name} {target.exe}:{s.offset:#x} request=%{s.register}" for s in _x86(target)]
        _tracefs("\n".join(f"echo '{place}' >> {TRACEFS}/uprobe_events" for place in places))
        for name in ("control", "answer"):
            os.mkfifo(folder / name)

    def command(self, target: Target, folder: Path) -> list[str]:
        """Disabled at first: enabled by the control pipe, which answers."""
        pipes = f"fifo:{folder / 'control'},{folder / 'answer'}"
        record = ["perf", "record", "-q", "-e", f"{EVENT_GROUP}:*", "-p", str(target.pid), "-D", "-1"]
        mount = f'mountpoint -q {TRACEFS} || mount -t tracefs nodev {TRACEFS}; exec "$@"'
        return ["unshare", "-m", "sh", "-c", mount, "sh", *record, "--control", pipes, "-o", str(folder / "perf.data")]

    def attached(self, run: Run) -> bool:
        """Ask it to enable its events, and wait for the answer."""
        answer = run.folder / "answered"
        if not answer.exists():
            try:
                control = os.open(run.folder / "control", os.O_WRONLY | os.O_NONBLOCK)
            except OSError:  # perf does not listen yet
                return False
            with os.fdopen(control, "w") as pipe, open(answer, "wb"):
                pipe.write("enable\n")
        pipe_in = os.open(run.folder / "answer", os.O_RDONLY | os.O_NONBLOCK)
        try:
            return b"ack" in os.read(pipe_in, 64)
        except BlockingIOError:
            return False
        finally:
            os.close(pipe_in)

    def clean_up(self, folder: Path) -> None:
        """Remove the events: those of an earlier bench that was killed, too."""
        _tracefs(
            f"for e in $(sed -n 's,^p:\\({EVENT_GROUP}/[a-z]*\\) .*,\\1,p' {TRACEFS}/uprobe_events); "
            f'do echo "-:$e" >> {TRACEFS}/uprobe_events; done'
        )

    def seen(self, run: Run) -> int | None:
        """The samples of the last site."""
        count = ["perf", "script", "-i", str(run.folder / "perf.data"), "-F", "event"]
        done = subprocess.run(count, capture_output=True, text=True, check=False)
        return done.stdout.count(f"{EVENT_GROUP}:callback")


def _x86(target: Target) -> list[Site]:
    """The sites with the registers as the kernel's event syntax spells them."""
    return [Site(s.name, s.address, s.offset, s.register.removeprefix("r")) for s in target.sites.values()]


def _tracefs(script: str) -> None:
    """Run a shell script where tracefs is mounted, for it alone where it was not."""
    mount = f"set -e; mountpoint -q {TRACEFS} || mount -t tracefs nodev {TRACEFS}; {script}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TracerFailed(f"tracefs: {done.stderr.strip()[:200]}")


class Strace(Tracer):
    """strace -f: every system call of every thread."""

    key, label, slow = "strace", "strace -f", True
    note = "sees system calls, no requests: whether a callback came it cannot tell"
    marker = " attached"

    def command(self, target: Target, folder: Path) -> list[str]:
        """To a file, as one does."""
        return ["strace", "-f", "-o", str(folder / "calls"), "-p", str(target.pid)]

    def seen(self, run: Run) -> int | None:
        """The calls that read a request's data."""
        count = ["grep", "-cE", "preadv?(64)?\\(.* = 4096|resumed.* = 4096", str(run.folder / "calls")]
        done = subprocess.run(count, capture_output=True, text=True, check=False)
        return int(done.stdout or 0)


class Gdb(Tracer):
    """gdb breakpoints on the three sites, in their cheapest form: counted and passed over."""

    key, label, slow, marker = "gdb", "gdb breakpoints, 3 sites", True, "ATTACHED"
    note = "counts hits only; with commands that print the request it would be dearer"

    def prepare(self, target: Target, folder: Path) -> None:
        """What it does when it has stopped the target."""
        base = load_base(target)
        lines = ["set pagination off", "set confirm off"]
        for number, site in enumerate(target.sites.values(), start=1):
            lines += [f"break *{base + site.address:#x}", f"ignore {number} {NEVER}"]
        lines += [r"echo ATTACHED\n", "continue", "info breakpoints", "detach", "quit"]
        (folder / "commands").write_text("\n".join(lines) + "\n", encoding="ascii")

    def command(self, target: Target, folder: Path) -> list[str]:
        """Without anybody's .gdbinit and without downloads."""
        commands = ["-x", str(folder / "commands")]
        return ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-p", str(target.pid), *commands]

    def seen(self, run: Run) -> int | None:
        """The hits of the last breakpoint."""
        hits = re.findall(r"breakpoint already hit (\d+) time", run.output())
        return int(hits[-1]) if len(hits) == len(SITE_NAMES) else None


def load_base(target: Target) -> int:
    """What is to be added to an ELF address of the target's executable."""
    with Image.open(target.exe) as image:
        first = min(segment.vaddr & ~0xFFF for segment in image.segments if segment.filesz)
    for line in Path(f"/proc/{target.pid}/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == target.exe and int(fields[2], 16) == 0:
            return int(fields[0].partition("-")[0], 16) - first
    raise TracerFailed(f"{target.exe} is not mapped in process {target.pid}")


def changed_sites(target: Target) -> int:
    """At how many of the three sites the target's code is not that of its file: where a probe traps."""
    base = load_base(target)
    changed = 0
    with Image.open(target.exe) as image, open(f"/proc/{target.pid}/mem", "rb", buffering=0) as memory:
        for site in target.sites.values():
            memory.seek(base + site.address)
            changed += memory.read(1) != image.read(site.address, 1)
    return changed


@contextlib.contextmanager
def attached(tracer: Tracer, target: Target, folder: Path) -> Iterator[Run]:
    """The tracer attached to the target; ended afterwards. Raises TracerFailed."""
    number = len(list(folder.glob("run-*")))
    try:
        with Run(tracer, target, folder / f"run-{number}-{time.monotonic_ns()}") as run:
            yield run
    except LabError as error:
        raise TracerFailed(error.message) from error
