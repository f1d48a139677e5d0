"""The user's command at alerts: few at once, and none is lost."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracer.commands import AT_ONCE, AT_ONCE_FOR_ONE, Commands
from tracer.events import Alert


def alert(pid: int, request: int) -> Alert:
    return Alert(
        *(0.0, pid, request, None, None, "write", "/srv/a\0b", None, None, "THREAD_DONE", 0, 1.0, 0.5, "lost-wakeup"),
        *("It is lost.", {}, "probes"),
    )


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """While it is there, commands do not end."""
    made = tmp_path / "gate"
    made.touch()
    yield made
    made.unlink(missing_ok=True)


def wait_for_all(commands: Commands) -> None:
    while commands.fds:
        select.select(commands.fds, [], [])
        commands.go_on()


def test_a_flood_of_alerts_is_put_together(tmp_path: Path, gate: Path) -> None:
    """300 of one process and one of another: no more than two for the first at a time, and all are counted."""
    told = tmp_path / "told"
    line = f"echo $AIO_TRACE_PID $AIO_TRACE_ALERTS $AIO_TRACE_REQUEST >>{told}"
    commands = Commands(f"while [ -e {gate} ]; do sleep 0.05; done; {line}")
    for number in range(300):
        commands.run(alert(7, number))
    assert len(commands.fds) == AT_ONCE_FOR_ONE
    commands.run(alert(8, 1))
    assert len(commands.fds) == AT_ONCE_FOR_ONE + 1
    gate.unlink()
    wait_for_all(commands)
    lines = [tuple(line.split()) for line in told.read_text().split("\n") if line]
    assert sorted(lines) == [("7", "1", "0x0"), ("7", "1", "0x1"), ("7", "298", "0x12b"), ("8", "1", "0x1")]


def test_floods_of_many_processes(tmp_path: Path, gate: Path) -> None:
    commands = Commands(f"while [ -e {gate} ]; do sleep 0.05; done; echo $AIO_TRACE_PID >>{tmp_path / 'told'}")
    for pid in range(1, 41):
        for number in range(5):
            commands.run(alert(pid, number))
            assert len(commands.fds) <= AT_ONCE
    gate.unlink()
    wait_for_all(commands)
    assert set((tmp_path / "told").read_text().split()) == set(map(str, range(1, 41)))


def test_what_waits_is_not_lost_at_the_end(tmp_path: Path, gate: Path) -> None:
    """The trace ends while commands run: the last one is begun, and nothing is waited for."""
    commands = Commands(f"echo $AIO_TRACE_ALERTS >>{tmp_path / 'told'}; while [ -e {gate} ]; do sleep 0.05; done")
    for number in range(10):
        commands.run(alert(7, number))
    commands.close()
    while sorted(map(int, (tmp_path / "told").read_text().split() if (tmp_path / "told").exists() else [])) != [
        1,
        1,
        8,
    ]:
        pass
