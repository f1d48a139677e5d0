"""Freeing lost completions: by one harmless monitor command, or by one call inside QEMU.

Knows: what to send or call, why that is harmless, how to see whether it worked. Does not know options,
formats or how the monitor is spoken to. Everything begins with a survey; where that does not show a lost
completion, nothing is sent and nothing called.
"""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from tracer import audit, inject, qcow2
from tracer.build import Build, load
from tracer.errors import AioTraceError, CommandRefused, InjectionRefused, MonitorError, NudgeRefused
from tracer.events import Nudged
from tracer.live import LiveView
from tracer.looking import Looker
from tracer.qmp import Monitor, force_hint
from tracer.records import dataclass
from tracer.survey import Stuck, Survey, still_stuck, survey
from tracer.target import Target
from tracer.verdict import LOOP_BLOCKED, LOOP_BUSY, LOST_KICK, LOST_WAKEUP, STOPPED, UNPOLLED_KICK

#: Not aligned to any sector: QEMU reads the sector around it into a buffer of its own, by the thread pool
#: also where aio=native or io_uring would take an aligned read past it. -q: nothing in QEMU's log.
READ = "aio_read -q {} 510"
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
WHY_NOT_FREED = (
    "not freed: no read came through. What was lost may be a qcow2 image's own metadata, for which all that uses the\n"
    "image waits. {} frees it."
)

HELP = {
    STOPPED: "kill -CONT {pid}, or end the debugger",
    LOOP_BLOCKED: "end what the loop waits for; see the explanation",
    LOOP_BUSY: "wait, or look where it spends its time: perf top -p {pid}",
    UNPOLLED_KICK: "nothing from outside; save what the guest has, then restart it",
}


@dataclass(frozen=True)
class Drive:
    """A disk as query-block tells it: how qemu-io addresses it, and the files behind it."""

    argument: str
    files: tuple[str, ...]  # its own first, then those of its backing chain
    format: str | None = None


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

    def close(self) -> None:
        """Give the process's memory back."""
        self._view.close()

    def survey(self) -> Survey:
        """What there is, by two groups of looks."""
        return survey(self._view, self._loaded, self._looker)

    def diagnose(self) -> Survey:
        """As survey(); NudgeRefused where it shows no lost completion."""
        seen = self.survey()
        if not seen.curable:
            raise _refusal(seen, self.target)
        return seen

    # -- by monitor ---------------------------------------------------------------------------------

    def by_monitor(self, seen: Survey, monitor: Monitor) -> list[Nudged]:
        """Free what `seen` shows through the monitor; one event a request.

        Raises MonitorError where the monitor fails before anything could help.
        """
        sent = ["query-status"]
        try:
            self._ask(seen, monitor, sent)
        except AioTraceError as error:
            error.hint = error.hint or force_hint(self.target)
            self._tell(seen, "; ".join(sent))
            raise
        return self._tell(seen, "; ".join(sent))

    def _ask(self, seen: Survey, monitor: Monitor, sent: list[str]) -> None:
        self._announce("query-status, query-block", WHY_QUESTIONS)
        monitor.execute("query-status")
        kicked = [each for each in seen.curable if each.verdict.cause == LOST_KICK]
        self._gone(kicked, KICK_PATIENCE_S)
        drives = drives_of(monitor.execute("query-block"))
        for stuck in _one_a_pool(seen.curable):
            if not self._still(stuck):
                continue
            if stuck.verdict.cause == LOST_KICK:
                self._ring(stuck, monitor, sent)
            self._read(stuck, drives, monitor, sent)

    def _announce(self, line: str, why: str) -> None:
        """What will be sent, in one line that can be pasted, and why it is harmless."""
        self._say(f"sending: {line}\n" + textwrap.indent(textwrap.fill(why, WIDTH), "  "))

    def _ring(self, stuck: Stuck, monitor: Monitor, sent: list[str]) -> None:
        """Wake an iothread: setting its polling time to what it is rings its eventfd, and no more."""
        home = stuck.finding.facts.home_tid
        inner = inner_tid(self.target, home) if home else None
        with suppress(CommandRefused):
            for iothread in monitor.execute("query-iothreads"):
                if iothread["thread-id"] != inner:
                    continue
                where = {"path": f"/objects/{iothread['id']}", "property": "poll-max-ns"}
                value = iothread["poll-max-ns"]
                line = f"qom-set {where['path']} poll-max-ns {value}"
                self._announce(line, WHY_RING)
                sent.append(line)
                monitor.execute("qom-set", where | {"value": value})
        self._gone([stuck], KICK_PATIENCE_S)

    def _read(self, stuck: Stuck, drives: Sequence[Drive], monitor: Monitor, sent: list[str]) -> None:
        if not self._still(stuck):
            return
        self._check_reach(stuck)
        chosen = self._behind(stuck, drives)
        if not chosen:
            raise MonitorError("the monitor knows no disk that could be read", force_hint(self.target))
        refused = None
        for drive in chosen:
            line = f'qemu-io {drive.argument} "{READ.format(self._offset(drive))}"'
            self._announce(monitor.spelled(line), WHY_READ)
            sent.append(line)
            refused = self._send(monitor, line)
            if self._gone([stuck], 0 if refused else self._settings.patience_s):
                return
        if refused is not None:
            raise refused
        self._say(WHY_NOT_FREED.format(force_hint(self.target)))

    def _send(self, monitor: Monitor, line: str) -> CommandRefused | None:
        """What the human monitor has to say against it, or None."""
        try:
            answer = str(monitor.execute("human-monitor-command", {"command-line": line})).strip()
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
        """All drives, those on the lost request's own file first.

        The others are for a lost write of a qcow2 image's metadata: the image is locked meanwhile, and a read of
        it waits, too. Their pool may be another one; then their reads are harmless and of no use.
        """
        identity = _identity(f"/proc/{self.target.pid}/fd/{stuck.finding.operation.fd}")

        def is_another(drive: Drive) -> bool:
            return identity is None or all(_identity(self._path(file)) != identity for file in drive.files)

        return sorted(drives, key=is_another)

    def _offset(self, drive: Drive) -> int:
        """Where the drive has data: for what a qcow2 image does not hold, QEMU asks no pool."""
        if drive.format == "qcow2":
            return (qcow2.first_data(self._path(drive.files[0])) or 0) + 1 if drive.files else 1
        return 1

    def _path(self, file: str) -> str:
        """A file of the process as seen from here; it may be in a container."""
        folder = "root" if file.startswith("/") else "cwd"
        return f"/proc/{self.target.pid}/{folder}/{file.lstrip('/')}"

    # -- by force -----------------------------------------------------------------------------------

    def plan_force(self, seen: Survey) -> str:
        """What force() will do, for the person who has to say yes. Raises InjectionRefused."""
        inject.check_machine(self.target)
        function = self._schedule()
        lines = []
        for stuck in _forceable(seen, self.target):
            home = stuck.finding.facts
            lines.append(
                f"call qemu_bh_schedule({stuck.pool.bottom_half:#x}) at {function:#x} in thread {home.home_tid} "
                f"({home.home_name}), for pool {stuck.pool.address:#x}"
            )
        return (
            f"--force will, in process {self.target.pid} ({self.target.exe}):\n  "
            + "\n  ".join(lines)
            + "\nThat is the call which QEMU's worker should have made. The thread, asleep in its poll, stands still\n"
            "for some milliseconds meanwhile (usually less than one); all others go on. Everything is checked again\n"
            "while it stands still; if anything does not fit, nothing is called."
        )

    def force(self, seen: Survey) -> list[Nudged]:
        """Call qemu_bh_schedule on the completion bottom half of each pool with a lost completion.

        Raises InjectionRefused where not even one call could be made.
        """
        function = self._schedule()
        pauses: dict[int, float] = {}
        commands = []
        refused: InjectionRefused | None = None
        for stuck in _forceable(seen, self.target):
            try:
                pauses[stuck.pool.address] = self._call(stuck, function).seconds
                commands.append(f"qemu_bh_schedule({stuck.pool.bottom_half:#x})")
            except InjectionRefused as error:
                refused = error
        if refused is not None and not pauses:
            raise refused
        self._gone(seen.curable, self._settings.patience_s)
        return self._tell(seen, "; ".join(commands), pauses)

    def _schedule(self) -> int:
        """qemu_bh_schedule in the process, its code the same as in the file that was understood."""
        address = self._build.located.functions.get("qemu_bh_schedule")
        if address is None:
            raise InjectionRefused("qemu_bh_schedule was not found in this build")
        return address + self.target.entry_address() - self._build.entry

    def _call(self, stuck: Stuck, function: int) -> inject.Pause:
        home = stuck.finding.facts.home_tid
        if home is None:
            raise InjectionRefused("the thread that runs the pool's context was not found")
        call = inject.Call(function, stuck.pool.bottom_half)
        return inject.call_in_thread(self.target, self._memory, home, call, lambda: self._check(stuck))

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

    def _still(self, stuck: Stuck) -> bool:
        return still_stuck(self._reader, stuck.pool, stuck.request)

    def _gone(self, all_stuck: Sequence[Stuck], patience_s: float) -> bool:
        """Whether they all went on within that time; returns as soon as they have."""
        end = time.monotonic() + patience_s
        while any(self._still(stuck) for stuck in all_stuck):
            if time.monotonic() >= end:
                return False
            time.sleep(0.002)
        return True

    def _tell(self, seen: Survey, command: str, pauses: dict[int, float] | None = None) -> list[Nudged]:
        """One event a request, each with its audit line."""
        events = []
        for stuck in seen.curable:
            freed = not self._still(stuck)
            pause = (pauses or {}).get(stuck.pool.address)
            event = Nudged(
                time.time(),
                self.target.pid,
                stuck.request.address,
                stuck.pool.address,
                stuck.verdict.cause,
                command,
                freed,
                None if pause is None else pause * 1000,
            )
            after = "gone" if freed else stuck.verdict.cause
            line = (
                f"nudge pid={self.target.pid} exe={self.target.exe} request={event.request:#x} "
                f"command='{command}' before={event.cause} after={after} freed={'yes' if freed else 'no'}"
            )
            if not audit.write(line):
                self._say(f"no system log listens on this host; the audit line is: {line} by={audit.who()}")
            events.append(event)
        return events


def _one_a_pool(curable: Sequence[Stuck]) -> Iterator[Stuck]:
    seen: set[int] = set()
    for stuck in curable:
        if stuck.pool.address not in seen:
            seen.add(stuck.pool.address)
            yield stuck


def _forceable(seen: Survey, target: Target) -> list[Stuck]:
    """One request of each pool that --force is for."""
    lost = [stuck for stuck in seen.curable if stuck.verdict.cause == LOST_WAKEUP]
    if not lost:
        raise InjectionRefused(
            "--force is for lost-wakeup only; a lost-kick needs no more than a question at the monitor",
            f"sudo aio-trace nudge --pid {target.pid} --qmp SOCKET",
        )
    return list(_one_a_pool(lost))


def _refusal(seen: Survey, target: Target) -> NudgeRefused:
    """Why a nudge is not for this, and what would help instead."""
    pid = target.pid
    if seen.stopped:
        return NudgeRefused("The QEMU process is stopped; nothing was sent.", HELP[STOPPED].format(pid=pid))
    if seen.stuck:
        verdict: Any = seen.stuck[0].verdict
        hint = HELP.get(verdict.cause, f"sudo aio-trace --pid {pid}").format(pid=pid)
        return NudgeRefused(
            f"The verdict is {verdict.cause}, which a nudge does not cure; nothing was sent. {verdict.explanation}",
            hint,
        )
    if seen.waiting:
        what = "1 request is" if seen.waiting == 1 else f"{seen.waiting} requests are"
        return NudgeRefused(
            f"There is nothing to free, and nothing was sent: no finished request waits for its callback; {what} "
            f"with the storage.",
            f"sudo aio-trace --pid {pid}",
        )
    return NudgeRefused(
        "There is nothing to free, and nothing was sent: no request is finished and waits for its callback.",
        f"sudo aio-trace --pid {pid}",
    )


# What the monitor tells


def drives_of(answer: Any) -> list[Drive]:
    """The disks of query-block's answer that qemu-io can read without making and draining a backend of its own.

    That is why none is addressed by its node name. A disk of -blockdev has no name but its device's path.
    """
    drives = []
    for entry in answer or ():
        inserted = entry.get("inserted")
        if not inserted:
            continue
        if entry.get("device"):
            argument = str(entry["device"])
        elif entry.get("qdev"):
            argument = f"-d {entry['qdev']}"
        else:
            continue
        files = tuple(_files(inserted.get("image") or {}, inserted.get("file")))
        drives.append(Drive(argument, files, inserted.get("drv")))
    return drives


def _files(image: dict[str, Any], file: object) -> Iterator[str]:
    """The file of a disk and those of its backing chain."""
    if isinstance(file, str):
        yield file
    while image:
        if isinstance(image.get("filename"), str):
            yield image["filename"]
        image = image.get("backing-image") or {}


def _identity(path: str) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def _version(text: str | None) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


def inner_tid(target: Target, tid: int) -> int:
    """A thread's id as the process itself sees it, in its container."""
    with suppress(OSError), open(f"/proc/{target.pid}/task/{tid}/status", encoding="utf-8") as file:
        found = re.search(r"^NSpid:.*?(\d+)$", file.read(), re.M)
        return int(found[1]) if found else tid
    return tid
