"""The choice among kernels that do the same: the right ones, and of those the fastest."""

import logging
from dataclasses import replace
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
    gemm_ways,
    known_choices,
)
from kernels.arch import SM89, SM90, SM120
from kernels.attention import ATTENTION
from kernels.gemm import GEMM
from kernels.launch import DriverError, KernelBank
from kernels.ops import native_ops
from kernels.spec import KernelError
from tests.support.fake_driver import FakeDriver, build_driver
from tests.support.fake_kernels import (
    F16,
    F32,
    FORM,
    FP8,
    GPU,
    NARROW,
    PRODUCTS,
    QUANTISE,
    WIDE,
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
    """Nobody computes it here, and filling its results with NaN would take seconds."""
    torch.utils.deterministic.fill_uninitialized_memory = False


# --- the choice


def test_the_fastest_is_chosen_of_each_form_and_dtype(tmp_path, caplog):
    fake = Fake(attention__i8_fp8_f16_wide=0.8, gemm__i8__bias=0.5)
    fake.times |= {f"attention.{F16}": 0.9, f"attention.{NARROW}": 1.1, f"attention.{F32}": 1.7}
    choices = choose(fake, [*FORM, *PRODUCTS], tmp_path)
    assert choices == Choices(
        (
            KernelChoice(
                "attention.int8fp8", WIDE, "the fastest",
                (Variant(F16, 0.9), Variant(WIDE, 0.8), Variant(NARROW, 1.1), Variant(F32, 1.7)),
            ),
            KernelChoice(
                "gemm.int8", "i8", "the fastest", (Variant("i8", 0.5), Variant("i8_tall", 1.0))
            ),
        )
    )  # fmt: skip
    assert attention_kernel(choices, "int8fp8") is ATTENTION[WIDE]
    assert gemm_ways(choices, [torch.int8]) == (GEMM["i8"],)
    line = f"attention.int8fp8: {WIDE}, the fastest ({F16} 0.90 ms, {WIDE} 0.80 ms, "
    assert line + f"{NARROW} 1.10 ms, {F32} 1.70 ms)" in caplog.messages
    assert "gemm.int8: i8, the fastest (i8 0.50 ms, i8_tall 1.00 ms)" in caplog.messages


@pytest.mark.parametrize(("other", "chosen"), [(0.99, F16), (0.981, F16), (0.97, WIDE)])
def test_a_preferred_variant_is_kept_unless_another_is_faster_by_more_than_noise(
    tmp_path, other, chosen
):
    fake = Fake(attention__i8_fp8_f16=1.0, attention__i8_fp8_f16_wide=other)
    choices = choose(fake, FORM[:2], tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[chosen]


def test_variants_take_turns_and_the_best_of_each_counts(tmp_path):
    fake = Fake()
    slow_start = count(5)  # a GPU that was idle: every run is faster than the one before

    def clock(run):
        run()
        return 1 + 10 / next(slow_start)

    choose(fake, FORM[:2], tmp_path, clock=clock)
    assert fake.timed == [f"attention.{F16}", f"attention.{WIDE}"] * 9


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
    fake = Fake(attention__i8_i8=0.01, attention__i8_fp8_f16=5, attention__i8_fp8_f32=9)
    names = (F16, F32, "i8_i8", "fp8_f32")
    choices = choose(fake, [ATTENTION[name] for name in names], tmp_path)
    assert attention_kernel(choices, "int8fp8") is ATTENTION[F16]
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
    for name, variant in zip((F16, WIDE, NARROW), choice.variants):
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
    assert attention_kernel(choices, "int8fp8") is ATTENTION[WIDE]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda out: out.mul_(1.02), "wrong by 2.0e-02 on a few tiles"),
        (lambda out: out.fill_(torch.nan), "wrong by nan on a few tiles"),
        (lambda out: out.zero_(), "wrong by 1.0e+00 on a few tiles"),
    ],
)
def test_a_kernel_with_wrong_results_is_left_out_however_fast(tmp_path, spoil, fault):
    fake = Fake(attention__i8_fp8_f16=0.001)
    fake.spoil[f"attention.{F16}"] = spoil
    choices = choose(fake, FORM, tmp_path)
    first, *others = found(choices, "attention.int8fp8").variants
    assert first == Variant(F16, None, fault)
    assert f"attention.{F16}" not in fake.timed
    assert [variant.ms for variant in others] == [1, 1, 1]
    assert attention_kernel(choices, "int8fp8") is ATTENTION[WIDE]


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


def test_a_launch_that_the_driver_refuses_leaves_the_variant_out(tmp_path):
    fake = Fake()

    def refuse(out):
        raise DriverError("cuLaunchKernel failed: too many resources (701)", 701)

    fake.spoil[f"attention.{F16}"] = refuse
    choices = choose(fake, FORM, tmp_path)
    assert "(701)" in found(choices, "attention.int8fp8").variants[0].fault
    assert attention_kernel(choices, "int8fp8") is ATTENTION[WIDE]


def test_a_kernel_that_breaks_the_context_ends_the_start(tmp_path):
    fake = Fake()

    def break_it(out):
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore words")

    fake.spoil[f"attention.{WIDE}"] = break_it
    with pytest.raises(UnsupportedDriver, match=rf"attention.{WIDE} broke .*access\. Build") as e:
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
    fake.refuse[f"attention.{F16}"] = DriverError("no such code (209)", 209)
    fake.spoil[f"attention.{F32}"] = lambda out: out.zero_()
    specs = [ATTENTION[name] for name in (F16, F32, "fp8_f32")]
    choices = choose(fake, specs, tmp_path)
    assert found(choices, "attention.int8fp8").why == "none works"
    assert attention_kernel(choices, "fp8") is ATTENTION["fp8_f32"]
    with pytest.raises(UnsupportedDriver) as caught:
        attention_kernel(choices, "int8fp8")
    assert str(caught.value) == (
        f"No kernel for attention of the form int8fp8 works on this GPU: {F16}: no such code "
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
