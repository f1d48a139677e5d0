"""The probe programs count what really happened: a pool in miniature decides what that is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.miniature import ELEMENT, Miniature, build
from tracer import probes
from tracer.errors import AioTraceError, ProbeError
from tracer.figures import combined
from tracer.layout import ElementLayout
from tracer.probes import FLAG_BEFORE, FLAG_NO_CALLBACK, KINDS, Parameters, Probes, Statistics, bucket_upper_ns
from tracer.sites.model import SITE_NAMES, Site

ALERT_ONLY = ("done", "callback")


@contextmanager
def attached(pool: Miniature, names: tuple[str, ...] = SITE_NAMES, max_requests: int = 10240) -> Iterator[Probes]:
    """Probes on the pool's sites of those names."""
    loaded = Probes(pool.pid, [pool.sites[name] for name in names], ELEMENT, Parameters(max_requests))
    try:
        loaded.attach()
        yield loaded
    finally:
        loaded.close()


@pytest.fixture(params=[True, False], ids=["cmpxchg", "no cmpxchg"])
def either_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs for kernels from 5.12 on, and those for older ones."""
    flags = probes.compile_flags

    def chosen(sites: Sequence[Site], element: ElementLayout, what: Parameters, _cmpxchg: bool) -> list[str]:
        return flags(sites, element, what, request.param)

    monkeypatch.setattr(probes, "compile_flags", chosen)


def counts(loaded: Probes) -> dict[str, int]:
    """All counters that are not zero, over all kinds."""
    total = combined(loaded.statistics().values())
    return {name: value for name in probes.COUNTERS if (value := getattr(total, name))}


def total(loaded: Probes) -> Statistics:
    return combined(loaded.statistics().values())


def test_asked_for_23_seen_23(pool: Miniature, either_program: None) -> None:
    with attached(pool) as loaded:
        pool.do("r23")
        assert counts(loaded) == {"submitted": 23, "done": 23, "completed": 23}
        for stage in total(loaded).stages:
            assert stage.count == sum(stage.buckets) == 23
            assert stage.max_ns <= stage.sum_ns
        assert loaded.records() == {}


def test_stages_add_up(pool: Miniature) -> None:
    """Nothing is measured twice or not at all: the two stages together are the total, to the nanosecond."""
    with attached(pool) as loaded:
        pool.do("r1000")
        to_done, to_callback, whole = (stage.sum_ns for stage in total(loaded).stages)
        assert to_done + to_callback == whole > 0


def test_counts_are_exact_on_several_processors(pool: Miniature, either_program: None) -> None:
    with attached(pool) as loaded:
        pool.do("r20000")
        assert counts(loaded) == {"submitted": 20000, "done": 20000, "completed": 20000}
        assert [stage.count for stage in total(loaded).stages] == [20000] * 3
        assert loaded.records() == {}


def test_counts_are_exact_when_callbacks_overtake_their_done(pool: Miniature) -> None:
    """As in QEMU a request may be called back, and its memory used again, before its worker reaches the site."""
    with attached(pool) as loaded:
        pool.do("q5000")
        seen = counts(loaded)
        # A worker that reaches the site at last marks the next request at that address: not a count.
        assert (seen["submitted"], seen["completed"]) == (5000, 5000)
        assert seen["done"] == 5000
        assert "missed" not in seen
        assert loaded.records() == {}


def test_a_request_on_its_way(pool: Miniature) -> None:
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


def test_callback_before_its_done(pool: Miniature, either_program: None) -> None:
    """The late hit finds no request and is not counted again."""
    with attached(pool) as loaded:
        pool.do("s0 c0 d0")
        assert counts(loaded) == {"submitted": 1, "done": 1, "completed": 1}
        assert [stage.count for stage in total(loaded).stages] == [1, 1, 1]


def test_late_done_of_an_earlier_request(pool: Miniature, either_program: None) -> None:
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
def test_cancelled_requests(pool: Miniature, either_program: None, order: str) -> None:
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


def test_addresses_used_again(pool: Miniature, either_program: None) -> None:
    """glib's allocator gives the same memory to the next request at once."""
    with attached(pool) as loaded:
        pool.do("s0 d0 c0 " * 1000)
        assert counts(loaded) == {"submitted": 1000, "done": 1000, "completed": 1000}
        assert loaded.records() == {}


def test_an_end_that_was_not_seen(pool: Miniature) -> None:
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


def test_a_full_map_is_counted(pool: Miniature, either_program: None) -> None:
    """Four can be followed, ten are under way: six are counted as such, nothing is invented at their end."""
    with attached(pool, max_requests=4) as loaded:
        pool.do(" ".join(f"s{slot}" for slot in range(10)))
        assert counts(loaded) == {"submitted": 10, "map_full": 6}
        followed = loaded.records()
        assert len(followed) == 4
        assert followed.keys() <= {pool.element(slot) for slot in range(10)}
        pool.do(" ".join(f"d{slot} c{slot}" for slot in range(10)))
        seen = counts(loaded)
        assert (seen["done"], seen["completed"], seen["before"]) == (4, 4, 6)
        assert loaded.records() == {}
        pool.do("s0 d0 c0")
        assert counts(loaded)["completed"] == 5


def test_a_full_map_without_submit(pool: Miniature) -> None:
    with attached(pool, ALERT_ONLY, max_requests=4) as loaded:
        pool.do(" ".join(f"d{slot}" for slot in range(10)))
        assert counts(loaded) == {"done": 10, "map_full": 6}
        assert len(loaded.records()) == 4


def test_done_and_callback_alone(pool: Miniature, either_program: None) -> None:
    with attached(pool, ALERT_ONLY) as loaded:
        pool.do("r23 s1 x1 c1 s2 d2")
        assert counts(loaded) == {"done": 24, "completed": 23, "cancelled": 1}
        assert [stage.count for stage in total(loaded).stages] == [0, 23, 0]
        (left,) = loaded.records().values()
        assert (left.request, left.submit_ns) == (pool.element(2), 0)
        assert left.done_ns > 0


@pytest.mark.parametrize("bit", range(8))
def test_kinds(pool: Miniature, bit: int) -> None:
    """The bits of RawPosixAIOData.aio_type, with or without flags such as QEMU_AIO_BLKDEV."""
    with attached(pool) as loaded:
        pool.do(f"t0={1 << bit} s0 d0 c0 t1={1 << bit | 0x2000} s1 d1 c1")
        assert {kind for (kind, _fd), seen in loaded.statistics().items() if seen.submitted} == {KINDS[bit + 1]}
        assert total(loaded).completed == 2


def test_zeroes_that_may_unmap(pool: Miniature) -> None:
    with attached(pool) as loaded:
        pool.do("t0=0x30 s0 d0 c0")
        assert {kind for (kind, _fd), seen in loaded.statistics().items() if seen.submitted} == {"write-zeroes"}


@pytest.mark.parametrize("aio_type", [0, 3, 0x100, 0x18000, -1])
def test_arguments_of_others(pool: Miniature, aio_type: int) -> None:
    """No kind is guessed for qcow2's compression and its like, or where the argument cannot be read."""
    with attached(pool) as loaded:
        pool.do(f"t0={aio_type} s0 d0 c0")
        assert {kind for (kind, _fd), seen in loaded.statistics().items() if seen.submitted} == {"other"}


def test_requests_from_before(pool: Miniature) -> None:
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


def test_adopting_changes_nothing_that_probes_saw(pool: Miniature) -> None:
    with attached(pool) as loaded:
        pool.do("s0 d0")
        known = loaded.record(pool.element(0))
        loaded.adopt(pool.element(0), "other", 5, done=True)
        assert loaded.record(pool.element(0)) == known


def test_adopting_again_marks_what_became_done_meanwhile(pool: Miniature) -> None:
    with attached(pool) as loaded:
        loaded.adopt(pool.element(0), "read", 5, done=False)
        loaded.adopt(pool.element(0), "read", 9, done=True)
        record = loaded.record(pool.element(0))
        assert record is not None
        assert (record.submit_ns, record.done_ns) == (5, 9)


def test_forgetting_takes_the_very_record_only(pool: Miniature) -> None:
    with attached(pool) as loaded:
        pool.do("s0")
        first = loaded.record(pool.element(0))
        assert first is not None
        pool.do("d0 c0 s0")
        loaded.forget(first)
        second = loaded.record(pool.element(0))
        assert second is not None
        loaded.forget(second)
        assert loaded.record(pool.element(0)) is None


@pytest.mark.parametrize("way", ["batches", "one by one"])
def test_no_record_is_left_out(pool: Miniature, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Those that stand still are all read, however full the map is."""
    if way == "one by one":
        monkeypatch.setattr(Probes, "_batches", lambda self: None)
    with attached(pool) as loaded:
        pool.do(" ".join(f"s{slot}" for slot in range(10240)))
        assert counts(loaded) == {"submitted": 10240}
        assert loaded.records().keys() == {pool.element(slot) for slot in range(10240)}
        assert loaded.records()[pool.element(99)] == loaded.record(pool.element(99))


def test_standing_records_are_read_among_others_that_come_and_go(pool: Miniature) -> None:
    """A record that is missed once would be told as resolved."""
    with attached(pool, max_requests=1024) as loaded:
        pool.do(" ".join(f"s{slot} d{slot}" for slot in range(500)))
        standing = {address: loaded.record(address) for address in map(pool.element, range(500))}
        pool.begin("r20000")
        while total(loaded).completed < 20000:
            seen = loaded.records()
            assert {address: seen.get(address) for address in standing} == standing
        pool.end()
        assert loaded.records() == standing


def test_figures_never_go_backwards(pool: Miniature) -> None:
    """Read while the probes count on, each period's difference is sound."""
    with attached(pool) as loaded:
        pool.begin("r20000")
        before = total(loaded)
        while before.completed < 20000:
            now = total(loaded)
            for name in probes.COUNTERS:
                assert getattr(now, name) >= getattr(before, name)
            for then, later in zip(before.stages, now.stages, strict=True):
                assert all(b >= a for a, b in zip(then.buckets, later.buckets, strict=True))
            before = now
        pool.end()


def test_the_maximum_is_in_the_highest_bucket(pool: Miniature) -> None:
    with attached(pool) as loaded:
        pool.do("r1000")
        for stage in total(loaded).stages:
            highest = max(index for index, count in enumerate(stage.buckets) if count)
            assert bucket_upper_ns(highest - 1) < stage.max_ns <= bucket_upper_ns(highest)


@pytest.mark.parametrize("options", [("-fno-pie", "-no-pie"), ("-fPIE", "-pie")], ids=["no pie", "pie"])
def test_fixed_and_position_independent_programs(tmp_path: Path, options: tuple[str, ...]) -> None:
    with Miniature(build(tmp_path, *options)) as pool, attached(pool) as loaded:
        pool.do("r23 s5")
        assert counts(loaded) == {"submitted": 24, "done": 23, "completed": 23}
        assert loaded.records().keys() == {pool.element(5)}


def test_a_program_deleted_under_the_process(tmp_path: Path) -> None:
    """An upgrade of the package leaves the old QEMU running."""
    program = build(tmp_path)
    with Miniature(program) as pool:
        program.unlink()
        with attached(pool) as loaded:
            pool.do("r23")
            assert counts(loaded)["completed"] == 23


def test_only_the_chosen_process_is_counted(program: Path, pool: Miniature) -> None:
    with Miniature(program) as other, attached(pool) as loaded:
        other.do("r50")
        pool.do("r23")
        assert counts(loaded)["completed"] == 23


def open_kernel_objects() -> int:
    """How many BPF and perf descriptors this process has."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return sum(1 for link in links if re.search(r"bpf|perf_event", link))


def test_nothing_is_left_attached(pool: Miniature) -> None:
    """The site's own instruction is back, and no descriptor holds anything."""
    original, held = pool.site_bytes(), open_kernel_objects()
    with attached(pool):
        probed = pool.site_bytes()
        assert all(probed[name] != original[name] for name in SITE_NAMES)
        assert open_kernel_objects() > held
    assert pool.site_bytes() == original
    assert open_kernel_objects() == held


def test_nothing_is_left_of_probes_that_were_only_loaded(pool: Miniature) -> None:
    held = open_kernel_objects()
    Probes(pool.pid, list(pool.sites.values()), ELEMENT).close()
    assert open_kernel_objects() == held


def test_a_failed_attachment_takes_the_others_back(pool: Miniature) -> None:
    """The submit site is attached last; here it lies outside the file."""
    original, held = pool.site_bytes(), open_kernel_objects()
    nowhere = replace(pool.sites["submit"], address=0x7FFFFFFF0000)
    with pytest.raises(ProbeError, match="attach"):
        attach_to(pool, [nowhere, pool.sites["done"], pool.sites["callback"]])
    assert pool.site_bytes() == original
    assert open_kernel_objects() == held


def attach_to(pool: Miniature, sites: list[Site]) -> None:
    Probes(pool.pid, sites, ELEMENT).attach()


def test_a_program_that_does_not_compile(pool: Miniature) -> None:
    """bcc's bare exception becomes one sentence with the compiler's own words, and the rest a note."""
    strange = [replace(site, register="xmm0") for site in pool.sites.values()]
    with pytest.raises(ProbeError) as caught:
        Probes(pool.pid, strange, ELEMENT)
    assert "error:" in caught.value.message
    assert "\n" not in caught.value.message
    assert any("aio_trace.c" in note or "main.c" in note for note in caught.value.__notes__)


def test_a_process_that_has_ended(program: Path) -> None:
    with Miniature(program) as gone:
        sites = list(gone.sites.values())
    loaded = Probes(gone.pid, sites, ELEMENT)
    with pytest.raises(AioTraceError):
        loaded.attach()


def test_bcc_prints_nothing(pool: Miniature, capfd: pytest.CaptureFixture[str]) -> None:
    with attached(pool) as loaded:
        pool.do("r23")
        loaded.records()
        loaded.statistics()
    assert capfd.readouterr() == ("", "")
