"""The command line as a user types it, as far as no root and no QEMU is needed."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest

from tests.conftest import require
from tracer import __version__

ROOT = Path(__file__).resolve().parents[2]
NOBODY = str(2**22 + 1)  # above the highest pid there can be


@pytest.fixture(scope="module", autouse=True)
def interrupts() -> Iterator[None]:
    """cli takes Ctrl-C over when it is imported: give it back to pytest."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def aio_trace(*arguments: str, prefix: str = "", code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command; `prefix` is shell before it, such as "exec 1>&-;"."""
    program = ["-c", code] if code else [str(ROOT / "cli.py")]
    command = ["sh", "-c", f'{prefix} exec "$@"', "sh", sys.executable, *program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Exception ignored" not in done.stderr, done.stderr
    return done


def meant(option_type: str, text: str) -> float:
    """What an option of that type makes of it."""
    import cli

    value: float = getattr(cli, option_type)(text)
    return value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("1s", 1.0), ("2m", 120.0), ("1.5s", 1.5), ("1h", 3600.0), ("250us", 0.00025), (" 1s ", 1.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert meant("duration", text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        *("0", "0s", "0ms", "-1s", "5parsecs", "5", "1 s", "s", "", "1e3s", "inf", "nans", "1,5s", "+1s", "0x1s"),
        *("1s1s", "٣s", "9999999h", "9" * 400 + "s"),
    ],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        meant("duration", text)
    assert "\n" not in caught.value.format_message()


@pytest.mark.parametrize(
    ("text", "part"), [("5%", 0.05), ("0.5%", 0.005), ("100%", 1.0), ("250%", 2.5), ("none", 0.0), ("0", 0.0)]
)
def test_budgets(text: str, part: float) -> None:
    assert meant("share", text) == pytest.approx(part)


@pytest.mark.parametrize("text", ["5", "-5%", "5 %", "0.001%", "much", "", "%", "1e3%", "nan%", "5%%", "٣%", "99999%"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(click.UsageError, match="write it as 5% or") as caught:
        meant("share", text)
    assert "\n" not in caught.value.format_message()


@pytest.mark.parametrize("text", ["0", "0s", "0ms"])
def test_none_where_zero_means_none(text: str) -> None:
    assert meant("duration_or_none", text) == 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "--pid", "1", "--pid", "2"),
        ("inspect", "--core", "a", "--core", "b"),
        ("inspect", "--pid", "1", "--save", "a", "--save", "b"),
        ("check", "--pid", "1", "--pid=1"),
        ("check", "--exe", "a", "--exe", "b"),
        ("nudge", "--pid", "1", "--pid", "2", "--qmp", "s"),
        ("nudge", "--pid", "1", "--qmp", "s", "--qmp", "t"),
        ("nudge", "--pid", "1", "--qmp", ""),
        ("nudge", "--pid", "1", "--qmp", "", "--force", "--yes"),
        ("--pid", "1", "--nudge", "s", "--nudge", "t"),
        ("--pid", "1", "--nudge", ""),
        ("--pid", "1", "--deadline", "0"),
        ("--pid", "1", "--deadline", "-1s"),
        ("--pid", "1", "--deadline=-1s"),
        ("--pid", "1", "--deadline", "5parsecs"),
        ("--pid", "1", "--interval", "5"),
        ("--pid", "1", "--slow", "soon"),
        ("--pid", "1", "--duration", "0"),
        ("--pid", "1", "--probes", "some"),
        ("--pid", "1", "--budget", "5"),
        ("--pid", "1", "--budget", "-5%"),
        ("--pid", "1", "--budget", "0.001%"),
        ("--pid", "1", "--budget", "much"),
        ("--pid", "0"),
        ("--pid", "-5"),
        ("--pid", "qemu"),
        ("--pid",),
        ("--pid", "1", "--no-such-option"),
        ("--pid", "1", "no-such-command"),
        ("--json",),
        ("inspect", "--pid", "1", "--save", ""),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    """Status 2, one clear line on standard error and nothing on standard output."""
    done = aio_trace(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: ")


def test_version() -> None:
    assert aio_trace("--version").stdout == f"aio-trace {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_begins_with_the_one_thing_to_remember(arguments: tuple[str, ...]) -> None:
    done = aio_trace(*arguments)
    assert done.returncode == 0
    assert "sudo aio-trace --pid PID" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_no_such_process() -> None:
    done = aio_trace("--pid", NOBODY)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"aio-trace: there is no process {NOBODY}\n  try: pgrep -a qemu\n"


def test_no_such_process_in_json() -> None:
    """The object on standard output, the same for people on standard error."""
    done = aio_trace("--pid", NOBODY, "--json", "-v")
    assert done.returncode == 1
    error = json.loads(done.stdout)
    assert error.keys() == {"event", "time", "pid", "message", "hint"}
    assert (error["event"], error["pid"]) == ("error", int(NOBODY))
    assert error["message"] in done.stderr
    assert error["hint"] in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--pid", "{}", "--deadline", "2s"),
        ("inspect", "--pid", "{}", "--save", "a b"),
        ("check", "--pid={}", "--json"),
        ("nudge", "--qmp", "it's", "--pid", "{}"),
    ],
)
def test_a_thread_s_hint_is_the_same_command(words: tuple[str, ...]) -> None:
    """With the process's number, and every option as it must be typed; the main job's is short."""
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    try:
        done = aio_trace(*(word.format(thread.native_id) for word in words))
    finally:
        leave.set()
        thread.join()
    whole = words if words[0] != "--pid" else words[:2]
    line = shlex.join(["aio-trace", *(word.format(os.getpid()) for word in whole)])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"  try: sudo {line}"


@pytest.mark.parametrize("json_option", [(), ("--json",)])
@pytest.mark.parametrize(
    "prefix",
    [
        "exec <&-;",
        "exec >&-;",
        "exec 2>&-;",
        "exec >&- 2>&-;",
        "exec <&- >&- 2>&-;",
        "exec >/dev/full;",
        "exec 2>/dev/full;",
    ],
)
def test_closed_and_full_streams(prefix: str, json_option: tuple[str, ...]) -> None:
    """The status is the same whoever can be told."""
    assert aio_trace("--pid", NOBODY, *json_option, prefix=prefix).returncode == 1
    assert aio_trace("--deadline", "0", "--pid", NOBODY, *json_option, prefix=prefix).returncode == 2


def test_nothing_is_written_to_the_wrong_file(tmp_path: Path) -> None:
    """With standard output closed, the next file that is opened must not become it."""
    code = (
        "import sys, cli\n"
        f"cli._open_standard_streams(); file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('lost'); sys.stdout.flush(); file.write('kept'); file.close()\n"
    )
    assert aio_trace(prefix="exec >&-;", code=code).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_a_closed_stream_is_taken_by_nothing_else(fd: int) -> None:
    """From the first line on: pipes and maps that are opened later must not get its number."""
    code = (
        "import os, sys, cli\n"
        "sys.argv = ['aio-trace', '--version']\n"
        "try: cli.main()\n"
        f"except SystemExit: sys.exit(os.readlink('/proc/self/fd/{fd}') != '/dev/null')\n"
    )
    assert aio_trace(prefix=f"exec {fd}>&-;", code=code).returncode == 0


def test_what_libraries_print_is_no_result() -> None:
    """BCC and clang print to descriptor 1 from C."""
    code = (
        "import os, sys, cli\n"
        "streams = cli.Streams()\n"
        "os.write(1, b'from C\\n'); print('from Python', flush=True)\n"
        "os.system('echo from a child')\n"
        "streams.out.write('result\\n'); streams.out.flush()\n"
    )
    done = aio_trace(code=code)
    assert done.stdout == "result\n"
    assert set(done.stderr.splitlines()) == {"from C", "from Python", "from a child"}


def test_messages_nobody_reads_are_no_reason_to_end() -> None:
    code = (
        "import cli\n"
        "from tracer.session import Stop\n"
        "cli._handle_signals(Stop())\n"
        "streams = cli.Streams()\n"
        "for _ in range(3): streams.progress('x' * 100000)\n"
        "streams.out.write('result\\n'); streams.out.flush()\n"
    )
    done = aio_trace(code=code, prefix="exec 2>/dev/full;")
    assert (done.returncode, done.stdout) == (0, "result\n")


@pytest.mark.parametrize(("ignored", "stops"), [(True, False), (False, True)])
def test_hang_ups_stay_ignored_under_nohup(ignored: bool, stops: bool) -> None:
    code = (
        "import os, signal, cli\n"
        "from tracer.session import Stop\n"
        "stop = Stop()\n"
        "cli._handle_signals(stop)\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(stop.requested)\n"
    )
    assert aio_trace(code=code, prefix="trap '' HUP;" if ignored else "").stdout == f"{stops}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_to_stop(number: signal.Signals) -> None:
    code = (
        "import os, select, cli\n"
        "from tracer.session import Stop\n"
        "stop = Stop()\n"
        "cli._handle_signals(stop)\n"
        f"os.kill(os.getpid(), {int(number)}); os.kill(os.getpid(), {int(number)})\n"
        "print(stop.requested, len(select.select([stop.fd], [], [], 60)[0]))\n"
    )
    assert aio_trace(code=code).stdout == "True 1\n"


#: Puts a Ctrl-C between a call of select() and its waiting: where Python runs no handler before the wait is over.
JUST_BEFORE = (
    "import ctypes, functools, operator, select\n"
    "real, kill = select.select, getattr(ctypes.CDLL(None), 'raise')\n"
    "def late(*arguments):\n"
    "    steps = [functools.partial(kill, 2), functools.partial(real, *arguments)]\n"
    "    return list(map(operator.methodcaller('__call__'), steps))[1]\n"
)


def test_a_signal_just_before_the_wait_is_not_lost() -> None:
    code = (
        f"{JUST_BEFORE}"
        "import cli\n"
        "from tracer.session import Stop\n"
        "stop = Stop()\n"
        "cli._handle_signals(stop)\n"
        "print(late([stop.fd], [], [], 60)[0] == [stop.fd], stop.requested)\n"
    )
    assert aio_trace(code=code).stdout == "True True\n"


def test_a_signal_just_before_the_answer_is_not_lost() -> None:
    code = (
        f"{JUST_BEFORE}"
        "select.select = late\n"
        "import os, cli\n"
        "ours, theirs = os.openpty(); os.dup2(theirs, 0)\n"
        "cli._unwind_at_signals()\n"
        "try: cli._confirm('Do it?')\n"
        "except cli.Interrupted: print('interrupted')\n"
    )
    assert aio_trace(code=code).stdout == "interrupted\n"


def test_two_signals_at_once_interrupt_once() -> None:
    """Ctrl-C and the SIGTERM of whoever gave it, before Python comes to either; and a third that is late."""
    code = (
        "import os, signal, cli\n"
        "cli._unwind_at_signals()\n"
        "try:\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, cli.ENDINGS)\n"
        "    for number in cli.ENDINGS: os.kill(os.getpid(), number)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, cli.ENDINGS)\n"
        "except cli.Interrupted: print('interrupted')\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('cleaned up')\n"
    )
    done = aio_trace(code=code)
    assert (done.stdout, done.stderr) == ("interrupted\ncleaned up\n", "")


@pytest.mark.parametrize(
    ("typed", "agreed", "asked"),
    [
        ("y", True, 1),
        ("YES", True, 1),
        ("n", False, 1),
        ("", False, 1),
        ("perhaps\\ny", True, 2),
        ("\\xff\\ny", True, 2),
        ("\\x04", False, 1),
    ],
)
def test_only_a_yes_is_one(typed: str, agreed: bool, asked: int) -> None:
    code = (
        "import os, cli, click\n"
        "ours, theirs = os.openpty(); os.dup2(theirs, 0)\n"
        f"os.write(ours, b'{typed}\\n')\n"
        "try: cli._confirm('Do it?'); print(True)\n"
        "except click.Abort: print(False)\n"
    )
    done = aio_trace(code=code)
    assert (done.stdout, done.stderr.count("Do it? [y/N]")) == (f"{agreed}\n", asked)


def test_all_without_a_qemu_says_so() -> None:
    """In a /proc of its own no QEMU is to be seen."""
    require(os.geteuid() == 0, "a process namespace needs root")
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(ROOT / "cli.py"), "--all"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "aio-trace: no QEMU was found in this container, which does not see the processes of its host\n"
        "  try: docker run --privileged --pid=host IMAGE aio-trace ...    # or run it on the host itself\n"
    )


def test_commands_import_what_they_need_only() -> None:
    """--help and usage errors do not wait for BCC, capstone or tables."""
    code = (
        "import sys, cli\n"
        "print([name for name in ('bcc', 'capstone', 'elftools', 'tabulate', 'qemu') if name in sys.modules])\n"
    )
    assert aio_trace(code=code).stdout == "[]\n"


def test_an_interruption_gets_out_of_an_event_loop() -> None:
    """asyncio swallows what a callback raises, and with it a Ctrl-C, unless it is a KeyboardInterrupt."""
    from cli import Interrupted

    def interrupted() -> None:
        raise Interrupted

    with closing(asyncio.new_event_loop()) as loop:
        loop.call_soon(interrupted)
        loop.call_later(60, loop.stop)
        with pytest.raises(Interrupted):
            loop.run_forever()
