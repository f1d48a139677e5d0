"""What this host has of what aio-trace needs, proved by doing it.

Knows: permissions, kernel features and programs, and in which package each comes. What can be tried on this process
itself is tried: a map, a program, a probe on code of our own, a stop of a child of our own. What cannot be tried
without root is not known, and said so. Does not know any QEMU.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import resource
import shutil
import signal
from collections.abc import Sequence

from tracer import rights, trial
from tracer.compiler import BccNotFound, CompilerFailed, working_bcc
from tracer.errors import HostError
from tracer.events import HostNeed
from tracer.layout import ElementLayout
from tracer.posix_aio import order_of
from tracer.probes import Parameters, Programs, no_uprobes
from tracer.sites.model import Site
from tracer.trial import Trial

LOCKDOWN = "/sys/kernel/security/lockdown"
#: How long the child lives that is stopped, should nobody end it; seconds.
CHILD_S = 5
SEIZE = 0x4206


def host_needs(looked_at: bool = False) -> tuple[HostNeed, ...]:
    """Every need of the main job, then those of its extras; `looked_at`: the process in question could be."""
    tried = trial.run()
    bpf = _bpf(tried)
    return (
        _root(looked_at),
        bpf,
        _uprobes(tried, bpf),
        _bcc(),
        _ptrace(),
        _program("virsh", "libvirt-clients", "libvirt-client", "for nudge --via virsh, where QEMU is libvirt's"),
    )


def _root(looked_at: bool) -> HostNeed:
    root = os.geteuid() == 0
    if not rights.may_attach() and root:
        return HostNeed("root", False, f"root here lacks {rights.TO_ATTACH}: {rights.WHOLE_CONTAINER}")
    if not rights.may_attach():
        return HostNeed("root", False, f"use sudo; or {rights.INSTEAD_OF_ROOT}")
    lacking = rights.lacking_for_others()
    if lacking and not looked_at:
        return HostNeed("root", None, f"a QEMU of another user cannot be looked at without {' and '.join(lacking)}")
    return HostNeed("root", True, "root" if root else "the capabilities are there")


# The kernel


def _bpf(tried: Trial) -> HostNeed:
    if tried.failed not in (trial.MAP, trial.LOAD):
        return HostNeed("bpf", True, "a map was made, and a program loaded")
    number = tried.error.errno if tried.error else None
    said = _said(tried)
    if number == errno.ENOSYS:
        return HostNeed("bpf", False, "a kernel with CONFIG_BPF_SYSCALL", words=said)
    if not rights.may_attach():
        return HostNeed("bpf", None, f"not proved: that needs {_wanted()}", words=said)
    return HostNeed("bpf", False, f"the kernel refuses it ({_reason(tried)}): {_why_refused()}", words=said)


def _why_refused() -> str:
    """What may stand behind a refusal, by what there is on this host."""
    locked = re.search(r"\[(\w+)\]", _text(LOCKDOWN))
    if locked and locked[1] != "none":
        return f"kernel lockdown ({locked[1]}), perhaps: boot with lockdown=none"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and not rights.holds(rights.CAP_SYS_RESOURCE):
        return f"before Linux 5.11, too little locked memory ({limit} bytes): ulimit -l unlimited"
    return "seccomp or a container?"


def _uprobes(tried: Trial, bpf: HostNeed) -> HostNeed:
    kernel = f"Linux {platform.release()}"
    if tried.failed is None:
        way = "a uprobe_multi link" if tried.multi else "a perf event"
        return HostNeed("uprobes", True, f"{kernel}: a probe on our own code saw every hit, by {way}")
    said = _said(tried)
    lacking = no_uprobes()
    if tried.failed == trial.ATTACH and not tried.multi and lacking is not None:
        return HostNeed("uprobes", False, f"{lacking.message}: {lacking.hint}", words=said)
    if tried.failed in (trial.ATTACH, trial.HIT):
        return HostNeed("uprobes", False, f"{kernel}: a probe on our own code failed: {_reason(tried)}", words=said)
    if tried.failed == trial.CODE:
        why = f"no code of our own can be run here ({_reason(tried)})"
        return HostNeed("uprobes", None, f"{kernel}: not proved: {why}", words=said)
    if lacking is not None:
        return HostNeed("uprobes", None, f"not proved: {lacking.message}: {lacking.hint}", words=said)
    wanted = _wanted() if bpf.ok is None else "bpf"
    return HostNeed("uprobes", None, f"{kernel}: not proved: that needs {wanted}")


def _wanted() -> str:
    return rights.TO_ATTACH if os.geteuid() == 0 else "root"


def _reason(tried: Trial) -> str:
    return (tried.error.strerror or str(tried.error)) if tried.error else ""


def _said(tried: Trial) -> tuple[str, ...]:
    return (f"{tried.failed}: {tried.error}", *tried.words.splitlines()) if tried.error else ()


def _ptrace() -> HostNeed:
    """Whether a thread may be stopped: tried on a child of our own."""
    use = "for nudge --force and inspect --save"
    failed = _seize_child()
    if failed and rights.yama_forbids():
        return HostNeed("ptrace", False, f"Yama's ptrace_scope is 3 until the next boot; {use}", required=False)
    if failed:
        why = f"the kernel refuses it ({os.strerror(failed)}): seccomp or a container? {use}"
        return HostNeed("ptrace", False, why, required=False)
    if not rights.holds(rights.CAP_SYS_PTRACE):
        why = "not proved for others' processes: that needs " + ("CAP_SYS_PTRACE" if os.geteuid() == 0 else "root")
        return HostNeed("ptrace", None, f"{why}; {use}", required=False)
    return HostNeed("ptrace", True, f"a child of our own was seized; {use}", required=False)


def _seize_child() -> int:
    """The errno of seizing a child; 0 if that works."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if not child:
        signal.alarm(CHILD_S)
        signal.pause()
        os._exit(0)
    try:
        seized = libc.ptrace(ctypes.c_long(SEIZE), ctypes.c_long(child), None, None)
        return ctypes.get_errno() if seized < 0 else 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Programs


def programs_need(
    sites: Sequence[Site], element: ElementLayout, version: str | None, machine: str, needs: Sequence[HostNeed]
) -> HostNeed:
    """Whether the programs for a build compile and load, as the main job does it; `needs` are host_needs().

    `version` and `machine` are the build's.
    """
    if machine != platform.machine():
        return HostNeed("programs", None, f"not proved: this QEMU is for {machine}, this host is {platform.machine()}")
    if not all(need.ok for need in needs if need.need == "bpf"):
        return HostNeed("programs", None, "not proved: that needs bpf")
    try:
        loaded = Programs(None, sites, element, Parameters(order=order_of(version)))
    except HostError as error:
        return HostNeed("programs", False, error.message, words=_lines(*getattr(error, "__notes__", ())))
    said = loaded.log
    loaded.close()
    return HostNeed("programs", True, "those for this build were loaded", words=_lines(said))


def _lines(*texts: str) -> tuple[str, ...]:
    return tuple(line for text in texts for line in text.splitlines())


def _bcc() -> HostNeed:
    try:
        python, version = working_bcc()
    except (BccNotFound, CompilerFailed) as problem:
        packages = "python3-bpfcc (Debian), python3-bcc (RHEL)"
        return HostNeed("bcc", False, f"install {packages}; {problem}")
    return HostNeed("bcc", True, f"version {version}, seen by {python}")


def _program(name: str, debian: str, rhel: str, use: str) -> HostNeed:
    path = shutil.which(name)
    if path:
        return HostNeed(name, True, path, required=False)
    package = debian if debian == rhel else f"{debian} (Debian), {rhel} (RHEL)"
    return HostNeed(name, False, f"install {package}: {use}", required=False)


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
