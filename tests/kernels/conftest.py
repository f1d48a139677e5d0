"""Each system booted once, its trial run, and what it told.

Knows: what the ring needs on the host. Does not know what is tried.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.bundling import bundled
from tests.conftest import require
from tests.kernels.boards import AMD64, ARM64
from tests.kernels.images import SYSTEMS, RootMissing, System, image_of
from tests.kernels.machine import Outcome, trial

#: Ten times what a trial takes on a quiet machine would be too long to wait for one that hangs.
PATIENCE_S = {AMD64: 900.0, ARM64: 2100.0}
MARKS = {ARM64: pytest.mark.arm64}
_PARAMETERS = [pytest.param(each, id=each.name, marks=MARKS.get(each.board, ())) for each in SYSTEMS]


@pytest.fixture(scope="session", params=_PARAMETERS)
def system(request: pytest.FixtureRequest) -> System:
    """Each system in turn."""
    chosen: System = request.param
    return chosen


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive for hosts without a network."""
    return bundled(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def outcome(system: System, bundle: Path) -> Outcome:
    """What its trial told, from its boot to its end."""
    require(os.geteuid() == 0, "the kernels need root")
    for tool in ("debootstrap", "mke2fs", system.board.emulator):
        require(shutil.which(tool), f"{tool} is not installed")
    try:
        image = image_of(system)
        return trial(image, bundle, ("python3", "-m", "tests.kernels.trial"), PATIENCE_S[system.board])
    except RootMissing as error:
        require(False, f"no image of {system.name}: {error}")
        raise
