"""What is measured on: processes that do requests without end, in slices of which tracers come and go.

Knows: qemu-img bench, a qemu-storage-daemon that serves a client over NBD, a Linux guest; how to count their
requests without costing them anything; how to hold them. Does not know tracers.

Every request of these loads is one read of 4 KiB from page cache by a worker thread. Beside those, a QEMU only
reads eventfds, of 8 bytes. Two counters of /proc/PID/io, bytes and calls, so give the number of requests
exactly, and they cost every row the same: nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Slice
from tracer.errors import LabError
from tracer.lab import guest as lab_guest
from tracer.lab.process import continue_process, end, spawn, stop_process, wait_until
from tracer.lab.qemu import MIB, Drive, storage_daemon

REQUEST_BYTES, EVENTFD_BYTES = 4096, 8
IMAGE_BYTES = 64 * MIB
ENDLESS = 2_000_000_000
WARM_REQUESTS = 2000

# Like the lab's, but a disk that is never left alone: dd makes one request after the other.
GUEST_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in $(cat /modules/order); do insmod /modules/$module || echo "lab: no $module"; done
until [ -b /dev/vda ]; do sleep 0.1; done
job() {
    done=0
    while :; do
        dd if=/dev/vda of=/dev/null bs=4k count=8192 iflag=direct 2>/dev/null
        done=$((done + 1))
        echo "lab: job $1 did $done"
    done
}
echo "lab: ready"
job 1 & job 2 & job 3 & job 0
"""


def scratch_folder() -> Path:
    """Where temporary folders are made: where TMPDIR says, else in memory if that is possible."""
    shared = Path("/dev/shm")
    in_memory = "TMPDIR" not in os.environ and os.access(shared, os.W_OK)
    return shared if in_memory else Path(tempfile.gettempdir())


@contextlib.contextmanager
def bench_folder() -> Iterator[Path]:
    """A folder for everything that the bench writes; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="aio-trace-bench-", dir=scratch_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_image(folder: Path) -> Path:
    """The disk of all loads: not sparse, so that each read copies 4 KiB."""
    image = folder / "disk.img"
    if not image.exists():
        with open(image, "wb") as file:
            for _ in range(IMAGE_BYTES // MIB):
                file.write(os.urandom(MIB))
    return image


def requests_from_io(text: str) -> int:
    """How many reads of 4 KiB a process did, from its /proc/PID/io; see this module's docstring."""
    fields = dict(line.split(": ") for line in text.splitlines())
    bytes_read, calls = int(fields["rchar"]), int(fields["syscr"])
    return (bytes_read - EVENTFD_BYTES * calls) // (REQUEST_BYTES - EVENTFD_BYTES)


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far, with the scheduler's resolution."""
    return time.clock_gettime(~pid << 3 | 2)  # CPUCLOCK_SCHED of that process: clock_getcpuclockid(3)


@dataclass
class Load:
    """A running target. `close` ends it; `helpers` are processes that belong to it but are not measured."""

    name: str
    process: subprocess.Popen[bytes] | None
    pid: int
    exe: str
    stack: contextlib.ExitStack
    helpers: tuple[int, ...] = ()

    def requests(self) -> int:
        """How many requests it did so far; LabError if it ended."""
        try:
            return requests_from_io(Path(f"/proc/{self.pid}/io").read_text(encoding="ascii"))
        except OSError as error:
            raise LabError(f"the load {self.name} ended: {error}") from error

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process is None or self.process.poll() is None

    def warm_up(self, requests: int = WARM_REQUESTS) -> None:
        """Wait until it did that many more requests."""
        goal = self.requests() + requests
        wait_until(lambda: self.requests() >= goal, 120, f"{self.name} to do {requests} requests")

    def hold(self) -> None:
        """Let nothing of it run."""
        for pid in (*self.helpers, self.pid):
            stop_process(pid)

    def release(self) -> None:
        """Let it run again."""
        for pid in (self.pid, *self.helpers):
            continue_process(pid)

    def measure(self, seconds: float, tracers: tuple[int, ...] = ()) -> Slice:
        """One slice of about that length; `tracers` are processes whose CPU time is taken as well."""
        began, before = time.monotonic(), self._read(tracers)
        time.sleep(seconds)
        ended, after = time.monotonic(), self._read(tracers)
        requests, target, tracer = (now - then for now, then in zip(after, before))
        return Slice(ended - began, int(requests), target, tracer if tracers else None)

    def _read(self, tracers: tuple[int, ...]) -> tuple[float, float, float]:
        return self.requests(), cpu_seconds(self.pid), sum(map(cpu_seconds, tracers))

    def close(self) -> None:
        """End it and everything that belongs to it."""
        self.stack.close()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpus() -> list[int]:
    """The CPUs that may be used."""
    return sorted(os.sched_getaffinity(0))


def pin(pid: int, cpu: int) -> None:
    """Put a process and the threads that it will start on one CPU."""
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):  # a worker that ended
            os.sched_setaffinity(int(task), {cpu})


def exe_of(name: str) -> str:
    """The path of an installed program; LabError if it is missing."""
    found = shutil.which(name)
    if found is None:
        raise LabError(f"{name} is not installed", "sudo make bench installs what it needs")
    return os.path.realpath(found)


def _started(stack: contextlib.ExitStack, argv: list[str], output: Path) -> subprocess.Popen[bytes]:
    with open(output, "wb") as file:
        process = spawn(argv, file)
    stack.callback(end, process)
    return process


def bench_command(depth: int, image: str, *options: str) -> list[str]:
    """qemu-img bench without end: reads of 4 KiB."""
    return [exe_of("qemu-img"), *options, "bench", "-f", "raw", "-c", str(ENDLESS), "-d", str(depth), "-s", "4k", image]


def image_bench(folder: Path, depth: int, trace_log: Path | None = None, one_cpu: bool = False) -> Load:
    """`qemu-img bench -i threads` on page cache; `trace_log`: with QEMU's own trace of its thread pool.

    `one_cpu`: all its threads on one CPU. What a request costs is steadier by a factor of ten then, but threads
    do not meet in the same cache line.
    """
    options = [] if trace_log is None else ["-T", f"enable=thread_pool_*,file={trace_log}"]
    argv = bench_command(depth, str(make_image(folder)), *options)
    place = argv.index("bench") + 1
    argv[place:place] = ["-i", "threads", "-t", "writeback"]
    with contextlib.ExitStack() as stack:
        process = _started(stack, argv, folder / f"bench-{depth}.out")
        name = f"qemu-img bench, depth {depth}{', on one CPU' if one_cpu else ''}"
        load = Load(name, process, process.pid, argv[0], stack.pop_all())
    if one_cpu:
        pin(load.pid, cpus()[0])
    return _warm(load)


def daemon(folder: Path, depth: int = 32) -> Load:
    """A qemu-storage-daemon that serves `qemu-img bench` over NBD; only the daemon is measured.

    Each has a CPU of its own: where they move about, the cost of a request is now this, now half as much again.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(storage_daemon([Drive(file=make_image(folder))], trace=False))
        url = f"nbd+unix:///d0?socket={server.folder / 'nbd'}"
        client = _started(stack, bench_command(depth, url), server.folder / "client.out")
        name = f"qemu-storage-daemon over NBD, depth {depth}"
        load = Load(name, client, server.pid, exe_of("qemu-storage-daemon"), stack.pop_all(), (client.pid,))
    pin(load.pid, cpus()[0])
    pin(client.pid, cpus()[-1])
    return _warm(load)


def idle_daemon(folder: Path) -> Load:
    """A qemu-storage-daemon whose thread pool was used once and has nothing to do now."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(storage_daemon([Drive(file=make_image(folder))], trace=False))
        server.request("d0", "read")
        return Load("idle qemu-storage-daemon", None, server.pid, exe_of("qemu-storage-daemon"), stack.pop_all())


def linux_guest(folder: Path) -> Load:
    """A Linux guest with four readers on a virtio disk, emulated."""
    files = lab_guest.boot_files()
    archive = folder / "initramfs"
    # The kernel unpacks one archive after the other; the last file of a name stays.
    init = lab_guest.cpio([("init", 0o100755, GUEST_INIT.encode())])
    archive.write_bytes(files.initramfs.read_bytes() + init)
    with contextlib.ExitStack() as stack:
        drive = Drive(file=make_image(folder))
        extra = ("-initrd", str(archive))
        machine = stack.enter_context(lab_guest.guest(drive=drive, trace=False, extra=extra))
        name = "Linux guest, virtio-blk, 4 readers"
        load = Load(name, None, machine.pid, os.readlink(f"/proc/{machine.pid}/exe"), stack.pop_all())
    return _warm(load)


def _warm(load: Load) -> Load:
    try:
        load.warm_up()
    except BaseException:
        load.close()
        raise
    return load
