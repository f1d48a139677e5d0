"""Every cause, and for every missing fact no accusation. Facts are made up here; the rules are the real ones."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer import verdict
from tracer.layout import RequestState
from tracer.verdict import QEMU_BUGS, Facts, Look, as_evidence, judge

ASLEEP = Look(scheduled=False, home_state="S", parked=True, syscall="ppoll", switches=7)
TOLD = replace(ASLEEP, scheduled=True)
ELSEWHERE = replace(TOLD, parked=False, syscall="openat of /srv/fifo")
ON_CPU = Look(scheduled=True, home_state="R", parked=False, syscall=None, switches=7)
DONE = Facts(
    RequestState.THREAD_DONE,
    kind="write",
    file="/srv/disk.img",
    ret=0,
    age_s=1.2,
    looks=(ASLEEP,) * 3,
    home_name="qemu-system-x86",
    home_tid=4711,
    bell_count=0,
    bell_polled=True,
)
ACTIVE = Facts(RequestState.THREAD_ACTIVE, kind="flush", file="/srv/disk.img", age_s=12.0)
QUEUED = Facts(RequestState.THREAD_QUEUED, age_s=12.0, threads_current=64, threads_idle=0, threads_max=64)

CASES = {
    "asleep and not told": (DONE, "lost-wakeup"),
    "comes round and not told": (replace(DONE, looks=(replace(ON_CPU, scheduled=False), ASLEEP)), "lost-wakeup"),
    "comes round, last look elsewhere": (
        replace(DONE, looks=(ASLEEP, replace(ON_CPU, scheduled=False, switches=8))),
        "lost-wakeup",
    ),
    "told and not woken": (replace(DONE, looks=(TOLD,) * 3), "lost-kick"),
    "woken by a bell that it does not hear": (replace(DONE, looks=(TOLD,) * 3, bell_count=1), "unpolled-kick"),
    "in another system call": (replace(DONE, looks=(ELSEWHERE,) * 3), "loop-blocked"),
    "in the kernel, uninterruptible": (replace(DONE, looks=(replace(ELSEWHERE, home_state="D"),) * 3), "loop-blocked"),
    "in the bottom half, waiting for a lock": (
        replace(DONE, looks=(replace(ELSEWHERE, scheduled=False, syscall="futex"),) * 3),
        "loop-blocked",
    ),
    "on the processor": (replace(DONE, looks=(ON_CPU,) * 3), "loop-busy"),
    "from one system call to the next": (
        replace(DONE, looks=tuple(replace(ELSEWHERE, switches=n) for n in range(3))),
        "loop-busy",
    ),
    "process stopped": (replace(DONE, process_stopped=True), "stopped"),
    "home thread stopped": (replace(DONE, looks=(replace(ASLEEP, home_state="t"),) * 3), "stopped"),
    "active, worker in a system call": (
        replace(ACTIVE, worker_syscall="fdatasync on /srv/disk.img", worker_tid=4712),
        "worker-stuck",
    ),
    "active, stopped": (replace(ACTIVE, process_stopped=True), "stopped"),
    "queued behind 64 busy workers": (QUEUED, "queue-full"),
    "queued, a worker is idle": (replace(QUEUED, threads_idle=1), "queue-stalled"),
    "queued, a worker is idle, most not known": (replace(QUEUED, threads_idle=1, threads_max=None), "queue-stalled"),
    "queued, more workers could be started": (replace(QUEUED, threads_current=3), "queue-stalled"),
    "queued, no worker at all": (replace(QUEUED, threads_current=0), "queue-stalled"),
    "queued, stopped": (replace(QUEUED, process_stopped=True), "stopped"),
}

UNKNOWN = {
    "nothing was looked at": replace(DONE, looks=()),
    "bottom half not readable": replace(DONE, looks=(replace(ASLEEP, scheduled=None),) * 3),
    "bottom half not readable once": replace(DONE, looks=(replace(ASLEEP, scheduled=None), ASLEEP, ASLEEP)),
    "home thread not found": replace(DONE, looks=(Look(scheduled=False),) * 3),
    "something else is missing": replace(DONE, missing=("the pool's list could not be read to the end",)),
    "told, asleep, bell not found": replace(DONE, looks=(TOLD,) * 3, bell_count=None),
    "told while it was looked at": replace(DONE, looks=(ASLEEP, TOLD, TOLD)),
    "told at first, then not": replace(DONE, looks=(TOLD, ASLEEP, ASLEEP)),
    "told, and comes round": replace(DONE, looks=tuple(replace(TOLD, switches=n) for n in range(3))),
    "told, and leaves its poll": replace(DONE, looks=(TOLD, TOLD, ON_CPU)),
    "sleeps, where cannot be read": replace(DONE, looks=(replace(ELSEWHERE, syscall=None),) * 3),
    "thread counters not known": replace(QUEUED, threads_current=None),
    "idle threads not known": replace(QUEUED, threads_idle=None),
    "all are busy, more may be allowed": replace(QUEUED, threads_max=None),
    "queued, and the list is torn": replace(QUEUED, threads_idle=5, missing=("the list is torn",)),
}


@pytest.mark.parametrize(("facts", "cause"), CASES.values(), ids=CASES.keys())
def test_causes(facts: Facts, cause: str) -> None:
    assert judge(facts).cause == cause


@pytest.mark.parametrize("facts", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_missing_evidence_accuses_nobody(facts: Facts) -> None:
    assert judge(facts).cause == "unknown"


def test_every_cause_of_the_rules_is_tried_here() -> None:
    causes = {
        value for name, value in vars(verdict).items() if name.isupper() and name[0] != "_" and isinstance(value, str)
    }
    # The function's name is no cause; nested waits are tried with stacks, in test_verdict_rules.
    causes -= {verdict.COMPLETION_BH, verdict.NESTED_POLL, verdict.NESTED_WAIT}
    assert causes == {cause for _, cause in CASES.values()} | {"unknown"}


def test_what_is_missing_is_said() -> None:
    sentence = judge(replace(DONE, missing=("the moon was not up",))).explanation
    assert "the moon was not up" in sentence


@pytest.mark.parametrize("facts", [facts for facts, _ in CASES.values()] + list(UNKNOWN.values()))
def test_explanations_are_one_sentence_for_people(facts: Facts) -> None:
    """No internals such as None, and nothing that would break a line of the table."""
    sentence = judge(facts).explanation
    assert sentence.endswith(".")
    assert "None" not in sentence
    assert "\n" not in sentence


def test_a_lost_wakeup_names_request_thread_and_place() -> None:
    sentence = judge(DONE).explanation
    for part in ("write", "/srv/disk.img", "1.2 s", "4711", "ppoll", "not scheduled"):
        assert part in sentence


def test_a_stuck_worker_names_its_place() -> None:
    sentence = judge(CASES["active, worker in a system call"][0]).explanation
    for part in ("flush", "12.0 s", "worker 4712", "fdatasync on /srv/disk.img"):
        assert part in sentence


def test_a_worker_that_was_not_seen_does_not_accuse_the_storage() -> None:
    seen = judge(ACTIVE)
    assert seen.cause == "worker-stuck"
    assert "not known" in seen.explanation


looks = st.builds(
    Look,
    scheduled=st.sampled_from([True, False, None]),
    home_state=st.sampled_from(["R", "S", "D", "T", "t", None]),
    parked=st.sampled_from([True, False, None]),
    syscall=st.sampled_from(["ppoll", "futex", None]),
    switches=st.sampled_from([1, 2, None]),
)
facts_of_any_kind = st.builds(
    Facts,
    state=st.sampled_from(RequestState),
    kind=st.sampled_from(["read", None]),
    age_s=st.floats(0, 1e6),
    looks=st.lists(looks, max_size=4).map(tuple),
    home_tid=st.sampled_from([1, None]),
    process_stopped=st.booleans(),
    bell_count=st.sampled_from([0, 1, None]),
    threads_current=st.sampled_from([0, 1, 64, None]),
    threads_idle=st.sampled_from([0, 1, None]),
    threads_max=st.sampled_from([1, 64, None]),
    missing=st.sampled_from([(), ("x",)]),
)


@given(facts_of_any_kind)
def test_qemu_is_accused_on_full_evidence_only(facts: Facts) -> None:
    """Whatever the facts: a bug of QEMU needs every look readable and nothing missing."""
    cause = judge(facts).cause
    if cause not in QEMU_BUGS:
        return
    assert not facts.missing
    assert not facts.process_stopped
    if cause == "queue-stalled":
        assert facts.state == RequestState.THREAD_QUEUED
        assert facts.threads_current is not None
        assert facts.threads_idle or facts.threads_current < (facts.threads_max or 0)
        return
    assert facts.looks
    assert all(look.scheduled is not None and look.parked is not None for look in facts.looks)
    assert any(look.parked for look in facts.looks)
    assert len({look.scheduled for look in facts.looks}) == 1
    assert facts.looks[0].scheduled == (cause != "lost-wakeup")


@given(facts_of_any_kind)
def test_evidence_is_what_json_can_say(facts: Facts) -> None:
    evidence = as_evidence(facts)
    assert json.loads(json.dumps(evidence)) == evidence


def test_evidence_that_could_not_be_had_is_null() -> None:
    evidence = as_evidence(Facts(RequestState.THREAD_DONE))
    for name in ("bottom_half_scheduled", "came_round", "eventfd_count", "worker"):
        assert evidence[name] is None
    assert set(evidence["threads"].values()) == {None}


@pytest.mark.parametrize(("switches", "came_round"), [((7, 7, 7), False), ((7, 7, 8), True)])
def test_evidence_says_whether_the_loop_came_round(switches: tuple[int, ...], came_round: bool) -> None:
    facts = replace(DONE, looks=tuple(replace(ASLEEP, switches=n) for n in switches))
    assert as_evidence(facts)["came_round"] is came_round


def test_no_fact_of_a_done_request_is_silently_left_out() -> None:
    """Take any one fact of the lost wake-up away: either it did not matter, or the accusation is gone."""
    removable = {field.name: None for field in fields(Look)}
    for (name, value), index in product(removable.items(), range(3)):
        changed = list(DONE.looks)
        changed[index] = replace(ASLEEP, **{name: value})
        cause = judge(replace(DONE, looks=tuple(changed))).cause
        assert cause == ("unknown" if name in ("scheduled", "parked") else "lost-wakeup"), (name, index)
