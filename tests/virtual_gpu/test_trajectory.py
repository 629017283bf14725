"""Along a whole clip every operation by kernels gives what its reference gives, and clips by
kernels are as near to exact ones as clips by references: in the mean, as chaos rules single ones.
"""

from dataclasses import replace

import pytest

from engine.recipes import RECIPES
from kernels.arch import ARCHS
from kernels.ops import native_ops, reference_ops
from tests.support.beside import Beside
from tests.support.closeness import closeness
from tests.support.nano_clips import bank_of, packaged, pairs, request_of, run
from virtual_gpu.orders import FORWARD

pytestmark = pytest.mark.slow
archs = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)

CLIPS = 24  # of each architecture

# Of values in BF16 a few are tipped over by the last bit of an FP32 sum. Where cross attention is
# broad its result is small, as values have no mean, and a weight that is tipped over counts more.
LIMITS = {
    "modulate": 1e-6, "quantize": 1e-6, "rms_inverse": 1e-6, "rope": 1e-6, "attention": 5e-4,
    "cross_attention": 1e-3, "gemm": 2e-4, "gemm_gelu": 2e-4, "gemm_residual": 2e-6,
}  # fmt: skip


@archs
@pytest.mark.parametrize("name", RECIPES["preview"])
def test_along_a_clip_every_operation_gives_what_its_reference_gives(arch, name, tmp_path):
    """Both get the operands that the references made."""
    request = request_of(tmp_path, replace(RECIPES["preview"][name], steps=2))
    bank = bank_of(arch, [FORWARD])
    for spec, ways in pairs(arch):
        both = Beside(native_ops(bank, arch, attention=spec, gemm=ways), reference_ops(spec, arch))
        run(packaged(arch, both.ops()), request)
        assert {*both.found} == {*LIMITS}
        for operation, found in both.found.items():
            assert found.error <= LIMITS[operation], (spec.name, operation)
            # values of BF16 lie on ties: half of the largest is 63.5 of INT8
            assert found.others <= 1e-3 * found.codes, (spec.name, operation)
            assert found.farthest <= 1


@pytest.mark.timeout(1800)
@archs
def test_clips_by_kernels_are_as_near_to_exact_ones_as_those_by_references(arch, tmp_path):
    """The difference of means is at most 0.1 dB, as far as these clips can tell. An ulp in the
    references moves the PSNR of a clip as far as the kernels do: 0.3 dB.
    """
    found = closeness(arch, "production", CLIPS, tmp_path)
    assert found.standard_error < 0.15
    assert abs(found.difference) <= 0.1 + 2 * found.standard_error
    assert 0.5 < found.kernels_move / found.noise < 2
