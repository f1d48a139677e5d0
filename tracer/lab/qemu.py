"""A QEMU of our own: started, talked to through its monitor, and always ended.

Knows: command lines that work from QEMU 5.2 to 11.1, the monitor, QEMU's own trace log (the
independent witness of what its thread pools did). Does not know QEMU's structures or faults.

A `-drive if=none` has a named BlockBackend of its own. That matters twice: the monitor's `qemu-io`
makes and drains a temporary one for a bare node (a lost request would wedge the monitor), and only a
named, unattached one lets `x-blockdev-set-iothread` move the drive to an iothread without a guest.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tracer.errors import LabError, ToolMissing
from tracer.lab import process
from tracer.lab.monitor import LabMonitor
from tracer.lab.nbd import NbdClient
from tracer.lab.process import wait_until

#: The system emulator of this very machine: `-machine none` and the monitor are the same in all.
SYSTEM = f"qemu-system-{platform.machine()}"
STORAGE_DAEMON = "qemu-storage-daemon"
MIB = 1 << 20

# Since QEMU 10.0 the events of the pool for AIO requests end in _aio.
_TRACE_LINE = re.compile(r"thread_pool_(submit|complete)(?:_aio)? pool (0x[0-9a-f]+) req (0x[0-9a-f]+)")


@dataclass(frozen=True)
class Drive:
    """A disk of a lab QEMU. `file` None makes a sparse raw file of `size` bytes in the lab's folder.

    `iothread` names the iothread that serves it; None is the main loop. `cache` is QEMU's word.
    """

    name: str = "d0"
    size: int = 64 * MIB
    iothread: str | None = None
    cache: str = "writeback"
    format: str = "raw"
    file: Path | None = None

    @property
    def node(self) -> str:
        """The name of its top block node."""
        return f"{self.name}-node"


@dataclass(frozen=True)
class TraceEvent:
    """One line of QEMU's own thread-pool trace."""

    event: str  # submit, complete
    pool: int
    request: int


@dataclass(frozen=True)
class TraceCounts:
    """What QEMU itself says its thread pools did so far."""

    submitted: int
    completed: int


@dataclass(frozen=True)
class Place:
    """A private folder, as the lab sees it and as the (perhaps chrooted) QEMU does."""

    folder: Path
    chroot: Path | None
    contained: bool = False  # in mount and pid namespaces of its own

    def inside(self, name: str) -> str:
        """The path of a file in it, as QEMU sees it."""
        path = self.folder / name
        return str(path if self.chroot is None else Path("/") / path.relative_to(self.chroot))


class Qemu:
    """A running process of this lab; a context manager that ends it and removes its folder."""

    def __init__(
        self,
        child: subprocess.Popen[bytes],
        place: Place,
        drives: Sequence[Drive],
        trace_log: str,
        has_hmp: bool = True,
    ) -> None:
        self.folder = place.folder
        self.inside = place.inside
        self.drives = {drive.name: drive for drive in drives}
        self._child = child
        self._trace_log = place.folder / trace_log
        self.has_hmp = has_hmp
        self._monitor: LabMonitor | None = None
        self._clients: dict[str, NbdClient] = {}
        self._cleanups: list[Callable[[], None]] = []

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    @property
    def spare_monitor(self) -> Path:
        """A second QMP socket, free for others: QEMU serves one client a socket at a time."""
        return self.folder / "spare.qmp"

    def running(self) -> bool:
        """Whether the process still lives."""
        return self._child.poll() is None

    def output(self) -> str:
        """What it printed so far, both streams."""
        return (self.folder / "output").read_text(errors="replace")

    def wait_until(self, probe: Callable[[], Any], timeout: float = 30.0, what: str = "the condition") -> Any:
        """As process.wait_until, but give up at once if QEMU ended."""

        def alive() -> Any:
            result = probe()
            if not result and not self.running():
                raise LabError(f"QEMU ended with status {self._child.returncode}: {self.output()[-500:]}")
            return result

        return wait_until(alive, timeout, what)

    # The monitor

    def connect(self, timeout: float = 30.0) -> None:
        """Wait for the monitor and greet it."""

        def try_to() -> LabMonitor | None:
            with contextlib.suppress(OSError):
                return LabMonitor(self.folder / "lab.qmp", timeout)
            return None

        self._monitor = self.wait_until(try_to, timeout, "QEMU's monitor")

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a QMP command and return what it returns; underscores in argument names are dashes."""
        if self._monitor is None:
            raise LabError("the lab's monitor is not connected")
        spelled = {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}
        try:
            return self._monitor.execute(command, spelled)
        except OSError as error:
            raise LabError(f"{command} failed: {error or type(error).__name__}") from error

    def hmp(self, line: str) -> str:
        """Run a line on the human monitor and return its answer."""
        return str(self.qmp("human-monitor-command", command_line=line))

    def io(self, drive: str, command: str) -> None:
        """`qemu-io` in the monitor, such as io("d0", "aio_write 0 64k").

        Only the aio_ commands return before the request is complete.
        """
        if answer := self.hmp(f'qemu-io {drive} "{command}"').strip():
            raise LabError(f"qemu-io {drive} {command}: {answer}")

    def iothread_ids(self) -> dict[str, int]:
        """The thread id of every iothread."""
        return {entry["id"]: entry["thread-id"] for entry in self.qmp("query-iothreads")}

    # Requests

    def client(self, drive: str) -> NbdClient:
        """The lab's NBD connection to that drive, made on first use."""
        if drive not in self._clients:
            self._clients[drive] = NbdClient(self.folder / "nbd", drive)
        return self._clients[drive]

    def submit(self, drive: str, kind: str, offset: int = 0, size: int = 4096) -> int:
        """Send one read, write, flush or discard to the drive's AioContext; returns its handle at once.

        QEMU skips a flush when nothing was written since the last one: write first.
        """
        return self.client(drive).submit(kind, offset, size)

    def finish(self, drive: str, handle: int) -> None:
        """Wait for that request; LabError if QEMU reports failure or does not answer."""
        try:
            status = self.client(drive).wait(handle)
        except TimeoutError as error:
            raise LabError(f"request {handle} on {drive} was not answered") from error
        if status:
            raise LabError(f"request {handle} on {drive} failed with errno {status}")

    def request(self, drive: str, kind: str, offset: int = 0, size: int = 4096) -> None:
        """submit() and finish()."""
        self.finish(drive, self.submit(drive, kind, offset, size))

    def kick(self, drive: str) -> None:
        """Make the loop that serves the drive come round once, without any request in its pool.

        A monitor command does not do it: its bottom halves run in a context of their own.
        """
        client = self.client(drive)
        client.wait(client.submit("unknown"))

    # The witness

    def trace_events(self) -> list[TraceEvent]:
        """Every submit and complete that QEMU's own trace log holds so far, in its order."""
        text = self._trace_log.read_text(errors="replace") if self._trace_log.exists() else ""
        return [TraceEvent(match[1], int(match[2], 16), int(match[3], 16)) for match in _TRACE_LINE.finditer(text)]

    def trace_counts(self) -> TraceCounts:
        """How many requests QEMU's own trace log saw submitted and completed."""
        counts = Counter(event.event for event in self.trace_events())
        return TraceCounts(submitted=counts["submit"], completed=counts["complete"])

    # The end

    def on_exit(self, cleanup: Callable[[], None]) -> None:
        """Run this when QEMU was ended, last registered first."""
        self._cleanups.append(cleanup)

    def close(self) -> None:
        """End the process and remove everything it left; harmless when repeated.

        Waits for nothing but the process's end, and for that a bounded time: see process.end.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for cleanup in self._cleanups:
                stack.callback(cleanup)
            self._cleanups = []
            for client in self._clients.values():
                stack.callback(client.close)
            stack.callback(process.end, self._child)
            if self._monitor is not None:
                stack.callback(self._monitor.close)
            self._monitor = None

    def __enter__(self: AnyQemu) -> AnyQemu:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


AnyQemu = TypeVar("AnyQemu", bound=Qemu)


def make_place(chroot: Path | None, contained: bool = False) -> Place:
    """A fresh private folder, inside `chroot` if there is one."""
    base = None if chroot is None else chroot / "tmp"
    return Place(Path(tempfile.mkdtemp(prefix="aio-trace-lab-", dir=base)), chroot, contained)


def start(
    place: Place,
    argv: Sequence[str],
    drives: Sequence[Drive],
    trace_log: str,
    kind: type[AnyQemu],
    has_hmp: bool = True,
) -> AnyQemu:
    """Start `argv` and connect to its monitor; on any failure nothing of it remains."""
    try:
        with open(place.folder / "output", "wb") as output:
            child = process.spawn(argv, output, place.chroot, place.contained)
    except BaseException:
        shutil.rmtree(place.folder, ignore_errors=True)
        raise
    qemu = kind(child, place, drives, trace_log, has_hmp)
    try:
        qemu.connect()
    except BaseException:
        qemu.close()
        raise
    return qemu


def drive_file(place: Place, drive: Drive) -> str:
    """The path QEMU opens for that drive; makes the file where none was given."""
    if drive.file is not None:
        return str(drive.file)
    path = place.folder / f"{drive.name}.img"
    if drive.format == "raw":
        with open(path, "wb") as image:
            image.truncate(drive.size)
    else:
        _make_image(path, drive)
    return place.inside(path.name)


def _make_image(path: Path, drive: Drive) -> None:
    command = ["qemu-img", "create", "-q", "-f", drive.format, str(path), str(drive.size)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ToolMissing("qemu-img is not installed", "apt install qemu-utils") from error
    except subprocess.CalledProcessError as error:
        raise LabError(f"qemu-img failed: {error.stderr.strip()}") from error


def drive_arguments(place: Place, drive: Drive) -> list[str]:
    """The -drive of a QEMU for that drive."""
    options = [
        f"if=none,id={drive.name},node-name={drive.node},format={drive.format}",
        f"file={drive_file(place, drive)},aio=threads,cache={drive.cache},discard=unmap",
    ]
    return ["-drive", ",".join(options)]


def common_arguments(place: Place, drives: Sequence[Drive], trace: bool) -> list[str]:
    """Monitors, iothreads and the trace log."""
    arguments = []
    for socket in ("lab.qmp", "spare.qmp", "stall.qmp"):
        arguments += ["-qmp", f"unix:{place.inside(socket)},server=on,wait=off"]
    for iothread in sorted({drive.iothread for drive in drives if drive.iothread}):
        arguments += ["-object", f"iothread,id={iothread}"]
    if trace:
        arguments += ["-trace", "thread_pool_*", "-D", place.inside("trace")]
    return arguments


def paused(
    drives: Sequence[Drive] = (Drive(),),
    *,
    iothread: bool = False,
    exe: str = SYSTEM,
    chroot: Path | None = None,
    contained: bool = False,
    trace: bool = True,
    extra: Sequence[str] = (),
) -> Qemu:
    """A QEMU without a guest (-S, no machine): its disks, iothreads and thread pools are real.

    `contained` gives it mount and pid namespaces of its own. `iothread` moves every drive that names none to
    the iothread io0.
    """
    if iothread:
        drives = [_served_by(drive, drive.iothread or "io0") for drive in drives]
    place = make_place(chroot, contained)
    argv = [exe, "-S", "-nodefaults", "-display", "none", "-machine", "none"]
    argv += common_arguments(place, drives, trace)
    for drive in drives:
        argv += drive_arguments(place, drive)
    qemu = start(place, [*argv, *extra], drives, "trace", Qemu)
    try:
        for drive in drives:
            if drive.iothread:
                qemu.qmp("x-blockdev-set-iothread", node_name=drive.node, iothread=drive.iothread, force=True)
        export(qemu, writable=True)
    except BaseException:
        qemu.close()
        raise
    return qemu


def _served_by(drive: Drive, iothread: str) -> Drive:
    return Drive(drive.name, drive.size, iothread, drive.cache, drive.format, drive.file)


def export(qemu: Qemu, writable: bool) -> None:
    """Open the drives to the lab's NBD client; the read-only export of a guest's disk follows the device.

    Done at the start because adding an export drains the node, which never ends once a completion is lost.
    """
    qemu.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": qemu.inside("nbd")}})
    for drive in qemu.drives.values():
        qemu.qmp(
            "block-export-add",
            type="nbd",
            id=f"{drive.name}-export",
            name=drive.name,
            node_name=drive.node,
            writable=writable,
            iothread=drive.iothread if writable else None,
        )


def storage_daemon(
    drives: Sequence[Drive] = (Drive(),),
    *,
    exe: str = STORAGE_DAEMON,
    chroot: Path | None = None,
    trace: bool = True,
    extra: Sequence[str] = (),
) -> Qemu:
    """A qemu-storage-daemon with the drives exported over NBD. It has QMP but no human monitor."""
    place = make_place(chroot)
    argv = [exe]
    for socket in ("lab.qmp", "spare.qmp"):
        argv += ["--chardev", f"socket,id={socket[:3]},path={place.inside(socket)},server=on,wait=off"]
        argv += ["--monitor", f"chardev={socket[:3]}"]
    for iothread in sorted({drive.iothread for drive in drives if drive.iothread}):
        argv += ["--object", f"iothread,id={iothread}"]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={place.inside('nbd')}"]
    for drive in drives:
        argv += _daemon_drive(place, drive)
    if trace:
        argv += ["--trace", "thread_pool_*"]  # to stderr: the daemon has no -D
    return start(place, [*argv, *extra], drives, "output", Qemu, has_hmp=False)


def _daemon_drive(place: Place, drive: Drive) -> list[str]:
    file = f"driver=file,node-name={drive.name}-file,filename={drive_file(place, drive)}"
    export_as = f"type=nbd,id={drive.name}-export,name={drive.name},node-name={drive.node},writable=on"
    if drive.iothread:
        export_as += f",iothread={drive.iothread}"
    top = f"driver={drive.format},node-name={drive.node},file={drive.name}-file,discard=unmap"
    return ["--blockdev", f"{file},aio=threads,discard=unmap", "--blockdev", top, "--export", export_as]
