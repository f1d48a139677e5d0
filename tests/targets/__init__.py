"""Small C programs that stand in for QEMUs of all kinds, and how to build them.

Knows: compilers, and the forms in which distributions ship a binary and its symbols.
"""

from __future__ import annotations

import lzma
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import require

SOURCES = Path(__file__).parent / "pool"


@dataclass(frozen=True)
class Recipe:
    """One way to build tests/targets/pool; `version` is whose shape it has (201: QEMU 2.1.2, 702: 7.2)."""

    compiler: str = "gcc"
    optimise: str = "-O2"
    lto: bool = False
    pie: bool = True
    version: int = 702
    probes: bool = False
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.compiler, self.optimise[1:], str(self.version), "lto" * self.lto, "" if self.pie else "fixed"]
        return "-".join(filter(None, [*parts, "usdt" * self.probes, *(flag.strip("-") for flag in self.flags)]))

    def command(self, target: Path) -> list[str]:
        """The compiler's arguments."""
        linking = ["-fuse-ld=lld"] if self.lto and self.compiler == "clang" else []
        return [
            *(self.compiler, "-g", self.optimise, "-pthread", "-Wl,--build-id", *linking, *self.flags),
            *(["-flto"] if self.lto else []),
            *(["-fPIE", "-pie"] if self.pie else ["-fno-pie", "-no-pie"]),
            f"-DPOOL_VERSION={self.version}",
            f"-DWITH_PROBES={int(self.probes)}",
            *("-o", str(target), *map(str, sorted(SOURCES.glob("*.c")))),
        ]


def build(recipe: Recipe, folder: Path) -> Path:
    """The program, with all symbols and debug information; made once a folder."""
    require(shutil.which(recipe.compiler), f"{recipe.compiler} is not installed")
    require(not recipe.lto or recipe.compiler != "clang" or shutil.which("ld.lld"), "ld.lld is not installed")
    target = folder / str(recipe)
    if not target.exists():
        run(*recipe.command(target))
    return target


def stripped(program: Path) -> Path:
    """A copy without symbols and debug information."""
    return _made(program, "stripped", lambda target: run("strip", "-o", str(target), str(program)))


def with_mini_debug_info(program: Path) -> Path:
    """A stripped copy with .gnu_debugdata, as Fedora and RHEL have it."""

    def make(target: Path) -> None:
        small = target.with_suffix(".small")
        run("objcopy", "--only-keep-debug", str(program), str(small))
        run("strip", "--strip-debug", str(small))
        packed = target.with_suffix(".xz")
        packed.write_bytes(lzma.compress(small.read_bytes()))
        run("objcopy", f"--add-section=.gnu_debugdata={packed}", str(stripped(program)), str(target))

    return _made(program, "mini", make)


def debug_file(program: Path) -> Path:
    """What a distribution's debug package holds for the program."""
    return _made(program, "debug", lambda target: run("objcopy", "--only-keep-debug", str(program), str(target)))


def run(*command: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _made(program: Path, suffix: str, make: object) -> Path:
    target = program.with_name(f"{program.name}.{suffix}")
    if not target.exists():
        assert callable(make)
        make(target)
    return target
