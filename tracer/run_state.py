"""Whether QEMU's guest runs: QEMU's own run state, by name.

Knows: that runstate_is_running() (softmmu/runstate.c, vl.c before 5.1) does nothing but compare the variable with
RUN_STATE_RUNNING, and that RunState_lookup (made from qapi/run-state.json) holds the states' names in their order.
Both are exported where QEMU has modules; where they are not, or on other machines than x86-64, nothing is known.
"""

from __future__ import annotations

import re
import struct

from tracer.errors import AioTraceError, FaultError
from tracer.memory import MemoryReader, read_string, read_u64
from tracer.records import dataclass
from tracer.view import ProcessView

#: (endbr64) (xor %eax,%eax) cmpl $running,state(%rip); sete %al
_BODY = re.compile(rb"(?:\xf3\x0f\x1e\xfa)?(?:\x31\xc0)?\x83\x3d(.{4})(.)\x0f\x94\xc0", re.S)
_LONGEST_BODY = 16
_MOST_STATES = 64
_LONGEST_NAME = 32


@dataclass(frozen=True)
class RunState:
    """QEMU's word for what the guest does ("paused", "prelaunch", …), and whether it is that for a running one."""

    name: str
    running: bool


def read_run_state(view: ProcessView) -> RunState | None:
    """The run state now, or None where it does not show (a storage daemon has none)."""
    try:
        with view.open_image() as image:
            asks, names = image.symbol("runstate_is_running"), image.symbol("RunState_lookup")
            if asks is None or names is None or image.machine != "x86_64":
                return None
            body = _BODY.match(image.read(asks.address, _LONGEST_BODY))
            bias = view.entry_address() - image.entry
    except AioTraceError:
        return None
    if body is None:
        return None
    (away,) = struct.unpack("<i", body[1])
    (running,) = body[2]
    # Relative to the end of the compare, which is one byte behind its offset.
    variable = asks.address + body.end(2) + away + bias
    try:
        (state,) = struct.unpack("<I", view.memory.read(variable, 4))
        name = _name(view.memory, names.address + bias, state)
    except FaultError:
        return None
    return None if name is None else RunState(name, state == running)


def _name(memory: MemoryReader, lookup: int, state: int) -> str | None:
    """The name in the QEnumLookup at `lookup`: its first member is the array of names."""
    if state >= _MOST_STATES:
        return None
    name = read_string(memory, read_u64(memory, read_u64(memory, lookup) + 8 * state), _LONGEST_NAME)
    return name if name.replace("-", "").isalpha() and name.isascii() else None
