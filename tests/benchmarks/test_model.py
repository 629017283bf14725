"""The model of a GPU: each unit, the queue, the step, the ends and the last wave; what is known."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.kernel import model, published
from benchmarks.kernel.estimate import estimate, program_cycles, programs, tile_of
from benchmarks.kernel.model import (
    DRAM_SHARE,
    GPUS,
    START_WAITS,
    WAIT_CYCLES,
    Demands,
    blocks_together,
    demands,
    expected_rate,
    flop,
    flop_a_cycle,
    loop_tflops,
    peak_tflops,
    upper_bound_tflops,
)
from benchmarks.kernel.published import BESIDE, CHECK, FITTED, PUBLISHED, WITHIN
from benchmarks.kernel.queue import throughput
from benchmarks.kernel.work import LaunchWork, product, self_attention
from kernels.aot.cubin import Cubin, Mix
from kernels.aot.sass import disassemble
from kernels.arch import SM80, SM86, SM89, SM90, SM120
from kernels.attention import variants
from kernels.gemm import GEMM
from tests.support.compiled import STATE, compiled, each_arch

ADA = GPUS[SM89]
MMA = {"IMMA.16832.S8.S8.SAT": 64}  # 1024 cycles of a tensor core
INT8_LOOP = Mix(122, MMA, {"LDSM": 16, "LDGSTS": 6, "LDS": 3})
NEED = Demands(1024.0, 122.0, 0.0, 91.0, warps=2, blocks=1, is_in_step=False)  # what it needs
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}


def cubin(loop, **changes):
    """The INT8 product as ptxas made it for an RTX 4090."""
    made = Cubin("gemm", "sm89", "", "", "gemm_kernel", 8, 49152, 0, 218, 18816, "12.6", loop, b"")
    return replace(made, **changes)


# --- instructions


@pytest.mark.parametrize(
    ("instruction", "arch", "tflops"),
    [
        ("IMMA.16832.S8.S8.SAT", SM89, 660.6),
        ("QMMA.16832.F32.E4M3.E4M3", SM89, 330.3),
        ("QMMA.16832.F16.E4M3.E4M3", SM89, 660.6),
        ("HMMA.16816.F32.BF16", SM89, 165.2),
        ("QMMA.SF.16832.F32.E4M3.E4M3.E8", SM120, 838),
        ("IMMA.16832.S8.S8.SAT", SM120, 838),
        ("QGMMA.64x256x32.F32.E4M3.E4M3", SM90, 1979),
        ("IGMMA.64x128x32.S8.S8", SM90, 1979),
        ("HGMMA.64x128x16.F32.BF16", SM90, 989.5),
        ("IMMA.16832.S8.S8.SAT", SM86, 284.7),
        ("HMMA.16816.F32.BF16", SM86, 71.2),
        ("IMMA.16832.S8.S8.SAT", SM80, 624),
        ("HMMA.16816.F32.BF16", SM80, 312),
    ],
)
def test_peaks_are_those_of_the_data_sheets(instruction, arch, tflops):
    """docs/reference/performance.md A."""
    assert peak_tflops(Mix(1, {instruction: 3}, {}), GPUS[arch]) == pytest.approx(tflops, rel=5e-3)


def test_a_mix_of_instructions_has_the_mean_of_their_times():
    """Attention with INT8 logits and slow FP8 values: docs/reference/kernels.md 2.3 has 440."""
    mix = Mix(1, {"IMMA.16832.S8.S8.SAT": 32, "QMMA.16832.F32.E4M3.E4M3": 32}, {})
    assert peak_tflops(mix, GPUS[SM89]) == pytest.approx(440, rel=1e-2)


def test_a_warp_does_a_quarter_of_what_its_warpgroup_does():
    assert flop("QGMMA.64x256x32.F32.E4M3.E4M3") * 4 == 2 * 64 * 256 * 32
    assert flop("IMMA.16832.S8.S8.SAT") == 2 * 16 * 8 * 32
    with pytest.raises(ValueError, match="unknown matrix instruction"):
        flop("DMMA.884")


def test_every_instruction_that_a_product_asks_for_has_a_rate():
    for form in GEMM.values():
        for names in form.bias.loop.mma.values():
            assert all(flop(name) and flop_a_cycle(name, ADA) for name in names)


# --- the units of a multiprocessor


def test_an_iteration_asks_its_units_for_what_its_instructions_need():
    assert demands(cubin(INT8_LOOP), ADA) == NEED
    busy = replace(INT8_LOOP, others={"MUFU": 3, "STS": 1, "BAR": 2})
    found = demands(cubin(busy, registers=128), ADA)
    assert found == replace(NEED, special=24, shared=4, blocks=2)


@pytest.mark.parametrize(
    ("loop", "share"),
    [
        (INT8_LOOP, 1.0),
        (replace(INT8_LOOP, instructions=2048), 1024 / 2048),
        (replace(INT8_LOOP, others={"MUFU": 256}), 1024 / 2048),
        # one pipe for four schedulers: 128 loads of 4 cycles of each
        (replace(INT8_LOOP, others={"LDSM": 128}), 1024 / 2048),
        (replace(INT8_LOOP, others={"LDGSTS": 128}), 1024 / 2048),
        (replace(INT8_LOOP, others={"STS": 128}), 1024 / 2048),
        (replace(INT8_LOOP, others={"LDS": 512}), 1024 / 2048),
    ],
    ids=["tensor", "issue", "MUFU", "LDSM", "LDGSTS", "STS", "LDS"],
)
def test_the_busiest_unit_is_the_upper_bound(loop, share):
    assert upper_bound_tflops(cubin(loop), ADA) == pytest.approx(660.6 * share, rel=1e-3)
    assert loop_tflops(cubin(loop), ADA) < upper_bound_tflops(cubin(loop), ADA)


@pytest.mark.parametrize("unit", ["tensor", "issue", "special", "shared"])
def test_every_unit_takes_from_the_expected_rate(unit):
    """A unit that was forgotten would take nothing."""
    more = replace(NEED, **{unit: getattr(NEED, unit) + 200})
    assert expected_rate(more) < 0.97 * expected_rate(NEED)


def test_the_expected_rate_is_that_of_the_queue():
    """Worked out by hand for one warp on each scheduler, whose four meet at the pipe alone."""
    alone = replace(NEED, warps=1, shared=0.0)
    assert expected_rate(alone) == 1 / (1024 + 122 + WAIT_CYCLES)
    assert expected_rate(replace(alone, warps=2)) == pytest.approx(
        2 / (1024 * (1 + 1024 / 1396) + 122 * (1 + 122 / 1396) + 250)
    )
    together = Demands(0.0, 0.0, 0.0, 91.0, 2, 1, is_in_step=False)
    assert 1 / expected_rate(together) == pytest.approx(4 * 91, rel=0.2)  # the pipe binds
    assert 1 / expected_rate(replace(together, warps=16)) == pytest.approx(4 * 91, rel=1e-3)


def test_a_queue_alone_takes_the_sum_of_its_times_and_a_full_one_the_longest():
    needs = (1000.0, 100.0)
    assert throughput(needs, 1, 250) == 1 / 1350
    assert throughput(needs, 64, 250) == pytest.approx(1e-3, rel=1e-3)
    rates = [throughput(needs, warps, 250) for warps in range(1, 9)]
    assert rates == sorted(rates)


def test_classes_wait_for_each_other_at_the_shared_station_alone():
    assert throughput((1000.0,), 2, 250, classes=4) == throughput((1000.0,), 2, 250)
    assert throughput((), 1, 0, shared=10, classes=4) == pytest.approx(1 / 40)
    slower = throughput((1000.0,), 2, 250, shared=100, classes=4)
    assert slower < throughput((1000.0,), 2, 250, shared=100) < throughput((1000.0,), 2, 250)


def test_registers_and_shared_memory_limit_how_many_blocks_run_together():
    assert blocks_together(cubin(INT8_LOOP), ADA) == 1  # 218 registers of 256 threads
    assert blocks_together(cubin(INT8_LOOP, registers=128), ADA) == 2
    wide = cubin(INT8_LOOP, registers=128, shared_bytes=98304)
    assert blocks_together(wide, ADA) == 1
    assert blocks_together(wide, GPUS[SM90]) == 2


# --- barriers of whole blocks


def test_warpgroups_that_meet_in_each_iteration_hide_nothing():
    loop = Mix(533, {"QGMMA.64x128x32.F32.E4M3.E4M3": 8}, {"MUFU": 66, "BAR": 2})
    held = cubin(loop, arch="sm90", registers=199, shared_bytes=114688)
    need = demands(held, GPUS[SM90])
    assert need.is_in_step and (need.tensor, need.special, need.blocks) == (512, 528, 1)
    assert expected_rate(need) == pytest.approx(1 / (512 + 533 + 528))
    free = demands(replace(held, loop=replace(loop, others={"MUFU": 66})), GPUS[SM90])
    assert not free.is_in_step
    assert expected_rate(free) > 1.3 * expected_rate(need)


def test_warps_of_geforce_are_not_in_step():
    assert not demands(cubin(replace(INT8_LOOP, others={"BAR": 2})), ADA).is_in_step


# --- a whole launch


def test_programs_cover_the_result():
    assert programs(product(15360, 5120, 2)(48832), tile_of(BLOCKS)) == 382 * 60
    attention = {"BLOCK_Q": 128, "BLOCK_KEYS": 32}
    assert programs(self_attention(5120)(48833), tile_of(attention)) == 382 * 40


def test_a_block_alone_multiplies_and_then_moves_its_result():
    """A tile of `residual` reads and writes 131 KB each."""
    work = product(5120, 5120, 8)(128 * 1000)
    tile = tile_of(BLOCKS)
    assert work.ending / programs(work, tile) == 262144
    multiply = 2 * 128 * 256 * 5120 / 2048 * 660.6 / loop_tflops(cubin(INT8_LOOP), ADA)
    move = 262144 / (DRAM_SHARE * 1008 / 2.52 / 128)
    alone = multiply + move + START_WAITS * WAIT_CYCLES
    assert program_cycles(work, cubin(INT8_LOOP), ADA, tile) == pytest.approx(alone, rel=1e-3)
    pair = cubin(INT8_LOOP, registers=128)
    multiply *= loop_tflops(cubin(INT8_LOOP), ADA) / loop_tflops(pair, ADA)
    cycles = program_cycles(work, pair, ADA, tile)
    assert max(multiply, move) < cycles < 0.85 * (multiply + move)


def test_the_last_wave_takes_as_long_as_a_full_one():
    """20 columns of tiles by 32 rows are 5 waves of 128 programs; one token more begins a sixth."""
    full, more = (
        estimate(product(5120, 5120, 2)(s), cubin(INT8_LOOP), ADA, BLOCKS) for s in (4096, 4097)
    )
    assert more.ms == pytest.approx(full.ms * 6 / 5, rel=1e-3)
    assert more.bound_ms == pytest.approx(full.bound_ms, rel=1e-3)


def test_a_kernel_without_a_loop_moves_bytes():
    found = estimate(LaunchWork(moved=1008e6, again=1008e6), cubin(None), ADA, {})
    assert (found.bound_ms, found.ms) == pytest.approx((2, 2 / DRAM_SHARE))


@each_arch
def test_what_is_expected_is_slower_than_the_upper_bound(arch):
    specs = variants(arch.attention, arch)
    for spec, held in zip(specs, compiled(*[(spec, arch) for spec in specs]), strict=True):
        found = estimate(self_attention(5120)(48832), held, GPUS[arch], spec.tuning[arch].blocks)
        assert found.bound_ms < found.ms


@each_arch
def test_loads_are_of_four_matrices_and_copies_of_16_bytes(arch, tmp_path):
    """What `SHARED_CYCLES` takes for granted. Scales of keys are copied by 4 bytes, few of all."""
    specs = [*variants(arch.attention, arch), *(way.bias for way in GEMM.values())]
    specs = [spec for spec in specs if arch in spec.tuning]
    for spec, held in zip(specs, compiled(*[(spec, arch) for spec in specs]), strict=True):
        path = tmp_path / f"{spec.name}.cubin"
        path.write_bytes(held.data)
        names = re.findall(r"\b(?:LDSM|LDGSTS)[.\w]*", disassemble(path))
        assert all(name.endswith("88.4") for name in names if name.startswith("LDSM"))
        copies = [name for name in names if name.startswith("LDGSTS")]
        assert sum(name.endswith(".128") for name in copies) > 0.6 * len(copies) > 0


# --- what others measured


@pytest.fixture(scope="module")
def rows():
    return published.measure_published(STATE)[1]


def test_the_model_is_within_15_percent_of_what_was_measured_of_such_kernels(rows):
    checks = [row for row in rows if row.kind == CHECK]
    assert any(row.tflops == 635 and "FP8, head size 128" in row.name for row in checks)
    for row in rows:
        assert row.kind == BESIDE or abs(row.difference) < WITHIN, row


def test_at_most_three_constants_are_fitted_each_to_one_figure():
    assert len([each for each in PUBLISHED if each.kind == FITTED]) == 1
    assert "fitted to one figure" in published_comment("STEP_WAIT_CYCLES")


def published_comment(constant):
    text = Path(model.__file__).read_text("utf-8")
    return text[: text.index(f"{constant} =")].rsplit("\n\n", 1)[-1]


@pytest.mark.parametrize("unit", ["tensor", "issue", "special"])
def test_with_a_unit_taken_out_the_model_misses_what_was_measured(monkeypatch, unit):
    whole = model.demands
    monkeypatch.setattr(model, "demands", lambda *of: replace(whole(*of), **{unit: 1.0}))
    assert wrong_checks()


def test_without_the_step_the_model_misses_what_was_measured(monkeypatch):
    whole = model.demands
    monkeypatch.setattr(model, "demands", lambda *of: replace(whole(*of), is_in_step=False))
    assert "Triton attention, FP8, head size 128" in wrong_checks()


def wrong_checks():
    found = published.measure_published(STATE)[1]
    return {row.name for row in found if row.kind == CHECK and abs(row.difference) > WITHIN}


def test_without_shared_memory_sage_on_two_gpus_would_be_overtaken(monkeypatch, rows):
    """Theirs are other instructions of the same mix: the model with the pipe lies below them."""
    sage = {row.gpu: row for row in rows if row.name.startswith("Sage")}
    assert {row.gpu for row in sage.values()} == {GPUS[SM89].name, GPUS[SM120].name}
    assert all(-0.12 < row.difference < 0 for row in sage.values())
    whole = model.demands
    monkeypatch.setattr(model, "demands", lambda *of: replace(whole(*of), shared=0.0))
    free = {row.gpu: row for row in published.measure_published(STATE)[1]
        if row.name.startswith("Sage")}  # fmt: skip
    for gpu, row in free.items():
        assert row.expected_tflops > 1.05 * sage[gpu].expected_tflops


def test_tables_and_figures_say_what_was_measured_elsewhere(rows):
    table = published.published_table(rows)
    assert "measured elsewhere" in table and "upper bound" in table
    figures = published.published_figures(rows)
    assert len({figure.name for figure in figures}) == len(figures) == 2 * len(PUBLISHED)
    assert {figure.source for figure in figures} == {"estimate"}
