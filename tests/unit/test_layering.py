"""Who may import whom, read from the source with ast; imports inside functions count as well.

The rules are the three tables. A new module needs a line in STAGES (or a place in a package that has
one); a new library with a home of its own needs a line in HOMES.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The way of the data. A module (or all of a package) may import from its own line's own package and
# from earlier lines; neighbours on one line do not know each other.
STAGES: tuple[tuple[str, ...], ...] = (
    ("tracer", "bpf", "tracer.text", "tracer.environment"),
    ("tracer.errors", "tracer.cache", "tracer.records", "tracer.output"),
    ("tracer.kernel",),
    ("tracer.rights", "tracer.cgroup", "tracer.hit_cost", "tracer.layout", "tracer.known_bugs", "tracer.budget"),
    ("tracer.trial", "tracer.apart", "tracer.maps", "tracer.compiler"),
    ("tracer.machine",),
    ("tracer.target", "tracer.elf"),
    ("tracer.debug_files", "tracer.executable"),
    ("tracer.sites", "tracer.eh_frame"),
    ("tracer.memory",),
    ("tracer.view",),
    ("tracer.unwind", "tracer.corefile"),
    ("tracer.live", "tracer.core", "tracer.registers"),
    ("tracer.own",),
    ("tracer.pools",),
    ("tracer.home", "tracer.posix_aio", "tracer.coroutine", "tracer.build"),
    ("tracer.coroutines", "tracer.run_state"),
    ("tracer.probes", "tracer.verdict", "tracer.kept"),
    ("tracer.events",),
    ("tracer.host", "tracer.outside_pool"),
    ("tracer.check", "tracer.figures", "tracer.looking", "tracer.sampling", "tracer.report"),
    ("tracer.descriptors", "tracer.qmp", "tracer.xstate", "tracer.audit", "tracer.survey", "tracer.qcow2"),
    ("tracer.inject", "tracer.libvirt"),
    ("tracer.inspect", "tracer.report_inspect", "tracer.nudge"),
    ("tracer.save", "tracer.nudger", "tracer.freeing", "tracer.spending"),
    ("tracer.watch", "tracer.preparing", "tracer.commands"),
    ("tracer.session",),
    ("tracer.lab",),
    ("tracer.demo",),
    ("cli",),
    ("bench.figures", "bench.floor", "bench.host"),
    ("bench.loads", "bench.tracers"),
    ("bench.measure",),
    ("bench.experiments",),
    ("bench.table",),
    ("bench",),
)

# Libraries that are known in few places: where, and in how many modules at most.
HOMES: Mapping[str, tuple[tuple[str, ...], int]] = {
    "bcc": (("bpf.compile",), 1),
    "click": (("cli",), 1),
    "tabulate": (("tracer.report", "tracer.report.*"), 1),
    "capstone": (("tracer.sites.x86", "tracer.sites.a64"), 2),
    "elftools": (("tracer.elf", "tracer.elf.*", "tracer.sites.dwarf"), 3),
    "qemu": (("tracer.qmp",), 1),
}

# What a module must do without, because it is to be pure.
WITHOUT: Mapping[str, frozenset[str]] = {
    "bench.figures": frozenset({"os", "pathlib", "subprocess", "time"}),
    "tracer.maps": frozenset({"os", "pathlib", "subprocess", "time"}),
    "tracer.known_bugs": frozenset({"os", "pathlib", "subprocess", "time"}),
    "tracer.layout": frozenset({"os", "pathlib", "subprocess", "time"}),
    "tracer.verdict": frozenset({"datetime", "os", "pathlib", "socket", "subprocess", "time"}),
}

Imports = Mapping[str, frozenset[str]]


def read_sources(root: Path) -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    folders = ("bpf", "tracer", "bench")
    paths = [root / "cli.py", *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    return {module_name(path.relative_to(root)): ast.parse(path.read_text()) for path in paths if path.exists()}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(module, member or None) of each import statement; a relative one keeps its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def resolve(sources: Mapping[str, ast.Module]) -> Imports:
    """For each module the modules it imports: `from tracer import errors` is tracer.errors."""
    return {
        name: frozenset(
            f"{module}.{member}" if f"{module}.{member}" in sources else module
            for module, member in imported_names(tree)
        )
        for name, tree in sources.items()
    }


def stage_of(module: str) -> tuple[int, str] | None:
    """The rank and the entry in STAGES that the module falls under; `tracer` itself covers no others."""
    for rank, entries in enumerate(STAGES):
        for entry in entries:
            if module == entry or (entry != "tracer" and module.startswith(entry + ".")):
                return rank, entry
    return None


def backward_imports(imports: Imports) -> list[str]:
    wrong = []
    for module, imported in sorted(imports.items()):
        for other in sorted(imported):
            here, there = stage_of(module), stage_of(other)
            if here and there and here != there and there[0] >= here[0]:
                wrong.append(f"{module} imports {other}")
    return wrong


def importers(imports: Imports, library: str) -> list[str]:
    return sorted(
        module for module, imported in imports.items() if any(name.split(".")[0] == library for name in imported)
    )


@pytest.fixture(scope="module")
def imports() -> Imports:
    return resolve(read_sources(ROOT))


def test_every_module_has_its_stage(imports: Imports) -> None:
    assert [module for module in sorted(imports) if stage_of(module) is None] == []


def test_no_stage_imports_a_later_one(imports: Imports) -> None:
    assert backward_imports(imports) == []


def test_no_import_cycles(imports: Imports) -> None:
    graph = {module: imported & imports.keys() for module, imported in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_are_absolute(imports: Imports) -> None:
    relative = {module for module, imported in imports.items() if any(name.startswith(".") for name in imported)}
    assert relative == set()


@pytest.mark.parametrize("library", HOMES)
def test_library_stays_in_its_home(imports: Imports, library: str) -> None:
    homes, most = HOMES[library]
    found = importers(imports, library)
    assert [module for module in found if not any(fnmatchcase(module, home) for home in homes)] == []
    assert len(found) <= most, found


@pytest.mark.parametrize("module", WITHOUT)
def test_pure_module_does_without(imports: Imports, module: str) -> None:
    for name in (name for name in imports if name == module or name.startswith(module + ".")):
        assert {imported.split(".")[0] for imported in imports[name]} & WITHOUT[module] == set(), name


@pytest.mark.skipif(sys.version_info < (3, 10), reason="this Python does not know what belongs to it")
def test_only_declared_libraries_are_imported(imports: Imports) -> None:
    known = set(HOMES) | set(getattr(sys, "stdlib_module_names", ())) | {"tracer", "bpf", "bench", "cli"}
    outside = {name.split(".")[0] for imported in imports.values() for name in imported if name[0] != "."}
    assert outside - known == set()


def test_the_reader_sees_hidden_imports() -> None:
    """The rules above are only as good as the reader: a wrong import in a function must be found."""
    source = "def late():\n    import bcc.utils\n    from tracer import session\n"
    imports = resolve({"tracer.pools": ast.parse(source), "tracer.session": ast.parse("")})
    assert importers(imports, "bcc") == ["tracer.pools"]
    assert backward_imports(imports) == ["tracer.pools imports tracer.session"]
