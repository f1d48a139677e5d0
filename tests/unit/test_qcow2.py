"""Only a regular file is opened to look for an image's tables."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tracer.qcow2 import MAGIC, first_data, holds
from tracer.target import open_regular


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    """A FIFO without a writer would hold us up for good; opening a device may do something."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero"), tmp_path, tmp_path / "nothing"):
        with pytest.raises(OSError, match=r"not a regular file|No such file"):
            open_regular(str(path))
        assert first_data(str(path)) is None
        assert not holds(str(path))


def test_an_image_is_read_through_a_descriptor_of_it(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    header = struct.pack(">4sIQIIQIIQ", MAGIC, 2, 0, 0, 16, 1 << 20, 0, 1, 1 << 16).ljust(104, b"\0")
    table = struct.pack(">QQ", 0, 3 << 16)
    image.write_bytes(header.ljust(1 << 16, b"\0") + struct.pack(">Q", 2 << 16).ljust(1 << 16, b"\0") + table)
    with image.open("rb") as opened:
        path = f"/proc/self/fd/{opened.fileno()}"
        image.unlink()
        assert holds(path)
        assert first_data(path) == 1 << 16
