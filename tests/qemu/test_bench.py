"""The bench on real targets: its witness counts exactly, it runs to the end, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bench.loads import bench_folder, exe_of, image_bench, make_image, requests_from_io
from bench.tracers import Floor, TracerFailed, attached, changed_sites, target_of
from tests.qemu.tracing import traced
from tracer.lab.process import wait_until
from tracer.lab.qemu import Drive, storage_daemon

ROOT = Path(__file__).resolve().parents[2]
REQUESTS = 5000
#: Rounds of the short run; from two on it has both of the loads that have aims.
ROUNDS = int(os.environ.get("AIO_TRACE_BENCH_ROUNDS", "1"))
LOADS = ("bench-32", "one-cpu-32")[:ROUNDS]


@pytest.fixture
def folder() -> Iterator[Path]:
    """The bench's own kind of folder."""
    with bench_folder() as made:
        yield made


def left_in(folder: Path) -> list[str]:
    """What is in the folder that a bench made its own in, and the processes that have to do with it."""
    found = sorted(path.name for path in folder.iterdir())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(folder) in words:
                found.append(words.replace("\0", " "))
    return found


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where a bench makes its folders."""
    made = tmp_path / "scratch"
    made.mkdir()
    return made


def test_its_witness_counts_every_request(folder: Path) -> None:
    """Ask for 5000 reads over NBD: /proc/PID/io says 5000, and so does aio-trace."""
    with storage_daemon([Drive(file=make_image(folder))], trace=False) as daemon:
        daemon.request("d0", "read")
        with traced(daemon.pid) as trace:
            before = requests_from_io(Path(f"/proc/{daemon.pid}/io").read_text())
            url = f"nbd+unix:///d0?socket={daemon.folder / 'nbd'}"
            command = [exe_of("qemu-img"), "bench", "-f", "raw", "-c", str(REQUESTS), "-d", "32", "-s", "4k", url]
            subprocess.run(command, check=True, capture_output=True)
            after = requests_from_io(Path(f"/proc/{daemon.pid}/io").read_text())
            assert trace.finish() == 0
    assert after - before == REQUESTS
    assert trace.summary["requests"]["completed"] == REQUESTS


@pytest.mark.parametrize("way", ["perf", "multi"])
def test_the_floor_is_on_all_three_sites(folder: Path, way: str) -> None:
    """Its probes really are in the target's code, only while it runs."""
    with image_bench(folder, 1) as load:
        target = target_of(load.pid, load.exe)
        assert changed_sites(target) == 0
        try:
            with attached(Floor(way), target, folder) as run:
                assert changed_sites(target) == 3
                run.detach()
        except TracerFailed as error:
            if way == "multi" and "uprobe_multi" in str(error):
                pytest.skip(f"this kernel has no uprobe_multi: {error}")
            raise
        assert changed_sites(target) == 0


def bench(out: Path, scratch: Path, **settings: str) -> subprocess.Popen[str]:
    environment: Mapping[str, str] = {**os.environ, "BENCH_OUT": str(out), "TMPDIR": str(scratch), **settings}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "bench"], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def test_a_very_short_run(tmp_path: Path, scratch: Path) -> None:
    """A few rows: figures that make sense, in both forms; no process, no folder is left."""
    only = ",".join([*LOADS, "floor-perf,full,gdb,trace-log"])
    run = bench(tmp_path, scratch, BENCH_ONLY=only, BENCH_ROUNDS=str(ROUNDS), BENCH_SLICE_S="0.2")
    output, errors = run.communicate(timeout=110)
    assert run.returncode == 0, errors
    assert left_in(scratch) == []
    assert (tmp_path / "results.md").read_text().strip() == output.strip()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == []
    rows = results["tables"]["bench-32"]["rows"]
    assert set(rows) == {"floor-perf", "full", "gdb", "trace-log"}
    assert {key: row["failure"] for key, row in rows.items()} == dict.fromkeys(rows)
    for key, row in rows.items():
        assert sorted(row["samples"]) == [str(number) for number in range(ROUNDS)], key
        for sample in row["samples"].values():
            assert sample["pair"]["traced"]["requests"] > 0
            assert len(sample["pair"]["untraced"]) == 2
            assert (sample["probed_sites"], sample["left_sites"]) == ((None, 0) if key == "trace-log" else (3, 0))
    assert all(sample["seen_share"] > 0.95 for sample in rows["full"]["samples"].values())
    assert [aim["verdict"] for aim in results["aims"]] == ["few rounds"] * len(LOADS)  # full / floor


def test_an_interrupt_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    """Ctrl-C while tracers come and go: what there is is saved, everything is gone."""
    run = bench(tmp_path, scratch, BENCH_ONLY="one-cpu-32,full,floor-perf", BENCH_ROUNDS="50", BENCH_SLICE_S="0.2")
    try:
        assert run.stderr
        for line in run.stderr:
            if "round 2" in line:
                break
        assert left_in(scratch)
        time.sleep(1)  # somewhere in a round
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
    assert run.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not left_in(scratch), 10, "everything to be gone")
    assert (tmp_path / "results.json").exists()
