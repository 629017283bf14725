"""A trial tells right kernels from wrong ones, and its timed problem can be launched."""

import math

import pytest
import torch

from kernels.arch import SM89, SM90, SM120
from kernels.attention import ATTENTION
from kernels.gemm import GEMM
from kernels.signature import check_launch
from kernels.trial import (
    TIMED_HEADS,
    TIMED_LAUNCHES,
    TIMED_PRODUCT,
    TIMED_TOKENS,
    error_of,
    event_ms,
    specs_of,
    timed_problem,
    trial_ms,
)
from tests.support.interpreter import InterpretedBank

CPU = torch.device("cpu")
RIGHT = [
    (ATTENTION["i8_fp8_f16"], SM89),
    (ATTENTION["i8_fp8_f32"], SM90),
    (ATTENTION["i8_mx_wide"], SM120),
    (ATTENTION["i8_i8"], SM89),
    (ATTENTION["fp8_f32"], SM89),
    (GEMM["i8_tall"], SM89),
    (GEMM["mx"], SM120),
]
NAMES = [f"{specs_of(way)[0].name}-{arch.name}" for way, arch in RIGHT]


class Spoiled(InterpretedBank):
    """Changes what a kernel wrote: the last argument that is a tensor."""

    def __init__(self, arch, name, change):
        super().__init__(arch)
        self.name, self.change = name, change

    def launch(self, spec, grid, *arguments):
        super().launch(spec, grid, *arguments)
        if spec.name == self.name:
            self.change([value for value in arguments if isinstance(value, torch.Tensor)][-1])


class Counting(InterpretedBank):
    """Checks a launch as the GPU's bank does, and starts nothing."""

    def __init__(self, arch):
        super().__init__(arch)
        self.launches = []

    def launch(self, spec, grid, *arguments):
        check_launch(spec, "cpu", grid, arguments)
        self.launches.append((spec.name, grid))


@pytest.mark.parametrize(("way", "arch"), RIGHT, ids=NAMES)
def test_a_right_kernel_is_right_to_the_last_bit_of_bf16(way, arch):
    assert error_of(InterpretedBank(arch), way, CPU) < 2e-3


def scale(out):
    out.mul_(1.03)


def leave_a_row_out(out):
    out[-1] = 0


def spoil_one_value(out):
    out[0, 0] = math.nan


def exchange_rows(out):
    out.copy_(out.roll(1, 0))


@pytest.mark.parametrize("change", [scale, leave_a_row_out, exchange_rows])
@pytest.mark.parametrize(
    ("way", "name"),
    [
        (ATTENTION["i8_i8"], "attention.i8_i8"),
        (GEMM["i8"], "gemm.i8.bias"),
        (GEMM["i8"], "gemm.i8.gelu"),
        (GEMM["i8"], "gemm.i8.residual"),
    ],
)
def test_a_wrong_kernel_is_far_off_in_whichever_ending(way, name, change):
    assert error_of(Spoiled(SM89, name, change), way, CPU) > 2e-2


@pytest.mark.parametrize(
    ("way", "name"),
    [(ATTENTION["i8_i8"], "attention.i8_i8"), (GEMM["i8"], "gemm.i8.bias"),
     (GEMM["i8"], "gemm.i8.residual")],
)  # fmt: skip
def test_one_value_that_is_no_number_shows(way, name):
    assert math.isnan(error_of(Spoiled(SM89, name, spoil_one_value), way, CPU))


class Recycling(InterpretedBank):
    """Lets the second kernel write nothing, into memory that holds what the first one made."""

    def __init__(self, arch):
        super().__init__(arch)
        self.made = {}

    def launch(self, spec, grid, *arguments):
        out = [value for value in arguments if isinstance(value, torch.Tensor)][-1]
        ending = spec.device, str(spec.constants.get("GELU"))
        if ending in self.made:
            out.copy_(self.made[ending])
            return
        super().launch(spec, grid, *arguments)
        self.made[ending] = out.clone()


@pytest.mark.parametrize(
    ("first", "second"),
    [(ATTENTION["i8_fp8_f32"], ATTENTION["i8_fp8_f16"]), (GEMM["i8"], GEMM["i8_tall"])],
)
def test_the_right_result_of_another_variant_is_wrong(first, second):
    bank = Recycling(SM89)
    assert error_of(bank, first, CPU) < 2e-3
    assert error_of(bank, second, CPU) > 0.5


def test_a_kernel_that_writes_nothing_shows():
    assert not error_of(Counting(SM89), ATTENTION["i8_i8"], CPU) < 1e-2
    assert not error_of(Counting(SM89), GEMM["fp8"], CPU) < 1e-2


@pytest.mark.parametrize(
    ("names", "arch"),
    [(("i8_fp8_f16", "i8_fp8_f16_narrow", "i8_fp8_f32"), SM89), (("i8_i8",), SM90),
     (("fp8_mx",), SM120)],
)  # fmt: skip
def test_all_variants_of_a_form_are_timed_on_the_same_attention(names, arch):
    bank = Counting(arch)
    launch = timed_problem(bank, ATTENTION[names[0]], CPU)
    results = [launch(ATTENTION[name]) for name in names]
    grid = TIMED_TOKENS // 128, TIMED_HEADS
    assert bank.launches == [(f"attention.{name}", grid) for name in names]
    assert all(result.shape == (TIMED_TOKENS, TIMED_HEADS * 128) for result in results)


@pytest.mark.parametrize(
    ("names", "arch"), [(("i8", "i8_tall"), SM89), (("fp8", "fp8_pair"), SM90)]
)
def test_all_tiles_of_a_product_are_timed_on_the_same_product(names, arch):
    bank = Counting(arch)
    launch = timed_problem(bank, GEMM[names[0]], CPU)
    for name in names:
        assert launch(GEMM[name]).shape == TIMED_PRODUCT[:2]
    m, n, _ = TIMED_PRODUCT
    sizes = [GEMM[name].bias.tuning[arch].blocks for name in names]
    tiles = [m // size["BLOCK_M"] * (n // size["BLOCK_N"]) for size in sizes]
    endings = "residual", "gelu", "bias"
    assert bank.launches == [
        (f"gemm.{name}.{ending}", (count,))
        for name, count in zip(names, tiles)
        for ending in endings
    ]


class Event:
    """Stands on a clock that runs counted units forward."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_several_launches_lie_between_two_events_and_one_of_them_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    launched = []

    def run():
        launched.append(Event.now)
        Event.now += 2.0

    assert trial_ms(run) == 2.0
    assert len(launched) == TIMED_LAUNCHES > 1
    assert event_ms(run) == 2.0
    assert len(launched) == TIMED_LAUNCHES + 1


class Threads(InterpretedBank):
    """Notes with how many threads PyTorch computes while a kernel is checked."""

    seen = ()

    def launch(self, spec, grid, *arguments):
        self.seen = (*self.seen, torch.get_num_threads())
        super().launch(spec, grid, *arguments)


def test_definitions_are_computed_by_one_thread_and_then_by_as_many_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        bank = Threads(SM89)
        assert error_of(bank, GEMM["i8"], CPU) < 2e-3
        assert set(bank.seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
