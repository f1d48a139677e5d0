"""What crosses the border between kernel and user space is the same on both sides, and compiles anywhere."""

from __future__ import annotations

import ctypes as ct
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bcc
import pytest

from tests.kernel.miniature import ELEMENT, Miniature
from tracer import probes
from tracer.probes import (
    BUCKETS,
    COUNTERS,
    KINDS,
    STAGES,
    Parameters,
    Probes,
    bucket_upper_ns,
    compile_flags,
    source_folder,
)
from tracer.sites.model import SITE_NAMES

ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = {
    "request_record": probes.RequestRecord,
    "statistics_key": probes.StatisticsKey,
    "stage_statistics": probes.StageStatistics,
    "statistics": probes.KindStatistics,
}


@pytest.fixture
def loaded(pool: Miniature) -> Iterator[Probes]:
    result = Probes(pool.pid, list(pool.sites.values()), ELEMENT)
    yield result
    result.close()


def shape(structure: Any) -> list[tuple[str, int, int]]:
    """(member, offset, size) of a ctypes structure, members of members and of arrays included."""
    members = []
    for name, kind in structure._fields_:
        place = getattr(structure, name)
        members.append((name, place.offset, place.size))
        inner = getattr(kind, "_type_", None) if issubclass(kind, ct.Array) else kind
        if inner is not None and isinstance(inner, type) and issubclass(inner, ct.Structure):
            members += [(f"{name}.{member}", offset, size) for member, offset, size in shape(inner)]
    return members


@pytest.mark.parametrize(("table", "structure"), [("requests", "request_record"), ("statistics", "statistics")])
def test_structures_are_those_of_the_probe_programs(loaded: Probes, table: str, structure: str) -> None:
    """BCC makes its classes from what clang compiled."""
    leaf = loaded._bpf[table.encode()].Leaf
    leaf = getattr(leaf, "_type_", leaf)
    assert shape(STRUCTURES[structure]) == shape(leaf)
    assert ct.sizeof(STRUCTURES[structure]) == ct.sizeof(leaf)


def compiled_c(folder: Path, text: str) -> str:
    """What a C program prints."""
    (folder / "program.c").write_text(text)
    subprocess.run(["gcc", "-o", folder / "program", folder / "program.c"], check=True)
    return subprocess.run([folder / "program"], check=True, capture_output=True, text=True).stdout


def header_program(statements: str) -> str:
    header = f'#include "{source_folder() / "aio_trace.h"}"'
    includes = "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n"
    types = f"{includes}typedef uint64_t u64; typedef uint32_t u32; typedef int32_t s32;"
    return f"{types}\n{header}\nint main(void) {{ {statements} }}"


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    """And from another compiler, every member by its name."""
    expected, statements = [], ""
    for name, structure in STRUCTURES.items():
        for member in (field[0] for field in structure._fields_):
            place = getattr(structure, member)
            expected.append(f"{name} {member} {place.offset} {place.size} {ct.sizeof(structure)}")
            arguments = f"offsetof(struct {name}, {member}), sizeof(((struct {name} *)0)->{member})"
            statements += f'printf("{name} {member} %zu %zu %zu\\n", {arguments}, sizeof(struct {name}));'
    assert compiled_c(tmp_path, header_program(statements)).splitlines() == expected


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    expected = {
        "KINDS": len(KINDS),
        "STAGES": len(STAGES),
        "BUCKETS": BUCKETS,
        "SUB_BUCKET_BITS": probes.SUB_BUCKET_BITS,
        "FLAG_NO_CALLBACK": probes.FLAG_NO_CALLBACK,
        "FLAG_BEFORE": probes.FLAG_BEFORE,
        "SUBMIT_TO_DONE": STAGES.index("submit_to_done"),
        "DONE_TO_CALLBACK": STAGES.index("done_to_callback"),
        "TOTAL": STAGES.index("total"),
        "KIND_OTHER": KINDS.index("other"),
    }
    statements = "".join(f'printf("{name} %d\\n", {name});' for name in expected)
    lines = (line.split() for line in compiled_c(tmp_path, header_program(statements)).splitlines())
    assert {name: int(value) for name, value in lines} == expected


def test_every_counter_has_its_own_place() -> None:
    """A name that is missing in COUNTERS would be counted by the kernel and never told."""
    text = (source_folder() / "aio_trace.h").read_text()
    found = re.search(r"struct statistics \{(.*?)\};", text, re.S)
    assert found
    assert tuple(re.findall(r"u64 (\w+);", found[1])) == COUNTERS


def bucket_function() -> str:
    """bucket_of() as it stands in the probe programs."""
    text = (source_folder() / "aio_trace.c").read_text()
    found = re.search(r"^static inline [^\n]*\bu32 bucket_of\(u64 ns\)\n\{.*?^\}", text, re.S | re.M)
    assert found
    return found[0]


def test_buckets_agree(tmp_path: Path) -> None:
    """The kernel's bucket of a latency is the one whose bounds in Python hold it."""
    edges = {edge for bit in range(42) for edge in (1 << bit, (1 << bit) - 1, (1 << bit) + 1, 3 << bit, 5 << bit)}
    edges |= {bucket_upper_ns(index) + step for index in range(BUCKETS) for step in (0, 1)}
    edges |= {random.Random(1).getrandbits(40) for _ in range(1000)}
    values = sorted(value for value in edges if value < 1 << 42)
    body = 'u64 ns; while (scanf("%lu", &ns) == 1) printf("%u\\n", bucket_of(ns));'
    text = header_program(body).replace("int main", bucket_function() + "\nint main")
    (tmp_path / "program.c").write_text(text)
    subprocess.run(["gcc", "-o", tmp_path / "program", tmp_path / "program.c"], check=True)
    asked = "\n".join(map(str, values))
    answer = subprocess.run([tmp_path / "program"], input=asked, check=True, capture_output=True, text=True).stdout
    for value, bucket in zip(values, map(int, answer.split()), strict=True):
        assert bucket < BUCKETS
        assert value <= bucket_upper_ns(bucket), value
        assert all(value > bucket_upper_ns(lower) for lower in used_buckets(bucket)), value


def used_buckets(below: int) -> Iterator[int]:
    """The next lower bucket that any latency falls into: 4 to 7 are part of the first octaves and stay empty."""
    for index in range(below - 1, -1, -1):
        if index < 4 or index >= 8:
            yield index
            return


@pytest.mark.parametrize("cmpxchg", [False, True], ids=["old kernel", "cmpxchg"])
@pytest.mark.parametrize("names", [SITE_NAMES, ("done", "callback")], ids=["full", "alert"])
def test_every_variant_loads(pool: Miniature, cmpxchg: bool, names: tuple[str, ...]) -> None:
    """The kernel's verifier has no objection to any of them."""
    flags = compile_flags([pool.sites[name] for name in names], ELEMENT, Parameters(64), cmpxchg)
    os.environ["BCC_KERNEL_SOURCE"] = str(source_folder())
    program = bcc.BPF(src_file=str(source_folder() / "aio_trace.c").encode(), cflags=flags)
    for name in names:
        assert program.load_func(f"on_{name}".encode(), bcc.BPF.KPROBE).fd > 0
    program.cleanup()


LOAD = """
import sys
from pathlib import Path
from tests.kernel.miniature import ELEMENT, Miniature
from tracer.probes import Probes
with Miniature(Path(sys.argv[1])) as pool:
    probes = Probes(pool.pid, list(pool.sites.values()), ELEMENT)
    probes.attach()
    pool.do("r23")
    print(sum(kind.completed for kind in probes.statistics().values()))
    probes.close()
"""
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "as it is": {},
    "no kernel source named": {"BCC_KERNEL_SOURCE": None},
    "a kernel source that is not there": {"BCC_KERNEL_SOURCE": "/nonexistent"},
    "kernel headers of somebody else": {"BCC_KERNEL_SOURCE": "/usr"},
    "cross compiling": {"ARCH": "arm64", "CROSS_COMPILE": "aarch64-linux-gnu-"},
    "compiler paths": {"CPATH": "/usr/include", "C_INCLUDE_PATH": "/usr/include"},
    "no folder for temporary files": {"TMPDIR": "/nonexistent", "HOME": None},
    "no PATH": {"PATH": None},
    "plain locale": {"LC_ALL": "C"},
}


def loads(program: Path, environment: dict[str, str | None], *prefix: str) -> None:
    """In a process of its own, 23 requests are seen and nothing else is printed."""
    changed = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", LOAD, program],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "23\n", "")


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_any_environment_will_do(program: Path, environment: dict[str, str | None]) -> None:
    """bcc listens to the environment: none of that may decide whether we run."""
    loads(program, environment)


HIDE = "for f in /usr/src /lib/modules; do mkdir -p $f; mount -t tmpfs none $f; done"


def test_no_kernel_headers_are_needed(program: Path) -> None:
    """In a mount namespace without any, even where this host has them."""
    loads(program, {}, "unshare", "--mount", "sh", "-c", f'{HIDE}; exec "$@"', "sh")


def test_no_tracefs_is_needed(program: Path) -> None:
    hide = "mount -t tmpfs none /sys/kernel"
    loads(program, {}, "unshare", "--mount", "sh", "-c", f'{hide}; exec "$@"', "sh")
