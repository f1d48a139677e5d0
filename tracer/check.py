"""What would be attached to a QEMU, and why; what its build is; what this host lacks.

Knows: how to put that together from files alone. Attaches nothing, stops nothing and reads no memory
of the process. Does not know formats.
"""

from __future__ import annotations

import os
import stat
import time

from tracer.build import debug_place
from tracer.debug_files import Place
from tracer.elf import Image
from tracer.errors import AioTraceError, ImageError, NotPermitted, NotQemu
from tracer.events import Checked, HostNeed
from tracer.host import host_needs
from tracer.known_bugs import bug_notes
from tracer.memory import LiveMemory
from tracer.records import dataclass
from tracer.sites import NoStrategyWorked, locate
from tracer.sites.model import SITE_NAMES, Attempt, Located
from tracer.target import Target, open_target, qemu_hint

#: What a uprobe costs a hit, in microseconds, measured in a VM; on bare metal the dear one is about twice
#: the cheap one.
CHEAP_US, DEAR_US = 0.6, 27

DEBUG_SYMBOLS = "debuginfo-install qemu-kvm    # on RHEL; on Debian the -dbgsym package of this very build"


@dataclass(frozen=True)
class Findings:
    """The event, and the failure if the sites were not found."""

    event: Checked
    failure: NoStrategyWorked | None


def check_process(pid: int, only: str | None = None) -> Findings:
    """Check the QEMU that runs as `pid`. Raises NoSuchProcess, NotPermitted, NotQemu or ImageError."""
    try:
        target = open_target(pid)
    except NotPermitted as error:
        error.hint = (error.hint or "").replace("aio-trace --pid", "aio-trace check --pid")
        raise
    memory = _memory_need(target)
    return _check(
        target.image_path, target.exe, f"process {pid} ({target.exe})", pid, (memory,), only, debug_place(target)
    )


def check_file(path: str, only: str | None = None) -> Findings:
    """Check a QEMU's executable. Raises ImageError or NotQemu."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"cannot read {path}: {reason}") from error
    if not regular:
        raise ImageError(f"{path} is not a file", "aio-trace check --exe /usr/bin/qemu-system-x86_64")
    return _check(path, path, path, None, (), only, None)


def _check(
    path: str, exe: str, name: str, pid: int | None, needs: tuple[HostNeed, ...], only: str | None, place: Place | None
) -> Findings:
    with _open(path, exe) as image:
        if image.qemu_evidence() is None:
            hint = "pgrep -a qemu" if pid is None else qemu_hint(pid)
            raise NotQemu(f"{name} is no QEMU: it has neither a QEMU version nor a thread pool", hint)
        version, build_id, machine = image.qemu_version(), image.build_id, image.machine
        located, attempts, failure = _locate(image, only, place)
    host = (*host_needs(), *needs)
    barriers = located.barrier_fixed if located else None
    event = Checked(
        time.time(),
        pid,
        exe,
        version,
        build_id,
        machine,
        bug_notes(version, machine, barriers),
        barriers,
        located.sites_of(*SITE_NAMES) if located else (),
        located.layout if located else None,
        attempts,
        host,
        located is not None and all(need.ok for need in host if need.required),
        notes_on(exe, pid, version, located),
    )
    return Findings(event, failure)


def _open(path: str, exe: str) -> Image:
    try:
        return Image.open(path)
    except ImageError as error:
        if _is_script(path):
            raise NotQemu(f"{exe} is a script, not a QEMU; check the program that it starts", f"tail {exe}") from error
        raise


def _is_script(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def _locate(
    image: Image, only: str | None, place: Place | None
) -> tuple[Located | None, tuple[Attempt, ...], NoStrategyWorked | None]:
    try:
        located = locate(image, only, place)
    except NoStrategyWorked as error:
        error.hint = error.hint or DEBUG_SYMBOLS
        return None, error.attempts, error
    return located, located.attempts, None


def notes_on(exe: str, pid: int | None, version: str | None, located: Located | None) -> tuple[str, ...]:
    """What else the user should know: a file that is gone, a version that was not found, what a dear site costs."""
    notes = []
    if pid is not None and exe.endswith(" (deleted)"):
        notes.append(
            "this file was deleted or replaced while the process ran; what runs is read, not what is there now"
        )
    if version is None:
        notes.append("no version was found in the file, so bugs by version cannot be told")
    for site in located.sites_of(*SITE_NAMES) if located else ():
        if not site.cheap:
            notes.append(
                f"{site.name}: only an instruction was found that the kernel single-steps ({site.instruction}): "
                f"about {DEAR_US} µs a request in a VM instead of {CHEAP_US}, twice the cheap one on bare metal"
            )
    return tuple(notes)


def _memory_need(target: Target) -> HostNeed:
    """Whether the process's memory may be opened; it is not read."""
    try:
        LiveMemory(target).close()
    except AioTraceError as error:
        return HostNeed("target memory", False, error.message)
    return HostNeed("target memory", True, f"/proc/{target.pid}/mem may be read")
