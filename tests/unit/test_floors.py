"""The oldest Python and the oldest libraries that pyproject.toml names will do.

`make lint` asks vermin for syntax and library calls that are too new; here is what it does not see, and the
libraries themselves: distributions have old ones, and pip takes those that are there.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("cli.py", "tracer", "bpf", "bench", "tests")
QEMU = "/usr/bin/qemu-img"
#: Tests of what the libraries are for: options, tables, instructions, ELF files.
TESTS = ("test_report.py", "test_a64.py", "test_cli.py")
CHOSEN = "not test_cli or duration or budget"


def floors() -> dict[str, str]:
    """The libraries that are needed to run, with the oldest version that is said to do."""
    (listed,) = re.findall(r"^dependencies = \[$(.*?)^\]$", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    return dict(re.findall(r'"([\w.-]+)>=([\w.]+)"', listed))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has the oldest libraries, and pytest and the like from ours."""
    folder = tmp_path_factory.mktemp("floors")
    venv.create(folder, symlinks=True, with_pip=True)
    made = str(folder / "bin" / "python")
    wanted = [f"{name}=={version}" for name, version in floors().items()]
    command = [made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"pip cannot install {' '.join(wanted)}: {done.stderr[-300:]}")
    (packages,) = folder.glob("lib/python3*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "ours.pth").write_text("\n".join(ours) + "\n")
    return made


def run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_the_floors_are_what_is_tested(python: str) -> None:
    code = f"from importlib.metadata import version; print([version(name) for name in {list(floors())}])"
    found = ast.literal_eval(run(python, "-c", code).stdout)
    wanted = [version.split(".") for version in floors().values()]
    assert len(found) == len(wanted) >= 5
    for there, floor in zip(found, wanted):
        assert there.split(".")[: len(floor)] == floor


@pytest.mark.timeout(600)
def test_the_oldest_libraries_will_do(python: str) -> None:
    done = run(
        python,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN),
        *(f"tests/unit/{name}" for name in TESTS),
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("command", [(), ("check",), ("inspect",), ("nudge",), ("demo",)])
def test_every_command_starts(python: str, command: tuple[str, ...]) -> None:
    done = run(python, "cli.py", *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: aio-trace" in done.stdout


def test_a_build_is_located(python: str) -> None:
    """With the oldest capstone and pyelftools as with the newest, and the table is the same, line by line."""
    require(Path(QEMU).exists(), f"{QEMU} is not installed")
    oldest, ours = (run(who, "cli.py", "check", "--exe", QEMU) for who in (python, sys.executable))
    assert oldest.returncode == 0, oldest.stderr
    table = oldest.stdout.partition("this host")[0]
    assert table == ours.stdout.partition("this host")[0]
    assert "callback" in table


def unions(tree: ast.AST) -> Iterator[ast.BinOp]:
    """`X | Y` of classes outside of annotations: Python evaluates these, and could not before 3.10."""
    for node in ast.walk(tree):
        for part in ("annotation", "returns"):
            if getattr(node, part, None) is not None:
                setattr(node, part, None)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.BitOr)
            and any(map(is_class, (node.left, node.right)))
        ):
            yield node


def is_class(node: ast.expr) -> bool:
    if isinstance(node, ast.Subscript):
        return is_class(node.value)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    known = name in ("int", "str", "bytes", "float", "bool", "list", "dict", "tuple", "set", "type")
    return (
        known
        or re.fullmatch("[A-Z]+[a-z].*", name) is not None
        or (isinstance(node, ast.Constant) and node.value is None)
    )


def test_no_union_is_evaluated() -> None:
    files = [
        file for name in SOURCES for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    found = [f"{file}:{union.lineno}" for file in files for union in unions(ast.parse(file.read_text()))]
    assert len(files) > 100
    assert found == []


def test_the_search_for_unions_finds_them() -> None:
    source = "def f(x: int | None) -> A | B: ...\nA = B | None\nisinstance(x, int | str)\ny = 1 | N\nz: int | str = 2\n"
    assert [union.lineno for union in unions(ast.parse(source))] == [2, 3]
