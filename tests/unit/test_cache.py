"""The cache between runs, in real folders: what could be somebody else's is not believed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import require
from tracer import cache
from tracer.lab.guest import cache_folder

KIND = "things"
KEY = b"a key"
NOBODY = 65534
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """XDG_CACHE_HOME, not made yet; below /tmp, as a rule, which all may write to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache.refusals.clear()
    return tmp_path / "home"


def kept(home: Path) -> Path:
    """The only file that is kept."""
    (file,) = (home / "aio-trace" / KIND).iterdir()
    return file


def refused(reason: str) -> bool:
    """Nothing is loaded, and for this reason."""
    loaded = cache.load(KIND, KEY)
    return loaded is None and reason in cache.refusals[-1]


def test_what_tests_throw_away_holds_no_downloads() -> None:
    """The tests' cache goes with them; kernels and whole releases are fetched once."""
    assert not cache_folder().is_relative_to(os.environ["XDG_CACHE_HOME"])


def test_what_was_stored_is_loaded(home: Path) -> None:
    assert cache.load(KIND, KEY) is None
    assert not home.exists()
    cache.store(KIND, KEY, b"content\0" * 1000)
    assert cache.load(KIND, KEY) == b"content\0" * 1000
    assert not cache.refusals


def test_the_last_one_stored_counts(home: Path) -> None:
    for content in (b"first", b"", b"last"):
        cache.store(KIND, KEY, content)
        assert cache.load(KIND, KEY) == content
    assert kept(home).is_file()


def test_keys_and_kinds_are_apart(home: Path) -> None:
    cache.store(KIND, KEY, b"content")
    assert cache.load(KIND, KEY + b"\0") is None
    assert cache.load("others", KEY) is None
    assert not cache.refusals


def test_only_its_owner_may_read_or_write_it(home: Path) -> None:
    before = os.umask(0)
    try:
        cache.store(KIND, KEY, b"content")
    finally:
        os.umask(before)
    file = kept(home)
    assert [path.stat().st_mode & 0o777 for path in (home, home / "aio-trace", file.parent, file)] == [
        0o700,
        0o700,
        0o700,
        0o600,
    ]


@pytest.mark.parametrize("below", ["", "aio-trace", f"aio-trace/{KIND}"])
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to(home: Path, below: str, mode: int) -> None:
    cache.store(KIND, KEY, b"content")
    before = kept(home).read_bytes()
    (home / below).chmod(mode)
    # A folder like /tmp may be above ours, as long as it is root's.
    if mode == 0o1777 and os.geteuid() == 0 and below != f"aio-trace/{KIND}":
        assert cache.load(KIND, KEY) == b"content"
        return
    assert refused("may write to")
    cache.store(KIND, KEY, b"other")
    assert kept(home).read_bytes() == before


@pytest.mark.parametrize("below", ["", "aio-trace", f"aio-trace/{KIND}"])
def test_a_folder_of_another_user(home: Path, below: str) -> None:
    require(os.geteuid() == 0, "root, to give a folder away")
    cache.store(KIND, KEY, b"content")
    before = kept(home).read_bytes()
    os.chown(home / below, NOBODY, NOBODY)
    assert refused(f"belongs to user {NOBODY}")
    cache.store(KIND, KEY, b"other")
    assert kept(home).read_bytes() == before


def test_a_user_does_not_take_roots_folder_in_a_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    require(os.geteuid() == 0, "root, to be somebody else")
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        cache.store(KIND, KEY, b"content")
        for path in (home, f"{home}/aio-trace", f"{home}/aio-trace/{KIND}", kept(Path(home))):
            os.chmod(path, 0o755)
        assert cache.load(KIND, KEY) == b"content"
        program = f"""
import os
from tracer import cache
from tracer.lab.guest import cache_folder
os.seteuid({NOBODY})
cache.store({KIND!r}, {KEY!r}, b"other")
print(cache.load({KIND!r}, {KEY!r}))
print(*cache.refusals, sep="\\n")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.splitlines() == ["None", *[f"{KIND}: {home} belongs to user 0"] * 2]
        assert cache.load(KIND, KEY) == b"content"


@pytest.mark.parametrize("below", ["", "aio-trace", f"aio-trace/{KIND}"])
def test_a_folder_that_is_a_link(home: Path, below: str) -> None:
    cache.store(KIND, KEY, b"content")
    before = kept(home).read_bytes()
    elsewhere = home.with_name("elsewhere")
    (home / below).rename(elsewhere)
    (home / below).symlink_to(elsewhere)
    assert refused("Not a directory")
    cache.store(KIND, KEY, b"other")
    (home / below).unlink()
    elsewhere.rename(home / below)
    assert kept(home).read_bytes() == before


def test_a_folder_that_is_a_file(home: Path) -> None:
    home.write_text("")
    cache.store(KIND, KEY, b"content")
    assert refused("Not a directory")


@pytest.mark.parametrize("path", ["relative", "./relative", "", "/tmp/../tmp"])
def test_a_path_that_is_not_one(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", path)
    monkeypatch.setenv("HOME", "relative")
    # The empty one is as good as none, and root's folder does not depend on the environment.
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    cache.store(KIND, KEY, b"content")
    assert refused("not the absolute path")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_a_link(home: Path) -> None:
    cache.store(KIND, KEY, b"content")
    file = kept(home)
    file.rename(home / "elsewhere")
    file.symlink_to(home / "elsewhere")
    assert refused("symbolic links")
    cache.store(KIND, KEY, b"other")
    assert cache.load(KIND, KEY) == b"other"
    assert b"other" not in (home / "elsewhere").read_bytes()


def test_a_file_with_two_names(home: Path) -> None:
    cache.store(KIND, KEY, b"content")
    os.link(kept(home), home / "elsewhere")
    assert refused("has 2 names")
    cache.store(KIND, KEY, b"other")
    assert cache.load(KIND, KEY) == b"other"
    assert b"content" in (home / "elsewhere").read_bytes()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to(home: Path, mode: int) -> None:
    cache.store(KIND, KEY, b"content")
    kept(home).chmod(mode)
    assert refused("may write to")


def test_a_file_of_another_user(home: Path) -> None:
    require(os.geteuid() == 0, "root, to give a file away")
    cache.store(KIND, KEY, b"content")
    os.chown(kept(home), NOBODY, NOBODY)
    assert refused(f"belongs to user {NOBODY}")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(str(path))])
def test_something_that_is_no_file(home: Path, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(make)
    cache.store(KIND, KEY, b"content")
    file = kept(home)
    file.unlink()
    monkeypatch.chdir(file.parent)  # a socket's path is short
    make(Path(file.name))
    assert cache.load(KIND, KEY) is None
    assert cache.refusals
    cache.store(KIND, KEY, b"content")


def test_damage_anywhere_is_seen(home: Path) -> None:
    cache.store(KIND, KEY, b"content")
    whole = kept(home).read_bytes()
    damaged = [
        whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :] for position in range(len(whole))
    ]
    cut = [whole[:length] for length in range(len(whole))]
    for wrong in [*damaged, *cut, whole + b"\0"]:
        kept(home).write_bytes(wrong)
        assert refused("is damaged")
    kept(home).write_bytes(whole)
    assert cache.load(KIND, KEY) == b"content"


def test_a_file_kept_for_another_key_or_kind(home: Path) -> None:
    cache.store(KIND, KEY, b"content")
    file = kept(home)
    whole = file.read_bytes()
    for kind, key in ((KIND, b"another key"), ("others", KEY)):
        cache.store(kind, key, b"other")
        theirs = next(path for path in (home / "aio-trace" / kind).iterdir() if path != file)
        theirs.rename(file)
        assert refused("kept for something else")
        file.write_bytes(whole)
        assert cache.load(KIND, KEY) == b"content"


def test_the_newest_are_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEEP", 5)
    for number in range(8):
        cache.store(KIND, b"%d" % number, b"content")
        for file in (home / "aio-trace" / KIND).iterdir():  # as if stored a minute apart
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 60_000_000_000))
    loaded = [cache.load(KIND, b"%d" % number) for number in range(8)]
    assert loaded == [None] * 3 + [b"content"] * 5


def test_what_is_too_large_is_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGEST", 100)
    cache.store(KIND, KEY, bytes(101))
    assert cache.load(KIND, KEY) is None
    cache.store(KIND, KEY, bytes(100))
    assert cache.load(KIND, KEY) == bytes(100)


def test_readers_never_see_half_of_it(home: Path) -> None:
    """Two writers at work while this one reads: always one content or the other."""
    contents = [bytes([digit]) * 100_000 for digit in b"AB"]
    program = f"""
import sys
from tracer import cache
from tracer.lab.guest import cache_folder
for _ in range(300):
    cache.store({KIND!r}, {KEY!r}, sys.argv[1].encode() * 100_000)
"""
    cache.store(KIND, KEY, contents[0])
    writers = [subprocess.Popen([sys.executable, "-c", program, letter], cwd=ROOT) for letter in "AB"]
    while any(writer.poll() is None for writer in writers):
        assert cache.load(KIND, KEY) in contents
    assert [writer.returncode for writer in writers] == [0, 0]
    assert not cache.refusals
