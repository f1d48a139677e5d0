"""The wheel holds all that an installed aio-trace needs, and works away from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

import tracer
from tests.conftest import require

QEMU = "/usr/bin/qemu-img"
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("tracer", "bpf", "bin", "cli.py", "pyproject.toml", "README.md", "LICENSE")


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
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which it is installed; what it needs is taken from ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, system_site_packages=True)
    run(sys.executable, "-m", "pip", f"--python={folder}", "install", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return folder


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    """An environment in which everything leaves a file `taken` where it is run."""
    taken = f"open({str(tmp_path / 'taken')!r}, 'a').write(__file__ + '\\n')\n"
    home, path, cache = tmp_path / "home", tmp_path / "path", tmp_path / "cache"
    for name in ("usercustomize.py", "sitecustomize.py", "click.py", "cli.py", "os.py", "json.py", "bcc.py"):
        user = home / f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        for folder in (user, path):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(taken)
    (home / "startup.py").write_text(taken)
    (user / "user.pth").write_text("import usercustomize\n")
    for name in ("python3", "python", "readlink", "env", "sh", "eu-stack", "gdb", "uname", "ldconfig", "gcc"):
        (path / name).write_text(f"#!/bin/sh\necho $0 >>{tmp_path / 'taken'}\n")
        (path / name).chmod(0o755)
    for folder in (cache, path):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    return {
        "HOME": str(home),
        "PYTHONPATH": str(path),
        "PYTHONSTARTUP": str(home / "startup.py"),
        "PYTHONHOME": "",
        "PATH": f"{path}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache),
        "TMPDIR": str(cache),
        "PYTHONINSPECT": "",
        "PYTHONBREAKPOINT": "usercustomize.x",
        "ENV": str(home / "startup.py"),
    }


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
    assert tops == {"cli.py", "tracer", "bpf", metadata, metadata.replace("dist-info", "data")}


def test_nothing_of_the_callers_is_run(environment: Path, hostile: dict[str, str], tmp_path: Path) -> None:
    """As with `sudo -E`: not from the home, PYTHONPATH or PATH; nor put into a folder that all may write to."""
    require(Path(QEMU).exists(), f"{QEMU} is not installed")
    (tmp_path / "click.py").write_text((tmp_path / "path/click.py").read_text())
    command = [environment / "bin/aio-trace", "check", "--exe", QEMU]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **hostile}, capture_output=True, text=True)
    assert (done.returncode, "this host" in done.stdout) == (0, True), done.stderr
    assert not (tmp_path / "taken").exists(), (tmp_path / "taken").read_text()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_hostile_environment_is_one(environment: Path, hostile: dict[str, str], tmp_path: Path) -> None:
    """A Python that is not isolated runs what stands there."""
    python = environment / "bin/python3"
    subprocess.run([python, "-c", "import json"], env={**os.environ, **hostile, "PYTHONPATH": ""}, check=False)
    assert "usercustomize" in (tmp_path / "taken").read_text()
    subprocess.run(["python3"], env={**os.environ, **hostile}, check=False)
    assert "path/python3" in (tmp_path / "taken").read_text()


def test_it_runs_through_a_link(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "aio-trace").symlink_to(environment / "bin/aio-trace")
    assert run(tmp_path / "aio-trace", "--version", cwd=tmp_path) == f"aio-trace {tracer.__version__}\n"


def test_installed_wheel_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "aio-trace"
    assert "Usage:" in run(sys.executable, script, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    places = "import bpf, cli, tracer; print(bpf.__file__, cli.__file__, tracer.__file__)"
    printed = run(sys.executable, "-c", places, cwd=tmp_path, PYTHONPATH=str(installed))
    assert all(Path(place).is_relative_to(installed) for place in printed.split())
