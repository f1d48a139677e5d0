"""Compile bpf/aio_trace.c: the only importer of bcc, in a process of its own.

Knows: bcc, and what of its outcome is worth keeping: the maps' shapes and the instructions. LLVM takes tens
of megabytes, which end with that process. Does not know QEMU, or what is done with the programs.
"""

from __future__ import annotations

import base64
import ctypes as ct
import json
import os
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BCC_MISSING = 3
TIMEOUT_S = 120.0

_LOAD_64, _MAP_FD = 0x18, 1  # BPF_LD | BPF_IMM | BPF_DW, BPF_PSEUDO_MAP_FD


class CompilerFailed(Exception):
    """bcc's complaint in one line; its whole output as a note."""


class BccNotFound(Exception):
    """bcc cannot be imported; the text says why."""


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
        read = json.loads(content)
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


def bcc_version() -> str | None:
    """The version of the bcc package that compile_apart() would use, without importing it; None if there is none."""
    from importlib.machinery import PathFinder

    try:
        spec = PathFinder.find_spec("bcc", sys.path)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None if spec is None else "unknown"
    try:
        path = os.path.join(spec.submodule_search_locations[0], "version.py")
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return "unknown"
    found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
    return found[1] if found else "unknown"


def bcc_problem() -> str | None:
    """Why bcc cannot be imported, tried in a child process; None where it can."""
    import subprocess

    try:
        if find_spec("bcc") is None:
            return "no module named bcc"
    except (ImportError, ValueError) as error:
        return str(error)
    try:
        status, _, complaints = _child("import bcc", b"", dict(os.environ))
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if status == 0 else _last_line(complaints)


def _child(code: str, given: bytes, environment: dict[str, str]) -> tuple[int, bytes, str]:
    """Status, output and complaints. Raises OSError or SubprocessError."""
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        input=given,
        capture_output=True,
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
        # The interruption of a terminal is for us; we wait for the little that is left.
        process_group=0,
    )
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def compile_apart(source: Path, include: Path, flags: Sequence[str], programs: Sequence[str]) -> tuple[Compiled, str]:
    """Compile in a child process; what was compiled, and all that was printed.

    Raises BccNotFound, or CompilerFailed with the output as its note.
    """
    import subprocess

    job = json.dumps({"source": str(source), "flags": list(flags), "programs": list(programs)})
    environment = {**os.environ, "BCC_KERNEL_SOURCE": str(include)}
    # What kernel developers build for is not what this machine is, but BCC would believe it.
    environment.pop("ARCH", None)
    try:
        status, outcome, printed = _child("from tracer.compiler import main; main()", job.encode(), environment)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerFailed(f"the compiler could not be run: {error}") from error
    if status == BCC_MISSING:
        raise BccNotFound(_last_line(printed))
    try:
        return Compiled.from_bytes(outcome), printed
    except (ValueError, KeyError, TypeError):
        failed = CompilerFailed(_last_line(printed) or f"the compiler ended with status {status}")
        failed.add_note(printed)
        raise failed from None


def _last_line(text: str) -> str:
    """The first line that says error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines[-1:] or [""])[0]


def main() -> None:
    """The child: a job on standard input, the outcome on standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.buffer.read())
    try:
        import bcc
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(BCC_MISSING)
    try:
        module = bcc.BPF(src_file=job["source"].encode(), cflags=job["flags"])
    except Exception as error:  # bcc raises bare Exception
        print(error, file=sys.stderr)
        sys.exit(1)
    out.write(_outcome(bcc.libbcc.lib, module.module, job["programs"]).to_bytes())
    out.flush()
    # The module's own clean-up at the end is of no use to a process that ends.
    os._exit(0)


def _outcome(library: Any, module: Any, programs: Sequence[str]) -> Compiled:
    library.bpf_table_name.restype = ct.c_char_p
    for name in ("name", "fd_id", "type_id", "key_size_id", "leaf_size_id", "max_entries_id", "flags_id"):
        getattr(library, f"bpf_table_{name}").argtypes = [ct.c_void_p, ct.c_size_t]
    shapes, fds = [], {}
    for number in range(library.bpf_num_tables(module)):
        fds[library.bpf_table_fd_id(module, number)] = number
        shapes.append(
            MapShape(
                library.bpf_table_name(module, number).decode(),
                library.bpf_table_type_id(module, number),
                library.bpf_table_key_size_id(module, number),
                library.bpf_table_leaf_size_id(module, number),
                library.bpf_table_max_entries_id(module, number),
                library.bpf_table_flags_id(module, number),
            )
        )
    return Compiled(tuple(shapes), {name: _code(library, module, name, fds) for name in programs})


def _code(library: Any, module: Any, name: str, fds: Mapping[int, int]) -> bytes:
    start = library.bpf_function_start(module, name.encode())
    code = bytearray(ct.string_at(start, library.bpf_function_size(module, name.encode())))
    for place in _map_references(code):
        (fd,) = struct.unpack_from("<i", code, place + 4)
        struct.pack_into("<i", code, place + 4, fds[fd])
    return bytes(code)
