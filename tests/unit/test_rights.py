"""Why the kernel refuses a look at a process: what is said is what was seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracer import host, probes, rights, target
from tracer.errors import NoUprobes
from tracer.rights import CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, effective, holds, refusal
from tracer.trial import ATTACH, LOAD, MAP, Trial

MINE, OTHER = 0, 64055
ALL = (1 << 41) - 1


def given(
    patch: pytest.MonkeyPatch,
    tmp_path: Path,
    capabilities: int = ALL,
    owner: int = OTHER,
    user: int = MINE,
    yama: str | None = None,
    user_namespace: bool = False,
) -> None:
    """This process is such a one, on such a kernel."""
    scope = tmp_path / "ptrace_scope"
    if yama is not None:
        scope.write_text(f"{yama}\n")
    patch.setattr(rights, "YAMA", str(scope))
    patch.setattr(rights, "effective", lambda: capabilities)
    patch.setattr(rights, "_owner", lambda _pid: owner)
    patch.setattr(rights, "in_user_namespace", lambda: user_namespace)
    patch.setattr("os.geteuid", lambda: user)


def test_what_this_process_has() -> None:
    assert [holds(bit) for bit in range(64)] == [bool(effective() >> bit & 1) for bit in range(64)]


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(
    ("without", "named"),
    [
        ([CAP_SYS_PTRACE], "lacks CAP_SYS_PTRACE,"),
        ([CAP_DAC_READ_SEARCH], "lacks CAP_DAC_READ_SEARCH,"),
        ([CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH], "lacks CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH,"),
    ],
)
def test_a_capability_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without: list[int], named: str, memory: bool
) -> None:
    given(monkeypatch, tmp_path, capabilities=ALL & ~sum(1 << bit for bit in without), yama="3")
    refused = refusal(1, memory)
    assert named in refused.reason
    assert refused.hint == rights.WHOLE_CONTAINER


def test_the_files_of_ones_own_process_take_one_capability_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given(monkeypatch, tmp_path, capabilities=ALL & ~(1 << CAP_DAC_READ_SEARCH), owner=MINE)
    assert "CAP_DAC_READ_SEARCH" not in refusal(1, memory=True).reason


def test_yama_is_named_where_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its ptrace_scope 3 forbids memory, also to root, but not the executable; a lower one forbids root nothing."""
    given(monkeypatch, tmp_path, yama="3")
    assert "ptrace_scope is 3" in refusal(1, memory=True).reason
    assert "ptrace_scope" not in refusal(1, memory=False).reason
    given(monkeypatch, tmp_path, yama="2")
    assert "ptrace_scope" not in refusal(1, memory=True).reason


def test_without_root_sudo_helps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given(monkeypatch, tmp_path, capabilities=0, user=1000)
    assert refusal(1, memory=True) == rights.Refusal("without root", None)


def test_the_rest_is_not_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given(monkeypatch, tmp_path, user_namespace=True)
    assert "user namespace" in refusal(1, memory=True).reason
    given(monkeypatch, tmp_path)
    assert "perhaps" in refusal(1, memory=True).reason


def test_a_process_that_proc_hides_is_not_said_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted with hidepid=2, /proc shows no process of others; kill(2) tells that there is one."""

    def hidden(_pid: int) -> None:
        raise FileNotFoundError

    def refused(_pid: int, _number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(target, "_stat_fields", hidden)
    monkeypatch.setattr("os.kill", refused)
    with pytest.raises(target.NotPermitted, match="may not be looked at without root"):
        target.open_target(4712)


# What `check` makes of a trial


def test_a_refusal_is_explained_by_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lockdown = tmp_path / "lockdown"
    lockdown.write_text("none integrity [confidentiality]\n")
    monkeypatch.setattr(host, "LOCKDOWN", str(lockdown))
    given(monkeypatch, tmp_path)
    tried = Trial(LOAD, PermissionError(1, "Operation not permitted"), "what the verifier says", None)
    need = host._bpf(tried)
    assert need.ok is False
    assert "lockdown (confidentiality), perhaps" in need.detail
    assert "what the verifier says" in need.words


def test_lockdown_alone_is_no_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tracing works on kernels that were booted with lockdown=confidentiality."""
    lockdown = tmp_path / "lockdown"
    lockdown.write_text("none integrity [confidentiality]\n")
    monkeypatch.setattr(host, "LOCKDOWN", str(lockdown))
    assert host._bpf(Trial(None, None, "", multi=False)).ok is True


def test_what_was_not_reached_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given(monkeypatch, tmp_path)
    tried = Trial(MAP, PermissionError(1, "Operation not permitted"), "", None)
    bpf = host._bpf(tried)
    assert (bpf.ok, host._uprobes(tried, bpf).ok) == (False, None)


@pytest.mark.parametrize(("folder", "said"), [(False, "/sys is not mounted"), (True, "no uprobes")])
def test_a_missing_sys_is_no_missing_kernel_feature(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: bool, said: str
) -> None:
    monkeypatch.setattr(probes, "UPROBE_PMU", str(tmp_path / "devices/uprobe/type"))
    monkeypatch.setattr(probes, "SYSFS_PMUS", str(tmp_path / "devices"))
    if folder:
        (tmp_path / "devices").mkdir()
    lacking = probes.no_uprobes()
    assert isinstance(lacking, NoUprobes)
    assert said in lacking.message
    tried = Trial(ATTACH, FileNotFoundError(2, "No such file or directory"), "", multi=False)
    need = host._uprobes(tried, host._bpf(tried))
    assert need.ok is False
    assert said in need.detail
