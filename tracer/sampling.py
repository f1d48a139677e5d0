"""Requests followed by looking at memory again and again, for a trace without probes.

Knows: when two looks may have seen the same request. QEMU gives a finished request's memory to the next one
at once, so addresses alone tell nothing; what tells is what a request is about, who was there before it, and
that no finished request stays while the completion bottom half takes others off the list. All of that is in
two looks at any distance, so a look may be rare. Before anybody is told, tracer/inspect must prove it still.
Requests that come and go between two looks are not seen; ages count from the first look that saw the state.
Does not know what is late.
"""

from __future__ import annotations

import time
from dataclasses import field, replace

from tracer.errors import FaultError, LayoutError, OutOfBounds
from tracer.layout import RequestState
from tracer.maps import FLAG_BEFORE, FLAG_NO_CALLBACK, Record
from tracer.memory import MemoryReader
from tracer.pools import Pool, PoolReader, Request
from tracer.posix_aio import outlives_worker, read_raw
from tracer.records import dataclass

#: A list that is torn is walked once more; then what was known before is looked up by its address.
WALKS = 2
#: What a sample takes at most, of a processor's time; seconds.
MOST_S = 0.5


@dataclass(frozen=True)
class _Seen:
    """A request at one look; `not_before_ns` is the last look at which it was not in its state yet."""

    request: Request
    about: bytes
    record: Record
    not_before_ns: int


@dataclass
class _Look:
    """One pool at one look: its requests, newest first; `whole` if that is the whole list."""

    seen: dict[int, _Seen] = field(default_factory=dict)
    whole: bool = True
    at_ns: int = 0

    def places(self) -> dict[int, int]:
        """The place of each request on the list."""
        return {address: place for place, address in enumerate(self.seen)}


@dataclass
class MemorySampler:
    """Gives the records that the probes would give, from samples of the pools' lists."""

    memory: MemoryReader
    reader: PoolReader
    pools: list[Pool]
    last_ns: int = 0
    _looks: dict[int, _Look] = field(default_factory=dict)

    def sample(self, now_ns: int) -> None:
        """Read all pools; `now_ns` is CLOCK_MONOTONIC. A pool that is none any more is left out from now on.

        Raises OutOfBounds where that takes longer than with any QEMU.
        """
        looks = {}
        until = time.thread_time() + MOST_S
        for pool in list(self.pools):
            if time.thread_time() >= until:
                raise OutOfBounds("more requests are under way in it than can be sampled")
            before = self._looks.get(pool.address, _Look(at_ns=now_ns))
            requests, whole = self._requests(pool, before, until)
            if not whole and not self._is_pool(pool):
                self.pools.remove(pool)
                continue
            looks[pool.address] = self._compared(before, requests, whole, now_ns)
        self._looks, self.last_ns = looks, now_ns

    def _is_pool(self, pool: Pool) -> bool:
        try:
            return self.reader.pool(pool.address) == pool
        except (FaultError, LayoutError):
            return False

    def _requests(self, pool: Pool, before: _Look, until: float) -> tuple[list[Request], bool]:
        """The pool's requests, and whether they are all. What could not be read is not gone for that."""
        for _ in range(WALKS):
            listed = self.reader.requests(pool, until)
            if listed.torn is None:
                return list(listed.requests), True
        found = {request.address for request in listed.requests}
        others = (self.reader.linked(pool, address) for address in before.seen if address not in found)
        return [*listed.requests, *(request for request in others if request is not None)], False

    def _compared(self, before: _Look, requests: list[Request], whole: bool, now_ns: int) -> _Look:
        """This look, with what the last one knew of the same requests."""
        places = before.places()
        look = _Look({}, whole, now_ns)
        same = set()
        for request in requests:
            about = self._about(request)
            then = before.seen.get(request.address)
            if then is not None and _same(then, request, about) and not _overtook(request, places, before.whole):
                same.add(request.address)
                look.seen[request.address] = _gone_on(then, request, before.at_ns, now_ns)
            else:
                look.seen[request.address] = _new(request, about, before.at_ns, now_ns)
        if _moved(before, look, same):
            _restart_finished(look, before.at_ns)
        return look

    def _about(self, request: Request) -> bytes:
        """The bytes of its argument; none where those are somebody else's by now."""
        finished = request.state not in (RequestState.THREAD_QUEUED, RequestState.THREAD_ACTIVE)
        if finished and not outlives_worker(request.arg, request.opaque):
            return b""
        return read_raw(self.memory, request.arg)

    def restart(self, request: int, now_ns: int) -> None:
        """What looked like one request was several: count its ages from now on."""
        for look in self._looks.values():
            if request in look.seen:
                look.seen[request] = _restarted(look.seen[request], now_ns, now_ns)

    def finished_by(self, request: int, done_ns: int) -> None:
        """A finished request was so at `done_ns` already; believed back to the look that saw it unfinished."""
        for look in self._looks.values():
            seen = look.seen.get(request)
            if seen is not None and seen.record.done_ns:
                done_ns = min(seen.record.done_ns, max(done_ns, seen.not_before_ns))
                submit_ns = min(seen.record.submit_ns, done_ns)
                look.seen[request] = replace(seen, record=replace(seen.record, submit_ns=submit_ns, done_ns=done_ns))

    def pools_of(self, requests: set[int]) -> list[Pool]:
        """The pools that any of these requests was last seen in."""
        return [pool for pool in self.pools if requests & self._looks.get(pool.address, _Look()).seen.keys()]

    def records(self) -> dict[int, Record]:
        """The requests of the last sample, by address."""
        return {address: seen.record for look in self._looks.values() for address, seen in look.seen.items()}


def _new(request: Request, about: bytes, before_ns: int, now_ns: int) -> _Seen:
    flags = FLAG_BEFORE if request.callback else FLAG_BEFORE | FLAG_NO_CALLBACK
    done = request.state == RequestState.THREAD_DONE
    return _Seen(request, about, Record(request.address, now_ns, now_ns if done else 0, "other", flags), before_ns)


def _gone_on(then: _Seen, request: Request, before_ns: int, now_ns: int) -> _Seen:
    """The same request, perhaps finished meanwhile."""
    if request.state == RequestState.THREAD_DONE and not then.record.done_ns:
        return _Seen(request, then.about, replace(then.record, done_ns=now_ns), before_ns)
    return replace(then, request=request)


def _same(then: _Seen, now: Request, about: bytes) -> bool:
    """Whether a request at the same address may be the same one: it goes on, never back."""
    if then.request.state > now.state or (about and then.about != about):
        return False
    return _identity(then.request) == _identity(now)


def _identity(request: Request) -> tuple[int, ...]:
    return (request.func, request.arg, request.callback, request.opaque)


def _overtook(request: Request, places: dict[int, int], whole: bool) -> bool:
    """Whether what stands behind a request was not there behind it at the last look."""
    if not whole or not request.next:
        return False
    return places.get(request.next, -1) <= places[request.address]


def _moved(before: _Look, look: _Look, same: set[int]) -> bool:
    """Whether any request left the list since the last look: all that were finished did so then."""
    return any(
        address not in same or look.seen[address].request.next != then.request.next
        for address, then in before.seen.items()
    )


def _restart_finished(look: _Look, before_ns: int) -> None:
    for address, seen in look.seen.items():
        if seen.record.done_ns:
            look.seen[address] = _restarted(seen, look.at_ns, before_ns)


def _restarted(seen: _Seen, now_ns: int, before_ns: int) -> _Seen:
    done_ns = now_ns if seen.record.done_ns else 0
    return replace(seen, record=replace(seen.record, submit_ns=now_ns, done_ns=done_ns), not_before_ns=before_ns)
