"""`nudge --via virsh` on real libvirts of our own: the right domain is freed, and no other is asked for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.qemu.nudging import ROOT, Nudge, nudge
from tracer.lab import faults, process
from tracer.lab.process import wait_until
from tracer.lab.qemu import SYSTEM, Drive, Qemu, export, make_place

UUIDS = ("c7a5fdbd-edaf-9455-926a-d65c16db1801", "c7a5fdbd-edaf-9455-926a-d65c16db1802")
#: A libvirt of which the host's own sees nothing, without what would cost it time: /dev/kvm, other emulators.
DAEMONS = """
cd {folder} && mkdir dev && mount -t tmpfs -o mode=755 none dev
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/pts dev/shm && mount --bind /dev/pts dev/pts && mount --bind /dev/shm dev/shm && ln -s pts/ptmx dev/ptmx
mount --move dev /dev
for folder in /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt/qemu; do
    mkdir -p $folder && mount -t tmpfs -o mode=755 none $folder
done
for other in /usr/bin/qemu-system-*; do
    [ $other = {emulator} ] || mount --bind /dev/null $other
done
virtlogd -p {folder}/virtlogd.pid &
exec libvirtd -p {folder}/libvirtd.pid
"""
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>32</memory>
  <os><type>hvm</type></os><features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{image}'/><target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


class LibvirtDrive(Drive):
    """A disk by the name that libvirt gives to its node."""

    @property
    def node(self) -> str:
        return "libvirt-1-format"


class Libvirt:
    """A libvirtd with its virtlogd, in a mount namespace of its own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        script = DAEMONS.format(folder=folder, emulator=shutil.which(SYSTEM))
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
        with (folder / "output").open("wb") as output:
            self._child = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        stack.callback(self._end)
        wait_until(lambda: self._child.poll() is None and self.virsh("list").returncode == 0, 60, "libvirtd")

    @property
    def inside(self) -> tuple[str, ...]:
        """The words ahead of a command that is to see this libvirt."""
        return ("nsenter", "--mount", f"--target={self._child.pid}", "--")

    @property
    def socket(self) -> str:
        """A URI by which it is reached from outside."""
        return f"qemu+unix:///system?socket=/proc/{self._child.pid}/root/run/libvirt/libvirt-sock"

    def virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*self.inside, "virsh", "-c", "qemu:///system", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def start(self, name: str, uuid: str) -> Domain:
        """A domain that is not let run yet."""
        domain = Domain(self, name, uuid)
        self._stack.callback(domain.close)
        export(domain, writable=False)
        return domain

    def tainted(self, uuid: str) -> bool:
        return "tainted" in self.virsh("dominfo", uuid).stdout

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(10)


class Domain(Qemu):
    """A QEMU of libvirt's; the lab's own way to its monitor is through virsh, too."""

    def __init__(self, libvirt: Libvirt, name: str, uuid: str) -> None:
        place = make_place(None)
        place.folder.chmod(0o777)
        image = place.folder / "d0.img"
        image.write_bytes(bytes(1 << 20))
        image.chmod(0o666)
        description = place.folder / "domain.xml"
        description.write_text(DOMAIN.format(name=name, uuid=uuid, emulator=shutil.which(SYSTEM), image=image))
        self._libvirt, self.name, self.uuid = libvirt, name, uuid
        made = libvirt.virsh("create", "--paused", str(description))
        assert made.returncode == 0, made.stderr
        read = subprocess.run(
            [*libvirt.inside, "cat", f"/run/libvirt/qemu/{name}.pid"], capture_output=True, check=True
        )
        self._number = int(read.stdout)
        process.adopt(self._number)
        drive = LibvirtDrive()
        self.drives, self.has_hmp, self.folder = {"d0": drive}, False, place.folder
        self.inside = place.inside
        self._trace_log = place.folder / "trace"
        self._clients = {}

    @property
    def pid(self) -> int:
        return self._number

    def running(self) -> bool:
        return os.path.exists(f"/proc/{self._number}")

    def qmp(self, command: str, **arguments: object) -> Any:
        spelled = {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}
        message = json.dumps({"execute": command, "arguments": spelled})
        done = self._libvirt.virsh("qemu-monitor-command", self.uuid, message)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert "return" in answer, answer
        return answer["return"]

    def reads(self) -> int:
        """How many reads of its disk were made so far, by QEMU's own count."""
        return sum(disk["parent"]["stats"]["rd_operations"] for disk in self.qmp("query-blockstats"))

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            stack.callback(self._libvirt.virsh, "destroy", self.uuid)
            for client in self._clients.values():
                stack.callback(client.close)


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Libvirt, Libvirt]]:
    """Two libvirts that know nothing of each other, as on a host and in a container."""
    for program, package in (("libvirtd", "libvirt-daemon-system"), ("virsh", "libvirt-clients")):
        require(shutil.which(program), f"{program} is not installed: apt install {package}")
    require(os.geteuid() == 0, "libvirtd needs root")
    with ExitStack() as stack:
        yield (
            Libvirt(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aio-trace-libvirt-"))), stack),
            Libvirt(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aio-trace-libvirt-"))), stack),
        )


def by_virsh(domain: Domain, libvirt: Libvirt, *options: str) -> Nudge:
    return nudge(domain.pid, "--via", "virsh", *options, before=libvirt.inside)


def traced_for_people(domain: Domain) -> str:
    """What the main job says until it has given an alert."""
    command = [sys.executable, str(ROOT / "cli.py"), "--pid", str(domain.pid), "--deadline", "200ms", "--interval", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tracer:
        assert tracer.stdout
        said = ""
        for line in tracer.stdout:
            said += line
            if "aio-trace nudge" in line:
                tracer.terminate()
        return said


@pytest.mark.timeout(300)
def test_the_right_domain_is_freed_and_no_other_is_asked(both: tuple[Libvirt, Libvirt]) -> None:
    one, other = both
    # libvirt's number of the first is 1, which is the second's name: virsh takes that for the first.
    spaced, digits = one.start("web 1", UUIDS[0]), one.start("1", UUIDS[1])
    assert one.virsh("domname", UUIDS[1]).stdout.strip() == "1"
    twin = other.start("1", UUIDS[1])
    for domain, words in ((spaced, ("1", "web 1", UUIDS[0].upper())), (digits, ("2", "1", UUIDS[1]))):
        for word in words:
            lost = faults.lose(domain, "d0", "read")
            reads = {each: each.reads() for each in (spaced, digits, twin)}
            done = by_virsh(domain, one, "--domain", word)
            assert done.status == 0, done.errors
            assert done.nudges[0]["freed"] is True
            assert not lost.still_lost()
            assert "tainted (custom-monitor)" in done.errors.split("sending:")[0]
            assert {each for each in reads if each.reads() != reads[each]} <= {domain}
    lost = faults.lose(digits, "d0", "read")
    refused = {
        ("is domain 1 (", one, ("--domain", "web 1")): "not web 1; nothing was sent",
        ("the other's pid file", other, ()): f"is process {twin.pid}, not {digits.pid}; nothing was sent",
        ("threads", one, ("--connect", other.socket)): "nothing was sent but query-cpus-fast, gpa2hva 0",
    }
    before = twin.reads()
    for (_, libvirt, options), sentence in refused.items():
        done = by_virsh(digits, libvirt, *options)
        assert done.status == 1
        assert sentence in done.errors
    assert lost.still_lost()
    assert twin.reads() == before
    assert f"sudo aio-trace nudge --pid {digits.pid} --via virsh" in traced_for_people(digits)
    lost.free()
    lost = faults.lose(twin, "d0", "read")
    done = by_virsh(twin, one, "--connect", other.socket)
    assert done.status == 0, done.errors
    assert not lost.still_lost()


@pytest.mark.timeout(120)
def test_a_domain_that_is_suspended_is_said_to_be(both: tuple[Libvirt, Libvirt]) -> None:
    domain = both[0].start("still", UUIDS[0].replace("c7", "c8"))
    for word in ("resume", "suspend"):
        assert both[0].virsh(word, domain.uuid).returncode == 0
    told = inspected(domain)
    assert told["verdict"] in ("healthy", "elsewhere")
    assert "paused" in told["explanation"]


@pytest.mark.timeout(300)
def test_a_dump_that_never_ends(both: tuple[Libvirt, Libvirt]) -> None:
    """`virsh dump` waits in bdrv_drain_all for the lost request, and the monitor with it: --force ends both."""
    libvirt = both[0]
    domain = libvirt.start("dumped", UUIDS[0].replace("c7", "c9"))
    assert libvirt.virsh("resume", domain.uuid).returncode == 0
    wait_until(lambda: firmware_is_idle(domain), 60, "the firmware to have looked for something to boot")
    faults.lose(domain, "d0", "read")
    command = [*libvirt.inside, "virsh", "-c", "qemu:///system", "dump", domain.uuid, str(domain.folder / "dump")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as dumping:
        wait_until(lambda: inspected(domain)["draining"], 60, "the dump to wait for the request")
        told = inspected(domain)
        assert told["verdict"] == "lost-wakeup"
        assert told["draining"].startswith("bdrv_drain_all")
        assert f"nudge --pid {domain.pid} --force" in traced_for_people(domain)
        done = nudge(domain.pid, "--force", "--yes")
        assert done.status == 0, done.errors
        said, _ = dumping.communicate(timeout=120)
    assert dumping.returncode == 0, said
    assert inspected(domain)["verdict"] in ("healthy", "elsewhere")


@pytest.mark.timeout(120)
def test_a_disk_that_was_plugged_in(both: tuple[Libvirt, Libvirt]) -> None:
    libvirt = both[0]
    domain = libvirt.start("plugged", UUIDS[0].replace("c7", "ca"))
    image = domain.folder / "d1.img"
    image.write_bytes(bytes(1 << 20))
    image.chmod(0o666)
    how = ("--driver", "qemu", "--subdriver", "raw", "--live")
    made = libvirt.virsh("attach-disk", domain.uuid, str(image), "vdb", *how)
    assert made.returncode == 0, made.stderr
    domain.drives["d1"] = Drive("d1")
    options = {"type": "nbd", "id": "d1-export", "name": "d1", "node_name": "libvirt-2-format", "writable": False}
    domain.qmp("block-export-add", **options)
    lost = faults.lose(domain, "d1", "read")
    (request,) = [request for pool in inspected(domain)["pools"] for request in pool["requests"]]
    assert request["file"] == str(image)
    done = by_virsh(domain, libvirt)
    assert done.status == 0, done.errors
    assert not lost.still_lost()


def firmware_is_idle(domain: Domain) -> bool:
    """Whether it has read from the disk, and does so no more: that would free what is lost there."""
    before, after = (_guests_reads(domain, pause_s) for pause_s in (0, 2))
    return 0 < before == after


def _guests_reads(domain: Domain, pause_s: float) -> int:
    time.sleep(pause_s)
    return sum(disk["stats"]["rd_operations"] for disk in domain.qmp("query-blockstats"))


def inspected(domain: Domain) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "cli.py"), "inspect", "--pid", str(domain.pid), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
