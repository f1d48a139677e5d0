"""What this process may do to others, and why the kernel refuses it the rest.

Knows: capabilities, namespaces and Yama, as /proc shows them, and which of them each look at a process takes. Does
not know what is looked at, or why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress

from tracer.records import dataclass

CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 2, 19, 21, 24
CAP_PERFMON, CAP_BPF = 38, 39

FIRST_PID_NAMESPACE = 0xEFFFFFFC
FIRST_USER_NAMESPACE = 0xEFFFFFFD
YAMA = "/proc/sys/kernel/yama/ptrace_scope"
#: ptrace_scope 3: nobody is traced or read, not even by root, until the next boot.
NO_ATTACH = "3"

TO_ATTACH = "CAP_SYS_ADMIN (or CAP_BPF and CAP_PERFMON)"
INSTEAD_OF_ROOT = "CAP_BPF and CAP_PERFMON with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
WHOLE_CONTAINER = "docker run --privileged --pid=host IMAGE aio-trace ...    # or run it on the host itself"


@dataclass(frozen=True)
class Refusal:
    """Why a process may not be looked at: the end of a sentence, and what to do (None: the same with sudo)."""

    reason: str
    hint: str | None


def effective() -> int:
    """The effective capabilities, a bit each."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", status.read(), re.M)
    return int(found[1], 16) if found else 0


def holds(capability: int) -> bool:
    """Whether this process has it, in its own user namespace."""
    return bool(effective() >> capability & 1)


def may_attach() -> bool:
    """Whether this process has the capabilities to load and attach probes."""
    return holds(CAP_SYS_ADMIN) or (holds(CAP_BPF) and holds(CAP_PERFMON))


def lacking_for_others() -> Sequence[str]:
    """The capabilities that a look at another user's process takes and this process has not.

    The first is asked for its executable and memory. The files of /proc/PID that belong to its owner alone (mem,
    auxv, pagemap, fd, task/*/syscall) take the second as well; process_vm_readv would replace one of them only.
    """
    needed = {"CAP_SYS_PTRACE": CAP_SYS_PTRACE, "CAP_DAC_READ_SEARCH": CAP_DAC_READ_SEARCH}
    return [name for name, number in needed.items() if not holds(number)]


def in_pid_namespace() -> bool:
    """Whether this process sees those of a container only."""
    return os.stat("/proc/self/ns/pid").st_ino != FIRST_PID_NAMESPACE


def in_user_namespace() -> bool:
    """Whether this process's capabilities count in a user namespace of its own only."""
    with suppress(OSError):
        return os.stat("/proc/self/ns/user").st_ino != FIRST_USER_NAMESPACE
    return False


def yama_forbids() -> bool:
    """Whether nobody may read another process's memory until the next boot."""
    with suppress(OSError), open(YAMA, encoding="ascii", errors="replace") as file:
        return file.read().strip() == NO_ATTACH
    return False


def refusal(pid: int, memory: bool) -> Refusal:
    """Why the kernel did not let this process look at the executable, or at the `memory`, of process `pid`."""
    lacking = lacking_for_others()
    root = os.geteuid() == 0
    if not root and lacking:
        return Refusal("without root", None)
    who = "root here" if root else "this user"
    if lacking and ("CAP_SYS_PTRACE" in lacking or _owner(pid) != os.geteuid()):
        return Refusal(f"because {who} lacks {' and '.join(lacking)}, as in most containers", WHOLE_CONTAINER)
    if memory and yama_forbids():
        return Refusal(
            "even by root: Yama's ptrace_scope is 3, which holds until the next boot",
            "grep -rs ptrace_scope /etc/sysctl.conf /etc/sysctl.d    # set it to 1 or 2 there, and reboot",
        )
    if in_user_namespace():
        return Refusal(
            f"because {who} is root of a user namespace only, as in a rootless container",
            "sudo docker run --privileged --pid=host IMAGE aio-trace ...    # or run it on the host itself",
        )
    return Refusal("though the capabilities are there: a security module forbids it, perhaps", "dmesg | tail")


def _owner(pid: int) -> int | None:
    """Whose files its /proc folder has; root's for a process that is not dumpable."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/mem").st_uid
    return None
