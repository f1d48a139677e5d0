"""The command under test, run as a user would: a process of its own, events read as they come."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from tracer.compiler import working_bcc

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0

Json = dict[str, Any]


def without_bcc(folder: Path, failure: str = "raise ImportError('no bcc here')") -> list[str]:
    """What goes before a command that is to find a broken bcc in every Python of this host."""
    python, _ = working_bcc()
    where = [python, "-I", "-c", "import bcc; print(bcc.__path__[0])"]
    place = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    broken = folder / "broken"
    broken.mkdir(mode=0o755)
    (broken / "__init__.py").write_text(failure)
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {broken} {place}; exec "$@"', "sh"]


class Trace:
    """`aio-trace --json` on a process; a context manager that ends it."""

    def __init__(self, pid: int, *options: str) -> None:
        self._start([sys.executable, str(ROOT / "cli.py"), "--pid", str(pid), "--json", "--interval", "0", *options])

    @classmethod
    def of(cls, command: list[str]) -> Trace:
        """Another command that prints events."""
        made = cls.__new__(cls)
        made._start(command)
        return made

    def _start(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.events: list[Json] = []
        self.errors = ""
        self._arrived: queue.Queue[Json | None] = queue.Queue()
        self._readers = [threading.Thread(target=self._read), threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            event = json.loads(line) | {"arrived": time.time()}
            self.events.append(event)
            self._arrived.put(event)
        self._arrived.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr
        self.errors = self.process.stderr.read()

    def expect(self, name: str, timeout: float = PATIENCE_S) -> Json:
        """The next event of that name; fails if the trace ends or time runs out first."""
        end = time.monotonic() + timeout
        while True:
            try:
                event = self._arrived.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {name} within {timeout} s; so far: {self.events}") from None
            assert event is not None, f"ended before {name}; so far: {self.events}; {self.errors}"
            if event["event"] == name:
                return event

    def named(self, name: str) -> list[Json]:
        """All events of that name so far."""
        return [event for event in self.events if event["event"] == name]

    def finish(self, number: int = signal.SIGINT) -> int:
        """End it as a user does, and return its exit status; all events are there then."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=PATIENCE_S)
        for reader in self._readers:
            reader.join(timeout=PATIENCE_S)
        return status

    @property
    def summary(self) -> Json:
        """The summary, after finish()."""
        (summary,) = self.named("summary")
        return summary

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()
        assert "Traceback" not in self.errors, self.errors


@contextmanager
def traced(pid: int, *options: str) -> Iterator[Trace]:
    """A trace that is attached already."""
    with Trace(pid, *options) as trace:
        trace.expect("attached")
        yield trace
