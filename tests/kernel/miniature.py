"""A thread pool in miniature (pool.c): built, started, obeyed.

Knows: where its three sites are (nm) and how its elements are laid out. Does not know bcc.
"""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from types import TracebackType

from tracer.elf import Image
from tracer.executable import Executable
from tracer.layout import ElementLayout
from tracer.sites.model import CALLBACK, DONE, SUBMIT, Site
from tracer.sites.placing import placed

HERE = Path(__file__).parent
X86 = platform.machine() == "x86_64"
REGISTERS = dict(zip((SUBMIT, DONE, CALLBACK), ("rbx", "r12", "r13") if X86 else ("x19", "x20", "x21")))
ELEMENT = ElementLayout(0x10, 0x18, 0x28, 0x30, 0x38, 0x40, 0x44, 0x58, 0x60)
ELEMENT_SIZE = 0x68


def build(folder: Path, *options: str) -> Path:
    """The program, compiled into `folder`."""
    program = folder / "pool"
    plain = ["-mno-red-zone"] if X86 else []
    command = ["gcc", "-O1", *plain, *options, "-pthread", "-o", str(program), str(HERE / "pool.c")]
    subprocess.run(command, check=True)
    return program


@cache
def symbols(program: Path) -> dict[str, int]:
    """Every symbol's ELF address."""
    listing = subprocess.run(["nm", str(program)], check=True, capture_output=True, text=True).stdout
    lines = (line.split() for line in listing.splitlines())
    return {words[2]: int(words[0], 16) for words in lines if len(words) == 3}


def sites_of(program: Path) -> dict[str, Site]:
    """The three sites by name."""
    address = symbols(program)
    with Image.open(program) as image:
        return {
            name: placed(image, Site(name, address[f"site_{name}"], register, "call", "by hand", True))
            for name, register in REGISTERS.items()
        }


class Miniature:
    """The running program; a context manager that ends it."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.file = Executable.open(f"/proc/{self.pid}/exe")
        self.sites = sites_of(program)
        self._symbols = symbols(program)
        self.do("")
        self._bias = self._load_bias(program)

    def _load_bias(self, program: Path) -> int:
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            if line.endswith(str(program.resolve())):
                start = int(line.split("-")[0], 16)
                return start if self._symbols["main"] < start else 0
        raise AssertionError("the program is not mapped")

    def begin(self, words: str) -> None:
        """Send one line of words (pool.c) without waiting."""
        assert self._process.stdin
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Wait until one line was obeyed."""
        assert self._process.stdout
        answer = self._process.stdout.readline()
        assert answer == "ok\n", answer

    def do(self, words: str) -> None:
        """begin() and end()."""
        self.begin(words)
        self.end()

    def element(self, slot: int) -> int:
        """The address of a request in the process."""
        return self._bias + self._symbols["elements"] + slot * ELEMENT_SIZE

    def site_bytes(self) -> dict[str, bytes]:
        """What the processor would run at each site: the call, or a breakpoint while a probe is there."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            found = {}
            for name, site in self.sites.items():
                memory.seek(self._bias + site.address)
                found[name] = memory.read(4)
        return found

    def __enter__(self) -> Miniature:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self.file.close()
