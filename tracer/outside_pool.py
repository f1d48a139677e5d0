"""What stands still in a QEMU outside its thread pools: a loop that is stuck, coroutines that wait elsewhere.

Knows: that a loop that does not sleep in its poll serves nobody, and that a coroutine serves a request where a
function of the block layer is on its stack. One that waits for the pool is the pool's request. Does not know
pools, nor what is concluded.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tracer import home
from tracer.coroutines import Coroutines, Suspended
from tracer.events import InspectedCoroutine
from tracer.records import dataclass
from tracer.target import Thread
from tracer.view import ProcessView

#: Functions that only a request's coroutine is in (block/*.c), and those that hand one to the thread pool.
_REQUEST = re.compile(r"(bdrv|blk|throttle_group|laio|luring|nbd_co|qcow2)_")
_POOLED = re.compile(r"thread_pool_submit")
#: How a coroutine waits says nothing about what for (util/qemu-coroutine*.c, qemu-coroutine-lock.c).
_WAITING = re.compile(r"qemu_(coroutine|co)_|aio_co_")
#: No more coroutines than this are unwound; and for no longer (seconds).
MOST, MOST_S = 512, 1.0


@dataclass(frozen=True)
class Outside:
    """Loops that were stuck all the while, and coroutines that did not move; `notes` says what was not seen."""

    stuck_loops: tuple[Thread, ...] = ()
    waiting: tuple[InspectedCoroutine, ...] = ()
    notes: tuple[str, ...] = ()

    def places(self) -> str:
        """How many coroutines wait in which function, in words."""
        counted = Counter(each.waits_in for each in self.waiting)
        return ", ".join(f"{count} in {place}" for place, count in counted.most_common())


class OutsidePool:
    """Looks at one process from when it is made until seen()."""

    def __init__(self, view: ProcessView, coroutines: Coroutines, homes: Callable[[], Iterable[int]]) -> None:
        """`homes` gives the numbers of the threads that are known to run a context; the main thread always does."""
        self._view = view
        self._coroutines = coroutines
        self._homes = homes
        self._first = coroutines.suspended()
        self._loops = {} if view.core else self._unparked(None)

    def seen(self, until: float) -> Outside:
        """What stands still since the beginning. Where anything may, it is looked at until then (monotonic)."""
        waiting = self._unmoved(self._first)
        loops = self._still_unparked()
        requests, notes = self._requests(waiting)
        while (requests or loops) and not self._view.core and time.monotonic() < until:
            time.sleep(max(0.0, min(0.025, until - time.monotonic())))
            kept = self._unmoved({each.address: waiting[each.address] for each, _ in requests})
            requests = [(each, found) for each, found in requests if each.address in kept]
            loops = self._still_unparked()
        why = self._coroutines.why_not
        return Outside(tuple(loops), tuple(found for _, found in requests), (*notes, *((why,) if why else ())))

    # Loops.

    def _unparked(self, among: Iterable[int] | None) -> dict[int, Thread]:
        tids = {self._view.pid, *self._homes()} if among is None else among
        threads = (self._view.thread(tid) for tid in tids)
        return {t.tid: t for t in threads if t is not None and t.syscall is not None and not home.parked(t)}

    def _still_unparked(self) -> list[Thread]:
        """Those in one and the same system call since the first look; what moved once is forgotten."""
        now = self._unparked(self._loops)
        self._loops = {tid: then for tid, then in self._loops.items() if _same_sleep(then, now.get(tid))}
        return list(self._loops.values())

    # Coroutines.

    def _unmoved(self, then: dict[int, Suspended]) -> dict[int, Suspended]:
        if not then:
            return {}
        now = self._coroutines.suspended() if not self._view.core else then
        return {address: each for address, each in then.items() if now.get(address) == each}

    def _requests(
        self, unmoved: dict[int, Suspended]
    ) -> tuple[list[tuple[Suspended, InspectedCoroutine]], tuple[str, ...]]:
        """Those that serve a request outside the pool."""
        found: list[tuple[Suspended, InspectedCoroutine]] = []
        end = time.monotonic() + MOST_S
        for number, each in enumerate(unmoved.values()):
            if number >= MOST or time.monotonic() > end:
                return found, (f"{len(unmoved) - number} coroutines were not looked at, to save time",)
            stack = self._coroutines.stack(each)
            place = request_place(stack.functions())
            if place is not None:
                found.append(
                    (each, InspectedCoroutine(each.address, place, tuple(str(frame) for frame in stack.frames)))
                )
        return found, ()


def request_place(functions: Sequence[str]) -> str | None:
    """Where a request's coroutine waits, by its stack's functions; None for other coroutines and the pool's."""
    if not any(_REQUEST.match(name) for name in functions) or any(_POOLED.match(name) for name in functions):
        return None
    return next((name for name in functions if not _WAITING.match(name)), None)


def _same_sleep(then: Thread, now: Thread | None) -> bool:
    return now is not None and (now.syscall, now.switches, now.ran_s) == (then.syscall, then.switches, then.ran_s)
