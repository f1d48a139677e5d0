"""Control groups as the kernel shows them, and as files of the first version where the kernel has none."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracer import cgroup as control_groups
from tracer.target import Target, open_target


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def thaw(target: Target) -> None:
    """Type what the hint says, and wait until it has worked."""
    subprocess.run(target.go_on_line(), shell=True, check=True)
    while target.frozen:
        assert target.alive


def test_the_group_that_was_frozen_is_thawed(cgroup: Path, child: subprocess.Popen[bytes]) -> None:
    """The one above, when it is that one."""
    target = open_target(child.pid)
    assert target.go_on_line() == f"kill -CONT {child.pid}"
    inner = cgroup / "inner"
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(child.pid))
    try:
        for frozen in (inner, cgroup):
            (frozen / "cgroup.freeze").write_text("1")
            while not target.frozen:
                assert target.alive
            assert f"/{frozen.name}/cgroup.freeze " in target.go_on_line()
            thaw(target)
    finally:
        (cgroup / "cgroup.procs").write_text(str(child.pid))
        inner.rmdir()


def test_the_first_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its files: a frozen group above, and the least of all limits."""
    above, own = tmp_path / "freezer/above", tmp_path / "freezer/above/own"
    own.mkdir(parents=True)
    for group, state, itself in ((above, "FROZEN", "1"), (own, "FROZEN", "0")):
        (group / "freezer.state").write_text(f"{state}\n")
        (group / "freezer.self_freezing").write_text(f"{itself}\n")
    (tmp_path / "memory/m").mkdir(parents=True)
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{64 << 20}\n")
    (tmp_path / "memory/m/memory.limit_in_bytes").write_text("9223372036854771712\n")
    texts = {"/proc/self/cgroup": "6:freezer:/above/own\n4:cpu,memory:/m\n0::/\n"}
    read = control_groups._text
    monkeypatch.setattr(control_groups, "ROOT", str(tmp_path))
    monkeypatch.setattr(control_groups, "_text", lambda path: texts.get(path) or read(path))
    assert control_groups.frozen("self")
    assert control_groups.thaw_line("self") == f"echo THAWED >{above}/freezer.state"
    assert control_groups.memory_limit() == 64 << 20, "that of the container, which is the first that it sees"


def test_a_debugger_is_named(child: subprocess.Popen[bytes]) -> None:
    """A SIGCONT would not make what a debugger holds go on."""
    code = f"import ctypes, sys; print(ctypes.CDLL(None).ptrace(0x4206, {child.pid}, None, None), flush=True); input()"
    with subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline().strip() == "0":
            assert open_target(child.pid).go_on_line().startswith(f"ps -p {tracer.pid} ")
        tracer.communicate("\n")
    assert open_target(child.pid).go_on_line() == f"kill -CONT {child.pid}"
