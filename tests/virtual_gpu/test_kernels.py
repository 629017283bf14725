"""Every kernel of the 14B model, as compiled, against its reference: once, in one order; a sample
in three. All sizes and orders are in `make proof`.
"""

import pytest

from kernels.arch import ARCHS, SM89, SM90, SM120
from kernels.attention import ATTENTION
from kernels.channel_norm import CHANNEL_NORM
from kernels.cross_attention import CROSS_ATTENTION
from kernels.gemm import GEMM
from kernels.modulate import MODULATE, QUANTIZE
from kernels.rope import RMS_INVERSE, ROPE
from tests.support.compiled import STATE, compiled
from virtual_gpu.bank import VirtualBank
from virtual_gpu.cases import ODD, OPS, QUICK, every, table
from virtual_gpu.orders import FORWARD, ORDERS

EVERY = [pytest.param(arch, name, id=f"{arch.name}-{name}") for arch in ARCHS for name in OPS]


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """All at once, in as many processes as there are cores."""
    compiled(*((spec, arch) for arch in ARCHS for spec in table(arch)))


def wrong(bank, op, tokens, wanted=every):
    return [str(check) for check in op.run(bank, bank.arch, tokens, wanted) if not check.holds]


@pytest.mark.parametrize(("arch", "name"), EVERY)
def test_every_compiled_kernel_equals_its_reference(arch, name):
    bank, op = VirtualBank(arch, STATE, [FORWARD]), OPS[name]
    assert wrong(bank, op, QUICK) == []
    assert set(bank.launches) == {spec.name for spec in op.specs(arch)}
    assert {finding.name for finding in bank.notes} <= {"SAME_WRITTEN"}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_no_kernel_of_the_table_is_left_out(arch):
    launched = [spec.name for op in OPS.values() for spec in op.specs(arch)]
    assert sorted(launched) == sorted(spec.name for spec in table(arch))
    shipped = [*ATTENTION.values(), *(spec for way in GEMM.values() for spec in way.specs)]
    shipped += [*MODULATE.values(), *QUANTIZE.values(), *CHANNEL_NORM.values(), RMS_INVERSE]
    shipped += [CROSS_ATTENTION, *(spec for specs in ROPE.values() for spec in specs)]
    missing = {spec.name for spec in shipped if arch in spec.tuning} - set(launched)
    assert missing == set()


SAMPLE = {
    SM89: ("attention.i8_fp8_f16_narrow", "gemm.i8.residual", "quantize.fp8e4nv_5120"),
    SM90: ("attention.i8_fp8_f32", "gemm.fp8.gelu", "rope_keys.i8_5120"),
    SM120: ("attention.i8_mx", "gemm.mx.bias", "cross_attention"),
}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_three_orders_give_the_same_bits(arch):
    bank = VirtualBank(arch, STATE, ORDERS)
    for op in OPS.values():
        assert wrong(bank, op, (129,), lambda spec: spec.name in SAMPLE[arch]) == []
    assert set(SAMPLE[arch]) <= set(bank.launches)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), EVERY)
def test_every_kernel_at_odd_sizes_in_every_order(arch, name):
    assert wrong(VirtualBank(arch, STATE, ORDERS), OPS[name], ODD) == []


def test_tiles_may_be_smaller_and_never_larger():
    bank = VirtualBank(SM89, STATE, [FORWARD], GROUP_M=2, BLOCK_M=512)
    assert bank.tuning(GEMM["i8"].bias).blocks["GROUP_M"] == 2
    assert bank.tuning(GEMM["i8"].bias).blocks["BLOCK_M"] == 128
