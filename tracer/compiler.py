"""The probe programs, compiled by bpf/compile.py in a process of its own.

Knows: which Pythons may see bcc and how to ask them, and what of a compilation is worth keeping: the maps' shapes
and the instructions. The child is the Python that sees bcc, which is the distribution's own, whichever runs us;
LLVM takes tens of megabytes, which end with it. Does not know QEMU, or what is done with the programs.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import bpf.compile
from bpf.compile import BCC_MISSING
from tracer import cgroup
from tracer.errors import add_note
from tracer.text import read_json

TIMEOUT_S = 120.0
#: What LLVM and we take in a control group, about.
MEMORY_MB = 80
#: Where the Python of the distribution is: on RHEL 8, bcc is for the second.
SYSTEM_PYTHONS = ("/usr/bin/python3", "/usr/libexec/platform-python")
#: And its others, where the first has been made another than it came with.
SYSTEM_FOLDER = "/usr/bin"
SEARCHED = "/usr/bin:/bin:/usr/sbin:/sbin"

_LOAD_64, _MAP_FD = 0x18, 1  # BPF_LD | BPF_IMM | BPF_DW, BPF_PSEUDO_MAP_FD


class CompilerFailed(Exception):
    """bcc's complaint in one line; its whole output as a note. `lasting`: it would say the same again."""

    lasting = False


class CompilerKilled(CompilerFailed):
    """Somebody killed the compiler, as the kernel does where memory runs out; the text says what it may have."""


class BccNotFound(Exception):
    """No Python here can import bcc; the text says which were asked, and why not."""


@dataclass(frozen=True)
class MapShape:
    """What a map is made of: the kernel's type and flags, sizes in bytes."""

    name: str
    kind: int
    key_size: int
    value_size: int
    entries: int
    flags: int


@dataclass(frozen=True)
class Compiled:
    """Maps, and each program's instructions, in which a map is named by its place in `maps`."""

    maps: tuple[MapShape, ...]
    programs: Mapping[str, bytes]

    def instructions(self, program: str, map_fds: Sequence[int]) -> bytes:
        """The instructions with the descriptors of maps that were made."""
        code = bytearray(self.programs[program])
        for place in _map_references(code):
            (index,) = struct.unpack_from("<i", code, place + 4)
            struct.pack_into("<i", code, place + 4, map_fds[index])
        return bytes(code)

    def to_bytes(self) -> bytes:
        """For a file; from_bytes() reads it."""
        maps = [
            [shape.name, shape.kind, shape.key_size, shape.value_size, shape.entries, shape.flags]
            for shape in self.maps
        ]
        programs = {name: base64.b64encode(code).decode() for name, code in self.programs.items()}
        return json.dumps({"maps": maps, "programs": programs}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Compiled:
        """What to_bytes() made. Raises ValueError, KeyError or TypeError for anything else."""
        try:
            read = read_json(content)
        except RecursionError as error:
            raise ValueError("too deep") from error
        programs = {str(name): base64.b64decode(code) for name, code in dict(read["programs"]).items()}
        maps = tuple(MapShape(str(name), *map(int, rest)) for name, *rest in read["maps"])
        for code in programs.values():
            if not code or len(code) % 8:
                raise ValueError("no instructions")
            numbers = [struct.unpack_from("<i", code, place + 4)[0] for place in _map_references(code)]
            if any(not 0 <= number < len(maps) for number in numbers):
                raise ValueError("a map that is not there")
        return cls(maps, programs)


def _map_references(code: bytes | bytearray) -> list[int]:
    """Where in the code a map is named: instructions of 8 bytes, the 64-bit constants of two."""
    places, place = [], 0
    while place < len(code):
        operation, registers = code[place], code[place + 1]
        if operation == _LOAD_64:
            if registers >> 4 == _MAP_FD:
                places.append(place)
            place += 8
        place += 8
    return places


def from_child(outcome: bytes) -> Compiled:
    """What bpf/compile.py told: a map goes by its descriptor there, and by its place in `maps` from here on.

    Raises ValueError, KeyError, TypeError or AttributeError for anything else.
    """
    told = json.loads(outcome)
    places = {fd: place for place, fd in enumerate(told["descriptors"])}
    programs = {name: bytearray(base64.b64decode(code)) for name, code in told["programs"].items()}
    for code in programs.values():
        for place in _map_references(code):
            (fd,) = struct.unpack_from("<i", code, place + 4)
            struct.pack_into("<i", code, place + 4, places[fd])
    made = Compiled(tuple(MapShape(*shape) for shape in told["maps"]), {k: bytes(v) for k, v in programs.items()})
    return Compiled.from_bytes(made.to_bytes())


# Which Python sees bcc


def pythons() -> list[str]:
    """The Pythons that may see bcc, in the order in which they are asked: ours, then the distribution's."""
    others: list[str] = []
    with suppress(OSError):
        others = [name for name in os.listdir(SYSTEM_FOLDER) if re.fullmatch(r"python3\.[0-9]+", name)]
    others.sort(key=lambda name: -int(name.split(".")[1]))
    found: dict[str, str] = {}
    for place in (*SYSTEM_PYTHONS, *(os.path.join(SYSTEM_FOLDER, name) for name in others)):
        if os.access(place, os.X_OK):
            found.setdefault(os.path.realpath(place), place)
    # Ours may be a virtual environment's, which is a link to one of them and sees other packages.
    return list(dict.fromkeys([*filter(None, [sys.executable]), *found.values()]))


def bcc_version() -> str | None:
    """The version of the bcc that compile_apart() will try first, or "unknown"; None if no Python here has one."""
    return next((version for version in map(_version, pythons()) if version), None)


def _version(python: str) -> str | None:
    if python == sys.executable:
        return bpf.compile.bcc_version()
    return _version_told(python)


@cache
def _version_told(python: str) -> str | None:
    import subprocess

    try:
        status, version, _ = _child(python, "version")
    except (OSError, subprocess.SubprocessError):
        return None
    return version.decode(errors="replace") if status == 0 else None


def working_bcc() -> tuple[str, str]:
    """The Python whose bcc can be imported, tried in a child process, and bcc's version.

    Raises BccNotFound, and CompilerFailed where that Python dies of it.
    """
    python, status, _, printed = _first_with_bcc("import")
    if status:
        raise CompilerFailed(f"{python}: {_last_line(printed) or f'import bcc ended with status {status}'}")
    return python, str(_version(python))


def _first_with_bcc(task: str, given: bytes = b"", include: Path | None = None) -> tuple[str, int, bytes, str]:
    """The first Python that can import bcc, and what came of the task there. Raises BccNotFound, CompilerFailed."""
    import subprocess

    without, broken = [], []
    for python in pythons():
        if _version(python) is None:
            without.append(python)
            continue
        try:
            status, outcome, printed = _child(python, task, given, include)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompilerFailed(f"the compiler could not be run: {error}") from error
        if status != BCC_MISSING:
            return python, status, outcome, printed
        broken.append(f"{python}: {_last_line(printed)}")
    raise BccNotFound("; ".join(broken) or f"no module named bcc for {', '.join(without) or 'any Python'}")


def _child(python: str, task: str, given: bytes = b"", include: Path | None = None) -> tuple[int, bytes, str]:
    """Status, output and complaints. Raises OSError or SubprocessError."""
    import subprocess

    # bcc and clang listen to many variables (ARCH, CPATH, ...), none of which is to decide what becomes of it.
    environment = {"PATH": SEARCHED, "LC_ALL": "C"}
    if include is not None:
        environment["BCC_KERNEL_SOURCE"] = str(include)
    done = subprocess.run(
        [python, "-I", bpf.compile.__file__, task],
        input=given,
        capture_output=True,
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
        cwd="/",
        # The interruption of a terminal is for us; we wait for the little that is left.
        start_new_session=True,
    )
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def compile_apart(source: Path, include: Path, flags: Sequence[str], programs: Sequence[str]) -> tuple[Compiled, str]:
    """Compile in a child process; what was compiled, and all that was printed.

    Raises BccNotFound, or CompilerFailed with the output as its note.
    """
    job = json.dumps({"source": str(source.absolute()), "flags": list(flags), "programs": list(programs)})
    _, status, outcome, printed = _first_with_bcc("compile", job.encode(), include)
    try:
        return from_child(outcome), printed
    except (ValueError, KeyError, TypeError, AttributeError):
        if status == -signal.SIGKILL:
            raise CompilerKilled(_killed()) from None
        failed = CompilerFailed(_last_line(printed) or f"the compiler ended with status {status}")
        add_note(failed, printed)
        failed.lasting = status >= 0 or status == -signal.SIGABRT
        raise failed from None


def _killed() -> str:
    limit = cgroup.memory_limit()
    wants = f"the compiler was killed; it needs some {MEMORY_MB} MB of memory"
    return f"{wants}, and its control group may have {limit >> 20} MiB" if limit else wants


def _last_line(text: str) -> str:
    """The first line that says error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines[-1:] or [""])[0]
