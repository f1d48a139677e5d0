"""One image's functions, by name and by flow; what the strategies search with.

Knows: which names a build gives to which addresses, where functions end, which calls never return.
Does not know what the functions are for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from tracer.elf import Image
from tracer.errors import ImageError
from tracer.sites.flow import Flow, FlowError
from tracer.sites.isa import Control, Decoder, Instruction

_MAX_FUNCTION = 1 << 16
_MAX_PARTS = 8
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

    def address(self, name: str) -> int | None:
        """The ELF address of the function of that name, or None."""
        ...


class DynamicNames:
    """The names that the image exports (or has in .symtab)."""

    def __init__(self, image: Image) -> None:
        self._image = image

    def address(self, name: str) -> int | None:
        symbol = self._image.symbol(name)
        return symbol.address if symbol and self._image.is_executable(symbol.address) else None


class Program:
    """An image with its names and its decoder; functions are followed once."""

    def __init__(self, image: Image, names: Names, decoder: Decoder) -> None:
        self.image = image
        self.convention = decoder.convention
        self._names = names
        self._decoder = decoder
        self._flows: dict[int, Flow] = {}
        self._returning: dict[int, bool] = {}

    def address(self, *names: str) -> int | None:
        """The address of the first of these names that the build has."""
        found = (self._names.address(name) for name in names)
        return next((address for address in found if address is not None), None)

    def addresses(self, *names: str) -> frozenset[int]:
        """The addresses of all of these names that the build has."""
        found = (self._names.address(name) for name in names)
        return frozenset(address for address in found if address is not None)

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
            part = self._decoder.decode(self.image.read(bounds.start, size), bounds.start)
            body.extend(part)
            todo.extend(_leaving(part, bounds.start, bounds.end))
        return body

    def _returns(self, target: int) -> bool:
        known = self._returning.get(target)
        if known is None:
            known = self.image.plt_name(target) not in _NO_RETURN
            self._returning[target] = known
        return known


def _leaving(part: Iterable[Instruction], start: int, end: int) -> list[int]:
    """Where conditional jumps leave a part: to another part. (Compilers make no tail calls of those.)"""
    return [
        step.target
        for step in part
        if step.control is Control.BRANCH and step.target is not None and not start <= step.target < end
    ]
