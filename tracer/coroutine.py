"""The coroutine that waits for a request: `opaque` points to it.

Knows: ThreadPoolCo (util/thread-pool.c: co, ret), CoroutineIOCompletion (block/io.c up to 3.x:
coroutine, ret) and the head of Coroutine (include/qemu/coroutine_int.h: entry, entry_arg, caller).
Requests that no coroutine waits for have something else there: nothing is believed unless the entry
function is code and the caller is none or can be read.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from tracer.errors import FaultError, TargetError
from tracer.memory import PAGE
from tracer.records import dataclass
from tracer.target import Region
from tracer.view import Frame, ProcessView, Stack

#: How far above `opaque`, a local variable of the function that waits, its return address may be; bytes.
FRAME_SIZE = 1024
#: No entry function is longer; bytes.
ENTRY_SIZE = 16 << 10
#: What calls it (util/coroutine-ucontext.c); a static function, which stripped files do not name.
TRAMPOLINE = "coroutine_trampoline"
MAX_ATTEMPTS = 24
NO_STACK = Stack()


@dataclass(frozen=True)
class Waiter:
    """A Coroutine and its stack, which is empty where it did not prove itself."""

    coroutine: int
    entry: int
    entry_arg: int
    caller: int
    stack: Stack = NO_STACK


def code_regions(view: ProcessView) -> list[Region]:
    """Where code is; empty where that is not known."""
    try:
        return [region for region in view.regions() if "x" in region.permissions]
    except TargetError:
        return []


def read_waiter(view: ProcessView, code: list[Region], opaque: int) -> Waiter | None:
    """The coroutine that waits for the request with this `opaque`, or None."""
    try:
        (coroutine,) = struct.unpack("<Q", view.memory.read(opaque, 8))
        if not coroutine or coroutine % 8:
            return None
        entry, entry_arg, caller = struct.unpack("<QQQ", view.memory.read(coroutine, 24))
        if caller:
            view.memory.read(caller, 24)
    except FaultError:
        return None
    if caller % 8 or not _is_code(code, entry):
        return None
    return Waiter(coroutine, entry, entry_arg, caller, _stack(view, code, opaque, entry))


def _is_code(code: list[Region], address: int) -> bool:
    return any(region.start <= address < region.end for region in code)


def _stack(view: ProcessView, code: list[Region], opaque: int, entry: int) -> Stack:
    """The coroutine's stack, from the frame that holds `opaque` on.

    Its registers are not at hand (sigsetjmp mangles them), but above a local variable stands the return
    address of its function. What only looks like one does not lead to the coroutine's entry function.
    """
    attempts = 0
    for index, word in enumerate(_words_from(view, opaque)):
        if attempts < MAX_ATTEMPTS and _is_code(code, view.machine.code_address(word)):
            attempts += 1
            frames = _down_to_entry(view.stack_above(opaque + 8 * index).frames, code, entry)
            if frames:
                return Stack(frames, True)
    return NO_STACK


def _words_from(view: ProcessView, address: int) -> tuple[int, ...]:
    """FRAME_SIZE bytes as words; fewer where the stack ends before."""
    for size in (FRAME_SIZE, min(FRAME_SIZE, PAGE - address % PAGE)):
        try:
            return struct.unpack(f"<{size // 8}Q", view.memory.read(address, size // 8 * 8))
        except FaultError:
            continue
    return ()


def _down_to_entry(frames: tuple[Frame, ...], code: list[Region], entry: int) -> tuple[Frame, ...]:
    """The frames down to the entry function and its caller; none where they do not lead there."""
    for at in range(len(frames) - 2, -1, -1):
        offset = frames[at].address - entry
        if 0 < offset < ENTRY_SIZE and _is_code(code, frames[at + 1].address):
            own = frames[at] if frames[at].function else replace(frames[at], function="entry", offset=offset)
            caller = frames[at + 1]
            return (*frames[:at], own, caller if caller.function else replace(caller, function=TRAMPOLINE, offset=None))
    return ()
