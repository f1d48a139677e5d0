"""Programs that were compiled before: used when they are what would be compiled now and the kernel takes them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import bpf
from tests.kernel.attaching import ALERT_ONLY, attached, counts, load, open_kernel_objects
from tests.kernel.miniature import ELEMENT, Miniature, sites_of
from tracer import cache, probes
from tracer.compiler import BccNotFound, Compiled, CompilerFailed, compile_apart
from tracer.errors import BccMissing, NotPermitted, ProbeError
from tracer.probes import DEFAULT_PARAMETERS, Parameters, compile_flags, programs


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
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    counted = Compilations()
    monkeypatch.setattr(probes, "compile_apart", counted)
    return counted


def key_of(pool: Miniature, what: Parameters = DEFAULT_PARAMETERS) -> bytes:
    """Under what the programs for the pool are kept."""
    sites = list(pool.sites.values())
    return probes._key(compile_flags(sites, ELEMENT, what, True), list(programs(sites)))


def works(pool: Miniature, names: tuple[str, ...] = ("submit", "done", "callback")) -> None:
    with attached(pool, names) as loaded:
        pool.do("r23")
        assert counts(loaded)["completed"] == 23


def test_the_second_time_nothing_is_compiled(
    pool: Miniature, compilations: Compilations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even bcc is needed for what was compiled before."""
    works(pool)
    assert compilations.count == 1
    works(pool, ALERT_ONLY)
    assert compilations.count == 2

    def forbidden(*_: object) -> None:
        raise BccNotFound("no module named bcc")

    monkeypatch.setattr(probes, "compile_apart", forbidden)
    works(pool)
    works(pool, ALERT_ONLY)
    with pytest.raises(BccMissing):
        load(pool, what=Parameters(set_bits=3))


@pytest.fixture(scope="module")
def good(program: Path) -> Compiled:
    """The programs for the pool, as they are kept."""
    sites = list(sites_of(program).values())
    folder = probes.source_folder()
    flags = compile_flags(sites, ELEMENT, DEFAULT_PARAMETERS, True)
    return compile_apart(folder / "aio_trace.c", folder, flags, list(programs(sites)))[0]


def with_code(made: Compiled, code: bytes | None) -> Compiled:
    """With other instructions, or none, for one program."""
    others = {name: kept for name, kept in made.programs.items() if name != "on_done"}
    return replace(made, programs={**others, "on_done": code} if code else others)


# Without an end; a read through nothing; no instruction at all.
NO_END = struct.pack("<BBhi", 0xB7, 0, 0, 0)
WILD_READ = struct.pack("<BBhiBBhi", 0x79, 0x00, 0, 0, 0x95, 0, 0, 0)
NO_INSTRUCTION = b"\xff" * 8 + struct.pack("<BBhi", 0x95, 0, 0, 0)

UNREADABLE: dict[str, Callable[[Compiled], bytes]] = {
    "nothing": lambda good: b"",
    "no JSON": lambda good: b"\0\1\2",
    "other JSON": lambda good: b"[]",
    "no programs": lambda good: b'{"maps": [], "programs": {}}',
    "no maps": lambda good: replace(good, maps=()).to_bytes(),
    "a program less": lambda good: with_code(good, None).to_bytes(),
    "half": lambda good: good.to_bytes()[:5000],
}
REFUSED: dict[str, Callable[[Compiled], bytes]] = {
    "no end": lambda good: with_code(good, NO_END).to_bytes(),
    "a wild read": lambda good: with_code(good, WILD_READ).to_bytes(),
    "no instruction": lambda good: with_code(good, NO_INSTRUCTION).to_bytes(),
    "no such map": lambda good: replace(good, maps=tuple(replace(each, kind=9999) for each in good.maps)).to_bytes(),
}
STRANGE = UNREADABLE | REFUSED


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE.keys())
def test_what_will_not_do_is_compiled_again(
    pool: Miniature, compilations: Compilations, good: Compiled, strange: Callable[[Compiled], bytes]
) -> None:
    """The kernel looks at what was kept as it looks at all: the worst that can come of it is a compilation."""
    probes._has_multi()
    key, held = key_of(pool), open_kernel_objects()
    cache.store("programs", key, good.to_bytes())
    load(pool).close()
    assert compilations.count == 0
    cache.store("programs", key, strange(good))
    works(pool)
    assert compilations.count == 1
    assert cache.load("programs", key) == good.to_bytes()
    assert open_kernel_objects() == held


def test_what_decides_is_in_the_key(pool: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, names of programs, every source, bcc and the kernel."""
    keys = {key_of(pool), key_of(pool, Parameters(shared=True)), key_of(pool, Parameters(set_bits=3))}
    keys.add(key_of(pool, Parameters(extra_flags=("-DCOUNT_OPERATIONS=1",))))
    keys.add(probes._key(compile_flags(list(pool.sites.values()), ELEMENT, DEFAULT_PARAMETERS, True), ["on_done"]))
    for change in ("bcc_version", "aio_trace.c", "aio_trace.h", "asm/page.h"):
        folder = tmp_path / change.replace("/", "-")
        with monkeypatch.context() as patch:
            if change == "bcc_version":
                patch.setattr(probes, "bcc_version", lambda: "another")
            else:
                copy_sources(folder, change)
                patch.setattr(bpf, "__path__", [str(folder)])
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
    monkeypatch.setattr(bpf, "__path__", [str(folder)])
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
    load(pool).close()
    assert compilations.count == 2


@pytest.mark.parametrize("lasting", [True, False], ids=["it would again", "it was in need"])
def test_what_the_compiler_cannot_do_is_asked_once(
    pool: Miniature, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """An old compiler has no compare and exchange, and takes long to say so; programs for old kernels come second."""
    whole, asked = Compilations(), 0

    def refused(source: Path, include: Path, flags: Sequence[str], names: Sequence[str]) -> tuple[Compiled, str]:
        nonlocal asked
        if "-DHAVE_ATOMICS=1" in flags:
            asked += 1
            failed = CompilerFailed("error: unsupported instruction")
            failed.lasting = lasting
            raise failed
        return whole(source, include, flags, names)

    monkeypatch.setattr(probes, "compile_apart", refused)
    works(pool)
    works(pool)
    assert (whole.count, asked) == (1, 1 if lasting else 2)
    monkeypatch.setattr(probes, "bcc_version", lambda: "another")
    works(pool)
    assert (whole.count, asked) == (2, 2 if lasting else 3)


def test_a_kernel_without_compare_and_exchange_is_not_compiled_for(
    pool: Miniature, monkeypatch: pytest.MonkeyPatch, compilations: Compilations
) -> None:
    monkeypatch.setattr(probes, "_has_atomics", lambda: False)
    works(pool)
    assert compilations.count == 1
    works(pool)
    assert compilations.count == 1


@pytest.mark.parametrize(
    ("words", "kind"),
    [("Permission denied", NotPermitted), ("Invalid argument", ProbeError)],
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
        return WILD_READ if name == "on_done" else instructions(made, name, fds)

    monkeypatch.setattr(Compiled, "instructions", broken)
    with pytest.raises(ProbeError) as caught:
        load(pool)
    assert not isinstance(caught.value, NotPermitted)
    assert any("processed " in note for note in caught.value.__notes__)
