"""The machines that images are booted on: which of QEMU's, and on which lines the guest speaks.

Knows: Debian's, Linux's and QEMU's names of an architecture. Does not know what is booted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Board:
    """A machine under the emulator. `serial` are QEMU's options for its two lines, to two files."""

    debian: str  # dpkg --print-architecture
    linux: str  # uname -m
    qemu: str  # the package with its system emulator
    options: tuple[str, ...]
    console: str  # where the kernel and all others speak
    lines: str  # where the trial does
    serial: Callable[[Path, Path], list[str]]

    @property
    def emulator(self) -> str:
        """QEMU's program for it."""
        return f"qemu-system-{self.linux}"


def _two_ports(console: Path, lines: Path) -> list[str]:
    return ["-serial", f"file:{console}", "-serial", f"file:{lines}"]


def _port_and_console(console: Path, lines: Path) -> list[str]:
    """arm64's `virt` has one port only."""
    chardev = f"file,id=lines,path={lines}"
    second = ["-device", "virtio-serial-pci", "-chardev", chardev, "-device", "virtconsole,chardev=lines"]
    return ["-serial", f"file:{console}", *second]


AMD64 = Board("amd64", "x86_64", "qemu-system-x86", ("-cpu", "max"), "ttyS0", "ttyS1", _two_ports)
# The algorithm that the architecture proposes for pointer authentication is slow to emulate; QEMU has one of its own.
ARM64 = Board(
    "arm64",
    "aarch64",
    "qemu-system-arm",
    ("-machine", "virt", "-cpu", "max,pauth-impdef=on"),
    "ttyAMA0",
    "hvc0",
    _port_and_console,
)
