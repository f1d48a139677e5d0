"""Storage that hangs on command.

Knows: how to put a file on a storage of which every request waits while it is held. It is a
qemu-storage-daemon that shows the file through FUSE; stopping the daemon holds the storage, exactly
as a dead NFS server would. Does not know QEMU's structures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from tracer.lab.process import continue_process, stop_process
from tracer.lab.qemu import MIB, STORAGE_DAEMON, Drive, Place, Qemu, make_place, start

MNT_DETACH = 2


class Storage(Qemu):
    """The daemon behind such a file; it runs outside of any chroot."""

    disk = Path()  # the file, as a QEMU finds it

    def drive(self, name: str = "d0", iothread: str | None = None) -> Drive:
        """A drive on it; without the host's page cache, which would answer in the storage's place."""
        return Drive(name, iothread=iothread, cache="none", file=self.disk)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """For the time of the block no request on the file comes back.

        A process that waits for it cannot even be killed, so never end one inside the block.
        """
        stop_process(self.pid)
        try:
            yield
        finally:
            continue_process(self.pid)


def storage(size: int = 64 * MIB, chroot: Path | None = None) -> Storage:
    """Start it; the file is there when this returns. A QEMU in `chroot` finds it by drive().

    The daemon itself is always this host's own: old ones cannot show a file, and a chroot has no /dev/fuse.
    """
    place = make_place(chroot)
    backing = place.folder / "backing"
    disk = place.folder / "disk"
    for path in (backing, disk):
        path.touch()
    os.truncate(backing, size)
    daemon = start(Place(place.folder, None), _arguments(backing, disk), [], "output", Storage, has_hmp=False)
    daemon.disk = Path(place.inside("disk"))
    daemon.on_exit(lambda: _unmount(disk))
    try:
        daemon.wait_until(lambda: os.path.ismount(disk), what="the FUSE export")
    except BaseException:
        daemon.close()
        raise
    return daemon


def _arguments(backing: Path, disk: Path) -> list[str]:
    argv = [STORAGE_DAEMON, "--chardev", f"socket,id=lab,path={disk.parent}/lab.qmp,server=on,wait=off"]
    argv += ["--monitor", "chardev=lab", "--blockdev", f"driver=file,node-name=backing,filename={backing}"]
    return [*argv, "--export", f"type=fuse,id=disk,node-name=backing,mountpoint={disk},writable=on"]


def _unmount(path: Path) -> None:
    """A killed daemon leaves its mount behind."""
    ctypes.CDLL(None).umount2(os.fsencode(path), MNT_DETACH)
