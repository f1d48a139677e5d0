"""Saving a process: what gdb and CoreView read of it, how it fares meanwhile, what is left after failures."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.core import CoreView
from tracer.errors import AioTraceError, HostError, TargetExited
from tracer.lab.process import thread_states, wait_until
from tracer.live import LiveView
from tracer.registers import take_registers
from tracer.save import save, save_report
from tracer.target import open_target

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
# One thread sleeps in poll, one waits for its vfork child, which is a sleep that nothing interrupts. Of
# the large mapping, which stands for guest RAM, every page is dirty.
SOURCE = r"""
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#define KEEP __attribute__((noinline, noclone))
volatile int sink;
char *mark;
KEEP void innermost(void) { for (;;) { poll(NULL, 0, -1); sink++; } }
KEEP void outer(int kind) { innermost(); sink += kind; }
static void *deaf(void *unused) {
    if (vfork() == 0) { for (;;) pause(); }
    return NULL;
}
int main(int argc, char **argv) {
    pthread_t one;
    size_t size = 128 << 20;
    memset(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 'R', size);
    memset(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 'S', size / 16);
    mark = malloc(64);
    strcpy(mark, "what the heap holds");
    eventfd(7, 0);
    if (argc > 1) pthread_create(&one, NULL, deaf, NULL);
    outer(argc);
    return sink;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require(shutil.which("gcc"), "gcc is not installed")
    folder = tmp_path_factory.mktemp("save")
    source, binary = folder / "saved.c", folder / "saved"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-O2", "-Wl,--build-id", "-pthread", "-o", binary, source], check=True)
    return binary


@contextmanager
def running(program: Path, *arguments: str) -> Iterator[LiveView]:
    """The program when all its threads are where they stay."""
    with subprocess.Popen([program, *arguments], start_new_session=True) as child:
        try:
            view = LiveView(open_target(child.pid))
            expected = ["D", "S"] if arguments else ["S"]
            wait_until(lambda: sorted(thread_states(child.pid)) == expected)
            wait_until(lambda: (t := view.thread(child.pid)) and t.syscall and t.syscall.name == "poll")
            with closing(view):
                yield view
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the child of vfork


def tracer_of(pid: int) -> int:
    found = re.search(r"^TracerPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found
    return int(found[1])


def test_a_saved_core_is_small_private_and_tells_all(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "core"
    with running(program) as view:
        saved = save(view, str(path))
        live = view.stack(view.pid)
        files = view.files()
        wait_until(lambda: thread_states(view.pid) == ["S"] and not tracer_of(view.pid), what="it to go on")
    assert (saved.threads, saved.partial, saved.size) == (1, 0, path.stat().st_size)
    assert saved.size < 2 * MIB
    assert 0 < saved.stopped_s < 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(CoreView(str(path))) as core:
        assert core.stack(core.pid).functions() == live.functions()
        assert core.arguments() == (str(program),)
        assert core.files() == files
        (eventfd,) = (fd for fd, file in files.items() if "eventfd" in file)
        assert core.eventfd_count(eventfd) == 7
        assert core.threads()[0].name == program.name
        assert core.missing() == ()
        assert any(b"what the heap holds" in data for _, data in core.heap_chunks())
    assert b"R" * 4096 not in path.read_bytes()
    assert b"S" * 4096 not in path.read_bytes()


def test_gdb_reads_it(program: Path, tmp_path: Path) -> None:
    require(shutil.which("gdb"), "gdb is not installed")
    path = tmp_path / "core"
    with running(program) as view:
        save(view, str(path))
    commands = ["-ex", "bt", "-ex", "print (char*)mark", "-ex", "info proc mappings"]
    command = ["gdb", "-nx", "-batch", *commands, str(program), str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"poll.*\n#1 .* innermost .*\n#2 .* outer .*\n#3 .* main ", text), text
    assert "what the heap holds" in text
    assert f"{program}" in text


def test_a_thread_that_cannot_be_stopped_is_not_waited_for(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "core"
    with running(program, "deaf") as view:
        saved = save(view, str(path))
        assert (saved.threads, saved.partial) == (2, 1)
        wait_until(lambda: sorted(thread_states(view.pid)) == ["D", "S"], what="the other thread to go on")
        # Whoever held on to it would keep it for good once it wakes.
        (deaf,) = (thread.tid for thread in view.threads() if thread.tid != view.pid)
        (child,) = Path(f"/proc/{view.pid}/task/{deaf}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        wait_until(lambda: thread_states(view.pid) == ["S"], what="the thread to end")
    with closing(CoreView(str(path))) as core:
        thread = core.thread(deaf)
        assert thread
        assert thread.state == "D"
        assert thread.syscall
        assert core.stack(deaf).frames


def test_a_killed_saver_leaves_nobody_stopped(program: Path) -> None:
    with running(program) as view:
        script = (
            "import sys, time\nfrom tracer.registers import take_registers\nfrom tracer.target import open_target\n"
            "take_registers(open_target(int(sys.argv[1])), lambda found: time.sleep(600))"
        )
        saver = subprocess.Popen([sys.executable, "-c", script, str(view.pid)], cwd=ROOT)
        try:
            wait_until(lambda: thread_states(view.pid) == ["t"], what="the process to be stopped")
        finally:
            saver.kill()
            saver.wait()
        wait_until(lambda: thread_states(view.pid) == ["S"] and not tracer_of(view.pid), what="it to go on")


def test_an_error_while_it_stands_lets_it_go(program: Path) -> None:
    def fail(_: object) -> None:
        raise HostError("no")

    with running(program) as view:
        with pytest.raises(HostError, match="no"):
            take_registers(view.target, fail)
        wait_until(lambda: thread_states(view.pid) == ["S"] and not tracer_of(view.pid), what="it to go on")


def test_a_process_that_is_stopped_stays_so(program: Path, tmp_path: Path) -> None:
    with running(program) as view:
        os.kill(view.pid, signal.SIGSTOP)
        wait_until(lambda: thread_states(view.pid) == ["T"])
        save(view, str(tmp_path / "core"))
        wait_until(lambda: thread_states(view.pid) == ["T"], what="it to stand again")
    with closing(CoreView(str(tmp_path / "core"))) as core:
        assert core.threads()[0].stopped


def test_a_debugger_is_not_disturbed(program: Path, tmp_path: Path) -> None:
    require(shutil.which("gdb"), "gdb is not installed")
    with running(program) as view:
        command = ["gdb", "-nx", "-q", "-p", str(view.pid)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as gdb:
            try:
                wait_until(lambda: tracer_of(view.pid) == gdb.pid, what="gdb")
                with pytest.raises(HostError, match=f"process {gdb.pid} traces it already"):
                    save(view, str(tmp_path / "core"))
                assert not (tmp_path / "core").exists()
            finally:
                gdb.kill()


def test_nothing_is_overwritten(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_text("mine")
    with running(program) as view:
        for there, sentence in ((path, "is there already"), (tmp_path / "none" / "core", "no folder")):
            with pytest.raises(HostError, match=sentence):
                save(view, str(there))
    assert path.read_text() == "mine"


def test_a_full_disk_leaves_no_file(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "core"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with running(program) as view:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        try:
            with pytest.raises(HostError, match="cannot be written"):
                save(view, str(path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not path.exists()
        saved = save(view, str(path))
    with pytest.raises(AioTraceError):
        save_report(saved, str(tmp_path / "none" / "report"), "{}")
    assert not path.exists()


def test_a_process_that_ends_meanwhile_is_an_error(program: Path, tmp_path: Path) -> None:
    with running(program) as view:
        os.kill(view.pid, signal.SIGKILL)
        wait_until(lambda: thread_states(view.pid) in (["Z"], []))
        with pytest.raises(AioTraceError):
            save(view, str(tmp_path / "core"))
    assert list(tmp_path.iterdir()) == []


def test_of_a_process_that_became_another_program(tmp_path: Path) -> None:
    """What was opened of it is gone; a core of what is there now would not be of what was looked at."""
    command = ["sh", "-c", "echo up; read line && exec sleep 60"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == b"up\n"
        with closing(LiveView(open_target(child.pid))) as view:
            child.stdin.write(b"go\n")
            wait_until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sleep\n")
            with pytest.raises(TargetExited, match="another program"):
                save(view, str(tmp_path / "core"))
        assert list(tmp_path.iterdir()) == []
    finally:
        child.kill()
        child.communicate()
