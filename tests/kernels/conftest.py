"""Each system booted once, its trial run, and what it told.

Knows: what the ring needs on the host. Does not know what is tried.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.conftest import require
from tests.kernels.images import SYSTEMS, RootMissing, System, image_of
from tests.kernels.machine import Outcome, trial
from tracer.lab.qemu import SYSTEM

#: Ten times what a trial takes on a quiet machine would be too long to wait for one that hangs.
PATIENCE_S = 900.0


@pytest.fixture(scope="session", params=SYSTEMS, ids=lambda system: str(system.name))
def system(request: pytest.FixtureRequest) -> System:
    """Each system in turn."""
    chosen: System = request.param
    return chosen


@pytest.fixture(scope="session")
def outcome(system: System) -> Outcome:
    """What its trial told, from its boot to its end."""
    require(os.geteuid() == 0, "the kernels need root")
    for tool in ("debootstrap", "mke2fs", SYSTEM):
        require(shutil.which(tool), f"{tool} is not installed")
    try:
        image = image_of(system)
        return trial(image, ("python3", "-m", "tests.kernels.trial"), PATIENCE_S)
    except RootMissing as error:
        require(False, f"no image of {system.name}: {error}")
        raise
