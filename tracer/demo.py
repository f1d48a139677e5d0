"""The whole story on a small guest of our own: boot, trace, lose a completion, alert, nudge, go on.

Knows: the order of the story. Everything it does to a QEMU, it does to the lab's own throw-away one.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tracer.build import read_build
from tracer.errors import AioTraceError, LabError, MonitorDead
from tracer.events import Alert, Attached, Event, Nudged, Resolved
from tracer.lab.faults import lose_guest_io, stopping
from tracer.lab.guest import Guest, Workload, guest
from tracer.nudge import Nudge
from tracer.probes import check_host
from tracer.qmp import SocketMonitor
from tracer.session import Options, Session, Stop
from tracer.target import open_target
from tracer.watch import Settings

DEADLINE_S = 1.0
INTERVAL_S = 3.0
STANDSTILL_S = 3.0
PATIENCE_S = 120.0
JOIN_S = 20.0
STEPS = 6
DRAIN_STEPS = 3


@contextmanager
def private_folder() -> Iterator[None]:
    """Temporary files go into a folder of their own meanwhile: an interruption at any moment leaves none."""
    before = tempfile.tempdir
    folder = tempfile.mkdtemp(prefix="demo-")
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


class Demo:
    """One performance. `emit` gets the tracer's events, `progress` what people read in between."""

    def __init__(self, emit: Callable[[Event], None], progress: Callable[[str], None], drain: bool = False) -> None:
        self._drain = drain
        self._emit = emit
        self._progress = progress
        # Not a Queue, whose lock stays taken for ever when a signal handler raises at the wrong moment.
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._step = 0

    def run(self) -> None:
        """The whole story; LabError where it does not go as it should. Leaves nothing behind."""
        check_host()
        self._say("booting a small Linux guest in an emulated QEMU; it writes to its disk all the time")
        with private_folder(), guest(Workload(mix=("write", "flush"), pause=0.02)) as machine:
            self._progress(f"  QEMU is process {machine.pid}; its guest has finished {machine.progress()} writes")
            self._say(f"what an operator types:  sudo aio-trace --pid {machine.pid}")
            with self._traced(machine):
                self._expect(Attached)
                self._healthy(machine)
                self._lose(machine)
                if self._drain:
                    self._lose_and_drain(machine)
        self._progress("")
        self._progress("That is all. The guest is gone, nothing is left behind. On a hypervisor of yours:")
        self._progress("  sudo aio-trace --pid PID")

    def _say(self, text: str) -> None:
        self._step += 1
        self._progress(f"\n[{self._step}/{STEPS + DRAIN_STEPS * self._drain}] {text}")

    @contextmanager
    def _traced(self, machine: Guest) -> Iterator[None]:
        stop = Stop()
        options = Options(Settings(deadline_s=DEADLINE_S), interval_s=INTERVAL_S)
        session = Session([machine.pid], options, self._on_event, stop)
        thread = threading.Thread(target=self._trace, args=(session,), name="aio-trace", daemon=True)
        try:
            thread.start()
            yield
        finally:
            stop.request()
            if thread.ident is not None:
                thread.join(JOIN_S)
            if thread.is_alive():
                raise LabError(f"the trace has not ended {JOIN_S:.0f} s after it was told to; it is left behind")

    def _trace(self, session: Session) -> None:
        try:
            session.run(time.monotonic())
        except BaseException as error:
            self._events.put(error)

    def _on_event(self, event: Event) -> None:
        self._emit(event)
        self._events.put(event)

    def _expect(self, kind: type[Event]) -> Event:
        """The next event of that kind; raises what ended the trace instead."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                event = self._events.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty as error:
                raise LabError(f"no {kind.__name__.lower()} event came within {PATIENCE_S:.0f} s") from error
            if isinstance(event, AioTraceError):
                raise event
            if isinstance(event, BaseException):
                raise LabError(f"the trace ended: {event!r}")
            if isinstance(event, kind):
                return event

    def _healthy(self, machine: Guest) -> None:
        self._say("a healthy disk: every request comes back within milliseconds, no alert")
        machine.wait_progress(50)
        time.sleep(INTERVAL_S)

    def _lose(self, machine: Guest) -> None:
        self._say("now QEMU loses one completion, as the builds with the bug do")
        lose_guest_io(machine)
        alert = self._expect(Alert)
        self._say("the guest's disk stands still; the storage, the host and QEMU's monitor are fine")
        self._stands_still(machine)
        self._say(f"what an operator types:  sudo aio-trace nudge --pid {machine.pid} --qmp {machine.spare_monitor}")
        with self._nudge(machine) as nudge:
            seen = nudge.diagnose()
            monitor = SocketMonitor(nudge.target, str(machine.spare_monitor))
            try:
                self._told(nudge.by_monitor(seen, monitor))
            finally:
                monitor.close()
        self._goes_on(machine)
        if not isinstance(alert, Alert) or alert.cause != "lost-wakeup":
            raise LabError(f"the alert's cause was {getattr(alert, 'cause', None)}, not lost-wakeup")

    def _goes_on(self, machine: Guest) -> None:
        self._expect(Resolved)
        before = machine.progress()
        after = machine.wait_progress(20)
        self._progress(f"  the guest goes on: {after - before} more writes, {after} in all, none failed")

    @contextmanager
    def _nudge(self, machine: Guest) -> Iterator[Nudge]:
        target = open_target(machine.pid)
        nudge = Nudge(target, read_build(target.image_path, target.exe), self._progress)
        try:
            yield nudge
        finally:
            nudge.close()

    def _told(self, events: Sequence[Nudged]) -> None:
        for event in events:
            self._emit(event)
        if not events or not all(event.freed for event in events):
            raise LabError("the nudge did not free it")

    def _lose_and_drain(self, machine: Guest) -> None:
        """The report's second symptom: somebody stops the VM, and the monitor dies in the drain."""
        self._say("QEMU loses another, and somebody stops the VM: that drains, and so hangs the monitor, too")
        lose_guest_io(machine)
        self._expect(Alert)
        with stopping(machine) as stop:
            self._say("what an operator types:  sudo aio-trace nudge … --force")
            with self._nudge(machine) as nudge:
                seen = nudge.diagnose()
                self._is_dead(machine, nudge)
                self._progress(nudge.plan_force(seen))
                self._told(nudge.force(seen))
            stop.wait()
        self._say("the drain is over, stop has stopped the VM, the monitor answers; cont, and")
        machine.qmp("cont")
        self._goes_on(machine)

    def _is_dead(self, machine: Guest, nudge: Nudge) -> None:
        try:
            SocketMonitor(nudge.target, str(machine.spare_monitor), timeout_s=2.0).close()
        except MonitorDead as error:
            self._progress(f"  {error.message}")
        else:
            raise LabError("the monitor answered in the middle of a drain")

    def _stands_still(self, machine: Guest) -> None:
        before = machine.progress()
        time.sleep(STANDSTILL_S)
        after = machine.progress()
        if after != before:
            raise LabError(f"the guest went on by itself: {after - before} writes in {STANDSTILL_S:.0f} s")
        self._progress(f"  {before} writes then, {after} writes {STANDSTILL_S:.0f} s later: it hangs")
