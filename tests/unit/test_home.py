"""Home threads and their bells, on the threads of a child process that poll as QEMU's do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tracer import home
from tracer.home import find_bell, find_home, parked
from tracer.live import LiveView
from tracer.target import Target, Thread, open_target

# Threads of this process sleep in poll() of the C library with the words of their case on the stack, as a
# C caller's spilled variables would be: arguments from the seventh on are passed there.
CHILD = """
import ctypes as ct, json, os, select, struct, sys, threading
libc = ct.CDLL(None)
context = ct.create_string_buffer(2048)
other = ct.create_string_buffer(2048)
bell, other_bell, epoll_bell = libc.eventfd(0, 0), libc.eventfd(0, 0), libc.eventfd(0, 0)
struct.pack_into("ii", context, 204, bell, bell)
struct.pack_into("iiii", context, 300, 4711, 4711, 1, 1)
struct.pack_into("ii", other, 204, other_bell, other_bell)
tids = {}
def sleeper(name, fds, *words):
    libc.prctl(15, name.encode(), 0, 0, 0)
    tids[name] = threading.get_native_id()
    polled = (ct.c_uint64 * len(fds))(*[fd | 1 << 32 for fd in fds])
    libc.poll(polled, ct.c_ulong(len(fds)), -1, 0, 0, 0, *[ct.c_uint64(word) for word in words])
def epoller():
    libc.prctl(15, b"epoller", 0, 0, 0)
    tids["epoller"] = threading.get_native_id()
    epoll = select.epoll()
    epoll.register(epoll_bell, select.EPOLLIN)
    epoll.poll()
WORKER_CODE = 0x11223344556677
address = ct.addressof(context)
silent = libc.eventfd(0, 0)
cases = json.loads(sys.argv[1])
words = {"context": address, "worker": WORKER_CODE + 5, "plain": 0}
for name, used in cases.items():
    fds = [bell, silent] if name != "deaf" else [silent]
    threading.Thread(target=sleeper, args=(name, fds, *[words[w] for w in used]), daemon=True).start()
threading.Thread(target=epoller, daemon=True).start()
while len(tids) < len(cases) + 1: pass
print(json.dumps({"tids": tids, "context": address, "other": ct.addressof(other), "bell": bell,
    "other_bell": other_bell, "epoll_bell": epoll_bell, "worker": WORKER_CODE}), flush=True)
for line in sys.stdin:
    exec(line)
    print("ok", flush=True)
"""


@dataclass
class Child:
    """The process and what it said of itself."""

    process: subprocess.Popen[str]
    target: Target
    view: LiveView
    said: dict[str, Any]

    def run(self, line: str) -> None:
        """Run a line of Python in it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ok\n"

    def thread(self, name: str) -> Thread:
        """A thread, once it sleeps in its poll."""
        while True:
            found = self.target.thread(self.said["tids"][name])
            assert found is not None
            if parked(found):
                return found

    def park_main(self, bell: str) -> None:
        """Let the main thread sleep in a poll of that bell, for ever."""
        assert self.process.stdin
        self.process.stdin.write(f"sleeper('main', [{bell}])\n")
        self.process.stdin.flush()
        while (main := self.target.thread(self.process.pid)) is None or not parked(main):
            pass

    def home(self, context: str = "context", main_context: int | None = None) -> int | None:
        """find_home(), once all threads sleep."""
        for name in self.said["tids"]:
            self.thread(name)
        code = range(self.said["worker"], self.said["worker"] + 2048)
        return find_home(self.view, self.said[context], main_context, code)


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[Child]:
    """Threads by name with the words on their stacks: the test's parameter."""
    cases = getattr(request, "param", {"home": ["context"]})
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(cases)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        said = json.loads(process.stdout.readline())
        target = open_target(process.pid)
        yield Child(process, target, LiveView(target), said)
        process.kill()


def threads(**words: list[str]) -> pytest.MarkDecorator:
    """The child's threads."""
    return pytest.mark.parametrize("child", [words], indirect=True)


HOME = ["context"]


def test_the_main_context_is_run_by_the_main_thread(child: Child) -> None:
    assert child.home(main_context=child.said["context"]) == child.process.pid


@threads(home=HOME, bystander=["plain"])
def test_the_thread_with_the_context_on_its_stack(child: Child) -> None:
    assert child.home(main_context=1) == child.said["tids"]["home"]


@threads(home=HOME, thief=["context", "worker"])
def test_workers_are_left_out(child: Child) -> None:
    """They hold the context for a while, too; their code's address gives them away."""
    assert child.home(main_context=1) == child.said["tids"]["home"]


@threads(home=HOME, worker=HOME)
def test_threads_by_other_names_are_left_out(child: Child) -> None:
    assert child.home(main_context=1) == child.said["tids"]["home"]


@threads(one=HOME, two=HOME)
def test_two_candidates_are_none(child: Child) -> None:
    assert child.home(main_context=1) is None


def test_a_name_decides_between_two() -> None:
    """QEMU names an iothread "IO name" with -name debug-threads=on."""
    cases = {"one": HOME, "IO two": HOME}
    command = [sys.executable, "-c", CHILD, json.dumps(cases)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = json.loads(process.stdout.readline())
        target = open_target(process.pid)
        child = Child(process, target, LiveView(target), said)
        assert child.home(main_context=1) == said["tids"]["IO two"]
        process.kill()


@threads(drains=HOME)
def test_the_main_thread_that_listens_has_the_main_context(child: Child) -> None:
    """Where LTO has left nothing that tells the main context: others poll it too when they drain."""
    child.park_main("bell")
    assert child.home() == child.process.pid


@threads(one=HOME, deaf=HOME)
def test_who_listens_decides_between_two(child: Child) -> None:
    child.park_main("silent")
    assert child.home(main_context=1) == child.home() == child.said["tids"]["one"]


@threads(bystander=["plain"])
def test_nobody_has_it(child: Child) -> None:
    assert child.home("other", main_context=1) is None


def test_the_bell_of_a_context(child: Child) -> None:
    """Other equal pairs of numbers in it are no eventfds."""
    thread = child.thread("home")
    found = find_bell(child.view, child.said["context"], thread)
    assert (found.fd, found.count, found.polled) == (child.said["bell"], 0, True)


def test_a_bell_that_was_rung_and_not_heard(child: Child) -> None:
    child.run("os.write(other_bell, struct.pack('=Q', 3))")
    found = find_bell(child.view, child.said["other"], child.thread("home"))
    assert (found.fd, found.count, found.polled) == (child.said["other_bell"], 3, False)


def test_a_bell_without_a_thread(child: Child) -> None:
    found = find_bell(child.view, child.said["other"], None)
    assert (found.fd, found.polled) == (child.said["other_bell"], None)


def test_two_bells_are_none(child: Child) -> None:
    child.run('struct.pack_into("ii", context, 400, other_bell, other_bell)')
    found = find_bell(child.view, child.said["context"], None)
    assert (found.fd, found.count, found.polled) == (None, None, None)


def test_a_context_that_cannot_be_read(child: Child) -> None:
    found = find_bell(child.view, 8, None)
    assert (found.fd, found.count, found.polled) == (None, None, None)


@pytest.mark.parametrize(("bell", "heard"), [("epoll_bell", True), ("bell", False)])
def test_bells_of_an_epoll_loop(child: Child, bell: str, heard: bool) -> None:
    child.run(f'struct.pack_into("ii", other, 204, {bell}, {bell})')
    found = find_bell(child.view, child.said["other"], child.thread("epoller"))
    assert (found.fd, found.polled) == (child.said[bell], heard)


def test_a_thread_elsewhere_is_not_parked(child: Child) -> None:
    """The main thread reads its standard input: whether it listens to a bell is not known then."""
    thread = child.target.thread(child.process.pid)
    while thread is None or thread.syscall is None or thread.syscall.name != "read":
        thread = child.target.thread(child.process.pid)
    assert not parked(thread)
    assert find_bell(child.view, child.said["context"], thread).polled is None
    assert "read" not in home.POLLS
