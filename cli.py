"""The command line: commands, options, exit status, and where things are printed. Alone knows click."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

# Until our own handlers are in place, a Ctrl-C ends the process without a traceback. The module `signal`
# itself takes a millisecond to import.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import gc  # noqa: E402

# Imports make objects that stay: to look among them for garbage, 33 times, is a tenth of the start.
gc.set_threshold(50_000)

import signal  # noqa: E402
import time  # noqa: E402

STARTED = time.monotonic()

import os  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import closing, contextmanager, suppress  # noqa: E402
from typing import TYPE_CHECKING, Any, TextIO  # noqa: E402

import click  # noqa: E402
from click.core import ParameterSource  # noqa: E402

from tracer import __version__, environment  # noqa: E402
from tracer.errors import (  # noqa: E402
    EXIT_ALERT,
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    AioTraceError,
    HostError,
)
from tracer.events import Diagnosis, Event, Failure  # noqa: E402
from tracer.text import printable, printable_lines  # noqa: E402

if TYPE_CHECKING:
    from tracer.freeing import Told, Ways
    from tracer.live import LiveView
    from tracer.own import LeftOut
    from tracer.qmp import Monitor
    from tracer.session import Stop
    from tracer.target import Target

UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
MAX_DURATION_S = 365 * 24 * 3600.0


# Types of options: click asks functions what a text means, and names the option where they refuse it.


def duration(text: str) -> float:
    """A duration in seconds: 500ms, 1s, 2m. Raises BadParameter with one sentence."""
    seconds = duration_or_none(text)
    if not seconds:
        raise click.BadParameter(f"{text!r} is too short; write it as 500ms, 1s or 2m.")
    return seconds


def duration_or_none(text: str) -> float:
    """As duration(), and 0 stands for none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)?", text.strip(), re.ASCII)
    if not found or (found[2] is None and float(found[1])):
        raise click.BadParameter(f"{text!r} is no duration; write it as 500ms, 1s or 2m.")
    seconds = float(found[1]) * UNITS_S[found[2] or "s"]
    if seconds > MAX_DURATION_S:
        raise click.BadParameter(f"{text!r} is longer than a year.")
    return seconds


def share(text: str) -> float:
    """A share of one processor, 5% or 0.5%, as a part of one; 0.0 for `none`. Raises BadParameter with one sentence."""
    if text.strip() in ("none", "0", "0%"):
        return 0.0
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip(), re.ASCII)
    if not found or not 0.01 <= float(found[1]) <= 1000:
        raise click.BadParameter(f"{text!r} is no budget; write it as 5% or 0.5%, or none for no limit.")
    return float(found[1]) / 100


class Streams:
    """Standard output for results alone; whatever else prints to it (BCC, clang) goes to standard error."""

    def __init__(self, ending_fd: int | None = None) -> None:
        """`ending_fd` becomes readable when all is to end, also for a reader who does not read; None: signals do it."""
        self.out_fd = os.dup(1)
        self._errors: TextIO | None = None
        if ending_fd is None:
            self.out: TextIO = os.fdopen(self.out_fd, "w", encoding="utf-8", errors="backslashreplace")
        else:
            from tracer import output

            self.out = output.text(self.out_fd, ending_fd)
            self._errors = output.text(2, ending_fd)
        os.dup2(2, 1)

    def progress(self, text: str) -> None:
        """A message to people; where nobody listens any more, that is no reason to end."""
        try:
            print(printable_lines(text), file=self._errors or sys.stderr, flush=True)
        except OSError:
            self._errors = None
            _to_nobody()

    def abandon(self) -> None:
        """What is not written yet never will be: the end must not wait for somebody who does not read."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.out_fd)
        os.close(null)


def _to_nobody() -> None:
    """What is left to be said on standard error, and at the end of Python, goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _show(error: click.ClickException) -> None:
    try:
        error.show()
    except OSError:
        _to_nobody()


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


def _allow_many_files() -> None:
    """Each QEMU takes a dozen descriptors; what is allowed at first is for programs that use select(2)."""
    with suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _handle_endings(handler: Callable[[int, Any], None]) -> None:
    for number in ENDINGS:
        # Under nohup a hang-up stays ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _handle_signals(stop: Stop) -> None:
    _handle_endings(lambda _number, _frame: stop.request())
    # A handler in Python runs only once what waits has returned: a signal in the microseconds before that
    # must wake it.
    signal.set_wakeup_fd(stop.wake_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


#: What tells which QEMU is meant, and how it is reached: the last of two would be taken, and the first forgotten.
ONCE = frozenset({"pid", "core", "exe", "save", "socket_path", "via", "domain", "connect", "nudge_socket"})


def _refuse_twice(command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """Raise UsageError for an option of ONCE that is there twice."""
    _, _, order = command.make_parser(ctx).parse_args(args=list(args))
    options = [each for each in order if isinstance(each, click.Option) and each.name in ONCE and not each.multiple]
    for option in options:
        if options.count(option) > 1:
            raise click.UsageError(f"{option.opts[0]} is there twice; give it once.", ctx)


class Command(click.Command):
    """A command that refuses what cannot be meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does."""
        _refuse_twice(self, ctx, args)
        return super().parse_args(ctx, args)


class Group(click.Group):
    """`aio-trace --pid PID` is the main job; a word after it is a command."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, but no arguments at all show the help."""
        if not args:
            args = ["--help"]
        _refuse_twice(self, ctx, args)
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
    type=duration,
    default="1s",
    show_default=True,
    help="How long a finished request may wait for its callback.",
)
@click.option(
    "--slow",
    type=duration_or_none,
    metavar="DURATION",
    default="10s",
    show_default=True,
    help="How long a request may take to be finished; 0 for no such alerts.",
)
@click.option(
    "--interval",
    type=duration_or_none,
    metavar="DURATION",
    default="5s",
    show_default=True,
    help="A table every so often; 0 for none.",
)
@click.option("--duration", type=duration, default=None, help="Stop by itself after this time.")
@click.option(
    "--probes",
    "mode",
    type=click.Choice(["full", "alert", "none"]),
    default="full",
    show_default=True,
    help="full: three probes; alert: done and callback only; none: memory is sampled.",
)
@click.option(
    "--budget",
    type=share,
    default="5%",
    show_default=True,
    help="What the probes on a QEMU may cost, of one processor; beyond it fewer are used. none: no limit.",
)
@click.option(
    "--on-alert",
    metavar="CMD",
    help="Run this shell command at each alert (AIO_TRACE_CAUSE, AIO_TRACE_PID, …).",
)
@click.option(
    "--nudge",
    "nudge_socket",
    metavar="SOCKET",
    help="Free a lost completion at its alert, through this QMP socket of the one --pid.",
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
    budget: float,
    on_alert: str | None,
    nudge_socket: str | None,
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
        _refuse_options_before(ctx, ctx.invoked_subcommand)
        return
    if not pids and not everything:
        raise click.UsageError("Which QEMU? Give --pid PID, or --all.")
    if nudge_socket == "":
        raise click.UsageError("--nudge needs the path of a socket.")
    if nudge_socket and (everything or len(set(pids)) != 1):
        raise click.UsageError("--nudge SOCKET is the monitor of one process; give exactly one --pid.")
    from tracer.session import Options
    from tracer.watch import Settings

    settings = Settings(deadline, slow, mode, locate_by=locate_by, budget=budget)
    options = Options(settings, interval, duration or 0.0, on_alert, nudge_socket, everything, pids)
    ctx.exit(_trace(pids, everything, options, as_json, verbose))


def _refuse_options_before(ctx: click.Context, command: str) -> None:
    """Those of the main job mean nothing to a command; it has its own."""
    for parameter in ctx.command.params:
        if parameter.name and ctx.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            option = parameter.opts[0]
            raise click.UsageError(f"{option} belongs behind the command: aio-trace {command} {option} ...")


def _trace(pids: Sequence[int], everything: bool, options: Any, as_json: bool, verbose: bool) -> int:
    from tracer.report import JsonWriter, TableWriter
    from tracer.session import Session, Stop

    stop = Stop()
    _handle_signals(stop)
    streams = Streams(stop.fd)
    chosen = list(dict.fromkeys([*pids, *(_every_qemu() if everything else [])]))
    lines, table = (
        JsonWriter(streams.out),
        TableWriter(streams.out, streams.progress, len(chosen) > 1 or options.follow, verbose),
    )

    def write(event: Event) -> None:
        if as_json:
            lines.write(event)
        # What failed is told to people in either case.
        if not as_json or isinstance(event, Failure):
            table.write(event)

    session = Session(chosen, options, _checked(write), stop, streams.progress, streams.out_fd)
    try:
        if not chosen:
            from tracer.target import no_qemu

            raise no_qemu()
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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM where a plain unwinding is the way to clean up.

    A KeyboardInterrupt, since asyncio swallows any other exception that a signal handler raises in a callback.
    """


def _interrupt(_number: int, _frame: Any) -> None:
    # Once is enough: cleaning up must not be interrupted in its turn. One that came together with this is handed
    # to whatever stands there next, and Python complains if that is SIG_IGN.
    for number in ENDINGS:
        signal.signal(number, lambda _number, _frame: None)
    # What the monitor's library was about is of no interest any more.
    import logging

    logging.getLogger("asyncio").disabled = True
    raise Interrupted


def _unwind_at_signals() -> None:
    """From now on a signal that would end the program raises Interrupted."""
    _handle_endings(_interrupt)


@contextmanager
def _while_it_lives(target: Target) -> Iterator[None]:
    """What goes wrong because the process ended meanwhile is told as that; without root, the same with sudo helps."""
    from tracer.errors import NotPermitted, TargetExited

    try:
        yield
    except NotPermitted as error:
        if os.geteuid():
            error.hint = _retyped(target.pid)(target.pid)
        raise
    except AioTraceError as error:
        try:
            target.check_memory()
        except TargetExited as ended:
            raise ended from error
        raise


def _retyped(pid: int) -> Callable[..., str]:
    """How the command that runs is typed for another process, or with root's rights."""

    def line(*others: int) -> str:
        import shlex

        words = sys.argv[1:]
        at = next((at for at, word in enumerate(words[:-1]) if word == "--pid" and words[at + 1] == str(pid)), None)
        if at is not None:
            words[at + 1] = str(others[0])
        else:
            words = [f"--pid={others[0]}" if word == f"--pid={pid}" else word for word in words]
        return f"sudo {shlex.join(['aio-trace', *words])}"

    return line


@aio_trace.command()
@click.option("--pid", type=click.IntRange(min=1), metavar="PID", help="The QEMU to look at.")
@click.option("--core", type=click.Path(), metavar="FILE", help="A core file of a QEMU to look at instead.")
@click.option("--exe", type=click.Path(), metavar="FILE", help="The executable that the core file is of.")
@click.option(
    "--save",
    type=click.Path(),
    metavar="FILE",
    help="Also write a core without guest RAM, and FILE.json; stops the process for milliseconds.",
)
@click.option(
    "--deadline",
    type=duration,
    default="200ms",
    show_default=True,
    help="A request that does not go on for this long is overdue.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Every request in full, every thread.")
def inspect(
    pid: int | None,
    core: str | None,
    exe: str | None,
    save: str | None,
    deadline: float,
    as_json: bool,
    verbose: bool,
) -> int:
    """Says at once why a VM's disk hangs: every pool, every request, one verdict.

    Reads memory only; a live process is not stopped, but by --save, and that for milliseconds. Exit
    status: 0 nothing overdue, 1 could not do it, 2 usage, 3 at least one overdue request, or QEMU stands still.
    """
    if (pid is None) == (core is None):
        raise click.UsageError("Which QEMU? Give --pid PID, or --core FILE.")
    if exe is not None and core is None:
        raise click.UsageError("--exe belongs to --core.")
    if save is not None and pid is None:
        raise click.UsageError("--save belongs to --pid.")
    if save == "":
        raise click.UsageError("--save needs the name of a file.")
    streams = Streams()
    failure: AioTraceError | None = None
    files = _Files(save or "")
    try:
        if core is not None:
            found = _inspect_core(core, exe)
        elif save is not None:
            found, failure = _inspect_and_save(pid or 0, deadline, files, streams.progress)
        else:
            found = _inspect_pid(pid or 0, deadline)
        _write_diagnosis(streams, found, as_json, verbose)
        if failure is not None:
            raise failure
    except Interrupted:
        streams.abandon()
        streams.progress(f"interrupted; {files.after_an_interruption()}")
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED
    except AioTraceError as error:
        _report(error, streams, as_json, pid, verbose)
        return error.status
    _close_quietly(streams.out)
    return EXIT_ALERT if found.overdue or found.standing else EXIT_OK


def _inspect_pid(pid: int, deadline: float) -> Diagnosis:
    from tracer.live import LiveView
    from tracer.target import open_target

    target = open_target(pid, _retyped(pid))
    with _while_it_lives(target), closing(LiveView(target)) as view:
        return _diagnosed(view, deadline)


def _diagnosed(view: LiveView, deadline: float) -> Diagnosis:
    """What is said of a live process; TargetExited where it ended before all of it was seen."""
    from tracer.build import debug_place, read_build
    from tracer.inspect import diagnose

    target = view.target
    found = diagnose(view, read_build(target.image_path, target.exe, place=debug_place(target)), deadline, STARTED)
    target.check_memory()
    return found


class _Files:
    """The core and the report that --save writes: both of them, or none."""

    def __init__(self, core: str) -> None:
        self.core, self.report = core, f"{core}.json"
        self.begun = self.whole = False

    def after_an_interruption(self) -> str:
        """What is there, in words; what is not whole is removed."""
        if self.whole:
            return f"{self.core} and {self.report} are saved, and whole"
        for path in (self.core, self.report) if self.begun else ():
            with suppress(OSError):
                os.unlink(path)
        return "nothing was saved"


def _inspect_and_save(
    pid: int, deadline: float, files: _Files, progress: Callable[[str], None]
) -> tuple[Diagnosis, AioTraceError | None]:
    """As _inspect_pid, with a core and the report in files, or why there are none.

    The diagnosis is made before the process stops.
    """
    from tracer.live import LiveView
    from tracer.save import refuse_existing
    from tracer.target import open_target

    _unwind_at_signals()
    target = open_target(pid, _retyped(pid))
    refuse_existing(files.core, files.report)
    with _while_it_lives(target), closing(LiveView(target)) as view:
        found = _diagnosed(view, deadline)
        try:
            with _while_it_lives(target):
                _save(view, found, files, progress)
        except AioTraceError as error:
            return found, error
    return found, None


def _save(view: LiveView, found: Diagnosis, files: _Files, progress: Callable[[str], None]) -> None:
    from tracer.report import json_line
    from tracer.report_inspect import diagnosis_json
    from tracer.save import refuse_existing, save, save_report

    text = json_line(diagnosis_json(found)) + "\n"
    refuse_existing(files.core, files.report)
    files.begun = True
    saved = save(view, files.core)
    save_report(saved, files.report, text)
    files.whole = True
    progress(f"saved {files.core} ({saved.stored / (1 << 20):.1f} MiB on disk) and {files.report}")
    progress(_what_is_inside(saved.left_out))
    progress(f"the process stood still for {saved.stopped_s * 1e3:.1f} ms while its registers were taken")
    if saved.partial:
        progress(f"{saved.partial} of {saved.threads} threads sleep in the kernel and were not stopped")


def _what_is_inside(left_out: LeftOut) -> str:
    """What whoever sends it away must know."""
    guest, buffers, unproved = (size / (1 << 20) for size in (left_out.guest, left_out.buffers, left_out.unproved))
    kept = "it holds QEMU's own data, heap and stacks, and with them its command line, the registers of the guest's\n"
    kept += "processors and what small requests carry; "
    if left_out.marked:
        return (
            f"{kept}left out: {guest:.0f} MiB of guest RAM, video memory and ROMs, {buffers:.1f} MiB of large buffers"
        )
    why = "nothing is marked as the guest's here"
    return f"{kept}left out, as not proved to be QEMU's own: {unproved + buffers:.1f} MiB ({why})"


def _inspect_core(core: str, exe: str | None) -> Diagnosis:
    from tracer.build import build_of
    from tracer.core import CoreView
    from tracer.inspect import diagnose

    with closing(CoreView(core, exe)) as view, view.open_image() as image:
        return diagnose(view, build_of(image, view.exe or core), began=STARTED)


def _write_diagnosis(streams: Streams, found: Diagnosis, as_json: bool, verbose: bool) -> None:
    from tracer.report import json_line
    from tracer.report_inspect import diagnosis_json, diagnosis_text

    text = json_line(diagnosis_json(found)) if as_json else diagnosis_text(found, verbose)
    try:
        streams.out.write(text + "\n")
        streams.out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostError(f"standard output cannot be written to: {error.strerror}") from error


@aio_trace.command()
@click.option("--drain", is_flag=True, help="Then lose one more, with a dead monitor, and free it by --force.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def demo(drain: bool, verbose: bool) -> int:
    """Boot a small guest, lose one of its completions, show what aio-trace says, and free it.

    Acts on its own throw-away guest only; needs root, qemu-system-x86 and busybox-static.
    """
    from tracer.demo import Demo
    from tracer.report import TableWriter

    streams = Streams()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        _unwind_at_signals()
        Demo(TableWriter(streams.out, streams.progress, verbose=verbose).write, streams.progress, drain).run()
    except Interrupted:
        streams.progress("interrupted; the demo's guest is gone, nothing is left behind")
    except BrokenPipeError:
        pass
    except AioTraceError as error:
        _report(error, streams, as_json=False)
        return error.status
    _close_quietly(streams.out)
    return EXIT_OK


@aio_trace.command()
@click.option("--pid", type=click.IntRange(min=1), metavar="PID", help="A running QEMU.")
@click.option("--exe", metavar="FILE", help="A QEMU's executable; needs no root.")
@click.option("--locate", metavar="NAME", help="Try only this way to find the probe sites.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Also what the kernel, its verifier and the compiler say.")
def check(pid: int | None, exe: str | None, locate: str | None, as_json: bool, verbose: bool) -> int:
    """Say what would be attached and why, what this build is, and what this host lacks.

    Attaches nothing to the process and reads files only; what is tried is tried on aio-trace itself.
    """
    if (pid is None) == (exe is None):
        raise click.UsageError("What is to be checked? Give either --pid PID or --exe FILE.")
    from tracer.check import check_file, check_process
    from tracer.report import JsonWriter, TableWriter

    streams = Streams()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    writer = JsonWriter(streams.out) if as_json else TableWriter(streams.out, streams.progress, verbose=verbose)
    try:
        findings = check_file(str(exe), locate) if pid is None else check_process(pid, locate, _retyped(pid))
        _checked(writer.write)(findings.event)
        if findings.failure:
            raise findings.failure
    except BrokenPipeError:
        pass
    except AioTraceError as error:
        _report(error, streams, as_json, pid, verbose)
        return error.status
    _close_quietly(streams.out)
    return EXIT_OK


@aio_trace.command()
@click.option("--pid", type=click.IntRange(min=1), required=True, metavar="PID", help="The QEMU whose guest hangs.")
@click.option("--qmp", "socket_path", metavar="SOCKET", help="The UNIX socket of its QMP monitor.")
@click.option("--via", type=click.Choice(["virsh"]), help="Ask through libvirt, which holds the socket.")
@click.option("--domain", metavar="NAME", help="libvirt's name, UUID or number of it, where that is to be checked.")
@click.option("--connect", metavar="URI", help="Of the libvirt that started it, where virsh's usual ones are not.")
@click.option("--force", is_flag=True, help="If the monitor does not free it: one call inside QEMU.")
@click.option("--yes", is_flag=True, help="Do not ask before --force.")
@click.option(
    "--timeout", type=duration, default="5s", show_default=True, help="How long to wait for each of its answers."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a request on standard output.")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def nudge(
    pid: int,
    socket_path: str | None,
    via: str | None,
    domain: str | None,
    connect: str | None,
    force: bool,
    yes: bool,
    timeout: float,
    as_json: bool,
    verbose: bool,
) -> int:
    """Free a guest that hangs on a lost completion, and say whether it worked.

    \b
    sudo aio-trace nudge --pid PID --qmp SOCKET

    Looks first; where nothing is lost, nothing is sent. Through the monitor it sends two questions and one
    tiny read. --force is for a monitor that is dead, too. Exit status: 0 freed, 1 could not do it or not for
    this, 2 usage, 3 not freed.
    """
    if socket_path == "":
        raise click.UsageError("--qmp needs the path of a socket.")
    if not (socket_path or via or force):
        raise click.UsageError("How? Give --qmp SOCKET, --via virsh, or --force.")
    if socket_path and via:
        raise click.UsageError("--qmp and --via exclude each other.")
    if (domain is not None or connect is not None) and not via:
        raise click.UsageError("--domain and --connect go with --via virsh.")
    if connect == "":
        raise click.UsageError("--connect needs a URI.")
    if force and not yes and not sys.stdin.isatty():
        raise click.UsageError("--force asks before it acts, and nobody can answer here; give --yes as well.")
    from tracer.freeing import Told, Ways

    streams = Streams()
    ways = Ways(
        _virsh_chosen(domain, connect, timeout, streams.progress) if via else _socket_chosen(socket_path, timeout),
        force,
        None if yes else lambda: _confirm("Do it?"),
    )
    told = Told()
    _unwind_at_signals()
    try:
        try:
            _nudged(pid, ways, told, streams)
        except (Interrupted, click.Abort) as ending:
            told.stopped = True
            streams.progress(_not_done(told, isinstance(ending, Interrupted)))
        except AioTraceError as error:
            told.failures.append(error)
        _write_all(told.events, streams, as_json, verbose)
    except (BrokenPipeError, Interrupted):
        streams.abandon()
        return EXIT_FAILED
    except AioTraceError as error:
        told.failures.append(error)
    for failure in (*told.failures, *told.left):
        _report(failure, streams, as_json, pid, verbose)
    _close_quietly(streams.out)
    return told.status


def _virsh_chosen(
    domain: str | None, connect: str | None, timeout_s: float, say: Callable[[str], None]
) -> Callable[[Target], Monitor]:
    from tracer.libvirt import VirshMonitor

    return lambda target: VirshMonitor(target, domain, connect, say, timeout_s)


def _socket_chosen(path: str | None, timeout_s: float) -> Callable[[Target], Monitor] | None:
    from tracer.qmp import SocketMonitor

    return (lambda target: SocketMonitor(target, path, timeout_s)) if path else None


def _confirm(question: str) -> None:
    """As click.confirm(abort=True), but a signal that comes just before it waits for the answer is not lost."""
    import select

    woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    answer = b""
    try:
        while answer not in (b"y", b"yes"):
            click.echo(f"{question} [y/N]: ", nl=False, err=True)
            ready, _, _ = select.select([0, woken], [], [])
            line = os.read(0, 4096) if 0 in ready else b""
            answer = line.strip().lower()
            if answer in (b"", b"n", b"no"):
                if not line:
                    click.echo(err=True)
                raise click.Abort
    except Interrupted:
        click.echo(err=True)
        raise
    finally:
        signal.set_wakeup_fd(-1)
        os.close(woken)
        os.close(wake)


def _not_done(told: Told, interrupted: bool) -> str:
    if not interrupted:
        return "not done"
    return "interrupted; what was sent is in the audit line" if told.sent else "interrupted; nothing was sent"


def _nudged(pid: int, ways: Ways, told: Told, streams: Streams) -> None:
    from tracer.build import debug_place, read_build
    from tracer.freeing import free
    from tracer.nudge import Nudge
    from tracer.target import open_target

    target = open_target(pid, _retyped(pid))
    with _while_it_lives(target):
        build = read_build(target.image_path, f"process {pid} ({target.exe})", place=debug_place(target))
        with closing(Nudge(target, build, streams.progress)) as nudger:
            free(nudger, ways, told, streams.progress)


def _write_all(events: Sequence[Event], streams: Streams, as_json: bool, verbose: bool) -> None:
    from tracer.report import JsonWriter, TableWriter, Writer

    writer: Writer = JsonWriter(streams.out) if as_json else TableWriter(streams.out, streams.progress, verbose=verbose)
    for event in events:
        _checked(writer.write)(event)


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
        from tracer.report import as_json as event_json
        from tracer.report import json_line

        with suppress(OSError):
            streams.out.write(json_line(event_json(Failure(time.time(), pid, error.message, error.hint))) + "\n")
            streams.out.flush()
    for note in getattr(error, "__notes__", []) if verbose else []:
        streams.progress(note)
    streams.progress(f"aio-trace: {error.message}")
    if error.hint:
        from tracer.report import as_typed

        streams.progress(f"  try: {as_typed(error.hint)}")


def main() -> None:
    """The console script."""
    _open_standard_streams()
    _allow_many_files()
    refused = environment.clean(os.environ)
    if "-v" in sys.argv:
        print(*(printable(f"aio-trace: {why}") for why in refused), sep="\n", end="\n" * bool(refused), file=sys.stderr)
    try:
        code = aio_trace.main(standalone_mode=False, prog_name="aio-trace")
    except (MemoryError, OSError) as error:
        if "-v" in sys.argv:
            raise
        reason = "there is not enough memory" if isinstance(error, MemoryError) else printable(str(error))
        print(
            f"aio-trace: it cannot go on here: {reason}\n  try: ulimit -a    # what this shell allows", file=sys.stderr
        )
        code = EXIT_FAILED
    except click.exceptions.Abort:
        code = EXIT_OK
    except click.UsageError as error:
        _show(error)
        code = EXIT_USAGE
    except click.ClickException as error:
        _show(error)
        code = EXIT_FAILED
    except click.exceptions.Exit as error:
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else EXIT_OK)


if __name__ == "__main__":
    main()
