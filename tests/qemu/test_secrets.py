"""What is saved of a QEMU, to send away: nothing of the guest's memory, however small that is, and no page of zeros."""

from __future__ import annotations

import mmap
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.qemu.cores import inspect, run
from tests.qemu.secrets import MIB, VIDEO_MIB, filled, nothing_is_saved
from tracer.lab import faults
from tracer.lab.qemu import paused
from tracer.own import _marked

MADV_DOFORK = 11


@pytest.mark.parametrize("memory_mib", [16, 32, 64])
def test_guest_memory_is_not_saved(memory_mib: int, tmp_path: Path) -> None:
    with filled(memory_mib) as qemu:
        nothing_is_saved(qemu, tmp_path / "core", (memory_mib - 3 + VIDEO_MIB) * MIB)


def test_memory_that_is_a_private_mapping_of_a_file(tmp_path: Path) -> None:
    backend = f"memory-backend-file,id=ram,size=32M,mem-path={tmp_path},share=off"
    with filled(32, extra=["-object", backend, "-machine", "memory-backend=ram"]) as qemu:
        nothing_is_saved(qemu, tmp_path / "core", (32 - 3 + VIDEO_MIB) * MIB)


def test_where_qemu_marks_nothing(tmp_path: Path) -> None:
    """As under qtest, or in a QEMU to come: then what does not prove itself stays out."""
    require(shutil.which("gdb"), "gdb is not installed")
    with filled(32) as qemu:
        marks = list(_marked(qemu.pid))
        assert marks
        calls = [f"call (int)madvise({start}, {end - start}, {MADV_DOFORK})" for start, end in marks]
        command = [
            "gdb",
            "-nx",
            "-q",
            "-batch",
            "-p",
            str(qemu.pid),
            *(word for call in calls for word in ("-ex", call)),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert not list(_marked(qemu.pid))
        nothing_is_saved(qemu, tmp_path / "core", (32 - 3 + VIDEO_MIB) * MIB)


def test_pages_of_zeros_are_holes(tmp_path: Path) -> None:
    """A heap that was used once and is empty now."""
    with paused() as qemu:
        lost = faults.lose(qemu, "d0", "write")
        whole = run("--pid", str(qemu.pid), "--save", str(tmp_path / "core"))
        assert whole.returncode == 3, whole.stderr
        assert lost.still_lost()
    core = tmp_path / "core"
    stored = core.stat().st_blocks * 512
    with core.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        pages = range(0, len(data) - mmap.PAGESIZE, mmap.PAGESIZE)
        empty = sum(data[at : at + mmap.PAGESIZE] == bytes(mmap.PAGESIZE) for at in pages) * mmap.PAGESIZE
        assert empty > MIB, "or this shows nothing"
        assert stored <= len(data) - empty + MIB
    assert inspect("--core", str(core))["verdict"] == "lost-wakeup"
