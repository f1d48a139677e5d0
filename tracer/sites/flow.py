"""Which value is where, at every instruction of one function.

Knows: how values move through registers, stack slots and branches of one function (with its cold
part), as far as that can be said for certain. What differs between two ways to an instruction
becomes a Merged value there; whatever is not followed becomes Unknown. So two registers that hold
equal values hold the same bits. Does not know QEMU, nor any architecture.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Union

from tracer.sites.isa import (
    Add,
    AddressOf,
    Clobber,
    Compare,
    Control,
    Convention,
    Exchange,
    Imm,
    Instruction,
    Mem,
    Move,
    Operand,
    Operation,
    Reg,
)

_MAX_DEPTH = 12
_MAX_STEPS = 200_000
_MAX_VISITS = 16
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Const:
    """A number, or the address of something in the image."""

    value: int


@dataclass(frozen=True)
class Argument:
    """What the function was called with, counted from 0; -1 is the stack pointer."""

    number: int


@dataclass(frozen=True)
class Unknown:
    """What `place` (register or slot) took from the instruction at `at`; the result of a call is one."""

    at: int
    place: str | int | tuple[int, int]


@dataclass(frozen=True)
class Merged:
    """`place` where two ways meet with different values; Flow.origins() tells which."""

    at: int
    place: str | int | tuple[int, int]


@dataclass(frozen=True)
class Sum:
    """`base` plus a constant."""

    base: Value
    offset: int


@dataclass(frozen=True)
class Load:
    """The `width` bytes at `base` plus `offset` as the instruction at `at` read them."""

    base: Value
    offset: int
    width: int
    at: int


@dataclass(frozen=True)
class Part:
    """The low `width` bytes of a value that may have more."""

    base: Value
    width: int


Value = Union[Const, Argument, Unknown, Merged, Sum, Load, Part]


@dataclass(frozen=True)
class Stored:
    """`width` bytes written to `base` plus `offset`."""

    at: int
    base: Value
    offset: int
    width: int
    value: Value


@dataclass(frozen=True)
class Exchanged:
    """An atomic read-modify-write of memory."""

    at: int
    base: Value
    offset: int
    width: int


@dataclass(frozen=True)
class Compared:
    """Two values compared; a test for zero compares with Const(0)."""

    at: int
    left: Value
    right: Value


@dataclass(frozen=True)
class Called:
    """A call, or a jump out of the function (`tail`).

    `target` is the address of a direct one; `callee` the value called. `registers` are those
    before the call.
    """

    at: int
    target: int | None
    callee: Value
    arguments: tuple[Value, ...]
    registers: Mapping[str, Value]
    result: Value
    tail: bool

    @property
    def direct(self) -> bool:
        return self.target is not None and not self.tail

    def holders(self, value: Value) -> tuple[str, ...]:
        """The registers that hold `value` when the call is reached; see holders()."""
        return holders(self.registers, value)


@dataclass(frozen=True)
class Returned:
    """The function's end, and what it returns."""

    at: int
    value: Value


Event = Union[Stored, Exchanged, Compared, Called, Returned]


def holders(registers: Mapping[str, Value], value: Value) -> tuple[str, ...]:
    """The registers that hold `value`; where none does, what makes it of one: "x19-0x44".

    Compilers for A64 keep the address of a member at hand, because a store with release takes no offset.
    """
    plain = tuple(name for name, held in registers.items() if held == value)
    near = [(name, held.offset) for name, held in registers.items() if isinstance(held, Sum) and held.base == value]
    return plain or tuple(f"{name}{-offset:+#x}" for name, offset in near)


class FlowError(Exception):
    """The function cannot be followed: its code is damaged, or far too long."""


#: Registers by name, 8-byte stack slots by offset, 4-byte ones by (offset, 4). Halves of vector
#: registers and slots are there only while their value is known.
_State = dict["str | int | tuple[int, int]", Value]


class Flow:
    """One function, followed. `events` are in the order of addresses."""

    def __init__(
        self,
        entry: int,
        instructions: Iterable[Instruction],
        convention: Convention,
        returns: Callable[[int], bool] = lambda target: True,
    ) -> None:
        self.entry = entry
        self.instructions = {instruction.address: instruction for instruction in instructions}
        self._convention = convention
        self._returns = returns
        self._sources: dict[Merged, set[Value]] = {}
        self._successors = {at: tuple(self._next(step)) for at, step in self.instructions.items()}
        self._events: list[Event] = []
        if entry not in self.instructions:
            raise FlowError(f"no instruction at {entry:#x}")
        self._heads = self._block_heads()
        self._states: dict[int, _State] = {}
        self._block_of: dict[int, int] = {}
        self._follow()
        self.events = tuple(sorted(self._events, key=lambda event: event.at))

    # Questions.

    def calls_to(self, target: int) -> bool:
        return any(isinstance(event, Called) and event.target == target for event in self.events)

    def targets(self) -> tuple[int, ...]:
        """What the function calls directly."""
        found = (event.target for event in self.events if isinstance(event, Called))
        return tuple(dict.fromkeys(target for target in found if target is not None))

    def origins(self, value: Value) -> frozenset[Value]:
        """The values that meet in a Merged one, however deep; else the value itself."""
        found: set[Value] = set()
        seen: set[Value] = set()
        todo = [value]
        while todo:
            each = todo.pop()
            if each in seen:
                continue
            seen.add(each)
            if isinstance(each, Merged):
                todo.extend(self._sources.get(each, ()))
            else:
                found.add(each)
        return frozenset(found)

    def meeting(self, value: Value) -> frozenset[Value]:
        """The Merged values that meet in a value, itself among them."""
        seen: set[Value] = set()
        todo = [value]
        while todo:
            each = todo.pop()
            if isinstance(each, Merged) and each not in seen:
                seen.add(each)
                todo.extend(self._sources.get(each, ()))
        return frozenset(seen)

    def is_direct_call(self, at: int) -> bool:
        """Whether the instruction at `at` calls a fixed address."""
        step = self.instructions[at]
        return step.control is Control.CALL and step.target is not None

    def onward(self, start: int, most: int) -> tuple[int, ...]:
        """Up to `most` instructions that can follow `start`, the nearest first."""
        seen: dict[int, None] = {}
        todo = deque(self._successors[start])
        while todo and len(seen) < most:
            at = todo.popleft()
            if at not in seen:
                seen[at] = None
                todo.extend(self._successors[at])
        return tuple(seen)

    def reaches(self, start: int, goal: int, avoiding: int) -> bool:
        """Whether control can come from `start` to `goal` without passing `avoiding`."""
        return goal in self._reachable(start, avoiding)

    def always_before(self, first: int, then: int) -> bool:
        """Whether every way from the function's entry to `then` passes `first`."""
        return first == then or not self.reaches(self.entry, then, avoiding=first)

    def always_after(self, start: int, goal: int) -> bool:
        """Whether every way on from `start` passes `goal` before the function ends or `start` comes again."""
        for at in self._reachable(start, avoiding=goal, onward=True):
            if at == start or not (self._successors[at] or self._stops(at)):
                return False
        return True

    def between(self, start: int, goal: int) -> Iterator[int]:
        """The instructions that every way from `start` to `goal` passes, but not `start` itself."""
        region = self._reachable(start, avoiding=goal, onward=True) | {goal}
        for at in sorted(region):
            if at == goal or goal not in self._reachable(start, avoiding=at, onward=True):
                yield at

    def registers_at(self, at: int) -> Mapping[str, Value] | None:
        """The general registers when `at` is reached; None where nothing is known to lead there."""
        head = self._block_of.get(at)
        if head is None:
            return None
        state = dict(self._states[head])
        self._run_block(head, state, until=at)
        return {name: state[name] for name in self._convention.registers}

    def holders_at(self, at: int, value: Value) -> tuple[str, ...]:
        """The general registers that hold `value` when `at` is reached; see holders()."""
        return holders(self.registers_at(at) or {}, value)

    def comes_again(self, at: int, avoiding: int) -> bool:
        """Whether control can come back to `at` without passing `avoiding`."""
        return at in self._reachable(at, avoiding, onward=True)

    # How the answers are found.

    def _reachable(self, start: int, avoiding: int, onward: bool = False) -> set[int]:
        seen: set[int] = set()
        todo = list(self._successors[start]) if onward else [start]
        while todo:
            at = todo.pop()
            if at in seen or at == avoiding:
                continue
            seen.add(at)
            todo.extend(self._successors[at])
        return seen

    def _stops(self, at: int) -> bool:
        """Whether the process ends here (a trap, or a call of abort)."""
        step = self.instructions[at]
        return step.control in (Control.STOP, Control.CALL)

    def _next(self, step: Instruction) -> Iterator[int]:
        control = step.control
        falls = control in (Control.NEXT, Control.BRANCH) or (
            control is Control.CALL and (step.target is None or self._returns(step.target))
        )
        if falls and step.next in self.instructions:
            yield step.next
        if control in (Control.JUMP, Control.BRANCH) and step.target in self.instructions:
            assert step.target is not None
            yield step.target

    def _block_heads(self) -> frozenset[int]:
        heads = {self.entry}
        for at, step in self.instructions.items():
            if step.control in (Control.JUMP, Control.BRANCH):
                heads.update(self._successors[at])
        return frozenset(heads)

    def _follow(self) -> None:
        """Settle the state at every block's head, then run each block once more for its events."""
        states: dict[int, _State] = {self.entry: self._initial()}
        incoming: dict[int, dict[int, _State]] = {self.entry: {-1: states[self.entry]}}
        visits: Counter[int] = Counter()
        steps, todo = 0, [self.entry]
        while todo:
            at = heappop(todo)  # in the order of addresses, which is nearly that of control
            state = dict(states[at])
            visits[at] += 1
            passed, ends = self._run_block(at, state)
            steps += passed
            if steps > _MAX_STEPS:
                raise FlowError(f"the function at {self.entry:#x} is too long to follow")
            for head in ends:
                incoming.setdefault(head, {})[at] = state
                known = states.get(head)
                joined = _join(head, incoming[head], known if visits[head] > _MAX_VISITS else None)
                if joined != known:
                    states[head] = joined
                    if head not in todo:
                        heappush(todo, head)
        for at in states:
            self._run_block(at, dict(states[at]), record=True)
            self._states[at] = states[at]
            for place, value in states[at].items():
                if value == Merged(at, place):
                    self._sources[value] = {state[place] for state in incoming[at].values() if place in state}

    def _initial(self) -> _State:
        state: _State = {name: Unknown(self.entry, name) for name in self._convention.registers}
        state.update({name: Argument(number) for number, name in enumerate(self._convention.arguments)})
        state[self._convention.stack] = Argument(-1)
        return state

    def _run_block(
        self, at: int, state: _State, record: bool = False, until: int | None = None
    ) -> tuple[int, tuple[int, ...]]:
        """Run from a head to the block's end, or to `until`: how many steps, and the heads that follow."""
        steps, head = 0, at
        machine = _Machine(state, self._convention, self._events if record else None)
        while True:
            if at == until:
                return steps, ()
            step = self.instructions[at]
            steps += 1
            if record:
                self._block_of.setdefault(at, head)
            for operation in step.operations:
                machine.apply(step.address, operation)
            successors = self._successors[at]
            self._transfer(machine, step, successors)
            if len(successors) != 1 or successors[0] in self._heads:
                return steps, successors
            at = successors[0]

    def _transfer(self, machine: _Machine, step: Instruction, successors: tuple[int, ...]) -> None:
        leaves = step.control is Control.JUMP and not successors
        if step.control is Control.CALL or leaves:
            machine.call(step, tail=leaves)
        elif step.control is Control.RETURN:
            machine.returns(step)


def _join(head: int, incoming: Mapping[int, _State], sticky: _State | None) -> _State:
    """The state at a head, from those at the ends of the blocks before it.

    A value that only meets itself is not merged. `sticky`, the state so far, makes what was merged
    once stay so: then an end is certain.
    """
    first, *others = incoming.values()
    joined: _State = {}
    for place, value in first.items():
        merged = Merged(head, place)
        values = {value, *(other[place] for other in others if place in other)}
        if not all(place in other for other in others):
            continue
        values.discard(merged)
        settled = len(values) == 1 and (sticky is None or sticky.get(place) != merged)
        joined[place] = values.pop() if settled else merged
    return joined


class _Machine:
    """Registers and stack slots, and what operations do to them."""

    def __init__(self, state: _State, convention: Convention, events: list[Event] | None) -> None:
        self._state = state
        self._convention = convention
        self._events = events

    def apply(self, at: int, operation: Operation) -> None:
        if isinstance(operation, Compare):
            self._emit(Compared(at, self._value(at, operation.left), self._value(at, operation.right)))
        elif isinstance(operation, Exchange):
            base, offset = self._address(operation.target)
            self._emit(Exchanged(at, base, offset, operation.target.width))
        else:
            self._write(at, operation.target, self._result(at, operation))

    def _result(self, at: int, operation: Move | Add | AddressOf | Clobber) -> Value:
        if isinstance(operation, Move):
            return self._value(at, operation.source)
        if isinstance(operation, Add):
            return self._sum(at, operation.target, operation.source)
        if isinstance(operation, AddressOf):
            return _sum(*self._address(operation.source))
        target = operation.target
        return Unknown(at, target.name if isinstance(target, Reg) else target.offset)

    def call(self, step: Instruction, tail: bool) -> None:
        at = step.address
        convention = self._convention
        callee: Value = Unknown(at, "callee")
        if step.target is not None:
            callee = Const(step.target)
        elif step.via is not None:
            callee = self._value(at, step.via)
        result = Unknown(at, convention.result)
        if self._events is not None:
            registers = {name: self._state[name] for name in convention.registers}
            arguments = tuple(registers[name] for name in convention.arguments)
            self._emit(Called(at, step.target, callee, arguments, registers, result, tail))
        for name in convention.registers:
            if name not in convention.callee_saved and name != convention.stack:
                self._state[name] = Unknown(at, name)
        for place in [place for place in self._state if isinstance(place, str)]:
            if place not in convention.registers:
                del self._state[place]

    def returns(self, step: Instruction) -> None:
        self._emit(Returned(step.address, self._state[self._convention.result]))

    def _emit(self, event: Event) -> None:
        if self._events is not None:
            self._events.append(event)

    def _address(self, memory: Mem) -> tuple[Value, int]:
        if memory.base is None:
            return Const(memory.offset & _MASK), 0
        base = self._state[memory.base]
        if isinstance(base, Sum):
            return base.base, base.offset + memory.offset
        if isinstance(base, Const):
            return Const(base.value + memory.offset & _MASK), 0
        return base, memory.offset

    def _value(self, at: int, operand: Operand) -> Value:
        if isinstance(operand, Imm):
            return Const(operand.value & _MASK)
        if isinstance(operand, Reg):
            known = self._state.get(operand.name)
            return Unknown(at, operand.name) if known is None else _narrow(known, operand.width)
        base, offset = self._address(operand)
        if base == Argument(-1):
            slot = self._state.get(offset)
            if slot is not None:
                return _narrow(slot, operand.width)
            if operand.width == 4 and (offset, 4) in self._state:
                return self._state[(offset, 4)]
        if _depth(base) >= _MAX_DEPTH:
            return Unknown(at, "deep")
        return Load(base, offset, operand.width, at)

    def _sum(self, at: int, target: Reg | Mem, source: Operand) -> Value:
        left, right = self._value(at, target), self._value(at, source)
        if isinstance(right, Const):
            return _sum(left, _signed(right.value, target.width))
        if isinstance(left, Const):
            return _sum(right, _signed(left.value, target.width))
        return Unknown(at, "sum")

    def _write(self, at: int, target: Reg | Mem, value: Value) -> None:
        value = _narrow(value, target.width)
        if isinstance(target, Reg):
            # Writing 32 bits clears the upper half; writing fewer keeps what is above them.
            self._state[target.name] = value if target.width >= 4 else Unknown(at, target.name)
            return
        base, offset = self._address(target)
        if base == Argument(-1):
            self._store_slot(offset, target.width, value)
        self._emit(Stored(at, base, offset, target.width, value))

    def _store_slot(self, offset: int, width: int, value: Value) -> None:
        for near in range(offset - 7, offset + width):
            self._state.pop(near, None)
        for near in range(offset - 3, offset + width):
            self._state.pop((near, 4), None)
        if width == 8:
            self._state[offset] = value
        elif width == 4:
            self._state[(offset, 4)] = value


def _narrow(value: Value, width: int) -> Value:
    """The low `width` bytes of `value`; itself where it is known to have no more."""
    inner = value.base if isinstance(value, Sum) else value
    if width >= 8 or (isinstance(inner, (Load, Part)) and inner.width <= width):
        return value
    if isinstance(value, Const):
        return Const(value.value & (1 << 8 * width) - 1)
    return Part(value, width) if _depth(value) < _MAX_DEPTH else Unknown(0, "deep")


def _signed(value: int, width: int) -> int:
    half = 1 << 8 * width - 1
    return (value + half & (1 << 8 * width) - 1) - half


def _sum(base: Value, offset: int) -> Value:
    if isinstance(base, Const):
        return Const(base.value + offset & _MASK)
    if isinstance(base, Sum):
        return _sum(base.base, base.offset + offset)
    return Sum(base, offset) if offset else base


def _depth(value: Value) -> int:
    depth = 0
    while isinstance(value, (Load, Sum, Part)):
        value = value.base
        depth += 1
    return depth
