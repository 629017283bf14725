"""Where a forward's time goes: work, limits, estimates, and times inside a block."""

# ruff: noqa: E402
import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.compiled import STATE

ROOT = Path(__file__).resolve().parents[2]

from benchmarks import pictures
from benchmarks.denoiser.forward import tflop
from benchmarks.denoiser.forward_blocks import drawn_scene
from benchmarks.denoiser.forward_place import DRY_SIZES, RUNS, prepared
from benchmarks.denoiser.gaps import DRAM_SHARE
from benchmarks.denoiser.launches import KEYS, KINDS, ORDER, STEPS, candidates, timed_block, work_of
from benchmarks.denoiser.suite import (
    REST,
    ForwardCase,
    StepRow,
    denoiser_figures,
    denoiser_pictures,
    denoiser_table,
    estimated_rows,
    groups,
    kernels_of,
    largest_losses,
    measure_denoiser,
    measured_rows,
)
from benchmarks.kernel.cases import SCAIL_14B as SIZES_14B
from benchmarks.kernel.cases import cases
from benchmarks.kernel.model import limits_ms
from benchmarks.kernel.suite import KernelRow, kernel_figures, spread_ms
from benchmarks.timing import WrongResult
from engine.config import SCAIL_14B
from engine.denoise.block import block_modulation, context_keys
from engine.errors import Unavailable
from engine.memory import ClipShape
from kernels.arch import ARCHS, SM89, SM90, SM120

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
        for row in estimated_rows(ForwardCase(arch, SCAIL_14B, size, size.tokens), kernels[arch])
    ]


@pytest.fixture
def place(tmp_path):
    args = type("Arguments", (), {"dry": True, "out": tmp_path / "found.jsonl"})()
    with prepared(args) as made, torch.inference_mode():
        yield made


def of(rows, arch, size="512x896x81", source="estimate"):
    return [row for row in rows if (row.arch, row.size, row.source) == (arch.name, size, source)]


# --- work and limits


@pytest.mark.parametrize(("size", "work"), [(SMALL, 1456), (LARGE, 3152)], ids=["416", "512"])
def test_the_steps_together_do_the_work_of_the_specification(size, work):
    """docs/reference/performance.md B."""
    found = sum(40 * step.count * work_of(step, SCAIL_14B, size.tokens).flop for step in STEPS)
    assert found / 1e12 == pytest.approx(tflop(SCAIL_14B, size))
    assert found / 1e12 == pytest.approx(work, rel=1e-3)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_each_step_is_measured_as_a_case_of_the_same_work(arch):
    by_name = {case.name: case for case in cases(arch, SIZES_14B)}
    for step in STEPS:
        work = work_of(step, SCAIL_14B, 1000)
        for name in candidates(step, SCAIL_14B, arch):
            case = by_name[name]
            if step.name == "cross q":  # the same kernel as qkv, a third as wide
                assert work.flop == case.flop(1000) / 3
            elif step.name == "cross attention":  # a prompt that fills all rows
                assert work.flop / KEYS == case.flop(1000) / (77 + 1 + 257)
            else:
                assert (work.flop, work.moved) == (case.flop(1000), case.moved(1000))


def test_the_order_has_each_step_as_often_as_it_is_counted():
    assert Counter(ORDER) == {step.name: step.count for step in STEPS}
    assert {step.kind for step in STEPS} == set(KINDS)


@pytest.mark.parametrize(("arch", "seconds"), [(SM89, 0.74), (SM120, 0.58), (SM90, 0.99)])
def test_exponentials_of_attention_take_what_the_specification_says(arch, seconds):
    """docs/reference/performance.md B, the last line."""
    work = work_of(BY_NAME["attention"], SCAIL_14B, LARGE.tokens)
    limits = limits_ms(work.flop, work.moved, work.exponentials, work.bits, arch)
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


def test_an_estimate_is_never_better_than_the_limit(rows):
    assert len(rows) == len(ARCHS) * 2 * len(STEPS)
    for row in rows:
        assert row.limit_ms < row.ms < 3 * row.limit_ms, row
        assert (row.source, row.noise_ms) == ("estimate", 0.0)
        assert row.gap and row.kernel


def test_traffic_beyond_the_least_is_time_lost(rows):
    rope = next(row for row in of(rows, SM89) if row.step == "rope")
    assert rope.ms == pytest.approx(40 * 17 * 5120 * LARGE.tokens / (DRAM_SHARE * 1008e6))
    assert rope.share == pytest.approx(DRAM_SHARE * 9 / 17)
    assert "1.9 times the least traffic" in rope.gap


def test_instructions_of_half_rate_are_found_and_named(rows):
    down = next(row for row in of(rows, SM89) if row.step == "down + residual")
    assert down.share == pytest.approx(0.5, abs=0.02)
    assert "QMMA.16832.F32.E4M3.E4M3 runs at 50% of the best" in down.gap
    assert not any("of the best" in row.gap for arch in (SM90, SM120) for row in of(rows, arch))


def test_the_largest_loss_on_hopper_is_attention_between_two_units(rows):
    first, second = largest_losses(of(rows, SM90), 2)
    assert first.step == "attention" and first.lost_ms > 10 * second.lost_ms
    assert "ping-pong warpgroups" in first.gap


def test_without_a_gpu_all_is_said_to_be_an_estimate(monkeypatch, rows):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: a block would be timed")
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    checked, found = measure_denoiser([LARGE])
    assert "estimates, no GPU here runs them" in checked
    assert found == [row for row in rows if row.size == "512x896x81"]


def test_a_folder_of_cubins_takes_the_place_of_compiling(kernels, rows, tmp_path):
    """As `forward.py build` writes it, for a machine without a compiler."""
    made = {c.name: c for several in kernels[SM120].values() for c in several.values()}
    for name, cubin in made.items():
        (tmp_path / f"{name}.cubin").write_bytes(cubin.data)
        (tmp_path / f"{name}.json").write_text(json.dumps(cubin.record()))
    _, found = measure_denoiser([LARGE], tmp_path)
    assert found == of(rows, SM120)
    (tmp_path / "cross_attention.json").unlink()
    with pytest.raises(Unavailable, match=r"no kernels cross_attention for sm120\. Make"):
        measure_denoiser([LARGE], tmp_path)


# --- times inside a block


class FakeStopwatch:
    """The n-th lap takes `scale` * n ms; a block marks 32 points."""

    def __init__(self, scale):
        self.scale, self.marks = scale, 0

    def mark(self):
        self.marks += 1

    def laps_ms(self):
        return [self.scale * n for n in range(1, self.marks)]


def test_laps_of_a_block_go_to_their_steps(place):
    scene = drawn_scene(place, DRY_SIZES[0])
    context = scene.context
    keys = context_keys(place.ops, scene.context_weights, context.text, context.vision)
    modulation = block_modulation(scene.weights, scene.modulation)
    found = timed_block(
        place.ops, scene.weights, keys, scene.x, modulation, scene.rope, FakeStopwatch(1.0)
    )
    places = {name: [n for n, own in enumerate(ORDER) if own == name] for name in BY_NAME}
    assert {name: found[name] for name in BY_NAME} == {
        name: sum(2 * n + 1 for n in at) for name, at in places.items()
    }
    assert found["between"] == sum(range(2, 31, 2))


def test_a_block_that_is_right_gets_times_of_the_whole_forward_and_their_noise(place):
    scales = iter([1.0, 3.0, 2.0, 2.0, 2.0])
    found = measured_rows(place, DRY_SIZES[0], lambda: FakeStopwatch(next(scales)))
    assert RUNS == 5
    assert [row.step for row in found] == [*BY_NAME, REST.name]
    qkv, rest = next(row for row in found if row.step == "qkv"), found[-1]
    layers = place.model.layers
    assert (qkv.ms, qkv.noise_ms, qkv.count) == (layers * 2 * 3, layers * 3, layers)
    assert qkv.share == qkv.limit_ms / qkv.ms
    assert (rest.ms, rest.limit_ms, rest.share, rest.lost_ms) == (layers * 480, 0, None, rest.ms)
    assert {row.source for row in found} == {"measured"}


def test_a_block_that_is_wrong_is_not_timed(place):
    def never():
        raise AssertionError("it must not be timed")

    right = place.ops.attention
    broken = replace(place.ops, attention=lambda *given: right(*given).flip(0))
    with pytest.raises(WrongResult, match=r"64x96x5: a block is off by \d"):
        measured_rows(replace(place, ops=broken), DRY_SIZES[0], never)


def test_noise_is_half_of_the_spread_of_medians_and_none_has_no_time():
    times = iter([4.0, 7.0, 5.0])
    assert spread_ms(lambda run: next(times), lambda: None) == (5.0, 1.5)
    assert spread_ms(lambda run: None, lambda: None) is None


# --- what is shown


def as_measured(row, ms=None):
    return replace(row, ms=ms or 2 * row.ms, noise_ms=1.0, source="measured", kernel="", gap="")


def test_estimates_and_times_have_tables_of_their_own(rows):
    table = denoiser_table([*of(rows, SM90), *map(as_measured, of(rows, SM90))])
    estimate, measured = table.split("\n\n")
    assert "ESTIMATE" in estimate and "est ms" in estimate and "measured" not in estimate
    assert "measured" in measured and "est" not in measured.splitlines()[1].split()
    assert all(len(line) <= 100 for line in table.splitlines())
    total = next(line for line in estimate.splitlines() if line.startswith("the forward")).split()
    assert float(total[2]) == pytest.approx(3151.7, abs=0.1)
    assert float(total[5]) == pytest.approx(sum(row.ms for row in of(rows, SM90)), abs=0.1)
    assert "ping-pong" in measured  # a measured loss is explained by the same machine code


def test_at_least_the_three_largest_losses_are_listed_in_order(rows):
    for arch in ARCHS:
        lines = denoiser_table(of(rows, arch)).splitlines()
        heads = [re.match(r"  \d+\. .*, (\d+) ms, ", line) for line in lines]
        lost = [float(head[1]) for head in heads if head]
        assert len(lost) >= 3 and lost == sorted(lost, reverse=True)


def test_figures_have_names_of_their_own_and_say_where_they_are_from(rows):
    both = [*rows, *map(as_measured, rows)]
    found = denoiser_figures(both)
    assert len({figure.name for figure in found}) == len(found) == len(both) + len(groups(both))
    by_name = {figure.name: figure for figure in found}
    whole = by_name["sm89 512x896x81 measured forward"]
    assert whole.value == pytest.approx(2 * sum(row.ms for row in of(rows, SM89)))
    assert (whole.noise, whole.source, whole.unit) == (len(STEPS), "measured", "ms")
    assert by_name["sm89 512x896x81 estimate qkv"].source == "estimate"


def test_figures_of_kernels_keep_rates_of_machine_code_apart_from_times():
    found = kernel_figures(
        [
            KernelRow("gemm.i8 qkv", "sm89", 218, 48.0, 1.91, 590.4),
            KernelRow("gemm.i8 qkv", "sm90", tokens=77, ms=4.0, noise_ms=0.1),
            KernelRow("xformers", "sm90", tokens=77, note="not installed"),
        ]
    )
    assert [(f.name, f.value, f.noise, f.source) for f in found] == [
        ("sm89 gemm.i8 qkv", 590.4, 0.0, "estimate"),
        ("sm90 gemm.i8 qkv, 77 tokens", 4.0, 0.1, "measured"),
    ]


def colours(path):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.uint32)
    packed = np.unique(pixels @ np.array([65536, 256, 1], np.uint32))
    return {f"#{colour:06X}" for colour in packed}


def test_pictures_show_every_kind_of_step(rows, tmp_path):
    shown = of(rows, SM90)
    made = denoiser_pictures([*shown, *map(as_measured, shown)], tmp_path, "denoiser")
    assert [path.name for path in made] == ["denoiser-512x896x81.png", "denoiser-512x896x81.svg"]
    assert {*pictures.COLOURS[: len(KINDS)]} <= colours(made[0])


def test_a_row_of_the_suite_is_json():
    row = StepRow(
        "sm90", "H200", "512x896x81", 48832, "qkv", KINDS[1], 40, 307.2, 73.2, "tensor", 155.3,
        162.6, 0.0, "estimate", "gemm.fp8 qkv", "why",
    )  # fmt: skip
    assert StepRow(**json.loads(json.dumps(asdict(row)))) == row
    assert (row.lost_ms, row.share) == pytest.approx((7.3, 155.3 / 162.6))
