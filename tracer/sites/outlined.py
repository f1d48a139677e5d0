"""Atomic accesses that the compiler made calls of.

Knows: that GCC for aarch64 calls small helpers such as __aarch64_ldset4_acq_rel (libgcc, hidden, without a
name in a stripped file), which choose between FEAT_LSE and a loop when they run. They are told by what they
do, not by name. Does not know QEMU.
"""

from __future__ import annotations

from collections.abc import Iterator

from tracer.sites.flow import Argument, Called, Exchanged, Flow, FlowError, Sum, Value
from tracer.sites.program import Program

_MAX_HELPER = 128  # bytes; those of libgcc have 40 to 64


def exchanges(program: Program, flow: Flow) -> Iterator[Exchanged]:
    """The function's atomic read-modify-writes, with those of the helpers that it calls."""
    for event in flow.events:
        if isinstance(event, Exchanged):
            yield event
        elif isinstance(event, Called) and event.direct:
            yield from _in_helper(program, event)


def _in_helper(program: Program, call: Called) -> Iterator[Exchanged]:
    """What the called function exchanges, if it is small, calls nothing, and does so to one argument."""
    assert call.target is not None
    bounds = program.image.bounds(call.target)
    if bounds is None or bounds.start != call.target or bounds.end - bounds.start > _MAX_HELPER:
        return
    try:
        events = program.flow(call.target).events
    except FlowError:
        return
    if any(isinstance(event, Called) for event in events):
        return
    # Both ways of the helper do the same: once it is.
    done = {(each.base, each.offset, each.width) for each in events if isinstance(each, Exchanged)}
    for base, offset, width in done if len(done) == 1 else ():
        if isinstance(base, Argument) and base.number in range(len(call.arguments)):
            object_, member = _split(call.arguments[base.number])
            yield Exchanged(call.at, object_, member + offset, width)


def _split(address: Value) -> tuple[Value, int]:
    return (address.base, address.offset) if isinstance(address, Sum) else (address, 0)
