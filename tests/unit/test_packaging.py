"""The wheel holds all that an installed aio-trace needs, and works away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

import tracer
from tests.conftest import require

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("tracer", "bpf", "cli.py", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy: setuptools takes up leftovers of earlier builds."""
    require(int(version("setuptools").split(".")[0]) >= 77, "setuptools 77 builds the wheel: make check")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w")
    run(sys.executable, *build, folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was installed."""
    site = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=site)
    return site


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {"cli.py"} | {
        path.relative_to(ROOT).as_posix()
        for folder in ("tracer", "bpf")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.startswith("bpf/include/") for name in expected)
    assert any(name.endswith(".c") for name in expected)
    assert expected - set(ZipFile(wheel).namelist()) == set()


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in ZipFile(wheel).namelist()}
    metadata = f"aio_trace-{tracer.__version__}.dist-info"
    assert tops == {"cli.py", "tracer", "bpf", metadata}


def test_installed_wheel_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "aio-trace"
    assert "Usage:" in run(sys.executable, script, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    places = "import bpf, cli, tracer; print(bpf.__file__, cli.__file__, tracer.__file__)"
    printed = run(sys.executable, "-c", places, cwd=tmp_path, PYTHONPATH=str(installed))
    assert all(Path(place).is_relative_to(installed) for place in printed.split())
