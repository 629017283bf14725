"""The fastest kernel of the right ones is chosen, in 300 ms, and kept for the next start."""

import hashlib
import json
import logging
from dataclasses import asdict, replace
from itertools import count

import pytest
import torch

from engine.errors import BadPackage, Unavailable, UnsupportedDriver
from engine.machine.kernel_choice import (
    Choices,
    KernelChoice,
    Variant,
    attention_kernel,
    choose_variants,
    chosen_sums,
    gemm_ways,
    keep_choices,
    known_choices,
)
from kernels.arch import SM89, SM90, SM120
from kernels.attention import ATTENTION
from kernels.gemm import GEMM, SUMS
from kernels.launch import DriverError, KernelBank
from kernels.ops import native_ops
from kernels.spec import KernelError
from tests.support.fake_driver import FakeDriver, build_driver
from tests.support.fake_kernels import (
    F32,
    FIRST,
    FORM,
    FP8,
    GPU,
    PRODUCTS,
    QUANTISE,
    SECOND,
    THIRD,
    Fake,
    choose,
    cubin,
    found,
)
from tests.support.interpreter import InterpretedBank


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture(autouse=True)
def _memory_of_the_timed_problem_stays_untouched(_unwritten_memory_is_nan):
    """Filling its results with NaN would take seconds, and nobody computes them here."""
    torch.utils.deterministic.fill_uninitialized_memory = False


# --- the choice


def test_the_fastest_is_chosen_of_each_form_and_dtype(tmp_path, caplog):
    fake = Fake(attention__i8_fp8_f16_wide=0.8, gemm__i8__bias=0.5)
    fake.times |= {f"attention.{FIRST}": 0.9, f"attention.{THIRD}": 1.1, f"attention.{F32}": 1.7}
    choices = choose(fake, [*FORM, *PRODUCTS], tmp_path)
    assert choices == Choices(
        (
            KernelChoice(
                "attention.int8fp8", SECOND, "the fastest",
                (Variant(FIRST, 0.9), Variant(SECOND, 0.8), Variant(THIRD, 1.1), Variant(F32, 1.7)),
            ),
            KernelChoice(
                "gemm.int8", "i8", "the fastest", (Variant("i8", 0.5), Variant("i8_tall", 1.0))
            ),
        )
    )  # fmt: skip
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]
    assert gemm_ways(choices, [torch.int8]) == (GEMM["i8"],)
    line = f"attention.int8fp8: {SECOND}, the fastest ({FIRST} 0.90 ms, {SECOND} 0.80 ms, "
    assert line + f"{THIRD} 1.10 ms, {F32} 1.70 ms)" in caplog.messages
    assert "gemm.int8: i8, the fastest (i8 0.50 ms, i8_tall 1.00 ms)" in caplog.messages


@pytest.mark.parametrize(("other", "chosen"), [(0.99, FIRST), (0.981, FIRST), (0.97, SECOND)])
def test_a_preferred_variant_is_kept_unless_another_is_faster_by_more_than_noise(
    tmp_path, other, chosen
):
    fake = Fake(attention__i8_fp8_f16_narrow=1.0, attention__i8_fp8_f16_wide=other)
    choices = choose(fake, FORM[:2], tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[chosen]


def test_variants_take_turns_and_the_best_of_each_counts(tmp_path):
    fake = Fake()
    slow_start = count(5)  # a GPU that was idle: every run is faster than the one before

    def clock(run):
        run()
        return 1 + 10 / next(slow_start)

    choose(fake, FORM[:2], tmp_path, clock=clock)
    assert fake.timed == [f"attention.{FIRST}", f"attention.{SECOND}"] * 9


def test_one_kernel_for_a_form_is_checked_and_not_timed(tmp_path):
    fake = Fake()
    specs = [ATTENTION["i8_i8"], ATTENTION["fp8_f32"], *GEMM["fp8"].specs]
    choices = choose(fake, specs, tmp_path)
    assert fake.timed == []
    assert fake.checked == [
        "attention.i8_i8", "attention.fp8_f32", "gemm.fp8.residual", "gemm.fp8.bias",
        "gemm.fp8.gelu",
    ]  # fmt: skip
    assert {(choice.op, choice.chosen, choice.why) for choice in choices.ops} == {
        ("attention.int8", "i8_i8", "the only one"),
        ("attention.fp8", "fp8_f32", "the only one"),
        ("gemm.fp8", "fp8", "the only one"),
    }


def test_the_form_stays_what_was_asked_for_however_fast_another_is(tmp_path):
    fake = Fake(attention__i8_i8=0.01, attention__i8_fp8_f16_narrow=5, attention__i8_fp8_f32=9)
    names = (FIRST, F32, "i8_i8", "fp8_f32")
    choices = choose(fake, [ATTENTION[name] for name in names], tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[FIRST]
    assert attention_kernel(choices, "int8") is ATTENTION["i8_i8"]
    assert attention_kernel(choices, "fp8") is ATTENTION["fp8_f32"]


@pytest.mark.parametrize(
    ("arch", "attention", "gemm"), [(SM90, F32, "fp8"), (SM120, "i8_mx", "mx")]
)
def test_other_architectures_choose_among_their_own(tmp_path, arch, attention, gemm):
    fake = Fake(arch)
    choices = choose(fake, [ATTENTION[attention], *GEMM[gemm].specs], tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[attention]
    assert gemm_ways(choices, {FP8}) == (GEMM[gemm],)


def test_what_was_chosen_makes_the_operations_of_a_block(tmp_path):
    fake = Fake(attention__i8_fp8_f32=0.1, gemm__i8_tall__bias=0.1)
    choices = choose(fake, [*FORM, *PRODUCTS], tmp_path)
    ways = gemm_ways(choices, [torch.int8])
    attention = attention_kernel(choices, "int8fp8")
    ops = native_ops(fake, SM89, attention=attention, gemm=ways)
    assert ops.attention.args == (fake, ATTENTION[F32])
    assert ways == (GEMM["i8_tall"],)


def test_two_kernels_pass_the_check_in_the_interpreter_and_are_chosen(tmp_path):
    class Interpreted(InterpretedBank):
        def load(self, cubin):
            assert cubin.arch == self.arch.name

    choices = choose_variants(
        [cubin(spec) for spec in (ATTENTION["i8_i8"], *GEMM["i8"].specs)],
        "d1", GPU, Interpreted(SM89), torch.device("cpu"), tmp_path, clock=lambda run: 1.0,
    )  # fmt: skip
    assert [choice.chosen for choice in choices.ops] == ["i8_i8", "i8"]


# --- variants that do not work


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_driver(tmp_path_factory.mktemp("driver"))


class OnDriver(Fake):
    """Loads through the launcher into a driver of our own."""

    def __init__(self, driver, **times):
        super().__init__(**times)
        self.kernels = KernelBank([], SM89, lambda: 0, library=driver.path)

    def load(self, cubin):
        self.kernels.load(cubin)
        self.loaded.append(cubin.name)

    def tuning(self, spec):
        return self.kernels.tuning(spec)


def test_kernels_of_a_newer_toolkit_that_the_driver_refuses_are_left_out(library, tmp_path, caplog):
    driver = FakeDriver(library)
    driver.refuse(b"12.8 ")
    choices = choose(OnDriver(driver), [*FORM, *PRODUCTS], tmp_path)
    choice = found(choices, "attention.int8fp8")
    assert (choice.chosen, choice.why) == (F32, "the only one that works")
    for name, variant in zip((FIRST, SECOND, THIRD), choice.variants):
        fault = f"cuModuleLoadData for attention.{name} failed: CUDA_ERROR_NO_BINARY_FOR_GPU (209)"
        assert variant == Variant(name, None, fault)
        assert f"attention.int8fp8: {name} is left out: {fault}" in caplog.messages
    assert found(choices, "gemm.int8").why == "the fastest"


def test_kernels_of_another_version_of_this_program_are_left_out(library, tmp_path):
    bank = OnDriver(FakeDriver(library))
    cubins = [cubin(spec) for spec in FORM[:2]]
    cubins[0] = replace(cubins[0], spec="0" * 64)
    choices = choose_variants(
        cubins, "d1", GPU, bank, torch.device("cpu"), tmp_path, bank.clock, bank.time.now
    )
    first, second = found(choices, "attention.int8fp8").variants
    assert "compiled from another spec" in first.fault and second.fault == ""
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda out: out.mul_(1.05), "wrong by 5.0e-02 on a few tiles"),
        (lambda out: out.fill_(torch.nan), "wrong by nan on a few tiles"),
        (lambda out: out.zero_(), "wrong by 1.0e+00 on a few tiles"),
    ],
)
def test_a_kernel_with_wrong_results_is_left_out_however_fast(tmp_path, spoil, fault):
    fake = Fake(attention__i8_fp8_f16_narrow=0.001)
    fake.spoil[f"attention.{FIRST}"] = spoil
    choices = choose(fake, FORM, tmp_path)
    first, *others = found(choices, "attention.int8fp8").variants
    assert first == Variant(FIRST, None, fault)
    assert f"attention.{FIRST}" not in fake.timed
    assert [variant.ms for variant in others] == [1, 1, 1]
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]


@pytest.mark.parametrize("ending", ["bias", "gelu", "residual"])
def test_every_ending_of_a_product_must_be_right(tmp_path, ending):
    fake = Fake(gemm__i8__bias=0.001)
    fake.spoil[f"gemm.i8.{ending}"] = lambda out: out.mul_(1.1)
    choices = choose(fake, PRODUCTS, tmp_path)
    assert gemm_ways(choices, [torch.int8]) == (GEMM["i8_tall"],)
    assert "wrong by" in found(choices, "gemm.int8").variants[0].fault


def test_a_product_that_lacks_an_ending_is_left_out(tmp_path):
    choices = choose(Fake(), PRODUCTS[1:], tmp_path)
    (first, second) = found(choices, "gemm.int8").variants
    assert first.fault == "kernel gemm.i8.bias is not loaded" and second.fault == ""


def raising(error):
    def spoil(out):
        raise error

    return spoil


def test_a_launch_that_the_driver_refuses_leaves_the_variant_out(tmp_path):
    fake = Fake()
    error = DriverError("cuLaunchKernel failed: too many resources (701)", 701)
    fake.spoil[f"attention.{FIRST}"] = raising(error)
    choices = choose(fake, FORM, tmp_path)
    assert "(701)" in found(choices, "attention.int8fp8").variants[0].fault
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]


def test_a_kernel_that_breaks_the_context_ends_the_start(tmp_path):
    fake = Fake()
    error = torch.AcceleratorError("CUDA error: an illegal memory access\nmore words")
    fake.spoil[f"attention.{SECOND}"] = raising(error)
    with pytest.raises(UnsupportedDriver, match=rf"attention.{SECOND} broke .*access\. Build") as e:
        choose(fake, FORM, tmp_path)
    assert e.value.fatal


@pytest.mark.parametrize(
    "error", [DriverError("failed (700)", 700), torch.AcceleratorError("failed (700)\nmore")]
)
def test_a_kernel_that_breaks_the_context_on_the_timed_problem_ends_the_start(tmp_path, error):
    fake = Fake()

    def clock(run):
        if len(fake.timed) == 3:
            raise error
        return fake.clock(run)

    with pytest.raises(
        UnsupportedDriver, match=rf"{F32} broke the GPU's context: failed \(700\)\."
    ):
        choose(fake, FORM, tmp_path, clock=clock)
    assert known_choices("d1", GPU, tmp_path) is None


def test_a_form_of_which_nothing_works_names_each_reason_when_it_is_asked_for(tmp_path):
    fake = Fake()
    fake.refuse[f"attention.{FIRST}"] = DriverError("no such code (209)", 209)
    fake.spoil[f"attention.{F32}"] = lambda out: out.zero_()
    specs = [ATTENTION[name] for name in (FIRST, F32, "fp8_f32")]
    choices = choose(fake, specs, tmp_path)
    assert found(choices, "attention.int8fp8").why == "none works"
    assert attention_kernel(choices, "fp8") is ATTENTION["fp8_f32"]
    with pytest.raises(UnsupportedDriver) as caught:
        attention_kernel(choices, "int8fp8")
    assert str(caught.value) == (
        f"No kernel for attention of the form int8fp8 works on this GPU: {FIRST}: no such code "
        f"(209); {F32}: wrong by 1.0e+00 on a few tiles. Update the driver, or build the package "
        f"again."
    )


def test_products_of_which_none_works_name_each_reason(tmp_path):
    fake = Fake()
    for name in ("i8", "i8_tall"):
        fake.refuse[f"gemm.{name}.gelu"] = DriverError("no such code (209)", 209)
    choices = choose(fake, [*PRODUCTS, *GEMM["fp8"].specs], tmp_path)
    assert gemm_ways(choices, [FP8]) == (GEMM["fp8"],)
    reasons = r"No kernel for gemm .* int8 works.*i8: no such.*; i8_tall: no such"
    with pytest.raises(UnsupportedDriver, match=reasons):
        gemm_ways(choices, [FP8, torch.int8])


@pytest.mark.parametrize("form", ["int8", "fp8", "sdpa", ""])
def test_a_form_that_the_package_lacks_is_refused_with_those_it_has(tmp_path, form):
    choices = choose(Fake(), FORM[:1], tmp_path)
    with pytest.raises(Unavailable, match=f"form {form} is not in.*which has int8fp8. Ask"):
        attention_kernel(choices, form)


def test_weights_without_kernels_are_refused(tmp_path):
    choices = choose(Fake(), GEMM["fp8"].specs, tmp_path)
    assert gemm_ways(choices, []) == ()
    with pytest.raises(BadPackage, match="int8 weights and no kernels"):
        gemm_ways(choices, [torch.int8, FP8])
    with pytest.raises(Unavailable, match="which has none"):
        attention_kernel(choices, "int8fp8")


def test_a_kernel_without_a_variant_must_load(tmp_path):
    fake = Fake()
    fake.refuse[QUANTISE.name] = DriverError("no such code (209)", 209)
    wanted = r"RTX 4090 \(CUDA 12.7\) refuses .* built with CUDA 12.6: no such code \(209\)"
    with pytest.raises(UnsupportedDriver, match=wanted):
        choose(fake, [*FORM, QUANTISE], tmp_path)


@pytest.mark.parametrize("spec", [QUANTISE, FORM[0]])
def test_a_kernel_that_no_bank_can_hold_is_the_packages_fault(tmp_path, spec):
    fake = Fake()
    fake.refuse[spec.name] = KernelError(f"kernel {spec.name} is for sm90, not sm89")
    with pytest.raises(BadPackage, match=r"is for sm90, not sm89. Build the package again"):
        choose(fake, [*FORM, QUANTISE], tmp_path)


def test_everything_is_loaded_once_and_in_order(tmp_path):
    fake = Fake()
    specs = [QUANTISE, *FORM, *PRODUCTS]
    choose(fake, specs, tmp_path)
    assert fake.loaded == [spec.name for spec in specs]


# --- 300 ms


@pytest.mark.parametrize("slow_ms", [2.0, 11.0, 60.0])
def test_no_run_begins_after_the_budget_and_every_op_has_its_share(tmp_path, slow_ms):
    fake = Fake(**{f"attention__{name}": slow_ms for name in (FIRST, SECOND, THIRD, F32)})
    begins, ends = [], []

    def clock(run):
        begins.append(fake.time.s)
        ms = fake.clock(run)
        ends.append(fake.time.s)
        return ms

    choices = choose(fake, [*FORM, *PRODUCTS], tmp_path, clock=clock)
    assert max(ends) - begins[0] <= 0.3
    assert begins[0] - 1000 > 0.009  # the checks before are not part of it
    attention, product = choices.ops
    assert (attention.why, product.why) == (
        "the fastest" if slow_ms < 60 else "the first: there was no time to measure",
        "the fastest",
    )
    assert len(fake.timed) > 18


def test_definitions_that_take_a_slow_processor_a_second_leave_the_timing_its_time(tmp_path):
    slow = Fake(check_ms=1000, attention__i8_fp8_f16_narrow=2)
    choices = choose(slow, FORM, tmp_path)
    assert len(slow.timed) == 9 * len(FORM)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]
    assert known_choices("d1", GPU, tmp_path) == choices


def test_a_machine_too_slow_for_any_measurement_takes_the_first_and_does_not_keep_that(
    tmp_path, caplog
):
    slow = Fake(**{f"attention__{name}": 100 for name in (FIRST, SECOND, THIRD, F32)})
    choices = choose(slow, FORM, tmp_path)
    choice = found(choices, "attention.int8fp8")
    why = "the first: there was no time to measure"
    assert (choice.chosen, choice.why) == (FIRST, why)
    assert f"attention.int8fp8: {FIRST}, {why}" in caplog.messages
    assert known_choices("d1", GPU, tmp_path) is None
    again = choose(Fake(attention__i8_fp8_f16_narrow=2), FORM, tmp_path)
    assert attention_kernel(again, "int8fp8") is ATTENTION[SECOND]


def test_a_round_cut_short_before_all_had_a_turn_chooses_nothing(tmp_path):
    fake = Fake(attention__i8_fp8_f16_narrow=200, attention__i8_fp8_f16_wide=200)
    choices = choose(fake, FORM, tmp_path)
    assert found(choices, "attention.int8fp8").variants[0].ms is None
    assert len(fake.timed) == 2
    assert attention_kernel(choices, "int8fp8") is ATTENTION[FIRST]


# --- what is kept


def test_the_next_start_measures_nothing_and_chooses_the_same(tmp_path, caplog):
    assert known_choices("d1", GPU, tmp_path) is None
    first = choose(Fake(attention__i8_fp8_f16_wide=0.5), [*FORM, QUANTISE], tmp_path)
    later = Fake(attention__i8_fp8_f16=0.1)
    assert choose(later, [*FORM, QUANTISE], tmp_path) == first
    assert (later.checked, later.timed) == ([], [])
    assert later.loaded == [spec.name for spec in (*FORM, QUANTISE)]
    assert caplog.messages[-2:] == [
        "kernels as chosen before on this NVIDIA GeForce RTX 4090:",
        f"attention.int8fp8: {SECOND}, the fastest ({FIRST} 1.00 ms, {SECOND} 0.50 ms, "
        f"{THIRD} 1.00 ms, {F32} 1.00 ms)",
    ]
    assert known_choices("d1", GPU, tmp_path) == first
    json.dumps(asdict(first), allow_nan=False)  # as `info` prints it


@pytest.mark.parametrize(
    ("digest", "change"),
    [("d1", {"uuid": "GPU-2"}), ("d1", {"name": "NVIDIA L40S"}), ("d1", {"cuda": (12, 8)}),
     ("d1", {"driver": "570.86.15"}), ("d1", {"driver": None}), ("d2", {})],
)  # fmt: skip
def test_another_gpu_driver_or_package_is_measured_anew(tmp_path, digest, change):
    choose(Fake(), FORM, tmp_path)
    other = replace(GPU, **change)
    assert known_choices(digest, other, tmp_path) is None
    fake = Fake()
    choose(fake, FORM, tmp_path, digest=digest, gpu=other)
    assert fake.timed != []
    assert known_choices("d1", replace(GPU, free_bytes=5), tmp_path) is not None


def sealed(text):
    return hashlib.sha256(text).digest() + text


@pytest.mark.parametrize(
    ("damage", "says"),
    [(lambda data: data[:-9], "is damaged")] + [
        (lambda _, text=text: sealed(text), "cannot be read")
        for text in (b"\xff", b"[]", b"{}", b'{"ops": [{}]}', b'{"ops": 3}', b"NaN",
                     b'{"ops": [{"op": "gemm.int8", "chosen": "i8", "why": "", "variants": [1]}]}')
    ],
)  # fmt: skip
def test_an_entry_that_is_no_choice_is_measured_again_and_said(tmp_path, caplog, damage, says):
    first = choose(Fake(), FORM, tmp_path)
    (entry,) = (tmp_path / "variants").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    fake = Fake()
    assert choose(fake, FORM, tmp_path) == first
    assert fake.timed != [] and says in caplog.text
    assert known_choices("d1", GPU, tmp_path) == first


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
    choose(Fake(attention__i8_fp8_f16_narrow=0.5), FORM, tmp_path)
    fake = Fake()
    fake.refuse[f"attention.{FIRST}"] = DriverError("no such code (209)", 209)
    choices = choose(fake, FORM, tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]
    assert "measured again" in caplog.text


def test_a_state_that_cannot_be_written_costs_the_next_start_and_is_said(tmp_path, caplog):
    state = tmp_path / "state"
    state.write_text("a file where a folder should be")
    choices = choose(Fake(attention__i8_fp8_f16_wide=0.5), FORM, state)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[SECOND]
    assert "could not be kept" in caplog.text
    fake = Fake()
    choose(fake, FORM, state)
    assert fake.timed != []


# --- what is told of it


def test_the_sums_of_what_speed_alone_chose_are_told(tmp_path):
    fake = Fake(SM90, gemm__fp8_pair__bias=0.5, gemm__fp8__bias=0.4)
    specs = [spec for name in ("fp8_pair", "fp8") for spec in GEMM[name].specs]
    hopper = replace(GPU, name="NVIDIA H200", capability=(9, 0))
    choices = choose(fake, specs, tmp_path, gpu=hopper)
    assert chosen_sums(choices) == {"gemm.fp8": "fp8: about 14 bits, over all of K"}
    fake.times["gemm.fp8.bias"] = 0.6
    choices = choose(fake, specs, tmp_path, digest="d2", gpu=hopper)
    assert chosen_sums(choices) == {"gemm.fp8": "fp8_pair: about 14 bits, over all of K"}
    assert {way.sums for way in GEMM.values()} == {*SUMS.values()}
