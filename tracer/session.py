"""A trace from beginning to end: which processes, which events, when to stop.

Knows: the order of everything, signals as a file descriptor, time. Does not know formats, options or
exit codes (cli.py).
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from tracer import kept, probes, records
from tracer.build import Build, debug_place, read_build
from tracer.errors import AioTraceError, HostError, NoSuchProcess, NotQemu, SitesNotFound, TargetExited
from tracer.events import Alert, Event, Failure, Resolved
from tracer.records import dataclass
from tracer.target import Target, open_target, qemu_hint
from tracer.watch import Settings, Watch

if TYPE_CHECKING:
    import subprocess

    from tracer.nudger import Nudger

FOREVER_S = 3600.0


class Stop:
    """A request to end, from a signal handler or another thread; can be waited for by its `fd`."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.requested = False

    def request(self) -> None:
        """End as soon as possible; safe in a signal handler."""
        self.requested = True
        with suppress(OSError):
            os.write(self._write_fd, b"x")


@dataclass(frozen=True)
class Options:
    """What the main job was asked to do; durations in seconds, 0 for none."""

    settings: Settings
    interval_s: float = 5.0
    duration_s: float = 0.0
    on_alert: str | None = None
    nudge: str | None = None  # the QMP socket of the only process


class Session:
    """The main job for some processes. `emit` gets every event; `stop` ends it."""

    def __init__(
        self,
        pids: Sequence[int],
        options: Options,
        emit: Callable[[Event], None],
        stop: Stop,
        progress: Callable[[str], None] = lambda text: None,
        out_fd: int | None = None,
    ) -> None:
        self._pids = pids
        self._options = options
        self._emit_to = emit
        self._stop = stop
        self._progress = progress
        self._out_fd = out_fd
        self._watches: dict[int, Watch] = {}
        self._builds: dict[tuple[int, int], Build] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._nudger: Nudger | None = None
        self.alerts = 0
        self.failures = 0

    def run(self, started: float) -> None:
        """Trace until told to stop, all processes have ended or the duration is over.

        `started` is the monotonic time at which the command began. Raises the error of the only process
        that could not be traced; with several, each failure is an event and the rest goes on.
        """
        probes_wanted = self._options.settings.mode != "none"
        targets = self._open_targets()
        if probes_wanted:
            probes.check_host()
        try:
            for target in targets:
                if not self._stop.requested:
                    self._start(target, started)
            self._get_ready()
            self._loop()
        finally:
            self._end()

    def _get_ready(self) -> None:
        """Import and make what only an alert needs: to be attached must not wait for it, nor must the alert."""
        if self._options.on_alert:
            import subprocess  # noqa: F401
        if self._watches:
            from tracer import eh_frame, events, home, inspect, looking, posix_aio, unwind, verdict, view

            records.get_ready(eh_frame, events, home, inspect, looking, posix_aio, unwind, verdict, view)

    def _open_targets(self) -> list[Target]:
        targets = []
        for pid in dict.fromkeys(self._pids):
            try:
                targets.append(open_target(pid))
            except AioTraceError as error:
                self._failed(error, pid)
        return targets

    def _failed(self, error: AioTraceError, pid: int) -> None:
        if len(self._pids) == 1:
            raise error
        self.failures += 1
        self._emit(Failure(time.time(), pid, error.message, error.hint))

    def _start(self, target: Target, started: float) -> None:
        try:
            fd = os.pidfd_open(target.pid)
            try:
                # Only now: what the descriptor refers to is known to be this very process.
                target.check_alive()
                watch = self._attached(target, started)
            except BaseException:
                os.close(fd)
                raise
        except BrokenPipeError:
            raise
        except (AioTraceError, OSError) as error:
            self._failed(_explained(target, error), target.pid)
            return
        if watch:
            self._watches[fd] = watch
        else:
            os.close(fd)

    def _attached(self, target: Target, started: float) -> Watch | None:
        """A watch that is attached; None where we were told to stop before."""
        build = self._build_of(target)
        if self._stop.requested:
            return None
        watch = Watch(target, build, self._options.settings, self._emit)
        try:
            if self._options.nudge:
                # The monitor's library takes as long to import as a third of all the rest.
                from tracer.nudger import Nudger

                self._nudger = Nudger(target, build, self._options.nudge, self._progress)
            watch.attach(started)
        except BaseException:
            watch.close()
            raise
        return watch

    def _build_of(self, target: Target) -> Build:
        try:
            status = os.stat(target.image_path)
            key = (status.st_dev, status.st_ino)
            if key not in self._builds:
                name, place = f"process {target.pid} ({target.exe})", debug_place(target)
                only = self._options.settings.locate_by
                self._builds[key] = (
                    read_build(target.image_path, name, only, place)
                    if only
                    else kept.read_build(target.image_path, name, place)
                )
        except NotQemu as error:
            error.hint = qemu_hint(target.pid)
            raise
        except OSError as error:
            raise TargetExited(f"process {target.pid} has ended") from error
        return self._builds[key]

    def _emit(self, event: Event) -> None:
        if isinstance(event, Alert):
            self.alerts += 1
            if self._options.on_alert:
                self._run_command(self._options.on_alert, event)
            if self._nudger:
                self._nudger.ask(event)
        elif isinstance(event, Resolved) and self._nudger:
            self._nudger.went_on(event.request)
        self._emit_to(event)

    def _run_command(self, command: str, alert: Alert) -> None:
        """Start the user's command with the alert in its environment; it is not waited for."""
        values = {
            "PID": alert.pid,
            "REQUEST": f"{alert.request:#x}",
            "CAUSE": alert.cause,
            "KIND": alert.kind,
            "FILE": alert.file,
            "STATE": alert.state,
            "EXPLANATION": alert.explanation,
        }
        import subprocess

        environment = {f"AIO_TRACE_{k}": str(v) for k, v in values.items() if v is not None}
        try:
            self._children.append(
                subprocess.Popen(command, shell=True, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=2)
            )
        except OSError as error:
            self._emit(Failure(time.time(), alert.pid, f"--on-alert could not be run: {error}", None))

    def _loop(self) -> None:
        began = time.monotonic()
        interval, duration = self._options.interval_s, self._options.duration_s
        next_table = began + interval if interval else float("inf")
        end = began + duration if duration else float("inf")
        while self._watches and not self._stop.requested:
            now = time.monotonic()
            if now >= end:
                return
            for fd, watch in list(self._watches.items()):
                if now >= watch.next_scan:
                    self._scan(fd, watch)
            if now >= next_table:
                for watch in self._watches.values():
                    watch.counts(final=False)
                next_table += interval * max(1, -(-(now - next_table) // interval))
            due = min([end, next_table, *(watch.next_scan for watch in self._watches.values())])
            self._wait(min(due - time.monotonic(), FOREVER_S))
            self._collect_nudges()
            self._children = [child for child in self._children if child.poll() is None]

    def _collect_nudges(self) -> None:
        for event in self._nudger.collect() if self._nudger else ():
            self._emit(event)

    def _scan(self, fd: int, watch: Watch) -> None:
        try:
            watch.scan()
        except TargetExited:
            self._target_ended(fd)

    def _wait(self, timeout_s: float) -> None:
        """Sleep until something is due, a process ends, we are told to stop or nobody reads any more."""
        poller = select.poll()
        poller.register(self._stop.fd, select.POLLIN)
        for fd in self._watches:
            poller.register(fd, select.POLLIN)
        if self._nudger is not None:
            poller.register(self._nudger.fd, select.POLLIN)
        if self._out_fd is not None:
            poller.register(self._out_fd, 0)
        for fd, _mask in poller.poll(max(0.0, timeout_s) * 1000):
            if fd == self._out_fd:
                self._stop.request()
            elif fd in self._watches:
                self._target_ended(fd)

    def _target_ended(self, fd: int) -> None:
        watch = self._watches.pop(fd)
        os.close(fd)
        try:
            watch.ended()
            watch.counts(final=True)
        finally:
            watch.close()

    def _end(self) -> None:
        """Summaries, then nothing left attached whatever happens."""
        try:
            self._end_nudges()
            for watch in self._watches.values():
                watch.counts(final=True)
        finally:
            for fd, watch in self._watches.items():
                watch.close()
                os.close(fd)
            self._watches.clear()

    def _end_nudges(self) -> None:
        if self._nudger is not None:
            self._nudger.close()
            self._collect_nudges()
            self._nudger = None


def _explained(target: Target, error: AioTraceError | OSError) -> AioTraceError:
    """The error as people should read it: much fails in odd ways when the process ends meanwhile."""
    if not target.alive:
        return NoSuchProcess(f"process {target.pid} ended while it was looked at")
    if isinstance(error, SitesNotFound):
        error.hint = error.hint or f"aio-trace check --pid {target.pid}"
    if isinstance(error, AioTraceError):
        return error
    return HostError(f"process {target.pid} cannot be looked at: {error}")
