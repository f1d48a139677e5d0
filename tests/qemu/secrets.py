"""A guest all of whose memory holds one known pattern, written by its own code; and whether a file has any of it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.qemu.cores import SAME_OF_A_REQUEST, Json, inspect, run
from tracer.lab import faults
from tracer.lab.qemu import Qemu, paused

MIB = 1 << 20
WORD = b"aS3c"
#: Less than that may be anything, such as a processor's register.
SECRET = WORD * 16
LOADED_AT = 1 << 20
VIDEO_MIB = 16


def kernel(memory_mib: int) -> bytes:
    """A multiboot kernel in 32-bit code: fills RAM behind its own first MiB, the VGA window and the video memory."""
    fill = b"\xb8" + WORD + b"\xbf%b\xb9%b\xf3\xab"  # mov eax, WORD; mov edi, …; mov ecx, …; rep stosd
    code = b"\xfc"
    for start, size in ((2 * MIB, (memory_mib - 2) * MIB), (0x10000, 0x80000), (0xA0000, 0x10000)):
        code += fill % (struct.pack("<I", start), struct.pack("<I", size // 4))
    code += b"\x66\xba\xf8\x0c\xb8\x10\x10\x00\x80\xef"  # mov dx, 0xcf8; the first BAR of device 2; out
    code += b"\x66\xba\xfc\x0c\xed\x24\xf0\x89\xc7"  # mov dx, 0xcfc; in eax; and al, 0xf0; mov edi, eax
    code += b"\xb8" + WORD + b"\xb9" + struct.pack("<I", VIDEO_MIB * MIB // 4) + b"\xf3\xab"
    code += b"\x66\xba\xe9\x00\xb0!\xee"  # mov dx, 0xe9; mov al, '!'; out
    code += b"\xf4\xeb\xfd"  # hlt, for ever
    flags, magic, end = 1 << 16, 0x1BADB002, LOADED_AT + 32 + len(code)
    header = (magic, flags, -(magic + flags) & 0xFFFFFFFF, LOADED_AT, LOADED_AT, end, end, LOADED_AT + 32)
    return struct.pack("<8I", *header) + code


@contextmanager
def filled(memory_mib: int, chroot: Path | None = None, extra: Sequence[str] = ()) -> Iterator[Qemu]:
    """A QEMU whose guest has filled its memory, and sleeps."""
    with TemporaryDirectory(prefix="aio-trace-secret-", dir=None if chroot is None else chroot / "tmp") as folder:
        program, said = Path(folder) / "kernel", Path(folder) / "said"
        program.write_bytes(kernel(memory_mib))
        inside = [str(path if chroot is None else "/" / path.relative_to(chroot)) for path in (program, said)]
        machine = ["-machine", "pc", "-m", str(memory_mib), "-accel", "tcg,tb-size=32", "-device", "VGA,vgamem_mb=16"]
        machine += ["-kernel", inside[0], "-debugcon", f"file:{inside[1]}", *extra]
        with paused(chroot=chroot, extra=machine) as qemu:
            qemu.qmp("cont")
            qemu.wait_until(lambda: said.exists() and b"!" in said.read_bytes(), 100, "the guest to fill its memory")
            yield qemu


def pattern_in(pid: int) -> int:
    """Bytes of the pattern in a process's memory."""
    total = 0
    with (
        open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps,
        open(f"/proc/{pid}/mem", "rb") as memory,
    ):
        for found in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) rw", maps.read(), re.M):
            start, end = int(found[1], 16), int(found[2], 16)
            memory.seek(start)
            total += memory.read(end - start).count(SECRET) * len(SECRET)
    return total


def as_told(pool: Json) -> Json:
    """What must be the same live and in a core."""
    same = {name: pool[name] for name in ("pool", "context", "bottom_half")}
    return same | {"requests": [{name: request[name] for name in SAME_OF_A_REQUEST} for request in pool["requests"]]}


def nothing_is_saved(qemu: Qemu, path: Path, least: int, exe: Path | None = None) -> None:
    """Its memory has at least so many bytes of the pattern, the saved core none, and that tells all the same."""
    lost = faults.lose(qemu, "d0", "write")
    assert pattern_in(qemu.pid) >= least
    live = inspect("--pid", str(qemu.pid))
    done = run("--pid", str(qemu.pid), "--save", str(path))
    assert done.returncode == 3, done.stderr
    assert lost.still_lost()
    assert SECRET not in path.read_bytes()
    assert SECRET not in Path(f"{path}.json").read_bytes()
    found = inspect("--core", str(path), *(["--exe", str(exe)] if exe else []))
    assert found["verdict"] == live["verdict"] == "lost-wakeup"
    assert [as_told(pool) for pool in found["pools"]] == [as_told(pool) for pool in live["pools"]]
    assert found["threads"][0]["stack"] == live["threads"][0]["stack"]
    assert path.stat().st_blocks * 512 < 48 * MIB
    print(done.stderr)
