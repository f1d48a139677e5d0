"""A machine under the emulator: boots an image with the project inside, and tells what came of the trial there.

Knows: QEMU's command line, what the guest's first script does, how long is too long. A guest that hangs is
ended and its serial log is the reason. Does not know what is tried.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from tests.kernels.boards import Board
from tests.kernels.images import PROJECT, Image
from tests.matrix.roots import locked, run
from tracer.lab.guest import cache_folder, cpio
from tracer.lab.process import end, spawn

ROOT = Path(__file__).resolve().parents[2]
CODE = ("bpf", "tracer", "tests", "cli.py")
MEMORY_MIB = 3072
OPTIONS = "root=/dev/vda quiet panic=-1 panic_on_warn=1 oops=panic no_timer_check mitigations=off"

# Runs in the image's root once that is the root. The trial speaks on the second serial line, all others on the first.
# While the machine goes off its disk is gone already: no program can be begun then, and an init that ends is a panic.
START = f"""\
#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 PYTHONPATH={PROJECT}/code:{PROJECT}/site
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t tmpfs cache /var/cache
exec </dev/null >/dev/console 2>&1
cd {PROJECT}/code
$(cat {PROJECT}/command) >/dev/$lines
echo "the trial ended with $?"
echo o >/proc/sysrq-trigger
while :; do :; done
"""


@dataclass(frozen=True)
class Outcome:
    """What a trial told, line by line, how long all took, and how the guest's console ended."""

    lines: tuple[dict[str, Any], ...]
    took_s: float
    console: str
    hung: bool = False

    def check(self, name: str) -> dict[str, Any]:
        """The line about that check; AssertionError where there is none."""
        for line in self.lines:
            if line["check"] == name:
                return line
        how = "hung, and was ended" if self.hung else "ended"
        told = ", ".join(line["check"] for line in self.lines) or "none"
        raise AssertionError(
            f"the guest {how} after {self.took_s:.0f} s and told nothing of {name} (but of: {told}); "
            f"its console ends:\n{self.console[-4000:]}"
        )


def trial(image: Image, bundle: Path, command: Sequence[str], patience_s: float) -> Outcome:
    """Boot the image, run the command (words without spaces) in the project, and wait until the machine is off.

    The bundle is carried in as the file that it is; the machine has no network card.
    """
    with tempfile.TemporaryDirectory(prefix="aio-trace-kernel-") as scratch:
        folder = Path(scratch)
        (folder / "initramfs").write_bytes(image.initramfs.read_bytes() + project(image, bundle, command))
        for name in ("console", "lines"):
            (folder / name).touch()
        began = time.monotonic()
        hung = not _ran(_command_line(image, folder), folder, patience_s)
        took_s = time.monotonic() - began
        console = (folder / "console").read_text(errors="replace")
        return Outcome(tuple(_lines(folder / "lines")), took_s, console, hung)


def _command_line(image: Image, folder: Path) -> list[str]:
    board = image.board
    argv = [board.emulator, *board.options, "-accel", "tcg,thread=multi", "-smp", "2", "-m", str(MEMORY_MIB)]
    # No network card: -nodefaults, and none is named.
    argv += ["-nodefaults", "-display", "none", "-no-reboot"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(folder / "initramfs"), "-append"]
    argv += [f"{OPTIONS} console={board.console} lines={board.lines}"]
    argv += ["-drive", f"file={image.disk},format=raw,if=virtio,snapshot=on,cache=unsafe"]
    return argv + board.serial(folder / "console", folder / "lines")


def _ran(argv: Sequence[str], folder: Path, patience_s: float) -> bool:
    """Whether it came to its end in time; it has ended in any case, also where this process is killed."""
    with open(folder / "console", "ab") as console:
        machine = spawn(argv, console)
        try:
            machine.wait(patience_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(machine)
    return True


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What can be read: a machine that panicked may have stopped in the middle of a line."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


# What goes in beside the image


def project(image: Image, bundle: Path, command: Sequence[str]) -> bytes:
    """An archive with this working copy, its libraries for that Python, its bundle, and what is to be run."""
    found: list[tuple[str, int, bytes]] = [("project", 0o40755, b"")]
    found += [("project/start", 0o100755, START.encode()), ("project/command", 0o100644, " ".join(command).encode())]
    found += _files(bundle, "project/bundle.tar.gz")
    found += [("project/code", 0o40755, b""), ("project/site", 0o40755, b"")]
    for name in CODE:
        found += _files(ROOT / name, f"project/code/{name}")
    for path in sorted(libraries(image.python, image.board).iterdir()):
        found += _files(path, f"project/site/{path.name}")
    return cpio(found)


def _files(path: Path, name: str) -> Iterator[tuple[str, int, bytes]]:
    if path.name == "__pycache__":
        return
    if not path.is_dir():
        yield name, 0o100644, path.read_bytes()
        return
    yield name, 0o40755, b""
    for below in sorted(path.iterdir()):
        yield from _files(below, f"{name}/{below.name}")


def libraries(python: str, board: Board) -> Path:
    """A folder with what aio-trace requires, for that Python and architecture; downloaded once."""
    needs = [need for need in requires("aio-trace") or () if "extra ==" not in need]
    cache = cache_folder() / "kernels"
    folder = cache / f"libraries-{python}-{board.linux}-{sha256(json.dumps(needs).encode()).hexdigest()[:12]}"
    with locked(cache / ".libraries.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".libraries-") as work:
                # Not "pip install": that asks whether a library is for the Python that runs pip.
                download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
                download += ["--dest", f"{work}/wheels", "--python-version", python, "--only-binary=:all:"]
                for glibc in ("2014", "_2_28"):
                    download += ["--platform", f"manylinux{glibc}_{board.linux}"]
                run([*download, *needs])
                for wheel in Path(work, "wheels").iterdir():
                    ZipFile(wheel).extractall(f"{work}/site")
                shutil.move(f"{work}/site", folder)
    return folder
