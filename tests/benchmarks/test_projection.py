"""Projections: shares carried from one GPU to others, their bars, and files that hold no times."""

# ruff: noqa: E402
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.compiled import STATE

ROOT = Path(__file__).resolve().parents[2]

from benchmarks import pictures
from benchmarks.denoiser.launches import STEPS
from benchmarks.denoiser.projection import (
    PEERS,
    ProjectionRow,
    bar,
    evaluations,
    measure_projection,
    measured_shares,
    projection_figures,
    projection_pictures,
    projection_table,
    without_pose,
)
from benchmarks.denoiser.suite import ForwardCase, estimated_rows, kernels_of
from benchmarks.kernel.cases import SCAIL_14B as SIZES_14B
from benchmarks.kernel.cases import cases
from benchmarks.kernel.model import GPUS, limits_ms
from benchmarks.kernel.suite import KernelRow
from benchmarks.timing import WrongResult
from engine.config import SCAIL_14B
from engine.errors import BadRequest
from engine.memory import ClipShape
from engine.recipes import RECIPES
from kernels.arch import ARCHS, SM89, SM90, SM120

LARGE = ClipShape(512, 896, 81)
BY_NAME = {step.name: step for step in STEPS}
# share of its limit that each kind of kernel has in made-up times of sm90, by how names begin
SHARES = {"attention": 0.4, "gemm": 0.625, "cross": 0.5, "rope": 0.45, "": 0.8}


@pytest.fixture(scope="module")
def forwards():
    """Estimates of one forward, by architecture, out of the store of the compile tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCAIL_STATE", str(STATE))
        return {
            arch: estimated_rows(
                ForwardCase(arch, SCAIL_14B, LARGE, LARGE.tokens), kernels_of(arch)
            )
            for arch in ARCHS
        }


def test_a_recipe_is_so_many_forwards_with_and_without_the_skeleton():
    assert evaluations(RECIPES["official"]) == (100, 0)
    assert evaluations(RECIPES["production"]) == (3, 3)
    assert without_pose(LARGE) == 1792 + 37632  # docs/reference/performance.md B


def test_without_times_a_projection_is_the_estimate_and_reaches_to_the_peers(monkeypatch, forwards):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, found = measure_projection(["sm89", "sm120"], None, [LARGE])
    assert checked.startswith("nothing: no time was measured")
    forward, official, production = found[:3]
    assert forward.seconds == pytest.approx(sum(row.ms for row in forwards[SM89]) / 1000)
    assert forward.fastest_s < forward.seconds < forward.slowest_s
    # LightX2V's 214 TFLOPS on an RTX 4090
    assert forward.slowest_s == pytest.approx(3152 / (PEERS["sm89"][0] * 660.6), rel=1e-2)
    assert official.seconds == pytest.approx(100 * forward.seconds)
    assert 3 * forward.seconds < production.seconds < 6 * forward.seconds
    assert [row.gpu for row in found[::3]] == ["RTX 4090", "RTX 5090"]


def test_a_share_is_carried_over_as_it_is_and_scaled_by_the_estimates(forwards):
    here, there = forwards[SM89], forwards[SM90]
    # as if sm90 reached its own estimates: one end is the estimate of sm89, clocks apart
    figure, fastest, slowest, limit = bar(SM89, here, there, {row.step: row.share for row in there})
    ends = [
        sorted((row.ms, row.limit_ms / other.share)) for row, other in zip(here, there, strict=True)
    ]
    assert figure == pytest.approx(sum(math.sqrt(a * b) for a, b in ends) / 1000)
    assert fastest < sum(a for a, _ in ends) / 1000 <= figure <= sum(b for _, b in ends) / 1000
    assert slowest > sum(b for _, b in ends) / 1000
    assert limit == pytest.approx(sum(row.limit_ms for row in here) / 1000)


def test_no_projection_goes_below_the_limit_at_the_highest_clock(forwards):
    here, there = forwards[SM120], forwards[SM90]
    figure, fastest, _, limit = bar(SM120, here, there, {row.step: 1.0 for row in there})
    gpu = GPUS[SM120]
    assert limit <= figure < 1.01 * limit  # some estimates are lower than on sm90
    assert limit * gpu.ghz / gpu.seen_ghz < fastest < limit


def times(tokens=(29757, 48832)):
    """Made-up lines of gpu.jsonl: every kernel of sm90 at its share."""
    for case in cases(SM90, SIZES_14B):
        share = next(share for start, share in SHARES.items() if case.name.startswith(start))
        attends = case.name.startswith(("attention", "cross"))
        for count in tokens:
            work, bits = case.flop(count), 16 if case.name.startswith("cross") else 8
            exponentials = work / 512 if attends else 0.0
            limit = max(limits_ms(work, case.moved(count), exponentials, bits, SM90).values())
            yield {"step": "time"} | asdict(
                KernelRow(case.name, "sm90", tokens=count, ms=limit / share)
            )


def as_lines(facts):
    return "\n".join(map(json.dumps, [{"step": "machine", "gpu": "H200"}, *facts])) + "\n"


EXPECTED = {
    "attention": 0.4, "qkv": 0.625, "cross q": 0.625, "up + GELU": 0.625, "cross attention": 0.5,
    "rope": 0.45, "quantise the inner": 0.8, "modulate": 0.8,
}  # fmt: skip


def test_shares_come_from_lines_of_the_gpu_script_or_from_json_of_the_suites(tmp_path):
    facts = list(times())
    (tmp_path / "gpu.jsonl").write_text(as_lines(facts))
    (tmp_path / "run.json").write_text(json.dumps({"machine": {}, "kernels": {"rows": facts}}))
    for name in ("gpu.jsonl", "run.json"):
        shares = measured_shares(tmp_path / name)
        assert {*shares} == {*BY_NAME}
        assert {step: shares[step] for step in EXPECTED} == pytest.approx(EXPECTED)


def test_shares_come_from_times_inside_a_block_too(tmp_path, forwards):
    rows = [row for several in forwards.values() for row in several]
    held = [replace(row, ms=4 * row.limit_ms, source="measured") for row in forwards[SM90]]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"denoiser": {"rows": [asdict(row) for row in [*rows, *held]]}}))
    assert measured_shares(path) == pytest.approx(dict.fromkeys(BY_NAME, 0.25))


def test_of_several_kernels_the_fastest_counts_and_of_sizes_the_largest(tmp_path):
    facts = list(times())
    for fact in facts:
        if fact["name"] == "gemm.fp8_pair qkv" and fact["tokens"] == 48832:
            fact["ms"] *= 0.625 / 0.75
        if fact["name"] == "attention.i8_fp8_f32" and fact["tokens"] == 29757:
            fact["ms"] /= 2
    (tmp_path / "gpu.jsonl").write_text(as_lines(facts))
    shares = measured_shares(tmp_path / "gpu.jsonl")
    assert (shares["qkv"], shares["attention"]) == pytest.approx((0.75, 0.4))


def test_a_projection_from_times_lies_within_its_bar_and_says_what_it_takes_for_granted(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    (tmp_path / "gpu.jsonl").write_text(as_lines(times()))
    checked, found = measure_projection(["sm89"], tmp_path / "gpu.jsonl", [LARGE])
    assert "gpu.jsonl" in checked and str(tmp_path) not in checked
    for row in found:
        assert row.limit_s < row.fastest_s < row.seconds < row.slowest_s
    table = projection_table(found)
    assert table.startswith("PROJECTED, measured on none of these GPUs")
    assert "50 steps, CFG 4: 100 forwards" in table and "carried over" in table
    assert all(len(line) <= 100 for line in table.splitlines())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ms": math.nan}, "ms is nan"),
        ({"ms": math.inf}, "ms is inf"),
        ({"ms": -1.0}, "ms is -1.0"),
        ({"ms": 0}, "ms is 0"),
        ({"ms": "4"}, "ms is '4'"),
        ({"ms": 10**400}, "ms is 1000"),
        ({"ms": True}, "ms is True"),
        ({"tokens": None}, "tokens is None"),
        ({"ms": 1e-3}, "of what an H200 can do"),
        ({"ms": None}, "has no sm90 times of attention"),
        ({"arch": "sm89"}, "has no sm90 times of attention"),
    ],
    ids=str,
)
def test_times_that_cannot_be_are_refused(tmp_path, change, says):
    facts = [f | change if f["name"] == "attention.i8_fp8_f32" else f for f in times([48832])]
    (tmp_path / "gpu.jsonl").write_text(as_lines(facts))
    with pytest.raises(WrongResult, match=says):
        measured_shares(tmp_path / "gpu.jsonl")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no sm90 times of modulate, qkv"),
        ("{broken", "neither JSON nor lines of JSON"),
        ("[1, 2]", "where an object was expected"),
        ("null", "where an object was expected"),
        ('{"kernels": {"rows": null}}', "has no sm90 times"),
        ('{"kernels": {"rows": [3, "x"]}}', "has no sm90 times"),
        ("\x00\xff" * 5000, "neither JSON nor lines of JSON"),
    ],
)
def test_a_file_without_times_is_refused(tmp_path, text, says):
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(WrongResult, match=says):
        measured_shares(tmp_path / "found.json")


def test_a_file_that_is_not_there_and_an_architecture_that_nobody_knows_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        measured_shares(tmp_path / "nowhere.jsonl")
    with pytest.raises(BadRequest, match=r"no architecture 'sm75'. Choose from sm89, sm90, sm120"):
        measure_projection(["sm75"])


def colours(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.uint32)
    packed = np.unique(pixels @ np.array([65536, 256, 1], np.uint32))
    return {f"#{colour:06X}" for colour in packed}


def test_a_projection_is_shown_with_its_bar_and_is_no_measurement(tmp_path):
    row = ProjectionRow(
        "sm89", "RTX 4090", "512x896x81", "one forward", 6.5, 6.0, 15.0, 5.3, "machine code"
    )
    clip = replace(row, what="official clip", seconds=650.0, fastest_s=600.0, slowest_s=1500.0)
    assert [
        (figure.value, figure.noise, figure.source) for figure in projection_figures([row, clip])
    ] == [(6.5, 4.5, "estimate"), (650.0, 450.0, "estimate")]
    line = projection_table([row, clip]).splitlines()[2].split()
    assert line[5:9] == ["6.5", "6.0", "15.0", "5.3"]
    made = projection_pictures([row, clip], tmp_path, "projection")
    assert [path.name for path in made] == ["projection.png", "projection.svg"]
    assert {pictures.COLOURS[0], pictures.COLOURS[3]} <= colours(made[0])
