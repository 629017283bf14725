"""Projections: what machine code lets expect, with its bar, for GPUs that nobody measured."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import pictures
from benchmarks.denoiser.projection import (
    PEERS,
    ProjectionRow,
    bar,
    evaluations,
    measure_projection,
    projection_figures,
    projection_pictures,
    projection_table,
    without_pose,
)
from benchmarks.denoiser.suite import estimated_rows, kernels_of
from benchmarks.kernel.model import GPUS
from engine.errors import BadRequest
from engine.memory import ClipShape
from engine.recipes import RECIPES
from kernels.arch import ARCHS, SM89, SM120
from tests.support.compiled import STATE

LARGE = ClipShape(512, 896, 81)


@pytest.fixture(scope="module")
def forwards():
    """Estimates of one forward, by architecture, out of the store of the compile tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCAIL_STATE", str(STATE))
        return {arch: estimated_rows(arch, LARGE, LARGE.tokens, kernels_of(arch)) for arch in ARCHS}


def test_a_recipe_is_so_many_forwards_with_and_without_the_skeleton():
    assert evaluations(RECIPES["preview"]["official"]) == (100, 0)
    assert evaluations(RECIPES["preview"]["production"]) == (3, 3)
    assert without_pose(LARGE) == 1792 + 37632  # docs/reference/performance.md B


def test_a_projection_is_what_is_expected_and_reaches_to_the_peers(monkeypatch, forwards):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, found = measure_projection(["sm89", "sm120"], [LARGE])
    assert checked.startswith("nothing: no time was measured")
    forward, production, official = found[:3]
    assert forward.seconds == pytest.approx(sum(row.ms for row in forwards[SM89]) / 1000)
    assert forward.bound_s == pytest.approx(sum(row.bound_ms for row in forwards[SM89]) / 1000)
    assert forward.limit_s < forward.bound_s < forward.seconds
    assert forward.fastest_s < forward.seconds < forward.slowest_s
    # LightX2V's 214 TFLOPS on an RTX 4090
    assert forward.slowest_s == pytest.approx(3152 / (PEERS["sm89"] * 660.6), rel=1e-2)
    assert official.seconds == pytest.approx(100 * forward.seconds)
    assert 3 * forward.seconds < production.seconds < 6 * forward.seconds
    assert [row.gpu for row in found[::3]] == ["RTX 4090", "RTX 5090"]


def test_the_bar_is_no_narrower_than_what_the_model_may_miss(forwards):
    for arch, rows in forwards.items():
        figure, _, fastest, slowest, _ = bar(arch, rows)
        assert fastest <= 0.85 * figure and slowest >= 1.15 * figure


def test_the_bar_begins_at_the_highest_clock_and_no_later_than_what_is_expected(forwards):
    rows, gpu = forwards[SM120], GPUS[SM120]
    figure, bound, fastest, slowest, limit = bar(SM120, rows)
    assert limit < bound < figure <= slowest
    assert figure * gpu.ghz / gpu.seen_ghz < fastest < figure


def test_an_architecture_that_nobody_knows_is_an_error():
    with pytest.raises(BadRequest, match=r"no architecture 'sm75'. Choose from sm80, sm86, sm89"):
        measure_projection(["sm75"])


def colours(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.uint32)
    packed = np.unique(pixels @ np.array([65536, 256, 1], np.uint32))
    return {f"#{colour:06X}" for colour in packed}


def test_a_projection_is_shown_with_its_bar_and_is_no_measurement(tmp_path):
    row = ProjectionRow("sm89", "RTX 4090", "512x896x81", "one forward", 7.2, 5.8, 6.0, 15.0, 5.3)
    clip = replace(row, what="official clip", seconds=720.0, fastest_s=600.0, slowest_s=1500.0)
    assert [
        (figure.name.partition(", ")[2], figure.value, figure.noise, figure.source)
        for figure in projection_figures([row, clip])
    ] == [
        ("expected", 7.2, 4.5, "estimate"),
        ("upper bound of speed", 5.8, 0.0, "estimate"),
        ("expected", 720.0, 450.0, "estimate"),
        ("upper bound of speed", 5.8, 0.0, "estimate"),
    ]
    table = projection_table([row, clip])
    assert table.startswith("PROJECTED, measured on none of these GPUs")
    assert "A clip is its denoising alone, in one window" in table
    assert all(len(line) <= 100 for line in table.splitlines())
    assert table.splitlines()[2].split()[5:10] == ["7.2", "6.0", "15.0", "5.8", "5.3"]
    made = projection_pictures([row, clip], tmp_path, "projection")
    assert [path.name for path in made] == ["projection.png", "projection.svg"]
    assert {pictures.COLOURS[0], pictures.COLOURS[3]} <= colours(made[0])
