"""What this ring needs: root, uprobes, bcc and a compiler; and the pool in miniature."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.kernel.attaching import VARIANTS, Variant, use
from tests.kernel.miniature import Miniature, build
from tracer import probes
from tracer.errors import AioTraceError
from tracer.probes import check_host


@pytest.fixture(scope="session", autouse=True)
def kernel_host() -> None:
    """Whatever is missing is the reason."""
    require(os.geteuid() == 0, "these tests need root")
    require(shutil.which("gcc") and shutil.which("nm"), "gcc and binutils are not installed")
    try:
        check_host()
    except AioTraceError as error:
        require(False, f"{error.message} ({error.hint})")


@pytest.fixture(scope="session", autouse=True)
def empty_cache(kernel_host: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that was compiled before this run is used in it, and nothing of it is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


_covered = pytest.StashKey[set[str]]()


@pytest.fixture
def covered(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says which states of the processor a test covered: processors differ, and so does what was shown on them."""

    def note(states: str) -> None:
        record_property("states", states)
        request.config.stash.setdefault(_covered, set()).add(states)

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the tests said to `covered`."""
    for states in sorted(config.stash.get(_covered, set())):
        terminalreporter.write_line(f"registers of a thread that a call was put into, on this processor: {states}")


@pytest.fixture(scope="session")
def program(kernel_host: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, position independent as QEMU is."""
    return build(tmp_path_factory.mktemp("pool"), "-fPIE", "-pie")


@pytest.fixture
def pool(program: Path) -> Iterator[Miniature]:
    """A pool in miniature of the test's own."""
    with Miniature(program) as running:
        yield running


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Variant:
    """The programs for new kernels and for old ones, for one process and for many."""
    chosen: Variant = request.param
    use(chosen, monkeypatch)
    return chosen


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes are taken to have been there for long: a callback without its done has overtaken it."""
    monkeypatch.setattr(probes, "SETTLING_NS", 0)
