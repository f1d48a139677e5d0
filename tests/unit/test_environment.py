"""Folders that others could put something into are found, whichever folder on the way it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.environment import PATH, clean, why_not

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path / "a" / "b"


def test_ours_will_do(folder: Path) -> None:
    assert why_not(str(folder)) is None
    assert why_not(str(folder / "not" / "there")) is None
    assert why_not("/usr/bin") is None
    assert why_not("/bin") is None, "a link on many systems"


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o770, 0o1775])
@pytest.mark.parametrize("up", [0, 1])
def test_one_that_others_may_write_to(folder: Path, mode: int, up: int) -> None:
    place = [folder, folder.parent][up]
    place.chmod(mode)
    if mode & 0o1000 and os.geteuid() == 0 and up:
        assert why_not(str(folder)) is None, "what is ours there cannot be exchanged"
        return
    assert str(place) in str(why_not(str(folder)))


def test_one_like_tmp(folder: Path) -> None:
    require(os.geteuid() == 0, "only root makes one that all take for such")
    folder.chmod(0o1777)
    assert "everybody may write" in str(why_not(str(folder)))
    assert why_not(str(folder), shared=True) is None
    assert "everybody may make it" in str(why_not(str(folder / "gone")))
    (folder / "x").mkdir()
    assert why_not(str(folder / "x")) is None
    os.chown(folder / "x", NOBODY, NOBODY)
    assert "belongs to user" in str(why_not(str(folder / "x"), shared=True))


def test_one_of_another_user(folder: Path) -> None:
    require(os.geteuid() == 0, "only root gives folders away")
    os.chown(folder.parent, NOBODY, NOBODY)
    assert f"{folder.parent} belongs to user {NOBODY}" == why_not(str(folder))


def test_links_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert why_not(str(tmp_path / "link" / "b")) is None
    assert why_not(str(tmp_path / "dangling" / "b")) is None
    assert "link too many" in str(why_not(str(tmp_path / "round")))
    folder.parent.chmod(0o777)
    assert "other users may write" in str(why_not(str(tmp_path / "link" / "b")))


@pytest.mark.parametrize("odd", ["", ".", "bin", "~/bin", "./x"])
def test_no_path_from_the_root(odd: str) -> None:
    assert "absolute" in str(why_not(odd))


def test_what_is_left(folder: Path) -> None:
    open_to_all = folder / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    given = {"PATH": f"{open_to_all}::/usr/bin:{folder}", "TMPDIR": str(open_to_all), "XDG_CACHE_HOME": str(folder)}
    told = clean(given)
    assert given == {"PATH": f"/usr/bin:{folder}", "XDG_CACHE_HOME": str(folder)}
    assert len(told) == 3
    assert clean(given) == []


@pytest.mark.parametrize("given", [{}, {"PATH": "."}, {"PATH": ""}])
def test_there_is_a_path(given: dict[str, str]) -> None:
    clean(given)
    assert set(given["PATH"].split(":")) <= set(PATH.split(":"))
    assert "/usr/bin" in given["PATH"].split(":")
