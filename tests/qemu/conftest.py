"""QEMUs for the tests of this ring, ended after each test whatever happened in it.

Knows: what the ring needs on the host. Does not know faults: a test puts them in and takes them out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.conftest import require
from tracer.errors import AioTraceError
from tracer.lab.guest import Guest, boot_files, guest
from tracer.lab.qemu import STORAGE_DAEMON, SYSTEM, Drive, Qemu, paused, storage_daemon


@pytest.fixture(scope="session", autouse=True)
def qemu_host() -> None:
    """Root and QEMU's programs, without which nothing here can run."""
    require(os.geteuid() == 0, "these tests need root")
    for program in (SYSTEM, STORAGE_DAEMON, "qemu-img"):
        require(shutil.which(program), f"{program} is not installed")


@pytest.fixture
def paused_qemu() -> Iterator[Qemu]:
    """A QEMU without a guest; d0 is served by the main loop."""
    with paused() as qemu:
        yield qemu


@pytest.fixture
def iothread_qemu() -> Iterator[Qemu]:
    """A QEMU without a guest; d0 is served by the iothread io0, d1 by the main loop."""
    with paused([Drive("d0", iothread="io0"), Drive("d1")]) as qemu:
        yield qemu


@pytest.fixture(params=["main loop", "iothread"])
def any_loop_qemu(request: pytest.FixtureRequest) -> Iterator[Qemu]:
    """Both of the above in turn: d0 in the main loop, then in an iothread."""
    with paused(iothread=request.param == "iothread") as qemu:
        yield qemu


@pytest.fixture
def daemon() -> Iterator[Qemu]:
    """A qemu-storage-daemon with d0 in the main loop and d1 in an iothread."""
    with storage_daemon([Drive("d0"), Drive("d1", iothread="io0")]) as qemu:
        yield qemu


class _Guests:
    """One guest for all tests, started on first use and again after a test that left it stuck."""

    def __init__(self) -> None:
        self._guest: Guest | None = None

    def get(self) -> Guest:
        if self._guest is None:
            self._guest = guest()
        return self._guest

    def check(self) -> None:
        """Give up a guest that does not go on."""
        if self._guest is not None:
            try:
                self._guest.wait_progress(2)
            except AioTraceError:
                self.close()
                raise

    def close(self) -> None:
        if self._guest is not None:
            self._guest.close()
        self._guest = None


@pytest.fixture(scope="session")
def guest_files(qemu_host: None) -> None:
    """Kernel and busybox of the guest, downloaded on first use."""
    try:
        boot_files()
    except AioTraceError as error:
        require(False, f"{error.message} ({error.hint})")


@pytest.fixture(scope="session")
def _guests(guest_files: None) -> Iterator[_Guests]:
    guests = _Guests()
    yield guests
    guests.close()


@pytest.fixture
def live_guest(_guests: _Guests) -> Iterator[Guest]:
    """A Linux guest in the middle of writing and flushing. A test that leaves it stuck fails at its end."""
    yield _guests.get()
    _guests.check()
