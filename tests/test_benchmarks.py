"""The benchmarks: wrong results are never timed, and the last line is one JSON object."""

# ruff: noqa: E402
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import STATE

from kernels.arch import ARCHS
from kernels.spec import BuildError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # as it is for its scripts

import media
import run
import timing
from kernel_suite import KernelRow, kernel_table, measure_kernels


def test_a_time_is_the_median_for_one_unit():
    done = []
    row = timing.measure("work", lambda: done.append(sum(range(50_000))), units=2, reference_ms=80)
    assert len(done) == timing.RUNS
    assert 0 < row.best_ms <= row.ms
    assert row.times_faster == 80 / row.ms


def test_the_table_leaves_out_what_is_not_known():
    rows = [timing.Row("drawn", 4.0, 3.5, 3.9, 320.0), timing.Row("encoded", 20.0, 19.0, 1.0)]
    head, drawn, encoded = timing.table(rows).splitlines()
    assert head.split() == ["median", "ms", "best", "ms", "CPU", "ms", "official", "faster"]
    assert drawn.split() == ["drawn", "4.00", "3.50", "3.90", "320", "80x"]
    assert encoded.split() == ["encoded", "20.00", "19.00", "1.00"]


def test_the_dancers_of_a_scene_are_in_view_apart_and_without_overlay_compared():
    rows = list(media.measure_scene(media.Scene(128, 96, 2, 77.0)))
    assert [row.name for row in rows] == [
        "skeleton 128x96, 2 in view",
        "skeleton 128x96, 2 in view + overlay",
    ]
    assert [row.reference_ms for row in rows] == [77.0, None]
    assert rows[0].best_ms > 0


def test_the_official_times_are_those_of_the_specification():
    times = {(s.height, s.width, s.persons): s.official_ms for s in media.SCENES}
    assert times == {
        (512, 896, 1): 320, (896, 512, 1): 340, (672, 416, 1): 200, (336, 208, 1): 77,
        (512, 896, 2): 760,
    }  # fmt: skip


def test_without_golden_frames_the_renderer_is_said_to_be_checked_against_itself(tmp_path):
    assert media.check_renderer(tmp_path / "nowhere").startswith("two equal runs")


@pytest.mark.golden
def test_no_time_is_given_for_wrong_frames(golden, tmp_path):
    with np.load(golden / "pose" / "walk_336x208.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "right.npz", **arrays)
    assert media.check_renderer(tmp_path).endswith("golden checks")
    arrays["frames_rgba"] = np.roll(arrays["frames_rgba"], 3, axis=1)
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(timing.WrongResult, match=r"fails \d+ golden checks, first \['wrong"):
        media.check_renderer(tmp_path)


def test_the_last_line_is_the_json_that_was_kept(monkeypatch, tmp_path, capsys):
    row = timing.Row("drawn", 4.0, 3.5, 3.9, 320.0)
    monkeypatch.setitem(run.SUITES, "media", (lambda: ("a test", [row]), timing.table))
    run.main(["media", "media", "--json", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["media"]["rows"][0]["ms"] == 4.0
    assert found["media"]["checked_by"] == "a test"
    assert found["peak_mib"] > 1
    assert sum("checked by a test" in line for line in lines) == 1


def test_a_wrong_result_prints_no_json_and_keeps_none(monkeypatch, tmp_path, capsys):
    def wrong():
        timing.require(False, "Two runs differ")

    monkeypatch.setitem(run.SUITES, "media", (wrong, timing.table))
    with pytest.raises(SystemExit) as end:
        run.main(["media", "--json", str(tmp_path / "found.json")])
    assert end.value.code == "error: Two runs differ. No time is given for a wrong result."
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "found.json").exists()


def test_each_suite_has_a_table_of_its_own(monkeypatch, capsys):
    drawn = timing.Row("drawn", 4.0, 3.5, 3.9, 320.0)
    kernel = KernelRow("gemm.i8 qkv", "sm89", 218, 48.0, 1.91, 590.4)
    for name, row in (("media", drawn), ("kernels", kernel)):
        show = run.SUITES[name][1]
        monkeypatch.setitem(run.SUITES, name, (lambda row=row: ("a test", [row]), show))
    run.main(["media", "kernels"])
    lines = capsys.readouterr().out.splitlines()
    assert timing.table([drawn]).splitlines() == lines[1:3]
    assert kernel_table([kernel]).splitlines() == lines[5:7]
    found = json.loads(lines[-1])
    assert found["media"]["rows"] == [asdict(drawn)]
    assert found["kernels"]["rows"] == [asdict(kernel)]


def test_a_kernel_that_cannot_be_built_is_one_sentence(monkeypatch, capsys):
    def refuse():
        raise BuildError("gemm.i8.bias for sm89 spills 16 bytes")

    monkeypatch.setitem(run.SUITES, "kernels", (refuse, kernel_table))
    with pytest.raises(SystemExit) as end:
        run.main(["kernels"])
    assert end.value.code == "error: gemm.i8.bias for sm89 spills 16 bytes"
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: kernels would be timed")
def test_without_a_gpu_kernels_have_what_their_machine_code_says_and_no_times(monkeypatch):
    """Every kernel of every architecture, taken from the store of the compile tests."""
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, rows = measure_kernels()
    assert checked.startswith("the proofs of their machine code alone")
    assert {row.arch for row in rows} == {arch.name for arch in ARCHS}
    assert all(row.ms is row.error is None and row.registers > 0 for row in rows)
    products = [row for row in rows if row.name.startswith(("gemm", "attention"))]
    assert len(products) > 50
    assert all(row.estimated_tflops > 100 and row.instructions_per_mma > 1 for row in products)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["media", "dance"]])
def test_an_unknown_suite_or_none_is_an_error(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err
