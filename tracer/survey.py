"""What the pools of one QEMU hold, and which finished requests nobody will call back; from memory alone.

Knows: that a request is accused only when two groups of looks, some 100 ms apart, say the same of the very
same request, which was never gone in between. Does not know what is done about it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tracer.build import Loaded
from tracer.errors import FaultError, LayoutError
from tracer.layout import RequestState
from tracer.live import LiveView
from tracer.looking import Finding, Looker
from tracer.pools import Pool, PoolReader, Request, RequestList
from tracer.records import dataclass
from tracer.verdict import LOOP_BUSY, LOST_KICK, LOST_WAKEUP, STOPPED, UNKNOWN, Verdict, judge

ECANCELED = 125
APART_S = 0.1
#: Between the two groups of looks the requests are checked this often; seconds.
CHECK_S = 0.005
#: How often to look where the looks do not agree.
ATTEMPTS = 6


@dataclass(frozen=True)
class Stuck:
    """A finished request whose callback did not come, and what two groups of looks say about it."""

    request: Request
    pool: Pool
    finding: Finding
    verdict: Verdict

    @property
    def curable(self) -> bool:
        """Whether a nudge is for this."""
        return self.verdict.cause in (LOST_WAKEUP, LOST_KICK)

    @property
    def unsettled(self) -> bool:
        """Whether the loop was on its way at a look, and nobody had told it to come."""
        told = any(look.scheduled is not False for look in self.finding.facts.looks)
        return self.verdict.cause in (UNKNOWN, LOOP_BUSY) and not told


@dataclass(frozen=True)
class Survey:
    """All pools; the requests that stayed THREAD_DONE; how many wait for a worker or for storage."""

    pools: tuple[Pool, ...]
    stuck: tuple[Stuck, ...]
    waiting: int
    stopped: bool

    @property
    def curable(self) -> tuple[Stuck, ...]:
        """The requests that a nudge is for."""
        return tuple(each for each in self.stuck if each.curable)


def survey(view: LiveView, loaded: Loaded, looker: Looker) -> Survey:
    """Look now, and again after 100 ms; what went on in between is not stuck.

    A loop that was caught while it came round says nothing yet: then all is looked at once more.
    """
    for _ in range(ATTEMPTS - 1):
        seen = _survey(view, loaded, looker)
        if not any(each.unsettled for each in seen.stuck):
            return seen
    return _survey(view, loaded, looker)


def _survey(view: LiveView, loaded: Loaded, looker: Looker) -> Survey:
    reader = loaded.reader
    pools = reader.find(view.heap_chunks())
    held = [(pool, request) for pool in pools for request in reader.patient_requests(pool).requests]
    late = [(pool, request) for pool, request in held if _awaits_callback(request)]
    first = {request.address: looker.look(request.address, 0.0) for _, request in late}
    began = time.monotonic()
    late = _that_stay(reader, [(p, r) for p, r in late if first[r.address] is not None])
    # Whoever finished them has not run since, and they may have been so for longer still.
    age = max(time.monotonic() - began, looker.workers_asleep_s() if late else 0.0)
    stuck = [_judged(pool, request, first[request.address], looker, age) for pool, request in late]
    waiting = sum(r.state in (RequestState.THREAD_QUEUED, RequestState.THREAD_ACTIVE) for _, r in held)
    stopped = looker.process_stopped()
    return Survey(tuple(pools), tuple(each for each in stuck if each is not None), waiting, stopped)


def _awaits_callback(request: Request) -> bool:
    return request.state == RequestState.THREAD_DONE and bool(request.callback) and request.ret != -ECANCELED


def _that_stay(reader: PoolReader, late: Sequence[tuple[Pool, Request]]) -> list[tuple[Pool, Request]]:
    """Those that are the same finished request at every check until the time between the looks is over.

    One that another overtook is not: QEMU gives its memory to the next request at once.
    """
    left = list(late)
    lists: dict[Pool, RequestList] = {}
    end = time.monotonic() + APART_S
    while left and time.monotonic() < end:
        moved = {pool for pool in {pool for pool, _ in left} if _moved(reader, pool, lists)}
        left = [(pool, request) for pool, request in left if pool not in moved and still_stuck(reader, pool, request)]
        time.sleep(CHECK_S)
    return left


def _moved(reader: PoolReader, pool: Pool, lists: dict[Pool, RequestList]) -> bool:
    """Whether a request left the pool's list since the last time; a list that is torn does not tell."""
    listed = reader.patient_requests(pool)
    if listed.torn is not None:
        return False
    then, lists[pool] = lists.get(pool, listed), listed
    return not then.kept_in(listed)


def still_stuck(reader: PoolReader, pool: Pool, request: Request) -> bool:
    """Whether this very request is still THREAD_DONE on its pool's list; unreadable memory is no proof of it."""
    return went_on(reader, pool, request) is False


def went_on(reader: PoolReader, pool: Pool, request: Request) -> bool | None:
    """Whether memory shows that this very request is finished with: changed, or off its pool's list.

    None where memory cannot tell, because it cannot be read: the process may have ended.
    """
    readable = True
    try:
        if not _same(request, reader.request(request.address)):
            return True
    except LayoutError:
        return True  # something else is there
    except FaultError:
        readable = False
    held = reader.holds(pool, request.address)
    if held is False:
        return True
    return False if held and readable else None


def _same(then: Request, now: Request) -> bool:
    return (now.state, now.ret, now.pool, now.func, now.arg, now.callback, now.opaque) == (
        *(then.state, then.ret, then.pool, then.func, then.arg, then.callback, then.opaque),
    )


def _judged(pool: Pool, request: Request, first: Finding | None, looker: Looker, age_s: float) -> Stuck | None:
    second = looker.look(request.address, age_s)
    if first is None or second is None or not _same(request, second.request):
        return None
    before, after = judge(first.facts), judge(second.facts)
    if before.cause == after.cause or after.cause == STOPPED:
        return Stuck(request, pool, second, after)
    unsure = f"Two looks {APART_S * 1000:.0f} ms apart disagree: {before.cause}, then {after.cause}."
    return Stuck(request, pool, second, Verdict(UNKNOWN, unsure))
