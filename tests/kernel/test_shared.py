"""One attachment for every process of an executable: each is counted by itself, and only those that are watched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kernel.attaching import ALERT_ONLY, attached, counts, open_kernel_objects
from tests.kernel.miniature import ELEMENT, Miniature, build
from tracer import probes
from tracer.errors import ProbeError
from tracer.maps import KINDS, RequestRecord
from tracer.probes import Parameters, Probes, Programs
from tracer.sites.model import SITE_NAMES

ROOT = Path(__file__).resolve().parents[2]
WHAT = Parameters(shared=True)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program at fixed addresses: the same request in each of its processes."""
    return build(tmp_path_factory.mktemp("fixed"), "-fno-pie", "-no-pie")


@pytest.fixture
def three(fixed: Path) -> Iterator[list[Miniature]]:
    """Three processes of that program."""
    with ExitStack() as stack:
        yield [stack.enter_context(Miniature(fixed)) for _ in range(3)]


@pytest.fixture(params=[True, False], ids=["multi", "perf events"])
def loaded(
    request: pytest.FixtureRequest, three: list[Miniature], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Programs]:
    if not request.param:
        monkeypatch.setattr(probes, "_has_multi", lambda: False)
    # Few sets, so that requests of several processes meet in one.
    small = Parameters(shared=True, set_bits=2, max_requests=200)
    programs = Programs(three[0].file, list(three[0].sites.values()), ELEMENT, small)
    yield programs
    programs.close()


def enter(pool: Miniature, loaded: Programs, names: tuple[str, ...] = SITE_NAMES) -> Probes:
    """The process is watched from now on."""
    watched = Probes(pool.pid, pool.file, [pool.sites[name] for name in names], ELEMENT, WHAT, loaded=loaded)
    watched.attach()
    return watched


def after_submit(loaded: Probes) -> dict[str, int]:
    """What is counted without the submit probe, too."""
    return {name: count for name, count in counts(loaded).items() if name != "submitted"}


def probed(pool: Miniature, original: dict[str, bytes]) -> set[str]:
    """The sites at which there is a probe."""
    return {name for name, code in pool.site_bytes().items() if code != original[name]}


def test_each_process_is_counted_by_itself(three: list[Miniature], loaded: Programs) -> None:
    """At the same addresses and the same time; the third, which is not watched, nowhere."""
    first, second, third = three
    assert first.element(7) == second.element(7) == third.element(7)
    one, other = enter(first, loaded), enter(second, loaded)
    for pool, words in zip(three, ("r2000 s7", "r3000 s7 d7 s8", "r1000 s7 d7 s9")):
        pool.begin(words)
    for pool in three:
        pool.end()
    assert counts(one) == {"submitted": 2001, "done": 2000, "completed": 2000}
    assert counts(other) == {"submitted": 3002, "done": 3001, "completed": 3000}
    assert (one.completed(), other.completed()) == (2000, 3000)
    (mine,) = one.records().values()
    assert (mine.request, mine.done_ns) == (first.element(7), 0)
    assert other.records().keys() == {second.element(7), second.element(8)}
    assert other.records()[second.element(7)].done_ns > 0
    assert one.record(first.element(8)) is None
    assert one.record(first.element(9)) is None
    one.forget(mine)
    assert one.records() == {}
    assert len(other.records()) == 2


def test_the_same_request_of_many_processes_in_one_set_and_besides(three: list[Miniature], loaded: Programs) -> None:
    """Sixteen fit into the sets; each of sixty finds its own again, wherever it is."""
    first, second, _ = three
    one, other = enter(first, loaded), enter(second, loaded)
    for slot in range(30):
        first.do(f"s{slot}")
        second.do(f"s{slot} d{slot}")
    assert all(not record.done_ns for record in one.records().values())
    assert all(record.done_ns for record in other.records().values())
    assert len(one.records()) == len(other.records()) == 30
    second.do(" ".join(f"c{slot}" for slot in range(30)))
    assert (len(one.records()), other.records()) == (30, {})
    first.do(" ".join(f"d{slot} c{slot}" for slot in range(30)))
    for each in (one, other):
        assert counts(each) == {"submitted": 30, "done": 30, "completed": 30}
        assert each.records() == {}


def test_one_leaves_and_the_other_goes_on(three: list[Miniature], loaded: Programs) -> None:
    first, second, third = three
    original = first.site_bytes()
    one, other = enter(first, loaded), enter(second, loaded)
    assert probed(third, original) == set(SITE_NAMES)  # in every process of the program
    first.do("r23 s0 s1 d1")
    second.do("r42 s0 s1 d1")
    kept, records = counts(other), other.records()
    one.close()
    assert probed(second, original) == set(SITE_NAMES)
    first.do("d0 c0 r5")
    assert (counts(other), other.records()) == (kept, records)
    second.do("d0 c0 c1 r8")
    assert counts(other) == {"submitted": 52, "done": 52, "completed": 52}
    again = enter(first, loaded)
    assert (counts(again), again.records()) == ({}, {})
    first.do("s1 d1 c1 r9")
    assert counts(again) == {"submitted": 10, "done": 10, "completed": 10}
    assert counts(other) == {"submitted": 52, "done": 52, "completed": 52}
    other.close()
    again.close()
    assert [probed(pool, original) for pool in three] == [set()] * 3


def test_no_room_for_the_counts_of_another(three: list[Miniature], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused in words, and leaves nothing; those that are watched go on."""
    monkeypatch.setattr(probes, "_max_statistics", lambda _: len(KINDS) + 3)
    programs = Programs(three[0].file, list(three[0].sites.values()), ELEMENT, WHAT)
    original = three[0].site_bytes()
    one = enter(three[0], programs)
    with pytest.raises(ProbeError, match=f"no room for the counts of process {three[1].pid} beside those of 1 other"):
        enter(three[1], programs)
    three[0].do("r23")
    three[1].do("r42")
    assert counts(one) == {"submitted": 23, "done": 23, "completed": 23}
    one.close()
    other = enter(three[1], programs)
    three[1].do("r5")
    assert counts(other) == {"submitted": 5, "done": 5, "completed": 5}
    other.close()
    programs.close()
    assert probed(three[0], original) == set()


@pytest.mark.parametrize("stayed", [True, False], ids=["another stays", "the last one"])
def test_whoever_enters_again_starts_anew(
    three: list[Miniature], loaded: Programs, settled: None, stayed: bool
) -> None:
    """Nothing stays of a process that was left: another may have its id, and its requests their addresses."""
    pool = three[0]
    watched = enter(pool, loaded, ALERT_ONLY)
    if stayed:
        enter(three[1], loaded)
    # Requests, and what stands for those whose callback came first: in the sets, and besides.
    pool.do(" ".join(f"d{slot} c{slot + 50}" for slot in range(40)))
    assert len(watched.records()) == 40
    watched.close()
    assert not [raw for name in ("requests", "overflow") for raw in owners(loaded, name) if raw == pool.pid]
    again = enter(pool, loaded, ALERT_ONLY)
    assert (counts(again), again.records()) == ({}, {})
    pool.do(" ".join(f"d{slot}" for slot in range(90)))
    assert counts(again) == {"done": 90}
    assert len(again.records()) == 90
    again.close()


def owners(loaded: Programs, name: str) -> list[int]:
    """The process of every record in that map, of those that stand for a callback, too."""
    values = [value for _, value in loaded._maps[name].items()]
    records = (value[place : place + 40] for value in values for place in range(0, len(value), 40))
    return [RequestRecord.from_buffer_copy(record).process for record in records]


def test_steps(three: list[Miniature], loaded: Programs, settled: None) -> None:
    """Sites go when the last process does without them; what happens meanwhile is not made up."""
    first, second, third = three
    original = first.site_bytes()
    one, other = enter(first, loaded), enter(second, loaded)
    first.do("r10 s0")
    one.step(ALERT_ONLY)
    assert probed(third, original) == set(SITE_NAMES)
    first.do("r10 d0 c0 s1 d1")
    second.do("r10 s1")
    assert after_submit(one) == {"done": 22, "completed": 21}
    assert counts(other) == {"submitted": 11, "done": 10, "completed": 10}
    other.step(ALERT_ONLY)
    assert probed(third, original) == set(ALERT_ONLY)
    second.do("d1 c1 r10")
    assert (after_submit(other), other.records()) == ({"done": 21, "completed": 21}, {})
    one.step(())
    assert probed(third, original) == set(ALERT_ONLY)
    first.do("r10 c1 d2 c3")
    assert (after_submit(one), one.records()) == ({"done": 22, "completed": 22}, {})
    other.step(())
    assert probed(third, original) == set()
    one.step(SITE_NAMES)
    assert probed(third, original) == set(SITE_NAMES)
    first.do("r10 s5")
    second.do("r10 s5")
    assert counts(one)["completed"] == 32
    assert one.records().keys() == {first.element(5)}
    assert (after_submit(other), other.records()) == ({"done": 21, "completed": 21}, {})
    other.step(SITE_NAMES)
    second.do("r10")
    assert counts(other)["completed"] == 31
    one.close()
    other.close()
    assert probed(third, original) == set()


def test_steps_of_one_process(pool: Miniature) -> None:
    """Not shared, the same: from full to alert and to nothing, and back."""
    original = pool.site_bytes()
    with attached(pool) as watched:
        pool.do("r10 s0")
        watched.step(ALERT_ONLY)
        assert probed(pool, original) == set(ALERT_ONLY)
        pool.do("d0 c0 s1 d1")
        assert after_submit(watched) == {"done": 12, "completed": 11}
        watched.step(())
        assert probed(pool, original) == set()
        pool.do("r10 s1 d2")
        assert after_submit(watched) == {"done": 12, "completed": 11}
        watched.step(ALERT_ONLY)
        watched.step(SITE_NAMES)
        assert probed(pool, original) == set(SITE_NAMES)
        pool.do("r10")
        assert counts(watched)["completed"] == 21
        assert watched.records().keys() == {pool.element(1)}
    assert probed(pool, original) == set()


def test_requests_that_were_done_while_nobody_looked(pool: Miniature) -> None:
    """After a step back from nothing, as after the start: their callbacks hide no later request."""
    with attached(pool, ALERT_ONLY) as watched:
        watched.step(())
        pool.do("d0")
        watched.step(ALERT_ONLY)
        pool.do("c0 d0")
        assert watched.records().keys() == {pool.element(0)}


def test_closing_takes_everything_along(three: list[Miniature], loaded: Programs) -> None:
    original, held = three[0].site_bytes(), open_kernel_objects()
    watched = enter(three[0], loaded)
    assert open_kernel_objects() == held + 3  # of one process or of thousands
    loaded.close()
    watched.close()
    loaded.close()
    assert probed(three[1], original) == set()
    assert open_kernel_objects() < held


IN_A_NAMESPACE = """
import os, sys
from pathlib import Path
from tests.kernel.miniature import ELEMENT, Miniature
from tests.kernel.attaching import counts
from tracer.probes import Parameters, Probes, can_be_shared
assert os.getpid() < 10, os.getpid()
with Miniature(Path(sys.argv[1])) as pool, Miniature(Path(sys.argv[1])) as other:
    assert can_be_shared(pool.pid)
    probes = Probes(pool.pid, pool.file, list(pool.sites.values()), ELEMENT, Parameters(shared=sys.argv[2] == "shared"))
    probes.attach()
    other.do("r50")
    pool.do("r500 s1 s2 d2")
    print(counts(probes), len(probes.records()))
    probes.close()
"""


@pytest.mark.parametrize("how", ["shared", "alone"])
def test_in_a_pid_namespace(program: Path, how: str) -> None:
    """In a container: the programs know the process by the id that it has there."""
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", IN_A_NAMESPACE, program, how],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = {"submitted": 502, "done": 501, "completed": 500}
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected} 2\n", "")


@pytest.fixture
def quotas(three: list[Miniature]) -> Iterator[Programs]:
    """Sixteen places in sets and 32 besides, of which one process has half of the sets and eight besides."""
    what = Parameters(shared=True, set_bits=2, max_requests=32, shares=4)
    programs = Programs(three[0].file, list(three[0].sites.values()), ELEMENT, what)
    yield programs
    programs.close()


def test_a_flood_of_one_takes_only_its_share(three: list[Miniature], quotas: Programs) -> None:
    """Made-up requests that are never done, at every address there is: the other's are all followed."""
    flood, honest, late = three
    one, other = enter(flood, quotas), enter(honest, quotas)
    for _ in range(3):
        flood.do(" ".join(f"s{slot}" for slot in range(200)))
    assert len(one.records()) <= 8 + 8
    assert one.lost() > 0
    for slot in range(12):
        honest.do(f"s{slot} d{slot}")
    assert len(other.records()) == 12
    assert other.lost() == 0
    third = enter(late, quotas)
    late.do("s1 s2 s3 d3")
    assert (len(third.records()), third.lost()) == (3, 0)
    for each, pool in ((other, honest), (third, late)):
        pool.do(" ".join(f"d{slot} c{slot}" for slot in range(12)))
        assert (each.records(), each.lost()) == ({}, 0)


def test_a_share_is_given_back(three: list[Miniature], quotas: Programs) -> None:
    """However a request leaves, by its end, by user space, by another at its address: there is room for the next."""
    flood = three[0]
    one = enter(flood, quotas)
    for number in range(30):
        flood.do(" ".join(f"s{slot} d{slot}" for slot in range(16)))
        held = one.records()
        assert len(held) + one.lost() >= 16
        assert len(held) > 8, number  # some of them are in `overflow`
        before = one.lost()
        if number % 3 == 0:
            for record in held.values():
                one.forget(record)
        if number % 3 == 1:
            for request in range(200, 208):
                one.adopt(flood.element(request), "write", 1, done=False)
        flood.do(" ".join(f"c{slot}" for slot in [*range(16), *range(200, 208)]))
        assert one.records() == {}
        assert one.lost() == before
    one.adopt(flood.element(1), "write", 1, done=False)
    assert one.records().keys() == {flood.element(1)}


def test_made_up_files_take_only_their_share(three: list[Miniature], quotas: Programs) -> None:
    flood, honest, _ = three
    one, other = enter(flood, quotas), enter(honest, quotas)
    for slot in (0, 1):
        for first in range(0, 6000, 1000):
            flood.do(" ".join(f"f0:{fd} t0:{1 << slot} s0 d0 c0" for fd in range(first, first + 1000)))
    share = probes._max_statistics(WHAT) // 4
    assert len(one.statistics()) <= share + len(KINDS)
    assert sum(each.completed for each in one.statistics().values()) == 12000
    honest.do("f0:77 t0:2 s0 d0 c0")
    assert other.statistics()["write", 77].completed == 1
