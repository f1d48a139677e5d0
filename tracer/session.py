"""A trace from beginning to end: which processes, which events, when to stop.

Knows: the order of everything, signals as a file descriptor, time. Does not know formats, options or
exit codes (cli.py).
"""

from __future__ import annotations

import os
import select
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tracer import kept, probes, records
from tracer.build import Build, build_of, debug_place, host_place
from tracer.errors import AioTraceError, HostError, NoSuchProcess, NotQemu, OutOfBounds, SitesNotFound, TargetExited
from tracer.events import Alert, Event, Failure
from tracer.executable import Executable, Identity, identity_of
from tracer.preparing import Preparations, apart
from tracer.records import dataclass
from tracer.spending import HitPrice
from tracer.target import Target, ended, list_pids, looks_like_qemu, open_target, qemu_hint
from tracer.watch import MODES, Settings, Watch, find_pools, parameters_of

if TYPE_CHECKING:
    from tracer.apart import Errand
    from tracer.commands import Commands
    from tracer.nudger import Nudger
    from tracer.preparing import Steps

FOREVER_S = 3600.0
#: More processes of one executable than this share their probes.
SHARED_FROM = 4
#: How often new QEMUs are looked for; and how much sooner than planned one may be looked at with others; seconds.
FOLLOW_S, TOGETHER_S = 2.0, 0.05
#: Tables and the duration count from when all that were there at first are attached, or slow; or after this; seconds.
START_S = 30.0
#: At every so many looks for new QEMUs, those processes are looked at again that were none before.
EVERYBODY = 15


class Stop:
    """A request to end, from a signal handler or another thread; can be waited for by its `fd`.

    What is written to `wake_fd` wakes who waits.
    """

    def __init__(self) -> None:
        self.fd, self.wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.requested = False

    def request(self) -> None:
        """End as soon as possible; safe in a signal handler."""
        self.requested = True
        with suppress(OSError):
            os.write(self.wake_fd, b"x")


@dataclass(frozen=True)
class Known:
    """An executable: its file, open while a watched process runs it, and what was found in it."""

    file: Executable
    build: Build
    shareable: bool  # whether nothing of it is from files that one process alone may have made up


@dataclass(frozen=True)
class Options:
    """What the main job was asked to do; durations in seconds, 0 for none."""

    settings: Settings
    interval_s: float = 5.0
    duration_s: float = 0.0
    on_alert: str | None = None
    nudge: str | None = None  # the QMP socket of the only process
    follow: bool = False  # QEMUs that start later, too
    named: Collection[int] = ()  # the processes that were asked for by number


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
        self._known: dict[Identity, Known] = {}
        self._commands: Commands | None = None
        self._nudger: Nudger | None = None
        self._price = HitPrice()
        self._shared: dict[Identity, probes.Programs] = {}
        self._crowded: Collection[Identity] = ()
        self._preparations = Preparations(bounded=options.follow or len(pids) > 1)
        self._understanding: set[Identity] = set()  # by the preparations under way
        self._coming: dict[int, Identity] = {}  # what those will watch
        self._ready = False
        self._newcomers = Newcomers(pids)
        self._next_look = 0.0
        self.alerts = 0
        self.failures = 0

    def run(self, started: float) -> None:
        """Trace until told to stop, all processes have ended or the duration is over.

        `started` is the monotonic time at which the command began. Raises the error of the only process
        that could not be traced; with several, each failure is an event and the rest goes on.
        """
        probes_wanted = self._options.settings.mode != "none"
        targets = [target for pid in dict.fromkeys(self._pids) if (target := self._open(pid))]
        if probes_wanted:
            probes.check_host()
        self._next_look = time.monotonic() + FOLLOW_S
        self._crowded = crowded_executables(targets)
        try:
            for target in targets:
                self._preparations.add(self._preparing(target, started))
            self._loop()
        finally:
            self._end()

    def _get_ready(self) -> None:
        """Import and make what only an alert needs: to be attached must not wait for it, nor must the alert."""
        if self._options.on_alert and self._commands is None:
            from tracer.commands import Commands

            self._commands = Commands(self._options.on_alert)
        if self._watches and not self._ready:
            self._ready = True
            from tracer import eh_frame, events, home, inspect, looking, posix_aio, unwind, verdict, view

            records.get_ready(eh_frame, events, home, inspect, looking, posix_aio, unwind, verdict, view)

    def _open(self, pid: int) -> Target | None:
        try:
            return open_target(pid)
        except AioTraceError as error:
            self._failed(error, pid)
        except Exception as error:  # whatever it has made of its /proc
            self._failed(_strange(pid, error), pid)
        return None

    def _failed(self, error: AioTraceError, pid: int) -> None:
        if self._options.follow and isinstance(error, NoSuchProcess) and pid not in self._options.named:
            return  # what has ended already was none that hangs
        if len(self._pids) == 1 and not self._options.follow:
            raise error
        self.failures += 1
        self._emit(Failure(time.time(), pid, error.message, error.hint))

    def _preparing(self, target: Target, started: float) -> Steps:
        """The way of one process to its watch. What goes wrong with it is its own affair."""
        fd = -1
        try:
            fd = os.pidfd_open(target.pid)
            # Only now: what the descriptor refers to is known to be this very process.
            target.check_alive()
            self._watches[fd] = yield from self._attaching(target, started)
            fd = -1
        except BrokenPipeError:
            raise
        except Exception as error:
            self._failed(_explained(target, error), target.pid)
        finally:
            if fd >= 0:
                os.close(fd)
            self._coming.pop(target.pid, None)
            self._forget_unused()

    def _attaching(self, target: Target, started: float) -> Generator[Errand | None, None, Watch]:
        """A watch that is attached. All that reads the process's files and its heap is done apart."""
        known = yield from self._know(target)
        executable = self._coming[target.pid]
        programs = self._programs_of(executable, known) if self._to_share(executable, known.shareable, target) else None
        watch = Watch(target, known.build, self._options.settings, self._emit, self._price)
        watch.executable = executable
        try:
            if self._options.nudge:
                # The monitor's library takes as long to import as a third of all the rest.
                from tracer.nudger import Nudger

                self._nudger = Nudger(target, known.build, self._options.nudge, self._progress)
            watch.attach_probes(known.file, programs)
            watch.begin(started, (yield from apart(partial(find_pools, target, known.build))))
        except BaseException:
            watch.close()
            raise
        return watch

    def _to_share(self, executable: Identity, shareable: bool, target: Target) -> bool:
        wanted = self._options.follow or executable in self._crowded
        return wanted and shareable and probes.can_be_shared(target.pid)

    def _programs_of(self, executable: Identity, known: Known) -> probes.Programs | None:
        """Those that all processes of this executable share."""
        settings, located = self._options.settings, known.build.located
        sites = located.sites_of(*MODES[settings.mode])
        if not sites:
            return None
        if executable not in self._shared:
            what = parameters_of(known.build, settings, shared=True)
            self._shared[executable] = probes.Programs(known.file, sites, located.layout.element, what)
        return self._shared[executable]

    def _know(self, target: Target) -> Generator[Errand | None, None, Known]:
        """What the process runs: opened here and never again, understood if it was not yet; its key is in `_coming`."""
        file = Executable.of(target)
        try:
            executable = file.identity
            while executable in self._understanding:
                yield None
            known = self._known.get(executable)
            if known is None:
                known = yield from self._understand(target, file, executable)
                executable = executable if known.shareable else (*executable, target.pid, target.start_time)
        except BaseException:
            file.close()
            raise
        if known.file is not file:
            file.close()
        self._known[executable] = known
        self._coming[target.pid] = executable
        return known

    def _understand(
        self, target: Target, file: Executable, executable: Identity
    ) -> Generator[Errand | None, None, Known]:
        self._understanding.add(executable)
        try:
            build, shareable = yield from apart(
                partial(understood, target, file, self._options.settings.locate_by), [file.fd]
            )
        finally:
            self._understanding.discard(executable)
        return Known(file, build, shareable)

    def _emit(self, event: Event) -> None:
        if isinstance(event, Alert):
            self.alerts += 1
            self._get_ready()
            if self._commands:
                self._run_commands(partial(self._commands.run, event))
            if self._nudger:
                self._nudger.ask(event)
        self._emit_to(event)

    def _run_commands(self, run: Callable[[], None]) -> None:
        try:
            run()
        except OSError as error:
            self._emit(Failure(time.time(), None, f"--on-alert could not be run: {error}", None))

    def _loop(self) -> None:
        interval, duration = self._options.interval_s, self._options.duration_s
        next_table = end = float("inf")
        began = None
        latest = time.monotonic() + START_S
        while (self._watches or self._preparations or self._options.follow) and not self._stop.requested:
            self._preparations.go_on()
            self._get_ready()
            now = time.monotonic()
            if began is None and (not self._preparations.hurried or now >= latest):
                began = now
                next_table = began + interval if interval else float("inf")
                end = began + duration if duration else float("inf")
            if now >= end:
                return
            self._scan_due(now)
            if now >= next_table:
                self._tables()
                next_table += interval * max(1, -(-(now - next_table) // interval))
            if self._options.follow and now >= self._next_look:
                self._look_for_newcomers()
                self._preparations.go_on()
            if not self._watches and not self._preparations and not self._options.follow:
                return  # the last one has ended under our eyes
            due = min([end, next_table, *(watch.next_scan for watch in self._watches.values())])
            if self._options.follow:
                due = min(due, self._next_look)
            self._wait(min(due - time.monotonic(), FOREVER_S, self._preparations.due_s()))
            self._collect_nudges()
            if self._commands:
                self._run_commands(self._commands.go_on)

    def _tables(self) -> None:
        for fd, watch in list(self._watches.items()):
            self._guarded(fd, watch, lambda watch: watch.counts(final=False))

    def _collect_nudges(self) -> None:
        for event in self._nudger.collect() if self._nudger else ():
            self._emit(event)

    def _scan_due(self, now: float) -> None:
        """Those that are due; with many, those that soon are, too, since all share what is read."""
        if any(now >= watch.next_scan for watch in self._watches.values()):
            soon = now + (TOGETHER_S if self._shared else 0.0)
            for fd, watch in list(self._watches.items()):
                if soon >= watch.next_scan:
                    self._scan(fd, watch)

    def _look_for_newcomers(self) -> None:
        for pid in self._newcomers.look():
            started = time.monotonic()
            target = self._open(pid)
            if target:
                self._preparations.add(self._preparing(target, started))
        self._next_look = time.monotonic() + FOLLOW_S

    def _scan(self, fd: int, watch: Watch) -> None:
        self._guarded(fd, watch, lambda watch: watch.scan())

    def _guarded(self, fd: int, watch: Watch, what: Callable[[Watch], None]) -> None:
        """Do something with one watch. Where that fails, this one ends, and no other."""
        try:
            what(watch)
        except BrokenPipeError:
            raise
        except TargetExited as error:
            self._target_ended(fd, error.message)
        except Exception as error:
            self.failures += 1
            explained = _explained(watch.target, error)
            self._emit(Failure(time.time(), watch.target.pid, explained.message, explained.hint))
            self._target_ended(fd, f"process {watch.target.pid} is not watched any more")
            self._newcomers.forget(watch.target.pid)

    def _wait(self, timeout_s: float) -> None:
        """Sleep until something is due, a process ends, we are told to stop or nobody reads any more."""
        poller = select.poll()
        poller.register(self._stop.fd, select.POLLIN)
        for fd in self._watches:
            poller.register(fd, select.POLLIN)
        for fd in (*self._preparations.fds(), *(self._commands.fds if self._commands else ())):
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

    def _target_ended(self, fd: int, reason: str | None = None) -> None:
        watch = self._watches.pop(fd)
        os.close(fd)
        try:
            watch.ended(reason)
            self._refresh()
            self._last_counts(watch)
        finally:
            watch.close()
            self._forget_unused()

    def _last_counts(self, watch: Watch) -> None:
        try:
            watch.counts(final=True)
        except BrokenPipeError:
            raise
        except Exception as error:
            explained = _explained(watch.target, error)
            self._emit(Failure(time.time(), watch.target.pid, explained.message, explained.hint))

    def _forget_unused(self) -> None:
        """What was made for executables that no watched process runs any more."""
        used = {*(watch.executable for watch in self._watches.values()), *self._coming.values()}
        for executable in self._shared.keys() - used:
            self._shared.pop(executable).close()
        for executable in self._known.keys() - used:
            self._known.pop(executable).file.close()

    def _refresh(self) -> None:
        for programs in self._shared.values():
            programs.refresh()

    def _end(self) -> None:
        """Summaries, then nothing left attached whatever happens."""
        try:
            self._preparations.abandon()
            self._end_nudges()
            self._refresh()
            for watch in self._watches.values():
                with suppress(AioTraceError, OSError, ValueError):
                    watch.last_look()
                self._last_counts(watch)
        finally:
            if self._commands:
                self._commands.close()
            for programs in self._shared.values():
                programs.close()
            for fd, watch in self._watches.items():
                watch.close()
                os.close(fd)
            self._watches.clear()
            self._forget_unused()

    def _end_nudges(self) -> None:
        if self._nudger is not None:
            self._nudger.close()
            self._collect_nudges()
            self._nudger = None


class Newcomers:
    """Finds QEMUs that were not there before.

    What starts a QEMU is a process of another name first, mostly not for long; those are looked at again, too, but
    not as often.
    """

    def __init__(self, known: Sequence[int]) -> None:
        """`known`: those that are traced from the start."""
        self._known = set(known)
        self._seen: dict[int, int] = {}  # how often each pid was seen
        self._looks = 0

    def forget(self, pid: int) -> None:
        """It may be found once more, when all are looked at again."""
        self._known.discard(pid)

    def look(self) -> list[int]:
        """QEMUs since the last look."""
        pids = set(list_pids())
        self._looks += 1
        everybody = self._looks % EVERYBODY == 0
        self._known &= pids
        self._seen = {pid: self._seen.get(pid, 0) + 1 for pid in pids}
        young = sorted(pid for pid, times in self._seen.items() if (everybody or times <= 2) and pid not in self._known)
        found = [pid for pid in young if looks_like_qemu(pid)]
        self._known.update(found)
        return found


def crowded_executables(targets: Sequence[Target]) -> set[Identity]:
    """Executables that more than SHARED_FROM of the processes run, or say so: to share or not, no more, hangs on it."""
    count: Counter[Identity] = Counter()
    for target in targets:
        with suppress(OSError):
            count[identity_of(os.stat(target.image_path))] += 1
    return {executable for executable, times in count.items() if times > SHARED_FROM}


def understood(target: Target, file: Executable, only: str | None) -> tuple[Build, bool]:
    """What the file tells, and whether that is good for others that run it.

    By what the process has no say in; only where that does not tell, by its own debug files, for it alone.
    """
    name = f"process {target.pid} ({target.exe})"
    try:
        try:
            if not only:
                return kept.read_build(file, name, host_place(target)), True
            with file.image() as image:
                return build_of(image, name, only, host_place(target)), True
        except SitesNotFound:
            with file.image() as image:
                return build_of(image, name, only, debug_place(target)), False
    except NotQemu as error:
        error.hint = qemu_hint(target.pid)
        raise
    except OSError as error:
        raise ended(target.pid, error) from error


def _strange(pid: int, error: Exception) -> AioTraceError:
    return HostError(f"process {pid} cannot be looked at: {error or type(error).__name__}")


def _explained(target: Target, error: Exception) -> AioTraceError:
    """The error as people should read it: much fails in odd ways when the process ends meanwhile."""
    if not target.alive:
        return NoSuchProcess(f"process {target.pid} ended while it was looked at")
    if isinstance(error, SitesNotFound):
        error.hint = error.hint or f"aio-trace check --pid {target.pid}"
    if isinstance(error, OutOfBounds):
        return OutOfBounds(f"process {target.pid} is not watched: {error.message}", error.hint)
    return error if isinstance(error, AioTraceError) else _strange(target.pid, error)
