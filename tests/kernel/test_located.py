"""Real probes at the sites found in small programs: every request is counted at every stage.

A register that does not hold the request would leave records in the map, or count fewer.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import require
from tests.targets import Recipe, build
from tracer.elf import Image
from tracer.errors import HostError
from tracer.executable import Executable
from tracer.figures import combined
from tracer.maps import Statistics
from tracer.probes import Probes, check_host
from tracer.sites import locate
from tracer.sites.model import CALLBACK, DONE, SITE_NAMES, SUBMIT, Located, Site
from tracer.sites.usdt import request_register

WITH, WITHOUT, CO = 23, 7, 5  # requests with a callback, without one, and by thread_pool_submit_co()

RECIPES = [
    Recipe(),
    Recipe(probes=True),
    Recipe("gcc", "-O0"),
    Recipe("gcc", "-O3", version=201, probes=True),
    Recipe("gcc", "-O3", lto=True, version=1000),
    Recipe("gcc", "-O3", lto=True, version=702, pie=False),
    Recipe("clang", "-O2", version=502),
    Recipe("clang", "-O3", lto=True, version=201),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        check_host()
    except HostError as error:
        require(False, error.message)
    return tmp_path_factory.mktemp("pool")


def located(program: Path, only: str | None = None) -> Located:
    with Image.open(program) as image:
        return locate(image, only)


@contextmanager
def waiting(program: Path, *before: str) -> Iterator[subprocess.Popen[str]]:
    """The program, started (by the command `before`) and waiting for a line before it makes its requests."""
    command = [*before, str(program), *(str(number) for number in (WITH, WITHOUT, CO)), "wait"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "QEMU" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def counted(program: Path, sites: tuple[Site, ...], found: Located) -> tuple[Statistics, int]:
    """What the probes counted, and how many records were left at the end."""
    with waiting(program) as process, Executable.open(program) as file:
        probes = Probes(process.pid, file, sites, found.layout.element)
        try:
            probes.attach()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{WITH + WITHOUT + CO}\n"
            settle(probes)
            return combined(probes.statistics().values()), len(probes.records())
        finally:
            probes.close()


def settle(probes: Probes) -> None:
    """The last worker may not have come to its probe yet when the program counts its work."""
    deadline = time.monotonic() + 10
    while combined(probes.statistics().values()).done < WITH + WITHOUT + CO and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_request_is_counted_at_every_stage(recipe: Recipe, folder: Path) -> None:
    program = build(recipe, folder)
    found = located(program)
    total, left = counted(program, found.sites_of(*SITE_NAMES), found)
    assert (total.submitted, total.done, total.completed) == (WITH + WITHOUT + CO,) * 3
    assert (total.no_callback, total.cancelled, total.before, total.missed, left) == (WITHOUT, 0, 0, 0, 0)


def test_copies_of_submit_in_several_registers(folder: Path) -> None:
    """-O3 has put submit into its two callers as well; the copies hold the request elsewhere."""
    found = located(build(Recipe("gcc", "-O3", version=201, probes=True), folder))
    submits = found.sites_of(SUBMIT)
    assert len(submits) > 1
    assert len({site.register for site in submits}) > 1


def test_the_callback_probe_counts_no_request_that_has_no_callback(folder: Path) -> None:
    """USDT's thread_pool_complete is passed by those, too."""
    program = build(Recipe(probes=True), folder)
    found = located(program, "usdt")
    with Image.open(program) as image:
        (probe,) = (probe for probe in image.static_probes if probe.name == "thread_pool_complete")
    register = request_register(probe.arguments)
    assert register is not None
    nop = replace(found.sites[CALLBACK], address=probe.address, register=register, without_callback=True)
    total, left = counted(program, (*found.sites_of(SUBMIT, DONE), nop), found)
    assert (total.completed, total.no_callback, total.before, left) == (WITH + WITHOUT + CO, WITHOUT, 0, 0)


def test_without_submit(folder: Path, settled: None) -> None:
    """Requests that nobody waits for leave a record, which memory shows to be of no interest."""
    program = build(Recipe(), folder)
    found = located(program)
    total, left = counted(program, found.sites_of(DONE, CALLBACK), found)
    assert (total.done, total.completed) == (WITH + WITHOUT + CO, WITH + CO)
    assert left <= WITHOUT


def test_the_programs_do_what_they_say(folder: Path) -> None:
    """Without probes, as a witness that the numbers above are the program's own."""
    program = build(Recipe(), folder)
    out = subprocess.run([program, "3", "4", "5"], capture_output=True, text=True, check=True, env=os.environ)
    assert re.fullmatch(r"12\n", out.stdout)
