"""Sites and layout from the code of the thread pool's functions.

Knows: how the functions of util/thread-pool.c lead to one another, and that what they show must agree.
Does not know where the names come from: any strategy that can name some functions can use it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tracer.layout import ElementLayout, Layout, PoolLayout
from tracer.sites.bottom_half import bottom_half_layout, schedules_with_barrier
from tracer.sites.flow import Const, FlowError, Load, Returned
from tracer.sites.model import CALLBACK, DONE, SUBMIT, Attempt, Located, Site
from tracer.sites.program import Program
from tracer.sites.proof import NotProved, agreed, require
from tracer.sites.thread_pool import (
    BottomHalves,
    Callback,
    Done,
    Submit,
    read_allocator,
    read_completion,
    read_constructor,
    read_spawn,
    read_submit,
    read_worker,
)

# The pool's constructor is thread_pool_new_aio since QEMU v10.0, whose thread_pool_new makes another kind.
_CONSTRUCTORS = ("thread_pool_new_aio", "thread_pool_new", "aio_get_thread_pool")
_CREATORS = ("aio_bh_new_full", "aio_bh_new")
_UNLOCKS = ("qemu_mutex_unlock_impl", "qemu_mutex_unlock")
_CALLERS = ("thread_pool_submit_co", "thread_pool_submit")
_ALSO_NAMED = ("aio_poll", "aio_bh_poll", "aio_notify", "bdrv_drain_all_begin", "bdrv_drain_all")


@dataclass(frozen=True)
class _Shown:
    """What the functions show, together."""

    submitter: int
    halves: BottomHalves
    worker: int
    done: Done
    callback: Callback
    submit: Submit
    allocator: tuple[int, int]  # offsets of cb and opaque


def locate_by_code(program: Program, strategy: str) -> Located:
    """All sites and the layout, proved; NotProved with the reason otherwise."""
    try:
        shown = _read(program)
        sites = (
            _site(program, SUBMIT, shown.submitter, shown.submit, strategy),
            _site(program, DONE, shown.worker, shown.done, strategy),
            _site(program, CALLBACK, shown.halves.completion, shown.callback, strategy),
        )
        return Located(
            sites={site.name: site for site in sites},
            layout=_layout(program, shown, strategy),
            functions=_functions(program, shown),
            attempts=(Attempt(strategy, "found and proved", ok=True),),
            main_context=_main_context(program),
            barrier_fixed=schedules_with_barrier(program),
        )
    except FlowError as error:
        raise NotProved(str(error)) from error


def _read(program: Program) -> _Shown:
    submit = require(program.address("thread_pool_submit_aio"), "thread_pool_submit_aio is not known")
    halves, worker, done, callback = _completion_and_worker(program)
    allocate = require(program.address("qemu_aio_get"), "qemu_aio_get is not known")
    _only_submitter(program, allocate)
    submitted = read_submit(program.flow(submit), frozenset((allocate,)), program.addresses(*_UNLOCKS))
    return _Shown(submit, halves, worker, done, callback, submitted, read_allocator(program.flow(allocate)))


def _only_submitter(program: Program, allocate: int) -> None:
    """Builds may hold thread_pool_submit_aio() once more inside its callers; one site would miss that."""
    for name in _CALLERS:
        address = program.address(name)
        if address is not None and program.flow(address).calls_to(allocate):
            raise NotProved(f"{name} submits requests itself")


def _completion_and_worker(program: Program) -> tuple[BottomHalves, int, Done, Callback]:
    """Follow the pool's constructor to its bottom halves, whichever way round proves itself."""
    reasons = []
    for halves in _constructed(program):
        try:
            callback = read_completion(program.flow(halves.completion), program.addresses("qemu_bh_schedule"))
            threads = program.addresses("qemu_thread_create")
            worker = read_spawn(program.flow(halves.spawn), threads, program.image.is_executable)
            return halves, worker, read_worker(program.flow(worker)), callback
        except (NotProved, FlowError) as error:
            reasons.append(str(error))
    raise NotProved(reasons[0])


def _constructed(program: Program) -> tuple[BottomHalves, ...]:
    reason = "none of " + ", ".join(_CONSTRUCTORS) + " is known"
    for name in _CONSTRUCTORS:
        address = program.address(name)
        if address is None:
            continue
        try:
            creators = program.addresses(*_CREATORS)
            return read_constructor(program.flow(address), creators, program.image.is_executable)
        except NotProved as error:
            reason = f"{name}: {error}"
    raise NotProved(reason)


def _layout(program: Program, shown: _Shown, strategy: str) -> Layout:
    done, callback, submit = shown.done, shown.callback, shown.submit
    if not {done.func, done.arg, submit.pool} <= submit.members:
        raise NotProved("thread_pool_submit_aio does not fill in the func and arg that worker_thread uses")
    element = ElementLayout(
        callback=agreed("BlockAIOCB.cb", callback.callback, shown.allocator[0]),
        opaque=agreed("BlockAIOCB.opaque", callback.opaque, shown.allocator[1]),
        pool=submit.pool,
        func=done.func,
        arg=done.arg,
        state=agreed("ThreadPoolElement.state", done.state, callback.state, submit.state),
        ret=agreed("ThreadPoolElement.ret", done.ret, callback.ret),
        next=agreed("ThreadPoolElement.all.le_next", callback.next, submit.next),
        prev=submit.prev,
    )
    pool = PoolLayout(
        context=shown.halves.context,
        completion_bh=shown.halves.completion_bh,
        head=agreed("ThreadPool.head", callback.head, submit.head),
        **asdict(submit.counters),
    )
    return Layout(element, pool, bottom_half_layout(program), strategy)


def _site(program: Program, name: str, function: int, found: Done | Callback | Submit, strategy: str) -> Site:
    instruction = program.flow(function).instructions[found.site.at]
    holders = found.site.holders(found.element)
    register = min(holders, key=lambda holder: (holder not in program.convention.callee_saved, holder))
    return Site(name, found.site.at, register, instruction.text, strategy, instruction.cheap)


def _functions(program: Program, shown: _Shown) -> dict[str, int]:
    functions = {
        "thread_pool_completion_bh": shown.halves.completion,
        "spawn_thread_bh_fn": shown.halves.spawn,
        "worker_thread": shown.worker,
    }
    for name in ("thread_pool_submit_aio", "qemu_bh_schedule", *_ALSO_NAMED):
        address = program.address(name)
        if address is not None:
            functions[name] = address
    return functions


def _main_context(program: Program) -> int | None:
    """qemu_get_aio_context() of util/main-loop.c is one load of qemu_aio_context."""
    address = program.address("qemu_get_aio_context")
    if address is None:
        return None
    returned = [event.value for event in program.flow(address).events if isinstance(event, Returned)]
    match returned:
        case [Load(Const(variable), 0, 8, _)]:
            return variable
        case _:
            return None
