"""What was compiled, to a file and back, and into instructions; no bcc is needed but to see whether it is there."""

from __future__ import annotations

import json
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer import compiler
from tracer.compiler import (
    BccNotFound,
    Compiled,
    CompilerFailed,
    MapShape,
    bcc_problem,
    bcc_version,
    compile_apart,
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


def package(folder: Path, version: str | None, code: str = "") -> Path:
    """A bcc of our own."""
    (folder / "bcc").mkdir()
    (folder / "bcc" / "__init__.py").write_text(code)
    if version is not None:
        (folder / "bcc" / "version.py").write_text(version)
    return folder


def found_in(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Python finds modules there, and the standard library's."""
    root = str(Path(compiler.__file__).parents[1])
    library = [path for path in sys.path if "packages" not in path]
    monkeypatch.setattr(sys, "path", [*map(str, folders), root, *library])
    monkeypatch.delitem(sys.modules, "bcc", raising=False)


def test_no_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found_in(monkeypatch, tmp_path)
    assert bcc_problem() == "no module named bcc"
    assert bcc_version() is None
    with pytest.raises(BccNotFound, match="No module named 'bcc'"):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])


def test_a_bcc_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shared library is of another LLVM, say; nothing of that happens in this process."""
    reason = "libbcc.so.0: cannot open shared object file"
    found_in(monkeypatch, package(tmp_path, None, f"raise OSError('{reason}')"))
    problem = bcc_problem()
    assert problem is not None
    assert reason in problem
    assert "bcc" not in sys.modules
    with pytest.raises(BccNotFound, match=reason):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])


def test_a_bcc_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found_in(monkeypatch, package(tmp_path, "__version__ = '0.26.0'\n"))
    assert bcc_problem() is None
    assert bcc_version() == "0.26.0"
    assert "bcc" not in sys.modules


@pytest.mark.parametrize("version", [None, "", "version = 7"])
def test_a_version_that_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    found_in(monkeypatch, package(tmp_path, version))
    assert bcc_version() == "unknown"


DYING = {
    "a fatal signal": ("import os; os.abort()", "status -6"),
    "an error of clang": (
        "import sys\nclass BPF:\n    def __init__(self, **_):\n"
        "        print('main.c:3: error: no such thing', file=sys.stderr)\n        raise Exception('failed')",
        "main.c:3: error: no such thing",
    ),
}


@pytest.mark.parametrize(("code", "reason"), DYING.values(), ids=DYING.keys())
def test_a_compiler_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    """It takes nobody along, and what it said is told."""
    found_in(monkeypatch, package(tmp_path, None, code))
    with pytest.raises(CompilerFailed, match=reason):
        compile_apart(tmp_path / "program.c", tmp_path, [], ["on_done"])


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found_in(monkeypatch, package(tmp_path, None, "import time; time.sleep(600)"))
    monkeypatch.setattr(compiler, "TIMEOUT_S", 0.5)
    with pytest.raises(CompilerFailed, match="could not be run"):
        compile_apart(tmp_path / "program.c", tmp_path, [], [])
    problem = bcc_problem()
    assert problem is not None
    assert "timed out" in problem


def test_what_the_child_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of headers, and nothing of the machine that somebody builds kernels for."""
    monkeypatch.setenv("ARCH", "arm64")
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nonexistent")
    seen: list[dict[str, str]] = []

    def child(_code: str, given: bytes, environment: dict[str, str]) -> tuple[int, bytes, str]:
        seen.append(environment)
        assert json.loads(given) == {"source": "a.c", "flags": ["-DX=1"], "programs": ["on_done"]}
        return 0, made(instruction(0x95)).to_bytes(), ""

    monkeypatch.setattr(compiler, "_child", child)
    compiled, printed = compile_apart(Path("a.c"), tmp_path, ["-DX=1"], ["on_done"])
    assert compiled == made(instruction(0x95))
    assert printed == ""
    assert seen[0]["BCC_KERNEL_SOURCE"] == str(tmp_path)
    assert "ARCH" not in seen[0]
    assert os.environ["ARCH"] == "arm64"


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("a warning\nmain.c:1: error: bad\nfailed\n", "main.c:1: error: bad"),
        ("one\n\n two \n", "two"),
        ("", "the compiler ended with status 1"),
    ],
)
def test_one_line_of_what_was_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, told: str) -> None:
    monkeypatch.setattr(compiler, "_child", lambda *_: (1, b"", printed))
    with pytest.raises(CompilerFailed) as caught:
        compile_apart(tmp_path / "program.c", tmp_path, [], [])
    assert str(caught.value) == told
    assert caught.value.__notes__ == [printed]
