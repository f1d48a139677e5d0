"""The functions of util/thread-pool.c, read from their code.

Knows: what each of QEMU's thread-pool functions must do with a request, and so which register holds
it and at which offsets its members lie. Does not know how the functions were found, nor versions.
Each reader returns what one function shows, or raises NotProved with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tracer.layout import RequestState
from tracer.sites.flow import (
    Argument,
    Called,
    Compared,
    Const,
    Flow,
    Load,
    Part,
    Stored,
    Sum,
    Value,
)
from tracer.sites.proof import NotProved, agreed

_DONE = Const(RequestState.THREAD_DONE)
_QUEUED = Const(RequestState.THREAD_QUEUED)
_ZERO = Const(0)


@dataclass(frozen=True)
class BottomHalves:
    """What the pool's constructor shows: the functions of its two bottom halves, and where it keeps one."""

    completion: int
    spawn: int
    context: int
    completion_bh: int


@dataclass(frozen=True)
class Done:
    """What worker_thread() shows; `site` is the first direct call behind the DONE store."""

    site: Called
    element: Value
    func: int
    arg: int
    ret: int
    state: int


@dataclass(frozen=True)
class Callback:
    """What thread_pool_completion_bh() shows; `site` is a direct call that only leads to the callback."""

    site: Called
    element: Value
    callback: int
    opaque: int
    ret: int
    state: int
    head: int
    next: int


@dataclass(frozen=True)
class Counters:
    """Offsets of ThreadPool's thread counters, where submit shows them."""

    cur_threads: int | None = None
    idle_threads: int | None = None
    new_threads: int | None = None
    pending_threads: int | None = None
    max_threads: int | None = None


@dataclass(frozen=True)
class Submit:
    """What thread_pool_submit_aio() shows; `site` is the unlock after the request was queued."""

    site: Called
    element: Value
    pool: int
    state: int
    head: int
    next: int
    prev: int
    members: frozenset[int]  # of the element, that are filled in from other values
    counters: Counters


def read_constructor(
    flow: Flow, creators: frozenset[int], is_code: Callable[[int], bool]
) -> tuple[BottomHalves, BottomHalves]:
    """thread_pool_new(): the two functions it makes bottom halves of, both ways round.

    Which is which is left to the readers of those functions: their proofs hold for one way only.
    """
    made = [call for call in _calls(flow) if call.target in creators and _code(call, 1, is_code) is not None]
    if len(made) != 2:
        raise NotProved(f"the pool's constructor makes {len(made)} bottom halves, not 2")
    first, second = made
    return _halves(flow, first, second), _halves(flow, second, first)


def read_spawn(flow: Flow, thread_create: frozenset[int], is_code: Callable[[int], bool]) -> int:
    """spawn_thread_bh_fn(): the address of worker_thread(), which it starts a thread with."""
    started = (_code(call, 2, is_code) for call in _calls(flow) if call.target in thread_create)
    return agreed("worker_thread", *(address for address in started if address is not None))


def read_worker(flow: Flow) -> Done:
    """worker_thread(): calls func, stores what it returned and then DONE, and schedules the completion.

    thread_pool_cancel() stores DONE too, but calls no func.
    """
    found = [done for call in _calls(flow) for done in _done_after(flow, call)]
    if len(found) != 1:
        raise NotProved(f"worker_thread stores a request's result and DONE in {len(found)} places, not 1")
    return found[0]


def read_allocator(flow: Flow) -> tuple[int, int]:
    """qemu_aio_get() of util/aiocb.c: where it stores its arguments cb and opaque in the new element."""
    results = {call.result for call in _calls(flow)}
    words = [each for each in flow.events if isinstance(each, Stored) and each.base in results]
    callback = (each.offset for each in words if each.value == Argument(2))
    opaque = (each.offset for each in words if each.value == Argument(3))
    return agreed("BlockAIOCB.cb", *callback), agreed("BlockAIOCB.opaque", *opaque)


def _done_after(flow: Flow, work: Called) -> Iterator[Done]:
    """The DONE store and site behind `work`, if that is the call of an element's func."""
    func, arg = work.callee, work.arguments[0]
    if not (isinstance(func, Load) and isinstance(arg, Load) and func.base == arg.base):
        return
    element = func.base
    words = list(_stores(flow, element, 4))
    ret = [each.offset for each in words if each.value == Part(work.result, 4)]
    done = [each for each in words if each.value == _DONE]
    if len(ret) != 1 or len(done) != 1:
        return
    site = _first_direct_call(flow, done[0].at, element, "the DONE store")
    if not flow.always_before(work.at, done[0].at):
        raise NotProved("DONE is stored without func being called")
    yield Done(site, element, func.offset, arg.offset, ret[0], done[0].offset)


def read_completion(flow: Flow, schedule: frozenset[int]) -> Callback:
    """thread_pool_completion_bh(): finds DONE elements on the pool's list and calls their callbacks."""
    found = [each for call in _calls(flow) for each in _callback_of(flow, call, schedule)]
    if len(found) != 1:
        raise NotProved(f"thread_pool_completion_bh has {len(found)} places that call a callback, not 1")
    return found[0]


def _callback_of(flow: Flow, call: Called, schedule: frozenset[int]) -> Iterator[Callback]:
    """What is known if `call` is that of an element's common.cb."""
    callback, opaque, ret = call.callee, call.arguments[0], _whole(call.arguments[1])
    if not (isinstance(callback, Load) and isinstance(opaque, Load) and isinstance(ret, Load)):
        return
    element = callback.base
    if (opaque.base, ret.base, ret.width) != (element, element, 4):
        return
    state = [
        test.left.offset
        for test in flow.events
        if isinstance(test, Compared)
        and isinstance(test.left, Load)
        and (test.left.base, test.left.width, test.right) == (element, 4, _DONE)
        and flow.always_before(test.at, call.at)
    ]
    ways = [value for value in flow.origins(element) if isinstance(value, Load)]
    yield Callback(
        _call_before(flow, call, element, schedule),
        element,
        callback.offset,
        opaque.offset,
        ret.offset,
        agreed("the test for THREAD_DONE", *state),
        agreed("ThreadPool.head", *(way.offset for way in ways if way.base == Argument(0))),
        agreed("ThreadPoolElement.all.le_next", *(way.offset for way in ways if way.base == element)),
    )


def read_submit(flow: Flow, allocate: frozenset[int], unlock: frozenset[int]) -> Submit:
    """thread_pool_submit_aio(): takes an element from qemu_aio_get(), fills it, and links it twice."""
    taken = [call for call in _calls(flow) if call.target in allocate]
    if len(taken) != 1:
        raise NotProved(f"thread_pool_submit_aio calls qemu_aio_get {len(taken)} times, not once")
    element = taken[0].result
    link, queue = _links(flow, element)
    pool = link.base
    words = list(_stores(flow, element, 8))
    head, head_at = Load(pool, link.offset, 8, 0), Sum(pool, link.offset)
    return Submit(
        _unlock_after(flow, queue, element, unlock),
        element,
        agreed("ThreadPoolElement.pool", *(each.offset for each in words if each.value == pool)),
        agreed("state = THREAD_QUEUED", *(e.offset for e in _stores(flow, element, 4) if e.value == _QUEUED)),
        link.offset,
        agreed("ThreadPoolElement.all.le_next", *(e.offset for e in words if _same_place(e.value, head))),
        agreed("ThreadPoolElement.all.le_prev", *(e.offset for e in words if e.value == head_at)),
        frozenset(each.offset for each in words),
        _counters(flow, pool),
    )


def _links(flow: Flow, element: Value) -> tuple[Stored, Stored]:
    """The stores that link the element into pool->head, and behind the last of pool->request_list.

    The first is told by the element's all.le_prev, which points to pool->head.
    """
    kept = [event for event in flow.events if isinstance(event, Stored) and event.value == element]
    backward = {word.value for word in _stores(flow, element, 8)}
    heads = [each for each in kept if Sum(each.base, each.offset) in backward]
    queues = [
        each
        for each in kept
        for head in heads
        if isinstance(each.base, Load) and each.base.base == head.base and not each.offset
    ]
    if len(heads) != 1 or len(queues) != 1:
        raise NotProved("thread_pool_submit_aio does not link the request into the pool's two lists")
    return heads[0], queues[0]


def _counters(flow: Flow, pool: Value) -> Counters:
    """idle_threads == 0 && cur_threads < max_threads, and what do_spawn_thread's caller counts up."""
    tests = [event for event in flow.events if isinstance(event, Compared)]
    limits = [(_member(test.left, pool), _member(test.right, pool), test.at) for test in tests]
    pairs = [(left, right, at) for left, right, at in limits if left is not None and right is not None]
    raised = {each.offset for each in _stores(flow, pool, 4) if _is_step(each.value, pool, each.offset)}
    if len(pairs) != 1 or len(raised) != 2:
        return Counters()
    left, right, limit = pairs[0]
    if len(raised & {left, right}) != 1:
        return Counters()
    current = left if left in raised else right
    zeros = [(_member(test.left, pool), test.at) for test in tests if test.right == _ZERO]
    before = {offset for offset, at in zeros if offset is not None and flow.always_before(at, limit)}
    after = {offset for offset, at in zeros if offset is not None and flow.always_before(limit, at)}
    return Counters(
        cur_threads=current,
        idle_threads=before.pop() if len(before) == 1 else None,
        new_threads=(raised - {current}).pop(),
        pending_threads=after.pop() if len(after) == 1 else None,
        max_threads=right if current == left else left,
    )


def _calls(flow: Flow) -> Iterator[Called]:
    return (event for event in flow.events if isinstance(event, Called))


def _stores(flow: Flow, base: Value, width: int) -> Iterator[Stored]:
    for event in flow.events:
        if isinstance(event, Stored) and (event.base, event.width) == (base, width):
            yield event


def _code(call: Called, number: int, is_code: Callable[[int], bool]) -> int | None:
    """The call's argument, if it is the address of code."""
    value = call.arguments[number]
    return value.value if isinstance(value, Const) and is_code(value.value) else None


def _whole(value: Value) -> Value:
    return value.base if isinstance(value, Part) else value


def _member(value: Value, pool: Value) -> int | None:
    """The offset, if `value` is a 32-bit member of the pool."""
    return value.offset if isinstance(value, Load) and (value.base, value.width) == (pool, 4) else None


def _is_step(value: Value, pool: Value, offset: int) -> bool:
    return isinstance(value, Sum) and value.offset == 1 and _member(value.base, pool) == offset


def _same_place(value: Value, place: Load) -> bool:
    return isinstance(value, Load) and (value.base, value.offset) == (place.base, place.offset)


def _halves(flow: Flow, completion: Called, spawn: Called) -> BottomHalves:
    context, _, pool = completion.arguments[:3]
    functions = [call.arguments[1] for call in (completion, spawn)]
    first, second = (value.value for value in functions if isinstance(value, Const))
    kept = {each.value: each.offset for each in _stores(flow, pool, 8)}
    if context not in kept or completion.result not in kept:
        raise NotProved("the pool's constructor does not keep its context and completion bottom half")
    return BottomHalves(first, second, kept[context], kept[completion.result])


def _first_direct_call(flow: Flow, start: int, element: Value, what: str) -> Called:
    """The first direct call on every way from `start`, which nothing else leads to."""
    for call in _calls(flow):
        if call.direct and flow.always_before(start, call.at) and flow.always_after(start, call.at):
            others = (each for each in _calls(flow) if each.direct and each.at != call.at)
            if not any(flow.always_before(start, e.at) and flow.always_before(e.at, call.at) for e in others):
                return _holding(call, element)
    raise NotProved(f"no direct call follows {what} on every way")


def _call_before(flow: Flow, callback: Called, element: Value, schedule: frozenset[int]) -> Called:
    """A direct call while the element is held, passed exactly when the callback will be called."""
    found = [
        call
        for call in _calls(flow)
        if call.direct
        and call.holders(element)
        and flow.always_before(call.at, callback.at)
        and flow.always_after(call.at, callback.at)
    ]
    if not found:
        raise NotProved("no direct call leads to the callback")
    return next((call for call in found if call.target in schedule), found[0])


def _unlock_after(flow: Flow, queue: Stored, element: Value, unlock: frozenset[int]) -> Called:
    found = [
        call
        for call in _calls(flow)
        if call.direct
        and call.target in unlock
        and flow.always_before(queue.at, call.at)
        and flow.always_after(queue.at, call.at)
    ]
    if len(found) != 1:
        raise NotProved(f"{len(found)} unlocks follow the linking of the request on every way, not 1")
    return _holding(found[0], element)


def _holding(call: Called, element: Value) -> Called:
    if not call.holders(element):
        raise NotProved(f"no register holds the request at {call.at:#x}")
    return call
