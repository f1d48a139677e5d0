"""Strategy "dwarf": debug information tells the layout, and names the functions.

Knows: DWARF's compilation units, structures and functions, by pyelftools. Only the units of
util/thread-pool.c and util/async.c are read. The sites come from the code of the functions, whose
offsets must be those of the debug information.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from io import BytesIO
from itertools import islice
from typing import Any

from tracer.elf import Image
from tracer.layout import BottomHalfLayout, ElementLayout, Layout, PoolLayout
from tracer.records import dataclass
from tracer.sites.model import Located
from tracer.sites.pool_code import locate_by_code
from tracer.sites.program import AnyNames, DynamicNames, Program
from tracer.sites.proof import NotProved, agreed
from tracer.sites.search import Search

NAME = "dwarf"
_FILES = ("thread-pool.c", "async.c")
_MAX_INFO = 1 << 29  # bytes of .debug_info, unpacked
_MAX_ENTRIES = 200_000
_MAX_UNITS = 1 << 14

# Where the members are, by the names they had through the years (util/thread-pool.c, util/async.c,
# include/block/aio.h); a pool and its element got the suffix Aio in v10.0.
_ELEMENTS = ("ThreadPoolElementAio", "ThreadPoolElement")
_POOLS = ("ThreadPoolAio", "ThreadPool")
_ELEMENT_MEMBERS = {
    "callback": ("common", "cb"),
    "opaque": ("common", "opaque"),
    "pool": ("pool",),
    "func": ("func",),
    "arg": ("arg",),
    "state": ("state",),
    "ret": ("ret",),
    "next": ("all", "le_next"),
    "prev": ("all", "le_prev"),
}
_POOL_MEMBERS = {
    "context": ("ctx",),
    "completion_bh": ("completion_bh",),
    "head": ("head", "lh_first"),
    "cur_threads": ("cur_threads",),
    "idle_threads": ("idle_threads",),
    "new_threads": ("new_threads",),
    "pending_threads": ("pending_threads",),
    "max_threads": ("max_threads",),
}


@dataclass(frozen=True)
class Information:
    """What the debug information tells: a layout, and where functions begin."""

    layout: Layout
    functions: dict[str, int]

    def addresses(self, name: str) -> tuple[int, ...]:
        """See program.Names."""
        return (self.functions[name],) if name in self.functions else ()


def locate(search: Search) -> Located:
    """All sites, proved, with the layout of the debug information; NotProved with the reason otherwise."""
    information = read_information(search)
    names = AnyNames(information, DynamicNames(search.image))
    found = locate_by_code(Program(search.code, names), NAME, by_strings=True)
    for structure in ("element", "pool", "bottom_half"):
        told, seen = (asdict(getattr(layout, structure)) for layout in (information.layout, found.layout))
        for member, offset in told.items():
            if None not in (offset, seen[member]):
                agreed(f"{structure}.{member}", offset, seen[member])
    return replace(found, layout=information.layout)


def read_information(search: Search) -> Information:
    """The debug information of the image, or of its separate debug file."""
    image = search.image
    if image.section(".debug_info") is None:
        separate = search.debug.separate
        if separate is None or separate.section(".debug_info") is None:
            raise NotProved("; ".join(["there is no .debug_info", *search.debug.reasons[-1:]]))
        image = separate
    try:
        return _read(image)
    except NotProved:
        raise
    except Exception as error:  # pyelftools raises whatever a damaged file makes it stumble over
        raise NotProved(f"the debug information cannot be read: {type(error).__name__} {error}") from error


def _read(image: Image) -> Information:
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise NotProved(f"the Python package pyelftools is not usable: {error}") from error
    section = image.section(".debug_info")
    if section is None or section.size > _MAX_INFO:
        raise NotProved("the debug information is too large")
    file = ELFFile(BytesIO(image.whole()))
    sizes = [part.data_size for part in file.iter_sections() if part.name.startswith((".debug_", ".zdebug_"))]
    if sum(sizes) > _MAX_INFO:  # unpacked, and of sections that are not in the file at all
        raise NotProved("the debug information is too large")
    dwarf = file.get_dwarf_info(relocate_dwarf_sections=False)
    entries = [entry for unit in _units(dwarf) for entry in _entries(unit)]
    structures = {_name(entry): entry for entry in entries if _is_structure(entry)}
    functions = {
        _name(entry): entry.attributes["DW_AT_low_pc"].value
        for entry in entries
        if entry.tag == "DW_TAG_subprogram" and "DW_AT_low_pc" in entry.attributes
    }
    return Information(_layout(structures), functions)


def _units(dwarf: Any) -> Iterator[Any]:
    """The units of the two files: where their names are referred to, or else by reading all units' names."""
    found = list(_named(_likely_units(dwarf)))
    if len(found) < len(_FILES):
        found = list(_named(islice(dwarf.iter_CUs(), _MAX_UNITS)))
    if not found:
        raise NotProved("the debug information has no unit thread-pool.c")
    return iter(found)


def _named(units: Iterable[Any]) -> Iterator[Any]:
    return (unit for unit in units if _name(unit.get_top_DIE()).rpartition("/")[2] in _FILES)


def _likely_units(dwarf: Any) -> Iterator[Any]:
    """The units that hold a reference to one of the names; reading every unit would take seconds."""
    info = dwarf.debug_info_sec.stream.getvalue()
    needles = {file.encode() + b"\0" for file in _FILES}
    for section in (dwarf.debug_str_sec, dwarf.debug_line_str_sec):
        if section is not None:
            needles.update(_references(section.stream.getvalue()))
    starts = list(_unit_starts(info))
    likely = {starts[bisect_right(starts, at) - 1] for needle in needles for at in _finds(info, needle) if starts}
    return (dwarf.get_CU_at(start) for start in sorted(likely))


def _references(strings: bytes) -> Iterator[bytes]:
    """What a reference to one of the names looks like: its offset among the strings, in four bytes."""
    for file in _FILES:
        for at in _finds(strings, b"/" + file.encode() + b"\0"):
            yield (strings.rfind(b"\0", 0, at) + 1).to_bytes(4, "little")


def _finds(data: bytes, needle: bytes) -> Iterator[int]:
    at = data.find(needle)
    for _ in range(_MAX_UNITS):
        if at < 0:
            return
        yield at
        at = data.find(needle, at + 1)


def _unit_starts(info: bytes) -> Iterator[int]:
    at = 0
    while at + 4 <= len(info):
        (length,) = struct.unpack_from("<I", info, at)
        if length >= 0xFFFFFFF0 or not length:
            return
        yield at
        at += 4 + length


def _entries(unit: Any) -> Iterator[Any]:
    """The unit's outermost entries; what is inside a function or a structure is left unread."""
    for number, entry in enumerate(unit.get_top_DIE().iter_children()):
        if number > _MAX_ENTRIES:
            raise NotProved("the debug information is too large")
        yield entry


def _is_structure(entry: Any) -> bool:
    return entry.tag == "DW_TAG_structure_type" and "DW_AT_declaration" not in entry.attributes


def _name(entry: Any) -> str:
    attribute = entry.attributes.get("DW_AT_name")
    return attribute.value.decode("utf-8", "replace") if attribute and isinstance(attribute.value, bytes) else ""


def _layout(structures: dict[str, Any]) -> Layout:
    element = next((structures[name] for name in _ELEMENTS if name in structures), None)
    pool = next((structures[name] for name in _POOLS if name in structures), None)
    half = structures.get("QEMUBH")
    if element is None or pool is None or half is None:
        raise NotProved("the debug information has no ThreadPoolElement, ThreadPool or QEMUBH")
    offsets = {member: _offset(element, path) for member, path in _ELEMENT_MEMBERS.items()}
    missing = [member for member, offset in offsets.items() if offset is None]
    if missing:
        raise NotProved(f"the debug information's ThreadPoolElement has no {missing[0]}")
    pools = {member: _offset(pool, path) for member, path in _POOL_MEMBERS.items()}
    return Layout(ElementLayout(**offsets), PoolLayout(**pools), _bottom_half(half), NAME)  # type: ignore[arg-type]


def _bottom_half(half: Any) -> BottomHalfLayout:
    flags, scheduled = _offset(half, ("flags",)), _offset(half, ("scheduled",))
    context, callback, opaque = (_offset(half, (name,)) for name in ("ctx", "cb", "opaque"))
    if context is None or callback is None or opaque is None or (flags is None and scheduled is None):
        raise NotProved("the debug information's QEMUBH has no ctx, cb, opaque or flags")
    mark, width = (flags, 4) if flags is not None else (scheduled, 1)
    assert mark is not None
    return BottomHalfLayout(context, callback, opaque, mark, width, _offset(half, ("name",)))


def _offset(structure: Any, path: tuple[str, ...]) -> int | None:
    """Where a member, perhaps one of a member, is in a structure; None if there is none of these names."""
    for member in structure.iter_children():
        if member.tag != "DW_TAG_member" or _name(member) != path[0]:
            continue
        attribute = member.attributes.get("DW_AT_data_member_location")
        start = attribute.value if attribute and isinstance(attribute.value, int) else 0
        if len(path) == 1:
            return int(start)
        inner = _offset(_plain(member.get_DIE_from_attribute("DW_AT_type")), path[1:])
        return None if inner is None else int(start) + inner
    return None


def _plain(entry: Any) -> Any:
    """The type behind typedefs and qualifiers."""
    for _ in range(16):
        if entry.tag not in ("DW_TAG_typedef", "DW_TAG_const_type", "DW_TAG_volatile_type"):
            break
        entry = entry.get_DIE_from_attribute("DW_AT_type")
    return entry
