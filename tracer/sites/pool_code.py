"""Sites and layout from the code of the thread pool's functions.

Knows: how the functions of util/thread-pool.c lead to one another, and that what they show must agree.
Does not know where the names come from: a strategy hands in what names it has, and whether strings may
lead where no name does. Names only begin the search; what is found proves itself without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Optional

from tracer.layout import BottomHalfLayout, ElementLayout, Layout, PoolLayout
from tracer.records import dataclass
from tracer.sites import hints
from tracer.sites.bottom_half import bottom_half_layout, schedules_with_barrier, takes_off_atomically
from tracer.sites.flow import Const, Flow, FlowError, Load, Returned
from tracer.sites.model import CALLBACK, DONE, SUBMIT, Attempt, Located, Site
from tracer.sites.program import Program
from tracer.sites.proof import NotProved, agreed
from tracer.sites.thread_pool import (
    BottomHalves,
    Callback,
    Done,
    Place,
    Submit,
    bottom_half_calls,
    read_allocator,
    read_completion,
    read_constructor,
    read_inlined_schedule,
    read_schedule,
    read_submit,
    read_worker,
    started_threads,
)

# The pool's constructor is thread_pool_new_aio since QEMU v10.0, whose thread_pool_new makes another kind.
# It is inlined into its callers, or its own callee is not inlined into it.
_CONSTRUCTORS = ("thread_pool_init_one", "thread_pool_new_aio", "thread_pool_new", "aio_get_thread_pool")
_SUBMITTERS = ("thread_pool_submit_aio", "thread_pool_submit_co", "thread_pool_submit")
_ALLOCATOR = "qemu_aio_get"
_ALSO_NAMED = ("aio_poll", "aio_bh_poll", "aio_notify", "bdrv_drain_all_begin", "bdrv_drain_all")
_COMPLETION_NAME = "thread_pool_completion_bh"
_MAX_SUBMITTERS = 16
_MAX_OFFSET = 4096
_MAX_GETTER = 64  # bytes of a function that returns a variable; without optimisation it has a frame


@dataclass(frozen=True)
class Shown:
    """What the functions show, together. `submits` are told with the function that they were seen in."""

    constructor: int
    halves: BottomHalves
    worker: int
    done: Done
    callback: Callback
    schedule: int | None
    submits: tuple[tuple[int, Submit], ...]
    allocator: tuple[int, int] | None  # offsets of cb and opaque


def locate_by_code(program: Program, strategy: str, by_strings: bool) -> Located:
    """All sites and the layout, proved; NotProved with the reason otherwise."""
    try:
        return located(program, read_shown(program, by_strings), strategy)
    except FlowError as error:
        raise NotProved(str(error)) from error


def located(program: Program, shown: Shown, strategy: str) -> Located:
    """What was shown, as sites and a layout that agree."""
    sites = [
        *(_site(program, SUBMIT, function, submit.site, strategy) for function, submit in shown.submits),
        _site(program, DONE, shown.worker, shown.done.site, strategy),
        *(_site(program, CALLBACK, shown.halves.completion, site, strategy) for site in shown.callback.sites),
    ]
    first = {site.name: site for site in reversed(sites)}
    layout = _layout(program, shown, strategy)
    return Located(
        sites=first,
        layout=layout,
        functions=_functions(program, shown),
        attempts=(Attempt(strategy, "found and proved", ok=True),),
        main_context=_main_context(program, shown),
        barrier_fixed=_barrier(program, shown, layout.bottom_half.callback),
        more_sites=tuple(site for site in sites if site not in first.values()),
    )


def read_shown(program: Program, by_strings: bool) -> Shown:
    """All functions that matter, read; NotProved or FlowError with the reason otherwise."""
    constructor, halves, worker, done, callback, schedule = _completion_and_worker(program, by_strings)
    submits = _submits(program, worker, by_strings, _fits(done, callback))
    return Shown(constructor, halves, worker, done, callback, schedule, submits, _allocator(program, submits))


_Followed = tuple[int, BottomHalves, int, Done, Callback, Optional[int]]


def _completion_and_worker(program: Program, by_strings: bool) -> _Followed:
    """Follow the pool's constructor to its bottom halves, whichever way round proves itself."""

    def candidates() -> Iterator[int]:
        yield from program.addresses(*_CONSTRUCTORS)
        completions = frozenset(program.addresses(_COMPLETION_NAME))
        yield from sorted(program.code.users_of(completions))
        if by_strings:
            yield from hints.constructors(program.code)

    reasons = []
    for constructor in candidates():
        try:
            return _constructed(program, constructor)
        except (NotProved, FlowError) as error:
            reasons.append(f"{constructor:#x}: {error}")
    where = "no name of the pool's constructor is known" + (", and no string leads to it" if by_strings else "")
    raise NotProved(reasons[0] if reasons else where)


def _constructed(program: Program, constructor: int) -> _Followed:
    reasons = []
    for halves in read_constructor(program.flow(constructor), program.code.starts_function):
        try:
            worker, done = _worker(program, halves.spawn)
            schedule = read_schedule(program.flow(worker), done, halves.completion_bh)
            callback = read_completion(program.flow(halves.completion), schedule)
            agreed("ThreadPoolElement.state", done.state, callback.state)
            agreed("ThreadPoolElement.ret", done.ret, callback.ret)
            return constructor, halves, worker, done, callback, schedule
        except (NotProved, FlowError) as error:
            reasons.append(str(error))
    raise NotProved(reasons[0])


def _worker(program: Program, spawn: int) -> tuple[int, Done]:
    """worker_thread(), which spawn_thread_bh_fn() starts itself or by way of do_spawn_thread()."""
    flows = [program.flow(spawn)]
    flows += [flow for target in flows[0].targets() if (flow := _followed(program, target)) is not None]
    reasons = ["spawn_thread_bh_fn starts no thread"]
    for flow in flows:
        for address in started_threads(flow, program.code.starts_function):
            try:
                return address, read_worker(program.flow(address))
            except (NotProved, FlowError) as error:
                reasons.append(str(error))
    raise NotProved(reasons[-1])


def _followed(program: Program, address: int) -> Flow | None:
    try:
        return program.flow(address)
    except FlowError:
        return None


def _fits(done: Done, callback: Callback) -> Callable[[Submit], bool]:
    """Whether a place that links something in two lists is about the pool's requests."""

    def fits(submit: Submit) -> bool:
        return (
            {done.func, done.arg, submit.pool} <= submit.members
            and done.state in submit.queued
            and (submit.head, submit.next) == (callback.head, callback.next)
        )

    return fits


def _submits(
    program: Program, worker: int, by_strings: bool, fits: Callable[[Submit], bool]
) -> tuple[tuple[int, Submit], ...]:
    """Every place that submits requests: thread_pool_submit_aio(), and the copies inlined into its callers."""
    first = _first_submitter(program, worker, by_strings, fits)
    kinds = {address for submit in first[1] for address in _aiocb_infos(program, submit)}
    if len(kinds) != 1:
        raise NotProved("what submits requests does not name thread_pool_aiocb_info")
    users = program.code.users_of(frozenset(kinds))
    if len(users) > _MAX_SUBMITTERS:
        raise NotProved(f"{len(users)} functions use thread_pool_aiocb_info")
    found: list[tuple[int, Submit]] = []
    for function in sorted(users | {first[0]}, key=lambda start: (start != first[0], start)):
        submits = tuple(submit for submit in read_submit(program.flow(function)) if fits(submit))
        if not submits:
            raise NotProved(f"the function at {function:#x} submits requests in a way that is not known")
        found.extend((function, submit) for submit in submits)
    return tuple(found)


def _first_submitter(
    program: Program, worker: int, by_strings: bool, fits: Callable[[Submit], bool]
) -> tuple[int, tuple[Submit, ...]]:
    def candidates() -> Iterator[int]:
        yield from program.addresses(*_SUBMITTERS)
        if by_strings:
            yield from hints.submitters(program.code, worker)

    reasons = []
    for function in candidates():
        try:
            found = tuple(submit for submit in read_submit(program.flow(function)) if fits(submit))
        except (NotProved, FlowError) as error:
            reasons.append(str(error))
            continue
        if found:
            return function, found
        reasons.append("thread_pool_submit_aio and worker_thread tell differently about a request's members")
    raise NotProved(reasons[0] if reasons else "no name of what submits requests is known")


def _aiocb_infos(program: Program, submit: Submit) -> frozenset[int]:
    """The addresses of data that the new element's allocation got, or that were stored in it."""
    image = program.image
    return frozenset(
        address
        for address in submit.constants
        if address >= 0x1000 and image.segment_at(address) is not None and not image.is_executable(address)
    )


def _allocator(program: Program, submits: tuple[tuple[int, Submit], ...]) -> tuple[int, int] | None:
    """What qemu_aio_get() shows, as a witness; None where it is inlined or its arguments were rearranged."""
    named = set(program.addresses(_ALLOCATOR))
    for _, submit in submits:
        if submit.allocator is not None and submit.allocator in named:
            try:
                return read_allocator(program.flow(submit.allocator))
            except (NotProved, FlowError):
                return None
    return None


def _layout(program: Program, shown: Shown, strategy: str) -> Layout:
    done, callback = shown.done, shown.callback
    submits = [submit for _, submit in shown.submits]
    allocator = [shown.allocator] if shown.allocator else []
    element = ElementLayout(
        callback=agreed("BlockAIOCB.cb", callback.callback, *(offsets[0] for offsets in allocator)),
        opaque=agreed("BlockAIOCB.opaque", callback.opaque, *(offsets[1] for offsets in allocator)),
        pool=agreed("ThreadPoolElement.pool", *(submit.pool for submit in submits)),
        func=done.func,
        arg=done.arg,
        state=done.state,
        ret=done.ret,
        next=agreed("ThreadPoolElement.all.le_next", callback.next, *(submit.next for submit in submits)),
        prev=agreed("ThreadPoolElement.all.le_prev", *(submit.prev for submit in submits)),
    )
    pool = PoolLayout(
        context=shown.halves.context,
        completion_bh=shown.halves.completion_bh,
        head=agreed("ThreadPool.head", callback.head, *(submit.head for submit in submits)),
        **asdict(submits[0].counters),
    )
    layout = Layout(element, pool, _bottom_half(program, shown), strategy)
    check_plausible(layout)
    return layout


def check_plausible(layout: Layout) -> None:
    """NotProved where the members would not be what compilers make of the structures.

    In every version the pairs below are declared one behind the other; damaged code tells otherwise.
    """
    element, pool, half = layout.element, layout.pool, layout.bottom_half
    pairs = (
        ("cb and opaque", element.callback + 8, element.opaque),
        ("func and arg", element.func + 8, element.arg),
        ("state and ret", element.state + 4, element.ret),
        ("le_next and le_prev", element.next + 8, element.prev),
        ("ctx and completion_bh", pool.context + 8, pool.completion_bh),
        ("the bottom half's cb and opaque", half.callback + 8, half.opaque),
    )
    for what, expected, found in pairs:
        if expected != found:
            raise NotProved(f"{what} are not next to each other")
    pointers = (element.callback, element.pool, element.func, element.state, element.next)
    others = (pool.context, pool.head, half.context, half.callback)
    if any(offset % 8 or not 0 <= offset < _MAX_OFFSET for offset in (*pointers, *others)):
        raise NotProved("a member is where no compiler puts it")
    if len(set(pointers)) != len(pointers) or not half.opaque < half.flags < _MAX_OFFSET:
        raise NotProved("two members are in one place")


def _bottom_half(program: Program, shown: Shown) -> BottomHalfLayout:
    halves = shown.halves
    inlined = read_inlined_schedule(program.flow(shown.worker), halves.completion_bh)
    named = halves.name is not None and program.image.string_at(halves.name) == _COMPLETION_NAME
    schedule = shown.schedule if shown.schedule is not None else program.address("qemu_bh_schedule")
    cancels = bottom_half_calls(program.flow(halves.completion), halves.completion_bh) - {schedule}
    return bottom_half_layout(program, halves, schedule, inlined, named, cancels)


def _barrier(program: Program, shown: Shown, callback: int) -> bool | None:
    """An atomic mark that was inlined is as good as one in qemu_bh_schedule() itself."""
    halves = shown.halves
    near = (shown.worker,) if halves.creator is None else (halves.creator,)
    mark = read_inlined_schedule(program.flow(shown.worker), halves.completion_bh)
    try:
        if mark is not None:
            return takes_off_atomically(program, (mark.offset, mark.width), callback, near) if mark.atomic else False
        return schedules_with_barrier(program, shown.schedule, callback, near)
    except FlowError:
        return None


def _site(program: Program, name: str, function: int, place: Place, strategy: str) -> Site:
    instruction = program.flow(function).instructions[place.at]
    saved = program.convention.callee_saved
    register = min(place.registers, key=lambda holder: (holder not in saved, holder))
    return Site(name, place.at, register, instruction.text, strategy, instruction.cheap)


def _functions(program: Program, shown: Shown) -> dict[str, int]:
    functions = {
        "thread_pool_completion_bh": shown.halves.completion,
        "spawn_thread_bh_fn": shown.halves.spawn,
        "worker_thread": shown.worker,
        "thread_pool_submit_aio": shown.submits[0][0],
    }
    if shown.schedule is not None:
        functions["qemu_bh_schedule"] = shown.schedule
    for name in ("qemu_bh_schedule", *_ALSO_NAMED):
        address = program.address(name)
        if address is not None:
            functions.setdefault(name, address)
    return functions


def _main_context(program: Program, shown: Shown) -> int | None:
    """The variable qemu_aio_context of util/main-loop.c, which qemu_get_aio_context() does nothing but load.

    Without a name: the one function of that kind that the pool's constructor calls, since a pool for no
    context is one for the main context.
    """
    named = program.address("qemu_get_aio_context")
    getters = (named,) if named is not None else program.flow(shown.constructor).targets()
    found = {variable for getter in getters if (variable := _loaded_variable(program, getter)) is not None}
    return found.pop() if len(found) == 1 else None


def _loaded_variable(program: Program, getter: int) -> int | None:
    bounds = program.image.bounds(getter)
    if bounds is None or bounds.end - bounds.start > _MAX_GETTER:
        return None
    flow = _followed(program, getter)
    returned = [event.value for event in flow.events if isinstance(event, Returned)] if flow else []
    value = returned[0] if len(returned) == 1 else None
    if isinstance(value, Load) and isinstance(value.base, Const) and (value.offset, value.width) == (0, 8):
        return value.base.value
    return None
