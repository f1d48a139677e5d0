"""The functions of util/thread-pool.c, read from their code.

Knows: what each of QEMU's thread-pool functions must do with a request, and so which register holds
it and at which offsets its members lie. Does not know how the functions were found, nor versions, nor
any function's name. Each reader returns what one function shows, or raises NotProved with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tracer.layout import RequestState
from tracer.records import dataclass
from tracer.sites.flow import (
    Argument,
    Called,
    Compared,
    Const,
    Exchanged,
    Flow,
    Load,
    Merged,
    Part,
    Stored,
    Sum,
    Unknown,
    Value,
)
from tracer.sites.proof import NotProved, agreed

_DONE = Const(RequestState.THREAD_DONE)
_QUEUED = Const(RequestState.THREAD_QUEUED)
_ZERO = Const(0)
_POOL = Argument(0)
_NEAR = 160  # instructions behind the DONE store among which a place for the probe is looked for


@dataclass(frozen=True)
class Place:
    """An instruction that can carry a probe, and the registers that hold the request there."""

    at: int
    registers: tuple[str, ...]


@dataclass(frozen=True)
class HalfMembers:
    """Offsets in QEMUBH, where aio_bh_new() is inlined into the pool's constructor."""

    context: int
    callback: int
    opaque: int
    name: int | None


@dataclass(frozen=True)
class BottomHalves:
    """What the pool's constructor shows: the functions of its two bottom halves, and where it keeps one.

    `creator` is aio_bh_new(), or else `members` is what it shows. `name` is the address of what is said to
    be the completion bottom half's name (since v6.1), or None.
    """

    completion: int
    spawn: int
    context: int
    completion_bh: int
    creator: int | None
    members: HalfMembers | None
    name: int | None


@dataclass(frozen=True)
class Mark:
    """Where a bottom half says that it is scheduled (offset and width in QEMUBH), and how that is set."""

    offset: int
    width: int
    atomic: bool


@dataclass(frozen=True)
class Done:
    """What worker_thread() shows; `schedule` is qemu_bh_schedule(), None where that is inlined."""

    site: Place
    element: Value
    func: int
    arg: int
    ret: int
    state: int
    store: int  # where DONE is stored


@dataclass(frozen=True)
class Callback:
    """What thread_pool_completion_bh() shows; each place only leads to the callback."""

    sites: tuple[Place, ...]
    element: Value
    callback: int
    opaque: int
    ret: int
    state: int
    head: int
    next: int
    calls: tuple[tuple[int, Value], ...]  # the calls of a callback, and the request in each


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
    """What thread_pool_submit_aio() shows; `site` is the unlock after the request was queued, if it can be."""

    site: Place
    element: Value
    pool: int
    queued: frozenset[int]  # where a zero is stored: THREAD_QUEUED is one of them
    head: int
    next: int
    prev: int
    members: frozenset[int]  # of the element, that are filled in from other values
    constants: frozenset[int]  # numbers that were stored in the element, or its allocation got
    counters: Counters
    linked: int  # where it is linked into pool->head
    queued_at: int  # and where into pool->request_list
    allocator: int | None  # what allocated the element: qemu_aio_get(), if it is not inlined


def read_constructor(flow: Flow, is_code: Callable[[int], bool]) -> tuple[BottomHalves, BottomHalves]:
    """thread_pool_new(): the two functions it makes bottom halves of, both ways round.

    Which is which is left to the readers of those functions: their proofs hold for one way only.
    """
    made = [call for call in _calls(flow) if call.direct and _code(call, 1, is_code) is not None]
    pairs = [
        (first, second)
        for number, first in enumerate(made)
        for second in made[number + 1 :]
        if first.target == second.target and first.arguments[2] == second.arguments[2]
    ]
    if not pairs:
        return _inlined_halves(flow, is_code)
    if len(pairs) != 1:
        raise NotProved(f"the pool's constructor makes {len(pairs)} pairs of bottom halves, not 1")
    first, second = pairs[0]
    return _halves(flow, first, second), _halves(flow, second, first)


def started_threads(flow: Flow, is_code: Callable[[int], bool]) -> tuple[int, ...]:
    """The functions that may be handed to qemu_thread_create(): code in its third argument."""
    found = (_code(call, 2, is_code) for call in _calls(flow))
    return tuple(dict.fromkeys(address for address in found if address is not None))


def read_worker(flow: Flow) -> Done:
    """worker_thread(): calls func, stores what it returned and then DONE, and schedules the completion.

    thread_pool_cancel() stores DONE too, but calls no func.
    """
    found = [done for call in _calls(flow) for done in _done_after(flow, call)]
    if len(found) != 1:
        raise NotProved(f"worker_thread stores a request's result and DONE in {len(found)} places, not 1")
    return found[0]


def read_schedule(flow: Flow, done: Done, completion_bh: int) -> int | None:
    """qemu_bh_schedule(), which worker_thread() calls with the pool's bottom half; None where it is inlined."""
    targets = {
        call.target
        for call in _calls(flow)
        if call.direct and _is_member(call.arguments[0], completion_bh) and flow.always_before(done.store, call.at)
    }
    return targets.pop() if len(targets) == 1 else None


def bottom_half_calls(flow: Flow, completion_bh: int) -> frozenset[int]:
    """What the function calls with the pool's bottom half: qemu_bh_schedule(), since v2.9 qemu_bh_cancel()."""
    found = (call.target for call in _calls(flow) if _is_member(call.arguments[0], completion_bh))
    return frozenset(target for target in found if target is not None)


def read_inlined_schedule(flow: Flow, completion_bh: int) -> Mark | None:
    """The mark in QEMUBH, where worker_thread() makes it itself; before v2.3 that was a plain store."""
    marks = {
        Mark(event.offset, event.width, atomic=isinstance(event, Exchanged))
        for event in flow.events
        if isinstance(event, (Exchanged, Stored)) and _is_member(event.base, completion_bh)
        if (event.width in (1, 4) if isinstance(event, Exchanged) else (event.width, event.value) == (1, Const(1)))
    }
    return marks.pop() if len(marks) == 1 else None


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
    if not flow.always_before(work.at, done[0].at):
        raise NotProved("DONE is stored without func being called")
    yield Done(
        _after_done(flow, done[0].at, element), element, func.offset, arg.offset, ret[0], done[0].offset, done[0].at
    )


def _after_done(flow: Flow, store: int, element: Value) -> Place:
    """The first direct call behind the DONE store, or what else can carry a probe up to the second one."""
    found: list[int] = []
    calls = 0
    for at in flow.onward(store, _NEAR):
        if not (flow.always_before(store, at) and flow.always_after(store, at)):
            continue
        if flow.comes_again(at, avoiding=store):
            continue  # a loop, such as one of a compare and exchange that is tried again
        found.append(at)
        calls += flow.is_direct_call(at)
        if calls == 2:
            break
    calling = [at for at in found if flow.is_direct_call(at)]
    return _best(flow, found, element, "behind the DONE store", calling[:1])


def _best(flow: Flow, places: Iterable[int], element: Value, where: str, first: Iterable[int] = ()) -> Place:
    """The place that suits best: a cheap one of `first`, a cheap one at all, any that holds the request."""
    holding = [Place(at, holders) for at in places if (holders := flow.holders_at(at, element))]
    wanted = set(first)

    def rank(place: Place) -> int:
        return 2 if not flow.instructions[place.at].cheap else 0 if place.at in wanted else 1

    usable = [place for place in holding if flow.instructions[place.at].probeable]
    if not usable:
        raise NotProved(f"no instruction {where} holds the request on every way")
    return min(usable, key=rank)


def read_completion(flow: Flow, schedule: int | None = None) -> Callback:
    """thread_pool_completion_bh(): finds DONE elements on the pool's list and calls their callbacks.

    `schedule` is qemu_bh_schedule(), whose call before the callback is the best place.
    """
    calls = [call for call in _calls(flow) if _calls_back(call)]
    if not calls:
        raise NotProved("thread_pool_completion_bh has 0 places that call a callback")
    elements = [call.callee.base for call in calls if isinstance(call.callee, Load)]
    family = {value for element in elements for value in (element, *flow.meeting(element))}
    found = [_callback_of(flow, call, schedule, family) for call in calls]
    for name in ("callback", "opaque", "ret", "state", "head", "next"):
        agreed(f"thread_pool_completion_bh's {name}", *(getattr(each, name) for each in found))
    sites = {site.at: site for each in found for site in each.sites}
    return replace(found[0], sites=tuple(sites.values()), calls=tuple(call for each in found for call in each.calls))


def _calls_back(call: Called) -> bool:
    """Whether it is element->common.cb(element->common.opaque, element->ret)."""
    callback, opaque, ret = call.callee, call.arguments[0], _whole(call.arguments[1])
    if not (isinstance(callback, Load) and isinstance(opaque, Load) and isinstance(ret, Load)):
        return False
    return callback.base == opaque.base == ret.base and ret.width == 4 and opaque.width == 8


def _callback_of(flow: Flow, call: Called, schedule: int | None, family: set[Value]) -> Callback:
    callback, opaque, ret = call.callee, call.arguments[0], _whole(call.arguments[1])
    assert isinstance(callback, Load)
    assert isinstance(opaque, Load)
    assert isinstance(ret, Load)
    element = callback.base
    tests = [
        (test.at, tested.offset)
        for test in flow.events
        if isinstance(test, Compared)
        and (tested := _tested_for_done(test)) is not None
        and tested.base == element
        and flow.always_before(test.at, call.at)
    ]
    state = agreed("the test for THREAD_DONE", *(offset for _, offset in tests))
    ways = [value for one in family for value in flow.origins(one) if isinstance(value, Load)]
    return Callback(
        (_before_callback(flow, min(at for at, _ in tests), call, element, schedule),),
        element,
        callback.offset,
        opaque.offset,
        ret.offset,
        state,
        agreed("ThreadPool.head", *(way.offset for way in ways if way.base == _POOL)),
        agreed("ThreadPoolElement.all.le_next", *(way.offset for way in ways if way.base in family)),
        ((call.at, element),),
    )


def _tested_for_done(test: Compared) -> Load | None:
    """The 32-bit word that is compared with DONE, perhaps after a constant was taken from it."""
    less = test.left.offset if isinstance(test.left, Sum) else 0
    word = test.left.base if isinstance(test.left, Sum) else test.left
    if not (isinstance(word, Load) and word.width == 4 and isinstance(test.right, Const)):
        return None
    return word if (test.right.value - less) & 0xFFFFFFFF == RequestState.THREAD_DONE else None


def _before_callback(flow: Flow, test: int, call: Called, element: Value, schedule: int | None) -> Place:
    """What is passed exactly when the callback will be called; of dear ones the last."""
    places = [
        at for at in flow.between(test, call.at) if flow.always_before(at, call.at) and flow.always_after(at, call.at)
    ]
    direct = [at for at in places if flow.is_direct_call(at)]
    best = [at for at in direct if flow.instructions[at].target == schedule]
    dear = [at for at in reversed(places) if at not in direct]
    return _best(flow, [*direct, *dear], element, "leading to the callback", best)


def read_submit(flow: Flow) -> tuple[Submit, ...]:
    """thread_pool_submit_aio(): gets an element, fills it, and links it twice.

    Compilers inline it; the function may therefore do much else, and do this more than once.
    """
    links = list(_links(flow))
    if not links:
        raise NotProved("thread_pool_submit_aio does not link the request into the pool's two lists")
    return tuple(_submit(flow, link, queue) for link, queue in links)


def _submit(flow: Flow, link: Stored, queue: Stored) -> Submit:
    element, pool = link.value, link.base
    words = list(_stores(flow, element, 8))
    head, head_at = Load(pool, link.offset, 8, 0), Sum(pool, link.offset)
    taken = [call for call in _calls(flow) if call.result == element]
    constants = [each.value for each in words] + [call.arguments[0] for call in taken]
    return Submit(
        _before_unlock(flow, link, queue),
        element,
        agreed("ThreadPoolElement.pool", *(each.offset for each in words if each.value == pool)),
        frozenset(each.offset for each in _stores(flow, element, 4) if each.value == _QUEUED),
        link.offset,
        agreed("ThreadPoolElement.all.le_next", *(e.offset for e in words if _same_place(e.value, head))),
        agreed("ThreadPoolElement.all.le_prev", *(e.offset for e in words if e.value == head_at)),
        frozenset(each.offset for each in words),
        frozenset(value.value for value in constants if isinstance(value, Const)),
        _counters(flow, pool),
        link.at,
        queue.at,
        taken[0].target if len(taken) == 1 and len(taken[0].arguments) else None,
    )


def _links(flow: Flow) -> Iterator[tuple[Stored, Stored]]:
    """The stores that link an element into pool->head, and behind the last of pool->request_list.

    The first is told by the element's all.le_prev, which points to pool->head.
    """
    kept = [event for event in flow.events if isinstance(event, Stored) and isinstance(event.value, Unknown)]
    backward = {(event.base, event.value) for event in flow.events if isinstance(event, Stored)}
    for link in kept:
        if (link.value, Sum(link.base, link.offset)) not in backward:
            continue
        queues = [
            each
            for each in kept
            if each.value == link.value
            and isinstance(each.base, Load)
            and each.base.base == link.base
            and not each.offset
        ]
        if len(queues) == 1:
            yield link, queues[0]


def _before_unlock(flow: Flow, link: Stored, queue: Stored) -> Place:
    """The unlock of pool->lock behind the queue; else the last place at which the request is held before it.

    No worker can have the request before that.
    """
    unlock = _unlock(flow, link.base, queue)
    first, second = (link, queue) if flow.always_before(link.at, queue.at) else (queue, link)
    places = [at for at in flow.between(first.at, unlock.at) if flow.always_before(first.at, at)]
    behind = [at for at in places if flow.always_before(second.at, at)]
    ordered = [*reversed(behind), *reversed([at for at in places if at not in behind and at != first.at])]
    return _best(flow, ordered, link.value, "between the linking of the request and its unlock", (unlock.at,))


def _unlock(flow: Flow, pool: Value, queue: Stored) -> Called:
    """The first call behind the queue that gets what a call before it got: a lock in the pool."""
    locks = {
        call.arguments[0]
        for call in _calls(flow)
        if _is_inside(flow, call.arguments[0], pool) and flow.always_before(call.at, queue.at)
    }
    found = [
        call
        for call in _calls(flow)
        if call.direct
        and call.arguments[0] in locks
        and flow.always_before(queue.at, call.at)
        and flow.always_after(queue.at, call.at)
    ]
    first = [call for call in found if all(flow.always_before(call.at, other.at) for other in found)]
    if len(first) != 1:
        raise NotProved(f"{len(found)} unlocks follow the linking of the request on every way")
    return first[0]


def _is_inside(flow: Flow, value: Value, pool: Value) -> bool:
    """Whether it is an address in the pool, which may be made on one of the ways that lead here."""
    if isinstance(value, Merged):
        inner = flow.origins(value)
        return (
            all(isinstance(each, Sum) for each in inner) and len({e.offset for e in inner if isinstance(e, Sum)}) == 1
        )
    return isinstance(value, Sum) and value.base == pool


def _is_member(value: Value, offset: int) -> bool:
    """Whether it is the pool's 8-byte member at `offset`, in functions that get the pool."""
    return isinstance(value, Load) and (value.base, value.offset, value.width) == (_POOL, offset, 8)


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
    context, function, pool, name = completion.arguments[:4]
    started = spawn.arguments[1]
    kept = {each.value: each.offset for each in _stores(flow, pool, 8)}
    if context not in kept or completion.result not in kept:
        raise NotProved("the pool's constructor does not keep its context and completion bottom half")
    assert isinstance(function, Const)
    assert isinstance(started, Const)
    assert completion.target is not None
    return BottomHalves(
        function.value,
        started.value,
        kept[context],
        kept[completion.result],
        completion.target,
        None,
        name.value if isinstance(name, Const) else None,
    )


def _inlined_halves(flow: Flow, is_code: Callable[[int], bool]) -> tuple[BottomHalves, BottomHalves]:
    """The constructor fills two new objects itself, each with a function and the pool, and keeps them."""
    stores = [event for event in flow.events if isinstance(event, Stored) and event.width == 8]
    made = [
        (function, kept, pointer)
        for function in stores
        if isinstance(function.base, Unknown) and isinstance(function.value, Const) and is_code(function.value.value)
        for kept in stores
        if kept.value == function.base
        for pointer in stores
        if (pointer.base, pointer.value) == (function.base, kept.base)
    ]
    pairs = [
        (first, second)
        for number, first in enumerate(made)
        for second in made[number + 1 :]
        if first[1].base == second[1].base and first[1].offset != second[1].offset
        if (first[0].offset, first[2].offset) == (second[0].offset, second[2].offset)
    ]
    if len(pairs) != 1:
        raise NotProved(f"the pool's constructor makes {len(pairs)} pairs of bottom halves, not 1")
    functions = [function.value.value for function, _, _ in pairs[0] if isinstance(function.value, Const)]
    first, second = (_inlined_half(stores, *each) for each in pairs[0])
    return (
        replace(first, completion=functions[0], spawn=functions[1]),
        replace(second, completion=functions[1], spawn=functions[0]),
    )


def _inlined_half(stores: list[Stored], function: Stored, kept: Stored, pointer: Stored) -> BottomHalves:
    pool, half = kept.base, kept.value
    mine = {each.value: each.offset for each in stores if each.base == half}
    shared = {
        (each.offset, mine[each.value])
        for each in stores
        if each.base == pool and each.value in mine and not isinstance(each.value, Const)
    }
    if len(shared) != 1:
        raise NotProved("the pool and its bottom half do not keep the same context")
    context, half_context = shared.pop()
    texts = {
        value.value: offset for value, offset in mine.items() if isinstance(value, Const) and offset != function.offset
    }
    texts.pop(0, None)
    name, name_offset = texts.popitem() if len(texts) == 1 else (None, None)
    members = HalfMembers(half_context, function.offset, pointer.offset, name_offset)
    return BottomHalves(0, 0, context, kept.offset, None, members, name)
