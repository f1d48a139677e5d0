"""What would be attached to a QEMU, and why; what its build is; what this host lacks.

Knows: how to put that together. Attaches nothing to the process, stops nothing and reads none of its memory: what
is tried is tried on aio-trace itself. Does not know formats.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace

from tracer.build import debug_place
from tracer.debug_files import Place
from tracer.elf import Image
from tracer.errors import AioTraceError, ImageError, NotQemu, folder_hint, pasted
from tracer.events import Checked, HostNeed
from tracer.host import host_needs, programs_need
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


def check_line(*pids: int) -> str:
    """How the check of a process is asked for."""
    return f"sudo aio-trace check --pid {pids[0]}"


def check_process(pid: int, only: str | None = None, line: Callable[..., str] = check_line) -> Findings:
    """Check the QEMU that runs as `pid`; `line` is what hints tell to type for another process.

    Raises NoSuchProcess, NotPermitted, NotQemu or ImageError.
    """
    target = open_target(pid, line)
    memory = _memory_need(target)
    name = f"process {pid} ({target.exe})"
    try:
        return _check(target.image_path, target.exe, name, pid, (memory,), only, debug_place(target))
    except NotQemu as error:
        error.hint = error.hint or qemu_hint(pid, line)
        raise
    except ImageError:
        target.check_alive()
        raise


def check_file(path: str, only: str | None = None) -> Findings:
    """Check a QEMU's executable. Raises ImageError or NotQemu."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"cannot read {path}: {reason}", folder_hint(path)) from error
    if not regular:
        raise ImageError(f"{path} is not a file", "aio-trace check --exe /usr/bin/qemu-system-x86_64")
    try:
        return _check(path, path, path, None, (), only, None)
    except NotQemu as error:
        error.hint = error.hint or "pgrep -a qemu"
        raise


def _check(
    path: str, exe: str, name: str, pid: int | None, needs: tuple[HostNeed, ...], only: str | None, place: Place | None
) -> Findings:
    with _open(path, exe) as image:
        if image.qemu_evidence() is None:
            raise NotQemu(f"{name} is no QEMU: it has neither a QEMU version nor a thread pool")
        version, build_id, machine = image.qemu_version(), image.build_id, image.machine
        located, attempts, failure = _locate(image, only, place)
    host = (*_host(located, version, machine, any(need.ok for need in needs)), *needs)
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


def _host(located: Located | None, version: str | None, machine: str, looked_at: bool) -> tuple[HostNeed, ...]:
    """What the host has, and the programs for this build, which need no bcc where they are kept from before."""
    needs = host_needs(looked_at)
    if located is None:
        return needs
    programs = programs_need(located.sites_of(*SITE_NAMES), located.layout.element, version, machine, needs)
    kept = [replace(n, required=False) if programs.ok and n.need == "bcc" and not n.ok else n for n in needs]
    return (*kept, programs)


def _open(path: str, exe: str) -> Image:
    try:
        return Image.open(path)
    except ImageError as error:
        if _is_script(path):
            raise NotQemu(
                f"{exe} is a script, not a QEMU; check the program that it starts", f"tail {pasted(exe)}"
            ) from error
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
    """Whether the process's memory, and the files of /proc that are its owner's, may be opened; nothing is read."""
    try:
        LiveMemory(target).close()
        for name in ("auxv", "pagemap", f"task/{target.pid}/syscall"):
            os.close(os.open(f"/proc/{target.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except AioTraceError as error:
        return HostNeed("target memory", False, error.message)
    except OSError as error:
        return HostNeed("target memory", False, f"{error.filename} cannot be opened: {error.strerror}")
    return HostNeed("target memory", True, f"/proc/{target.pid}/mem may be read")
