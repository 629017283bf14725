"""The benchmarks: wrong results are never timed, and the last line is one JSON object."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules beside `benchmarks/run.py`, as Python finds them when that is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import media
    import run
    import timing

    yield run, media, timing
    for name in ("media", "run", "timing"):
        del sys.modules[name]


def test_a_time_is_the_median_for_one_unit(benchmarks):
    _, _, timing = benchmarks
    done = []
    row = timing.measure("work", lambda: done.append(sum(range(50_000))), units=2, reference_ms=80)
    assert len(done) == timing.RUNS
    assert 0 < row.best_ms <= row.ms
    assert row.times_faster == 80 / row.ms


def test_the_table_leaves_out_what_is_not_known(benchmarks):
    _, _, timing = benchmarks
    rows = [timing.Row("drawn", 4.0, 3.5, 3.9, 320.0), timing.Row("encoded", 20.0, 19.0, 1.0)]
    head, drawn, encoded = timing.table(rows).splitlines()
    assert head.split() == ["median", "ms", "best", "ms", "CPU", "ms", "official", "faster"]
    assert drawn.split() == ["drawn", "4.00", "3.50", "3.90", "320", "80x"]
    assert encoded.split() == ["encoded", "20.00", "19.00", "1.00"]


def test_the_dancers_of_a_scene_are_in_view_apart_and_without_overlay_compared(benchmarks):
    _, media, _ = benchmarks
    rows = list(media.measure_scene(media.Scene(128, 96, 2, 77.0)))
    assert [row.name for row in rows] == [
        "skeleton 128x96, 2 in view",
        "skeleton 128x96, 2 in view + overlay",
    ]
    assert [row.reference_ms for row in rows] == [77.0, None]
    assert rows[0].best_ms > 0


def test_the_official_times_are_those_of_the_specification(benchmarks):
    _, media, _ = benchmarks
    times = {(s.height, s.width, s.persons): s.official_ms for s in media.SCENES}
    assert times == {
        (512, 896, 1): 320, (896, 512, 1): 340, (672, 416, 1): 200, (336, 208, 1): 77,
        (512, 896, 2): 760,
    }  # fmt: skip


def test_without_golden_frames_the_renderer_is_said_to_be_checked_against_itself(
    benchmarks, tmp_path
):
    _, media, _ = benchmarks
    assert media.check_renderer(tmp_path / "nowhere").startswith("two equal runs")


@pytest.mark.golden
def test_no_time_is_given_for_wrong_frames(benchmarks, golden, tmp_path):
    _, media, timing = benchmarks
    with np.load(golden / "pose" / "walk_336x208.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "right.npz", **arrays)
    assert media.check_renderer(tmp_path).endswith("golden checks")
    arrays["frames_rgba"] = np.roll(arrays["frames_rgba"], 3, axis=1)
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(timing.WrongResult, match=r"fails \d+ golden checks, first \['wrong"):
        media.check_renderer(tmp_path)


def test_the_last_line_is_the_json_that_was_kept(benchmarks, monkeypatch, tmp_path, capsys):
    run, _, timing = benchmarks
    row = timing.Row("drawn", 4.0, 3.5, 3.9, 320.0)
    monkeypatch.setitem(run.SUITES, "media", lambda: ("a test", [row]))
    run.main(["media", "media", "--json", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["media"]["rows"][0]["ms"] == 4.0
    assert found["media"]["checked_by"] == "a test"
    assert found["peak_mib"] > 1
    assert sum("checked by a test" in line for line in lines) == 1


def test_a_wrong_result_prints_no_json_and_keeps_none(benchmarks, monkeypatch, tmp_path, capsys):
    run, _, timing = benchmarks

    def wrong():
        timing.require(False, "Two runs differ")

    monkeypatch.setitem(run.SUITES, "media", wrong)
    with pytest.raises(SystemExit) as end:
        run.main(["media", "--json", str(tmp_path / "found.json")])
    assert end.value.code == "error: Two runs differ. No time is given for a wrong result."
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("arguments", [[], ["dance"], ["media", "dance"]])
def test_an_unknown_suite_or_none_is_an_error(benchmarks, capsys, arguments):
    run, _, _ = benchmarks
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err
