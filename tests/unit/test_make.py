"""`make demo` and `make test` get root by themselves, and what root made in the tree goes back to its owner."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
TOOLS = ("make", "sh", "bash", "id", "stat", "find", "chown", "awk", "echo", "touch", "mkdir")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A tree with our Makefile that all may enter, and PATH with little in it."""
    require(shutil.which("make"), "make is not installed")
    with tempfile.TemporaryDirectory() as around:
        Path(around).chmod(0o755)
        made = Path(around) / "tree"
        made.mkdir()
        made.chmod(0o777)
        shutil.copy(ROOT / "Makefile", made)
        (made / "path").mkdir()
        for name in TOOLS:
            (made / "path" / name).symlink_to(str(shutil.which(name)))
        yield made


def make(folder: Path, *words: str, user: int = NOBODY, **environment: str) -> subprocess.CompletedProcess[str]:
    def become() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)

    return subprocess.run(
        [str(folder / "path/make"), *words],
        cwd=folder,
        env={"PATH": str(folder / "path"), **environment},
        preexec_fn=become,
        capture_output=True,
        text=True,
    )


def with_sudo(folder: Path) -> None:
    (folder / "path/sudo").write_text('#!/bin/sh\necho "sudo $@"\nexit 7\n')
    (folder / "path/sudo").chmod(0o755)


@pytest.mark.parametrize("goal", ["demo", "test", "test-matrix", "bench", "soak"])
def test_sudo_is_asked(folder: Path, goal: str) -> None:
    """With what tests and benches listen to, and what was set on the command line; its status is ours."""
    with_sudo(folder)
    done = make(folder, goal, "PYTHON=/x", CI="true", AIO_TRACE_REPEAT="3", LD_PRELOAD="")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("sudo "))
    _, kept, *rest = line.split()
    assert set(kept.partition("=")[2].split(",")) == {"CI", "AIO_TRACE_REPEAT"}
    assert rest == ["make", "PYTHON=/x", goal]
    assert done.returncode == 2
    assert "Error 7" in done.stderr


@pytest.mark.parametrize("goal", ["help", "clean"])
def test_sudo_is_not_asked_for_what_needs_no_root(folder: Path, goal: str) -> None:
    with_sudo(folder)
    assert "sudo" not in make(folder, "-n", goal).stdout.replace("make", "")


def test_without_sudo_it_is_said(folder: Path) -> None:
    done = make(folder, "demo")
    assert done.returncode == 2
    assert "this needs root, and there is no sudo: make demo, as root" in done.stderr


def test_root_needs_no_sudo(folder: Path) -> None:
    require(os.geteuid() == 0, "only root is root")
    printed = make(folder, "-n", "demo", user=0).stdout
    assert "bash .ci/packages" in printed
    assert "sudo" not in printed.replace("there is no sudo", "")


def test_what_root_made_goes_back(folder: Path) -> None:
    """But nothing outside of the tree, whatever leads there, and nothing of anybody else's."""
    require(os.geteuid() == 0, "only root gives files away")
    outside = folder.parent / "outside"
    outside.write_text("")
    (folder / ".venv").mkdir()
    (folder / ".venv/made").write_text("")
    (folder / "link").symlink_to(outside)
    os.link(outside, folder / "hard")
    (folder / "other").write_text("")
    os.chown(folder / "other", 1234, 1234)
    os.chown(folder, NOBODY, NOBODY)
    (folder / "Makefile").write_text(
        (ROOT / "Makefile").read_text().replace("else\n", "else\nback: ; @$(GIVE_BACK)\n", 1)
    )
    done = make(folder, "back", user=0)
    assert done.returncode == 0, done.stderr
    owners = {name: (folder / name).lstat().st_uid for name in (".venv", ".venv/made", "link", "hard", "other")}
    assert owners == {".venv": NOBODY, ".venv/made": NOBODY, "link": NOBODY, "hard": 0, "other": 1234}
    assert outside.stat().st_uid == 0
