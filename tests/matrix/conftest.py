"""The releases of the matrix and a QEMU of each, in every form that has a thread pool.

Knows: what the ring needs on the host. Does not know what the tests are about.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.matrix.roots import RELEASES, Release, RootMissing, root_of
from tracer.lab.qemu import Qemu, paused, storage_daemon

FORMS = ("main loop", "iothread", "storage daemon")


@pytest.fixture(scope="session", autouse=True)
def matrix_host() -> None:
    """Root and debootstrap, without which no root can be made."""
    require(os.geteuid() == 0, "the matrix needs root")
    require(shutil.which("debootstrap"), "debootstrap is not installed")


@pytest.fixture(scope="session", params=RELEASES, ids=lambda release: str(release.name))
def release(request: pytest.FixtureRequest) -> Release:
    """Each release in turn."""
    chosen: Release = request.param
    return chosen


@pytest.fixture(scope="session")
def root(release: Release, matrix_host: None) -> Path:
    """Its folder."""
    try:
        return root_of(release)
    except RootMissing as error:
        require(False, f"no root of {release.name}: {error}")
        raise


@pytest.fixture(scope="session", params=FORMS)
def machine(request: pytest.FixtureRequest, root: Path) -> Iterator[Qemu]:
    """A QEMU of that release that has its thread pool: a system emulator's two loops, a storage daemon."""
    form = request.param
    starting = (
        storage_daemon(chroot=root) if form == "storage daemon" else paused(chroot=root, iothread=form == FORMS[1])
    )
    with starting as qemu:
        qemu.request("d0", "write")
        yield qemu
