"""The bundle: made here, unpacked elsewhere, run without network, pip or virtual environment."""

from __future__ import annotations

import ast
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

import tracer
from tests.bundling import bundled
from tests.qemu.tracing import Trace
from tracer.lab.qemu import paused

#: As a hypervisor may be: no network, nothing in the environment.
OFFLINE = ("unshare", "--net", "env", "-i")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher in the folder that was unpacked."""
    folder = tmp_path_factory.mktemp("bundle")
    with tarfile.open(bundled(folder)) as archive:
        members = archive.getmembers()
        archive.extractall(folder)
    assert {member.uid for member in members} == {0}
    assert not any(member.mode & 0o022 for member in members if not member.issym())
    return folder / f"aio-trace-{tracer.__version__}" / "aio-trace"


def test_it_is_for_every_python(bundle: Path) -> None:
    """No part is for one Python's binary interface, and the launcher can be read by those that are too old."""
    tags = [path.read_text() for path in bundle.parent.glob("lib/*.dist-info/WHEEL")]
    assert len(tags) >= 6
    assert all("Tag: py3-none-" in text or "Tag: py2.py3-none-" in text for text in tags)
    ast.parse(bundle.read_text(), feature_version=(3, 4))


def test_it_traces_offline(bundle: Path, tmp_path: Path) -> None:
    """Counts are exact, and a lost completion's check is as ready as ever."""
    environment = [*OFFLINE, f"XDG_CACHE_HOME={tmp_path}"]
    with paused() as machine, Trace.of([*environment, str(bundle), "--pid", str(machine.pid), "--json"]) as trace:
        trace.expect("attached")
        for _ in range(23):
            machine.request("d0", "write")
        trace.process.terminate()
        assert trace.finish() == 0
    assert trace.summary["requests"]["completed"] == 23


def test_its_modules_are_its_own(bundle: Path) -> None:
    """Not those of this tree, nor of the Python that runs it."""
    code = "import sys; sys.argv[1:] = ['--version']\ntry: exec(compile(open(__file__).read(), __file__, 'exec'))\n"
    code += "except SystemExit: pass\nprint({m.__file__ for n, m in sys.modules.items() if n in ('cli', 'click')})"
    program = f"__file__ = {str(bundle)!r}\n{code}"
    done = subprocess.run(
        [*OFFLINE, "/usr/bin/python3", "-I", "-c", program], capture_output=True, text=True, check=True
    )
    places = ast.literal_eval(done.stdout.splitlines()[-1])
    assert len(places) == 2
    assert all(place.startswith(f"{bundle.parent}{os.sep}") for place in places)
