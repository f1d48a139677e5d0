"""Targets that are got ready, several at once, and none at another's expense.

Knows: who goes on when, who has taken too long. A preparation is a generator that yields each Errand it waits for, or
None where another one is about the same. Does not know what is prepared.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Optional

from tracer.apart import Errand
from tracer.errors import OutOfBounds
from tracer.records import dataclass

#: So many go on at once. What has taken SLOW_S does not count any more, so that others come; and what has taken
#: LIMIT_S, or is the slowest of MOST, is given up. Seconds.
AT_ONCE, MOST = 4, 32
SLOW_S, LIMIT_S = 2.0, 60.0

if TYPE_CHECKING:
    Steps = Generator[Optional[Errand], None, None]


def apart(work: Callable[[], Any], keep: Iterable[int] = ()) -> Generator[Errand, None, Any]:
    """What `work` gives, done in a child process that keeps those descriptors."""
    errand = Errand(work, keep)
    try:
        yield errand
        return errand.outcome()
    finally:
        errand.abandon()


@dataclass
class _One:
    steps: Steps
    began: float = 0.0
    errand: Errand | None = None
    slow: bool = False


class Preparations:
    """All that is being prepared."""

    def __init__(self, bounded: bool = True) -> None:
        """Without `bounded` there is only one, which nobody waits for but the user: it takes the time that it takes."""
        self._bounded = bounded
        self._queue: deque[_One] = deque()
        self._under_way: list[_One] = []
        self._at_once = False

    def __len__(self) -> int:
        return len(self._queue) + len(self._under_way)

    def add(self, steps: Steps) -> None:
        """Begin with this one when it is its turn."""
        self._queue.append(_One(steps))

    @property
    def hurried(self) -> int:
        """How many there are that are not slow."""
        return len(self._queue) + sum(not one.slow for one in self._under_way)

    def fds(self) -> list[int]:
        """What becomes readable when one can go on."""
        return [one.errand.fd for one in self._under_way if one.errand is not None]

    def due_s(self) -> float:
        """In how many seconds to go on at the latest."""
        if self._at_once:
            return 0.0
        moments = [one.began + (LIMIT_S if one.slow else SLOW_S) for one in self._under_way if self._bounded]
        return max(0.0, min(moments, default=float("inf")) - time.monotonic())

    def go_on(self) -> None:
        """Take each one step further that need not wait, and no more: others than these want to be served, too.

        Raises what the steps let through.
        """
        self._look_at_the_clock(time.monotonic())
        moved = False
        for one in list(self._under_way):
            if one.errand is None or one.errand.ready():
                moved |= self._step(one, lambda steps: next(steps))
        for _ in range(AT_ONCE):
            if self._queue and sum(not one.slow for one in self._under_way) < AT_ONCE:
                self._begin(self._queue.popleft())
                moved = True
        # What one has done another may have waited for.
        self._at_once = moved and (bool(self._queue) or any(one.errand is None for one in self._under_way))

    def _begin(self, one: _One) -> None:
        if len(self._under_way) >= MOST:
            self._give_up(self._under_way[0], "others wait")
        one.began = time.monotonic()
        self._under_way.append(one)
        self._step(one, lambda steps: next(steps))

    def _step(self, one: _One, how: Callable[[Steps], Errand | None]) -> bool:
        """Whether that made a difference to others."""
        before = one.errand
        try:
            one.errand = how(one.steps)
        except StopIteration:
            self._under_way.remove(one)
            return True
        except BaseException:
            self._under_way.remove(one)
            raise
        return one.errand is not before

    def _look_at_the_clock(self, now: float) -> None:
        for one in list(self._under_way) if self._bounded else ():
            if now >= one.began + LIMIT_S:
                self._give_up(one, f"it has taken {LIMIT_S:.0f} s")
            elif now >= one.began + SLOW_S and not one.slow:
                one.slow = True
                if one.errand is not None:
                    one.errand.be_nice()

    def _give_up(self, one: _One, why: str) -> None:
        error = OutOfBounds(f"to look at it takes longer than any QEMU should: {why}")
        self._step(one, lambda steps: steps.throw(error))

    def abandon(self) -> None:
        """End all of them, wherever they are."""
        for one in [*self._under_way, *self._queue]:
            with suppress(Exception):
                one.steps.close()
        self._under_way, self._queue = [], deque()
