"""Every kernel of the 14B model, as compiled, against its reference: once, in one order; a sample
in three. All sizes and orders are in `make proof`.
"""

import pytest
import torch

from kernels.arch import SM80, SM86, SM89, SM90, SM120, archs_with
from kernels.attention import ATTENTION
from kernels.channel_norm import CHANNEL_NORM
from kernels.cross_attention import CROSS_ATTENTION
from kernels.gemm import GEMM
from kernels.modulate import MODULATE, QUANTIZE
from kernels.rope import RMS_INVERSE, ROPE
from kernels.spec import KernelError, KernelSpec, Tuning
from tests.support.compiled import EACH_ARCH, QUICK_ARCHS, STATE, compiled, each_arch
from tests.support.interpreter import InterpretedBank
from virtual_gpu.bank import VirtualBank
from virtual_gpu.cases import ODD, OPS, QUICK, every, table
from virtual_gpu.orders import FORWARD, ORDERS

EVERY = [
    pytest.param(*arch.values, name, id=f"{arch.id}-{name}", marks=arch.marks)
    for arch in EACH_ARCH
    for name in OPS
]


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """All at once, in as many processes as there are cores."""
    compiled(*((spec, arch) for arch in QUICK_ARCHS for spec in table(arch)))


def wrong(bank, op, tokens, wanted=every):
    return [str(check) for check in op.run(bank, bank.arch, tokens, wanted) if not check.holds]


@pytest.mark.parametrize(("arch", "name"), EVERY)
def test_every_compiled_kernel_equals_its_reference(arch, name):
    bank, op = VirtualBank(arch, STATE, [FORWARD]), OPS[name]
    assert wrong(bank, op, QUICK) == []
    assert set(bank.launches) == {spec.name for spec in op.specs(arch)}
    assert {finding.name for finding in bank.notes} <= {"SAME_WRITTEN"}


@each_arch
def test_no_kernel_of_the_table_is_left_out(arch):
    launched = [spec.name for op in OPS.values() for spec in op.specs(arch)]
    assert sorted(launched) == sorted(spec.name for spec in table(arch))
    shipped = [*ATTENTION.values(), *(spec for way in GEMM.values() for spec in way.specs)]
    shipped += [*MODULATE.values(), *QUANTIZE.values(), *CHANNEL_NORM.values(), RMS_INVERSE]
    shipped += [CROSS_ATTENTION, *(spec for specs in ROPE.values() for spec in specs)]
    missing = {spec.name for spec in shipped if arch in spec.tuning} - set(launched)
    assert missing == set()


SAMPLE = {
    SM80: ("attention.i8_i8_narrow", "gemm.i8_pair.gelu", "modulate.i8r_5120"),
    SM86: ("attention.i8_i8", "gemm.i8_pair.residual", "rope_values.i8_5120"),
    SM89: ("attention.i8_fp8_f16_narrow", "gemm.i8_pair.residual", "quantize.fp8e4nv_5120"),
    SM90: ("attention.i8_fp8_f32", "gemm.fp8.gelu", "rope_keys.i8_5120"),
    SM120: ("attention.i8_mx", "gemm.mx_pair.bias", "cross_attention"),
}


@each_arch
def test_three_orders_give_the_same_bits(arch):
    bank = VirtualBank(arch, STATE, ORDERS)
    for op in OPS.values():
        assert wrong(bank, op, (129,), lambda spec: spec.name in SAMPLE[arch]) == []
    assert set(SAMPLE[arch]) <= set(bank.launches)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), EVERY)
def test_every_kernel_at_odd_sizes_in_every_order(arch, name):
    assert wrong(VirtualBank(arch, STATE, ORDERS), OPS[name], ODD) == []


@pytest.mark.parametrize("arch", archs_with("fp8e4nv"), ids=lambda arch: arch.name)
def test_codes_of_e4m3_are_the_nearest_just_beside_ties_too(arch):
    """Triton's cast on sm_89 goes through FP16 toward zero: above a tie its code is too small."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.tensor(side)) for side in (0.0, 1e9)]
    x = torch.cat([codes, ties, *beside, torch.tensor([449.0, 1e9])])
    x = torch.cat([x, -x])
    tuning = {arch: Tuning(warps=4, stages=1, blocks={"BLOCK": 1024}, toolkit=arch.toolkits[0])}
    spec = KernelSpec(
        "sample.to_codes", "arithmetic:to_codes", "*fp32 *fp8e4nv i32", {}, tuning,
        package="tests.support.samples",
    )  # fmt: skip
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    for bank in (VirtualBank(arch, STATE), InterpretedBank(arch)):
        got = torch.empty_like(want)
        bank.launch(spec, (1,), x, got, len(x))
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_a_kernel_whose_ptx_is_not_kept_is_refused(tmp_path):
    (cubin,) = compiled((GEMM["i8"].bias, SM89))
    bank = VirtualBank(SM89, STATE)
    bank.state = tmp_path
    with pytest.raises(KernelError, match=r"no PTX of kernel gemm\.i8\.bias in .* Build"):
        bank.load(cubin)


def test_tiles_may_be_smaller_and_never_larger():
    bank = VirtualBank(SM89, STATE, [FORWARD], GROUP_M=2, BLOCK_M=512)
    assert bank.tuning(GEMM["i8"].bias).blocks["GROUP_M"] == 2
    assert bank.tuning(GEMM["i8"].bias).blocks["BLOCK_M"] == 128
