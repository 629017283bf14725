"""The start of a worker: its phases are the whole of it, and it imports little beside PyTorch."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cold_start import suite as cold_start
from benchmarks.cold_start.suite import (
    BEFORE,
    NOISE_MS,
    Start,
    StartScene,
    check,
    cold_figures,
    cold_pictures,
    cold_table,
    evict,
    multiples,
    rows_of,
    start,
)
from benchmarks.cold_start.worker import READY, SERVING, Laps
from benchmarks.record import Figure
from benchmarks.timing import WrongResult, figures, table
from engine.config import state_dir
from engine.demo.weights import demo_weights
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.compiled import STATE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    models = demo_weights(state_dir()).models
    nothing = tmp_path_factory.mktemp("state")
    return StartScene(tiny_package(SM89), models, nothing, nothing / "weights.safetensors")


@pytest.fixture(scope="module")
def started(scene):
    return start("engine", scene)


def made(**phases):
    """A start of these phases in ms."""
    total = sum(phases.values())
    return Start({name.replace("_", " "): ms for name, ms in phases.items()}, total, total, ())


def test_phases_follow_each_other_and_add_up_to_the_time_since_the_parent_began():
    laps = Laps(time.monotonic() - 0.5)
    laps.end("interpreter")
    work = laps.around("found", "work", lambda seconds: time.sleep(seconds) or "done")
    assert [work(0.02), work(0.01)] == ["done", "done"]
    laps.end("rest")
    total_ms = 1000 * (time.monotonic() - laps.began)
    assert list(laps.ms) == ["interpreter", "found", "work", "rest"]
    assert 500 <= laps.ms["interpreter"] <= total_ms
    assert laps.ms["work"] >= 30
    assert sum(laps.ms.values()) == pytest.approx(total_ms, abs=1)


def test_the_phases_of_a_real_start_add_up_to_what_its_parent_waited(started):
    assert list(started.phases) == [
        "interpreter", "import torch", "import engine", "GPU found", "package opened",
        "models found", "weights read and copied", READY, "first forward",
    ]  # fmt: skip
    assert all(ms >= 0 for ms in started.phases.values())
    assert sum(started.phases.values()) == pytest.approx(started.total_ms, abs=NOISE_MS)
    assert started.total_ms <= started.seen_ms  # what follows is a line through a pipe


@pytest.fixture(scope="module")
def served(scene):
    """A start of the real worker, which asks for its first job."""
    return start("worker", scene)


def test_the_phases_of_the_worker_are_told_until_it_asks_for_a_job(served):
    assert list(served.phases) == [
        "interpreter", "import engine and torch", "GPU found", "package opened", "models found",
        "weights read and copied", READY, "first clip, of nothing", SERVING, "ended",
    ]  # fmt: skip
    assert all(ms >= 0 for ms in served.phases.values())
    (asked,) = [row.ms for row in rows_of("worker", [served]) if "first job" in row.name]
    assert asked == pytest.approx(sum(served.phases.values()) - served.phases["ended"])


def libraries(found, *inside):
    """Libraries whose modules a start has imported, or the parts of one that are packages."""
    for path in map(Path, found.files):
        parts = path.parts
        if path.suffix == ".py" and "site-packages" in parts:
            below = parts[parts.index("site-packages") + 1 :]
            if below[: len(inside)] == inside and len(below) > len(inside):
                yield below[len(inside)].removesuffix(".py")


# What an engine takes to be ready, and the worker to have made its first clip, beside PyTorch.
LIBRARIES = {
    "PIL", "cv2", "ftfy", "imageio_ffmpeg", "numpy", "safetensors", "sentencepiece", "tokenizers",
    "tqdm", "wcwidth",
}  # fmt: skip
# The oracles of tests, what only some jobs need, and parts of PyTorch that bring a compiler.
LATER = {"transformers", "diffusers", "scipy", "onnxruntime", "matplotlib", "triton", "sympy"}
COMPILERS = {"_dynamo", "_inductor", "export", "onnx", "distributed"}


def test_a_start_imports_nothing_that_its_first_job_can_do_without(scene, started, served):
    """A second of imports comes with one line: this holds without a clock."""
    bare = start("torch", scene)
    assert {"torch"} < {*libraries(bare)}
    assert {*libraries(started)} - {*libraries(bare)} <= LIBRARIES
    assert {*libraries(served)} & LATER == set()
    own = {*libraries(bare, "torch")}  # what PyTorch itself imports differs with its version
    for found in (started, served):
        assert {*libraries(found, "torch")} & COMPILERS <= own


def test_reading_alone_needs_no_torch_and_gives_all_bytes(scene):
    found = start("read", scene)
    assert list(found.phases) == ["interpreter", "package opened", "weights read"]
    assert not any("torch" in Path(path).parts for path in found.files)


def test_what_is_timed_from_the_first_line_on_has_imported_nothing():
    program = "import sys; import benchmarks.cold_start.worker; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "benchmarks" in imported
    assert imported & {"torch", "numpy", "engine", "kernels"} == set()


def test_who_starts_the_processes_maps_no_file_that_is_to_leave_the_page_cache():
    program = (
        "import sys; from benchmarks import run; run.suite_of('cold-start'); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported & {"torch", "numpy", "matplotlib"} == set()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"total_ms": 300.0}, r"engine: phases add up to 120 ms of 300"),
        ({"seen_ms": 90.0}, r"engine: 120 ms in 90 that its parent waited"),
    ],
    ids=["a phase is missing", "clocks differ"],
)
def test_times_that_cannot_be_are_no_result(change, says):
    good = made(interpreter=20.0, import_torch=100.0)
    check("engine", good)
    with pytest.raises(WrongResult, match=says):
        check("engine", replace(good, **change))


def test_a_start_that_fails_is_one_sentence(scene, tmp_path):
    with pytest.raises(WrongResult, match=r"engine does not start: .*BadPackage: .*does not exist"):
        start("engine", replace(scene, package=tmp_path / "nowhere"))


def test_rows_are_median_and_spread_and_a_job_is_accepted_before_the_first_forward():
    phases = [(10.0, 500.0, 30.0), (14.0, 400.0, 20.0), (12.0, 900.0, 25.0)]
    starts = [made(interpreter=a, encoders_awaited=b, first_forward=c) for a, b, c in phases]
    rows = rows_of("engine", starts)
    found = {row.name.split(": ")[1]: (row.ms, row.best_ms, row.worst_ms) for row in rows}
    assert found == {
        "interpreter": (12.0, 10.0, 14.0),
        "encoders awaited": (500.0, 400.0, 900.0),
        "first job accepted": (510.0, 414.0, 912.0),
        "first forward": (25.0, 20.0, 30.0),
        "total": (540.0, 434.0, 937.0),
    }
    assert [*found] == [
        "interpreter", "encoders awaited", "first job accepted", "first forward", "total",
    ]  # fmt: skip


def test_a_file_is_taken_out_of_the_page_cache_and_strange_paths_are_passed_over(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(2**22))
    subprocess.run(["sync", str(file)], check=True)
    share = evict([file, file, tmp_path / "deleted"])
    assert 0 <= share <= 1
    assert evict([]) == evict([tmp_path / "deleted"]) == 0
    assert file.stat().st_size == 2**22


def test_the_table_shows_what_is_known():
    rows = rows_of("torch, cold", [made(interpreter=20.0, import_torch=100.0)])
    head, *lines = table(rows).splitlines()
    assert head.split() == ["median", "ms", "best", "worst"]
    assert lines[0].split() == ["torch,", "cold:", "interpreter", "20.000", "20.000", "20.000"]
    assert lines[2].split() == ["torch,", "cold:", "total", "120.000", "120.000", "120.000"]


def test_phases_of_several_runs_are_figures_and_those_of_one_are_not():
    several = [made(interpreter=20.0, import_torch=ms) for ms in (100.0, 180.0, 120.0)]
    rows = [*rows_of("torch, warm", several), *rows_of("read, warm", several[:1])]
    assert [row.runs for row in rows] == [3, 3, 3, 1, 1, 1]
    assert figures(rows) == [
        Figure("torch, warm: interpreter", 20.0, "ms", 0.0, "lower", "measured"),
        Figure("torch, warm: import torch", 120.0, "ms", 40.0, "lower", "measured"),
        Figure("torch, warm: total", 140.0, "ms", 40.0, "lower", "measured"),
    ]


def test_the_start_is_told_in_imports_of_torch_of_its_own_round():
    found = {
        "torch, warm": [made(import_torch=ms) for ms in (1000.0, 2000.0, 1200.0)],
        "engine, warm": [made(encoders_awaited=ms) for ms in (1500.0, 3400.0, 1920.0)],
        "worker, warm": [
            made(encoders_awaited=100.0, platform_awaited=ms) for ms in (2400.0, 3900.0, 2300.0)
        ],
        "read, warm": [made(weights_read=30.0)] * 3,
    }
    rows = [row for name, starts in found.items() for row in rows_of(name, starts)]
    told = multiples(found)
    *times, engine, worker = cold_figures([*rows, *told])
    assert times == figures(rows)
    assert engine.name == "engine, warm: first job accepted, in imports of torch"
    assert worker.name == "worker, warm: first job asked for, in imports of torch"
    assert (engine.unit, worker.unit, engine.better) == ("x", "x", "lower")
    assert [engine.value, engine.noise] == pytest.approx([1.6, 0.1])
    assert [worker.value, worker.noise] == pytest.approx([2.0, 0.25])
    assert cold_table([*rows, *told]).splitlines()[-2:] == [
        "engine, warm: first job accepted, in imports of torch: 1.60, 1.50 to 1.70",
        "worker, warm: first job asked for, in imports of torch: 2.00, 2.00 to 2.50",
    ]


def test_the_engine_of_another_checkout_is_started_by_its_own_programs(scene, tmp_path):
    """Here one that is no engine: the same command line, and two lines of JSON."""
    worker = tmp_path / "benchmarks" / "cold_start" / "worker.py"
    worker.parent.mkdir(parents=True)
    worker.write_text(
        "import json, sys, time\n"
        "ms = 1000 * (time.monotonic() - float(sys.argv[1]))\n"
        "print(json.dumps({'ms': {'other': ms}, 'total_ms': ms}))\n"
        "print(json.dumps(sys.argv[2:]))\n"
    )
    found = start(BEFORE, scene, tmp_path)
    assert list(found.phases) == ["other"]
    assert found.files == ("engine", str(scene.package), str(scene.models), str(scene.state))


def test_the_picture_has_a_bar_for_each_start_and_every_phase_in_its_legend(tmp_path):
    rows = [
        *rows_of("torch, warm", [made(interpreter=20.0, import_torch=100.0)]),
        *rows_of("engine, warm", [made(interpreter=20.0, encoders_awaited=300.0)]),
    ]
    png, svg = cold_pictures(rows, tmp_path, "cold")
    assert (png.name, svg.name) == ("cold.png", "cold.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    # matplotlib writes each text beside its outlines
    written = set(re.findall(r"<!-- (.+?) -->", svg.read_text("utf-8")))
    assert {"torch, warm", "engine, warm", "interpreter", "import torch", READY} <= written
    assert "first job accepted" not in written and "total" not in written


@pytest.mark.slow
def test_all_ways_are_measured_warm_and_cold(monkeypatch):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, rows = cold_start.measure_cold_start(runs=1)
    assert "finite" in checked and "% of a start's files" in checked
    totals = {row.name[:-7]: row for row in rows if row.name.endswith(": total")}
    ways = ("torch", "engine", "worker", "safetensors", "read")
    assert set(totals) == {f"{way}, {how}" for way in ways for how in ("warm", "cold")}
    assert all(row.best_ms <= row.ms <= row.worst_ms for row in rows)
    sums = {row.name for row in rows if ": first job" in row.name}
    assert sums == {
        f"{way}, {how}: first job {what}{end}"
        for way, what in (("engine", "accepted"), ("worker", "asked for"))
        for how in ("warm", "cold")
        for end in ("", ", in imports of torch")
    }


def test_a_package_that_is_not_there_is_refused(tmp_path):
    command = [sys.executable, "benchmarks/run.py", "cold-start", "--package"]
    done = subprocess.run(
        [*command, str(tmp_path / "nowhere")], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: Nothing to start: " in done.stderr and "does not exist" in done.stderr
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout)
