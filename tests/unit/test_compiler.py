"""What was compiled, to a file and back, and into instructions; no bcc is needed but to see whether it is there."""

from __future__ import annotations

import ast
import base64
import json
import shutil
import struct
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bpf.compile
from tests.conftest import require
from tracer import compiler
from tracer.compiler import (
    BccNotFound,
    Compiled,
    CompilerFailed,
    MapShape,
    bcc_version,
    compile_apart,
    from_child,
    working_bcc,
)

PLAIN, TWO_WORDS, MAP = 0xB7, 0x18, 1 << 4
shapes = st.builds(MapShape, st.text(min_size=1), *[st.integers(0, 2**31 - 1)] * 5)


def instruction(operation: int, registers: int = 0, constant: int = 0) -> bytes:
    return struct.pack("<BBhi", operation, registers, 0, constant)


def constant_of(registers: int, value: int) -> bytes:
    """A 64-bit constant: two instructions' room; a map's descriptor where the registers say so."""
    return instruction(TWO_WORDS, registers, value) + instruction(0, 0, 0)


def made(code: bytes, maps: int = 1) -> Compiled:
    return Compiled(tuple(MapShape(f"map {n}", 2, 4, 8, 1, 0) for n in range(maps)), {"on_done": code})


@given(st.lists(shapes), st.dictionaries(st.text(), st.lists(st.binary(min_size=6, max_size=6), min_size=1)))
def test_to_bytes_and_back(maps: list[MapShape], words: dict[str, list[bytes]]) -> None:
    code = {name: b"".join(bytes([PLAIN, 0]) + word for word in each) for name, each in words.items()}
    compiled = Compiled(tuple(maps), code)
    assert Compiled.from_bytes(compiled.to_bytes()) == compiled


def test_maps_get_their_descriptors() -> None:
    """Each by its place in the list of maps, wherever the code names it."""
    code = instruction(PLAIN) + constant_of(MAP | 1, 1) + instruction(PLAIN) + constant_of(MAP | 2, 0)
    expected = instruction(PLAIN) + constant_of(MAP | 1, 70) + instruction(PLAIN) + constant_of(MAP | 2, 50)
    compiled = made(code, maps=2)
    assert compiled.instructions("on_done", [50, 70]) == expected
    assert compiled.programs["on_done"] == code


@pytest.mark.parametrize(
    "code",
    [
        constant_of(0 | 1, 0),  # a number that is no map
        constant_of(2 << 4, 0),  # a map's value, which is named otherwise
        instruction(PLAIN, MAP, 0),  # another instruction with that source register
        # The second half of a constant looks like anything.
        instruction(TWO_WORDS) + instruction(TWO_WORDS, MAP, 0) + instruction(PLAIN),
    ],
)
def test_nothing_else_is_changed(code: bytes) -> None:
    assert made(code).instructions("on_done", [77]) == code


def changed(part: str, value: object) -> bytes:
    good = json.loads(made(constant_of(MAP, 0)).to_bytes())
    return json.dumps({**good, part: value}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"7",
        b"[]",
        b"{}",
        b'{"maps": []}',
        changed("maps", None),
        changed("maps", 5),
        changed("maps", [5]),
        changed("maps", [["requests", 1, 2, 3]]),
        changed("maps", [["requests", 1, 2, 3, 4, "x"]]),
        changed("maps", [["requests", 1, 2, 3, 4, None]]),
        changed("maps", []),  # the program names one
        changed("programs", []) + b"x",
        changed("programs", 3),
        changed("programs", ["on_done"]),
        changed("programs", {"on_done": 5}),
        changed("programs", {"on_done": "no base64!"}),
        changed("programs", {"on_done": "AAAA"}),  # three bytes
        changed("programs", {"on_done": ""}),
        made(constant_of(MAP, 1)).to_bytes(),
        made(constant_of(MAP, -1)).to_bytes(),
        made(instruction(TWO_WORDS, MAP) * 2 + b"\x18\x10").to_bytes(),
    ],
)
def test_garbage_is_refused(content: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Compiled.from_bytes(content)


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with suppress(ValueError, KeyError, TypeError):
        Compiled.from_bytes(content)


@given(st.data())
def test_a_damaged_byte_is_read_or_refused(data: st.DataObject) -> None:
    """And what is read can be made into instructions."""
    content = bytearray(made(constant_of(MAP | 1, 1) + instruction(0x95), maps=2).to_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        compiled = Compiled.from_bytes(bytes(content))
    except (ValueError, KeyError, TypeError):
        return
    for name in compiled.programs:
        compiled.instructions(name, list(range(len(compiled.maps))))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without a bcc; a virtual environment sees nothing of the host's."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    return folder


@pytest.fixture
def python(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The only Python that is asked."""
    (packages,) = environment.glob("lib/python3*/site-packages")
    found = str(environment / "bin" / "python")
    use(monkeypatch, found)
    yield found
    shutil.rmtree(packages / "bcc", ignore_errors=True)


def use(monkeypatch: pytest.MonkeyPatch, *pythons: str) -> None:
    monkeypatch.setattr(compiler, "pythons", lambda: list(pythons))
    compiler._version_told.cache_clear()


def package(python: str, version: str | None, code: str = "") -> Path:
    """Give this Python a bcc."""
    (packages,) = Path(python).parents[1].glob("lib/python3*/site-packages")
    (packages / "bcc").mkdir()
    (packages / "bcc" / "__init__.py").write_text(code)
    if version is not None:
        (packages / "bcc" / "version.py").write_text(version)
    return packages


def test_no_bcc(tmp_path: Path, python: str) -> None:
    assert bcc_version() is None
    with pytest.raises(BccNotFound, match=f"no module named bcc for {python}"):
        working_bcc()
    with pytest.raises(BccNotFound, match=f"no module named bcc for {python}"):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])


def test_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch)
    assert bcc_version() is None
    with pytest.raises(BccNotFound, match="any Python"):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])


def test_a_folder_of_that_name_is_no_bcc(python: str) -> None:
    (package(python, None) / "bcc" / "__init__.py").unlink()
    assert bcc_version() is None


def test_a_bcc_that_does_not_load(tmp_path: Path, python: str) -> None:
    """Its shared library is of another LLVM, say; nothing of that happens in this process."""
    reason = "libbcc.so.0: cannot open shared object file"
    package(python, None, f"raise OSError('{reason}')")
    before = sys.modules.get("bcc")
    with pytest.raises(BccNotFound, match=f"{python}: {reason}"):
        working_bcc()
    assert sys.modules.get("bcc") is before
    with pytest.raises(BccNotFound, match=reason):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])


def test_a_bcc_that_is_there(python: str) -> None:
    package(python, "__version__ = '0.26.0'\n")
    before = sys.modules.get("bcc")
    assert working_bcc() == (python, "0.26.0")
    assert bcc_version() == "0.26.0"
    assert sys.modules.get("bcc") is before


@pytest.mark.parametrize("version", [None, "", "version = 7"])
def test_a_version_that_is_not_told(python: str, version: str | None) -> None:
    package(python, version)
    assert bcc_version() == "unknown"


BROKEN = {
    "without one": None,
    "with one that does not load": "raise ImportError('of another Python')",
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN.keys())
def test_the_next_python_is_asked(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch, code: str | None
) -> None:
    """As on RHEL 8, where another Python than the distribution's runs us: bcc is for the latter."""
    other = tmp_path / "other"
    venv.create(other, symlinks=True)
    first = str(other / "bin" / "python")
    use(monkeypatch, str(tmp_path / "gone"), first, python)
    if code is not None:
        package(first, None, code)
    package(python, "__version__ = '0.25.0'", "class BPF:\n    def __init__(self, **_): raise Exception('ours')")
    assert working_bcc() == (python, "0.25.0")
    with pytest.raises(CompilerFailed, match="ours"):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])


def test_ours_is_asked_first_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("python3.6", "python3.11", "python3.9", "python3.9-config", "python3.x"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python3").symlink_to("python3.9")
    (tmp_path / "platform-python").symlink_to("python3.6")
    (tmp_path / "python3.7").write_text("cannot be run")
    monkeypatch.setattr(compiler, "SYSTEM_FOLDER", str(tmp_path))
    monkeypatch.setattr(compiler, "SYSTEM_PYTHONS", (str(tmp_path / "python3"), str(tmp_path / "platform-python")))
    names = [sys.executable, *(str(tmp_path / name) for name in ("python3", "platform-python", "python3.11"))]
    assert compiler.pythons() == names


def test_the_child_is_plain_enough_for_the_oldest_python() -> None:
    """RHEL 8's own is 3.6."""
    text = Path(bpf.compile.__file__).read_text()
    ast.parse(text, feature_version=(3, 6))
    assert "annotations" not in text


@pytest.mark.parametrize(
    ("end", "reason", "lasting"),
    [("os.abort()", r"\(0, 0\)", True), ("os.kill(os.getpid(), 9)", "was killed", False)],
    ids=["aborts", "is killed"],
)
def test_a_compiler_that_dies_leaves_no_core_file(
    tmp_path: Path, python: str, end: str, reason: str, lasting: bool
) -> None:
    """LLVM 11 aborts at an instruction that it lacks, and would do so again."""
    told = "import os, resource, sys; print(resource.getrlimit(resource.RLIMIT_CORE), file=sys.stderr, flush=True); "
    package(python, None, told + end)
    with pytest.raises(CompilerFailed, match=reason) as caught:
        compile_apart(tmp_path / "program.c", tmp_path, [], ["on_done"])
    assert caught.value.lasting is lasting


DYING = {
    "a fatal signal": ("import os; os.abort()", "status -6"),
    "an error of clang": (
        "import sys\nclass BPF:\n    def __init__(self, **_):\n"
        "        print('main.c:3: error: no such thing', file=sys.stderr)\n        raise Exception('failed')",
        "main.c:3: error: no such thing",
    ),
}


@pytest.mark.parametrize(("code", "reason"), DYING.values(), ids=DYING.keys())
def test_a_compiler_that_dies(tmp_path: Path, python: str, code: str, reason: str) -> None:
    """It takes nobody along, and what it said is told."""
    package(python, None, code)
    with pytest.raises(CompilerFailed, match=reason):
        compile_apart(tmp_path / "program.c", tmp_path, [], ["on_done"])


def test_a_compiler_that_hangs(tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package(python, None, "import time; time.sleep(600)")
    assert bcc_version() == "unknown"
    monkeypatch.setattr(compiler, "TIMEOUT_S", 0.5)
    with pytest.raises(CompilerFailed, match="could not be run"):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])
    with pytest.raises(CompilerFailed, match="timed out"):
        working_bcc()


TELLING = """
import json, os, sys, types
class BPF:
    def __init__(self, **given):
        raise Exception("error: " + json.dumps([dict(os.environ), repr(given), sys.flags.isolated, os.getcwd()]))
"""


def test_what_the_child_is_told(tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of headers, and nothing of the environment that bcc, clang or Python would listen to."""
    for name in ("ARCH", "CPATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "BCC_KERNEL_SOURCE", "HOME"):
        monkeypatch.setenv(name, "/nonexistent")
    package(python, None, TELLING)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CompilerFailed) as caught:
        compile_apart(Path("a.c"), tmp_path, ["-DX=1"], ["on_done"])
    environment, arguments, isolated, folder = json.loads(str(caught.value).partition(": ")[2])
    assert environment.pop("BCC_KERNEL_SOURCE") == str(tmp_path)
    assert environment.keys() <= {"PATH", "LC_ALL", "LC_CTYPE"}
    assert "/nonexistent" not in environment.values()
    assert str(tmp_path / "a.c") in arguments
    assert "-DX=1" in arguments
    assert (isolated, folder) == (1, "/")


LIBRARY = """
#include <stddef.h>
#define MODULE 0x7f0012345678
int bpf_num_tables(size_t module) { return module == MODULE ? 1 : 99; }
const char *bpf_table_name(size_t module, size_t id) { return module == MODULE ? "requests" : NULL; }
int bpf_table_fd_id(size_t module, size_t id) { return module == MODULE ? 7 : -1; }
int bpf_table_type_id(size_t module, size_t id) { return module == MODULE ? 1 : -1; }
size_t bpf_table_key_size_id(size_t module, size_t id) { return module == MODULE ? 4 : 0; }
size_t bpf_table_leaf_size_id(size_t module, size_t id) { return module == MODULE ? 8 : 0; }
size_t bpf_table_max_entries_id(size_t module, size_t id) { return module == MODULE ? 16 : 0; }
int bpf_table_flags_id(size_t module, size_t id) { return module == MODULE ? 0 : -1; }
const char *bpf_function_start(size_t module, const char *name) { return module == MODULE ? "instruct" : NULL; }
size_t bpf_function_size(size_t module, const char *name) { return module == MODULE ? 8 : 0; }
"""
BINDING = """
import ctypes, types
class BPF:
    def __init__(self, **_): self.module = 0x7f0012345678
libbcc = types.SimpleNamespace(lib=ctypes.CDLL({library!r}))
"""


def test_a_module_at_a_high_address(tmp_path: Path, python: str) -> None:
    """As where Python is position independent: RHEL's, Ubuntu's, pyenv's. bcc declares half of these functions."""
    require(shutil.which("gcc"), "gcc is not installed")
    source, library = tmp_path / "bcc.c", str(tmp_path / "bcc.so")
    source.write_text(LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    package(python, "__version__ = '0.1'", BINDING.format(library=library))
    compiled, _ = compile_apart(tmp_path / "program.c", tmp_path, [], ["on_done"])
    assert compiled == Compiled((MapShape("requests", 1, 4, 8, 16, 0),), {"on_done": b"instruct"})


def outcome(code: bytes, **changed: object) -> bytes:
    """As bpf/compile.py writes it: two maps that had the descriptors 7 and 9."""
    good = {
        "maps": [["requests", 1, 4, 8, 16, 0], ["overflow", 2, 4, 8, 16, 0]],
        "descriptors": [7, 9],
        "programs": {"on_done": base64.b64encode(code).decode()},
    }
    return json.dumps({**good, **changed}).encode()


def test_a_map_goes_by_its_place_and_no_more_by_the_descriptor_in_the_child() -> None:
    compiled = from_child(outcome(constant_of(MAP | 1, 9) + constant_of(MAP | 1, 7) + constant_of(0, 9)))
    assert [shape.name for shape in compiled.maps] == ["requests", "overflow"]
    assert compiled.programs["on_done"] == constant_of(MAP | 1, 1) + constant_of(MAP | 1, 0) + constant_of(0, 9)


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"[]",
        outcome(constant_of(MAP, 8)),
        outcome(b"odd"),
        outcome(b""),
        outcome(instruction(PLAIN), maps=[["requests", 1]]),
        outcome(instruction(PLAIN), programs=[]),
        outcome(instruction(PLAIN), descriptors=None),
    ],
)
def test_a_child_that_tells_something_else(told: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        from_child(told)


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("a warning\nmain.c:1: error: bad\nfailed\n", "main.c:1: error: bad"),
        ("one\n\n two \n", "two"),
        ("", "the compiler ended with status 1"),
    ],
)
def test_one_line_of_what_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, told: str) -> None:
    monkeypatch.setattr(compiler, "_first_with_bcc", lambda *_: ("python3", 1, b"", printed))
    with pytest.raises(CompilerFailed) as caught:
        compile_apart(tmp_path / "program.c", tmp_path, [], [])
    assert str(caught.value) == told
    assert caught.value.__notes__ == [printed]
