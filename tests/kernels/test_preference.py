"""Where nothing was timed the fastest variant runs, as far as machine code tells.

The times are those that the model of the benchmarks expects, over every shape that the 14B model
launches. A worker multiplies rows of a dtype in one way, so that ways are compared by a block.
"""

from itertools import pairwise

import pytest

from benchmarks.kernel.estimate import estimate
from benchmarks.kernel.model import GPUS
from benchmarks.kernel.work import product, self_attention
from engine.config import SCAIL_14B
from kernels.arch import ARCHS
from kernels.attention import FORMS, variants
from kernels.fp8 import LIMITS
from kernels.gemm import GEMM
from kernels.ops import first_ways
from tests.support.compiled import compiled

D, F = SCAIL_14B.dim, SCAIL_14B.ffn
# of 416x672, 512x896 and 704x1280 in 81 frames, and of the latter two without the skeleton
TOKENS = (24024, 29757, 39424, 48832, 95920)
# of a block: how often, the ending, N and K, bytes that a value of the result moves
PRODUCTS = {
    "qkv": (1, "bias", product(3 * D, D, 2)),
    "cross q": (1, "bias", product(D, D, 2)),
    "o": (2, "residual", product(D, D, 8)),
    "up": (1, "gelu", product(F, D, 2)),
    "down": (1, "residual", product(D, F, 8)),
}
NOISE = 1.01  # what differs by less is as fast


def _id(value):
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(
    ("form", "arch"),
    [(form, arch) for form in FORMS for arch in ARCHS if variants(form, arch)],
    ids=_id,
)
def test_the_first_variant_of_a_form_is_the_fastest_at_every_size(form, arch):
    found = variants(form, arch)
    made = compiled(*[(spec, arch) for spec in found])
    for tokens in TOKENS:
        times = []
        for spec, cubin in zip(found, made, strict=True):
            blocks = spec.tuning[arch].blocks
            times.append(estimate(self_attention(D)(tokens), cubin, GPUS[arch], blocks).ms)
        assert times[0] <= NOISE * min(times), tokens
        assert all(one <= NOISE * after for one, after in pairwise(times)), tokens


def block_times(dtype, arch, tokens):
    """Milliseconds of a block's products in each way to multiply, by its name in the table."""
    ways = {key: way for key, way in GEMM.items() if way.dtype == dtype and arch in way.bias.tuning}
    times = {}
    for key, way in ways.items():
        blocks = way.bias.tuning[arch].blocks
        made = compiled(*[(getattr(way, ending), arch) for _, ending, _ in PRODUCTS.values()])
        times[key] = sum(
            count * estimate(work(tokens), cubin, GPUS[arch], blocks).ms
            for (count, _, work), cubin in zip(PRODUCTS.values(), made, strict=True)
        )
    return times


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(dtype, arch) for dtype in LIMITS for arch in ARCHS if dtype in first_ways(arch)],
    ids=_id,
)
def test_the_first_way_to_multiply_is_the_fastest_for_a_block(dtype, arch):
    first = first_ways(arch)[dtype]
    for tokens in TOKENS:
        times = block_times(dtype, arch, tokens)
        chosen = next(key for key in times if GEMM[key] is first)
        assert times[chosen] <= NOISE * min(times.values()), (tokens, times)
