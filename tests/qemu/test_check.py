"""`check` and the main job agree: wherever one says ready, the other attaches; where not, both name the reason.

Each case takes something away from the command: capabilities, locked memory, /sys, processes. Of Yama and lockdown,
which not every kernel has, tests/unit/test_rights.py has the words.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.test_bad_weather import NOBODY, PATIENCE_S, assert_calm
from tracer.lab.qemu import STORAGE_DAEMON

ROOT = Path(__file__).resolve().parents[2]
#: The command with something else put in its place.
CHANGED = "import sys; sys.path.insert(0, {root!r}); from tracer import kernel, trial; {change}; import cli; cli.main()"
AS_PERF = CHANGED.format(root=str(ROOT), change="kernel.has_multi = lambda: False")
REFUSED = CHANGED.format(root=str(ROOT), change="trial._counting = lambda _: bytes([0x95]) + bytes(7)")


def without(capabilities: str) -> tuple[str, ...]:
    return ("setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}", "--no-new-privs")


def in_mounts(change: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-c", f'{change}; exec "$@"', "sh")


@dataclass(frozen=True)
class Case:
    """What is put before the command; what the needs are then, by name; and what the main job's message says."""

    wrapper: tuple[str, ...] = ()
    answers: tuple[tuple[str, bool | None], ...] = ()
    message: str = ""  # empty: it attaches
    perf: bool = False  # as on kernels without uprobe_multi


ATTACH = "-sys_admin,-bpf,-perfmon"
READ = "-dac_read_search,-dac_override"
FEW = "-all,+bpf,+perfmon,+sys_ptrace,+dac_read_search"
NO_SYS, NO_PMU = "umount -l /sys", "mount -t tmpfs none /sys/bus/event_source/devices"
CASES = {
    "root": Case(),
    "four capabilities": Case(without(FEW), (("root", True), ("target memory", True))),
    "little locked memory": Case(("prlimit", "--memlock=65536")),
    "perf events": Case(perf=True),
    "no capability to attach": Case(
        without(ATTACH), (("root", False), ("bpf", None), ("uprobes", None), ("programs", None)), "CAP_BPF"
    ),
    "no capability to read": Case(
        without(READ), (("bpf", True), ("uprobes", True), ("target memory", False)), "CAP_DAC_READ_SEARCH"
    ),
    "no capability to look": Case(without("-sys_ptrace"), (), "CAP_SYS_PTRACE"),
    "a user namespace": Case(("unshare", "--user", "--map-root-user"), (), "user namespace"),
    "a container's processes": Case(("unshare", "--pid", "--fork", "--mount-proc"), (), "in this container"),
    "no /sys": Case(in_mounts(NO_SYS), (("bpf", True), ("uprobes", False)), "/sys is not mounted", perf=True),
    "no uprobes": Case(in_mounts(NO_PMU), (("bpf", True), ("uprobes", False)), "no uprobes", perf=True),
    "not root": Case(
        ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
        (("root", False), ("bpf", None), ("uprobes", None), ("ptrace", None), ("target memory", True)),
        "needs root",
    ),
}


@pytest.fixture(scope="module")
def of_nobody(qemu_host: None) -> Iterator[int]:
    """A QEMU of another user than root, as libvirt's are."""
    with subprocess.Popen([STORAGE_DAEMON], user=NOBODY, group=NOBODY, extra_groups=[]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def run(case: Case, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = ["-c", AS_PERF] if case.perf else [str(ROOT / "cli.py")]
    done = subprocess.run(
        [*case.wrapper, sys.executable, *program, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert_calm(done.stderr)
    return done


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_check_and_the_main_job_agree(of_nobody: int, case: Case) -> None:
    checked = run(case, "check", "--pid", str(of_nobody), "--json")
    found: dict[str, Any] = json.loads(checked.stdout.splitlines()[0])
    traced = run(case, "--pid", str(of_nobody), "--duration", "100ms")
    needs = {need["need"]: need for need in found.get("host", [])}
    assert {name: needs[name]["ok"] for name, _ in case.answers} == dict(case.answers)
    if case.message:
        assert (traced.returncode, found.get("ready", False)) == (1, False), traced.stderr
        assert case.message in traced.stderr
        told = [found.get("message", ""), *(need["detail"] for need in needs.values() if need["ok"] is not True)]
        assert any(case.message in each for each in told) or "root" in needs, told
    else:
        assert (traced.returncode, found["ready"]) == (0, True), traced.stderr
        assert all(need["ok"] is True for need in needs.values() if need["required"])


def test_without_sys_one_link_does(of_nobody: int) -> None:
    """Where the kernel has uprobe_multi, perf and so /sys are not needed; else the message says what is."""
    from tracer.kernel import has_multi

    case = Case(in_mounts(NO_SYS))
    traced = run(case, "--pid", str(of_nobody), "--duration", "100ms")
    (line,) = run(case, "check", "--pid", str(of_nobody), "--json").stdout.splitlines()
    assert (traced.returncode == 0) is json.loads(line)["ready"] is has_multi()


def test_the_verifiers_words_are_shown(of_nobody: int) -> None:
    """A program that leaves r0 unset is refused, in the verifier's words."""
    code = REFUSED.format(root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "-v", "--pid", str(of_nobody)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "not ready; missing: bpf; not proved: uprobes, programs" in done.stdout
    assert "  R0 !read_ok" in done.stdout.splitlines()
