"""Strategy "symbols": symbol tables name the thread pool's functions.

Knows: the tables (.symtab, .dynsym, .gnu_debugdata, separate debug files) and what compilers append to
names. The functions named prove themselves as in all strategies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from tracer.elf import Image
from tracer.errors import ImageError
from tracer.sites.model import Located
from tracer.sites.pool_code import locate_by_code
from tracer.sites.program import Program
from tracer.sites.proof import NotProved
from tracer.sites.search import Search

NAME = "symbols"

# Of functions that were changed (arguments removed, constants filled in), renamed, or cut into parts.
_WHOLE = re.compile(r"(\.(isra|constprop|lto_priv|llvm|localalias)(\.[0-9]+)?)+")
#: util/async.c up to 6.0, then util/main-loop.c. LTO may inline all that reads it.
_MAIN_CONTEXT = "qemu_aio_context"
_PART = re.compile(r"(\.(isra|constprop|lto_priv|llvm|part)(\.[0-9]+)?)+")


class SymbolNames:
    """Names by the symbol tables of the image and of what tells more about it."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def addresses(self, name: str) -> tuple[int, ...]:
        """See program.Names: whole functions first, then the parts that hold most of one; never cold parts."""
        found: list[tuple[int, int]] = []
        for image in self._images():
            for symbol in _symbols_like(image, name):
                rank = _rank(symbol[0].removeprefix(name))
                if rank is not None and self._search.image.is_executable(symbol[1]):
                    found.append((rank, symbol[1]))
        return tuple(dict.fromkeys(address for _, address in sorted(found, key=lambda each: each[0])))

    def variable(self, name: str) -> int | None:
        """The one pointer of that name in the image's data, whatever LTO put behind the name; or None."""
        found = set()
        for image in self._images():
            try:
                symbols = image.variables_named(name)
            except ImageError:
                continue
            found |= {each.address for each in symbols if each.size == 8 and self._in_data(each.address)}
        return found.pop() if len(found) == 1 else None

    def _in_data(self, address: int) -> bool:
        segment = self._search.image.segment_at(address)
        return segment is not None and not segment.executable

    def has_tables(self) -> bool:
        """Whether any table names functions that are not exported."""
        return any(image.has_symtab for image in self._images())

    def _images(self) -> Iterator[Image]:
        yield self._search.image
        for image in (self._search.debug.mini, self._search.debug.separate):
            if image is not None:
                yield image


def locate(search: Search) -> Located:
    """All sites, proved; NotProved with the reason otherwise."""
    names = SymbolNames(search)
    if not names.has_tables():
        raise NotProved("; ".join(["there is no .symtab", *search.debug.reasons]))
    found = locate_by_code(Program(search.code, names), NAME, by_strings=False)
    return found if found.main_context is not None else replace(found, main_context=names.variable(_MAIN_CONTEXT))


def _symbols_like(image: Image, name: str) -> list[tuple[str, int]]:
    try:
        return [(symbol.name, symbol.address) for symbol in image.functions_named(name)]
    except ImageError:
        return []


def _rank(suffix: str) -> int | None:
    if not suffix:
        return 0
    if _WHOLE.fullmatch(suffix):
        return 1
    return 2 if _PART.fullmatch(suffix) else None
