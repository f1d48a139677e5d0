"""What this host has of what aio-trace needs.

Knows: permissions, kernel features and programs, and in which package each comes. Does not know any
QEMU. Nothing is attached; the one system call tried makes an empty BPF map and drops it again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil

from tracer import probes
from tracer.compiler import BccNotFound, CompilerFailed, working_bcc
from tracer.events import HostNeed
from tracer.kernel import UPROBE_PMU

#: bpf(2) by machine; include/uapi/asm-generic/unistd.h and arch/x86/entry/syscalls/syscall_64.tbl.
BPF_SYSCALLS = {"x86_64": 321, "aarch64": 280}
BPF_MAP_CREATE = 0
BPF_MAP_TYPE_ARRAY = 2

LOCKDOWN = "/sys/kernel/security/lockdown"
UNPRIVILEGED_BPF = "/proc/sys/kernel/unprivileged_bpf_disabled"


def host_needs() -> tuple[HostNeed, ...]:
    """Every need of the main job, then those of its extras."""
    return (
        _root(),
        _uprobes(),
        _bpf(),
        _bcc(),
        _program("eu-stack", "elfutils", "elfutils", "names the functions in which a stuck thread sits"),
        _program("gdb", "gdb", "gdb", "for nudge --force, where QEMU's monitor is dead"),
    )


def _root() -> HostNeed:
    if os.geteuid() == 0 and probes.permitted():
        return HostNeed("root", True, "root")
    if probes.permitted():
        return HostNeed("root", True, "the capabilities are there")
    who = "root without capabilities" if os.geteuid() == 0 else "not root"
    return HostNeed("root", False, f"{who}: use sudo; or CAP_BPF and CAP_PERFMON with CAP_SYS_PTRACE")


def _uprobes() -> HostNeed:
    if os.path.exists(UPROBE_PMU):
        return HostNeed("uprobes", True, f"Linux {platform.release()}")
    return HostNeed("uprobes", False, "a kernel with CONFIG_UPROBE_EVENTS, Linux 4.17 or later")


def _bpf() -> HostNeed:
    locked = re.search(r"\[(\w+)\]", _text(LOCKDOWN))
    if locked and locked[1] == "confidentiality":
        return HostNeed("bpf", False, "kernel lockdown is on: boot with lockdown=integrity or none")
    number = BPF_SYSCALLS.get(platform.machine())
    failed = errno.ENOSYS if number is None else _try_bpf(number)
    if not failed:
        return HostNeed("bpf", True, "the bpf system call works")
    if failed == errno.ENOSYS:
        return HostNeed("bpf", False, "a kernel with CONFIG_BPF_SYSCALL")
    if not probes.permitted():
        off = _text(UNPRIVILEGED_BPF).strip() not in ("", "0")
        reason = "unprivileged_bpf_disabled is set" if off else os.strerror(failed)
        return HostNeed("bpf", False, f"not permitted without root ({reason}): use sudo")
    return HostNeed("bpf", False, f"the kernel refuses it ({os.strerror(failed)}): seccomp or a container?")


def _try_bpf(number: int) -> int:
    """The errno of making a map of one entry; 0 if that works."""
    attributes = (ctypes.c_uint32 * 32)(BPF_MAP_TYPE_ARRAY, 4, 4, 1)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), BPF_MAP_CREATE, attributes, ctypes.sizeof(attributes))
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


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
