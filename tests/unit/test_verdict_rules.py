"""The rules of tracer.verdict: each cause of the contract from the facts that make it, and from no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer import verdict
from tracer.layout import RequestState
from tracer.verdict import Facts, HomeStack, Look, as_evidence, draining, judge, nested_wait

ASLEEP = Look(scheduled=False, home_state="S", parked=True, syscall="ppoll", switches=7)
TOLD = replace(ASLEEP, scheduled=True)
STUCK = Look(scheduled=True, home_state="S", parked=False, syscall="openat of /fifo", switches=7)
RUNS = Look(scheduled=True, home_state="R", parked=False, syscall=None, switches=7)

DONE = Facts(RequestState.THREAD_DONE, "flush", "/d0.img", 0, 4.2, (ASLEEP,) * 3, "qemu", 1)
ACTIVE = Facts(RequestState.THREAD_ACTIVE, "write", "/d0.img", age_s=31.0, worker_tid=9, worker_syscall="pwrite64")
QUEUED = Facts(RequestState.THREAD_QUEUED, "read", "/d0.img", age_s=31.0, threads_max=64)
HELD = replace(QUEUED, threads_current=2, threads_idle=0, workers_in_storage=2, busy_with="2 in pwrite64")

DRAIN = ("ppoll", "qemu_poll_ns", "aio_poll", "bdrv_drain_all_begin", "bdrv_drain_all", "vm_stop", "main_loop_wait")
NESTED = ("ppoll", "aio_poll", "bdrv_flush", "thread_pool_completion_bh", "aio_bh_poll", "aio_dispatch")
#: The main thread waits for the big lock; the completion bottom half waits for another one.
AWAY = replace(STUCK, scheduled=False, syscall="futex")
LOCKED = HomeStack((), ("pthread_mutex_lock", "qemu_mutex_lock_iothread_impl", "main_loop_wait"), complete=True)
IN_CALLBACK = ("pthread_mutex_lock", "aio_context_acquire", "thread_pool_completion_bh", "aio_bh_poll")
CALLED = ("ppoll", "aio_poll", "thread_pool_completion_bh")


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        (DONE, "lost-wakeup"),
        (replace(DONE, looks=(ASLEEP, replace(ASLEEP, parked=False, syscall=None), ASLEEP)), "lost-wakeup"),
        (replace(DONE, looks=(ASLEEP, ASLEEP, replace(ASLEEP, parked=False, syscall=None))), "lost-wakeup"),
        (replace(DONE, looks=(TOLD,) * 3, bell_count=0), "lost-kick"),
        (replace(DONE, looks=(TOLD,) * 3, bell_count=1), "unpolled-kick"),
        (replace(DONE, looks=(TOLD,) * 3), "unknown"),
        (replace(DONE, looks=(TOLD, ASLEEP, TOLD), bell_count=0), "unknown"),
        (replace(DONE, looks=(STUCK,) * 3), "loop-blocked"),
        (replace(DONE, looks=(replace(STUCK, scheduled=False),) * 3), "loop-blocked"),
        (replace(DONE, looks=(AWAY,) * 3, stack=LOCKED), "lost-wakeup"),
        (replace(DONE, looks=(AWAY,) * 3, stack=replace(LOCKED, complete=False)), "loop-blocked"),
        (replace(DONE, looks=(AWAY, TOLD, AWAY), stack=LOCKED), "unknown"),
        (replace(DONE, looks=(AWAY, replace(AWAY, scheduled=True), AWAY), stack=LOCKED), "loop-blocked"),
        (replace(DONE, looks=(AWAY,) * 3, stack=HomeStack((), IN_CALLBACK, complete=True)), "loop-blocked"),
        (replace(DONE, looks=(AWAY,) * 3, stack=LOCKED, poller_tid=4, poller_name="CPU 0"), "lost-wakeup"),
        (
            replace(DONE, looks=(AWAY,) * 3, poller_tid=4, poller_name="CPU 0", poller_stack=HomeStack((), NESTED)),
            "nested-wait",
        ),
        (replace(DONE, looks=(RUNS,) * 3), "loop-busy"),
        (replace(DONE, looks=(replace(RUNS, scheduled=False),) * 3), "loop-busy"),
        (replace(DONE, stack=HomeStack(functions=NESTED)), "nested-wait"),
        (replace(DONE, looks=(TOLD,) * 3, stack=HomeStack(functions=NESTED)), "nested-wait"),
        (replace(DONE, stack=HomeStack(functions=DRAIN)), "lost-wakeup"),
        (replace(DONE, process_stopped=True), "stopped"),
        (replace(DONE, looks=(replace(ASLEEP, home_state="t"),) * 3), "stopped"),
        (replace(DONE, missing=("the list is torn",)), "unknown"),
        (replace(DONE, looks=()), "unknown"),
        (ACTIVE, "worker-stuck"),
        (replace(ACTIVE, worker_tid=None, worker_syscall=None), "worker-stuck"),
        (replace(QUEUED, threads_current=64, threads_idle=0), "queue-full"),
        (replace(QUEUED, threads_current=64, threads_idle=1), "queue-stalled"),
        (replace(QUEUED, threads_current=2, threads_idle=0), "queue-stalled"),
        (HELD, "worker-stuck"),
        (replace(HELD, workers_in_storage=1), "queue-stalled"),
        (replace(HELD, threads_new=1), "queue-stalled"),
        (replace(HELD, threads_idle=1), "queue-stalled"),
        (replace(HELD, threads_current=64, workers_in_storage=64), "queue-full"),
        (replace(QUEUED, threads_current=0, threads_idle=0), "queue-stalled"),
        (QUEUED, "unknown"),
    ],
)
def test_causes(facts: Facts, cause: str) -> None:
    found = judge(facts)
    assert found.cause == cause
    assert found.explanation.endswith(".")
    assert "None" not in found.explanation


@pytest.mark.parametrize(("fixed", "says"), [(True, "has the first"), (False, "LACKS"), (None, "could not be read")])
def test_a_lost_wakeup_names_the_known_fixes(fixed: bool | None, says: str) -> None:
    text = judge(replace(DONE, barrier_fixed=fixed)).explanation
    assert "e8d3b1a25f" in text
    assert "ef6dada8b4" in text
    assert says in text


def test_a_loop_without_a_cpu_is_not_called_busy() -> None:
    waiting = (replace(RUNS, ran_s=1.0, waited_s=2.0), replace(RUNS, ran_s=1.01, waited_s=2.19))
    running = (replace(RUNS, ran_s=1.0, waited_s=2.0), replace(RUNS, ran_s=1.19, waited_s=2.01))
    assert "the host is overloaded" in judge(replace(DONE, looks=waiting)).explanation
    assert "is busy (" in judge(replace(DONE, looks=running)).explanation


def test_a_core_does_not_tell_ages() -> None:
    for facts in (DONE, ACTIVE, replace(QUEUED, threads_current=64, threads_idle=0)):
        text = judge(replace(facts, from_core=True, age_s=0.0)).explanation
        assert " 0.0 s" not in text


def test_whoever_drains_is_named() -> None:
    facts = replace(DONE, looks=(AWAY,) * 3, stack=LOCKED, poller_tid=4, poller_name="CPU 0", draining="blk_drain")
    assert "thread 4 (CPU 0) drains (in blk_drain)" in judge(facts).explanation
    evidence = as_evidence(facts)
    assert (evidence["draining"], evidence["polled_by"]["tid"]) == ("blk_drain", 4)
    assert as_evidence(DONE)["polled_by"] is None


def test_the_outermost_drain_is_named() -> None:
    assert draining(DRAIN) == "bdrv_drain_all"
    assert draining(("ppoll", "aio_poll", "main_loop_wait")) is None


def test_only_a_wait_above_the_bottom_half_is_nested() -> None:
    assert nested_wait(NESTED)
    assert nested_wait(CALLED)
    assert not nested_wait(tuple(reversed(NESTED)))
    assert not nested_wait(DRAIN)


def test_every_cause_has_its_severity() -> None:
    causes = {value for name, value in vars(verdict).items() if name.isupper() and isinstance(value, str)}
    assert causes - {verdict.COMPLETION_BH, verdict.NESTED_POLL, *_words()} == set(verdict.SEVERITY)


def _words() -> set[str]:
    return {value for name, value in vars(verdict).items() if name.startswith("_") and isinstance(value, str)}


looks = st.builds(
    Look,
    st.sampled_from([True, False, None]),
    st.sampled_from(["S", "R", "D", None]),
    st.sampled_from([True, False, None]),
    st.sampled_from(["ppoll", "futex", None]),
    st.integers(0, 2),
)


@given(st.lists(looks, max_size=4), st.sampled_from([None, 0, 1]), st.booleans())
def test_no_lost_wakeup_without_its_evidence(seen: list[Look], bell: int | None, missing: bool) -> None:
    facts = replace(DONE, looks=tuple(seen), bell_count=bell, missing=("something",) if missing else ())
    cause = judge(facts).cause
    as_evidence(facts)
    if cause == "lost-wakeup":
        assert not missing
        assert all(look.scheduled is False for look in seen)
        assert any(look.parked for look in seen)  # DONE has no stack, which alone could tell otherwise
    if cause == "lost-kick":
        assert all(look.scheduled and look.parked for look in seen)
