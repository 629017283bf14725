"""The quality of 8 bits: figures are of the programs they name, and what is wrong is refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality import suite
from benchmarks.quality.blocks import BlockError, Walked, worst
from benchmarks.quality.rows import (
    QualityRow,
    quality_figures,
    quality_pictures,
    quality_table,
)
from benchmarks.quality.suite import (
    CALIBRATED,
    QualityScene,
    measure_quality,
    measure_scene,
)
from benchmarks.quality.sums import hopper_product, measure_sums
from benchmarks.timing import WrongResult
from engine.demo.weights import demo_weights
from engine.errors import Unavailable
from kernels.arch import SM86, SM89, SM90
from kernels.gemm import GEMM
from tests.support.compiled import STATE

ATTENTIONS = ["int8fp8", "int8", "fp8", "sdpa"]


@pytest.fixture(scope="module", autouse=True)
def state():
    """Keeps compiled kernels where all tests have them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCAIL_STATE", str(STATE))
        yield


@pytest.fixture(scope="module")
def scene(state):
    demo = demo_weights(STATE)
    recipes = suite._recipes({"official": 1})
    return QualityScene(
        "test", demo.checkpoint, demo.models, suite.dance((64, 64), 5), recipes,
        builds=("fp8", CALIBRATED),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(scene, tmp_path_factory):
    return list(measure_scene(scene, tmp_path_factory.mktemp("quality") / "scene"))


# --- a scene


def test_a_row_for_each_attention_of_each_package(rows):
    assert [(row.weights, row.attention) for row in rows] == [
        (weights, attention) for weights in ("fp8", CALIBRATED) for attention in ATTENTIONS
    ]
    assert {(row.scene, row.recipe) for row in rows} == {("test", "official")}
    assert [len(row.blocks) for row in rows] == [2] * 8


def test_every_row_is_near_the_exact_model_and_none_is_it(rows):
    for row in rows:
        assert 0 < row.latent_error < 0.1
        assert 25 < row.worst_psnr_db <= row.psnr_db < 90
        assert 0.8 < row.ssim < 1
        assert all(0 < error.own_error < 0.1 for error in row.blocks)


def test_errors_of_the_first_block_are_its_own_and_then_add_up(rows):
    for row in rows:
        first, last = row.blocks
        assert first.through_error == first.own_error
        assert last.through_error > last.own_error


def test_calibrated_int8_rows_are_nearer_than_fp8(rows):
    fp8, calibrated = rows[:4], rows[4:]
    assert all(b.psnr_db > a.psnr_db + 5 for a, b in zip(fp8, calibrated))
    assert all(b.blocks[1].through_error < a.blocks[1].through_error / 2
               for a, b in zip(fp8, calibrated))  # fmt: skip


def test_the_worst_frame_is_kept_with_the_exact_one_beside_it(rows):
    for row in rows:
        both = np.array(Image.open(row.picture)).astype(float)
        exact, ours = np.split(both, 2, axis=1)
        assert exact.shape == (64, 64, 3)
        level = 10 * np.log10(255**2 / np.square(exact - ours).mean())
        assert level == pytest.approx(row.worst_psnr_db, abs=1e-4)


def test_a_walk_that_is_not_of_the_package_is_refused(scene, tmp_path):
    one = replace(scene, builds=("fp8",))
    made, packages, walks = suite._exact_side(one, SM89, tmp_path)
    loaded = suite.packaged(one, packages["fp8"], "int8fp8")
    exact, recipe = made["official"], one.recipes["official"]
    right = walks["fp8", "official", "int8fp8"][0]
    suite.check_walk(loaded, recipe, exact, right)
    for what, wrong in (
        ("8-bit", replace(right, velocity=right.velocity.roll(1, -1))),
        ("exact", replace(right, exact=1.1 * right.exact)),
        ("8-bit", replace(right, velocity=right.exact)),
    ):
        with pytest.raises(WrongResult, match=f"{what} blocks walked one by one are"):
            suite.check_walk(loaded, recipe, exact, wrong)


def test_a_package_without_its_checkpoint_is_refused(tmp_path):
    with pytest.raises(Unavailable, match="add --checkpoint FILE"):
        measure_quality(package=tmp_path)


def test_attention_is_all_that_an_architecture_has():
    assert suite.attentions(SM89) == suite.attentions(SM90) == ATTENTIONS
    assert suite.attentions(SM86) == ["int8", "sdpa"]


def test_of_an_architecture_that_multiplies_no_e4m3_no_such_package_is_built():
    assert suite.buildable(["fp8", "int8", CALIBRATED], SM89) == ["fp8", "int8", CALIBRATED]
    assert suite.buildable(["fp8", "int8", CALIBRATED], SM86) == ["int8", CALIBRATED]


# --- coherent sums


def test_products_of_one_sign_lose_much_without_promotion_and_little_with_it():
    rows = measure_sums()
    assert {(row.way, row.depth) for row in rows} == {
        ("fp8", 13824), ("fp8 if promoted every 128", 13824),
    }  # fmt: skip
    for row in rows:
        if row.way == "fp8":
            assert 0.1 < row.error < 0.5, row
        else:
            assert row.error < 0.01, row
    assert "fp8" in GEMM


def test_the_model_of_a_short_sum_is_exact_where_nothing_is_dropped():
    small = np.ones((2, 256))
    assert (hopper_product(small, small, 256) == 256).all()
    signs = np.where(np.arange(4096) % 2, 1.0, -1.0)[None]
    assert (hopper_product(signs, np.ones((1, 4096)), 4096) == 0).all()


def test_an_equal_sum_stops_growing_where_a_product_is_below_the_last_bit_that_is_kept():
    """Products of 1 until the sum is 2^14: then each is less than its last bit."""
    ones = np.ones((1, 2**15))
    assert hopper_product(ones, ones, 2**15) <= 2**14
    assert hopper_product(ones, ones, 128) == 2**15


def test_the_suite_shows_what_sums_cost_as_an_estimate_beside_the_clips():
    rows = [made_row(), *measure_sums(256)]
    table = suite.whole_table(rows)
    assert "sum % (upper bound)" in table and max(map(len, table.splitlines())) <= 100
    figures = suite.whole_figures(rows)
    told = [figure for figure in figures if figure.name.endswith("upper bound")]
    assert len(told) == 4 and {figure.source for figure in told} == {"estimate"}
    assert len({figure.name for figure in figures}) == len(figures)


# --- what is said of it


def made_row(weights="fp8", attention="int8", psnr=40.0, error=0.02, blocks=2, scene="drawn"):
    errors = tuple(BlockError(n, error, (n + 1) * error) for n in range(blocks))
    return QualityRow(
        scene, "production", weights, attention, 0.031, psnr + 2, psnr, 4, 0.98, errors,
    )  # fmt: skip


def test_the_worst_of_several_evaluations_is_taken_figure_by_figure():
    a, b = BlockError(0, 0.1, 0.2), BlockError(0, 0.2, 0.1)
    nothing = torch.zeros(1)
    walks = [Walked((error,), nothing, nothing) for error in (a, b)]
    assert worst(walks) == (BlockError(0, 0.2, 0.2),)


def test_the_table_fits_100_columns_and_shows_the_error_after_the_last_block():
    rows = [made_row("int8 calibrated", name, blocks=40) for name in ATTENTIONS]
    lines = quality_table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split() == [
        "drawn", "production", "int8", "calibrated", "int8fp8", "3.10", "80.00", "42.0", "40.0",
        "0.9800",
    ]  # fmt: skip


def test_figures_have_names_of_their_own_and_are_told_to_the_last_digit_that_means_something():
    found = quality_figures([made_row(), made_row(attention="fp8", psnr=38.123)])
    assert len({figure.name for figure in found}) == len(found) == 10
    by_name = {figure.name: figure for figure in found}
    level = by_name["drawn production fp8 fp8: worst PSNR"]
    assert (level.value, level.unit, level.noise, level.better) == (38.1, "dB", 0.05, "higher")
    last = by_name["drawn production fp8 int8: last block"]
    assert (last.value, last.unit, last.better, last.source) == (4.0, "%", "lower", "measured")


def test_rows_are_json():
    row = made_row()
    kept = json.loads(json.dumps(asdict(row)))
    assert kept["blocks"][1]["through_error"] == row.blocks[1].through_error


def test_pictures_show_the_worst_frame_of_each_form_of_weights(rows, tmp_path):
    found = quality_pictures(rows, tmp_path / "out", "quality")
    assert [path.name for path in found] == [
        f"quality-test-{what}.{suffix}"
        for what in ("frames", "blocks")
        for suffix in ("png", "svg")
    ]
    lowest = min(rows[:4], key=lambda row: row.worst_psnr_db)
    shown = np.array(Image.open(found[0]).convert("RGB"))
    assert shown.shape[1] > 1000
    assert shown.std() > 20  # frames, not an empty page
    again = quality_pictures([lowest], tmp_path / "again", "quality")
    assert Image.open(again[0]).size[1] < shown.shape[0]  # one line of frames, not two


def test_every_run_of_the_suite_measures_the_sums(monkeypatch):
    monkeypatch.setattr(suite, "tiny_scenes", lambda folder: [])
    monkeypatch.setattr(suite, "measure_sums", lambda: measure_sums(256))
    assert suite.SUITE.measure()[1] == measure_sums(256)
