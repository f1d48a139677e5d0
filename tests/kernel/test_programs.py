"""Programs that were compiled before: used when they are what would be compiled now and the kernel takes them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.attaching import ALERT_ONLY, Variant, attached, counts, load, open_kernel_objects
from tests.kernel.miniature import ELEMENT, Miniature
from tracer import cache, probes
from tracer.compiler import Compiled, CompilerFailed, compile_apart
from tracer.errors import NotPermitted, ProbeError
from tracer.probes import DEFAULT_PARAMETERS, Parameters, compile_flags, programs

Key = tuple[list[str], list[str]]


class Compilations:
    """compile_apart() with a count; what it was asked for last."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, source: Path, include: Path, flags: Sequence[str], names: Sequence[str]) -> tuple[Compiled, str]:
        """Compile, and count."""
        self.count += 1
        return compile_apart(source, include, flags, names)


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is kept yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compilations]:
    counted = Compilations()
    monkeypatch.setattr(probes, "compile_apart", counted)
    yield counted


def key_of(pool: Miniature, what: Parameters = DEFAULT_PARAMETERS) -> bytes:
    """Under what the programs for the pool are kept."""
    sites = list(pool.sites.values())
    return probes._key(compile_flags(sites, ELEMENT, what, True), list(programs(sites)))


def works(pool: Miniature, names: tuple[str, ...] = ("submit", "done", "callback")) -> None:
    with attached(pool, names) as loaded:
        pool.do("r23")
        assert counts(loaded)["completed"] == 23


def test_the_second_time_nothing_is_compiled(pool: Miniature, variant: Variant, compilations: Compilations) -> None:
    works(pool)
    assert compilations.count == 1
    works(pool)
    assert compilations.count == 1
    works(pool, ALERT_ONLY)
    assert compilations.count == 2


def test_without_the_compiler(pool: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even bcc is needed for what was compiled before."""
    works(pool)

    def forbidden(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(probes, "compile_apart", forbidden)
    works(pool)


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda good: b"",
    "no JSON": lambda good: b"\0\1\2",
    "other JSON": lambda good: b"[]",
    "no programs": lambda good: b'{"maps": [], "programs": {}}',
    "no maps": lambda good: replace(Compiled.from_bytes(good), maps=()).to_bytes(),
    "a program less": lambda good: without_submit(Compiled.from_bytes(good)).to_bytes(),
    "half": lambda good: good[: len(good) // 2],
}


def without_submit(made: Compiled) -> Compiled:
    return replace(made, programs={name: code for name, code in made.programs.items() if name != "on_submit"})


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_cannot_be_read_is_compiled_again(
    pool: Miniature, compilations: Compilations, garbage: Callable[[bytes], bytes]
) -> None:
    works(pool)
    key = key_of(pool)
    good = cache.load("programs", key)
    assert good is not None
    cache.store("programs", key, garbage(good))
    works(pool)
    assert compilations.count == 2
    assert cache.load("programs", key) == good


def changed(good: bytes, change: Callable[[Compiled], Compiled]) -> bytes:
    return change(Compiled.from_bytes(good)).to_bytes()


def with_code(made: Compiled, code: bytes) -> Compiled:
    return replace(made, programs={**made.programs, "on_done": code})


# No return; a read through nothing; no such instruction; an endless loop.
REFUSED = {
    "no end": struct.pack("<BBhi", 0xB7, 0, 0, 0),
    "a wild read": struct.pack("<BBhiBBhi", 0x79, 0x00, 0, 0, 0x95, 0, 0, 0),
    "no instruction": b"\xff" * 8 + struct.pack("<BBhi", 0x95, 0, 0, 0),
}


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED.keys())
def test_what_the_kernel_refuses_is_compiled_again(pool: Miniature, compilations: Compilations, code: bytes) -> None:
    """The verifier looks at what was kept as it looks at all: the worst that can come of it is a compilation."""
    works(pool)
    key, held = key_of(pool), open_kernel_objects()
    good = cache.load("programs", key)
    assert good is not None
    cache.store("programs", key, changed(good, lambda made: with_code(made, code)))
    works(pool)
    assert compilations.count == 2
    assert cache.load("programs", key) == good
    assert open_kernel_objects() == held


def test_a_map_that_the_kernel_refuses(pool: Miniature, compilations: Compilations) -> None:
    works(pool)
    key = key_of(pool)
    good = cache.load("programs", key)
    assert good is not None
    strange = [replace(shape, kind=9999) for shape in Compiled.from_bytes(good).maps]
    cache.store("programs", key, changed(good, lambda made: replace(made, maps=tuple(strange))))
    works(pool)
    assert compilations.count == 2


def test_what_decides_is_in_the_key(pool: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, names of programs, every source, bcc and the kernel."""
    keys = {key_of(pool), key_of(pool, Parameters(shared=True)), key_of(pool, Parameters(set_bits=3))}
    keys.add(key_of(pool, Parameters(extra_flags=("-DCOUNT_OPERATIONS=1",))))
    keys.add(probes._key(compile_flags(list(pool.sites.values()), ELEMENT, DEFAULT_PARAMETERS, True), ["on_done"]))
    for change in ("bcc_version", "source_folder", "aio_trace.h", "asm/page.h"):
        folder = tmp_path / change.replace("/", "-")
        with monkeypatch.context() as patch:
            if change == "bcc_version":
                patch.setattr(probes, "bcc_version", lambda: "another")
            else:
                copy_sources(folder, change)
                patch.setattr(probes, "source_folder", lambda folder=folder: folder)
            keys.add(key_of(pool))
    assert len(keys) == 9
    assert key_of(pool) in keys


def copy_sources(folder: Path, changed_file: str) -> None:
    for path in sorted(probes.source_folder().rglob("*.[ch]")):
        copy = folder / path.relative_to(probes.source_folder())
        copy.parent.mkdir(parents=True, exist_ok=True)
        more = "/* */" if str(copy).endswith(changed_file) else ""
        copy.write_text(path.read_text() + more)


def test_a_changed_source_is_compiled(
    pool: Miniature, compilations: Compilations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bpf"
    copy_sources(folder, "")
    monkeypatch.setattr(probes, "source_folder", lambda: folder)
    works(pool)
    source = folder / "aio_trace.c"
    text = source.read_text()
    source.write_text(text.replace("add(&s->completed, 1);", "add(&s->completed, 2);"))
    with attached(pool) as loaded:
        pool.do("r23")
        assert counts(loaded)["completed"] == 46
    assert compilations.count == 2
    source.write_text(text)
    works(pool)
    assert compilations.count == 2


def test_no_cache_at_all(pool: Miniature, compilations: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be kept safely, everything works, only later."""
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    works(pool)
    works(pool)
    assert compilations.count == 2


def test_programs_for_old_kernels_come_second(
    pool: Miniature, monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    """Where compare and exchange is refused, by the compiler or by the kernel."""
    whole = Compilations()

    def refused(source: Path, include: Path, flags: Sequence[str], names: Sequence[str]) -> tuple[Compiled, str]:
        if "-DHAVE_ATOMICS=1" in flags:
            raise CompilerFailed("error: unsupported instruction")
        return whole(source, include, flags, names)

    monkeypatch.setattr(probes, "compile_apart", refused)
    works(pool)
    works(pool)
    assert whole.count == 1


@pytest.mark.parametrize(
    ("words", "kind"),
    [("Permission denied", NotPermitted), ("Operation not permitted", NotPermitted), ("Invalid argument", ProbeError)],
)
def test_what_the_kernel_says_is_translated(
    pool: Miniature, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[Exception]
) -> None:
    """Nothing stays open of what it did not want."""
    held = open_kernel_objects()

    def refuse(*_: object) -> int:
        raise OSError(1, words)

    monkeypatch.setattr(probes.kernel, "load", refuse)
    with pytest.raises(kind, match=words):
        load(pool)
    assert open_kernel_objects() == held


def test_what_the_verifier_says_is_kept(pool: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its "permission denied" is not about permissions; its words are the note."""
    instructions = Compiled.instructions

    def broken(made: Compiled, name: str, fds: Sequence[int]) -> bytes:
        return REFUSED["a wild read"] if name == "on_done" else instructions(made, name, fds)

    monkeypatch.setattr(Compiled, "instructions", broken)
    with pytest.raises(ProbeError) as caught:
        load(pool)
    assert not isinstance(caught.value, NotPermitted)
    assert any("processed " in note for note in caught.value.__notes__)
