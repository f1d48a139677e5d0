"""One image's functions, by name and by flow; what the strategies search with.

Knows: which names a build gives to which addresses, where functions end, which calls never return.
Does not know what the functions are for.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Protocol

from tracer.elf import Bounds, Image
from tracer.errors import ImageError
from tracer.sites.flow import Const, Flow, FlowError
from tracer.sites.isa import Add, Control, Decoder, Imm, Instruction, Mem

_MAX_FUNCTION = 1 << 16
_MAX_PARTS = 8
_MAX_NO_RETURN = 256  # functions that print and abort are short
_NO_RETURN = frozenset(
    (
        "__assert",
        "__assert_fail",
        "__stack_chk_fail",
        "_exit",
        "abort",
        "exit",
        "g_abort",
        "g_assertion_message",
        "g_assertion_message_cmpnum",
        "g_assertion_message_expr",
    )
)


class Names(Protocol):
    """Where a strategy takes function addresses from."""

    def addresses(self, name: str) -> tuple[int, ...]:
        """The ELF addresses of the functions that may be the one of that name, the likeliest first."""
        ...


class DynamicNames:
    """The names that the image exports, in .dynsym."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def addresses(self, name: str) -> tuple[int, ...]:
        """See Names."""
        symbol = self._image.exported(name)
        return (symbol.address,) if symbol and self._image.is_executable(symbol.address) else ()


class AnyNames:
    """Several sources of names together."""

    def __init__(self, *sources: Names) -> None:
        self._sources = sources

    def addresses(self, name: str) -> tuple[int, ...]:
        """See Names."""
        return tuple(dict.fromkeys(found for source in self._sources for found in source.addresses(name)))


class Code:
    """An image's functions, followed once for all strategies."""

    def __init__(self, image: Image, decoder: Decoder) -> None:
        self.image = image
        self.decoder = decoder
        self.convention = decoder.convention
        self._flows: dict[int, Flow] = {}
        self._returning: dict[int, bool] = {}
        self._users: dict[frozenset[int], frozenset[int]] = {}

    def flow(self, address: int) -> Flow:
        """The function at `address`, followed; FlowError if it cannot be."""
        known = self._flows.get(address)
        if known is None:
            try:
                body = self._body(address)
            except ImageError as error:
                raise FlowError(error.message) from error
            known = Flow(address, body, self.convention, self._returns)
            self._flows[address] = known
        return known

    def _body(self, entry: int) -> list[Instruction]:
        """The function's instructions and those of its parts elsewhere (foo.cold)."""
        body: list[Instruction] = []
        parts: set[int] = set()
        todo = [entry]
        while todo and len(parts) < _MAX_PARTS:
            bounds = self.image.bounds(todo.pop())
            if bounds is None:
                raise FlowError(f"where the function at {entry:#x} ends is not known")
            if bounds.start in parts:
                continue
            if not parts and bounds.start != entry:
                raise FlowError(f"{entry:#x} is inside a function, not its start")
            parts.add(bounds.start)
            size = min(bounds.end - bounds.start, _MAX_FUNCTION)
            part = self.decoder.decode(self.image.read(bounds.start, size), bounds.start)
            body.extend(part)
            todo.extend(_leaving(part, bounds.start, bounds.end))
        return body

    def _returns(self, target: int) -> bool:
        known = self._returning.get(target)
        if known is None:
            name = self.image.plt_name(target)
            known = self._has_return(target) if name is None else name not in _NO_RETURN
            self._returning[target] = known
        return known

    def _has_return(self, target: int) -> bool:
        """Whether a function of the image may come back; one such as error_exit() shows that it does not."""
        bounds = self.image.bounds(target)
        if bounds is None or bounds.start != target or bounds.end - target > _MAX_NO_RETURN:
            return True
        for step in self.decoder.decode(self.image.read(target, bounds.end - target), target):
            leaves = step.control in (Control.JUMP, Control.BRANCH) and (
                step.target is None or step.target not in bounds
            )
            if step.control is Control.RETURN or leaves:
                return True
        return False

    def starts_function(self, address: int) -> bool:
        """Whether a function begins there, by the unwind table or a symbol.

        That it lies in an executable segment is not enough: those of aarch64 often begin at 0 and hold strings.
        """
        bounds = self.image.bounds(address)
        return bounds is not None and bounds.start == address and self.image.is_executable(address)

    # Who uses what.

    def users_of(self, targets: frozenset[int]) -> frozenset[int]:
        """The starts of the functions (or of their parts elsewhere) whose code takes one of these addresses."""
        if not targets:
            return frozenset()
        if targets not in self._users:
            self._users[targets] = self._find_users(targets)
        return self._users[targets]

    def _find_users(self, targets: frozenset[int]) -> frozenset[int]:
        found = set()
        for start, code in self._texts:
            for at, target in self.decoder.references(code, start, targets):
                bounds = self.image.bounds(at)
                if bounds is not None and bounds.start not in found and self._takes(bounds, at, target):
                    found.add(bounds.start)
        return frozenset(found)

    def callers(self, target: int, near: int) -> frozenset[int]:
        """The starts of the functions that call `target` and are at most `near` bytes from it."""
        found = set()
        for start, code in self._texts:
            low, high = max(start, target - near), min(start + len(code), target + near)
            if low >= high:
                continue
            for at in self.decoder.calls_to(code[low - start : high - start], low, target):
                bounds = self.image.bounds(at)
                if bounds is not None:
                    found.add(bounds.start)
        return frozenset(found)

    def _takes(self, bounds: Bounds, at: int, target: int) -> bool:
        """Whether the function's instructions, not only its bytes, take the address.

        A64 makes it of two parts, so there the flow is asked what the instruction at `at` has left.
        """
        size = min(bounds.end - bounds.start, _MAX_FUNCTION)
        taken = (Imm(target), Mem(None, target, 0))
        for step in self.decoder.decode(self.image.read(bounds.start, size), bounds.start):
            for operation in step.operations:
                source = getattr(operation, "source", None)
                if isinstance(source, Mem):
                    source = Mem(source.base, source.offset, 0)
                if source in taken:
                    return True
            if step.address == at and self._makes(bounds, step, target):
                return True
        return False

    def _makes(self, bounds: Bounds, step: Instruction, target: int) -> bool:
        if not any(isinstance(operation, Add) for operation in step.operations):
            return False
        try:
            left = self.flow(bounds.start).registers_at(step.next)
        except FlowError:
            return False
        return left is not None and Const(target) in left.values()

    @cached_property
    def _texts(self) -> tuple[tuple[int, bytes], ...]:
        """The code: each part's address and bytes."""
        section = self.image.section(".text")
        if section is not None and self.image.is_executable(section.address):
            return ((section.address, self.image.section_bytes(section)),)
        image = self.image
        return tuple((s.vaddr, image.read(s.vaddr, s.filesz)) for s in image.segments if s.executable)


class Program:
    """An image's code with one source of names."""

    def __init__(self, code: Code, names: Names) -> None:
        self.code = code
        self.image = code.image
        self.convention = code.convention
        self.flow = code.flow
        self._names = names

    def address(self, *names: str) -> int | None:
        """The address of the first of these names that the build has."""
        return next((address for name in names for address in self._names.addresses(name)), None)

    def addresses(self, *names: str) -> tuple[int, ...]:
        """What may be the functions of these names, the likeliest first."""
        return tuple(dict.fromkeys(address for name in names for address in self._names.addresses(name)))


def _leaving(part: Iterable[Instruction], start: int, end: int) -> list[int]:
    """Where conditional jumps leave a part: to another part. (Compilers make no tail calls of those.)"""
    return [
        step.target
        for step in part
        if step.control is Control.BRANCH and step.target is not None and not start <= step.target < end
    ]
