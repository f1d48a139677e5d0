"""Text of others as it may be shown or passed on. Whatever comes from a target, a file or a monitor goes through here.

Knows: what does something to a terminal or a log (control characters of C0 and C1, DEL, escape sequences, marks
that turn the direction of writing, ends of lines of any kind), and what is no Unicode: bytes that are no UTF-8,
which Python keeps as lone surrogates. Does not know where text comes from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def printable(text: str) -> str:
    """One line that does nothing but stand there: all else is written with backslashes, as in \\x1b and \\n."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def printable_lines(text: str) -> str:
    """As printable(), for text whose ends of lines are our own."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def exact(value: Any) -> Any:
    """A value for JSON that every reader takes: bytes that are no UTF-8 with backslashes, None for what is no number.

    All else stays as it is; JSON has its own way to write control characters.
    """
    if isinstance(value, str):
        return "".join(_escaped(letter) if "\ud800" <= letter <= "\udfff" else letter for letter in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {exact(name): exact(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(member) for member in value]
    return value


def read_json(text: str | bytes) -> Any:
    """JSON of others: as json.loads(), but a number that is none, or longer than any of ours, is a ValueError, too.

    Raises ValueError or RecursionError.
    """
    return json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)


#: Digits of 2 to the power of 64, with a sign.
_MOST_DIGITS = 21
_LONGEST = 400


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if len(text) > _LONGEST or not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return value


def _escaped(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # how Python keeps bytes that are no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()
