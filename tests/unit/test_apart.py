"""Work in a child process: what comes back, and what does not have to be waited for."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tracer import apart, preparing
from tracer.apart import Errand
from tracer.errors import FaultError, HostError, NotQemu, OutOfBounds
from tracer.preparing import Preparations


def done(work: Callable[[], Any], *keep: int) -> Any:
    errand = Errand(work, keep)
    while not errand.ready():
        select.select([errand.fd], [], [])
    return errand.outcome()


def raise_(error: BaseException) -> None:
    raise error


def test_what_it_gives_comes_back() -> None:
    assert done(os.getpid) != os.getpid()
    assert done(lambda: {"much": bytes(1 << 20)}) == {"much": bytes(1 << 20)}


def test_what_it_inherited_is_given_back_when_it_has_begun() -> None:
    """A probe's descriptor among it, which would keep the probe in place for as long as the child lives on."""
    for _ in range(20):
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        errand = Errand(lambda: time.sleep(600))
        os.close(write_fd)
        try:
            assert os.read(read_fd, 1) == b"", "somebody else still holds it"
        finally:
            errand.abandon()
            os.close(read_fd)


@pytest.mark.parametrize("error", [NotQemu("it is none", "pgrep -a qemu"), FaultError(0x1000, 8)])
def test_errors_come_back_as_they_are(error: NotQemu | FaultError) -> None:
    with pytest.raises(type(error)) as caught:
        done(lambda: raise_(error))
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    assert vars(caught.value) == vars(error)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: [0][1], "IndexError: list index out of range"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended before it was finished"),
        (lambda: os._exit(0), "ended before it was finished"),
        (lambda: bytearray(apart.MAX_MEMORY), "more memory than any QEMU should need"),
        (lambda: bytes(apart.MAX_TOLD + 1), "ended before it was finished"),
    ],
)
def test_whatever_else_happens_there_is_one_sentence(work: Callable[[], Any], told: str) -> None:
    with pytest.raises(HostError, match=told):
        done(work)


def test_only_what_it_needs_is_open_there() -> None:
    """What the parent's reader waits for the end of, and links of probes, must not live on in a child."""
    kept, other = os.pipe()
    try:
        found = done(lambda: sorted(map(int, os.listdir("/proc/self/fd"))), kept)
        assert kept in found
        assert other not in found
        assert done(lambda: [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]) == [os.devnull] * 3
    finally:
        os.close(kept)
        os.close(other)


def test_it_ends_with_whoever_began_it() -> None:
    """A kill -9 of the parent leaves nothing behind."""

    def begin() -> int:
        return Errand(lambda: time.sleep(600))._pid

    pid = done(begin)
    with suppress(OSError):
        while "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.01)


def test_it_is_given_up_without_waiting() -> None:
    errand = Errand(lambda: time.sleep(600))
    assert not errand.ready()
    errand.abandon()
    errand.abandon()
    while apart._left:
        apart._reap()
    with pytest.raises(ProcessLookupError):
        os.kill(errand._pid, 0)


# Several at once


def run(preparations: Preparations) -> None:
    """As the session does."""
    preparations.go_on()
    while preparations:
        fds = preparations.fds()
        select.select(fds, [], [], min(preparations.due_s(), 1.0))
        preparations.go_on()


def preparation(name: str, seconds: float, log: list[str]) -> preparing.Steps:
    try:
        yield from preparing.apart(lambda: time.sleep(seconds))
        log.append(name)
    except OutOfBounds as error:
        log.append(f"{name}: {error.message}")


def test_slow_ones_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve that never end come first: each of those behind them is done, and then they are given up."""
    monkeypatch.setattr(preparing, "SLOW_S", 0.05)
    monkeypatch.setattr(preparing, "LIMIT_S", 3.0)
    log: list[str] = []
    preparations = Preparations()
    for number in range(12):
        preparations.add(preparation(f"slow {number}", 600, log))
    for number in range(8):
        preparations.add(preparation(f"quick {number}", 0, log))
    assert (len(preparations), preparations.hurried) == (20, 20)
    run(preparations)
    assert {name for name in log if name.startswith("quick")} == {f"quick {number}" for number in range(8)}
    assert sum("it has taken 3 s" in entry for entry in log) == 12
    assert max(map(log.index, (f"quick {n}" for n in range(8)))) < 8


def test_the_slowest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "SLOW_S", 0.0)
    monkeypatch.setattr(preparing, "MOST", 3)
    log: list[str] = []
    preparations = Preparations()
    for number in range(5):
        preparations.add(preparation(f"slow {number}", 600, log))
    for number in range(2):
        preparations.add(preparation(f"quick {number}", 0, log))
    while len(preparations) > 3 or not any("quick 1" in entry for entry in log):
        preparations.go_on()
        time.sleep(0.01)
    assert [entry.split(":")[0] for entry in log if "others wait" in entry][:2] == ["slow 0", "slow 1"]
    preparations.abandon()
    assert len(preparations) == 0


def test_one_waits_for_another_that_does_the_same() -> None:
    log: list[str] = []
    busy = True

    def first() -> preparing.Steps:
        nonlocal busy
        yield from preparing.apart(lambda: time.sleep(0.2))
        busy = False
        log.append("first")

    def second() -> preparing.Steps:
        while busy:
            yield None
        log.append("second")

    preparations = Preparations()
    preparations.add(second())
    preparations.add(first())
    run(preparations)
    assert log == ["first", "second"]
