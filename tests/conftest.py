"""Rings and prerequisites.

Knows: which folder is which ring, and that a missing prerequisite skips a test on a laptop and
fails it in CI. Knows nothing of what the tests are about.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tracer.lab.guest import cache_folder

# How long an example takes says nothing where others keep the processors busy.
settings.register_profile("aio-trace", deadline=None)
settings.load_profile("aio-trace")

TESTS = Path(__file__).parent
RINGS = ("unit", "kernel", "qemu", "matrix", "kernels")


def require(condition: object, reason: str) -> None:
    """Skip the test with `reason` unless `condition` holds; in CI, fail it instead."""
    __tracebackhide__ = True
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"missing in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the commands under test keep (tracer/cache.py) is kept apart from the host's own.

    What was downloaded for them is not: kernels and whole releases are fetched once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIO_TRACE_LAB_CACHE", str(cache_folder()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the ring whose folder it lives in."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            ring = item.path.relative_to(TESTS).parts[0]
            if ring in RINGS:
                item.add_marker(ring)


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Path]:
    """A control group of our own; /sys/fs/cgroup may be for reading only."""
    require(os.geteuid() == 0, "a control group needs root")
    mounted = tmp_path / "cgroup"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", mounted], check=True)
    group = mounted / f"aio-trace-test-{os.getpid()}"
    group.mkdir()
    yield group
    while "populated 1" in (group / "cgroup.events").read_text():
        pass
    group.rmdir()
    subprocess.run(["umount", mounted], check=True)
