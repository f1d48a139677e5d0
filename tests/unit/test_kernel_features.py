"""What a kernel can do is told by what it answers, as each of them does."""

from __future__ import annotations

import errno
import os

import pytest

from tracer import kernel

ANSWERS = {
    "before 6.6: no such link": (errno.EINVAL, errno.EINVAL, False),
    "6.6 to 6.9: filters by thread": (errno.EBADF, errno.EBADF, False),
    "since 6.10": (errno.EBADF, errno.EINVAL, True),
    "not permitted": (errno.EPERM, errno.EPERM, False),
    "it attaches to no file at all": (0, 0, False),
}


@pytest.mark.parametrize(("any_process", "no_process", "has_it"), ANSWERS.values(), ids=ANSWERS.keys())
def test_links_to_many_places(monkeypatch: pytest.MonkeyPatch, any_process: int, no_process: int, has_it: bool) -> None:
    held = len(os.listdir("/proc/self/fd"))

    def attach(_program: int, path: str, _offsets: list[int], pid: int) -> int:
        assert path == "/"
        if answer := any_process if pid == 0 else no_process:
            raise OSError(answer, os.strerror(answer))
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(kernel, "load", lambda *_, **__: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(kernel, "attach_multi", attach)
    assert kernel.has_multi() is has_it
    assert len(os.listdir("/proc/self/fd")) == held


def test_a_kernel_that_permits_nothing_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(kernel, "_bpf", refuse)
    monkeypatch.setattr(kernel, "_lift_memory_lock", lambda: None)
    assert not kernel.has_multi()
    assert not kernel.has_atomics()
    assert not kernel.may_allocate()
