"""The choice among kernels takes 300 ms at most, and is kept for the next start."""

import hashlib
import json
import logging
from dataclasses import asdict, replace

import pytest
import torch

from engine.machine.kernel_choice import Choices, attention_kernel, keep_choices, known_choices
from kernels.attention import ATTENTION
from kernels.launch import DriverError
from tests.support.fake_kernels import (
    F16,
    F32,
    FORM,
    GPU,
    NARROW,
    PRODUCTS,
    QUANTISE,
    WIDE,
    Fake,
    choose,
    found,
)


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture(autouse=True)
def _memory_of_the_timed_problem_stays_untouched(_unwritten_memory_is_nan):
    """Nobody computes it here, and filling its results with NaN would take seconds."""
    torch.utils.deterministic.fill_uninitialized_memory = False


# --- 300 ms


@pytest.mark.parametrize("slow_ms", [2.0, 11.0, 60.0])
def test_no_run_begins_after_the_budget_and_every_op_has_its_share(tmp_path, slow_ms):
    fake = Fake(**{f"attention__{name}": slow_ms for name in (F16, WIDE, NARROW, F32)})
    begins = []

    def clock(run):
        begins.append(fake.time.s - 1000)
        return fake.clock(run)

    choices = choose(fake, [*FORM, *PRODUCTS], tmp_path, clock=clock)
    assert max(begins) < 0.3
    attention, product = choices.ops
    assert (attention.why, product.why) == (
        "the fastest" if slow_ms < 60 else "the first: there was no time to measure",
        "the fastest",
    )
    assert len(fake.timed) > 18


def test_a_machine_too_slow_for_any_measurement_takes_the_first_and_does_not_keep_that(
    tmp_path, caplog
):
    slow = Fake(check_ms=100, attention__i8_fp8_f16=2)
    choices = choose(slow, FORM, tmp_path)
    assert slow.timed == []
    choice = found(choices, "attention.int8fp8")
    why = "the first: there was no time to measure"
    assert (choice.chosen, choice.why) == (F16, why)
    assert f"attention.int8fp8: {F16}, {why}" in caplog.messages
    assert known_choices("d1", GPU, tmp_path) is None
    again = choose(Fake(attention__i8_fp8_f16=2), FORM, tmp_path)
    assert attention_kernel(again, "int8fp8") is ATTENTION[WIDE]


def test_a_round_cut_short_before_all_had_a_turn_chooses_nothing(tmp_path):
    fake = Fake(attention__i8_fp8_f16=200, attention__i8_fp8_f16_wide=200)
    choices = choose(fake, FORM, tmp_path)
    assert found(choices, "attention.int8fp8").variants[0].ms is None
    assert len(fake.timed) == 2
    assert attention_kernel(choices, "int8fp8") is ATTENTION[F16]


# --- what is kept


def test_the_next_start_measures_nothing_and_chooses_the_same(tmp_path, caplog):
    first = choose(Fake(attention__i8_fp8_f16_wide=0.5), [*FORM, QUANTISE], tmp_path)
    later = Fake(attention__i8_fp8_f16_narrow=0.1)
    assert choose(later, [*FORM, QUANTISE], tmp_path) == first
    assert (later.checked, later.timed) == ([], [])
    assert later.loaded == [spec.name for spec in (*FORM, QUANTISE)]
    assert caplog.messages[-2:] == [
        "kernels as chosen before on this NVIDIA GeForce RTX 4090:",
        f"attention.int8fp8: {WIDE}, the fastest ({F16} 1.00 ms, {WIDE} 0.50 ms, {NARROW} 1.00 ms, "
        f"{F32} 1.00 ms)",
    ]
    assert known_choices("d1", GPU, tmp_path) == first
    json.dumps(asdict(first), allow_nan=False)  # as `info` prints it


@pytest.mark.parametrize(
    "change",
    [{"uuid": "GPU-2"}, {"name": "NVIDIA L40S"}, {"cuda": (12, 8)}, {"driver": "570.86.15"},
     {"driver": None}],
)  # fmt: skip
def test_another_gpu_or_driver_is_measured_anew(tmp_path, change):
    choose(Fake(), FORM, tmp_path)
    other = replace(GPU, **change)
    assert known_choices("d1", other, tmp_path) is None
    fake = Fake()
    choose(fake, FORM, tmp_path, gpu=other)
    assert fake.timed != []
    assert known_choices("d1", GPU, tmp_path) is not None


def test_another_package_is_measured_anew(tmp_path):
    choose(Fake(), FORM, tmp_path)
    fake = Fake()
    choose(fake, FORM, tmp_path, digest="d2")
    assert fake.timed != []


def test_how_much_memory_is_free_changes_nothing(tmp_path):
    choose(Fake(), FORM, tmp_path)
    assert known_choices("d1", replace(GPU, free_bytes=5), tmp_path) is not None


def test_a_damaged_entry_is_measured_again_and_said(tmp_path, caplog):
    first = choose(Fake(), FORM, tmp_path)
    (entry,) = (tmp_path / "variants").iterdir()
    entry.write_bytes(entry.read_bytes()[:-9])
    fake = Fake()
    assert choose(fake, FORM, tmp_path) == first
    assert fake.timed != [] and "is damaged" in caplog.text
    assert known_choices("d1", GPU, tmp_path) == first


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"[]", b"{}", b'{"ops": [{}]}', b'{"ops": 3}', b"NaN",
     b'{"ops": [{"op": "gemm.int8", "chosen": "i8", "why": "", "variants": [1]}]}'],
)  # fmt: skip
def test_an_entry_that_is_something_else_is_measured_again_and_said(tmp_path, caplog, text):
    choices = choose(Fake(), FORM, tmp_path)
    (entry,) = (tmp_path / "variants").iterdir()
    entry.write_bytes(hashlib.sha256(text).digest() + text)
    fake = Fake()
    assert choose(fake, FORM, tmp_path) == choices
    assert fake.timed != [] and "cannot be read" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        lambda choice: replace(choice, op="attention.sage"),
        lambda choice: replace(choice, chosen=None),
        lambda choice: replace(choice, chosen="i8_mx"),
        lambda choice: replace(choice, variants=choice.variants[:-1]),
    ],
)
def test_an_entry_that_does_not_fit_the_package_is_measured_again_and_said(
    tmp_path, caplog, change
):
    choices = choose(Fake(), FORM, tmp_path)
    keep_choices(Choices(tuple(map(change, choices.ops))), "d1", GPU, tmp_path)
    fake = Fake()
    assert choose(fake, FORM, tmp_path) == choices
    assert fake.timed != [] and "does not fit this package: measured again" in caplog.text


def test_a_kept_choice_that_loads_no_more_is_measured_again(tmp_path, caplog):
    choose(Fake(attention__i8_fp8_f16=0.5), FORM, tmp_path)
    fake = Fake()
    fake.refuse[f"attention.{F16}"] = DriverError("no such code (209)", 209)
    choices = choose(fake, FORM, tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[WIDE]
    assert "measured again" in caplog.text


def test_a_state_that_cannot_be_written_costs_the_next_start_and_is_said(tmp_path, caplog):
    state = tmp_path / "state"
    state.write_text("a file where a folder should be")
    choices = choose(Fake(attention__i8_fp8_f16_wide=0.5), FORM, state)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[WIDE]
    assert "could not be kept" in caplog.text
    fake = Fake()
    choose(fake, FORM, state)
    assert fake.timed != []


def test_nothing_is_known_where_nothing_was_measured(tmp_path):
    assert known_choices("d1", GPU, tmp_path / "none") is None
