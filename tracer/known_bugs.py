"""QEMU's own bugs that make block I/O hang, by the versions that may still have them.

Knows: which commit mended which bug, and how QEMU counts its versions. Does not know any build:
distributions take fixes into older versions, so a version alone says "may lack", never "lacks". Bugs
whose versions are not known, and those outside the thread pool and its loop, are left out.

The classes: A the bottom half is lost, B the loop is told but not woken, C it is woken by what it does not
listen to, D it is stuck, E a callback waits for another request.
"""

from __future__ import annotations

import re

from tracer.records import dataclass

#: The fix whose barriers are looked for in the code itself.
BARRIERS = "e8d3b1a25f"

WEAK = frozenset({"aarch64"})  # memory order matters: x86-64 does not show the bug

Version = tuple[int, int, int]


@dataclass(frozen=True)
class KnownBug:
    """One bug: the commit that mended it, its class (A to H, below), and where it may still be."""

    commit: str
    kind: str
    title: str
    versions: str  # for people
    #: From (included) to (left out). Where a comment names a commit, it brought what the bug is in: no older
    #: version has it.
    ranges: tuple[tuple[Version, Version], ...]
    machines: frozenset[str] | None = None  # None: all

    def may_have(self, version: Version, machine: str) -> bool:
        """Whether a QEMU of this version on this machine may lack the fix."""
        if self.machines is not None and machine not in self.machines:
            return False
        return any(first <= version < before for first, before in self.ranges)


_OLDEST: Version = (0, 0, 0)

KNOWN_BUGS: tuple[KnownBug, ...] = (
    KnownBug(
        BARRIERS,
        "A",
        "aio: strengthen memory barriers for bottom half scheduling",
        "2.1.1-2.1.3, 2.2.0-2.2.1, 2.3-rc0 to rc2",
        (((2, 1, 1), (2, 2, 93)),),
    ),
    KnownBug(
        "ef6dada8b4", "A", "util/async: use atomic_mb_set in qemu_bh_cancel", "2.9-2.10", (((2, 9, 0), (2, 11, 0)),)
    ),
    KnownBug("e77508292c", "A", "thread-pool: fix thread race", "before 11.0", (((2, 1, 1), (11, 0, 0)),), WEAK),
    KnownBug(
        "eabc977973",
        "B",
        "AioContext: fix broken ctx->dispatching optimization",
        "2.1.0-2.3",
        (((2, 1, 0), (2, 4, 0)),),
        WEAK,
    ),
    KnownBug("21a03d17f2", "B", "misplaced event_notifier_test_and_clear", "up to 2.3", ((_OLDEST, (2, 4, 0)),)),
    KnownBug(
        "b37548fcd1", "B", "aio_notify_accept only when blocking", "2.4-3.0", (((2, 3, 91), (3, 1, 0)),)
    ),  # 05e514b1d4
    KnownBug(
        "5710a3e09f", "B", "async: explicit memory barriers", "2.4-4.2", (((2, 3, 91), (5, 0, 0)),), WEAK
    ),  # eabc977973
    KnownBug("5142397c79", "B", "bh->flags read atomically", "before 10.0", (((5, 0, 0), (10, 0, 0)),), WEAK),
    KnownBug(
        "e62da98527",
        "C",
        "epoll upgrade against set_fd_handler",
        "2.5-7.2",
        (((2, 4, 90), (8, 0, 0)),),  # fbe3fc5cb3
    ),
    KnownBug(
        "49880165a4",
        "D",
        "job: fix nested aio_poll() hanging in job_txn_apply",
        "2.12-3.0",
        (((2, 11, 90), (3, 1, 0)),),  # 11b61fbc0d
    ),
    KnownBug(
        "960d5fb3e8",
        "D",
        "block: fix deadlock in bdrv_co_yield_to_drain()",
        "5.2",
        (((5, 1, 90), (6, 0, 0)),),  # eb94b81a94
    ),
    KnownBug("6bc0bcc89f", "D", "block: fix deadlocks in bdrv_graph_wrunlock()", "8.2-rc", (((8, 1, 90), (8, 2, 0)),)),
    KnownBug(
        "e3082ab3b3",
        "D",
        "block/graph-lock: fix missed wakeup in bdrv_graph_co_rdunlock",
        "8.0-11.0",
        (((8, 0, 0), (11, 1, 0)),),
    ),
    KnownBug("3c80ca158c", "E", "deadlock with nested aio_poll", "up to 2.1.0", ((_OLDEST, (2, 1, 1)),)),
)


_NUMBERS = r"\s*v?(\d+)\.(\d+)(?:\.(\d+))?(?:[.\d]*)(?:[-~]rc(\d+))?"


def parse_version(text: str) -> Version | None:
    """The upstream version in what a QEMU prints, whatever the distribution appends; None if there is none.

    QEMU calls the release candidates of 2.3.0 itself 2.2.90 and up, and its development tree 2.2.50;
    a suffix -rcN is counted the same way, so versions compare as tuples.
    """
    found = re.match(_NUMBERS, text, re.ASCII | re.IGNORECASE)
    if not found:
        return None
    major, minor, micro = int(found[1]), int(found[2]), int(found[3] or 0)
    if found[4] is None:
        return major, minor, micro
    if micro:
        return major, minor, micro - 1  # a candidate of a stable release is no later than the one before
    return (*_before(major, minor), 90 + int(found[4]))


def _before(major: int, minor: int) -> tuple[int, int]:
    """The release before major.minor: after 2.12 came 3.0, and since then three a major."""
    if minor:
        return major, minor - 1
    return {3: (2, 12), 2: (1, 7), 1: (0, 15)}.get(major, (major - 1, 2))


def known_bugs(version: str | None, machine: str) -> tuple[KnownBug, ...] | None:
    """The bugs whose fix this version may lack on this machine; None if the version is not known."""
    parsed = parse_version(version) if version else None
    if parsed is None:
        return None
    return tuple(bug for bug in KNOWN_BUGS if bug.may_have(parsed, machine))


@dataclass(frozen=True)
class BugNote:
    """A bug by version, and whether the code itself shows the fix (None: it does not tell)."""

    bug: KnownBug
    fixed: bool | None


def bug_notes(version: str | None, machine: str, barrier_fixed: bool | None) -> tuple[BugNote, ...] | None:
    """The bugs that a QEMU of this version may have, and what its code says of them; None without a version."""
    bugs = known_bugs(version, machine)
    if bugs is None:
        return None
    return tuple(BugNote(bug, barrier_fixed if bug.commit == BARRIERS else None) for bug in bugs)
