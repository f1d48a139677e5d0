"""Figures by file: which file a descriptor was when its requests were counted.

Knows: that the probes count by file descriptor, and that QEMU closes and opens them while it runs: a number that
was one disk's may be another's a moment later. So names are taken while descriptors are open, and where one
changes, what was counted up to then stays with the file that it was. Does not know where names or counts come from.
"""

from __future__ import annotations

from collections.abc import Mapping

from tracer.figures import combined, difference
from tracer.maps import Statistics, Subject

Counted = Mapping[Subject, Statistics]


class Descriptors:
    """The files of one process's descriptors through a trace."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        #: Whose file is closed: (its name, kind) with what was counted on it until then.
        self._closed: dict[tuple[str, str], Statistics] = {}
        #: What a descriptor had counted when its file changed.
        self._passed: dict[Subject, Statistics] = {}

    def name(self, fd: int) -> str | None:
        """The file that the descriptor was when it was last seen open, or None."""
        return self._names.get(fd)

    def others(self) -> frozenset[int]:
        """The descriptors that were no file with a path, and so no disk's."""
        return frozenset(fd for fd, name in self._names.items() if not name.startswith("/"))

    def changed(self, names: Mapping[int, str]) -> bool:
        """Whether a descriptor that was one file is another now; then turn() is due."""
        return any(names.get(fd, name) != name for fd, name in self._names.items())

    def turn(self, names: Mapping[int, str], counted: Counted) -> None:
        """Take the names as they are now; `counted` is since the beginning, and may be empty where none changed."""
        gone = {fd for fd, name in self._names.items() if names.get(fd, name) != name}
        for subject, statistics in counted.items():
            kind, fd = subject
            if fd in gone:
                own = (self._names[fd], kind)
                before = self._closed.get(own, Statistics())
                self._closed[own] = combined([before, self._since(subject, statistics)])
                self._passed[subject] = statistics
        # One that is closed may have requests that are not counted yet: it keeps its name until it is another's.
        self._names.update(names)

    def by_file(self, counted: Counted) -> dict[tuple[str, str], Statistics]:
        """What was counted since the beginning, by (file, kind); what is on no known file is left out."""
        found = {own: [statistics] for own, statistics in self._closed.items()}
        for subject, statistics in counted.items():
            kind, fd = subject
            name = None if fd is None else self._names.get(fd)
            if name is not None:
                found.setdefault((name, kind), []).append(self._since(subject, statistics))
        return {own: combined(some) for own, some in found.items()}

    def _since(self, subject: Subject, statistics: Statistics) -> Statistics:
        passed = self._passed.get(subject)
        return statistics if passed is None else difference(statistics, passed)
