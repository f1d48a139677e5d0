"""QMP through libvirt, which holds the socket: the domain asked for by UUID, and proved to be this very process.

Knows: virsh, whose libvirt a QEMU may be, where libvirt writes down a domain's process, and what QEMU itself can tell
that no other process could. A name proves nothing: virsh takes one of digits for a number of its own, and another
libvirt (a container's, a user's) may have a domain of that name, or of that UUID. Does not know what is asked or why.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tracer.errors import CommandRefused, MonitorDead, MonitorError, ToolMissing, pasted
from tracer.qmp import TIMEOUT_S, force_hint, short, virsh_line
from tracer.records import dataclass
from tracer.target import Target, inner_numbers, open_regular
from tracer.text import printable

SYSTEM, SESSION = "qemu:///system", "qemu:///session"
#: The numbers that distributions give to people; daemons and containers have others.
PEOPLE = range(1000, 60_001)
#: What libvirt says while an earlier command of its own is not answered.
LOCKED = "cannot acquire state change lock"

TAINT = (
    "libvirt marks a domain whose monitor is used so as tainted (custom-monitor), in its log and in\n"
    "  virsh dominfo, until it is shut off; nothing else comes of it"
)
#: Asked of QEMU, since nobody else has these threads and this address.
QUESTIONS = "query-cpus-fast, gpa2hva 0"
WHY_PROOF = "two questions, which change nothing: whether what answers is this very process"


@dataclass(frozen=True)
class Place:
    """A libvirt: its URI, and where it is a user's own, that user and their folders."""

    uri: str
    uid: int | None = None
    environment: Mapping[str, str] | None = None
    runtime: str | None = None  # the folder below which the pid files of its domains are

    def pid_file(self, name: str) -> str | None:
        """Where it writes down the process of the domain of that name; None where that is not known."""
        return f"{self.runtime}/{name}.pid" if self.runtime and "/" not in name else None


class VirshMonitor:
    """QMP through virsh; its --hmp form is for people. `say` gets what is asked before it is asked."""

    def __init__(
        self,
        target: Target,
        domain: str | None,
        connect: str | None,
        say: Callable[[str], None],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._target = target
        self._program = _virsh()
        self._name, self._uuid = _identity(target)
        #: What QEMU was asked until now.
        self.asked: list[str] = []
        self._place = self._found(connect)
        if domain is not None:
            self._check_domain(domain)
        self._prove(say)

    # -- which one ----------------------------------------------------------------------------------

    def _found(self, connect: str | None) -> Place:
        """The libvirt that has a domain of the process's UUID. Raises MonitorError."""
        why: list[str] = []
        for place in _places(self._target, connect):
            done = self._virsh(place, "domname", self._uuid)
            if not done.returncode and done.stdout.strip("\n") == self._name:
                return place
            answer = _why(done) if done.returncode else f"its domain {self._uuid} is called {done.stdout.strip()}"
            why.append(f"{place.uri}: {short(answer)}")
        raise MonitorError(
            f"virsh failed: libvirt knows no domain {self._name} with the UUID {self._uuid} ({'; '.join(why)})",
            self._connect_hint(),
        )

    def _connect_hint(self) -> str:
        line = f"sudo aio-trace nudge --pid {self._target.pid} --via virsh --connect URI"
        return f"{line}    # of the libvirt that started it"

    def _check_domain(self, domain: str) -> None:
        """Raise MonitorError unless the user's word is the name, the UUID or libvirt's number of it."""
        if domain == self._name or domain.lower() == self._uuid:
            return
        done = self._virsh(self._place, "domid", self._uuid)
        if domain.isdigit() and done.stdout.strip() == domain:
            return
        what = f"process {self._target.pid} is domain {self._name} ({self._uuid}), not {domain}; nothing was sent"
        raise MonitorError(what, f"--domain {pasted(self._name)}")

    def _prove(self, say: Callable[[str], None]) -> None:
        """Raise MonitorError unless something tells that the domain is the process, and nothing tells otherwise."""
        written = self._written_pid()
        if written is not None and written not in inner_numbers(self._target.pid):
            raise self._another(f"is process {written}", "nothing was sent")
        say(f"through libvirt at {self._place.uri}: domain {printable(self._name)}, UUID {self._uuid}\n  {TAINT}")
        say(f"sending: {QUESTIONS}\n  {WHY_PROOF}")
        proofs = (self._has_threads(), self._has_memory())
        if False in proofs:
            raise self._another("is another process", f"nothing was sent but {QUESTIONS}")
        if written is None and True not in proofs:
            raise MonitorError(
                f"whether libvirt's domain {self._name} is process {self._target.pid} could not be found out; nothing "
                f"was sent but {QUESTIONS}",
                force_hint(self._target),
            )

    def _another(self, what: str, sent: str) -> MonitorError:
        return MonitorError(
            f"the domain {self._name} ({self._uuid}) of the libvirt at {self._place.uri} {what}, not "
            f"{self._target.pid}; {sent}",
            self._connect_hint(),
        )

    def _written_pid(self) -> int | None:
        """What stands in libvirt's own file; None where there is none to be read."""
        path = self._place.pid_file(self._name)
        with suppress(OSError, ValueError):
            fd = open_regular(path) if path else None
            if fd is not None:
                with open(fd, "rb") as file:
                    return int(file.read(32))
        return None

    def _has_threads(self) -> bool | None:
        """Whether the virtual processors' threads are this process's; None where QEMU does not tell."""
        with suppress(CommandRefused):
            cpus = self._ask("query-cpus-fast")
            tids = {cpu.get("thread-id") for cpu in cpus if isinstance(cpu, dict)} if isinstance(cpus, list) else set()
            own = {inner_numbers(self._target.pid, tid)[-1] for tid in self._target.tids()}
            return tids <= own if tids else None
        return None

    def _has_memory(self) -> bool | None:
        """Whether the guest's address 0 is where this process has a mapping; None where QEMU does not tell."""
        with suppress(CommandRefused):
            answer = self._ask("human-monitor-command", {"command-line": "gpa2hva 0"}, "gpa2hva 0")
            found = re.search(r" is (0x[0-9a-f]{1,16})\s*$", str(answer))
            if found:
                address = int(found[1], 16)
                return any(region.start <= address < region.end for region in self._target.regions())
        return None

    def _ask(self, command: str, arguments: Mapping[str, object] | None = None, line: str | None = None) -> Any:
        self.asked.append(line or command)
        return self.execute(command, arguments)

    # -- asked --------------------------------------------------------------------------------------

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the command returns. Raises CommandRefused, MonitorDead (time is over) or MonitorError."""
        message = {"execute": command} | ({"arguments": dict(arguments)} if arguments else {})
        answer = self._answer(command, json.dumps(message))
        if "error" in answer:
            error = answer["error"]
            why = error.get("desc") if isinstance(error, dict) else error
            raise CommandRefused(f"the monitor refused {command}: {short(why)}")
        return answer.get("return")

    def _answer(self, command: str, message: str) -> dict[str, Any]:
        done = self._virsh(self._place, "qemu-monitor-command", self._uuid, message)
        if done.returncode:
            raise MonitorError(f"virsh failed: {_why(done)}", f"virsh -c {self._place.uri} domstate {self._uuid}")
        try:
            answer = json.loads(done.stdout)
        except (ValueError, RecursionError) as error:
            raise MonitorError(f"virsh answered {command} with what is no JSON: {_shown(done.stdout)}") from error
        if not isinstance(answer, dict):
            raise MonitorError(f"virsh answered {command} with what is no answer of QMP: {_shown(done.stdout)}")
        return answer

    def _virsh(self, place: Place, *words: str) -> subprocess.CompletedProcess[str]:
        """What virsh did. Raises MonitorDead or MonitorError."""
        try:
            done = subprocess.run(
                [self._program, "-c", place.uri, *words],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._timeout_s,
                check=False,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "LC_ALL": "C.UTF-8", **(place.environment or {})},
                **_as_user(place.uid),
            )
        except subprocess.TimeoutExpired as error:
            what = f"virsh did not answer {words[0]} within {self._timeout_s:g} s"
            raise MonitorDead(what, force_hint(self._target)) from error
        except OSError as error:
            raise MonitorError(f"virsh cannot be run: {error.strerror}") from error
        if done.returncode and LOCKED in done.stderr:
            what = f"libvirt waits for an earlier command on this domain and takes no other ({_why(done)})"
            raise MonitorDead(what, force_hint(self._target))
        return done

    def spelled(self, line: str) -> str:
        """The virsh line."""
        return virsh_line(self._uuid, line, self._place.uri)

    def close(self) -> None:
        """Nothing is held."""


def _virsh() -> str:
    program = shutil.which("virsh")
    if program is None:
        raise ToolMissing("virsh is not installed", "apt install libvirt-clients")
    return program


def _identity(target: Target) -> tuple[str, str]:
    """(name, UUID) that libvirt gave to the process, by its command line. Raises MonitorError."""
    name, uuid = target.domain, target.uuid
    if name is None or uuid is None:
        missing = "-name guest=" if name is None else "-uuid"
        raise MonitorError(f"process {target.pid} was not started by libvirt: its command line has no {missing}")
    return name, uuid


# Whose libvirt


def _places(target: Target, connect: str | None) -> Sequence[Place]:
    """The libvirts that may have started the process, the likeliest first."""
    system = Place(SYSTEM, runtime="/run/libvirt/qemu")
    session = _session(target.uid)
    if connect is None:
        return [session, system] if session else [system]
    if connect == SESSION and session:
        return [session]
    return [system if connect == SYSTEM else Place(connect)]


def _session(uid: int) -> Place | None:
    """The libvirt of that user's own session, if one runs; virsh would start one otherwise."""
    if uid not in PEOPLE and not (uid and uid == os.getuid()):
        return None
    try:
        home = pwd.getpwuid(uid).pw_dir
    except KeyError:
        return None
    for runtime, given in ((f"/run/user/{uid}", True), (f"{home}/.cache", False)):
        names = ("libvirt-sock", "virtqemud-sock")
        if any(os.path.lexists(f"{runtime}/libvirt/{name}") for name in names):
            environment = {"HOME": home, "XDG_CACHE_HOME": f"{home}/.cache", "XDG_CONFIG_HOME": f"{home}/.config"}
            environment["XDG_RUNTIME_DIR"] = runtime if given else ""
            return Place(SESSION, uid, environment, f"{runtime}/libvirt/qemu/run")
    return None


def _as_user(uid: int | None) -> dict[str, Any]:
    """How to start a program as that user; a session's libvirt serves nobody else."""
    if uid is None or uid == os.geteuid():
        return {}
    return {"user": uid, "group": pwd.getpwuid(uid).pw_gid, "extra_groups": []}


# What it says


def _why(done: subprocess.CompletedProcess[str]) -> str:
    return short(done.stderr) if done.stderr.strip() else _ending(done.returncode)


def _ending(status: int) -> str:
    """How a program ended that said nothing."""
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _shown(answer: str) -> str:
    return short(answer) if answer.strip() else "nothing"
