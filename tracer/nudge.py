"""Freeing lost completions: by one harmless monitor command, or by one call inside QEMU.

Knows: what to send or call, why that is harmless, how to see whether it worked. Does not know options,
formats or how the monitor is spoken to. Everything begins with a survey; where that does not show a lost
completion, nothing is sent and nothing called.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tracer import audit, inject, qcow2
from tracer.build import Build, load
from tracer.errors import (
    AioTraceError,
    CommandRefused,
    InjectionRefused,
    MonitorError,
    NothingLost,
    NudgeRefused,
    TargetExited,
)
from tracer.events import Nudged
from tracer.home import parked
from tracer.live import LiveView
from tracer.looking import Looker
from tracer.posix_aio import read_node
from tracer.qmp import Monitor, force_hint, monitor_hint
from tracer.records import dataclass
from tracer.survey import Stuck, Survey, still_stuck, survey, went_on
from tracer.target import Target, Thread, inner_numbers
from tracer.text import printable
from tracer.verdict import LOOP_BLOCKED, LOOP_BUSY, LOST_KICK, LOST_WAKEUP, STOPPED, UNPOLLED_KICK

#: Not aligned to any sector: QEMU reads the sector around it into a buffer of its own, by the thread pool
#: also where aio=native or io_uring would take an aligned read past it. -q: nothing in QEMU's log.
READ = "aio_read -q {} 510"
#: For QEMU up to 2.6, whose qemu-io takes whole sectors only, and says so where nobody reads it.
READ_SECTOR = "aio_read -q {} 512"
#: How long the first may take before the second is sent as well; seconds.
READ_PATIENCE_S = 1.0
#: How long a request may take to go on after something was done for it; seconds.
PATIENCE_S = 3.0
#: query-status cures a lost kick of the main loop at once, or not at all; seconds.
KICK_PATIENCE_S = 0.5
#: Since QEMU 8.2 the monitor's qemu-io runs in the main loop whatever thread serves the drive.
IN_CURRENT_CONTEXT = (8, 2)

WHY_QUESTIONS = (
    "two questions, which change nothing; they wake the main loop, which is all that a lost kick needs there"
)
WHY_RING = "sets the value that it has already; QEMU wakes the iothread, and no more"
WHY_READ = (
    "one read of less than a sector that QEMU throws away; it changes no data and waits for nothing. "
    "Its completion makes QEMU look through the pool's whole list, and so takes the lost one along"
)

WIDTH = 77
WHY_SECTOR = "the same of a whole sector: an old QEMU (up to 2.6) takes no other, and does not tell"
NOT_FREED = "not freed: the request waits still, and the monitor did not say why. {} frees it."
NOT_FREED_QCOW2 = (
    "not freed: no read came through. The file is a qcow2 image: what was lost may be its metadata, for which all\n"
    "that uses the image waits. {} frees it."
)

#: What an audit line calls a request that went on, and one whose process ended meanwhile.
GONE, EXITED = "gone", "exited"

HELP = {
    LOOP_BLOCKED: "end what the loop waits for; see the explanation",
    LOOP_BUSY: "wait, or look where it spends its time: perf top -p {pid}",
    UNPOLLED_KICK: "nothing from outside; save what the guest has, then restart it",
}


@dataclass(frozen=True)
class Drive:
    """A disk as query-blockstats tells it: how qemu-io addresses it, and its nodes, those of its backing chain too."""

    argument: str
    nodes: frozenset[str]


@dataclass(frozen=True)
class Outcome:
    """What came of it: an event for each request that something was done for, and why nothing helps the others."""

    events: tuple[Nudged, ...]
    failures: tuple[AioTraceError, ...]

    @property
    def freed(self) -> bool:
        """Whether every request went on."""
        return not self.failures and all(event.freed for event in self.events)

    def told(self, say: Callable[[str], None]) -> list[Nudged]:
        """The events, after the failures were said; where there is no event, the first failure is raised."""
        if self.failures and not self.events:
            raise self.failures[0]
        for failure in self.failures:
            say(failure.message)
        return list(self.events)


class _Talk:
    """A monitor that is asked, and what it was sent so far: noted before, since it may end in the midst of it."""

    def __init__(self, monitor: Monitor, sent: list[str]) -> None:
        self._monitor = monitor
        self._sent = sent

    def execute(self, command: str, arguments: Mapping[str, object] | None = None, line: str | None = None) -> Any:
        """As a Monitor does; `line` is how people know the command."""
        self._sent.append(line or command)
        return self._monitor.execute(command, arguments)

    def spelled(self, line: str) -> str:
        """As a Monitor does."""
        return self._monitor.spelled(line)


@dataclass(frozen=True)
class Settings:
    """How long to wait after each step; seconds."""

    patience_s: float = PATIENCE_S


class Nudge:
    """A nudge of one process. `say` gets what is about to be done and why, before it is done."""

    def __init__(
        self, target: Target, build: Build, say: Callable[[str], None], settings: Settings | None = None
    ) -> None:
        self.target = target
        self._build = build
        self._say = say
        self._settings = settings or Settings()
        self._view = LiveView(target)
        self._memory = self._view.memory
        self._loaded = load(self._view, build)
        self._reader = self._loaded.reader
        self._looker = Looker(self._view, self._loaded)
        #: Everything that was sent or called so far, as people know it.
        self.done: list[str] = []
        self._freed: list[Stuck] = []

    def close(self) -> None:
        """Give the process's memory back."""
        self._view.close()

    def survey(self) -> Survey:
        """What there is, by two groups of looks."""
        return survey(self._view, self._loaded, self._looker)

    def diagnose(self) -> Survey:
        """As survey(); NudgeRefused where it shows no lost completion, TargetExited where that is no wonder."""
        seen = self.survey()
        if not seen.curable:
            self.target.check_memory()
            raise _refusal(seen, self.target, "nothing was called" if self.done else "nothing was sent")
        return seen

    # -- by monitor ---------------------------------------------------------------------------------

    def by_monitor(self, seen: Survey, monitor: Monitor) -> list[Nudged]:
        """As try_monitor(); what failed is said, and raised where nothing was freed."""
        return self.try_monitor(seen, monitor).told(self._say)

    def try_monitor(self, seen: Survey, monitor: Monitor) -> Outcome:
        """Free what `seen` shows through the monitor, each pool by itself.

        Whatever ends it, what was sent until then is in the audit lines.
        """
        sent = list(monitor.asked)
        failed: dict[int, AioTraceError] = {}
        try:
            self._ask(seen, _Talk(monitor, sent), failed)
        except AioTraceError as error:
            for stuck in _one_a_pool(seen.curable):
                failed.setdefault(stuck.pool.address, error)
        finally:
            self.done += sent
            told = self._tell(seen, dict.fromkeys(_pools(seen), "; ".join(sent)))
        for failure in failed.values():
            failure.hint = failure.hint or force_hint(self.target)
        return self._outcome(told, failed)

    def _ask(self, seen: Survey, talk: _Talk, failed: dict[int, AioTraceError]) -> None:
        """Questions first, then for each pool what it needs; why a pool was refused goes to `failed`."""
        self._announce("query-status, query-blockstats", WHY_QUESTIONS)
        talk.execute("query-status")
        kicked = [each for each in seen.curable if each.verdict.cause == LOST_KICK]
        self._gone(kicked, KICK_PATIENCE_S)
        drives = drives_of(talk.execute("query-blockstats"))
        for stuck in _one_a_pool(seen.curable):
            if not self._still(stuck):
                continue
            try:
                if stuck.verdict.cause == LOST_KICK:
                    self._ring(stuck, talk)
                self._read(stuck, drives, talk)
            except (NudgeRefused, CommandRefused) as error:
                failed[stuck.pool.address] = error

    def _announce(self, line: str, why: str) -> None:
        """What will be sent, in one line that can be pasted, and why it is harmless."""
        self._say(f"sending: {printable(line)}\n" + textwrap.indent(textwrap.fill(why, WIDTH), "  "))

    def _ring(self, stuck: Stuck, talk: _Talk) -> None:
        """Wake an iothread: setting its polling time to what it is rings its eventfd, and no more."""
        home = stuck.finding.facts.home_tid
        inner = inner_numbers(self.target.pid, home)[-1] if home else None
        with suppress(CommandRefused):
            for iothread in _objects(talk.execute("query-iothreads")):
                if iothread.get("thread-id") != inner or not {"id", "poll-max-ns"} <= iothread.keys():
                    continue
                where = {"path": f"/objects/{iothread['id']}", "property": "poll-max-ns"}
                value = iothread["poll-max-ns"]
                line = f"qom-set {where['path']} poll-max-ns {value}"
                self._announce(line, WHY_RING)
                talk.execute("qom-set", where | {"value": value}, line)
        self._gone([stuck], KICK_PATIENCE_S)

    def _read(self, stuck: Stuck, drives: Sequence[Drive], talk: _Talk) -> None:
        if not self._still(stuck):
            return
        self._check_reach(stuck)
        chosen = self._behind(stuck, drives)
        if not chosen:
            raise NudgeRefused("the monitor knows no disk that could be read", force_hint(self.target))
        refused = None
        for drive in chosen:
            refused = self._read_drive(stuck, drive, talk)
            if not self._still(stuck):
                return
        if refused is not None:
            raise refused
        file = self._file(stuck)
        self._say((NOT_FREED_QCOW2 if file and qcow2.holds(file) else NOT_FREED).format(force_hint(self.target)))

    def _read_drive(self, stuck: Stuck, drive: Drive, talk: _Talk) -> CommandRefused | None:
        """Read from it until the request has gone on; what the monitor has to say against the last of the reads."""
        at = self._data_at(stuck, drive)
        refused = None
        for words, why, patience_s in (
            (READ.format(at + 1), WHY_READ, READ_PATIENCE_S),
            (READ_SECTOR.format(at), WHY_SECTOR, self._settings.patience_s),
        ):
            line = f'qemu-io {drive.argument} "{words}"'
            self._announce(talk.spelled(line), why)
            refused = self._send(talk, line)
            if self._gone([stuck], 0 if refused else patience_s):
                break
        return refused

    def _send(self, talk: _Talk, line: str) -> CommandRefused | None:
        """What the human monitor has to say against it, or None."""
        try:
            answer = str(talk.execute("human-monitor-command", {"command-line": line}, line)).strip()
        except CommandRefused as error:
            return error
        return CommandRefused(f"the monitor refused {line}: {answer}") if answer else None

    def _check_reach(self, stuck: Stuck) -> None:
        """Raise NudgeRefused where no harmless monitor command makes a request in that pool."""
        main = self._loaded.main_context
        if main in (None, stuck.pool.context) or _version(self._build.version) < IN_CURRENT_CONTEXT:
            return
        raise NudgeRefused(
            f"the request is in the pool of an iothread, and since QEMU 8.2 no harmless monitor command reaches "
            f"that (this is {self._build.version}); any new request of the guest on that disk frees it, and so does "
            f"--force",
            force_hint(self.target),
        )

    def _behind(self, stuck: Stuck, drives: Sequence[Drive]) -> list[Drive]:
        """All drives, those with the lost request's own node first.

        The others are for a lost write of a qcow2 image's metadata: the image is locked meanwhile, and a read of
        it waits, too. Their pool may be another one; then their reads are harmless and of no use.
        """
        return sorted(drives, key=lambda drive: not self._is_own(stuck, drive))

    def _is_own(self, stuck: Stuck, drive: Drive) -> bool:
        node = read_node(self._memory, stuck.request.arg)
        return node is not None and node.name in drive.nodes

    def _file(self, stuck: Stuck) -> str | None:
        """The lost request's file, by the process's own descriptor: no path that anybody names is opened."""
        fd = stuck.finding.operation.fd
        return None if fd is None else f"/proc/{self.target.pid}/fd/{fd}"

    def _data_at(self, stuck: Stuck, drive: Drive) -> int:
        """Where the drive has data: for what a qcow2 image does not hold, QEMU asks no pool."""
        file = self._file(stuck) if self._is_own(stuck, drive) else None
        return (qcow2.first_data(file) or 0) if file else 0

    # -- by force -----------------------------------------------------------------------------------

    def plan_force(self, seen: Survey) -> str:
        """What force() will do, for the person who has to say yes. Raises InjectionRefused."""
        inject.check_machine(self.target)
        function = self._schedule()
        lines = []
        refused: list[InjectionRefused] = []
        for stuck in _forceable(seen, self.target):
            try:
                thread = self._caller(stuck)
            except InjectionRefused as error:
                refused.append(error)
                continue
            lines.append(
                f"call qemu_bh_schedule({stuck.pool.bottom_half:#x}) at {function:#x} in thread {thread.tid} "
                f"({thread.name}), for pool {stuck.pool.address:#x}"
            )
        if not lines:
            raise refused[0]
        return (
            f"--force will, in process {self.target.pid} ({printable(self.target.exe)}):\n  "
            + "\n  ".join(lines)
            + "\nThat is the call which QEMU's worker should have made. The thread, asleep in its poll, stands still\n"
            "for some milliseconds meanwhile (usually less than one); all others go on. Everything is checked again\n"
            "while it stands still; if anything does not fit, nothing is called."
        )

    def force(self, seen: Survey) -> list[Nudged]:
        """As try_force(); what was refused is said, and raised where nothing was called."""
        return self.try_force(seen).told(self._say)

    def try_force(self, seen: Survey) -> Outcome:
        """Call qemu_bh_schedule on the completion bottom half of each pool with a lost completion.

        Whatever ends it, what was called until then is in the audit lines. Raises InjectionRefused where it is
        not for this.
        """
        function = self._schedule()
        pauses: dict[int, float] = {}
        calls: dict[int, str] = {}
        failed: dict[int, AioTraceError] = {}
        try:
            for stuck in _forceable(seen, self.target):
                self._force(stuck, function, calls, pauses, failed)
            self._gone([each for each in seen.curable if each.pool.address in calls], self._settings.patience_s)
        except TargetExited:
            pass  # each request's outcome tells
        finally:
            self.done += calls.values()
            told = self._tell(seen, calls, pauses)
        return self._outcome(told, failed)

    def _force(
        self,
        stuck: Stuck,
        function: int,
        calls: dict[int, str],
        pauses: dict[int, float],
        failed: dict[int, AioTraceError],
    ) -> None:
        """One pool's call, noted at the moment in which it is made: an interruption may come right after it."""
        pool = stuck.pool.address
        made = f"qemu_bh_schedule({stuck.pool.bottom_half:#x})"
        try:
            pauses[pool] = self._call(stuck, function, lambda: calls.update({pool: made})).seconds
        except AioTraceError as error:
            failed[pool] = error

    def _schedule(self) -> int:
        """qemu_bh_schedule in the process, its code the same as in the file that was understood."""
        address = self._build.located.functions.get("qemu_bh_schedule")
        if address is None:
            raise InjectionRefused(
                "there is no qemu_bh_schedule to be called in this build: its compiler put it into its callers",
                self._without_force(),
            )
        return address + self.target.entry_address() - self._build.entry

    def _without_force(self) -> str:
        """What frees a lost completion where nothing can be called: any new request in its pool."""
        return (
            f"sudo aio-trace nudge --pid {self.target.pid} --qmp SOCKET    # or any new request of the guest on that "
            f"disk; where the monitor hangs in a drain, only the end of the process is left"
        )

    def _call(self, stuck: Stuck, function: int, made: Callable[[], None]) -> inject.Pause:
        thread = self._caller(stuck)
        call = inject.Call(function, stuck.pool.bottom_half)
        return inject.call_in_thread(self.target, self._memory, thread.tid, call, lambda: self._check(stuck), made)

    def _caller(self, stuck: Stuck) -> Thread:
        """A thread asleep in a poll of the pool's context: its home thread, or who drains in its place.

        No other system call can be cut short so: glibc aborts where futex fails in the midst of a lock. Raises
        InjectionRefused.
        """
        thread = self._looker.home(stuck.pool.context)
        if thread is None:
            raise InjectionRefused("the thread that runs the pool's context was not found")
        if parked(thread) or thread.syscall is None:  # one that runs comes round to its poll
            return thread
        poller = self._looker.poller(stuck.pool.context, thread)
        if poller is None:
            raise InjectionRefused(
                f"nothing was called: thread {thread.tid} ({thread.name}) is in {thread.syscall.name}, where no call "
                f"can safely be made, and no other thread polls for the request"
            )
        return poller

    def _check(self, stuck: Stuck) -> None:
        """With the home thread held: nobody else runs or cancels the bottom half, so what is seen stays so.

        BH_PENDING alone is no reason against it: such a bottom half is queued already, and
        qemu_bh_schedule() marks it and wakes the loop. Raises InjectionRefused.
        """
        try:
            pool = self._reader.pool(stuck.pool.address)
            scheduled = self._reader.bottom_half(pool).scheduled
            held = still_stuck(self._reader, pool, stuck.request)
        except AioTraceError as error:
            raise InjectionRefused(f"nothing was called: {error.message}") from error
        if pool != stuck.pool or scheduled or not held:
            raise InjectionRefused("nothing was called: the request went on by itself in the last moment")

    # -- after --------------------------------------------------------------------------------------

    def look_again(self, seen: Survey, now: Survey | None) -> Outcome:
        """The requests of `seen` that went on after they were told of, as `now` shows; each gets another audit line."""
        still = {(stuck.pool.address, stuck.request.address) for stuck in now.curable} if now else set()
        left = [
            stuck
            for stuck in seen.curable
            if stuck not in self._freed and (stuck.pool.address, stuck.request.address) not in still
        ]
        told = self._tell(
            Survey(seen.pools, tuple(left), seen.waiting, seen.stopped),
            dict.fromkeys(_pools(seen), "; ".join(self.done)),
        )
        return self._outcome(told, {})

    def others(self, seen: Survey, told: Sequence[Nudged]) -> list[NudgeRefused]:
        """One for each pool of `seen` that nothing was done for, and whose request is stuck still."""
        known = {event.pool for event in told}
        rest: dict[int, Stuck] = {}
        for stuck in seen.stuck:
            if stuck.pool.address not in known and self._still(stuck):
                rest.setdefault(stuck.pool.address, stuck)
        return [_left(stuck, self.target) for stuck in rest.values()]

    def _still(self, stuck: Stuck) -> bool:
        """Whether it still waits, or memory does not tell. Raises TargetExited.

        What cannot be read any more did not go on: an ending process loses its memory first, then its number.
        So it counts as gone only if the process is whole after it was seen to be so.
        """
        if stuck in self._freed:
            return False
        gone = went_on(self._reader, stuck.pool, stuck.request)
        if gone is not False:
            self.target.check_memory()
        if gone:
            self._freed.append(stuck)
        return not gone

    def _gone(self, all_stuck: Sequence[Stuck], patience_s: float) -> bool:
        """Whether they all went on within that time; returns as soon as they have. Raises TargetExited."""
        end = time.monotonic() + patience_s
        while [stuck for stuck in all_stuck if self._still(stuck)]:
            if time.monotonic() >= end:
                return False
            time.sleep(0.002)
        return True

    def _after(self, stuck: Stuck) -> str:
        """How it is now, in the audit line's word."""
        try:
            return stuck.verdict.cause if self._still(stuck) else GONE
        except TargetExited:
            return EXITED

    def _tell(
        self, seen: Survey, commands: Mapping[int, str], pauses: Mapping[int, float] | None = None
    ) -> list[Nudged]:
        """One event with its audit line for each request in whose pool something was done, as `commands` says."""
        events = []
        for stuck in seen.curable:
            command = commands.get(stuck.pool.address)
            if not command:
                continue
            after = self._after(stuck)
            pause = (pauses or {}).get(stuck.pool.address)
            event = Nudged(
                time.time(),
                self.target.pid,
                stuck.request.address,
                stuck.pool.address,
                stuck.verdict.cause,
                command,
                after == GONE,
                None if pause is None else pause * 1000,
            )
            self._audit(event, after)
            events.append(event)
        return events

    def _audit(self, event: Nudged, after: str) -> None:
        line = audit.line(
            {
                "pid": str(event.pid),
                "exe": self.target.exe,
                "request": hex(event.request),
                "command": event.command,
                "before": event.cause,
                "after": after,
                "freed": "yes" if event.freed else "no",
            }
        )
        if not audit.write(line):
            self._say(f"no system log takes it on this host; the audit line is: {line}")

    def _outcome(self, told: Sequence[Nudged], failed: Mapping[int, AioTraceError]) -> Outcome:
        """What is worth an event: what went on, and what did not although nothing failed in its pool."""
        freed = {event.pool for event in told if event.freed} - {event.pool for event in told if not event.freed}
        failures = {id(error): error for pool, error in failed.items() if pool not in freed}
        if not all(event.freed for event in told) or failures:
            try:
                self.target.check_memory()
            except TargetExited as error:
                return Outcome(tuple(event for event in told if event.freed), (error,))
        return Outcome(tuple(e for e in told if e.freed or e.pool not in failed), tuple(failures.values()))


def _pools(seen: Survey) -> Iterator[int]:
    return (stuck.pool.address for stuck in seen.curable)


def _one_a_pool(curable: Sequence[Stuck]) -> Iterator[Stuck]:
    seen: set[int] = set()
    for stuck in curable:
        if stuck.pool.address not in seen:
            seen.add(stuck.pool.address)
            yield stuck


def _left(stuck: Stuck, target: Target) -> NudgeRefused:
    verdict = stuck.verdict
    if verdict.cause == LOST_KICK:
        hint = monitor_hint(target)
    else:
        hint = HELP.get(verdict.cause, f"sudo aio-trace inspect --pid {target.pid}").format(pid=target.pid)
    return NudgeRefused(
        f"request {stuck.request.address:#x} of another pool is stuck still, and nothing was done for it: "
        f"{verdict.cause}. {verdict.explanation}",
        hint,
    )


def _forceable(seen: Survey, target: Target) -> list[Stuck]:
    """One request of each pool that --force is for."""
    lost = [stuck for stuck in seen.curable if stuck.verdict.cause == LOST_WAKEUP]
    if not lost:
        raise InjectionRefused(
            "--force is for lost-wakeup only; a lost-kick needs no more than a question at the monitor",
            monitor_hint(target),
        )
    return list(_one_a_pool(lost))


def _refusal(seen: Survey, target: Target, nothing: str) -> NudgeRefused:
    """Why a nudge is not for this, and what would help instead; `nothing` is what was not done."""
    pid = target.pid
    if seen.stopped:
        return NudgeRefused(f"The QEMU process is stopped; {nothing}.", target.go_on_line())
    if seen.stuck:
        verdict: Any = seen.stuck[0].verdict
        hint = HELP.get(verdict.cause, f"sudo aio-trace --pid {pid}").format(pid=pid)
        if verdict.cause == STOPPED:
            hint = target.go_on_line()
        return NudgeRefused(
            f"The verdict is {verdict.cause}, which a nudge does not cure; {nothing}. {verdict.explanation}",
            hint,
        )
    if seen.waiting:
        what = "1 request is" if seen.waiting == 1 else f"{seen.waiting} requests are"
        return NothingLost(
            f"There is nothing to free, and {nothing}: no finished request waits for its callback; {what} "
            f"with the storage.",
            f"sudo aio-trace --pid {pid}",
        )
    return NothingLost(
        f"There is nothing to free, and {nothing}: no request is finished and waits for its callback.",
        f"sudo aio-trace --pid {pid}",
    )


# What the monitor tells


def drives_of(answer: Any) -> list[Drive]:
    """The disks of query-blockstats' answer that qemu-io can read without making and draining a backend of its own.

    That is why none is addressed by its node name. A disk of -blockdev has no name but its device's path.
    Raises MonitorError where that is no answer of QEMU.
    """
    if not isinstance(answer, list):
        raise MonitorError("the monitor answered query-blockstats with what is no list of disks")
    drives = []
    for entry in _objects(answer):
        if not isinstance(entry.get("parent"), dict) and not entry.get("node-name"):
            continue  # without a medium
        if entry.get("device"):
            argument = str(entry["device"])
        elif entry.get("qdev"):
            argument = f"-d {entry['qdev']}"
        else:
            continue
        drives.append(Drive(argument, frozenset(_nodes(entry))))
    return drives


def _objects(answer: Any) -> Iterator[dict[str, Any]]:
    """The members of a list that are what QMP says they are."""
    return (entry for entry in answer if isinstance(entry, dict)) if isinstance(answer, list) else iter(())


def _nodes(entry: dict[str, Any]) -> Iterator[str]:
    """The names of a disk's nodes, of its file and of its backing chain."""
    left = [entry]
    while left:
        node = left.pop()
        if isinstance(node.get("node-name"), str):
            yield node["node-name"]
        left += _objects([node.get("parent"), node.get("backing")])


def _version(text: str | None) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)
