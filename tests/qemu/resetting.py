"""A guest whose firmware resets the disk on which a write was lost: a virtual processor drains, the main loop waits.

Its boot sector, read from that very disk after the reset, reads the lost write's block and tells what is in it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.qemu.nudging import by_force
from tracer.home import parked
from tracer.lab import faults
from tracer.lab.qemu import Drive, Qemu, paused
from tracer.target import Target, open_target

MIB = 1 << 20
SECTOR = 512
#: Where the write that is lost goes to; bytes.
LOST_AT = MIB
# 16 bits, at 0x7c00: xor ax,ax; mov ds,ax; mov si,packet; mov ah,0x42; int 0x13; jc halt; mov si,0x8000; mov cx,512;
# cld; next: lodsb; out 0xe9,al; loop next; halt: hlt; jmp halt; packet: one sector from LOST_AT to 0:0x8000.
_CODE = bytes.fromhex("31c0 8ed8 be1c7c b442 cd13 720c be0080 b90002 fc ac e6e9 e2fb f4 ebfd")
_PACKET = struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, LOST_AT // SECTOR)
BOOT = (_CODE + _PACKET).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


@dataclass(frozen=True)
class Resetting:
    """The guest, stuck in its reset: what was lost, and the thread that drains."""

    qemu: Qemu
    lost: faults.LostCompletion
    handle: int
    vcpu: int
    told: Path  # what the boot sector says
    image: Path

    def check(self) -> None:
        """Wait until the guest has gone on, and compare what was lost with what it and we read from its disk."""
        written = bytes([self.handle & 0xFF])
        self.qemu.wait_until(lambda: len(self.told.read_bytes()) >= SECTOR, what="the guest to read its disk")
        assert self.told.read_bytes() == written * SECTOR
        self.qemu.finish("d0", self.handle)
        assert self.qemu.qmp("query-status")["running"] is True
        disk = self.image.read_bytes()
        expected = bytearray(2 * MIB)
        expected[:SECTOR] = BOOT
        expected[LOST_AT : LOST_AT + 4096] = written * 4096
        assert disk == bytes(expected)


@contextmanager
def resetting(folder: Path, chroot: Path | None = None) -> Iterator[Resetting]:
    """Such a guest, in its reset. `folder` is for its disk; in `chroot`, if QEMU is in one."""
    image, told = folder / "disk", folder / "told"
    image.write_bytes(BOOT.ljust(2 * MIB, b"\0"))
    told.write_bytes(b"")
    inside = Path("/") / folder.relative_to(chroot) if chroot else folder
    device = ["-device", "virtio-blk-pci,drive=d0,share-rw=on,bootindex=0"]
    machine = ["-machine", "q35", "-accel", "tcg", "-m", "64", "-debugcon", f"file:{inside / 'told'}"]
    with paused([Drive(file=inside / "disk")], chroot=chroot, extra=[*machine, *device]) as qemu:
        handles: list[int] = []
        lost = faults.lose_completion(
            qemu, "d0", faults.pool_of(qemu, "d0"), lambda: handles.append(qemu.submit("d0", "write", LOST_AT))
        )
        vcpu = int(qemu.qmp("query-cpus-fast")[0]["thread-id"])
        qemu.qmp("cont")
        target = open_target(qemu.pid)
        qemu.wait_until(lambda: _drains(target, vcpu), what="the firmware to reset the disk")
        yield Resetting(qemu, lost, handles[-1], vcpu, told, image)


def _drains(target: Target, vcpu: int) -> bool:
    thread = target.thread(vcpu)
    return thread is not None and parked(thread) and faults.main_system_call(target) == "futex"


def free_resetting_guests(folder: Path, rounds: int, chroot: Path | None = None) -> None:
    """So many of them, each freed by --force in the thread that drains, each with its data as it was written."""
    for number in range(rounds):
        place = folder / str(number)
        place.mkdir()
        with resetting(place, chroot) as guest:
            done = by_force(guest.qemu)
            assert done.status == 0, done.errors
            (event,) = done.nudges
            assert (event["request"], event["cause"]) == (hex(guest.lost.request), "lost-wakeup")
            assert event["freed"] is True
            assert f"in thread {guest.vcpu} (" in done.errors
            guest.check()
