"""A small Linux guest that does nothing but disk I/O and says how far it is.

Knows: where kernel and busybox come from (Debian packages, unpacked into a cache and never
installed, else the host's own), how to make an initramfs, what the guest prints. Does not know faults.
"""

from __future__ import annotations

import gzip
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracer.errors import AioTraceError, LabError, ToolMissing
from tracer.lab.qemu import (
    SYSTEM,
    Drive,
    Qemu,
    common_arguments,
    drive_arguments,
    export,
    make_place,
    start,
)

KERNEL_PACKAGE = "linux-image-cloud-amd64"
BUSYBOX_PACKAGE = "busybox-static"
MODULES = ("virtio_pci", "virtio_blk")
OPERATIONS = ("write", "verify", "flush", "read", "discard")
#: Reads back every block that was written and not discarded since, and compares checksums: slow.
RECHECK = "recheck"
#: How long booting may take, until the first round: minutes where the machine is itself an emulated one. A guest
#: that panics or ends is not waited for.
BOOT_S = 900.0

PT_INTERP = 3
# How modules are packed; Python up to 3.13 knows nothing of Zstandard.
_UNPACKED: Mapping[str, Callable[[bytes], bytes]] = {".ko": bytes, ".xz": lzma.decompress, ".gz": gzip.decompress}

_PROGRESS = re.compile(r"^lab: job (\d+) did (\d+)\r?$", re.MULTILINE)
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")  # in a module's .modinfo

# Runs as process 1. Options come from the kernel's command line as lab_NAME=VALUE, which the kernel
# puts into the environment. Each operation is one request to the disk.
INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in $(cat /modules/order); do insmod /modules/$module || echo "lab: no $module"; done
until [ -b /dev/vda ]; do sleep 0.1; done

one() { # operation, block, job
    case $1 in
    write)
        dd if=/dev/urandom of=/tmp/data$3 bs=$lab_size count=1 2>/dev/null
        md5sum </tmp/data$3 >/tmp/sum$3.$2
        dd if=/tmp/data$3 of=/dev/vda bs=$lab_size count=1 seek=$2 oflag=direct conv=notrunc 2>/dev/null ;;
    read) dd if=/dev/vda of=/dev/null bs=$lab_size count=1 skip=$2 iflag=direct 2>/dev/null ;;
    flush) dd if=/dev/null of=/dev/vda bs=512 count=0 conv=notrunc,fsync 2>/dev/null ;;
    recheck)
        different=0
        for sum in /tmp/sum$3.*; do
            dd if=/dev/vda bs=$lab_size count=1 skip=${sum##*.} iflag=direct 2>/dev/null >/tmp/back$3
            md5sum </tmp/back$3 | cmp - $sum || different=1
        done
        [ $different = 0 ] ;;
    discard) rm -f /tmp/sum$3.$2; blkdiscard -o $(($2 * lab_size)) -l $lab_size /dev/vda ;;
    verify)
        dd if=/dev/vda of=/tmp/back$3 bs=$lab_size count=1 skip=$2 iflag=direct 2>/dev/null
        cmp /tmp/data$3 /tmp/back$3 ;;
    esac || echo "lab: job $3 failed at $1 of block $2"
}

job() { # job
    done=0
    while :; do
        for operation in $(echo $lab_mix | tr , ' '); do
            one $operation $(($1 * lab_blocks + done % lab_blocks)) $1
        done
        done=$((done + 1))
        echo "lab: job $1 did $done"
        [ $lab_pause = 0 ] || sleep $lab_pause
    done
}

echo "lab: ready"
count=1
while [ $count -lt $lab_jobs ]; do job $count & count=$((count + 1)); done
job 0
"""


# Kernel and busybox


@dataclass(frozen=True)
class BootFiles:
    """What a guest is started from: the kernel and the initramfs, in the lab's cache."""

    kernel: Path
    initramfs: Path


def cache_folder() -> Path:
    """Where unpacked packages are kept: where AIO_TRACE_LAB_CACHE says, else beside the tool's own cache."""
    if chosen := os.environ.get("AIO_TRACE_LAB_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "aio-trace"
    return Path("/var/cache/aio-trace") if os.geteuid() == 0 else Path.home() / ".cache/aio-trace"


def boot_files(cache: Path | None = None) -> BootFiles:
    """Kernel and initramfs, made ready (downloaded, if need be) in the cache."""
    if platform.machine() != "x86_64":
        raise LabError(f"the lab has no guest for {platform.machine()}")
    cache = cache or cache_folder()
    try:
        kernel, program = _packaged(cache)
    except AioTraceError as error:
        own = host_kernel()
        if own is None:
            raise LabError(
                f"a guest needs a kernel: Debian's could not be had ({error.message}), and here is none in /boot with "
                "virtio modules, or no static busybox",
                "apt-get install linux-image-cloud-amd64 busybox-static",
            ) from error
        kernel, program = own
    cache.mkdir(parents=True, exist_ok=True)
    initramfs = cache / "initramfs"
    _publish(initramfs, make_initramfs(kernel, program))
    return BootFiles(kernel.image, initramfs)


@dataclass(frozen=True)
class Kernel:
    """A kernel's image, and the folder of its modules (lib/modules/RELEASE)."""

    image: Path
    modules: Path


def _packaged(cache: Path) -> tuple[Kernel, Path]:
    folder, busybox = unpacked(KERNEL_PACKAGE, cache), unpacked(BUSYBOX_PACKAGE, cache)
    found = _kernels(folder)
    programs = [place for place in (busybox / "bin/busybox", busybox / "usr/bin/busybox") if place.exists()]
    if not found or not programs:
        raise LabError(f"the packages unpacked in {cache} hold no kernel or no busybox", f"rm -r {cache}")
    return found[0], programs[0]


def host_kernel(root: Path = Path("/")) -> tuple[Kernel, Path] | None:
    """A kernel that is installed, the running one first, and busybox; None if a guest cannot be made of these."""
    busybox = next((place for place in (root / "bin/busybox", root / "sbin/busybox") if _is_static(place)), None)
    found = sorted(_kernels(root), key=lambda kernel: kernel.modules.name != platform.release())
    usable = [kernel for kernel in found if os.access(kernel.image, os.R_OK) and _has_modules(kernel)]
    return (usable[0], busybox) if usable and busybox else None


def _kernels(root: Path) -> list[Kernel]:
    """What is below root, the newest first."""
    found = []
    for modules in (*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")):
        for image in (root / "boot" / f"vmlinuz-{modules.name}", modules / "vmlinuz"):
            if image.exists() and (modules / "kernel").is_dir():
                found.append(Kernel(image, modules))
    return sorted(found, key=lambda kernel: [int(n) for n in re.findall("[0-9]+", kernel.modules.name)], reverse=True)


def _has_modules(kernel: Kernel) -> bool:
    """Whether the guest's modules are there in a form that can be unpacked, or built in."""
    builtin = kernel.modules / "modules.builtin"
    names = {Path(line).stem for line in builtin.read_text().split()} if builtin.exists() else set()
    files = [_module_file(kernel.modules, name) for name in MODULES if name not in names]
    return all(file is not None and file.suffix in _UNPACKED for file in files)


def _module_file(folder: Path, name: str) -> Path | None:
    return next(folder.glob(f"**/kernel/**/{name}.ko*"), None)


def _is_static(program: Path) -> bool:
    """Whether it runs without a loader: it is all that the guest has."""
    try:
        data = program.read_bytes()
        start, size, count = (
            struct.unpack_from(kind, data, at)[0] for kind, at in (("<Q", 32), ("<H", 54), ("<H", 56))
        )
        kinds = [struct.unpack_from("<I", data, start + number * size)[0] for number in range(count)]
    except (OSError, struct.error):
        return False
    return data[:4] == b"\x7fELF" and PT_INTERP not in kinds


def unpacked(package: str, cache: Path) -> Path:
    """The folder with that Debian package's files; downloads and unpacks it when it is not there yet."""
    folder = cache / package
    if folder.is_dir():
        return folder
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ToolMissing(f"the lab's guest needs {tool}", f"put the unpacked {package} into {folder}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _run(["apt-get", "download", "-q", real_package(package)], Path(scratch))
        _run(["dpkg-deb", "-x", str(next(Path(scratch).glob("*.deb"))), f"{scratch}/files"], Path(scratch))
        if not folder.is_dir():
            os.rename(f"{scratch}/files", folder)
    return folder


def real_package(package: str) -> str:
    """What a meta package such as linux-image-cloud-amd64 stands for; any other package itself."""
    if not package.startswith("linux-image"):
        return package
    for line in _run(["apt-cache", "depends", package], Path("/")).splitlines():
        word, _, name = line.strip().partition(" ")
        if word == "Depends:" and name.startswith("linux-image"):
            return name
    return package


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}", "apt-get update")
    return done.stdout


def _publish(path: Path, data: bytes) -> None:
    """Write a file that others may be reading."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


# The initramfs


def make_initramfs(kernel: Kernel, busybox: Path) -> bytes:
    """A cpio archive of /init, busybox and the kernel's virtio modules."""
    modules = modules_of(kernel.modules, MODULES)
    order = "\n".join(f"{name}.ko" for name in modules)
    files = [
        ("bin", 0o40755, b""),
        ("modules", 0o40755, b""),
        ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("init", 0o100755, INIT.encode()),
        ("modules/order", 0o100644, order.encode()),
        *((f"modules/{name}.ko", 0o100644, data) for name, data in modules.items()),
    ]
    return cpio(files)


def modules_of(kernel: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Contents of those modules and what they need, by name, in an order in which they can be loaded.

    A module that is not there is built into the kernel.
    """
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = _module_file(kernel, name)
        if path is None or name in found:
            return
        data = _UNPACKED[path.suffix](path.read_bytes())
        depends = _DEPENDS.search(data)
        for other in depends[1].decode().split(",") if depends else ():
            add(other)
        found[name] = data

    for name in names:
        add(name)
    return found


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive of (name, mode, contents) in the "newc" format, as the kernel wants its initramfs."""
    archive = bytearray()
    entries = [*files, ("TRAILER!!!", 0, b"")]
    for inode, (name, mode, data) in enumerate(entries, start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


# The guest


@dataclass(frozen=True)
class Workload:
    """What the guest does in a loop: the operations of `mix` one after the other, then a pause.

    Each of `jobs` loops has its own `blocks` blocks of `size` bytes; `pause` is in seconds.
    """

    mix: Sequence[str] = ("write", "flush")
    pause: float = 0.05
    size: int = 4096
    blocks: int = 64
    jobs: int = 1

    def options(self) -> str:
        """The same for the kernel's command line."""
        if unknown := set(self.mix) - {*OPERATIONS, RECHECK}:
            raise LabError(f"the guest does not know how to {', '.join(sorted(unknown))}")
        values = {"mix": ",".join(self.mix), "pause": f"{self.pause:g}", "size": self.size}
        values |= {"blocks": self.blocks, "jobs": self.jobs}
        return " ".join(f"lab_{name}={value}" for name, value in values.items())


class Guest(Qemu):
    """A QEMU whose guest runs a Workload."""

    def console(self) -> str:
        """Everything the guest printed so far."""
        path = self.folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def progress(self) -> int:
        """How many rounds of its workload the guest has finished, all jobs together."""
        return sum({job: int(done) for job, done in _PROGRESS.findall(self.console())}.values())

    def failures(self) -> list[str]:
        """What the guest said went wrong, such as data that read back differently."""
        return [line for line in self.console().splitlines() if "failed at" in line or "Kernel panic" in line]

    def wait_progress(self, rounds: int = 1, timeout: float = 120.0) -> int:
        """Wait until that many more rounds are finished, and return the count then.

        LabError after `timeout` seconds without a further round: a guest that is only slow is waited for.
        """
        goal = self.progress() + rounds
        while (done := self.progress()) < goal:
            self._wait_round(done, timeout)
        return done

    def _wait_round(self, done: int, timeout: float) -> None:
        def further() -> bool:
            if failures := self.failures():
                raise LabError(f"the guest failed: {failures[0]}")
            return self.progress() > done

        try:
            self.wait_until(further, timeout, f"the guest to finish round {done + 1}")
        except LabError as error:
            raise LabError(f"{error.message}; its console ends: {self.console()[-300:]!r}") from error


def guest(
    workload: Workload | None = None,
    drive: Drive | None = None,
    *,
    exe: str = SYSTEM,
    chroot: Path | None = None,
    memory: int = 256,
    trace: bool = True,
    extra: Sequence[str] = (),
) -> Guest:
    """Boot a guest (emulated, `memory` MiB) with one virtio disk, and return once it does I/O."""
    workload, drive = workload or Workload(), drive or Drive()
    files = boot_files()
    place = make_place(chroot)
    shutil.copy(files.kernel, place.folder / "kernel")
    shutil.copy(files.initramfs, place.folder / "initramfs")
    device = f"virtio-blk-pci,drive={drive.name},id={drive.name}-device"
    if drive.iothread:
        device += f",iothread={drive.iothread}"
    argv = [exe, "-nodefaults", "-display", "none", "-machine", "q35,accel=tcg", "-cpu", "max"]
    argv += ["-m", str(memory), "-serial", f"file:{place.inside('console')}"]
    argv += ["-kernel", place.inside("kernel"), "-initrd", place.inside("initramfs")]
    argv += ["-append", f"console=ttyS0 quiet panic=-1 mitigations=off {workload.options()}", "-no-reboot"]
    argv += common_arguments(place, [drive], trace)
    argv += [*drive_arguments(place, drive), "-device", device, *extra]
    machine = start(place, argv, [drive], "trace", kind=Guest)
    try:
        export(machine, writable=False)
        machine.wait_progress(timeout=BOOT_S)
    except BaseException:
        machine.close()
        raise
    return machine
