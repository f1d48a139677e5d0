"""The control groups of a process, of both versions: whether it is frozen, how it is thawed, what memory it may have.

Knows: cgroups(7) and the usual places of /sys/fs/cgroup. A process sees its own namespace's part of the tree only; what
is not found there is not known. Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

ROOT = "/sys/fs/cgroup"
#: What the first version says where there is no limit, or one like none; bytes.
NO_LIMIT = 1 << 60


def frozen(pid: int | str) -> bool:
    """Whether it stands still with its whole group, or a group above, as `docker pause` does it."""
    states = (("cgroup.events", "frozen 1"), ("freezer.state", "FROZEN"))
    return any(word in _text(f"{group}/{name}") for group in _groups(pid, "freezer") for name, word in states)


def thaw_line(pid: int | str) -> str | None:
    """What to type to thaw it: at the group that was frozen, which may be above its own; None if none is found."""
    for group in _groups(pid, "freezer"):
        for each in _upwards(group):
            if _text(f"{each}/cgroup.freeze").strip() == "1":
                return f"echo 0 >{each}/cgroup.freeze"
            if _text(f"{each}/freezer.self_freezing").strip() == "1":
                return f"echo THAWED >{each}/freezer.state"
    return None


def memory_limit(pid: int | str = "self") -> int | None:
    """How much memory the group, or one above, may have; bytes, None without a limit."""
    limits = []
    for group in _groups(pid, "memory"):
        for each in _upwards(group):
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(ValueError):
                    limits.append(int(_text(f"{each}/{name}")))
    found = min(limits, default=NO_LIMIT)
    return found if found < NO_LIMIT else None


def _groups(pid: int | str, controller: str) -> Iterator[str]:
    """The folders of its groups, of the second version and of this controller's first."""
    for line in filter(None, _text(f"/proc/{pid}/cgroup").split("\n")):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path.startswith("/"):
            continue  # no group
        if not controllers:
            yield from (f"{ROOT}{path}", f"{ROOT}/unified{path}")
        elif controller in controllers.split(","):
            yield f"{ROOT}/{controller}{path}"


def _upwards(group: str) -> Iterator[str]:
    """The group, then each above it, up to that of a container, which looks like the first."""
    group = group.rstrip("/")
    while len(group) >= len(ROOT):
        yield group
        group = os.path.dirname(group)


def _text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except OSError:
        return ""
