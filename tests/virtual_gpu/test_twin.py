"""A GPU that computes what the virtual one does is told so, and one that does not is told apart, by
the kernel. Another order of the virtual GPU stands in for the real one.
"""

from dataclasses import replace

import pytest
import torch

from kernels.arch import SM89, SM90, SM120
from kernels.gemm import GEMM
from kernels.launch import DriverError
from tests.support.compiled import QUICK_ARCHS, STATE, compiled
from virtual_gpu.bank import VirtualBank
from virtual_gpu.cases import table
from virtual_gpu.orders import BACKWARD, FORWARD, UNWATCHED
from virtual_gpu.twin import approximations, differences, limit_of, worst

CPU = torch.device("cpu")
TOKENS = (17,)
EXACT = ("gemm.i8.bias", "gemm.i8.residual", "rope_statistics.5120")


def bank(arch, order):
    return VirtualBank(arch, STATE, [order])


class Spoilt:
    """A GPU that spoils what one kernel makes, its last tensor."""

    def __init__(self, arch, kernel, spoil):
        self.bank, self.kernel, self.spoil = bank(arch, BACKWARD), kernel, spoil
        self.arch = arch

    def tuning(self, spec):
        return self.bank.tuning(spec)

    def launch(self, spec, grid, *arguments):
        self.bank.launch(spec, grid, *arguments)
        if spec.name == self.kernel:
            self.spoil([one for one in arguments if isinstance(one, torch.Tensor)][-1])


def found(real, arch, *names, repeats=0):
    virtual = bank(arch, FORWARD)
    by_kernel = {}
    for one in differences(real, CPU, virtual, lambda spec: spec.name in names, TOKENS, repeats):
        by_kernel.setdefault(one.kernel, []).append(one)
    return {name: worst(by_kernel[name]) for name in names}


def test_the_model_is_exact_where_nothing_is_approximate():
    compiled(*((spec, arch) for arch in QUICK_ARCHS for spec in table(arch)))
    for arch in QUICK_ARCHS:
        held, exact = bank(arch, UNWATCHED), set()
        for spec in table(arch):
            held.tuning(spec)
            if not approximations(held.programs[spec.name]):
                exact.add(spec.name)
        ways = [name for name, way in GEMM.items() if arch in way.bias.tuning and "i8_" in name]
        assert exact == {*EXACT} | {name.replace("i8", way) for way in ways for name in EXACT[:2]}


def test_a_kernel_that_is_not_exact_says_what_is_open():
    held = {}
    for arch in (SM89, SM90):
        one = bank(arch, UNWATCHED)
        for spec in table(arch):
            one.tuning(spec)
            held[arch.name, spec.name] = approximations(one.programs[spec.name])
    assert held["sm89", "gemm.fp8.bias"] == ("mma with floating sums",)
    assert held["sm90", "gemm.fp8.bias"] == ("wgmma with floating sums",)
    assert held["sm89", "gemm.i8.gelu"] == ("div.full", "ex2.approx")
    assert held["sm89", "quantize.i8r_5120"] == ("div.full",)
    limits = {dtype: limit_of(("div.full",), dtype) for dtype in (torch.float32, torch.int8)}
    assert limits == {torch.float32: 1e-5, torch.int8: 0.0}
    assert limit_of((), torch.float32) == 0.0


@pytest.mark.parametrize(
    ("arch", "name"),
    [(SM89, "gemm.i8.bias"), (SM90, "quantize.fp8e4nv_5120"), (SM120, "attention.i8_mx_narrow")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_gpu_with_another_order_of_warps_and_blocks_computes_the_same_bits(arch, name):
    one = found(bank(arch, BACKWARD), arch, name, repeats=1)[name]
    assert one.holds and (one.others, one.error, one.farthest) == (0, 0.0, 0)
    assert one.values > 1000


def one_bit(tensor):
    tensor.view(torch.uint8).flatten()[40] ^= 1


def test_one_bit_of_an_exact_kernel_is_told_and_of_another_it_is_not():
    name = "gemm.i8.bias"
    one = found(Spoilt(SM89, name, one_bit), SM89, name)[name]
    assert not one.holds and one.others == 1
    assert str(one).startswith("gemm.i8.bias: 1 of ")
    assert str(one).endswith("every bit must be the same")
    other = "gemm.i8.gelu"
    one = found(Spoilt(SM89, other, one_bit), SM89, other)[other]
    assert one.holds and one.others == 1


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("gemm.i8.gelu", lambda out: out.mul_(1.01)),
        ("attention.i8_fp8_f32", lambda out: out[3:5].zero_()),
        ("attention.i8_fp8_f32", lambda out: out.view(torch.int16).flatten()[:1].fill_(0x7FFF)),
        ("rms_inverse.1x5120", lambda out: out.mul_(1 + 1e-4)),
    ],
    ids=["values", "rows", "nan", "fp32"],
)
def test_a_wrong_result_is_told_with_its_kernel(name, spoil):
    one = found(Spoilt(SM89, name, spoil), SM89, name)[name]
    assert not one.holds
    assert str(one).startswith(f"{name}: ") and "limit" in str(one)


def test_codes_may_lie_beside_where_ties_are_and_nowhere_else():
    name = "rope_values.i8_5120"

    def few(out):
        out.flatten()[7] += 1

    def far(out):
        out.flatten()[7] += 2

    def many(out):
        out.flatten()[::100] += 1

    holds = {
        spoil: found(Spoilt(SM89, name, spoil), SM89, name)[name].holds
        for spoil in (few, far, many)
    }
    assert holds == {few: True, far: False, many: False}


def test_a_gpu_that_contradicts_itself_or_refuses_a_launch_is_told():
    name, calls = "rms_inverse.1x5120", []

    def flaky(out):
        calls.append(1)
        if len(calls) == 3:
            one_bit(out)

    one = found(Spoilt(SM89, name, flaky), SM89, name, repeats=3)[name]
    assert not one.holds and "the same launch gives other bits the next time" in str(one)

    def refuse(out):
        raise DriverError("cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    one = found(Spoilt(SM89, name, refuse), SM89, name)[name]
    assert not one.holds and "it does not run: cuLaunchKernel failed" in str(one)
    assert replace(one, fault="").holds
