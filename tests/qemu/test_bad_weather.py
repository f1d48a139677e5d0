"""Whatever goes wrong around a trace: one sentence, the right status, nothing left attached, QEMU unharmed.

Knows: where a probe shows in a process (its first byte becomes a breakpoint). Each test runs the command as
a user would.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.qemu.tracing import Trace, traced, without_bcc
from tracer.build import read_build
from tracer.compiler import working_bcc
from tracer.elf import Image
from tracer.lab import faults
from tracer.lab.process import continue_process, peek, stop_process
from tracer.lab.qemu import STORAGE_DAEMON, Drive, Qemu, paused, storage_daemon
from tracer.target import open_target

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, str(ROOT / "cli.py")]
PATIENCE_S = 60.0
NOBODY = 65534
F_SETPIPE_SZ = 1031  # of the kernel; Python has it since 3.10
#: Ended by being told, not by chance later on: a second by the contract, the rest for a machine that is busy.
PROMPTLY_S = 20.0
#: So many tenths of a second without a line more: it waits for its reader.
STEADY = 10
BREAKPOINT = b"\xcc"
#: At how many random moments a trace is ended by each signal; the long form is asked for by the environment.
MOMENTS = int(os.environ.get("AIO_TRACE_REPEAT", "6"))


@pytest.fixture(scope="module")
def shared_qemu() -> Iterator[Qemu]:
    """One QEMU for the tests that leave it as it was; d0 in the main loop, its pool is there already."""
    with paused() as qemu:
        qemu.request("d0", "write")
        yield qemu


@pytest.fixture
def qemu(shared_qemu: Qemu) -> Iterator[Qemu]:
    """That QEMU; after each test it must serve requests as before, with its own code at all sites."""
    yield shared_qemu
    assert shared_qemu.running()
    assert probed_sites(shared_qemu) == []
    shared_qemu.request("d0", "write")


@dataclass(frozen=True)
class SiteInFile:
    """A probe site of a program: its place in the file, and in memory relative to the program's entry."""

    offset: int
    from_entry: int
    original: bytes


@cache
def sites_of(path: str) -> dict[str, SiteInFile]:
    """The probe sites of a program."""
    build = read_build(path, path)
    with Image.open(path) as image:
        return {
            name: SiteInFile(image.offset_of(site.address), site.address - build.entry, image.read(site.address, 1))
            for name, site in build.located.sites.items()
        }


def probed_sites(qemu: Qemu) -> list[str]:
    """Where a probe is attached right now: a breakpoint stands there instead of QEMU's own instruction."""
    target = open_target(qemu.pid)
    found = []
    for name, site in sites_of(target.exe).items():
        byte = peek(qemu.pid, target.entry_address() + site.from_entry, 1)
        assert byte in (site.original, BREAKPOINT)
        if byte != site.original:
            found.append(name)
    return found


@contextmanager
def load(qemu: Qemu, drive: str = "d0") -> Iterator[list[int]]:
    """Requests without end for the time of the block; the list counts those that were answered."""
    answered = [0]
    leave = threading.Event()

    def work() -> None:
        while not leave.is_set():
            handles = [qemu.submit(drive, "write", slot * 4096) for slot in range(8)]
            for handle in handles:
                qemu.finish(drive, handle)
                answered[0] += 1

    qemu.client(drive)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield answered
    finally:
        leave.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def goes_on(answered: list[int], more: int = 50) -> None:
    """Wait until that many more requests were answered."""
    goal = answered[0] + more
    end = time.monotonic() + PATIENCE_S
    while answered[0] < goal:
        assert time.monotonic() < end, "QEMU answers no more"
        time.sleep(0.001)


def run(*arguments: str, prefix: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; there is never a traceback."""
    command = [*prefix, *CLI, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, **options)
    assert_calm(done.stderr)
    return done


def assert_calm(text: str) -> None:
    for word in ("Traceback", "Exception ignored", "Segmentation", "core dumped"):
        assert word not in text, text


def assert_told(done: subprocess.CompletedProcess[str], message: str, hint: str | None = None) -> None:
    """Status 1, one sentence and one hint on standard error, nothing on standard output."""
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    lines = done.stderr.splitlines()
    assert re.search(message, lines[0]), done.stderr
    assert lines[0].startswith("aio-trace: ")
    assert len(lines) == (1 if hint is None else 2), done.stderr
    if hint is not None:
        assert lines[1].startswith("  try: ")
        assert re.search(hint, lines[1]), done.stderr


def events_of(text: str) -> list[dict[str, Any]]:
    """Every line is one JSON object; anything else fails."""
    return [json.loads(line) for line in text.splitlines()]


# What cannot be traced


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_no_such_process(json_option: tuple[str, ...]) -> None:
    done = run("--pid", str(2**22 + 1), *json_option)
    assert done.returncode == 1
    assert "there is no process" in done.stderr
    assert [event["event"] for event in events_of(done.stdout)] == ["error"] * len(json_option)


@pytest.mark.parametrize("mode", ["full", "alert", "none"])
def test_a_process_that_is_no_qemu(mode: str) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            assert_told(run("--pid", str(other.pid), "--probes", mode), f"process {other.pid} .*is no QEMU", "pgrep")
        finally:
            other.kill()


def test_an_interpreter_that_is_no_elf_file_of_ours(tmp_path: Path) -> None:
    """A script's executable is its interpreter; a static program has no dynamic symbols."""
    script = tmp_path / "qemu-system-x86_64"
    script.write_text("#!/bin/sh\nread line\n")
    script.chmod(0o755)
    with subprocess.Popen([script], stdin=subprocess.PIPE) as other:
        try:
            assert_told(run("--pid", str(other.pid)), "is no QEMU", "pgrep")
        finally:
            other.kill()


def test_a_thread_of_qemu(qemu: Qemu) -> None:
    """Not traced by halves: the hint has the right number."""
    tid = next(thread.tid for thread in open_target(qemu.pid).threads() if thread.tid != qemu.pid)
    assert_told(run("--pid", str(tid)), f"{tid} is a thread of process {qemu.pid}", f"--pid {qemu.pid}$")


def test_a_zombie() -> None:
    with subprocess.Popen(["true"]) as other:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert_told(run("--pid", str(other.pid)), "zombie", "pgrep")


def test_a_kernel_thread() -> None:
    require(Path("/proc/2/comm").exists() and not os.listdir("/proc/2/map_files"), "no kernel threads to be seen")
    assert_told(run("--pid", "2"), "has no executable", "pgrep")


def test_a_qemu_without_recognisable_sites(tmp_path: Path) -> None:
    """A QEMU it is, but its thread pool's code reads as nothing known: nothing is attached on a guess."""
    program = tmp_path / "qemu-storage-daemon"
    sound = shutil.which(STORAGE_DAEMON) or STORAGE_DAEMON
    data = bytearray(Path(sound).read_bytes())
    for site in sites_of(sound).values():
        # Without a disk it never comes here.
        data[site.offset - 48 : site.offset + 48] = b"\x90" * 96
    program.write_bytes(data)
    program.chmod(0o755)
    with storage_daemon([], exe=str(program), trace=False) as qemu:
        for mode in ("full", "none"):
            assert_told(run("--pid", str(qemu.pid), "--probes", mode), "site|found", "aio-trace check")
        assert qemu.running()


# What the host lacks


def as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def run_as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command without privileges; its modules are loaded before they go, wherever the tree lies."""
    code = (
        "import os, sys\n"
        "import cli, tracer.report, tracer.session, tracer.watch\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert_calm(done.stderr)
    return done


@pytest.mark.parametrize("mode", ["full", "none"])
def test_not_root(qemu: Qemu, mode: str) -> None:
    """The hint is the same command with sudo."""
    done = run_as_nobody("--pid", str(qemu.pid), "--probes", mode)
    assert_told(done, "root", f"sudo aio-trace --pid {qemu.pid}")


def test_not_root_but_the_owner_of_the_process() -> None:
    """Its executable may be read: probes need root all the same, and the hint keeps every option."""
    with subprocess.Popen(["sleep", "600"], preexec_fn=as_nobody) as own:
        try:
            done = run_as_nobody("--pid", str(own.pid), "--deadline", "2s", "--on-alert", "echo a b")
        finally:
            own.kill()
    assert_told(done, "needs root", f"sudo aio-trace --pid {own.pid} --deadline 2s --on-alert 'echo a b'$")


@pytest.mark.parametrize("failure", ["raise ImportError('no bcc here')", "raise OSError('libbcc.so.0: no such file')"])
def test_bcc_is_missing(qemu: Qemu, tmp_path: Path, failure: str) -> None:
    """The package of each family of distributions is named, and the interpreters that lack it; `check` agrees."""
    prefix = without_bcc(tmp_path, failure)
    reason = re.escape(f"{working_bcc()[0]}: {failure.split(chr(39))[1]}")
    done = run("--pid", str(qemu.pid), prefix=prefix)
    assert_told(done, rf"can import the bcc package \(.*{reason}", "python3-bpfcc.*python3-bcc")
    checked = run("check", "--pid", str(qemu.pid), "--json", prefix=prefix)
    (need,) = (need for need in events_of(checked.stdout)[0]["host"] if need["need"] == "bcc")
    assert not need["ok"]
    assert re.search(f"python3-bpfcc.*{reason}", need["detail"])


def test_bcc_of_another_python(qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that sees nothing of the host's runs us; the one that sees bcc compiles, and `check` asks the same."""
    venv.create(tmp_path / "apart", symlinks=True)
    ours = [str(ROOT), *(place for place in sys.path if place and not Path(place, "bcc").exists())]
    code = f"import sys; sys.path[:0] = {ours!r}; from cli import main; main()"
    apart = [str(tmp_path / "apart/bin/python"), "-I", "-c", code]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checked = subprocess.run([*apart, "check", "--pid", str(qemu.pid), "--json"], capture_output=True, check=False)
    (need,) = (need for need in events_of(checked.stdout.decode())[0]["host"] if need["need"] == "bcc")
    assert need["ok"]
    assert "/usr/" in need["detail"]
    with Trace.of([*apart, "--pid", str(qemu.pid), "--json"]) as trace:
        trace.expect("attached")
        for _ in range(23):
            qemu.request("d0", "write")
        assert trace.finish() == 0
    assert trace.summary["requests"]["completed"] == 23


def test_bcc_is_not_needed_without_probes(qemu: Qemu, tmp_path: Path) -> None:
    prefix = without_bcc(tmp_path)
    done = run("--pid", str(qemu.pid), "--probes", "none", "--duration", "100ms", "--json", prefix=prefix)
    assert (done.returncode, [event["event"] for event in events_of(done.stdout)]) == (0, ["attached", "summary"])


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group that may have too little memory for a compiler."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.exists() else Path("/sys/fs/cgroup")) / f"aio-trace-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if first.exists() else "memory.max")
        limit.write_text(f"{60 << 20}")
    except OSError as error:
        require(False, f"no control group for memory can be made: {error}")
    yield group
    while (group / "cgroup.procs").read_text():
        pass
    group.rmdir()


def test_the_compiler_is_killed_for_want_of_memory(qemu: Qemu, little_memory: Path, tmp_path: Path) -> None:
    """What it may have is said, and the line to paste needs no compiler, and less."""
    prefix = ["sh", "-c", f'echo $$ >{little_memory}/cgroup.procs; exec "$@"', "sh"]
    empty = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = run("--pid", str(qemu.pid), "--probes", "full", "--duration", "1ms", prefix=prefix, env=empty)
    assert_told(
        done, "compiler was killed; .* may have 60 MiB", f"aio-trace --pid {qemu.pid} --duration 1ms --probes none"
    )
    assert run("--pid", str(qemu.pid), "--duration", "1ms", "--probes", "none", prefix=prefix).returncode == 0


def test_the_kernel_refuses(qemu: Qemu) -> None:
    """Root without the capabilities, as in many containers."""
    prefix = ["setpriv", "--bounding-set=-sys_admin,-bpf,-perfmon", "--inh-caps=-sys_admin,-bpf,-perfmon"]
    done = run("--pid", str(qemu.pid), prefix=[*prefix, "--no-new-privs"])
    assert_told(done, "CAP_BPF", "docker run --privileged")


# What ends before we do


@pytest.mark.parametrize("mode", ["full", "alert", "none"])
def test_qemu_is_killed_while_it_is_traced(mode: str) -> None:
    """The trace ends by itself with its summary; that is no failure."""
    with paused() as machine, traced(machine.pid, "--probes", mode) as trace:
        for _ in range(23):
            machine.request("d0", "write")
        os.kill(machine.pid, signal.SIGKILL)
        trace.expect("ended")
        trace.expect("summary")
        assert trace.process.wait(PATIENCE_S) == 0
    if mode == "full":
        assert trace.summary["requests"]["completed"] == 23


@pytest.mark.parametrize("mode", ["full", "alert", "none"])
def test_qemu_is_killed_while_a_request_is_late(mode: str) -> None:
    """The hung VM is destroyed: its request did not go on."""
    with paused() as machine, traced(machine.pid, "--deadline", "200ms", "--probes", mode) as trace:
        faults.lose(machine, "d0", "write")
        trace.expect("alert")
        os.kill(machine.pid, signal.SIGKILL)
        trace.expect("ended")
        assert trace.process.wait(PATIENCE_S) == 3
    assert trace.named("resolved") == []


def test_qemu_is_killed_while_we_attach() -> None:
    """Whenever it ends: either it was attached and there is a summary, or status 1 says that it ended."""
    dice = random.Random(7)
    for _ in range(8):
        with paused() as machine:
            machine.request("d0", "write")
            with Trace(machine.pid) as trace:
                time.sleep(dice.uniform(0.05, 0.6))
                os.kill(machine.pid, signal.SIGKILL)
                status = trace.process.wait(PATIENCE_S)
        if trace.named("attached"):
            assert (status, len(trace.named("summary"))) == (0, 1), trace.errors
        else:
            assert (status, len(trace.named("error"))) == (1, 1), trace.errors
            assert re.search("ended|no process|zombie", trace.errors)


def test_qemu_stops_and_goes_on(qemu: Qemu) -> None:
    """A debugger, or `virsh suspend` by signal: no probe gets lost, and counts stay exact."""
    with traced(qemu.pid) as trace:
        qemu.request("d0", "write")
        stop_process(qemu.pid)
        continue_process(qemu.pid)
        qemu.request("d0", "write")
        assert trace.finish() == 0
    assert trace.summary["requests"]["completed"] == 2


def test_another_program_in_the_same_process(tmp_path: Path) -> None:
    """A wrapper that is taken for QEMU's end: the number and the start are the same, the program is not."""
    source = tmp_path / "become.c"
    source.write_text(
        "#include <signal.h>\n#include <unistd.h>\n"
        'static void become(int n) { (void)n; execl("/bin/sleep", "sleep", "60", (char *)0); }\n'
        "__attribute__((constructor)) static void prepare(void) { signal(SIGUSR2, become); }\n"
    )
    library = tmp_path / "become.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        starting = paused()
    with starting as qemu, traced(qemu.pid) as trace:
        os.kill(qemu.pid, signal.SIGUSR2)
        assert "another program" in trace.expect("ended")["reason"]
        assert trace.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("limit", [6, 8, 12, 18, 24])
def test_hardly_any_files_may_be_opened(qemu: Qemu, limit: int) -> None:
    """Whatever fails first: one sentence, and nobody is said to have ended."""
    shell = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash"]
    done = run("--pid", str(qemu.pid), "--duration", "300ms", prefix=shell)
    assert done.returncode in (0, 1)
    assert "has ended" not in done.stderr
    assert "there is no process" not in done.stderr


@pytest.mark.parametrize("arguments", [("--json", "inspect"), ("--pid", "1", "check"), ("--deadline", "2s", "nudge")])
def test_options_ahead_of_a_command(qemu: Qemu, arguments: tuple[str, ...]) -> None:
    """They are the main job's; to ignore them would be to do something else than was asked for."""
    done = run(*arguments, "--pid", str(qemu.pid))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"aio-trace {arguments[-1]} {arguments[0]}" in done.stderr


# How we are ended


def ended_after(qemu: Qemu, number: signal.Signals, pause_s: float) -> bool:
    """Start a trace and end it after that time; whether it was attached by then."""
    command = [*CLI, "--pid", str(qemu.pid), "--json", "--interval", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(pause_s)
    process.send_signal(number)
    asked = time.monotonic()
    out, messages = process.communicate(timeout=PATIENCE_S)
    took = time.monotonic() - asked
    assert took < PROMPTLY_S
    assert probed_sites(qemu) == []
    names = [event["event"] for event in events_of(out.decode())]
    if is_pythons_own_interrupt(process.returncode, messages.decode()):
        return False
    assert_calm(messages.decode())
    assert process.returncode in (0, -number)
    if process.returncode:
        # Python itself was still starting.
        assert names == []
        return False
    assert names in ([], ["attached", "summary"])
    return bool(names)


def is_pythons_own_interrupt(status: int, messages: str) -> bool:
    """Ctrl-C before the first line of ours ran: Python's start-up says so in its own words.

    Line 0 of a module is what Python does before the first.
    """
    ours = ("cli.py", "tracer/")
    messages = messages.replace('cli.py", line 0, in', "")
    return status != 0 and "KeyboardInterrupt" in messages and not any(name in messages for name in ours)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ended_at_any_moment(qemu: Qemu, number: signal.Signals) -> None:
    """Prompt, calm, with a summary if it was attached, and QEMU's own code back in place."""
    dice = random.Random(int(number))
    with load(qemu) as answered:
        began = time.monotonic()
        with traced(qemu.pid) as trace:
            startup_s = time.monotonic() - began
            assert trace.finish(number) == 0
            assert trace.events[-1]["event"] == "summary"
        assert not ended_after(qemu, number, 0.0)
        for _ in range(MOMENTS):
            ended_after(qemu, number, dice.uniform(0, 1.5 * startup_s))
        goes_on(answered)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_shower_of_signals(qemu: Qemu, number: signal.Signals) -> None:
    """An impatient user presses Ctrl-C until it is over."""
    command = [*CLI, "--pid", str(qemu.pid), "--json", "--interval", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert json.loads(process.stdout.readline())["event"] == "attached"
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.001)
    out, messages = process.communicate()
    assert_calm(messages.decode())
    assert process.returncode in (0, -number)
    assert [event["event"] for event in events_of(out.decode())] == ["summary"]
    assert probed_sites(qemu) == []


def test_killed_under_load(qemu: Qemu) -> None:
    """kill -9 leaves nothing attached, and QEMU goes on: it never meets a breakpoint that nobody owns."""
    with load(qemu) as answered:
        for _ in range(2):
            with traced(qemu.pid) as trace:
                goes_on(answered)
                assert sorted(probed_sites(qemu)) == ["callback", "done", "submit"]
                trace.process.kill()
                trace.process.wait()
                qemu.wait_until(lambda: not probed_sites(qemu), what="the breakpoints to be gone")
                goes_on(answered)


def test_killed_while_it_attaches(qemu: Qemu) -> None:
    dice = random.Random(11)
    with load(qemu) as answered:
        for _ in range(8):
            process = subprocess.Popen(
                [*CLI, "--pid", str(qemu.pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(dice.uniform(0.2, 1.0))
            process.kill()
            process.wait()
            qemu.wait_until(lambda: not probed_sites(qemu), what="the breakpoints to be gone")
        goes_on(answered)


def test_the_duration_ends_it(qemu: Qemu) -> None:
    done = run("--pid", str(qemu.pid), "--duration", "300ms", "--json", "--interval", "100ms")
    names = [event["event"] for event in events_of(done.stdout)]
    assert done.returncode == 0
    assert (names[0], names[-1]) == ("attached", "summary")
    assert set(names[1:-1]) == {"interval"}


# Who reads us


def waiting_in(reader: int) -> int:
    """How many bytes of a pipe nobody has read yet."""
    count = array.array("i", [0])
    fcntl.ioctl(reader, termios.FIONREAD, count)
    return count[0]


def test_nobody_reads_any_more(qemu: Qemu) -> None:
    """`aio-trace --json … | head -1`: it notices at once, not at its next line, which may never come."""
    process = subprocess.Popen(
        [*CLI, "--pid", str(qemu.pid), "--json", "--interval", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stderr
    assert json.loads(process.stdout.readline())["event"] == "attached"
    process.stdout.close()
    left = time.monotonic()
    assert process.wait(PATIENCE_S) == 0
    assert time.monotonic() - left < PROMPTLY_S
    assert_calm(process.stderr.read().decode())
    process.stderr.close()
    assert probed_sites(qemu) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_somebody_who_does_not_read(qemu: Qemu, options: tuple[str, ...], number: signal.Signals) -> None:
    """`aio-trace … 2>&1 | less`, left on its first page: the pipe fills up, and it ends all the same when told to."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 8192)
    command = [*CLI, "--pid", str(qemu.pid), "--interval", "20ms", *options]
    process = subprocess.Popen(command, stdout=writer, stderr=writer)
    try:
        held = [0]
        while not held[-1] or len(held) < STEADY or len(set(held[-STEADY:])) > 1:
            time.sleep(0.1)
            held.append(waiting_in(reader))
            assert process.poll() is None
        process.send_signal(number)
        told = time.monotonic()
        assert process.wait(PATIENCE_S) == 0
        assert time.monotonic() - told < PROMPTLY_S
    finally:
        os.close(reader)
        os.close(writer)
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("reader", ["true", "head -1"])
def test_a_pipe_that_is_soon_closed(qemu: Qemu, options: tuple[str, ...], reader: str) -> None:
    """In the shell, both streams into it: it ends by itself whatever it was about to say."""
    command = ["bash", "-c", f'"$@" 2>&1 | {reader}; exit ${{PIPESTATUS[0]}}', "bash", *CLI]
    done = subprocess.run(
        [*command, "--pid", str(qemu.pid), "--interval", "100ms", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0
    assert_calm(done.stdout + done.stderr)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_streams_closed_from_the_start(qemu: Qemu, closed: str) -> None:
    """What is said is lost; the trace is as good as any."""
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    done = run("--pid", str(qemu.pid), "--duration", "300ms", "--json", prefix=shell)
    assert done.returncode == 0
    names = [event["event"] for event in events_of(done.stdout)]
    assert names == ([] if closed.startswith(">") else ["attached", "summary"])


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk(qemu: Qemu, options: tuple[str, ...]) -> None:
    """One sentence, not silence: who relies on the log must know."""
    shell = ["sh", "-c", 'exec "$@" >/dev/full', "sh"]
    done = run("--pid", str(qemu.pid), "--interval", "100ms", *options, prefix=shell)
    assert done.returncode == 1
    assert "standard output cannot be written to: No space left on device" in done.stderr


def test_json_and_nothing_else(qemu: Qemu) -> None:
    """Whatever is asked for, and whatever BCC prints."""
    environment = {**os.environ, "BCC_LINUX_VERSION_CODE": "1"}  # BCC warns about it, from C
    with load(qemu):
        done = run(
            *("--pid", str(qemu.pid), "--json", "-v", "--interval", "100ms", "--duration", "500ms"), env=environment
        )
    events = events_of(done.stdout)
    assert done.returncode == 0
    assert all({"event", "time", "pid"} <= event.keys() for event in events)
    assert {event["pid"] for event in events} == {qemu.pid}
    assert events[-1]["requests"]["submitted"] > 0
    assert "WARNING" not in done.stdout


def test_the_table_and_nothing_else(qemu: Qemu) -> None:
    """Messages are on standard error."""
    with load(qemu):
        done = run("--pid", str(qemu.pid), "--interval", "200ms", "--duration", "500ms")
    assert "attached to" in done.stderr
    assert "attached to" not in done.stdout
    assert "submit to done" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 80


# Several


@pytest.fixture
def second_qemu() -> Iterator[Qemu]:
    """Another one; its disk is served by an iothread."""
    with paused([Drive("d0", iothread="io0")]) as machine:
        machine.request("d0", "write")
        yield machine


def test_two_at_once(qemu: Qemu, second_qemu: Qemu) -> None:
    """Each is counted for itself."""
    with traced(qemu.pid, "--pid", str(second_qemu.pid)) as trace:
        trace.expect("attached")
        for _ in range(23):
            qemu.request("d0", "write")
        for _ in range(5):
            second_qemu.request("d0", "write")
        assert trace.finish() == 0
    completed = {event["pid"]: event["requests"]["completed"] for event in trace.named("summary")}
    assert completed == {qemu.pid: 23, second_qemu.pid: 5}
    assert probed_sites(second_qemu) == []


@pytest.mark.parametrize("place", ["first", "last"])
def test_two_at_once_one_of_them_bad(qemu: Qemu, place: str) -> None:
    """The other is traced all the same; status 1 says that not all was done."""
    pids = [str(qemu.pid), str(2**22 + 1)]
    if place == "first":
        pids.reverse()
    done = run(*("--pid", pids[0], "--pid", pids[1], "--json", "--duration", "300ms"))
    events = events_of(done.stdout)
    assert done.returncode == 1
    assert sorted(event["event"] for event in events) == ["attached", "error", "summary"]
    (error,) = (event for event in events if event["event"] == "error")
    assert error["pid"] == 2**22 + 1
    assert error["message"] in done.stderr
    assert error["hint"] in done.stderr


def test_one_of_two_ends(qemu: Qemu) -> None:
    with paused() as other, traced(qemu.pid, "--pid", str(other.pid)) as trace:
        trace.expect("attached")
        os.kill(other.pid, signal.SIGKILL)
        assert trace.expect("ended")["pid"] == other.pid
        assert trace.expect("summary")["pid"] == other.pid
        qemu.request("d0", "write")
        assert sorted(probed_sites(qemu)) == ["callback", "done", "submit"]
        assert trace.finish() == 0
        assert trace.expect("summary")["pid"] == qemu.pid
    assert trace.events[-1]["requests"]["completed"] == 1


def test_the_same_process_twice(qemu: Qemu) -> None:
    """Named twice it is traced once."""
    done = run("--pid", str(qemu.pid), "--pid", str(qemu.pid), "--json", "--duration", "200ms")
    assert (done.returncode, [e["event"] for e in events_of(done.stdout)]) == (0, ["attached", "summary"])


def test_two_traces_of_one_process(qemu: Qemu) -> None:
    """Each has its own probes: the end of one leaves the other's alone."""
    with traced(qemu.pid) as one, traced(qemu.pid) as other:
        qemu.request("d0", "write")
        assert one.finish() == 0
        qemu.request("d0", "write")
        assert other.finish() == 0
    assert [trace.summary["requests"]["completed"] for trace in (one, other)] == [1, 2]


def test_all_and_one_that_is_not_there(qemu: Qemu) -> None:
    with Trace.of([*CLI, "--all", "--pid", "4194303", "--json", "--interval", "0"]) as trace:
        assert "4194303" in trace.expect("error")["message"]
        trace.finish()


def test_all(qemu: Qemu, second_qemu: Qemu) -> None:
    """Other people's QEMUs may run on this host, too: ours are among those that are traced."""
    done = run("--all", "--json", "--duration", "300ms")
    events = events_of(done.stdout)
    traced_pids = {event["pid"] for event in events if event["event"] == "attached"}
    assert traced_pids >= {qemu.pid, second_qemu.pid}
    assert probed_sites(second_qemu) == []
