"""What crosses the border between kernel and user space is the same on both sides, and compiles anywhere."""

from __future__ import annotations

import ctypes as ct
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import cache as remember
from pathlib import Path
from typing import Any

import bcc
import pytest

from tests.kernel.attaching import ALERT_ONLY
from tests.kernel.miniature import ELEMENT, Miniature, sites_of
from tracer import kernel, maps, probes
from tracer.compiler import compile_apart
from tracer.kernel import Map, load
from tracer.maps import BUCKETS, KERNEL_COUNTERS, KINDS, STAGES, bucket_upper_ns, set_of
from tracer.probes import Parameters, Programs, compile_flags, source_folder
from tracer.sites.model import SITE_NAMES

ROOT = Path(__file__).resolve().parents[2]
STRUCTURES = {
    "request_record": maps.RequestRecord,
    "request_set": maps.RequestSet,
    "request_key": maps.RequestKey,
    "process": maps.Process,
    "share": maps.Share,
    "statistics_key": maps.StatisticsKey,
    "stage_statistics": maps.StageStatistics,
    "statistics": maps.KindStatistics,
}
# The maps: key and value, one number where the key is an index.
TABLES: dict[str, tuple[Any, Any]] = {
    "requests": (ct.c_uint32, maps.RequestSet),
    "overflow": (maps.RequestKey, maps.RequestRecord),
    "processes": (ct.c_uint32, maps.Process),
    "statistics": (maps.StatisticsKey, maps.KindStatistics),
    "template": (ct.c_uint32, maps.KindStatistics),
}
# Those that are there only where processes share them.
SHARED_TABLES: dict[str, tuple[Any, Any]] = {"shares": (ct.c_uint32, maps.Share)}


@remember
def compiled_by_bcc(program: Path, shared: bool) -> Any:
    """The probe programs in BCC's own hands: it makes classes from what clang compiled."""
    flags = compile_flags(list(sites_of(program).values()), ELEMENT, Parameters(shared=shared), atomics=True)
    os.environ["BCC_KERNEL_SOURCE"] = str(source_folder())
    return bcc.BPF(src_file=str(source_folder() / "aio_trace.c").encode(), cflags=flags)


def shape(structure: Any) -> list[tuple[str, int, int]]:
    """(member, offset, size) of a ctypes structure, members of members and of arrays included."""
    members = []
    for name, kind in structure._fields_:
        place = getattr(structure, name)
        members.append((name, place.offset, place.size))
        inner: Any = kind._type_ if issubclass(kind, ct.Array) else kind
        if isinstance(inner, type) and issubclass(inner, ct.Structure):
            members += [(f"{name}.{member}", offset, size) for member, offset, size in shape(inner)]
    return members


@pytest.mark.parametrize("shared", [False, True], ids=["one process", "shared"])
@pytest.mark.parametrize("table", TABLES)
def test_structures_are_those_of_the_probe_programs(program: Path, table: str, shared: bool) -> None:
    compiled = compiled_by_bcc(program, shared)[table.encode()]
    for mine, theirs in zip(TABLES[table], (compiled.Key, compiled.Leaf)):
        assert ct.sizeof(mine) == ct.sizeof(theirs)
        if issubclass(mine, ct.Structure):
            assert shape(mine) == shape(theirs)


@pytest.mark.parametrize("beforehand", [False, True], ids=["memory when needed", "memory beforehand"])
@pytest.mark.parametrize("shared", [False, True], ids=["one process", "shared"])
def test_maps_are_made_as_they_were_compiled(
    pool: Miniature, shared: bool, beforehand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their shapes outlive the compiler's process; the sizes are those that are read."""
    monkeypatch.setattr(probes, "_may_allocate", lambda: not beforehand)
    most = (probes.PREALLOCATED_STATISTICS, probes.PREALLOCATED_SHARED)[shared] if beforehand else probes.MAX_STATISTICS
    loaded = Programs(pool.file, list(pool.sites.values()), ELEMENT, Parameters(77, set_bits=3, shared=shared))
    made = dict(loaded._maps)
    assert {name: (each.key_size, each.value_size) for name, each in made.items()} == {
        name: (ct.sizeof(key), ct.sizeof(value))
        for name, (key, value) in (TABLES | SHARED_TABLES if shared else TABLES).items()
    }
    assert {name: each.entries for name, each in made.items()} == {
        "requests": 8,
        "overflow": 77,
        "processes": probes.MAX_PROCESSES if shared else 1,
        "statistics": most,
        "template": 1,
        **({"shares": probes.MAX_PROCESSES} if shared else {}),
    }
    # The kernel's word on what it allocates later.
    later = {name for name, each in made.items() if flags_of(each) & kernel.NO_PREALLOC}
    assert later == (set() if beforehand else {"statistics"})
    loaded.close()


def flags_of(made: kernel.Map) -> int:
    """The flags that a map has, as /proc shows them."""
    shown = dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{made.fd}").read_text().splitlines())
    return int(shown["map_flags"], 16)


def compiled_c(folder: Path, text: str) -> str:
    """What a C program prints."""
    (folder / "program.c").write_text(text)
    subprocess.run(["gcc", "-o", folder / "program", folder / "program.c"], check=True)
    return subprocess.run([folder / "program"], check=True, capture_output=True, text=True).stdout


def header_program(statements: str) -> str:
    header = f'#include "{source_folder() / "aio_trace.h"}"'
    includes = "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n"
    types = includes + "".join(f"typedef {'u' * (c == 'u')}int{n}_t {c}{n};" for c in "us" for n in (16, 32, 64))
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


SAME_NAMES = (
    *(
        "SUB_BUCKET_BITS",
        "WAYS",
        "CALLED",
        "CALLED_AGAIN",
        "NO_FD",
        "THE_PROCESS",
        "MODE_NONE",
        "MODE_ALERT",
        "MODE_FULL",
    ),
    *("FLAG_NO_CALLBACK", "FLAG_BEFORE", "FLAG_OVERFLOW"),
)


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    expected = {
        "KINDS": len(KINDS),
        "STAGES": len(STAGES),
        "BUCKETS": BUCKETS,
        **{name: getattr(maps, name) for name in SAME_NAMES},
        "SUBMIT_TO_DONE": STAGES.index("submit_to_done"),
        "DONE_TO_CALLBACK": STAGES.index("done_to_callback"),
        "TOTAL": STAGES.index("total"),
        "KIND_OTHER": KINDS.index("other"),
    }
    statements = "".join(f'printf("{name} %d\\n", {name});' for name in expected)
    lines = (line.split() for line in compiled_c(tmp_path, header_program(statements)).splitlines())
    assert {name: int(value) for name, value in lines} == expected


def test_no_constant_is_left_out() -> None:
    """Of those that the header defines; SUBMIT_TO_DONE and the like are places in STAGES."""
    text = (source_folder() / "aio_trace.h").read_text()
    defined = set(re.findall(r"^#define (\w+) ", text, re.M))
    places = {"SUBMIT_TO_DONE", "DONE_TO_CALLBACK", "TOTAL", "KIND_OTHER", "KINDS", "STAGES", "BUCKETS"}
    assert defined == {*SAME_NAMES, *places}


def test_every_counter_has_its_own_place() -> None:
    """A name that is missing in COUNTERS would be counted by the kernel and never told."""
    text = (source_folder() / "aio_trace.h").read_text()
    found = re.search(r"struct statistics \{(.*?)\};", text, re.S)
    assert found
    assert tuple(re.findall(r"u64 (\w+);", found[1])) == KERNEL_COUNTERS


def bucket_function() -> str:
    """bucket_of() as it stands in the probe programs."""
    text = (source_folder() / "aio_trace.c").read_text()
    found = re.search(r"^INLINE (u32 bucket_of\(u64 ns\)\n\{.*?^\})", text, re.S | re.M)
    assert found
    return found[1]


def test_buckets_agree(tmp_path: Path) -> None:
    """The kernel's bucket of a latency is the one whose bounds in Python hold it."""
    edges = {edge for bit in range(61) for edge in (1 << bit, (1 << bit) - 1, (1 << bit) + 1, 3 << bit, 5 << bit)}
    edges |= {bucket_upper_ns(index) + step for index in range(BUCKETS) for step in (0, 1)}
    chance = random.Random(1)
    edges |= {chance.getrandbits(chance.randrange(1, 65)) for _ in range(2000)}
    values = sorted(value for value in edges if value < 1 << 64)
    body = 'u64 ns; while (scanf("%lu", &ns) == 1) printf("%u\\n", bucket_of(ns));'
    text = header_program(body).replace("int main", bucket_function() + "\nint main")
    (tmp_path / "program.c").write_text(text)
    subprocess.run(["gcc", "-o", tmp_path / "program", tmp_path / "program.c"], check=True)
    asked = "\n".join(map(str, values))
    answer = subprocess.run([tmp_path / "program"], input=asked, check=True, capture_output=True, text=True).stdout
    for value, bucket in zip(values, map(int, answer.split())):
        assert bucket < BUCKETS
        assert value <= bucket_upper_ns(bucket), value
        assert all(value > bucket_upper_ns(lower) for lower in used_buckets(bucket)), value


def used_buckets(below: int) -> Iterator[int]:
    """The next lower bucket that any latency falls into: 4 to 7 are part of the first octaves and stay empty."""
    for index in range(below - 1, -1, -1):
        if index < 4 or index >= 8:
            yield index
            return


@pytest.mark.parametrize("set_bits", [1, 5, probes.SET_BITS, 20])
def test_sets_agree(tmp_path: Path, set_bits: int) -> None:
    """The set in which the kernel puts a request is the one in which it is looked for."""
    text = (source_folder() / "aio_trace.c").read_text()
    found = re.search(r"u32 index = ([^;]*request[^;]*SET_BITS\));", text)
    assert found
    chance = random.Random(2)
    asked = [(chance.getrandbits(47) & ~7, chance.getrandbits(22)) for _ in range(1000)]
    asked += [(0xFFFF_FFFF_FFFF_FFF8, 0xFFFF_FFFF), (8, 1)]
    printed = f'printf("%u\\n", (u32)({found[1]}));'
    body = f'u64 request; u32 process; while (scanf("%lu %u", &request, &process) == 2) {printed}'
    (tmp_path / "program.c").write_text(f"#define SET_BITS {set_bits}\n" + header_program(body))
    subprocess.run(["gcc", "-o", tmp_path / "program", tmp_path / "program.c"], check=True)
    lines = "\n".join(f"{request} {process}" for request, process in asked)
    answer = subprocess.run([tmp_path / "program"], input=lines, check=True, capture_output=True, text=True).stdout
    assert [set_of(request, process, set_bits) for request, process in asked] == list(map(int, answer.split()))


@pytest.mark.parametrize("shared", [False, True], ids=["one process", "shared"])
@pytest.mark.parametrize("atomics", [False, True], ids=["no atomics", "atomics"])
@pytest.mark.parametrize("names", [SITE_NAMES, ALERT_ONLY], ids=["full", "alert"])
def test_every_variant_loads(pool: Miniature, names: tuple[str, ...], atomics: bool, shared: bool) -> None:
    """The kernel's verifier has no objection to any of them, whichever way it is attached."""
    # With all that there can be; the plain ones run in other tests.
    sites = [replace(pool.sites[name], without_callback=True) for name in names]
    extra = ("-DPID_NAMESPACE_DEVICE=4ULL", "-DPID_NAMESPACE_INODE=4026532000ULL", "-DCOUNT_OPERATIONS=1")
    flags = compile_flags(sites, ELEMENT, Parameters(64, shared=shared, set_bits=4, extra_flags=extra), atomics)
    folder = source_folder()
    made, printed = compile_apart(folder / "aio_trace.c", folder, flags, list(probes.programs(sites)))
    assert printed == ""
    tables = {shape.name: Map(shape.kind, *astuple(shape)[2:]) for shape in made.maps}
    fds = [tables[shape.name].fd for shape in made.maps]
    for name in made.programs:
        for multi in (False, True):
            os.close(load(made.instructions(name, fds), multi))
    for table in tables.values():
        table.close()


LOAD = """
import sys
from pathlib import Path
from tests.kernel.miniature import ELEMENT, Miniature
from tracer.probes import Probes
with Miniature(Path(sys.argv[1])) as pool:
    probes = Probes(pool.pid, pool.file, list(pool.sites.values()), ELEMENT)
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


def loads(program: Path, folder: Path, environment: dict[str, str | None], *prefix: str) -> None:
    """In a process of its own, from an empty cache, 23 requests are seen and nothing else is printed."""
    changed = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), **environment}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", LOAD, program],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "23\n", "")
    assert list(folder.rglob("programs/*"))


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
def test_any_environment_will_do(program: Path, tmp_path: Path, environment: dict[str, str | None]) -> None:
    """bcc listens to the environment: none of that may decide whether we run."""
    loads(program, tmp_path, environment)


HIDE = "for f in /usr/src /lib/modules; do mkdir -p $f; mount -t tmpfs none $f; done"


def test_no_kernel_headers_are_needed(program: Path, tmp_path: Path) -> None:
    """In a mount namespace without any, even where this host has them."""
    loads(program, tmp_path, {}, "unshare", "--mount", "sh", "-c", f'{HIDE}; exec "$@"', "sh")


def test_no_tracefs_is_needed(program: Path, tmp_path: Path) -> None:
    hide = "mount -t tmpfs none /sys/kernel"
    loads(program, tmp_path, {}, "unshare", "--mount", "sh", "-c", f'{hide}; exec "$@"', "sh")
