"""What a proof needs: agreement, presence, and a reason where one is missing."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class NotProved(Exception):
    """Something was not found, or what was found contradicts itself; the reason is one clause."""


def require(value: T | None, reason: str) -> T:
    """`value`, which must be there."""
    if value is None:
        raise NotProved(reason)
    return value


def agreed(what: str, *values: T) -> T:
    """The one value that all witnesses tell; NotProved if there is none, or they differ."""
    if not values:
        raise NotProved(f"{what} was not found")
    if any(value != values[0] for value in values):
        told = ", ".join(sorted({str(value) for value in values}))
        raise NotProved(f"{what} is told differently: {told}")
    return values[0]
