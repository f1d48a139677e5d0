"""The command line: commands, options, exit status, and where things are printed. Alone knows click."""

from __future__ import annotations

import signal

# Until our own handlers are in place, a Ctrl-C ends the process without a traceback.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import time  # noqa: E402

STARTED = time.monotonic()

import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from typing import Any, TextIO  # noqa: E402

import click  # noqa: E402

from tracer import __version__  # noqa: E402
from tracer.errors import (  # noqa: E402
    EXIT_ALERT,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    AioTraceError,
    HostError,
    NoSuchProcess,
)
from tracer.events import Event  # noqa: E402

UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
MAX_DURATION_S = 365 * 24 * 3600.0


class Duration(click.ParamType[float]):
    """A duration: 500ms, 1s, 2m; the value is in seconds. `zero` says what 0 means, None that it is refused."""

    name = "duration"

    def __init__(self, zero: str | None = None) -> None:
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds; fails with one sentence."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)?", str(value).strip(), re.ASCII)
        if not found or (found[2] is None and float(found[1])):
            self.fail(f"{value!r} is no duration; write it as 500ms, 1s or 2m.", param, ctx)
        seconds = float(found[1]) * UNITS_S[found[2] or "s"]
        if not seconds and self._zero is None:
            self.fail(f"{value!r} is too short; write it as 500ms, 1s or 2m.", param, ctx)
        if seconds > MAX_DURATION_S:
            self.fail(f"{value!r} is longer than a year.", param, ctx)
        return seconds


class Streams:
    """Standard output for results alone; whatever else prints to it (BCC, clang) goes to standard error."""

    def __init__(self) -> None:
        self.out_fd = os.dup(1)
        self.out: TextIO = os.fdopen(self.out_fd, "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(2, 1)

    def progress(self, text: str) -> None:
        """A message to people; where nobody listens any more, that is no reason to end."""
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)


def _open_standard_streams() -> None:
    """What the caller closed is /dev/null: else the next file that is opened would be standard output."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _handle_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Under nohup a hang-up stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: stop())
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


class Group(click.Group):
    """`aio-trace --pid PID` is the main job; a word after it is a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but no arguments at all show the help."""
        if not args:
            args = ["--help"]
        return super().parse_args(ctx, args)


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Group, invoke_without_command=True, context_settings=CONTEXT)
@click.option(
    "--pid",
    "pids",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="PID",
    help="The QEMU to trace; may be repeated.",
)
@click.option("--all", "everything", is_flag=True, help="Trace every QEMU on this host.")
@click.option(
    "--deadline",
    type=Duration(),
    default="1s",
    show_default=True,
    help="How long a finished request may wait for its callback.",
)
@click.option(
    "--slow",
    type=Duration(zero="none"),
    default="10s",
    show_default=True,
    help="How long a request may take to be finished; 0 for no such alerts.",
)
@click.option(
    "--interval",
    type=Duration(zero="none"),
    default="5s",
    show_default=True,
    help="A table every so often; 0 for none.",
)
@click.option("--duration", type=Duration(), default=None, help="Stop by itself after this time.")
@click.option(
    "--probes",
    "mode",
    type=click.Choice(["full", "alert", "none"]),
    default="full",
    show_default=True,
    help="full: three probes; alert: done and callback only; none: memory is sampled.",
)
@click.option(
    "--on-alert",
    metavar="CMD",
    help="Run this shell command at each alert (AIO_TRACE_CAUSE, AIO_TRACE_PID, …).",
)
@click.option(
    "--locate",
    "locate_by",
    type=click.Choice(("usdt", "symbols", "code", "dwarf")),
    help="Find the probe sites in this way only: usdt, symbols, code or dwarf.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.version_option(__version__, prog_name="aio-trace", message="%(prog)s %(version)s")
@click.pass_context
def aio_trace(
    ctx: click.Context,
    pids: tuple[int, ...],
    everything: bool,
    deadline: float,
    slow: float,
    interval: float,
    duration: float | None,
    mode: str,
    on_alert: str | None,
    locate_by: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Says live whether a VM's hanging disk is QEMU's fault.

    \b
    sudo aio-trace --pid PID

    times every request of QEMU's thread pools, and alerts when one is finished but its callback does not
    come. Ctrl-C ends it. Exit status: 0 no alert, 1 could not do it, 2 usage, 3 at least one alert.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not pids and not everything:
        raise click.UsageError("Which QEMU? Give --pid PID, or --all.")
    from tracer.session import Options
    from tracer.watch import Settings

    options = Options(Settings(deadline, slow, mode, locate_by=locate_by), interval, duration or 0.0, on_alert)
    ctx.exit(_trace(pids, everything, options, as_json, verbose))


def _trace(pids: Sequence[int], everything: bool, options: Any, as_json: bool, verbose: bool) -> int:
    from tracer.report import JsonWriter, TableWriter, Writer
    from tracer.session import Session, Stop

    stop = Stop()
    _handle_signals(stop.request)
    streams = Streams()
    chosen = list(dict.fromkeys([*pids, *(_every_qemu() if everything else [])]))
    writer: Writer = (
        JsonWriter(streams.out) if as_json else TableWriter(streams.out, streams.progress, len(chosen) > 1, verbose)
    )
    session = Session(chosen, options, _checked(writer.write), stop, streams.progress, streams.out_fd)
    try:
        if not chosen:
            raise NoSuchProcess("no QEMU was found on this host", "sudo aio-trace --all")
        session.run(STARTED)
    except BrokenPipeError:
        # Nobody reads any more: everything is detached by now, and there is nobody to tell.
        pass
    except AioTraceError as error:
        _report(error, streams, as_json, chosen[0] if len(chosen) == 1 else None, verbose)
        return error.status
    _close_quietly(streams.out)
    if session.alerts:
        return EXIT_ALERT
    return EXIT_FAILED if session.failures else EXIT_OK


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM where a plain unwinding is the way to clean up."""


def _interrupt(_number: int, _frame: Any) -> None:
    # Once is enough: cleaning up must not be interrupted in its turn.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise Interrupted


@aio_trace.command()
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def demo(verbose: bool) -> int:
    """Boot a small guest, lose one of its completions, and show what aio-trace says.

    Acts on its own throw-away guest only; needs root, qemu-system-x86 and busybox-static.
    """
    from tracer.demo import Demo
    from tracer.report import TableWriter

    streams = Streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        Demo(TableWriter(streams.out, streams.progress, verbose=verbose).write, streams.progress).run()
    except Interrupted:
        streams.progress("interrupted; the demo's guest is gone, nothing is left behind")
    except BrokenPipeError:
        pass
    except AioTraceError as error:
        _report(error, streams, as_json=False)
        return error.status
    _close_quietly(streams.out)
    return EXIT_OK


def _checked(write: Callable[[Event], None]) -> Callable[[Event], None]:
    """`write` with one sentence for a full disk; that nobody reads any more stays a BrokenPipeError."""

    def checked(event: Event) -> None:
        try:
            write(event)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise HostError(f"standard output cannot be written to: {error.strerror}") from error

    return checked


def _close_quietly(out: TextIO) -> None:
    with suppress(OSError):
        out.close()


def _every_qemu() -> list[int]:
    from tracer.target import find_qemus

    return find_qemus()


def _report(
    error: AioTraceError, streams: Streams, as_json: bool, pid: int | None = None, verbose: bool = False
) -> None:
    """One sentence and a hint on standard error; with --json also an `error` object on standard output."""
    if as_json:
        from tracer.events import Failure
        from tracer.report import as_json as event_json

        with suppress(OSError):
            streams.out.write(json.dumps(event_json(Failure(time.time(), pid, error.message, error.hint))) + "\n")
            streams.out.flush()
    for note in getattr(error, "__notes__", []) if verbose else []:
        streams.progress(note)
    streams.progress(f"aio-trace: {error.message}")
    if error.hint:
        streams.progress(f"  try: {error.hint}")


def main() -> None:
    """The console script."""
    _open_standard_streams()
    try:
        code = aio_trace.main(standalone_mode=False, prog_name="aio-trace")
    except click.exceptions.Abort:
        code = EXIT_OK
    except click.UsageError as error:
        error.show()
        code = EXIT_USAGE
    except click.ClickException as error:
        error.show()
        code = EXIT_FAILED
    except click.exceptions.Exit as error:
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else EXIT_OK)


if __name__ == "__main__":
    main()
