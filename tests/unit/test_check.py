"""aio-trace check on files: what it tells, as JSON and for people, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tracer.check import CHEAP_US, DEAR_US, notes_on
from tracer.elf import Image
from tracer.known_bugs import BARRIERS
from tracer.sites import STRATEGIES, locate
from tracer.sites.model import SITE_NAMES, SUBMIT

ROOT = Path(__file__).resolve().parents[2]
QEMU = "/usr/bin/qemu-img"
FIELDS = {
    *("event", "time", "exe", "version", "build_id", "known_bugs", "barrier_fixed", "sites", "layout"),
    *("attempts", "host", "ready"),
}
WITHOUT_BCC = (
    "import sys; sys.path.insert(0, {root!r}); import cli; "
    "from tracer import compiler; compiler.pythons = list; cli.main()"
)


def check(*arguments: str, wrapper: tuple[str, ...] = (), code: str | None = None) -> subprocess.CompletedProcess[str]:
    program = [str(ROOT / "cli.py")] if code is None else ["-c", code]
    command = [*wrapper, sys.executable, *program, "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object of a check that found its sites."""
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture
def qemu() -> str:
    require(Path(QEMU).exists(), f"{QEMU} is not installed")
    return QEMU


@pytest.fixture
def without_pool(tmp_path: Path) -> str:
    """A program that prints a QEMU's version, with nothing of a thread pool in it."""
    require(shutil.which("gcc"), "gcc is not installed")
    source, program = tmp_path / "qemu.c", tmp_path / "qemu-kvm"
    source.write_text('#include <stdio.h>\nint main(void) { return puts("QEMU emulator version 2.1.2 (odd)") < 0; }\n')
    subprocess.run(["gcc", "-s", "-o", program, source], check=True)
    return str(program)


def test_everything_is_told(qemu: str) -> None:
    found = told(check("--exe", qemu, "--json"))
    assert found.keys() >= FIELDS
    assert "pid" not in found
    with Image.open(qemu) as image:
        assert (found["version"], found["build_id"]) == (image.qemu_version(), image.build_id)
    assert (found["event"], found["exe"], found["barrier_fixed"]) == ("check", qemu, True)
    assert {site["site"] for site in found["sites"]} == set(SITE_NAMES)
    for site in found["sites"]:
        assert site.keys() >= {"site", "address", "register", "instruction", "strategy", "cheap"}
        assert site["address"] == hex(int(site["address"], 16))
    assert any(a["ok"] for a in found["attempts"])
    assert BARRIERS not in {bug["commit"] for bug in found["known_bugs"]}
    needs = {need["need"]: need for need in found["host"]}
    assert needs.keys() >= {"root", "uprobes", "bpf", "bcc", "ptrace", "virsh", "programs"}
    assert found["ready"] is all(need["ok"] for need in needs.values() if need["required"])


def test_people_get_a_table_that_fits(qemu: str) -> None:
    done = check("--exe", qemu)
    assert done.returncode == 0
    assert max(len(line) for line in done.stdout.splitlines()) < 80
    for word in (*SITE_NAMES, "ThreadPoolElement", "barriers", "uprobes", "cheap"):
        assert word in done.stdout


def test_neither_bcc_nor_privileges_are_needed(qemu: str) -> None:
    require(shutil.which("setpriv"), "setpriv is not installed")
    nothing = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    found = told(check("--exe", qemu, "--json", wrapper=nothing, code=WITHOUT_BCC.format(root=str(ROOT))))
    needs = {need["need"]: need for need in found["host"]}
    assert (needs["root"]["ok"], needs["bcc"]["ok"], found["ready"]) == (False, False, False)
    unproved = {name: need for name, need in needs.items() if need["ok"] is None}
    assert unproved.keys() == {"bpf", "uprobes", "ptrace", "programs"}
    assert all("not proved" in need["detail"] for need in unproved.values())
    assert "python3-bpfcc" in needs["bcc"]["detail"]
    assert "python3-bcc" in needs["bcc"]["detail"]
    assert ("docker run" if os.geteuid() == 0 else "sudo") in needs["root"]["detail"]
    assert len(found["sites"]) >= len(SITE_NAMES)


def test_a_missing_program_is_named_with_its_package(qemu: str) -> None:
    code = "import os; os.environ['PATH'] = '/nowhere'; " + WITHOUT_BCC.format(root=str(ROOT))
    needs = {need["need"]: need for need in told(check("--exe", qemu, "--json", code=code))["host"]}
    assert (needs["virsh"]["ok"], needs["virsh"]["required"]) == (False, False)
    assert "install libvirt-clients (Debian)" in needs["virsh"]["detail"]


def test_nothing_found_shows_every_attempt(without_pool: str) -> None:
    done = check("--exe", without_pool, "--json")
    assert done.returncode == 1
    found, error = (json.loads(line) for line in done.stdout.splitlines())
    assert (found["event"], error["event"]) == ("check", "error")
    assert (found["sites"], found["layout"], found["barrier_fixed"], found["ready"]) == ([], None, None, False)
    assert [attempt["strategy"] for attempt in found["attempts"]] == list(STRATEGIES)
    assert all(attempt["outcome"] and not attempt["ok"] for attempt in found["attempts"])
    assert found["version"] == "2.1.2 (odd)"
    assert {"commit": BARRIERS, "fixed": None}.items() <= found["known_bugs"][0].items()
    assert error["message"]
    assert error["hint"]
    assert error["message"] in done.stderr
    for_people = check("--exe", without_pool)
    assert for_people.returncode == 1
    assert "missing: probe sites" in for_people.stdout


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_way_can_be_asked_for(qemu: str, strategy: str) -> None:
    done = check("--exe", qemu, "--json", "--locate", strategy)
    assert {attempt["strategy"] for attempt in json.loads(done.stdout.splitlines()[0])["attempts"]} == {strategy}


def test_a_way_that_there_is_not(qemu: str) -> None:
    done = check("--exe", qemu, "--locate", "guess")
    assert done.returncode == 2
    assert all(strategy in done.stderr for strategy in STRATEGIES)


@pytest.mark.parametrize("what", ["/bin/true", "/etc/passwd", "/etc", "/no/such/file", "script", "fifo", "", "a\0b"])
def test_what_is_no_qemu_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    path = what
    if what == "script":
        path = str(tmp_path / "kvm")
        Path(path).write_text("#!/bin/sh\nexec qemu-system-x86_64 -enable-kvm\n")
    if what == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
    if "\0" in what:
        path = str(tmp_path / ("x" * 5000))
    done = check("--exe", path, "--json")
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["event"] == "error"
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_dear_site_is_told_with_its_cost(qemu: str) -> None:
    with Image.open(qemu) as image:
        located = locate(image)
    assert notes_on(qemu, None, "7.2.0", located) == ()
    dear = replace(located.sites[SUBMIT], instruction="sub $8,%rsp", cheap=False)
    (note,) = notes_on(qemu, None, "7.2.0", replace(located, sites={**located.sites, SUBMIT: dear}))
    for word in (SUBMIT, dear.instruction, f"{DEAR_US} µs", f"{CHEAP_US}"):
        assert word in note


@pytest.mark.parametrize("arguments", [(), ("--pid", "1", "--exe", QEMU), ("--pid", "0"), ("--pid", "x")])
def test_usage(arguments: tuple[str, ...]) -> None:
    assert check(*arguments).returncode == 2


def test_a_process_that_does_not_exist() -> None:
    done = check("--pid", str(2**22 + 1))
    assert done.returncode == 1
    assert "there is no process" in done.stderr
