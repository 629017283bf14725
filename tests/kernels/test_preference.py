"""Where nothing was timed the fastest variant runs, as far as machine code tells.

The model is that of the benchmarks, over every shape that the 14B model launches.
"""

from itertools import pairwise

import pytest

from benchmarks.kernel.model import estimated_ms
from engine.config import SCAIL_14B
from kernels.arch import ARCHS
from kernels.attention import FORMS, variants
from kernels.fp8 import LIMITS
from kernels.gemm import GEMM
from kernels.layout import HEAD
from kernels.ops import first_ways
from tests.support.compiled import compiled

D, F, HEADS = SCAIL_14B.dim, SCAIL_14B.ffn, SCAIL_14B.heads
# of 416x672, 512x896 and 704x1280 in 81 frames, and of the latter two without the skeleton
TOKENS = (24024, 29757, 39424, 48832, 95920)
PRODUCTS = {"qkv": (3 * D, D), "o": (D, D), "up": (F, D), "down": (D, F)}  # N, K
ENDINGS = {"qkv": "bias", "o": "residual", "up": "gelu", "down": "residual"}
NOISE = 1.01  # what differs by less is as fast

archs = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)


@archs
@pytest.mark.parametrize("form", FORMS)
def test_the_first_variant_of_a_form_is_the_fastest_at_every_size(form, arch):
    found = variants(form, arch)
    made = compiled(*[(spec, arch) for spec in found])
    for tokens in TOKENS:
        times = []
        for spec, cubin in zip(found, made, strict=True):
            programs = -(-tokens // spec.tuning[arch].blocks["BLOCK_Q"]) * HEADS
            times.append(estimated_ms(cubin, arch, 4 * tokens**2 * HEAD * HEADS, programs))
        assert times[0] <= NOISE * min(times), tokens
        assert all(one <= NOISE * after for one, after in pairwise(times)), tokens


def product_times(name, dtype, arch, tokens):
    """Estimated milliseconds of each way to multiply, by its name in the order of the table."""
    n, k = PRODUCTS[name]
    ways = {key: way for key, way in GEMM.items() if way.dtype == dtype and arch in way.bias.tuning}
    made = compiled(*[(getattr(way, ENDINGS[name]), arch) for way in ways.values()])
    times = {}
    for (key, way), cubin in zip(ways.items(), made, strict=True):
        blocks = way.bias.tuning[arch].blocks
        programs = -(-tokens // blocks["BLOCK_M"]) * (n // blocks["BLOCK_N"])
        times[key] = estimated_ms(cubin, arch, 2 * tokens * n * k, programs)
    return times


@archs
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "name",
    ["qkv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("o", "up", "down"))],
)
def test_the_first_way_to_multiply_is_the_fastest_for_every_product(name, dtype, arch):
    first = first_ways(arch).get(dtype)
    if first is None:
        pytest.skip(f"{arch.name} has no products of {dtype}")
    for tokens in TOKENS:
        times = product_times(name, dtype, arch, tokens)
        chosen = next(key for key in times if GEMM[key] is first)
        assert times[chosen] <= NOISE * min(times.values()), (tokens, times)
