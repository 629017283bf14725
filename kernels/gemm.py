"""8-bit matrix product with FP32 row scales, and three things to do with it.

    y = (A @ B^T) * a.s[:, None] * b.s[None, :] + bias
    gemm             y                                   -> bf16
    gemm_gelu        gelu_tanh(y) * m                    -> bf16
    gemm_residual    x += gate * y                       x fp32, in place

Shapes    A: Rows [M, K], any M > 0;  B: Rows [N, K], a weight with a scale for each output;
          bias, gate, m [N] fp32;  x [M, N] fp32.  N and K are multiples of the tile's.
          A and B are both rotated or neither: R R = 1 goes away inside the product.
Numerics  codes are summed in INT32 (exact) or FP32, everything after that is FP32.  What Ada and
          Hopper call FP32 here is an accumulator of about 14 bits in the tensor core, and `fp8`
          lets it run over all of K.  Simulated in tests/kernels/test_gemm.py, that adds less than
          1 % to the error that E4M3 has anyway.  `mx` sums in true FP32.  A way that moved its sum
          to registers every 128 was dropped: Triton 3.6 adds the sum of a product that has not
          been waited for, and ptxas then waits at once, so that nothing overlaps.

The feed forward needs GELU's result as 8-bit rows, whose scale is known when a whole row is: 13824
columns, 54 tiles.  It is written as BF16, and `kernels.modulate` quantises it, one row a program.
That costs 4 bytes a value more than codes written directly would (BF16 out and in): 108 GB in a
forward of 48832 tokens, 0.11 s of an RTX 4090's bandwidth, 2 % of its goal for the forward.  Scales
for each row and tile would save half of it, but round INT8 twice, or need a second set of
accumulators in the next product, whose tiles fill the registers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arch import SM80, SM86, SM89, SM90, SM120, Arch
from kernels.fp8 import INT8_MAX, Rows
from kernels.signature import Axis, require
from kernels.spec import Bank, Constant, KernelError, KernelSpec, Loop, Tuning

MAX_INT8_DEPTH = 2**31 // int(INT8_MAX) ** 2  # K up to which no sum leaves INT32

# gelu_tanh(y) = y / (1 + 2^(y * (LINEAR + CUBIC * y^2)))
GELU_LINEAR = -2 * math.sqrt(2 / math.pi) / math.log(2)
GELU_CUBIC = 0.044715 * GELU_LINEAR


SUMS: Mapping[str, str] = {  # by `MMA` of the device code
    "int8": "INT32, exact",
    "fp8": "about 14 bits, over all of K",
    "scaled": "FP32",
}


@dataclass(frozen=True, slots=True)
class Gemm:
    """One way to multiply, in its three endings. Their tiles are the same."""

    dtype: torch.dtype  # of both operands
    bias: KernelSpec
    gelu: KernelSpec
    residual: KernelSpec

    @property
    def sums(self) -> str:
        """Says what sums of codes are kept in, as `info` shows it."""
        return SUMS[str(self.bias.constants["MMA"])]

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        return self.bias, self.gelu, self.residual


def product_reference(a: Rows, b: Rows) -> Tensor:
    """Returns A @ B^T with its scales, [M, N] fp32. FP64 holds every sum of INT8 codes exactly.

    Raises `KernelError` if one of the two alone is rotated.
    """
    _require_one_basis("a product", a, b)
    wide = torch.float64 if a.q.dtype == torch.int8 else torch.float32
    total = (a.q.to(wide) @ b.q.to(wide).T).float()
    return total * a.s[:, None] * b.s


def gemm_reference(a: Rows, b: Rows, bias: Tensor) -> Tensor:
    """The definition, in plain PyTorch."""
    return (product_reference(a, b) + bias).bfloat16()


def gemm_gelu_reference(a: Rows, b: Rows, bias: Tensor, multiplier: Tensor) -> Tensor:
    """The definition, in plain PyTorch."""
    y = F.gelu(product_reference(a, b) + bias, approximate="tanh")
    return (y * multiplier).bfloat16()


def gemm_residual_reference(a: Rows, b: Rows, bias: Tensor, gate: Tensor, x: Tensor) -> None:
    """The definition, in plain PyTorch. Changes x."""
    x += gate * (product_reference(a, b) + bias)


def gemm(bank: Bank, way: Gemm, a: Rows, b: Rows, bias: Tensor) -> Tensor:
    """a [M, K], b [N, K], bias [N] fp32 -> [M, N] bf16."""
    return _gemm_to_bf16(bank, way.bias, way.dtype, a, b, bias=bias)


def gemm_gelu(bank: Bank, way: Gemm, a: Rows, b: Rows, bias: Tensor, multiplier: Tensor) -> Tensor:
    """a [M, K], b [N, K]; bias, multiplier [N] fp32 -> gelu_tanh * multiplier [M, N] bf16."""
    return _gemm_to_bf16(bank, way.gelu, way.dtype, a, b, bias=bias, multiplier=multiplier)


def gemm_residual(
    bank: Bank, way: Gemm, a: Rows, b: Rows, bias: Tensor, gate: Tensor, x: Tensor
) -> None:
    """Adds gate * (a @ b^T + bias) to x [M, N] fp32; bias and gate are [N] fp32."""
    grid = _grid(bank, way.residual, way.dtype, a, b)
    name, shape = way.residual.name, (len(a.q), *b.q.shape)  # M, N, K
    require(name, "bias", bias, shape[1:2], torch.float32)
    require(name, "gate", gate, shape[1:2], torch.float32)
    require(name, "x", x, shape[:2], torch.float32)
    bank.launch(way.residual, grid, a.q, a.s, b.q, b.s, bias, gate, x, *shape)


def _gemm_to_bf16(
    bank: Bank, spec: KernelSpec, dtype: torch.dtype, a: Rows, b: Rows, **vectors: Tensor
) -> Tensor:
    grid = _grid(bank, spec, dtype, a, b)
    for name, vector in vectors.items():
        require(spec.name, name, vector, (len(b.q),), torch.float32)
    out = a.s.new_empty(len(a.q), len(b.q), dtype=torch.bfloat16)
    operands = (a.q, a.s, b.q, b.s, *vectors.values(), out)
    bank.launch(spec, grid, *operands, len(a.q), *b.q.shape)
    return out


def _grid(bank: Bank, spec: KernelSpec, dtype: torch.dtype, a: Rows, b: Rows) -> tuple[int]:
    """Returns a grid of one program a tile. Raises `KernelError` for operands that the tiles cannot
    cover, and for two of which one alone is rotated.
    """
    _require_one_basis(spec.name, a, b)
    blocks = bank.tuning(spec).blocks
    require(spec.name, "A", a.q, (Axis("M"), Axis("K", blocks["BLOCK_K"])), dtype)
    m, k = a.q.shape
    require(spec.name, "B", b.q, (Axis("N", blocks["BLOCK_N"]), k), dtype)
    n = len(b.q)
    require(spec.name, "the scales of A", a.s, (m,), torch.float32)
    require(spec.name, "the scales of B", b.s, (n,), torch.float32)
    if dtype == torch.int8 and k > MAX_INT8_DEPTH:
        raise KernelError(f"{spec.name} sums at most {MAX_INT8_DEPTH} products, not {k}")
    return (-(-m // blocks["BLOCK_M"]) * (n // blocks["BLOCK_N"]),)


def _require_one_basis(name: str, a: Rows, b: Rows) -> None:
    """Raises `KernelError` for a rotated operand and one that is not: their product is noise."""
    if a.rotated != b.rotated:
        is_rotated, is_not = ("A", "B") if a.rotated else ("B", "A")
        raise KernelError(
            f"{name} was given a rotated {is_rotated} and {is_not} as it is; both are expected to "
            "be rotated, or neither"
        )


def _way(
    name: str, mma: str, instructions: Mapping[Arch, str], tuning: Mapping[Arch, Tuning]
) -> Gemm:
    """Makes the three specs of a way to multiply. `mma` is how the device code does it."""
    dtype, codes = (torch.int8, "*i8") if mma == "int8" else (torch.float8_e4m3fn, "*fp8e4nv")
    operands = f"{codes} *fp32 {codes} *fp32 *fp32"  # A, its scales, B, its scales, bias
    loop = Loop({arch: (instruction,) for arch, instruction in instructions.items()})

    def spec(
        ending: str, function: str, rest: str, constants: Mapping[str, Constant]
    ) -> KernelSpec:
        types = f"{operands} {rest} i32 i32 i32"  # M, N, K
        count = len(types.split())
        return KernelSpec(
            name=f"gemm.{name}.{ending}",
            device=f"gemm:{function}",
            signature=types,
            constants={"MMA": mma, **constants},
            tuning=tuning,
            multiples_of_16=(count - 2, count - 1),
            loop=loop,
        )

    gelu = {"GELU_LINEAR": GELU_LINEAR, "GELU_CUBIC": GELU_CUBIC}
    return Gemm(
        dtype,
        bias=spec("bias", "gemm_kernel", "*bf16", {}),
        gelu=spec("gelu", "gemm_gelu_kernel", "*fp32 *bf16", gelu),
        residual=spec("residual", "gemm_residual_kernel", "*fp32 *fp32", {}),
    )


def _tile(
    m: int, n: int, k: int, stages: int, toolkit: str, max_registers: int | None = None
) -> Tuning:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return Tuning(8, stages, blocks, toolkit, max_registers)


# The first of an architecture is its default, by what `benchmarks/kernel/model.py` expects
# (tests/kernels/test_preference.py); the others are for measuring against it.
#
# Of a `pair` two blocks share a multiprocessor: one multiplies while the other moves its result. At
# the full rate of a GeForce its operands want 16 bytes a cycle and multiprocessor from L2, a wide
# tile's 12 (docs/reference/kernels.md 4); the model knows nothing of that, a trial on the GPU does.
GEMM: Mapping[str, Gemm] = {
    "i8_pair": _way(
        "i8_pair",
        "int8",
        {
            **dict.fromkeys((SM80, SM86, SM89, SM120), "IMMA.16832.S8.S8"),
            SM90: "IGMMA.64x128x32.S8.S8",
        },
        {
            SM80: _tile(128, 128, 64, 3, "12.6", max_registers=128),
            SM86: _tile(128, 128, 64, 3, "12.6", max_registers=128),
            SM89: _tile(128, 128, 64, 3, "12.6", max_registers=128),
            SM90: _tile(128, 128, 128, 3, "12.6", max_registers=128),
            SM120: _tile(128, 128, 64, 3, "12.8", max_registers=128),
        },
    ),
    "i8": _way(
        "i8",
        "int8",
        {
            **dict.fromkeys((SM80, SM86, SM89, SM120), "IMMA.16832.S8.S8"),
            SM90: "IGMMA.64x128x32.S8.S8",
        },
        {
            SM80: _tile(128, 256, 64, 3, "12.6"),
            SM86: _tile(128, 256, 64, 3, "12.6"),
            SM89: _tile(128, 256, 64, 3, "12.6"),
            SM120: _tile(128, 256, 64, 3, "12.8"),
            SM90: _tile(128, 256, 128, 4, "12.6"),
        },
    ),
    "i8_tall": _way(
        "i8_tall",
        "int8",
        dict.fromkeys((SM80, SM86, SM89, SM120), "IMMA.16832.S8.S8"),
        {
            SM80: _tile(256, 128, 64, 3, "12.6"),
            SM86: _tile(256, 128, 64, 3, "12.6"),
            SM89: _tile(256, 128, 64, 3, "12.6"),
            SM120: _tile(256, 128, 64, 3, "12.8"),
        },
    ),
    "fp8_pair": _way(
        "fp8_pair",
        "fp8",
        {SM89: "QMMA.16832.F32.E4M3.E4M3", SM90: "QGMMA.64x128x32.F32.E4M3.E4M3"},
        {
            SM89: _tile(128, 128, 64, 3, "12.6", max_registers=128),
            SM90: _tile(128, 128, 128, 3, "12.6", max_registers=128),
        },
    ),
    "fp8": _way(
        "fp8",
        "fp8",
        {SM89: "QMMA.16832.F32.E4M3.E4M3", SM90: "QGMMA.64x256x32.F32.E4M3.E4M3"},
        {SM89: _tile(128, 256, 64, 3, "12.6"), SM90: _tile(128, 256, 128, 4, "12.6")},
    ),
    # block-scaled with all scales 1: the only FP8 product of full rate that sums in FP32
    "mx_pair": _way(
        "mx_pair",
        "scaled",
        {SM120: "QMMA.SF.16832.F32.E4M3.E4M3"},
        {SM120: _tile(128, 128, 64, 3, "12.8", max_registers=128)},
    ),
    "mx": _way(
        "mx",
        "scaled",
        {SM120: "QMMA.SF.16832.F32.E4M3.E4M3"},
        {SM120: _tile(128, 256, 64, 3, "12.8")},
    ),
    "mx_tall": _way(
        "mx_tall",
        "scaled",
        {SM120: "QMMA.SF.16832.F32.E4M3.E4M3"},
        {SM120: _tile(256, 128, 64, 3, "12.8")},
    ),
}
