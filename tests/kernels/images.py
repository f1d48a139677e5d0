"""Bootable images of other releases: a root with that release's QEMU, Python and bcc, and its own kernel.

Knows: debootstrap, packages, mke2fs, how a kernel comes to its root. An image is named after all that goes into
it, so that another recipe makes another one; the project is not in it. Does not know what is tried there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tests.kernels.boards import AMD64, ARM64, Board
from tests.matrix.roots import RootMissing, debootstrap, locked, remove, run
from tracer.lab.guest import BUSYBOX_PACKAGE, cache_folder, cpio, modules_of, unpacked

PACKAGES = ("python3", "python3-bpfcc")
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
SIZE = "4G"
#: Where the guest finds the project, and how it is told what to run.
PROJECT = "/trial"
START = f"{PROJECT}/start"

# The kernel's first process. The project comes with the initramfs, because it is another one at each run.
INIT = f"""\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo "no $module"; done
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 /dev/vda /root
mount -t tmpfs -o size=512m trial /root{PROJECT}
mv /project/* /root{PROJECT}/
mount -t devtmpfs dev /root/dev
exec switch_root /root {START}
"""


@dataclass(frozen=True)
class System:
    """A release whose own kernel is booted.

    `version` is how the newest one's begins, where the release has one; `can` is what it is known to be able to.
    """

    name: str
    suite: str
    version: str
    can: frozenset[str] = frozenset({"uprobe_multi", "atomics", "hashes_allocate"})
    flavour: str = "cloud"
    board: Board = AMD64

    @property
    def kernel(self) -> str:
        """The package that means its newest kernel."""
        return f"linux-image-{self.flavour}-{self.board.debian}"

    @property
    def packages(self) -> tuple[str, ...]:
        """What its root has besides."""
        return (*PACKAGES, self.board.qemu, "qemu-utils")


#: One for real time refuses what others only warn of. Its image is another two minutes and 800 MB.
REAL_TIME = System("debian-11-rt", "bullseye", "5.10.", frozenset(), flavour="rt")
SYSTEMS = (
    System("debian-11", "bullseye", "5.10.", frozenset()),
    System("debian-12", "bookworm", "6.1.", frozenset({"atomics", "hashes_allocate"})),
    System("debian-13", "trixie", "6.12."),
    System("debian-sid", "sid", ""),
    *((REAL_TIME,) if os.environ.get("AIO_TRACE_REAL_TIME") else ()),
    System("debian-13-arm64", "trixie", "6.12.", board=ARM64),
)


@dataclass(frozen=True)
class Image:
    """What a machine is booted from; the files are in the cache and are not written to."""

    disk: Path
    kernel: Path
    initramfs: Path
    python: str  # the minor version of its Python 3, such as 3.11
    board: Board


def image_of(system: System) -> Image:
    """The image of that system, made if need be. Raises RootMissing."""
    cache = cache_folder() / "kernels"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{system.name}-{_key(system)}"
    with locked(cache / f".{system.name}.lock") as lock:
        if not folder.is_dir():
            for other in _others(cache, system.name):
                shutil.rmtree(other)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as work:
                _make(system, Path(work), lock)
                # The temporary folder is for us alone; this one is for whoever reads the cache.
                os.rename(Path(work) / "made", folder)
    python = (folder / "python").read_text()
    return Image(folder / "disk", folder / "kernel", folder / "initramfs", python, system.board)


def _key(system: System) -> str:
    goes_in = (system.suite, system.kernel, system.packages)
    recipe = json.dumps([goes_in, INIT, MODULES, SIZE, _MKE2FS])
    return sha256(recipe.encode()).hexdigest()[:12]


def _others(cache: Path, name: str) -> Iterator[Path]:
    """Images of that system by another recipe."""
    for path in cache.iterdir():
        if re.fullmatch(re.escape(name) + "-[0-9a-f]{12}", path.name):
            yield path


_MKE2FS = ("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0")


def _make(system: System, work: Path, lock: int) -> None:
    """The files of an image into work/made."""
    for tool in ("mke2fs", "dpkg-deb"):
        if not shutil.which(tool):
            raise RootMissing(f"{tool} is not installed")
    made, root, kernel = work / "made", work / "root", work / "kernel"
    made.mkdir(mode=0o755)
    kernel.mkdir()
    try:
        if system.board.linux == platform.machine():
            debootstrap(system.suite, root, system.packages, lock)
            _unpack_kernel(system, root, kernel, lock)
            run(["chroot", str(root), "apt-get", "clean"])
            busybox = unpacked(BUSYBOX_PACKAGE, cache_folder())
        else:
            _unpack_all(system, root, lock)
            kernel = busybox = root
        (root / PROJECT.lstrip("/")).mkdir()
        (made / "python").write_text(os.readlink(root / "usr/bin/python3").removeprefix("python"))
        shutil.copy(_vmlinuz(kernel), made / "kernel")
        (made / "initramfs").write_bytes(_initramfs(kernel, busybox))
        run([*_MKE2FS, "-d", str(root), str(made / "disk"), SIZE], lock)
    finally:
        remove(root)


def _unpack_kernel(system: System, root: Path, kernel: Path, lock: int) -> None:
    """The kernel is not installed: nothing in the root needs to know of it."""
    download = ["apt-get", "install", "-y", "-q", "--download-only", "--no-install-recommends"]
    # A kernel wants to be installed with something that makes it an initramfs; this is the smallest.
    run(["chroot", str(root), *download, system.kernel, "initramfs-tools"], lock)
    for package in sorted(root.glob("var/cache/apt/archives/linux-*.deb")):
        run(["dpkg-deb", "-x", str(package), str(kernel)], lock)


def _unpack_all(system: System, root: Path, lock: int) -> None:
    """A root for another architecture: nothing of it can be run here, so nothing is configured, only unpacked.

    That is enough to run programs; what their packages would have made besides is here.
    """
    packages = (*system.packages, BUSYBOX_PACKAGE, system.kernel)
    debootstrap(system.suite, root, packages, lock, foreign=system.board.debian)
    archives = root / "var/cache/apt/archives"
    for package in sorted(archives.glob("*.deb")):
        # Not dpkg-deb -x: it would put a folder where a root has /lib -> usr/lib.
        run(["sh", "-c", 'dpkg-deb --fsys-tarfile "$0" | tar -x --keep-directory-symlink -C "$1"', package, root], lock)
        package.unlink()
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    if (root / "proc").is_symlink():  # to the host's, for the stage that is not run
        (root / "proc").unlink()
        (root / "proc").mkdir()


def _vmlinuz(kernel: Path) -> Path:
    """Debian's kernel packages have it in /boot, from 7.0 on beside its modules."""
    for pattern in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"):
        for path in kernel.glob(pattern):
            return path
    raise RootMissing("the kernel's packages hold no kernel")


def _initramfs(kernel: Path, busybox: Path) -> bytes:
    """What mounts the disk; the project is appended to it. In whole words, as the kernel wants what follows."""
    program = next(path for path in (busybox / "bin/busybox", busybox / "usr/bin/busybox") if path.exists())
    modules = modules_of(kernel, MODULES)
    order = "\n".join(f"{name}.ko" for name in modules)
    return cpio(
        [
            ("bin", 0o40755, b""),
            ("modules", 0o40755, b""),
            ("bin/busybox", 0o100755, program.read_bytes()),
            ("init", 0o100755, INIT.encode()),
            ("modules/order", 0o100644, order.encode()),
            *((f"modules/{name}.ko", 0o100644, data) for name, data in modules.items()),
        ]
    )
