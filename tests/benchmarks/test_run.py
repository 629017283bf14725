"""The benchmarks: wrong results are never timed, and the last line is one JSON object."""

import json
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import media, run, timing
from benchmarks.kernel.suite import KernelRow, kernel_table, measure_kernels
from benchmarks.record import Suite
from kernels.arch import ARCHS
from kernels.spec import BuildError
from tests.support.compiled import STATE


def test_a_time_is_the_median_for_one_unit():
    done = []
    row = timing.measure("work", lambda: done.append(sum(range(50_000))), units=2)
    assert len(done) == timing.RUNS
    assert 0 < row.best_ms <= row.ms <= row.worst_ms


def test_the_table_has_the_median_and_the_spread_of_each_row():
    head, drawn = timing.table([timing.Row("drawn", 4.0, 3.5, 4.5)]).splitlines()
    assert head.split() == ["median", "ms", "best", "worst"]
    assert drawn.split() == ["drawn", "4.000", "3.500", "4.500"]


def test_a_column_of_nothing_is_left_out():
    heads, lines = {"ms": ".1f", "GB/s": ".1f"}, [("a", 1.0, None), ("b", None, None)]
    assert timing.columns(heads, lines).splitlines() == ["    ms", "a  1.0", "b"]


def test_the_dancers_of_a_scene_are_in_view_apart_without_and_with_an_overlay():
    rows = list(media.measure_scene(128, 96, 2))
    assert [row.name for row in rows] == [
        "skeleton 128x96, 2 in view",
        "skeleton 128x96, 2 in view + overlay",
    ]
    assert rows[0].best_ms > 0


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


def test_a_body_goes_through_base64_and_into_a_bucket_and_is_timed_for_each_frame(tmp_path):
    """The bucket checks what arrives: `measure_upload` raises for another body or number."""
    body = np.random.default_rng(0).bytes(200_000)
    rows = [*media.measure_base64(body), media.measure_upload(body, tmp_path)]
    assert [row.name for row in rows] == [
        "base64 encode 0 MB of 81 frames",
        "base64 decode 0 MB of 81 frames",
        "upload 0 MB of 81 frames",
    ]
    assert all(0 < row.best_ms <= row.ms <= row.worst_ms for row in rows)


@pytest.fixture
def suites(monkeypatch):
    """Suites by name that stand for real ones, which would take long."""
    given, real = {}, run.suite_of
    monkeypatch.setattr(run, "suite_of", lambda name: given.get(name) or real(name))
    return given


def fake(measure):
    """A suite of `timing.Row`."""
    return Suite(measure, timing.table, timing.figures)


def test_the_last_line_is_the_json_that_was_kept(suites, tmp_path, capsys):
    row = timing.Row("drawn", 4.0, 3.5, 5.5)
    suites["media"] = fake(lambda: ("a test", [row]))
    run.main(["media", "media", "--json", str(tmp_path / "found.json")])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads((tmp_path / "found.json").read_text("utf-8"))
    media_found = found["suites"]["media"]
    assert media_found["rows"] == [asdict(row)]
    assert media_found["checked_by"] == "a test"
    assert media_found["figures"] == [
        {"name": "drawn", "value": 4.0, "unit": "ms", "noise": 1.0, "better": "lower",
         "source": "measured"}
    ]  # fmt: skip
    assert found["schema"] == 1 and found["peak_mib"] > 1
    assert found["machine"]["torch"] == torch.__version__
    assert sum("checked by a test" in line for line in lines) == 1
    run.main(["compare", *2 * [str(tmp_path / "found.json")]])
    assert capsys.readouterr().out.startswith("1 within noise, 0 worse")


def test_a_wrong_result_prints_no_json_and_keeps_none(suites, tmp_path, capsys):
    def wrong():
        timing.require(False, "Two runs differ")

    suites["media"] = fake(wrong)
    with pytest.raises(SystemExit) as end:
        run.main(["media", "--json", str(tmp_path / "found.json")])
    assert end.value.code == "error: Two runs differ. No time is given for a wrong result."
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "found.json").exists()


def test_a_number_that_json_has_not_is_an_error_and_no_json(suites, tmp_path, capsys):
    row = timing.Row("drawn", float("nan"), 3.5, 3.9)
    suites["media"] = fake(lambda: ("a test", [row]))
    with pytest.raises(SystemExit) as end:
        run.main(["media", "--json", str(tmp_path / "found.json")])
    assert end.value.code.startswith("error: media: a number is not finite")
    assert "{" not in capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()


def test_each_suite_has_a_table_of_its_own(suites, capsys):
    drawn = timing.Row("drawn", 4.0, 3.5, 3.9)
    kernel = KernelRow("gemm.i8 qkv", "sm89", 218, 48.0, 1.91, 590.4)
    for name, row in (("media", drawn), ("kernels", kernel)):
        suite = replace(run.suite_of(name), measure=lambda row=row: ("a test", [row]))
        suites[name] = suite
    run.main(["media", "kernels"])
    lines = capsys.readouterr().out.splitlines()
    assert timing.table([drawn]).splitlines() == lines[1:3]
    assert kernel_table([kernel]).splitlines() == lines[5:7]
    found = json.loads(lines[-1])["suites"]
    assert found["media"]["rows"] == [asdict(drawn)]
    assert found["kernels"]["rows"] == [asdict(kernel)]


def test_a_suite_is_given_the_options_that_it_takes_and_that_were_given(suites, capsys):
    given = []

    def measured(**options):
        given.append(options)
        return "a test", []

    for name in ("cold-start", "media"):
        suites[name] = fake(measured)
    run.main(["cold-start", "media", "--package", "there", "--runs", "2"])
    assert given == [{"package": Path("there"), "runs": 2}, {}]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["cold-start", "--runs", "0"], "is not a whole number from 1 up"),
        (["cold-start", "--runs", "many"], "is not a whole number from 1 up"),
        (["clip", "--sizes", "wide"], "is not HEIGHTxWIDTH"),
        (["media", "kernels", "--dry"], "--dry is of no suite that is asked for"),
        (["media", "--project", "sm89"], "--project is of no suite that is asked for"),
        (["quality", "--runs", "3"], "--runs is of no suite"),
        (["projection", "--project", "sm89"], "invalid choice: 'projection'"),
    ],
)
def test_an_option_that_no_suite_would_take_is_an_error_not_silence(capsys, wrong, says):
    with pytest.raises(SystemExit) as end:
        run.main(wrong)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_a_projection_is_measured_after_the_suites_that_were_asked_for():
    args = run.parse(["denoiser", "media", "denoiser", "--project", "sm89,sm120"])
    assert args.suites == ["denoiser", "media", "projection"]
    assert args.archs == ("sm89", "sm120")
    assert run.parse(["denoiser"]).suites == ["denoiser"]


@pytest.mark.parametrize("name", run.SUITES)
def test_every_suite_is_where_the_table_says_and_takes_the_options_that_it_lists(name):
    suite, options = run.suite_of(name), run.SUITES[name][1]
    assert isinstance(suite, Suite)
    assert set(options) <= set(vars(run.parse(["media"]))) & set(
        signature(suite.measure).parameters
    )


def test_a_kernel_that_cannot_be_built_is_one_sentence(suites, capsys):
    def refuse():
        raise BuildError("gemm.i8.bias for sm89 spills 16 bytes")

    suites["kernels"] = fake(refuse)
    with pytest.raises(SystemExit) as end:
        run.main(["kernels"])
    assert end.value.code == "error: gemm.i8.bias for sm89 spills 16 bytes"
    assert capsys.readouterr().out == ""


def test_kernels_have_what_their_machine_code_says_and_no_times(monkeypatch):
    """Every kernel of every architecture, taken from the store of the compile tests."""
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, rows = measure_kernels()
    assert checked.startswith("the proofs of their machine code alone")
    assert {row.arch for row in rows} == {arch.name for arch in ARCHS}
    assert all(row.registers > 0 for row in rows)
    assert all(row.ms is row.error is None for row in rows)
    products = [row for row in rows if row.name.startswith(("gemm", "attention"))]
    assert len(products) > 50
    assert all(row.instructions_per_mma > 1 for row in products)
    assert all(90 < row.expected_tflops < row.bound_tflops for row in products)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["media", "dance"]])
def test_an_unknown_suite_or_none_is_an_error(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        run.main(arguments)
    assert end.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_quality_brings_the_nano_model_unless_a_checkpoint_is_measured():
    assert run.parse(["quality"]).suites == ["quality", "nano", "nano-scail2"]
    assert run.parse(["quality", "--checkpoint", "a.pt"]).suites == ["quality"]
    assert run.parse(["media"]).suites == ["media"]


def test_sizes_and_recipes_come_from_a_command_line():
    args = run.parse(["clip", "--sizes", "128x224, 256x448", "--recipes", "production, official"])
    assert args.sizes == ((128, 224), (256, 448))
    assert args.recipes == ("production", "official")


@pytest.mark.parametrize("text", ["128", "128x", "128x224,", "1e3x64"])
def test_a_size_that_is_none_is_an_error(capsys, text):
    with pytest.raises(SystemExit):
        run.parse(["clip", f"--sizes={text}"])
    assert "is not HEIGHTxWIDTH" in capsys.readouterr().err
