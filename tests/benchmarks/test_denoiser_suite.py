"""The estimate of a forward: work, limits, and times from machine code."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pictures
from benchmarks.denoiser.forward import DRY_SIZES, drawn_scene, our_block, prepared
from benchmarks.denoiser.launches import KEYS, KINDS, OF_FEW, STEPS, candidates
from benchmarks.denoiser.suite import (
    denoiser_figures,
    denoiser_pictures,
    denoiser_table,
    estimated_rows,
    groups,
    kernels_of,
    measure_denoiser,
    totals,
)
from benchmarks.kernel.cases import cases
from benchmarks.kernel.model import DRAM_SHARE, GPUS, limits_ms
from engine.config import SCAIL_14B
from engine.memory import ClipShape
from kernels.arch import ARCHS, SM80, SM86, SM89, SM90, SM120
from kernels.ops import Ops
from tests.benchmarks.test_projection import colours
from tests.support.compiled import STATE

LARGE, SMALL = ClipShape(512, 896, 81), ClipShape(416, 672, 81)
BY_NAME = {step.name: step for step in STEPS}


@pytest.fixture(scope="module")
def kernels():
    """Every kernel of a step, out of the store of the compile tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCAIL_STATE", str(STATE))
        return {arch: kernels_of(arch) for arch in ARCHS}


@pytest.fixture(scope="module")
def rows(kernels):
    return [
        row
        for arch in ARCHS
        for size in (LARGE, SMALL)
        for row in estimated_rows(arch, size, size.tokens, kernels[arch])
    ]


def of(rows, arch, size="512x896x81"):
    return [row for row in rows if (row.arch, row.size) == (arch.name, size)]


# --- work and limits


@pytest.mark.parametrize(
    ("size", "work"), [(SMALL, 1456), (LARGE, 3152), (ClipShape(704, 1280, 81), 9891)],
    ids=["416", "512", "704"],
)  # fmt: skip
def test_the_steps_together_do_the_work_of_the_specification(size, work):
    """docs/reference/performance.md B."""
    found = sum(40 * step.count * step.work(size.tokens).flop for step in STEPS)
    assert found / 1e12 == pytest.approx(work, rel=1e-3)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_each_step_is_measured_as_a_case_of_the_same_work(arch):
    by_name = {case.name: case for case in cases(arch, SCAIL_14B)}
    for step in STEPS:
        work = step.work(1000)
        assert candidates(step, arch)
        for name in candidates(step, arch):
            measured = by_name[name].work(1000)
            if step.name == "cross q":  # the same kernel as qkv, a third as wide
                assert work.flop == measured.flop / 3
            elif step.name == "cross attention":  # a prompt that fills all rows
                assert work.flop / KEYS == measured.flop / (77 + 1 + 257)
            else:
                assert (work.flop, work.moved) == (measured.flop, measured.moved)


def test_a_block_calls_each_operation_as_often_as_its_steps_are_counted():
    """Counts what `run_block` really calls, on tokens of a tiny model."""
    called, counted = Counter(), Counter(OF_FEW)
    with prepared(None, STATE / "nothing-is-said", dry=True) as place:

        def counting(name):
            op = getattr(place.ops, name)
            return lambda *given: called.update([name]) or op(*given)

        ops = Ops(**{name: counting(name) for name in Ops.__dataclass_fields__})
        scene = drawn_scene(place, DRY_SIZES[0])
        run = our_block(replace(place, ops=ops), scene)
        called.clear()  # what the keys of cross attention took, once a clip
        run(scene.x.clone())
    for step in STEPS:
        kind, ending = step.case.partition(".")[0], step.case.rpartition(" ")[2]
        counted[{"gelu": "gemm_gelu", "residual": "gemm_residual"}.get(ending, kind)] += step.count
    assert called == counted
    assert {step.kind for step in STEPS} == set(KINDS)


@pytest.mark.parametrize(
    ("arch", "seconds"), [(SM89, 0.74), (SM120, 0.58), (SM90, 0.99), (SM86, 1.71), (SM80, 1.57)]
)
def test_exponentials_of_attention_take_what_the_specification_says(arch, seconds):
    """docs/reference/performance.md B, the last line."""
    work = BY_NAME["attention"].work(LARGE.tokens)
    limits = limits_ms(work, arch)
    assert 40 * limits["MUFU"] / 1000 == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize(
    ("arch", "name", "bound"),
    [
        (SM90, "attention", "tensor+MUFU"),
        (SM89, "attention", "tensor"),
        (SM120, "down + residual", "tensor"),
        (SM90, "modulate", "memory"),
    ],
)
def test_the_unit_that_binds_is_named(rows, arch, name, bound):
    assert next(row for row in of(rows, arch) if row.step == name).bound == bound


@pytest.mark.parametrize(("arch", "seconds"), [(SM89, 4.95), (SM120, 3.86), (SM90, 1.63)])
def test_the_limit_of_a_forward_is_near_the_roofline_of_the_specification(rows, arch, seconds):
    """There cross attention has the 8-bit rate, and six standalone passes are left out."""
    limit = sum(row.limit_ms for row in of(rows, arch)) / 1000
    assert 1 < limit / seconds < 1.08


# --- estimates


def test_an_estimate_is_never_better_than_the_bound_nor_that_than_the_limit(rows):
    assert len(rows) == len(ARCHS) * 2 * len(STEPS)
    for row in rows:
        assert 0.999 * row.limit_ms <= row.bound_ms < row.ms < 3.4 * row.limit_ms, row


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_the_readme_tells_the_two_figures_and_the_largest_losses(rows, arch):
    limit, bound, ms = (value / 1000 for value in totals(of(rows, arch)))
    line = f"| {GPUS[arch].name} | {ms:.1f} s | {bound:.1f} s | {limit:.1f} s | "
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    row = next(row for row in text.splitlines() if row.startswith(line))
    cells = row.removeprefix(line).split(" | ")
    losses = sorted(of(rows, arch), key=lambda row: -row.lost_ms)
    for cell, step in zip(cells, losses):  # FFN down 0.43 s: ...
        said = float(re.search(r"(\d\.\d+) s", cell)[1])
        assert said == pytest.approx(step.lost_ms / 1000, rel=0.1), (cell, step)


def test_traffic_beyond_the_least_is_time_lost(rows):
    rope = next(row for row in of(rows, SM89) if row.step == "rope")
    assert rope.ms == pytest.approx(40 * 17 * 5120 * LARGE.tokens / (DRAM_SHARE * 1008e6))
    assert rope.limit_ms / rope.ms == pytest.approx(DRAM_SHARE * 9 / 17)
    assert rope.bound_ms / rope.ms == pytest.approx(DRAM_SHARE)
    assert rope.issue is rope.mufu is rope.shared is rope.warps is None  # there is no main loop


def test_no_product_on_ada_runs_at_half_rate(rows):
    """E4M3 with sums in FP32 would: INT8 is why FFN-down is as fast as the others."""
    down = next(row for row in of(rows, SM89) if row.step == "down + residual")
    assert down.limit_ms / down.bound_ms > 0.9


def test_the_largest_loss_on_hopper_is_attention_between_two_units(rows):
    second, first = sorted(of(rows, SM90), key=lambda row: row.lost_ms)[-2:]
    assert first.step == "attention" and first.lost_ms > 10 * second.lost_ms
    assert first.ms > 0.9 * (1 + first.issue + first.mufu) * first.bound_ms / first.issue  # in step
    assert first.mufu == pytest.approx(1, abs=0.05) and first.warps == 2


@pytest.mark.parametrize("arch", [SM89, SM120])
def test_shared_memory_of_attention_is_busy_as_the_readme_says(rows, arch):
    attention = next(row for row in of(rows, arch) if row.step == "attention")
    assert attention.shared == pytest.approx(0.74, abs=0.015)
    assert attention.warps == 4


def test_the_residual_tile_is_not_hidden_where_one_block_fills_a_multiprocessor(rows):
    """Of the same work for each value, `o` loses more than `qkv`, which moves a quarter."""
    by_name = {row.step: row for row in of(rows, SM89)}
    lost = {name: by_name[name].lost_ms / by_name[name].tflop for name in ("qkv", "o + residual")}
    assert lost["o + residual"] > 2 * lost["qkv"]


def test_all_is_said_to_be_an_estimate(monkeypatch, rows):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, found = measure_denoiser([LARGE])
    assert "all times are estimates" in checked
    assert found == [row for row in rows if row.size == "512x896x81"]


# --- what is shown


def test_the_table_says_that_it_is_an_estimate_and_sums_the_steps(rows):
    table = denoiser_table(of(rows, SM90))
    assert "ESTIMATES in ms" in table and "expect" in table and "measured" not in table
    assert all(len(line) <= 100 for line in table.splitlines())
    total = next(line for line in table.splitlines() if line.startswith("the forward")).split()
    assert float(total[2]) == pytest.approx(3151.7, abs=0.1)
    for at, name in enumerate(("limit_ms", "bound_ms", "ms", "lost_ms"), start=4):
        value = sum(getattr(row, name) for row in of(rows, SM90))
        assert float(total[at]) == pytest.approx(value, abs=0.6)


def test_figures_have_names_of_their_own_and_say_that_they_are_estimates(rows):
    found = denoiser_figures(rows)
    count = 2 * (len(rows) + len(groups(rows)))
    assert len({figure.name for figure in found}) == len(found) == count
    by_name = {figure.name: figure for figure in found}
    for kind, name in (("expected", "ms"), ("upper bound of speed", "bound_ms")):
        whole = by_name[f"sm89 512x896x81 forward, {kind}"]
        assert whole.value == pytest.approx(sum(getattr(row, name) for row in of(rows, SM89)))
    assert {(figure.source, figure.unit, figure.noise) for figure in found} == {
        ("estimate", "ms", 0.0)
    }


def test_pictures_show_every_kind_of_step(rows, tmp_path):
    made = denoiser_pictures(rows, tmp_path, "denoiser")
    assert [path.name for path in made] == ["denoiser.png", "denoiser.svg"]
    assert {*pictures.COLOURS[: len(KINDS)]} <= colours(made[0])
