"""tracer.known_bugs: how QEMU and distributions write versions, and which bugs those may have."""

from __future__ import annotations

import pytest

from tracer.known_bugs import BARRIERS, KNOWN_BUGS, known_bugs, parse_version

VERSIONS = {
    "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)": (7, 2, 22),
    "11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)": (11, 1, 3),
    "2.1.2 (Debian 1:2.1+dfsg-12+deb8u6), Copyright": (2, 1, 2),
    "2.1.2(qemu-kvm-rhev-2.1.2-23.el7_1.12)": (2, 1, 2),
    "2.12.0 (qemu-kvm-ev-2.12.0-44.1.el7_8.1)": (2, 12, 0),
    "6.2.0 (Debian 1:6.2+dfsg-2ubuntu6.27)": (6, 2, 0),
    "2.2.91": (2, 2, 91),
    "2.3.0-rc1": (2, 2, 91),
    "v9.0.0-rc2-123-g0123456789": (8, 2, 92),
    "3.0.0-rc0": (2, 12, 90),
    "8.2.50 (v8.2.0-1234-gabcdef)": (8, 2, 50),
    "2.0": (2, 0, 0),
    "0.12.1 (qemu-kvm-0.12.1.2-2.506.el6_10.7)": (0, 12, 1),
    "unknown": None,
    "": None,
}


@pytest.mark.parametrize("text", VERSIONS)
def test_versions_are_read(text: str) -> None:
    assert parse_version(text) == VERSIONS[text]


def commits(version: str, machine: str = "x86_64") -> set[str]:
    bugs = known_bugs(version, machine)
    assert bugs is not None
    return {bug.commit for bug in bugs}


@pytest.mark.parametrize("version", ["2.1.1", "2.1.2", "2.1.3", "2.2.0", "2.2.1", "2.3.0-rc0", "2.3.0-rc2", "2.2.92"])
def test_versions_with_the_bug_of_the_name(version: str) -> None:
    assert BARRIERS in commits(version)


@pytest.mark.parametrize("version", ["2.0.2", "2.1.0", "2.3.0-rc3", "2.3.0", "2.12.1", "5.2.0", "11.1.3"])
def test_versions_without_it(version: str) -> None:
    assert BARRIERS not in commits(version)


def test_bugs_come_and_go_with_versions() -> None:
    assert "ef6dada8b4" not in commits("2.8.1")
    assert "ef6dada8b4" in commits("2.9.0") & commits("2.10.2")
    assert "ef6dada8b4" not in commits("2.11.0")
    assert "e62da98527" in commits("7.2.22")
    assert "e62da98527" not in commits("8.0.0")
    assert "6bc0bcc89f" in commits("8.2.0-rc3")
    assert "6bc0bcc89f" not in commits("8.1.5") | commits("8.2.0")
    assert commits("11.1.0") == set()


def test_bugs_that_came_later_are_not_those_of_an_old_version() -> None:
    """The build of the original report has its own, and none that later code brought."""
    assert commits("2.1.2") == {BARRIERS, "21a03d17f2"}
    assert commits("2.1.2", "aarch64") == {BARRIERS, "21a03d17f2", "eabc977973", "e77508292c"}
    assert "b37548fcd1" in commits("2.4.0") & commits("3.0.0")
    assert "e62da98527" not in commits("2.4.1")
    assert "49880165a4" in commits("2.12.0") & commits("3.0.0")
    assert "49880165a4" not in commits("2.11.2")
    assert "960d5fb3e8" in commits("5.2.0")
    assert "960d5fb3e8" not in commits("5.1.0") | commits("6.0.0")


def test_memory_order_depends_on_the_machine() -> None:
    assert "5710a3e09f" in commits("4.2.1", "aarch64")
    assert "5710a3e09f" not in commits("4.2.1", "x86_64")


def test_no_version_means_not_known() -> None:
    assert known_bugs(None, "x86_64") is None
    assert known_bugs("unknown", "x86_64") is None


def test_the_table_is_sound() -> None:
    assert len({bug.commit for bug in KNOWN_BUGS}) == len(KNOWN_BUGS)
    for bug in KNOWN_BUGS:
        assert len(bug.commit) == 10
        assert bug.kind in "ABCDE"
        assert all(first < before for first, before in bug.ranges)
