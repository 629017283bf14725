"""LayerNorm, AdaLN modulation and 8-bit rows in one pass over each token of the residual stream.

    y = layernorm(x) * (1 + scale) + shift
    q = round(y / s),  s = max|y| / limit                         one scale a token

A LayerNorm with weights is the same formula: scale = weight - 1, shift = bias. `quantize` is the
second line alone, for rows that come out of a product.

Shapes    x [S, D] fp32;  shift, scale [D] fp32  ->  q [S, D] e4m3 or int8, s [S] fp32
Numerics  everything in fp32, the variance of the centred row; one program owns one token
Traffic   bytes a token: 5 D to modulate, 3 D to quantise
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arch import ARCHS, Arch
from kernels.fp8 import LIMITS, TINY, Rows, quantize_rows
from kernels.signature import Axis, require
from kernels.spec import Bank, Constant, KernelError, KernelSpec, Tuning

E4M3 = torch.float8_e4m3fn
EPS = 1e-6  # in every LayerNorm of a block


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Rows:
    """The definition, in plain PyTorch."""
    y = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
    return quantize_rows(y, dtype)


def modulate(
    bank: Bank, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype = E4M3
) -> Rows:
    """x [S, D] fp32; shift, scale [D] fp32 -> rows of `dtype`, e4m3 or int8. Raises `KernelError`
    for other shapes and types.
    """
    require("modulate", "x", x, (Axis("S"), Axis("D")), torch.float32)
    spec = modulate_spec(x.shape[1], dtype)
    require(spec.name, "shift", shift, x.shape[1:], torch.float32)
    require(spec.name, "scale", scale, x.shape[1:], torch.float32)
    rows = _empty_rows(x, dtype)
    bank.launch(spec, (len(x),), x, shift, scale, rows.q, rows.s)
    return rows


def quantize(bank: Bank, x: Tensor, dtype: torch.dtype = E4M3) -> Rows:
    """x [M, D] bf16 -> rows of `dtype`. The definition is `kernels.fp8.quantize_rows`. Raises
    `KernelError` for other shapes and types.
    """
    require("quantize", "x", x, (Axis("M"), Axis("D")), torch.bfloat16)
    spec = quantize_spec(x.shape[1], dtype)
    rows = _empty_rows(x, dtype)
    bank.launch(spec, (len(x),), x, rows.q, rows.s)
    return rows


def _empty_rows(x: Tensor, dtype: torch.dtype) -> Rows:
    return Rows(x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32))


@cache
def modulate_spec(dim: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel of `modulate` for tokens of `dim` values."""
    return _spec("modulate", "*fp32 *fp32 *fp32", dim, dtype, EPS=EPS)


@cache
def quantize_spec(dim: int, dtype: torch.dtype) -> KernelSpec:
    return _spec("quantize", "*bf16", dim, dtype)


def _spec(op: str, inputs: str, dim: int, dtype: torch.dtype, **constants: Constant) -> KernelSpec:
    if dtype not in LIMITS:
        raise KernelError(f"{op} makes rows of {' or '.join(map(str, LIMITS))}, not {dtype}")
    codes = "i8" if dtype == torch.int8 else "fp8e4nv"
    return KernelSpec(
        name=f"{op}.{codes}_{dim}",
        device=f"modulate:{op}_kernel",
        signature=f"{inputs} *{codes} *fp32",
        constants={"D": dim, "LIMIT": LIMITS[dtype], "TINY": TINY, **constants},
        tuning={arch: _tuning(arch, dim) for arch in ARCHS},
    )


def _tuning(arch: Arch, dim: int) -> Tuning:
    """8 warps take 1024 fp32 or 2048 bf16 at once: 5120 of fp32 leave no lane idle."""
    warps = 8 if dim > 1024 else 1
    return Tuning(warps, 1, {"BLOCK_D": 1 << (dim - 1).bit_length()}, arch.toolkits[0])


# The kernels of the 14B model: tokens have 5120 values, and 13824 inside the feed forward.
MODULATE = {dtype: modulate_spec(5120, dtype) for dtype in LIMITS}
QUANTIZE = {(dim, dtype): quantize_spec(dim, dtype) for dim in (5120, 13824) for dtype in LIMITS}
