"""A process whose /proc/PID/exe names what it likes (swapper.c), and where the probes are in honest ones.

Knows: user namespaces, and how a breakpoint shows in a process's memory. Does not know the tracer.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
PAGE = 4096


def build(folder: Path) -> Path:
    """The program, compiled into `folder`."""
    program = folder / "swapper"
    options = ["-O2", "-fno-stack-protector", "-fPIE", "-pie"]
    subprocess.run(["gcc", *options, "-o", str(program), str(HERE / "swapper.c")], check=True)
    return program


class Swapper:
    """The running program, in a user namespace of its own; a context manager that ends it."""

    def __init__(self, program: Path, *files: Path) -> None:
        """It begins as `files[0]`."""
        command = ["unshare", "--user", "--map-root-user", str(program), *map(str, files)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid
        self.become(0)

    def become(self, number: int) -> None:
        """From now on /proc/PID/exe names that file."""
        assert self._process.stdin
        assert self._process.stdout
        wanted = b"%d" % number
        self._process.stdin.write(wanted)
        assert self._process.stdout.read(1) == wanted, "the kernel refused to change /proc/PID/exe"

    def __enter__(self) -> Swapper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class _Openings:
    """Sees every file that this process opens, before it is opened; one hook for all tests, since none can go."""

    def __init__(self) -> None:
        self.path, self.swapper = "", None
        self.order: list[int] = []
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.swapper is not None and arguments[0] == self.path and self.order:
            swapper: Swapper = self.swapper
            swapper.become(self.order.pop(0))


_openings: list[_Openings] = []


@contextmanager
def swapping_when_opened(swapper: Swapper, order: tuple[int, ...]) -> Iterator[None]:
    """Whenever this process opens /proc/PID/exe it finds the next file of `order` there, at last always the last."""
    openings = _openings[0] if _openings else _Openings()
    _openings[:] = [openings]
    openings.path, openings.swapper, openings.order = f"/proc/{swapper.pid}/exe", swapper, list(order)
    try:
        yield
    finally:
        openings.swapper = None


def breakpoints(pid: int, program: Path) -> set[int]:
    """Where in the program's file the process's code is not what the file holds, in bytes from its beginning."""
    held, found = program.read_bytes(), set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            words = line.split()
            if words[-1] != str(program) or "x" not in words[1]:
                continue
            start, end = (int(word, 16) for word in words[0].split("-"))
            offset = int(words[2], 16)
            memory.seek(start)
            code = memory.read(end - start)
            file = held[offset : offset + len(code)]
            found |= {offset + at for at, byte in enumerate(file) if code[at] != byte}
    return found
