"""The numbers of system calls in tracer.target, against the kernel's own headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import require
from tracer.home import POLLS
from tracer.target import FILE_SYSCALLS, SYSCALLS, SYSCALLS_AARCH64

HEADERS = "/usr/include"


@pytest.mark.parametrize(
    ("table", "header"),
    [(SYSCALLS, "x86_64-linux-gnu/asm/unistd_64.h"), (SYSCALLS_AARCH64, "asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_numbers_are_the_kernels(table: Mapping[int, str], header: str) -> None:
    path = Path(HEADERS, header)
    require(path.exists(), f"{path} is missing (linux-libc-dev)")
    # Calls that differ between 32 and 64 bits are __NR3264_ there, under their 64-bit name.
    defined = dict.fromkeys(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", path.read_text()))
    assert {(name, str(number)) for number, name in table.items()} - defined.keys() == set()


def test_both_machines_name_the_calls_that_matter() -> None:
    """aarch64 has no calls that a newer one does the work of, such as poll and epoll_wait."""
    named = set(SYSCALLS_AARCH64.values())
    assert set(SYSCALLS.values()) - named == {"open", "poll", "select", "epoll_wait"}
    assert named >= FILE_SYSCALLS
    assert {"ppoll", "epoll_pwait"} <= named & POLLS
