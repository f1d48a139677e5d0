"""struct QEMUBH, read from the code of util/async.c.

Knows: how aio_bh_new() fills a bottom half and how qemu_bh_schedule() marks it. Does not know the
thread pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracer.layout import BottomHalfLayout
from tracer.sites.flow import Argument, Called, Const, Exchanged, Flow, FlowError, Load, Stored, Value
from tracer.sites.outlined import exchanges
from tracer.sites.program import Program
from tracer.sites.proof import NotProved, agreed
from tracer.sites.thread_pool import BottomHalves, HalfMembers, Mark

_MAX_HOPS = 3
#: How far from each other functions of one file (util/async.c) are, in bytes, and how many are looked at.
_NEAR = 4096
_MAX_CLOSE = 48


def bottom_half_layout(
    program: Program,
    halves: BottomHalves,
    schedule: int | None,
    inlined: Mark | None,
    named: bool,
    cancels: frozenset[int] = frozenset(),
) -> BottomHalfLayout:
    """The offsets in QEMUBH; NotProved if the code does not show them.

    `schedule` is qemu_bh_schedule(), `cancels` what else gets a bottom half and may take the mark away;
    `inlined` is the mark where a caller of the former was seen to make it itself; `named` tells that there
    are names.
    """
    marks = [] if inlined is None else [(inlined.offset, inlined.width)]
    if schedule is not None:
        marks.append(_mark(program, schedule))
    marks += [(e.offset, e.width) for cancel in cancels for e in _exchanges(program, cancel) if e.width in (1, 4)]
    flags, width = agreed("QEMUBH.flags", *marks)
    members = halves.members if halves.creator is None else _members(program, halves.creator)
    if members is None:
        raise NotProved("aio_bh_new is not known")
    name = members.name if named else None
    return BottomHalfLayout(members.context, members.callback, members.opaque, flags, width, name)


def _members(program: Program, creator: int) -> HalfMembers:
    filled = _filled(program.flow(creator))
    return HalfMembers(
        context=agreed("QEMUBH.ctx", *filled.get(0, ())),
        callback=agreed("QEMUBH.cb", *filled.get(1, ())),
        opaque=agreed("QEMUBH.opaque", *filled.get(2, ())),
        name=agreed("QEMUBH.name", *filled[3]) if 3 in filled else None,
    )


def schedules_with_barrier(
    program: Program, schedule: int | None = None, callback: int | None = None, near: Sequence[int] = ()
) -> bool | None:
    """Whether bottom halves are scheduled with the barriers of QEMU commit e8d3b1a25f (in v2.3).

    Since then qemu_bh_schedule() marks a bottom half, and aio_bh_poll() takes the mark off, by an atomic
    exchange. One plain store of the two is enough to lose a wake-up. None if that cannot be seen.
    `callback` and `near` are as for takes_off_atomically().
    """
    schedule = program.address("qemu_bh_schedule") if schedule is None else schedule
    if schedule is None:
        return None
    try:
        mark = _mark(program, schedule)
        marks = any((event.offset, event.width) == mark for event in _exchanges(program, schedule))
        return takes_off_atomically(program, mark, callback, (schedule, *near)) if marks else False
    except (NotProved, FlowError):
        return None


def takes_off_atomically(
    program: Program, mark: tuple[int, int], callback: int | None = None, near: Sequence[int] = ()
) -> bool | None:
    """Whether aio_bh_poll() takes that mark (offset, width) off atomically; None if it does not show.

    Where no name tells which function that is, it is the one of the same file, so close to a function that is known
    (`near`), that takes the mark off a bottom half and calls that one's function, at `callback`.
    """
    poll = program.address("aio_bh_poll")
    if poll is not None:
        found = _taken_off(program.flow(poll), program, mark)
        return True if True in found.values() else False if found else None
    if callback is None:
        return None
    for start in _close_to(program, near):
        try:
            flow = program.flow(start)
            taken = _taken_off(flow, program, mark)
            answers = {taken[half] for half in _run(flow, program, callback) if half in taken} if taken else set()
        except FlowError:
            continue
        if answers:
            return answers == {True}
    return None


def _taken_off(flow: Flow, program: Program, mark: tuple[int, int]) -> dict[Value, bool]:
    """From which objects the mark is taken, and whether atomically.

    The function's own argument is the AioContext, which has members at such offsets, too.
    """
    plain = {
        event.base: False
        for event in flow.events
        if isinstance(event, Stored) and (event.offset, event.width, event.value) == (*mark, Const(0))
    }
    atomic = {each.base: True for each in exchanges(program, flow) if (each.offset, each.width) == mark}
    return {base: how for base, how in (plain | atomic).items() if base != Argument(0)}


def _run(flow: Flow, program: Program, callback: int) -> set[Value]:
    """The bottom halves whose function is called, here or by aio_bh_call()."""
    found = {_called_half(event, callback) for event in flow.events if isinstance(event, Called)}
    for event in flow.events:
        if isinstance(event, Called) and event.direct and _calls_half(program, event.target, callback):
            found.add(event.arguments[0])
    return {half for half in found if half is not None}


def _calls_half(program: Program, target: int | None, callback: int) -> bool:
    """Whether that function calls the function of the bottom half that is its argument."""
    if target is None or not program.code.starts_function(target):
        return False
    try:
        events = program.flow(target).events
    except FlowError:
        return False
    return any(_called_half(event, callback) == Argument(0) for event in events if isinstance(event, Called))


def _called_half(call: Called, callback: int) -> Value | None:
    callee = call.callee
    return callee.base if isinstance(callee, Load) and (callee.offset, callee.width) == (callback, 8) else None


def _close_to(program: Program, near: Sequence[int]) -> list[int]:
    """The functions around those, the closest first."""
    starts = {start: 0 for at in near for start in program.image.functions_in(at - _NEAR, at + _NEAR)}
    return sorted(starts, key=lambda start: min(abs(start - at) for at in near))[:_MAX_CLOSE]


def _filled(flow: Flow) -> dict[int, list[int]]:
    """For each argument of aio_bh_new(), where in the new object it is stored."""
    results = {event.result for event in flow.events if isinstance(event, Called)}
    members: dict[int, list[int]] = {}
    for event in flow.events:
        if isinstance(event, Stored) and event.base in results and isinstance(event.value, Argument):
            members.setdefault(event.value.number, []).append(event.offset)
    return members


def _mark(program: Program, schedule: int) -> tuple[int, int]:
    """Offset and width of what qemu_bh_schedule() sets: `flags`, or before v5.0 the byte `scheduled`."""
    exchanges = [event for event in _exchanges(program, schedule) if event.width in (1, 4)]
    if exchanges:
        return agreed("QEMUBH.flags", *((event.offset, event.width) for event in exchanges))
    stores = [
        (event.offset, event.width)
        for event in program.flow(schedule).events
        if isinstance(event, Stored) and event.width == 1
        if (event.base, event.value) == (Argument(0), Const(1))
    ]
    return agreed("QEMUBH.scheduled", *stores)


def _exchanges(program: Program, address: int) -> list[Exchanged]:
    """Atomic accesses to the function's first argument, in it or where it hands that on to.

    qemu_bh_schedule() is a jump to aio_bh_enqueue() in some builds.
    """
    for _ in range(_MAX_HOPS):
        flow = program.flow(address)
        found = [each for each in exchanges(program, flow) if each.base == Argument(0)]
        onward = [
            event.target
            for event in flow.events
            if isinstance(event, Called) and event.target is not None and event.arguments[0] == Argument(0)
        ]
        if found or not onward:
            return found
        address = onward[0]
    return []
