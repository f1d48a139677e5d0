"""Where an executable's symbols and debug information are, when they are not in it.

Knows: .gnu_debugdata (a small ELF file, packed with xz), /usr/lib/debug by build id, and .gnu_debuglink.
A file that belongs to another build is refused. Does not know what is looked for in them, nor processes.
"""

from __future__ import annotations

import os
import stat
import struct
from functools import cached_property

from tracer.elf import Image
from tracer.errors import ImageError
from tracer.records import dataclass

_MAX_PACKED = 1 << 26
_MAX_UNPACKED = 1 << 26
_MAX_MEMORY = 1 << 28
_FOLDER = "usr/lib/debug"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where an executable lies: its path as its own root shows it, and the roots under which to look.

    A process in a chroot or container has its debug files under /proc/PID/root. `beside`: also where the
    executable itself lies, as its path tells; who made that up may have put a file there.
    """

    path: str
    roots: tuple[str, ...] = ("/",)
    beside: bool = True


class DebugFiles:
    """The files that tell more about `image`; `reasons` says why others were not used. Close it."""

    def __init__(self, image: Image, place: Place | None = None, most: int = _MAX_UNPACKED) -> None:
        """`most` is how much mini debug info is unpacked; bytes."""
        self._most = most
        self._image = image
        self._place = place or Place(_real_path(image.path))
        self._opened: list[Image] = []
        self.reasons: list[str] = []

    def close(self) -> None:
        """Close the files; the image itself is its owner's."""
        for image in self._opened:
            image.close()

    @cached_property
    def mini(self) -> Image | None:
        """The mini debug info: the symbols of functions that .dynsym does not name."""
        section = self._image.section(".gnu_debugdata")
        if section is None:
            self.reasons.append("there is no .gnu_debugdata")
            return None
        try:
            found = Image.of_bytes(
                f"{self._image.path} (.gnu_debugdata)",
                _unpacked(self._image.section_bytes(section), self._most),
                debug=True,
            )
            self._check_build(found)
        except ImageError as error:
            self.reasons.append(f".gnu_debugdata cannot be used: {error}")
            return None
        self._opened.append(found)
        return found

    @cached_property
    def separate(self) -> Image | None:
        """The separate debug file, by build id or else by debug link."""
        tried = 0
        for path, crc in self._places():
            if not _is_file(path):
                continue
            tried += 1
            try:
                return self._checked(path, crc)
            except (ImageError, OSError) as error:
                self.reasons.append(f"{path} cannot be used: {error}")
        if not tried:
            self.reasons.append(f"there is no separate debug file (build id {self._image.build_id or 'unknown'})")
        return None

    def candidates(self) -> tuple[str, ...]:
        """Where a separate debug file would be taken from, in order, whether or not there is one."""
        return tuple(path for path, _ in self._places())

    def _places(self) -> list[tuple[str, int | None]]:
        return [*self._by_build_id(), *self._by_link()]

    def _by_build_id(self) -> list[tuple[str, int | None]]:
        build_id = self._image.build_id
        if not build_id or len(build_id) < 4:
            return []
        name = f"{_FOLDER}/.build-id/{build_id[:2]}/{build_id[2:]}.debug"
        return [(os.path.join(root, name), None) for root in self._place.roots]

    def _by_link(self) -> list[tuple[str, int | None]]:
        """Next to the executable, in .debug there, and in the same folder under /usr/lib/debug; as gdb does."""
        section = self._image.section(".gnu_debuglink")
        if section is None or section.size > 4096:
            return []
        raw = self._image.section_bytes(section)
        name, end, _ = raw.partition(b"\0")
        if not end or not name or b"/" in name or len(raw) < 4:
            return []
        crc = struct.unpack("<I", raw[-4:])[0]
        folder = os.path.dirname(self._place.path).lstrip("/")
        text = os.fsdecode(name)
        beside = (folder, os.path.join(folder, ".debug")) if self._place.beside else ()
        folders = (*beside, os.path.join(_FOLDER, folder))
        return [(os.path.join(root, each, text), crc) for root in self._place.roots for each in folders]

    def _checked(self, path: str, crc: int | None) -> Image:
        found = Image.open(path, debug=True)
        try:
            self._check_build(found)
            if crc is not None and found.build_id is None and _crc_of(found) != crc:
                raise ImageError("its checksum is not the one in .gnu_debuglink")
            if crc is None and found.build_id is None:
                raise ImageError("it has no build id")
        except BaseException:
            found.close()
            raise
        self._opened.append(found)
        return found

    def _check_build(self, found: Image) -> None:
        mine, theirs = self._image.build_id, found.build_id
        if found.machine != self._image.machine:
            raise ImageError(f"it is for {found.machine}")
        if mine and theirs and mine != theirs:
            raise ImageError(f"it belongs to another build (build id {theirs}, not {mine})")


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _crc_of(image: Image) -> int:
    """Of the file that was opened, whatever its path leads to by now."""
    import zlib

    crc = 0
    for chunk in image.chunks(_CHUNK):
        crc = zlib.crc32(chunk, crc)
    return crc


def _unpacked(packed: bytes, most: int) -> bytes:
    if len(packed) > _MAX_PACKED:
        raise ImageError("it is far too large")
    import lzma

    unpacker = lzma.LZMADecompressor(memlimit=_MAX_MEMORY)
    try:
        data = unpacker.decompress(packed, most)
    except lzma.LZMAError as error:
        raise ImageError(str(error)) from error
    if not unpacker.eof:
        raise ImageError("it is cut off, or far too large")
    return data


def _real_path(path: str) -> str:
    """Where the file is; the path as it is where that cannot be told (the kernel's limit is 4 KiB)."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path
