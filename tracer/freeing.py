"""A nudge from its first look to its last: the monitor, what is left, then --force.

Knows: the order of the ways, and what counts once a second one was needed. Does not know what a way does,
options, or how a person is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from tracer.errors import EXIT_ALERT, EXIT_FAILED, EXIT_OK, AioTraceError, NothingLost, NudgeRefused
from tracer.events import Nudged
from tracer.nudge import Nudge, Outcome
from tracer.qmp import Monitor
from tracer.records import dataclass
from tracer.report import wrapped
from tracer.survey import Survey
from tracer.target import Target


@dataclass(frozen=True)
class Ways:
    """How a lost completion is to be freed: `monitor` connects to one, None for none; `confirm` asks before --force.

    `confirm` raises where the answer is no; None: nobody is asked.
    """

    monitor: Callable[[Target], Monitor] | None
    force: bool
    confirm: Callable[[], object] | None


class Told:
    """What came of it so far; what was sent is known also where it ended early."""

    def __init__(self) -> None:
        self.events: list[Nudged] = []
        self.failures: list[AioTraceError] = []
        #: Why other pools are stuck still for which nothing was done.
        self.left: list[NudgeRefused] = []
        self.sent = False
        self.stopped = False

    def add(self, outcome: Outcome) -> None:
        """What one way did; of what it was the last to be tried for, its word counts."""
        latest = {(event.pool, event.request) for event in outcome.events}
        self.events = [event for event in self.events if (event.pool, event.request) not in latest]
        self.events += outcome.events
        self.failures += outcome.failures

    @property
    def status(self) -> int:
        """The exit status."""
        if self.stopped or self.failures:
            return EXIT_FAILED
        return EXIT_OK if all(event.freed for event in self.events) and not self.left else EXIT_ALERT


def free(nudge: Nudge, ways: Ways, told: Told, say: Callable[[str], None]) -> None:
    """Look, then by monitor, then by force; `told` gets what comes of it, also where this raises."""
    try:
        _Freeing(nudge, ways, told, say).run()
    finally:
        told.sent = bool(nudge.done)


class _Freeing:
    def __init__(self, nudge: Nudge, ways: Ways, told: Told, say: Callable[[str], None]) -> None:
        self._nudge = nudge
        self._ways = ways
        self._told = told
        self._say = say

    def run(self) -> None:
        seen = self._nudge.diagnose()
        for stuck in seen.curable:
            self._say(f"{stuck.verdict.cause}: request {stuck.request.address:#x}")
            self._say(wrapped(stuck.verdict.explanation))
        self._free(seen)
        if not self._told.failures:
            self._told.left += self._nudge.others(seen, self._told.events)

    def _free(self, seen: Survey) -> None:
        if self._ways.monitor is None:
            self._force(seen)
        elif not self._by_monitor(seen, self._ways.monitor):
            left = self._left(seen)
            if left is not None:
                self._force(left)

    def _by_monitor(self, seen: Survey, connect: Callable[[Target], Monitor]) -> bool:
        """Whether that was all: it freed everything, or there is no --force that may do the rest."""
        failures: Sequence[AioTraceError] = ()
        try:
            with closing(connect(self._nudge.target)) as monitor:
                outcome = self._nudge.try_monitor(seen, monitor)
        except AioTraceError as error:
            if not self._ways.force:
                raise
            failures = (error,)
        else:
            if outcome.freed or not self._ways.force:
                self._told.add(outcome)
                return True
            self._told.add(Outcome(outcome.events, ()))
            failures = outcome.failures
        self._nudge.target.check_memory()
        for failure in failures:
            self._say(f"by monitor: {failure.message}")
        return False

    def _left(self, seen: Survey) -> Survey | None:
        """What is lost still, or None where all of it went on by itself after something was sent."""
        now = None
        try:
            now = self._nudge.diagnose()
        except NothingLost:
            if not self._nudge.done:
                raise
            self._say("what was lost still went on by itself in the meantime; nothing was called")
        if self._nudge.done:
            self._told.add(self._nudge.look_again(seen, now))
        return now

    def _force(self, seen: Survey) -> None:
        self._say(self._nudge.plan_force(seen))
        left: Survey | None = seen
        if self._ways.confirm is not None:
            self._ways.confirm()
            left = self._left(seen)
        if left is not None:
            self._told.add(self._nudge.try_force(left))
