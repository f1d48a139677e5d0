"""`aio-trace nudge`: what it frees, what it refuses, what it sends, on real QEMUs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.qemu.nudging import ROOT, WITNESS, by_force, by_monitor, commands, free_a_guest, nudge
from tests.qemu.test_sampling import busy_pool
from tests.qemu.tracing import traced
from tracer.build import load, read_build
from tracer.errors import NudgeRefused
from tracer.lab import faults
from tracer.lab.guest import Workload, guest
from tracer.lab.kicks import lose_kick
from tracer.lab.qemu import STORAGE_DAEMON, Drive, Qemu, TraceCounts, paused, storage_daemon
from tracer.lab.storage import storage
from tracer.live import LiveView
from tracer.looking import Looker
from tracer.nudge import Nudge
from tracer.survey import survey
from tracer.target import open_target
from tracer.verdict import as_evidence

#: How often each way frees a lost completion in these tests; 100 for the long form.
ROUNDS = int(os.environ.get("AIO_TRACE_NUDGE_ROUNDS", "2"))
REFUSALS = int(os.environ.get("AIO_TRACE_NUDGE_REFUSALS", "15"))
LONG = pytest.mark.timeout(120 + 10 * ROUNDS + REFUSALS)
MOST_PAUSE_MS = 200


@pytest.fixture(params=["main loop", "iothread"])
def watched(request: pytest.FixtureRequest) -> Iterator[Qemu]:
    """A QEMU whose trace log also says what its monitors were sent; d0 in the main loop, then in an iothread."""
    with paused(iothread=request.param == "iothread", extra=WITNESS) as qemu:
        yield qemu


# What it frees


@LONG
def test_by_monitor(watched: Qemu) -> None:
    pool = faults.pool_of(watched, "d0")
    for _ in range(ROUNDS):
        lost = faults.lose(watched, "d0", "write", pool)
        before, sent = watched.trace_counts(), len(commands(watched))
        done = by_monitor(watched)
        assert done.status == 0, done.errors
        assert not lost.still_lost()
        (event,) = done.nudges
        assert event["request"] == hex(lost.request)
        assert event["cause"] == "lost-wakeup"
        assert event["freed"] is True
        # QEMU's own trace: one request, and no other command than those announced.
        watched.wait_until(lambda expected=before.submitted + 1: watched.trace_counts().completed == expected)
        assert watched.trace_counts().submitted == before.submitted + 1
        names = [json.loads(line)["execute"] for line in commands(watched)[sent:] if line.startswith("{")]
        assert names == ["qmp_capabilities", "query-status", "query-blockstats", "human-monitor-command"]
        assert "query-status" in done.errors
        assert 'qemu-io d0 "aio_read -q 1 510"' in done.errors


@LONG
def test_by_force(watched: Qemu) -> None:
    pool = faults.pool_of(watched, "d0")
    for _ in range(ROUNDS):
        lost = faults.lose(watched, "d0", "write", pool)
        before, sent = watched.trace_counts(), commands(watched)
        done = by_force(watched)
        assert done.status == 0, done.errors
        assert not lost.still_lost()
        (event,) = done.nudges
        assert (event["request"], event["freed"]) == (hex(lost.request), True)
        assert 0 < event["pause_ms"] < MOST_PAUSE_MS
        watched.wait_until(lambda expected=before.submitted: watched.trace_counts().completed == expected)
        assert watched.trace_counts().submitted == before.submitted
        assert commands(watched) == sent
    watched.request("d0", "write")


@pytest.mark.usefixtures("guest_files")
@pytest.mark.parametrize(("image_format", "iothread"), [("qcow2", None), ("raw", "io0")])
@LONG
def test_a_guest_goes_on_and_loses_nothing(image_format: str, iothread: str | None, tmp_path: Path) -> None:
    free_a_guest(tmp_path, image_format, iothread, (by_monitor, by_force), max(1, ROUNDS // 3))


@pytest.mark.parametrize("iothread", [None, "io0"])
def test_a_lost_kick_needs_a_question_only(iothread: str | None) -> None:
    with storage() as slow, paused([slow.drive(iothread=iothread)], extra=WITNESS) as qemu:
        request = lose_kick(qemu, slow, faults.pool_of(qemu, "d0")).request
        before, sent = qemu.trace_counts(), len(commands(qemu))
        assert by_force(qemu).status == 1
        done = by_monitor(qemu)
        assert done.status == 0, done.errors
        (event,) = done.nudges
        assert (event["request"], event["cause"], event["freed"]) == (hex(request), "lost-kick", True)
        names = [json.loads(line)["execute"] for line in commands(qemu)[sent:] if line.startswith("{")]
        ring = ["query-iothreads", "qom-set"] if iothread else []
        assert names == ["qmp_capabilities", "query-status", "query-blockstats", *ring]
        assert qemu.trace_counts() == TraceCounts(before.submitted, before.submitted)


def test_what_force_is_not_for_is_told_beside_what_it_freed() -> None:
    """One pool is freed and another is not: that is no success."""
    with storage() as slow, paused([slow.drive(iothread="io0"), Drive("d1")]) as qemu:
        lost = faults.lose(qemu, "d1", "write")
        kick = lose_kick(qemu, slow, faults.pool_of(qemu, "d0"))
        done = by_force(qemu)
        assert not lost.still_lost()
        assert [(event["request"], event["freed"]) for event in done.nudges] == [(hex(lost.request), True)]
        assert done.status == 3, done.errors
        (error,) = (event for event in done.events if event["event"] == "error")
        assert f"{kick.request:#x} of another pool is stuck still, and nothing was done for it: lost-kick." in str(
            error
        )
        assert f"nudge --pid {qemu.pid} --qmp SOCKET" in error["hint"]


def test_a_dead_monitor_is_freed_by_force(paused_qemu: Qemu) -> None:
    lost = faults.lose(paused_qemu, "d0", "flush")
    with faults.stopping(paused_qemu) as stop:
        done = by_monitor(paused_qemu, "--timeout", "1s")
        assert done.status == 1
        assert "does not answer within 1 s" in done.errors
        assert "--force" in done.errors
        assert lost.still_lost()
        done = by_force(paused_qemu)
        assert done.status == 0, done.errors
        assert done.nudges[0]["freed"] is True
        stop.wait()
    counts = paused_qemu.trace_counts()
    assert paused_qemu.qmp("query-status")["running"] is False
    assert counts == TraceCounts(counts.submitted, counts.submitted)


def test_the_main_job_nudges_once(watched: Qemu) -> None:
    options = ("--deadline", "200ms", "--nudge", str(watched.spare_monitor))
    pool = faults.pool_of(watched, "d0")
    with traced(watched.pid, *options) as trace:
        for _ in range(2):
            lost = faults.lose(watched, "d0", "write", pool)
            assert trace.expect("alert")["cause"] == "lost-wakeup"
            assert trace.expect("resolved")["request"] == hex(lost.request)
        trace.finish()
        nudges = trace.named("nudge")
        assert [(event["request"], event["freed"]) for event in nudges] == [(hex(lost.request), True)] * 2
        assert trace.named("error") == []


def test_the_main_job_goes_on_where_the_monitor_is_held(paused_qemu: Qemu) -> None:
    with traced(paused_qemu.pid, "--deadline", "200ms", "--nudge", str(paused_qemu.folder / "lab.qmp")) as trace:
        lost = faults.lose(paused_qemu, "d0", "write")
        trace.expect("alert")
        assert "holds the monitor" in trace.expect("error")["message"]
        assert lost.still_lost()
        lost.free()
        trace.expect("resolved")


@contextlib.contextmanager
def audit_log(folder: Path) -> Iterator[tuple[socket.socket, tuple[str, ...]]]:
    """A log socket of our own, and the words ahead of a command that give it that one, in a mount namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(folder / "log"))
        log.settimeout(10)
        script = (
            f"mkdir -p {folder}/dev && mount -t tmpfs none {folder}/dev && cd {folder}/dev && "
            f"for name in null zero random urandom; do touch $name && mount --bind /dev/$name $name; done && "
            f"touch log && mount --bind {folder}/log log && mount --move {folder}/dev /dev && "
            f'cd {ROOT} && exec "$@"'
        )
        yield log, ("unshare", "--mount", "sh", "-c", script, "sh")


def test_each_nudge_leaves_an_audit_line(paused_qemu: Qemu, tmp_path: Path) -> None:
    with audit_log(tmp_path) as (log, before):
        environment = {**os.environ, "SUDO_USER": "operator", "SUDO_UID": "4711"}
        for options in (("--qmp", str(paused_qemu.spare_monitor)), ("--force", "--yes")):
            lost = faults.lose(paused_qemu, "d0", "write")
            done = nudge(paused_qemu.pid, *options, before=before, environment=environment)
            assert done.status == 0, done.errors
            line = log.recv(4096).decode()
            assert f"nudge pid={paused_qemu.pid} " in line
            assert f"request={lost.request:#x}" in line
            assert "before=lost-wakeup after=gone freed=yes" in line
            sent = """command='query-status; query-blockstats; qemu-io d0 "aio_read -q 1 510"'"""
            assert (sent if "--qmp" in options else "command='qemu_bh_schedule(") in line
            assert "by=operator(uid 4711)" in line
            assert "audit line is" not in done.errors
        assert nudge(paused_qemu.pid, "--force", "--yes", before=before).status == 1
        log.setblocking(False)
        with pytest.raises(BlockingIOError):
            log.recv(4096)


def test_no_name_of_an_executable_forges_or_loses_an_audit_line(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/q\xff\nnudge pid=1"
    os.mkdir(folder)
    program = shutil.copy(
        os.fsencode(shutil.which(STORAGE_DAEMON) or STORAGE_DAEMON), folder + b"/qemu-storage-daemon after=gone"
    )
    with audit_log(tmp_path) as (log, before), storage_daemon(exe=os.fsdecode(program)) as qemu:
        faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--force", "--yes", before=before)
        assert done.status == 0, done.errors
        line = log.recv(4096).decode()
        name = rf"'{tmp_path}/q\xff\nnudge pid=1/qemu-storage-daemon after=gone'"
        assert f"nudge pid={qemu.pid} exe={name} request=0x" in line
        assert line.isprintable()


def test_a_log_that_nobody_reads_does_not_hold_it_up(paused_qemu: Qemu, tmp_path: Path) -> None:
    with audit_log(tmp_path) as (log, before):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as filler:
            filler.connect(str(tmp_path / "log"))
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler.send(b"x")
        faults.lose(paused_qemu, "d0", "write")
        done = nudge(paused_qemu.pid, "--force", "--yes", before=before)
        assert done.status == 0, done.errors
        assert f"the audit line is: nudge pid={paused_qemu.pid} " in done.errors
        log.close()
        faults.lose(paused_qemu, "d0", "write")
        done = nudge(paused_qemu.pid, "--force", "--yes", before=before)
        assert f"the audit line is: nudge pid={paused_qemu.pid} " in done.errors


KILLED = """
import os, signal, sys
from tracer import inject
from tracer.build import read_build
from tracer.lab.storage import Storage, storage
from tracer.layout import RequestState
from tracer.looking import Looker
from tracer.memory import LiveMemory
from tracer.nudge import Nudge
from tracer.target import open_target

at = int(sys.argv[2])
plain, calls = inject._Stopped._ptrace, 0


def ptrace(self, *arguments, **named):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, *arguments, **named)


inject._Stopped._ptrace = ptrace
target = open_target(int(sys.argv[1]))
nudger = Nudge(target, read_build(target.image_path, target.exe), lambda text: None)
nudger.force(nudger.diagnose())
print(calls)
"""


INTERRUPTED = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + KILLED.replace(
    "SIGKILL", "SIGINT"
)


@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 12, 13])
def test_a_call_is_named_if_it_was_made(paused_qemu: Qemu, tmp_path: Path, at: int) -> None:
    """Interrupted at any of its steps, --force has the call in the log, or did not make it."""
    lost = faults.lose(paused_qemu, "d0", "write")
    with audit_log(tmp_path) as (log, before):
        command = [*before, sys.executable, "-c", INTERRUPTED, str(paused_qemu.pid), str(at)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert "KeyboardInterrupt" in done.stderr
        log.setblocking(False)
        lines = []
        with contextlib.suppress(BlockingIOError):
            lines.append(log.recv(4096).decode())
    paused_qemu.kick("d0")
    assert lost.still_lost() is not bool(lines)
    assert ["command='qemu_bh_schedule(" in line for line in lines] == [True] * len(lines)
    if not lines:
        lost.free()


# What it reads


def _send(qemu: Qemu, line: str) -> None:
    assert qemu.hmp(line) == ""


def _lose_on(qemu: Qemu, line: str) -> faults.LostCompletion:
    """Lose the completion of what that line of the human monitor asks for, in the pool of d0."""
    return faults.lose_completion(qemu, "d0", faults.pool_of(qemu, "d0"), lambda: _send(qemu, line))


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
def test_the_read_goes_through_the_pool_whatever_the_aio_mode(aio: str, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    drive = f"if=none,id=other,format=raw,file={image},aio={aio},cache=none,discard=unmap"
    with paused(extra=["-drive", drive, *WITNESS]) as qemu:
        lost = _lose_on(qemu, 'qemu-io other "aio_write -z -u 0 64k"')
        done = by_monitor(qemu)
        assert done.status == 0, done.errors
        assert 'sending: qemu-io other "aio_read' in done.errors
        assert not lost.still_lost()


@pytest.mark.parametrize("extended", ["off", "on"])
def test_a_qcow2_image_is_read_where_it_has_data(extended: str, tmp_path: Path) -> None:
    """A read of what is not in the image asks no pool: the first sector would not do."""
    image, at = tmp_path / "disk", 700 << 20
    options = ["-f", "qcow2", "-o", f"extended_l2={extended}"]
    subprocess.run(["qemu-img", "create", "-q", *options, image, "1G"], check=True)
    subprocess.run(["qemu-io", "-c", f"write {at} 64k", image], check=True, stdout=subprocess.DEVNULL)
    with paused([Drive(format="qcow2", file=image)]) as qemu:
        qemu.request("d0", "read", at)
        (pool,) = faults.locate_pools(qemu)
        lost = faults.lose_completion(qemu, "d0", pool, lambda: qemu.submit("d0", "write", at))
        before = qemu.trace_counts()
        qemu.io("d0", "aio_read -q 1 510")
        qemu.kick("d0")
        assert qemu.trace_counts() == before
        assert lost.still_lost()
        done = by_monitor(qemu)
        assert done.status == 0, done.errors
        assert not lost.still_lost()
        assert f'"aio_read -q {at + 1} 510"' in done.errors


def test_lost_metadata_of_qcow2(tmp_path: Path) -> None:
    """It holds the image's lock, for which our read waits: another disk of the pool does it, else --force."""
    image, other = tmp_path / "disk", tmp_path / "other"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
    other.write_bytes(bytes(1 << 20))
    for drives in ([], ["-drive", f"if=none,id=other,format=raw,file={other}"]):
        with paused([Drive(format="qcow2", file=image)], extra=drives) as qemu:
            lost = faults.lose(qemu, "d0", "flush")
            done = by_monitor(qemu)
            assert done.status == (0 if drives else 3), done.errors
            assert done.nudges[0]["freed"] is bool(drives)
            if not drives:
                assert f"nudge --pid {qemu.pid} --force" in done.errors
                assert by_force(qemu).status == 0
            assert not lost.still_lost()
    subprocess.run(["qemu-img", "check", "-q", image], check=True)


def _read_to(asked: subprocess.Popen[bytes], word: bytes) -> None:
    """Read what it says up to that word."""
    assert asked.stderr
    said = b""
    while word not in said:
        part = os.read(asked.stderr.fileno(), 4096)
        assert part, said
        said += part


def test_it_asks_before_force(paused_qemu: Qemu) -> None:
    lost = faults.lose(paused_qemu, "d0", "write")
    command = [sys.executable, str(ROOT / "cli.py"), "nudge", "--pid", str(paused_qemu.pid), "--force"]
    for answer, status in ((b"n\n", 1), (b"", 1), (b"y\n", 0)):
        ours, theirs = os.openpty()
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as asked:
            if answer:
                os.write(ours, answer)
            else:
                _read_to(asked, b"Do it?")
                asked.send_signal(signal.SIGINT)
            _, errors = asked.communicate(timeout=60)
        os.close(ours)
        os.close(theirs)
        assert asked.returncode == status, errors
        if answer:
            assert b"call qemu_bh_schedule(" in errors
            assert b"stands still" in errors
        assert (b"not done" in errors) is (answer == b"n\n")
        assert (b"\ninterrupted; nothing was sent\n" in errors) is (not answer)
        assert lost.still_lost() is (status == 1)


def test_a_disk_of_blockdev_has_only_its_device(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    disk = f"driver=raw,node-name=top,file.driver=file,file.filename={image}"
    device = ["-machine", "q35", "-blockdev", disk, "-device", "virtio-blk-pci,drive=top,id=vda"]
    with paused(extra=[*device, *WITNESS]) as qemu:
        lost = _lose_on(qemu, 'qemu-io -d /machine/peripheral/vda/virtio-backend "aio_write 0 64k"')
        done = by_monitor(qemu)
        assert done.status == 0, done.errors
        assert "qemu-io -d /machine/peripheral/vda/virtio-backend" in done.errors
        assert not lost.still_lost()


VIRSH = """#!{python}
import json, os, socket, sys
option, uri, command, domain, *rest = sys.argv[1:]
assert (option, uri, domain) == ("-c", "qemu:///system", "{uuid}")
if command == "domname":
    print("web 1")
    sys.exit()
assert command == "qemu-monitor-command"
(message,) = rest
def passed_on():
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect("{socket}")
        answers = monitor.makefile("rw")
        answers.readline()
        for line in ('{{"execute": "qmp_capabilities"}}', message):
            answers.write(line)
            answers.flush()
            answer = answers.readline()
        print(answer)
if "query-cpus-fast" in message or "gpa2hva" in message:
    passed_on()
    sys.exit()
{body}
"""
PASSED_ON = "passed_on()"
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
GUEST = ("-name", "guest=web 1,debug-threads=on", "-uuid", UUID, "-machine", "q35")


def virsh(folder: Path, qemu: Qemu, body: str = PASSED_ON) -> dict[str, str]:
    """An environment with a virsh that does `body`; as libvirt has it, it speaks to the real QEMU."""
    program = folder / "virsh"
    program.write_text(VIRSH.format(python=sys.executable, socket=qemu.spare_monitor, uuid=UUID, body=body))
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_through_libvirt(tmp_path: Path) -> None:
    with paused(extra=[*GUEST, *WITNESS]) as qemu:
        environment = virsh(tmp_path, qemu)
        lost = faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--via", "virsh", "--domain", "other", environment=environment)
        assert done.status == 1
        assert f"is domain web 1 ({UUID}), not other" in done.errors
        assert "--domain 'web 1'" in done.errors
        done = nudge(qemu.pid, "--via", "virsh", environment={**os.environ, "PATH": "/nowhere"})
        assert done.status == 1
        assert "libvirt-clients" in done.errors
        assert lost.still_lost()
        done = nudge(qemu.pid, "--via", "virsh", environment=environment)
        assert done.status == 0, done.errors
        assert f"virsh -c qemu:///system qemu-monitor-command {UUID} --hmp 'qemu-io d0" in done.errors
        assert not lost.still_lost()


def test_what_virsh_should_not_say(tmp_path: Path) -> None:
    """One sentence each, and nothing is freed."""
    odd = {
        "sys.exit(3)": "virsh failed: exit status 3",
        "os.kill(os.getpid(), 9)": "virsh failed: killed by signal 9",
        "print(5)": "no answer of QMP: 5",
        """print('{"error": "why"}')""": "refused query-status: why",
        """print('{"return": {}}')""": "no list of disks",
        """print('{"return": ["x", {"device": "d0", "parent": "y"}]}')""": "no disk that could be read",
        r"os.write(1, b'\xff\xfe')": "no JSON",
        "print('[' * 100000)": "no JSON",
    }
    with paused(extra=GUEST) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        for body, sentence in odd.items():
            done = nudge(qemu.pid, "--via", "virsh", environment=virsh(tmp_path, qemu, body))
            assert done.status == 1
            assert sentence in done.events[-1]["message"], done.errors
        assert lost.still_lost()
        lost.free()


def test_a_qemu_that_takes_whole_sectors_only(tmp_path: Path) -> None:
    """As those up to 2.6 do, which tell it on their own standard output: the aligned read frees."""
    body = """
if "510" in message:
    print('{"return": ""}')
else:
    passed_on()
"""
    with paused(extra=GUEST) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--via", "virsh", environment=virsh(tmp_path, qemu, body))
        assert done.status == 0, done.errors
        assert "aio_read -q 0 512" in done.nudges[0]["command"]
        assert not lost.still_lost()


def test_no_reason_is_given_that_was_not_seen(tmp_path: Path) -> None:
    """The disk is raw: nothing of it waits for a qcow2 image's lock."""
    body = """
if "human-monitor-command" in message:
    print('{"return": ""}')
else:
    passed_on()
"""
    with paused(extra=GUEST) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--via", "virsh", environment=virsh(tmp_path, qemu, body))
        assert done.status == 3, done.errors
        assert "the monitor did not say why" in done.errors
        assert "qcow2" not in done.errors
        assert lost.still_lost()
        lost.free()


BUSY = "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchQemuMonitorCommand)"


def test_libvirt_waits_for_an_earlier_command(tmp_path: Path) -> None:
    """A hung monitor behind libvirt is what --force is for."""
    with paused(extra=GUEST) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        environment = virsh(tmp_path, qemu, f"sys.exit({f'error: {BUSY}'!r})")
        done = nudge(qemu.pid, "--via", "virsh", environment=environment)
        assert done.status == 1
        assert "waits for an earlier command" in done.errors
        assert f"nudge --pid {qemu.pid} --force" in done.errors
        assert lost.still_lost()
        done = nudge(qemu.pid, "--via", "virsh", "--force", "--yes", environment=environment)
        assert done.status == 0, done.errors


REFUSES_THE_SECOND = """
if "human-monitor-command" in message and os.path.exists(__file__ + ".first"):
    print('{"error": {"desc": "not now"}}')
else:
    if "human-monitor-command" in message:
        open(__file__ + ".first", "w").close()
    passed_on()
"""


@pytest.mark.parametrize("options", [(), ("--force", "--yes")])
def test_a_pool_that_is_refused_takes_nothing_from_the_other(options: tuple[str, ...], tmp_path: Path) -> None:
    with paused([Drive("d0"), Drive("d1", iothread="io0")], extra=GUEST) as qemu:
        both = [faults.lose(qemu, drive, "write") for drive in ("d0", "d1")]
        environment = virsh(tmp_path, qemu, REFUSES_THE_SECOND)
        done = nudge(qemu.pid, "--via", "virsh", *options, environment=environment)
        left = [lost for lost in both if lost.still_lost()]
        told = {event["request"]: event["freed"] for event in done.nudges}
        assert told == {hex(lost.request): True for lost in both if lost not in left}
        if options:
            assert (done.status, left) == (0, []), done.errors
            assert done.errors.count("call qemu_bh_schedule(") == 1
            assert "by monitor: the monitor refused" in done.errors
        else:
            assert (done.status, len(left)) == (1, 1), done.errors
            assert done.events[-1]["message"].endswith("not now")
            left[0].free()


def test_what_goes_on_by_itself_after_the_monitor_is_told(tmp_path: Path) -> None:
    """Something was sent, and nothing is left to force: neither may be denied."""
    body = """
if "human-monitor-command" in message:
    print('{"error": {"desc": "not now"}}')
else:
    passed_on()
"""
    with paused(extra=GUEST) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        command = [sys.executable, str(ROOT / "cli.py"), "nudge", "--pid", str(qemu.pid), "--json"]
        ours, theirs = os.openpty()
        with subprocess.Popen(
            [*command, "--via", "virsh", "--force"],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=virsh(tmp_path, qemu, body),
        ) as asked:
            _read_to(asked, b"Do it?")
            lost.free()
            os.write(ours, b"y\n")
            output, errors = asked.communicate(timeout=60)
        os.close(ours)
        os.close(theirs)
        assert asked.returncode == 0, errors
        assert b"went on by itself" in errors
        assert b"nothing was sent" not in errors
        (event,) = (json.loads(line) for line in output.splitlines())
        assert (event["request"], event["freed"]) == (hex(lost.request), True)
        assert event["command"].startswith("query-cpus-fast; gpa2hva 0; query-status; query-blockstats; qemu-io ")


def test_a_process_that_ends_meanwhile_is_not_freed(tmp_path: Path) -> None:
    """Its memory goes, and the request with it; that is no success, and there is nobody left to force."""
    body = """
if "human-monitor-command" in message:
    os.kill({pid}, 9)
    print('{{"return": ""}}')
else:
    passed_on()
"""
    with audit_log(tmp_path) as (log, before), paused(extra=GUEST) as qemu:
        faults.lose(qemu, "d0", "write")
        environment = virsh(tmp_path, qemu, body.format(pid=qemu.pid))
        done = nudge(qemu.pid, "--via", "virsh", before=before, environment=environment)
        assert done.status == 1
        (error,) = done.events
        assert error["message"] == f"process {qemu.pid} has ended"
        assert "--force" not in done.errors
        assert "before=lost-wakeup after=exited freed=no" in log.recv(4096).decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_sent_before_an_interruption_is_in_the_log(number: signal.Signals, tmp_path: Path) -> None:
    body = """
if "human-monitor-command" not in message:
    passed_on()
else:
    print('{"return": ""}')
"""
    with audit_log(tmp_path) as (log, before), paused(extra=GUEST) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        command = [*before, sys.executable, str(ROOT / "cli.py"), "nudge", "--pid", str(qemu.pid), "--via", "virsh"]
        environment = virsh(tmp_path, qemu, body)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as asked:
            assert asked.stderr
            for line in asked.stderr:
                if line.startswith("sending: virsh -c"):
                    break
            asked.send_signal(number)
            errors = asked.stderr.read()
        assert asked.returncode == 1
        assert "interrupted; what was sent is in the audit line" in errors
        assert "after=lost-wakeup freed=no" in log.recv(4096).decode()
        assert lost.still_lost()
        lost.free()


def test_a_storage_daemon_needs_force(daemon: Qemu) -> None:
    for drive in daemon.drives:
        lost = faults.lose(daemon, drive, "write")
        done = by_monitor(daemon)
        assert done.status == 1
        assert f"nudge --pid {daemon.pid} --force" in done.errors
        assert lost.still_lost()
        assert by_force(daemon).status == 0
        assert not lost.still_lost()


# What it refuses


@pytest.mark.usefixtures("guest_files")
@LONG
def test_a_healthy_vm_under_load_is_refused() -> None:
    with guest(Workload(pause=0, jobs=4), extra=WITNESS) as machine:
        sent = commands(machine)
        for _ in range(3):
            done = nudge(machine.pid, "--qmp", str(machine.spare_monitor), "--force", "--yes")
            assert done.status == 1, done.errors
            assert "nothing was sent" in done.errors
            assert done.nudges == []
        target = open_target(machine.pid)
        nudger = Nudge(target, read_build(target.image_path, target.exe), print)
        for _ in range(REFUSALS):
            with pytest.raises(NudgeRefused):
                nudger.diagnose()
        assert commands(machine) == sent
        machine.wait_progress(1)


def test_a_stopped_process_is_refused(watched: Qemu) -> None:
    faults.lose(watched, "d0", "write")
    sent = commands(watched)
    with faults.stopped(watched):
        done = nudge(watched.pid, "--qmp", str(watched.spare_monitor), "--force", "--yes")
        assert done.status == 1
        assert f"kill -CONT {watched.pid}" in done.errors
    assert commands(watched) == sent
    assert by_force(watched).status == 0


def test_a_frozen_process_is_thawed_not_continued(watched: Qemu, cgroup: Path) -> None:
    """The hint is the line that thaws it: a SIGCONT does nothing for a frozen control group."""
    faults.lose(watched, "d0", "write")
    (cgroup / "cgroup.procs").write_text(str(watched.pid))
    (cgroup / "cgroup.freeze").write_text("1")
    try:
        watched.wait_until(lambda: open_target(watched.pid).frozen, what="the group to be frozen")
        done = nudge(watched.pid, "--qmp", str(watched.spare_monitor), "--force", "--yes")
        assert done.status == 1
        assert "kill -CONT" not in done.errors
        (line,) = [line for line in done.errors.splitlines() if "try: " in line]
        subprocess.run(line.split("try: ")[1], shell=True, check=True)
        watched.wait_until(lambda: not open_target(watched.pid).frozen, what="the group to be thawed")
    finally:
        (cgroup / "cgroup.freeze").write_text("0")
        (cgroup.parent / "cgroup.procs").write_text(str(watched.pid))
    assert by_force(watched).status == 0


def test_a_stuck_loop_is_refused(paused_qemu: Qemu) -> None:
    pool = faults.pool_of(paused_qemu, "d0")
    with faults.stalled_completion(paused_qemu, "d0", pool):
        done = nudge(paused_qemu.pid, "--qmp", str(paused_qemu.spare_monitor), "--force", "--yes")
        assert done.status == 1
        assert "loop-blocked" in done.errors
        assert done.nudges == []


def test_force_asks_first(paused_qemu: Qemu) -> None:
    lost = faults.lose(paused_qemu, "d0", "write")
    done = nudge(paused_qemu.pid, "--force")
    assert done.status == 2
    assert "--yes" in done.errors
    assert lost.still_lost()
    lost.free()


def test_a_monitor_of_another_qemu_is_refused(watched: Qemu) -> None:
    lost = faults.lose(watched, "d0", "write")
    with paused(extra=WITNESS) as other:
        sent = commands(other)
        done = nudge(watched.pid, "--qmp", str(other.spare_monitor))
        assert done.status == 1
        assert f"belongs to process {other.pid}" in done.errors
        assert commands(other) == sent
    assert lost.still_lost()
    lost.free()


def test_a_monitor_that_somebody_holds(watched: Qemu) -> None:
    lost = faults.lose(watched, "d0", "write")
    done = nudge(watched.pid, "--qmp", str(watched.folder / "lab.qmp"), "--timeout", "500ms")
    assert done.status == 1
    assert "another client, usually libvirt, holds the monitor" in done.errors
    assert "virsh qemu-monitor-command DOMAIN --hmp" in done.errors
    assert lost.still_lost()
    lost.free()


@pytest.mark.parametrize(("path", "sentence"), [("nothing", "there is no socket"), ("d0.img", "nobody listens at")])
def test_no_monitor_there(paused_qemu: Qemu, path: str, sentence: str) -> None:
    lost = faults.lose(paused_qemu, "d0", "write")
    done = nudge(paused_qemu.pid, "--qmp", str(paused_qemu.folder / path))
    assert done.status == 1
    assert sentence in done.errors
    lost.free()


def test_a_socket_of_no_qemu(paused_qemu: Qemu, tmp_path: Path) -> None:
    """Its owner is named, but nobody is told to nudge that."""
    lost = faults.lose(paused_qemu, "d0", "write")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        done = nudge(paused_qemu.pid, "--qmp", str(tmp_path / "other"))
    assert done.status == 1
    assert f"belongs to process {os.getpid()}, not to {paused_qemu.pid}" in done.errors
    assert f"/proc/{paused_qemu.pid}/cmdline" in done.errors.splitlines()[-1]
    lost.free()


def test_a_human_monitor_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "hmp"
    with paused(extra=["-monitor", f"unix:{path},server=on,wait=off"]) as qemu:
        lost = faults.lose(qemu, "d0", "write")
        done = nudge(qemu.pid, "--qmp", str(path))
        assert done.status == 1
        assert "does not speak QMP" in done.errors
        lost.free()


def test_killed_in_the_middle_it_does_no_harm(watched: Qemu) -> None:
    """Killed before each of its steps in turn, --force leaves QEMU as it was, or the request freed."""
    pool = faults.pool_of(watched, "d0")
    outcomes = []
    while True:
        lost = faults.lose(watched, "d0", "write", pool)
        command = [sys.executable, "-c", KILLED, str(watched.pid), str(len(outcomes) + 1)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        watched.kick("d0")
        outcomes.append(lost.still_lost())
        if outcomes[-1]:
            lost.free()
    # SEIZE, INTERRUPT, registers, mask, FPU state; SETREGS, twice SYSCALL and the same three again, which is the
    # rehearsal; SETREGS is the moment; then DETACH.
    assert outcomes == [True] * 12 + [False]
    assert int(done.stdout) == len(outcomes)
    assert not lost.still_lost()
    watched.request("d0", "write")


def test_a_pool_with_much_to_do_is_not_stuck(tmp_path: Path) -> None:
    """64 requests all the time, each in the memory of an earlier one: most are finished at any look, and none stays."""
    with busy_pool(tmp_path) as pid, closing(LiveView(open_target(pid))) as view:
        loaded = load(view, read_build(view.target.image_path, "qemu-img"))
        for _ in range(12):
            seen = survey(view, loaded, Looker(view, loaded))
            # On an overloaded host the loop may really be late: the scheduler is the witness.
            stuck = [each for each in seen.stuck if not as_evidence(each.finding.facts)["home_starved"]]
            assert [each.verdict for each in stuck] == []
