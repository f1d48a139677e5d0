"""The probe programs count what really happened: a pool in miniature decides what that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel import attaching
from tests.kernel.attaching import (
    ALERT_ONLY,
    Variant,
    attached,
    counts,
    in_every_way,
    load,
    open_kernel_objects,
    small,
    total,
)
from tests.kernel.miniature import ELEMENT, Miniature, build
from tracer import kernel, probes
from tracer.errors import AioTraceError, ProbeError
from tracer.executable import Executable
from tracer.maps import (
    COUNTERS,
    FLAG_BEFORE,
    FLAG_NO_CALLBACK,
    KINDS,
    THE_PROCESS,
    WAYS,
    Record,
    bucket_upper_ns,
    set_of,
)
from tracer.probes import Probes
from tracer.sites.model import SITE_NAMES


@in_every_way
def test_asked_for_23_seen_23(pool: Miniature, variant: Variant) -> None:
    with attached(pool) as loaded:
        pool.do("r23")
        assert counts(loaded) == {"submitted": 23, "done": 23, "completed": 23}
        assert loaded.completed() == 23
        assert [stage.count for stage in total(loaded).stages] == [23] * 3
        assert loaded.records() == {}


def test_stages_add_up(pool: Miniature, variant: Variant) -> None:
    """Nothing is measured twice or not at all: the two stages of a request are its total, to the nanosecond."""
    with attached(pool) as loaded:
        pool.do("s0 d0 c0")
        to_done, to_callback, whole = (stage.max_ns for stage in total(loaded).stages)
        assert to_done + to_callback == whole
        assert min(to_done, to_callback) > 0


@in_every_way
def test_counts_are_exact_on_several_processors(pool: Miniature, variant: Variant) -> None:
    with attached(pool) as loaded:
        pool.do("r6000")
        assert counts(loaded) == {"submitted": 6000, "done": 6000, "completed": 6000}
        assert [stage.count for stage in total(loaded).stages] == [6000] * 3
        assert loaded.records() == {}


def test_counts_are_exact_when_callbacks_overtake_their_done(pool: Miniature, variant: Variant) -> None:
    """As in QEMU a request may be called back, and its memory used again, before its worker reaches the site."""
    with attached(pool) as loaded:
        pool.do("q5000")
        # A worker that reaches the site at last marks the next request at that address: not a count.
        assert counts(loaded) == {"submitted": 5000, "done": 5000, "completed": 5000}
        assert loaded.records() == {}


def test_callbacks_overtake_their_done_without_submit(pool: Miniature, variant: Variant, settled: None) -> None:
    """Where two hits at one address are on two processors at once, one record may be left: memory shows it gone."""
    with attached(pool, ALERT_ONLY) as loaded:
        pool.do("q5000")
        assert counts(loaded)["completed"] == 5000
        left = len(loaded.records())
        assert left <= 2
        assert counts(loaded)["done"] <= 5002


def test_a_request_on_its_way(pool: Miniature, variant: Variant) -> None:
    with attached(pool) as loaded:
        pool.do("s7")
        record = loaded.record(pool.element(7))
        assert record is not None
        assert (record.request, record.done_ns, record.flags) == (pool.element(7), 0, 0)
        pool.do("d7")
        done = loaded.record(pool.element(7))
        assert done is not None
        assert done.submit_ns == record.submit_ns < done.done_ns
        assert loaded.records() == {done.request: done}
        pool.do("c7")
        assert loaded.record(pool.element(7)) is None


def test_callback_before_its_done(pool: Miniature, variant: Variant) -> None:
    """The late hit finds no request and is not counted again."""
    with attached(pool) as loaded:
        pool.do("s0 c0 d0")
        assert counts(loaded) == {"submitted": 1, "done": 1, "completed": 1}
        assert [stage.count for stage in total(loaded).stages] == [1, 1, 1]


def test_late_done_of_an_earlier_request(pool: Miniature, variant: Variant) -> None:
    """It hits the next request at that address; that one's own hit corrects the time."""
    with attached(pool) as loaded:
        pool.do("s0 c0 s0 d0")
        early = loaded.record(pool.element(0))
        pool.do("d0")
        late = loaded.record(pool.element(0))
        assert early is not None
        assert late is not None
        assert 0 < early.done_ns < late.done_ns
        pool.do("c0")
        assert counts(loaded) == {"submitted": 2, "done": 2, "completed": 2}


@pytest.mark.parametrize("order", ["s1 x1 c1", "s1 s2 x1 c1 d2 c2"])
def test_cancelled_requests(pool: Miniature, variant: Variant, order: str) -> None:
    """No worker ever had it: thread_pool_cancel wrote THREAD_DONE and -ECANCELED."""
    with attached(pool) as loaded:
        pool.do(order)
        others = order.count("s") - 1
        seen = counts(loaded)
        assert seen["cancelled"] == 1
        assert (seen.get("done", 0), seen.get("completed", 0)) == (others, others)
        assert [stage.count for stage in total(loaded).stages] == [others] * 3


def test_cancelled_too_late(pool: Miniature) -> None:
    """A request whose worker was through, and whose own result is -ECANCELED, is complete."""
    with attached(pool) as loaded:
        pool.do("s1 d1 x1 c1")
        assert counts(loaded) == {"submitted": 1, "done": 1, "completed": 1}


def test_requests_without_callback(pool: Miniature) -> None:
    """Being done is all that happens to them."""
    with attached(pool) as loaded:
        pool.do("n3 s3")
        record = loaded.record(pool.element(3))
        assert record is not None
        assert record.flags == FLAG_NO_CALLBACK
        pool.do("d3")
        assert counts(loaded) == {"submitted": 1, "done": 1, "completed": 1, "no_callback": 1}
        assert loaded.records() == {}


def test_addresses_used_again(pool: Miniature, variant: Variant) -> None:
    """glib's allocator gives the same memory to the next request at once."""
    with attached(pool) as loaded:
        pool.do("s0 d0 c0 " * 1000)
        assert counts(loaded) == {"submitted": 1000, "done": 1000, "completed": 1000}
        assert loaded.records() == {}


def test_an_end_that_was_not_seen(pool: Miniature, variant: Variant) -> None:
    """The address comes back though the map holds its last request: that is counted as a miss."""
    with attached(pool) as loaded:
        pool.do("s0")
        first = loaded.record(pool.element(0))
        pool.do("s0")
        second = loaded.record(pool.element(0))
        assert first is not None
        assert second is not None
        assert first.submit_ns < second.submit_ns
        assert counts(loaded) == {"submitted": 2, "missed": 1}
        assert loaded.records() == {pool.element(0): second}


def test_an_end_that_was_not_seen_without_submit(pool: Miniature, variant: Variant, settled: None) -> None:
    with attached(pool, ALERT_ONLY) as loaded:
        pool.do("d0 d0")
        assert counts(loaded) == {"done": 2, "missed": 1}
        assert len(loaded.records()) == 1


def room(pool: Miniature, variant: Variant, slots: int) -> int:
    """How many of that many requests can be followed with small()."""
    if not variant.atomics:
        return 4
    number = pool.pid if variant.shared else THE_PROCESS
    sets = [set_of(pool.element(slot), number, 1) for slot in range(slots)]
    assert min(sets.count(0), sets.count(1)) >= WAYS + 4
    return 2 * WAYS + 4


@in_every_way
def test_a_full_map_is_counted(pool: Miniature, variant: Variant) -> None:
    """What cannot be followed is counted as such, and nothing is invented at its end."""
    with attached(pool, what=small()) as loaded:
        followed = room(pool, variant, 64)
        pool.do(" ".join(f"s{slot}" for slot in range(64)))
        assert counts(loaded) == {"submitted": 64, "map_full": 64 - followed}
        records = loaded.records()
        assert len(records) == followed
        assert records.keys() <= {pool.element(slot) for slot in range(64)}
        assert {address: loaded.record(address) for address in records} == records
        pool.do(" ".join(f"d{slot} c{slot}" for slot in range(64)))
        seen = counts(loaded)
        assert (seen["submitted"], seen["completed"], seen["before"]) == (64, followed, 64 - followed)
        assert loaded.records() == {}
        pool.do("s0 d0 c0")
        assert counts(loaded)["completed"] == followed + 1


def test_a_full_map_without_submit(pool: Miniature, variant: Variant) -> None:
    with attached(pool, ALERT_ONLY, small()) as loaded:
        followed = room(pool, variant, 64)
        pool.do(" ".join(f"d{slot}" for slot in range(64)))
        assert counts(loaded) == {"done": 64, "map_full": 64 - followed}
        assert len(loaded.records()) == followed


def test_done_and_callback_alone(pool: Miniature, variant: Variant) -> None:
    with attached(pool, ALERT_ONLY) as loaded:
        pool.do("r23 s1 x1 c1 s2 d2")
        assert counts(loaded) == {"done": 24, "completed": 23, "cancelled": 1}
        assert [stage.count for stage in total(loaded).stages] == [0, 23, 0]
        (left,) = loaded.records().values()
        assert (left.request, left.submit_ns) == (pool.element(2), 0)
        assert left.done_ns > 0


@pytest.fixture
def slot(request: pytest.FixtureRequest) -> int:
    """A request; those before it in the list have filled the sets of small() where it is to be besides."""
    return 64 if request.param else 0


IN_A_SET_AND_BESIDES = pytest.mark.parametrize(
    ("variant", "slot"),
    [(Variant(), 0), (Variant(), 1), (Variant(atomics=False), 0), (Variant(shared=True), 1)],
    ids=["in a set", "besides", "no atomics", "shared, besides"],
    indirect=True,
)


def crowd(stage: str, slot: int) -> str:
    """Fill both sets, and no more: what comes later is in the map `overflow`."""
    return " ".join(f"{stage}{other}" for other in range(slot))


@IN_A_SET_AND_BESIDES
def test_a_callback_that_came_first_is_no_record(pool: Miniature, variant: Variant, settled: None, slot: int) -> None:
    """What stands for it is cleared away by its done hit, and by that one only."""
    with attached(pool, ALERT_ONLY, small(max_requests=100)) as loaded:
        pool.do(crowd("d", slot))
        others = loaded.records()
        pool.do(f"c{slot}")
        assert counts(loaded)["completed"] == 1
        assert loaded.record(pool.element(slot)) is None
        assert loaded.records() == others
        pool.do(f"d{slot}")
        assert loaded.records() == others
        assert counts(loaded) == {"done": slot + 1, "completed": 1}
        pool.do(f"d{slot}")
        assert loaded.records().keys() == {*others, pool.element(slot)}
        assert counts(loaded) == {"done": slot + 2, "completed": 1}


@IN_A_SET_AND_BESIDES
def test_callbacks_that_came_first_one_after_the_other(
    pool: Miniature, variant: Variant, settled: None, slot: int
) -> None:
    """Two workers are late at one address: each done hit is one's own, the third a new request's."""
    with attached(pool, ALERT_ONLY, small(max_requests=100)) as loaded:
        pool.do(f"{crowd('d', slot)} c{slot} c{slot} d{slot}")
        assert len(loaded.records()) == slot
        pool.do(f"c{slot} d{slot} d{slot}")
        assert len(loaded.records()) == slot
        assert counts(loaded) == {"done": slot + 3, "completed": 3}
        pool.do(f"d{slot}")
        record = loaded.record(pool.element(slot))
        assert record is not None
        assert (record.submit_ns, record.flags) == (0, 0)
        assert len(loaded.records()) == slot + 1


@IN_A_SET_AND_BESIDES
def test_a_callback_that_came_first_long_ago(
    pool: Miniature, variant: Variant, settled: None, slot: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A done hit so late is another request's, which must not go unseen."""
    monkeypatch.setattr(probes, "CALLED_FOR_NS", 0)
    with attached(pool, ALERT_ONLY, small(max_requests=100)) as loaded:
        pool.do(f"{crowd('d', slot)} c{slot} c{slot} d{slot}")
        record = loaded.record(pool.element(slot))
        assert record is not None
        assert record.done_ns > record.submit_ns == record.flags == 0
        assert counts(loaded) == {"done": slot + 3, "completed": 2}


def test_a_request_done_while_the_probes_were_attached(pool: Miniature, variant: Variant) -> None:
    """Its done hit was not seen, and its callback is not taken for one that came first: the next one is followed.

    It would be lost without a record, and so would every later one at this address.
    """
    with attached(pool, ALERT_ONLY) as loaded:
        pool.do("c0 d0")
        assert loaded.records().keys() == {pool.element(0)}
        pool.do("c0 d0")
        assert loaded.records().keys() == {pool.element(0)}
        assert counts(loaded) == {"done": 3, "completed": 2}


def test_a_done_that_comes_late_while_the_probes_are_attached(pool: Miniature, variant: Variant) -> None:
    """Its record is the next one's at that address; only the count of what was done is one too high."""
    with attached(pool, ALERT_ONLY) as loaded:
        pool.do("c0 d0 d0 c0")
        assert counts(loaded) == {"done": 3, "completed": 2, "missed": 1}
        assert loaded.records() == {}


@IN_A_SET_AND_BESIDES
def test_cancelled_without_submit(pool: Miniature, variant: Variant, settled: None, slot: int) -> None:
    """Also where a callback came first at this address."""
    with attached(pool, ALERT_ONLY, small(max_requests=100)) as loaded:
        pool.do(f"{crowd('d', slot)} x{slot} c{slot}")
        assert counts(loaded) == {"cancelled": 1} | ({"done": slot} if slot else {})
        pool.do(f"c{slot} x{slot} c{slot} d{slot}")
        assert counts(loaded) == {"cancelled": 2, "done": slot + 1, "completed": 1}
        assert len(loaded.records()) == slot


def kind_of(pool: Miniature, loaded: Probes, aio_type: int) -> str:
    """As what one request of that type is counted."""
    before = {subject: seen.completed for subject, seen in loaded.statistics().items()}
    pool.do(f"t0={aio_type} s0 d0 c0")
    after = {subject: seen.completed for subject, seen in loaded.statistics().items()}
    ((kind, _fd),) = (subject for subject in after if after[subject] == before.get(subject, 0) + 1)
    return kind


def test_kinds(pool: Miniature) -> None:
    """The bits of RawPosixAIOData.aio_type, with or without flags such as QEMU_AIO_BLKDEV."""
    with attached(pool) as loaded:
        assert [kind_of(pool, loaded, 1 << bit) for bit in range(8)] == list(KINDS[1:])
        assert [kind_of(pool, loaded, 1 << bit | 0x2000) for bit in range(8)] == list(KINDS[1:])
        assert kind_of(pool, loaded, 0x30) == "write-zeroes"  # and unmap where that can be done


def test_arguments_of_others(pool: Miniature) -> None:
    """No kind is guessed for qcow2's compression and its like, or where the argument cannot be read."""
    with attached(pool) as loaded:
        kinds = {aio_type: kind_of(pool, loaded, aio_type) for aio_type in (0, 3, 0x100, 0x18000, -1)}
        assert set(kinds.values()) == {"other"}, kinds
        assert {fd for (_kind, fd), seen in loaded.statistics().items() if seen.completed} == {None}


def test_files(pool: Miniature, variant: Variant) -> None:
    """Requests are counted by the descriptor in their arguments, the largest and 0 as well."""
    with attached(pool) as loaded:
        pool.do("t0=1 f0=7 s0 d0 c0 s0 d0 c0 t1=2 f1=7 s1 d1 c1 t2=2 f2=0 s2 d2 c2 t3=8 f3=2147483647 s3 t4=1 f4=-1 s4")
        seen = {subject: (each.submitted, each.completed) for subject, each in loaded.statistics().items()}
        assert seen == {
            ("read", 7): (2, 2),
            ("write", 7): (1, 1),
            ("write", 0): (1, 1),
            ("flush", 2147483647): (1, 0),
            ("read", None): (1, 0),
            ("other", None): (0, 0),
        }
        assert loaded.records()[pool.element(3)].subject == ("flush", 2147483647)


def test_more_files_than_are_told_apart(pool: Miniature, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are counted by their kind only: none is lost."""
    monkeypatch.setattr(probes, "_max_statistics", lambda _: len(KINDS) + 3)
    with attached(pool) as loaded:
        pool.do(" ".join(f"t{slot}={1 + slot % 2} f{slot}={slot} s{slot} d{slot} c{slot}" for slot in range(20)))
        seen = loaded.statistics()
        assert counts(loaded) == {"submitted": 20, "done": 20, "completed": 20}
        assert {subject for subject, each in seen.items() if each.completed} == {
            ("read", 0),
            ("write", 1),
            ("read", 2),
            ("read", None),
            ("write", None),
        }
        assert (seen["read", None].completed, seen["write", None].completed) == (8, 9)


def test_requests_from_before(pool: Miniature, variant: Variant) -> None:
    """Their end is seen, but they are neither counted nor timed with those that were seen from the start."""
    pool.do("s0 s1")
    with attached(pool) as loaded:
        first, second = pool.element(0), pool.element(1)
        loaded.adopt(first, "flush", 1000, done=False)
        loaded.adopt(second, "read", 2000, done=True)
        records = loaded.records()
        assert [records[a].flags for a in (first, second)] == [FLAG_BEFORE, FLAG_BEFORE]
        assert (records[first].kind, records[first].done_ns, records[second].done_ns) == ("flush", 0, 2000)
        pool.do("d0")
        assert loaded.records()[first].done_ns > 2000
        pool.do("c0 c1")
        assert counts(loaded) == {"before": 2}
        assert loaded.records() == {}


def test_requests_from_before_without_submit(pool: Miniature, variant: Variant, settled: None) -> None:
    with attached(pool, ALERT_ONLY) as loaded:
        loaded.adopt(pool.element(0), "flush", 1000, done=False)
        loaded.adopt(pool.element(1), "read", 2000, done=True)
        pool.do("d0")
        assert loaded.records()[pool.element(0)].done_ns > 2000
        pool.do("c0 c1 d2 c2")
        assert counts(loaded) == {"done": 1, "completed": 1, "before": 2}
        assert loaded.records() == {}


def test_a_request_from_before_that_is_cancelled(pool: Miniature, variant: Variant) -> None:
    with attached(pool) as loaded:
        loaded.adopt(pool.element(0), "flush", 1000, done=False)
        pool.do("x0 c0")
        assert counts(loaded) == {"before": 1}
        assert loaded.records() == {}


def test_a_request_from_before_whose_end_was_not_seen(pool: Miniature, variant: Variant) -> None:
    """The address is used again: a new request, and nothing that the probes have missed."""
    with attached(pool) as loaded:
        loaded.adopt(pool.element(0), "flush", 1000, done=True)
        pool.do("s0")
        record = loaded.record(pool.element(0))
        assert record is not None
        assert (record.done_ns, record.before, record.flags) == (0, False, 0)
        assert loaded.records() == {record.request: record}
        pool.do("d0 c0")
        assert counts(loaded) == {"submitted": 1, "done": 1, "completed": 1}
        assert loaded.records() == {}


def test_the_same_without_submit(pool: Miniature, variant: Variant, settled: None) -> None:
    """Who can tell the two apart: it counts as from before, and the next one as itself."""
    with attached(pool, ALERT_ONLY) as loaded:
        loaded.adopt(pool.element(0), "flush", 1000, done=True)
        pool.do("d0 c0 d0")
        assert loaded.records().keys() == {pool.element(0)}
        pool.do("c0")
        assert counts(loaded) == {"done": 1, "completed": 1, "before": 1}
        assert loaded.records() == {}


def test_adopting_late(pool: Miniature, variant: Variant) -> None:
    """A submit between the look and the adoption: the probes' own record is the true one, and the only one."""
    with attached(pool) as loaded:
        pool.do("s0")
        known = loaded.record(pool.element(0))
        assert known is not None
        loaded._programs.adopt(pool.pid, Record(pool.element(0), 5, 0, "flush", FLAG_BEFORE), known=False)
        assert loaded.records() == {pool.element(0): known}
        pool.do("d0 c0")
        assert loaded.records() == {}
        assert counts(loaded) == {"submitted": 1, "done": 1, "completed": 1}


@IN_A_SET_AND_BESIDES
def test_adopting_changes_nothing_that_probes_saw(pool: Miniature, variant: Variant, slot: int) -> None:
    with attached(pool, what=small(max_requests=100)) as loaded:
        pool.do(f"{crowd('s', slot)} s{slot} d{slot}")
        known = loaded.records()
        loaded.adopt(pool.element(slot), "other", 5, done=True)
        assert loaded.records() == known


def test_adopting_again_marks_what_became_done_meanwhile(pool: Miniature, variant: Variant) -> None:
    with attached(pool) as loaded:
        loaded.adopt(pool.element(0), "read", 5, done=False)
        loaded.adopt(pool.element(0), "read", 9, done=True)
        record = loaded.record(pool.element(0))
        assert record is not None
        assert (record.submit_ns, record.done_ns) == (5, 9)


@IN_A_SET_AND_BESIDES
def test_forgetting_takes_the_very_record_only(pool: Miniature, variant: Variant, slot: int) -> None:
    with attached(pool, what=small(max_requests=100)) as loaded:
        pool.do(f"{crowd('s', slot)} s{slot}")
        first = loaded.record(pool.element(slot))
        assert first is not None
        pool.do(f"d{slot} c{slot} s{slot}")
        loaded.forget(first)
        second = loaded.record(pool.element(slot))
        assert second is not None
        loaded.forget(second)
        loaded.forget(second)
        assert loaded.record(pool.element(slot)) is None
        assert len(loaded.records()) == slot
        # Submitted it was all the same.
        assert counts(loaded) == {"submitted": slot + 2, "done": 1, "completed": 1}
        pool.do(f"s{slot} d{slot} c{slot}")
        assert counts(loaded) == {"submitted": slot + 3, "done": 2, "completed": 2}


def test_what_is_forgotten_makes_room(pool: Miniature, variant: Variant) -> None:
    with attached(pool, what=small()) as loaded:
        for _ in range(3):
            pool.do(crowd("s", 64))
            assert len(loaded.records()) == room(pool, variant, 64)
            for record in loaded.records().values():
                loaded.forget(record)
            assert loaded.records() == {}


@pytest.mark.parametrize("way", ["batches", "one by one"])
def test_no_record_is_left_out(pool: Miniature, variant: Variant, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Those that stand still are all read, however full the maps are."""
    if way == "one by one":
        monkeypatch.setattr(kernel.Map, "_batches", lambda self: None)
    slots = range(probes.MAX_REQUESTS)
    with attached(pool, what=small(set_bits=10, max_requests=probes.MAX_REQUESTS)) as loaded:
        pool.do(" ".join(f"s{slot}" for slot in slots))
        assert counts(loaded) == {"submitted": len(slots)}
        besides = len(list(loaded._programs._maps["overflow"].items()))
        assert besides == len(slots) - (WAYS << 10 if variant.atomics else 0)
        assert loaded.records().keys() == {pool.element(slot) for slot in slots}
        assert loaded.records()[pool.element(99)] == loaded.record(pool.element(99))


def test_standing_records_are_read_among_others_that_come_and_go(pool: Miniature, variant: Variant) -> None:
    """A record that is missed once would be told as resolved."""
    with attached(pool, what=small(set_bits=5, max_requests=1024)) as loaded:
        pool.do(" ".join(f"s{slot} d{slot}" for slot in range(500)))
        standing = {address: loaded.record(address) for address in map(pool.element, range(500))}
        pool.begin("r6000")
        while total(loaded).completed < 6000:
            seen = loaded.records()
            assert {address: seen.get(address) for address in standing} == standing
        pool.end()
        assert loaded.records() == standing


def test_figures_never_go_backwards(pool: Miniature, variant: Variant) -> None:
    """Read while the probes count on, each period's difference is sound."""
    with attached(pool) as loaded:
        pool.begin("r6000")
        before = total(loaded)
        while before.completed < 6000:
            now = total(loaded)
            for name in COUNTERS:
                assert getattr(now, name) >= getattr(before, name)
            for then, later in zip(before.stages, now.stages):
                assert all(b >= a for a, b in zip(then.buckets, later.buckets))
            before = now
        pool.end()


def test_the_maximum_is_in_the_highest_bucket(pool: Miniature) -> None:
    with attached(pool) as loaded:
        pool.do("r1000")
        for stage in total(loaded).stages:
            highest = max(index for index, count in enumerate(stage.buckets) if count)
            assert bucket_upper_ns(highest - 1) < stage.max_ns <= bucket_upper_ns(highest)


@pytest.mark.parametrize("options", [("-fno-pie", "-no-pie"), ("-fPIE", "-pie")], ids=["no pie", "pie"])
def test_fixed_and_position_independent_programs(tmp_path: Path, variant: Variant, options: tuple[str, ...]) -> None:
    with Miniature(build(tmp_path, *options)) as pool, attached(pool) as loaded:
        pool.do("r23 s5")
        assert counts(loaded) == {"submitted": 24, "done": 23, "completed": 23}
        assert loaded.records().keys() == {pool.element(5)}


@in_every_way
def test_a_program_deleted_under_the_process(tmp_path: Path, variant: Variant) -> None:
    """An upgrade of the package leaves the old QEMU running."""
    program = build(tmp_path)
    with Miniature(program) as pool:
        program.unlink()
        with attached(pool) as loaded:
            pool.do("r23")
            assert counts(loaded)["completed"] == 23


@in_every_way
def test_only_the_chosen_process_is_counted(program: Path, pool: Miniature, variant: Variant) -> None:
    with Miniature(program) as other, attached(pool) as loaded:
        other.do("r50")
        pool.do("r23")
        assert counts(loaded)["completed"] == 23


@in_every_way
def test_nothing_is_left_attached(pool: Miniature, variant: Variant) -> None:
    """The site's own instruction is back, and no descriptor holds anything."""
    probes._has_multi()
    original, held = pool.site_bytes(), open_kernel_objects()
    with attached(pool):
        probed = pool.site_bytes()
        assert all(probed[name] != original[name] for name in SITE_NAMES)
        assert open_kernel_objects() > held
    assert pool.site_bytes() == original
    assert open_kernel_objects() == held


def test_nothing_is_left_of_probes_that_were_only_loaded(pool: Miniature) -> None:
    held = open_kernel_objects()
    load(pool).close()
    assert open_kernel_objects() == held


@in_every_way
def test_a_failed_attachment_takes_the_others_back(pool: Miniature, variant: Variant) -> None:
    """The submit site is attached last; here it lies outside the file."""
    original, held = pool.site_bytes(), open_kernel_objects()
    nowhere = replace(pool.sites["submit"], offset=0x7FFFFFFF0000)
    sites = [nowhere, pool.sites["done"], pool.sites["callback"]]
    loaded = Probes(pool.pid, pool.file, sites, ELEMENT, attaching.PARAMETERS)
    with pytest.raises(ProbeError, match="attach"):
        loaded.attach()
    assert pool.site_bytes() == original
    assert open_kernel_objects() == held


def test_a_program_that_does_not_compile(pool: Miniature) -> None:
    """bcc's bare exception becomes one sentence with the compiler's own words, and the rest a note."""
    strange = [replace(site, register="xmm0") for site in pool.sites.values()]
    with pytest.raises(ProbeError) as caught:
        Probes(pool.pid, pool.file, strange, ELEMENT)
    assert "error:" in caught.value.message
    assert "\n" not in caught.value.message
    assert any("aio_trace.c" in note or "main.c" in note for note in caught.value.__notes__)


def test_a_process_that_has_ended(program: Path) -> None:
    with Miniature(program) as gone:
        sites = list(gone.sites.values())
    with Executable.open(program) as file:
        loaded = Probes(gone.pid, file, sites, ELEMENT)
        with pytest.raises(AioTraceError):
            loaded.attach()


def test_bcc_prints_nothing(pool: Miniature, capfd: pytest.CaptureFixture[str]) -> None:
    with attached(pool) as loaded:
        pool.do("r23")
        loaded.records()
        loaded.statistics()
    assert capfd.readouterr() == ("", "")
