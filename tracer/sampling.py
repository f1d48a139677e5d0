"""Requests followed by looking at memory again and again, for a trace without probes.

Knows: that a request may be the same one when address, function, argument and opaque are; a later one
looks the same, too, if QEMU gave it the same memory: before anybody is told, tracer/inspect must prove it.
Requests that come and go between two samples are not seen; ages count from the first look that saw the
state. Does not know what is late.
"""

from __future__ import annotations

from dataclasses import field, replace

from tracer.layout import RequestState
from tracer.pools import Pool, PoolReader, Request
from tracer.probes import FLAG_BEFORE, FLAG_NO_CALLBACK, Record
from tracer.records import dataclass


@dataclass
class MemorySampler:
    """Gives the records that the probes would give, from samples of the pools' lists."""

    reader: PoolReader
    pools: list[Pool]
    _records: dict[int, tuple[Request, Record]] = field(default_factory=dict)

    def sample(self, now_ns: int) -> None:
        """Read all pools; `now_ns` is CLOCK_MONOTONIC."""
        fresh: dict[int, tuple[Request, Record]] = {}
        for pool in self.pools:
            listed = self.reader.patient_requests(pool)
            for request in listed.requests:
                fresh[request.address] = (request, self._follow(request, now_ns))
            if listed.torn is not None:
                # What could not be read is not gone for that.
                fresh = {a: known for a, known in self._records.items() if known[0].pool == pool.address} | fresh
        self._records = fresh

    def _follow(self, request: Request, now_ns: int) -> Record:
        known = self._records.get(request.address)
        done = request.state == RequestState.THREAD_DONE
        if known is None or not _same(known[0], request):
            return Record(request.address, now_ns, now_ns if done else 0, "other", self._flags(request))
        record = known[1]
        if done and not record.done_ns:
            return Record(request.address, record.submit_ns, now_ns, record.kind, record.flags)
        return record

    def _flags(self, request: Request) -> int:
        return FLAG_BEFORE if request.callback else FLAG_BEFORE | FLAG_NO_CALLBACK

    def restart(self, request: int, now_ns: int) -> None:
        """What looked like one request was several: count its ages from now on."""
        if request in self._records:
            seen, record = self._records[request]
            self._records[request] = (seen, replace(record, submit_ns=now_ns, done_ns=now_ns if record.done_ns else 0))

    def records(self) -> dict[int, Record]:
        """The requests of the last sample, by address."""
        return {address: record for address, (_, record) in self._records.items()}


def _same(then: Request, now: Request) -> bool:
    if then.state == RequestState.THREAD_DONE and now.state != RequestState.THREAD_DONE:
        return False
    return (then.func, then.arg, then.opaque, then.callback) == (now.func, now.arg, now.opaque, now.callback)
