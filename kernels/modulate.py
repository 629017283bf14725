"""LayerNorm, AdaLN modulation and 8-bit rows in one pass over each token of the residual stream.

    y = layernorm(x) * (1 + scale) + shift
    q = round(R y / s),  s = max|R y| / limit                     one scale a token

R is that of `kernels.fp8` where rows are rotated, else nothing. A LayerNorm with weights is the
same formula: scale = weight - 1, shift = bias. `quantize` is the second line alone, for rows that
come out of a product.

Shapes    x [S, D] fp32;  shift, scale [D] fp32  ->  q [S, D] e4m3 or int8, s [S] fp32;
          D is a multiple of 256 where rows are rotated
Numerics  everything in fp32, the variance of the centred row; one program owns one token
Traffic   bytes a token: 5 D to modulate, 3 D to quantise. R is additions behind it: 4 D of them,
          in registers and shuffles (docs/reference/rotation.md 3.1)
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arch import archs_with
from kernels.fp8 import E4M3, FORMS, TINY, RowForm, Rows, quantize_rows, require_groups
from kernels.signature import Axis, require
from kernels.spec import Bank, Constant, KernelSpec, Tuning

EPS = 1e-6  # in every LayerNorm of a block


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, form: RowForm = E4M3) -> Rows:
    """The definition, in plain PyTorch."""
    y = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
    return quantize_rows(y, form)


def modulate(bank: Bank, x: Tensor, shift: Tensor, scale: Tensor, form: RowForm = E4M3) -> Rows:
    """x [S, D] fp32; shift, scale [D] fp32 -> rows of `form`. Raises `KernelError` for other shapes
    and types.
    """
    require("modulate", "x", x, (Axis("S"), Axis("D")), torch.float32)
    spec = modulate_spec(x.shape[1], form)
    require(spec.name, "shift", shift, x.shape[1:], torch.float32)
    require(spec.name, "scale", scale, x.shape[1:], torch.float32)
    rows = _empty_rows(x, form)
    bank.launch(spec, (len(x),), x, shift, scale, rows.q, rows.s)
    return rows


def quantize(bank: Bank, x: Tensor, form: RowForm = E4M3) -> Rows:
    """x [M, D] bf16 -> rows of `form`. The definition is `kernels.fp8.quantize_rows`. Raises
    `KernelError` for other shapes and types.
    """
    require("quantize", "x", x, (Axis("M"), Axis("D")), torch.bfloat16)
    spec = quantize_spec(x.shape[1], form)
    rows = _empty_rows(x, form)
    bank.launch(spec, (len(x),), x, rows.q, rows.s)
    return rows


def _empty_rows(x: Tensor, form: RowForm) -> Rows:
    q, s = x.new_empty(x.shape, dtype=form.dtype), x.new_empty(len(x), dtype=torch.float32)
    return Rows(q, s, form.rotated)


@cache
def modulate_spec(dim: int, form: RowForm) -> KernelSpec:
    """The kernel of `modulate` for tokens of `dim` values. Raises `KernelError` for a width that
    cannot be rotated.
    """
    inputs = "*fp32 *fp32 *fp32"
    if form.rotated:
        # parts of 256 values a warp: shift and scale of one part alone are held in registers
        return _spec("modulate", "modulate_rotated", inputs, dim, form, _in_parts(dim), EPS=EPS)
    return _spec("modulate", "modulate", inputs, dim, form, _whole(dim, _warps(dim)), EPS=EPS)


@cache
def quantize_spec(dim: int, form: RowForm) -> KernelSpec:
    """The kernel of `quantize`; raises as `modulate_spec` does."""
    warps = _rotating_warps(dim) if form.rotated else _warps(dim)
    rotated = {"ROTATED": form.rotated}
    return _spec("quantize", "quantize", "*bf16", dim, form, _whole(dim, warps), **rotated)


def _spec(
    op: str,
    function: str,
    inputs: str,
    dim: int,
    form: RowForm,
    shape: tuple[int, dict[str, int]],
    **constants: Constant,
) -> KernelSpec:
    """`shape`: warps and tile of a program."""
    if form.rotated:
        require_groups(dim)
    warps, blocks = shape
    return KernelSpec(
        name=f"{op}.{form.name}_{dim}",
        device=f"modulate:{function}_kernel",
        signature=f"{inputs} *{form.codes} *fp32",
        constants={"D": dim, "LIMIT": form.limit, "TINY": TINY, **constants},
        tuning={
            arch: Tuning(warps, 1, blocks, arch.toolkits[0]) for arch in archs_with(form.codes)
        },
    )


def _warps(dim: int) -> int:
    """8 warps take 1024 fp32 or 2048 bf16 at once: 5120 of fp32 leave no lane idle."""
    return 8 if dim > 1024 else 1


def _rotating_warps(dim: int) -> int:
    """A warp holds whole groups, 8 neighbours a lane, and at most 64 values a lane."""
    return 8 if dim > 8192 else 4 if dim > 1024 else 1


def _whole(dim: int, warps: int) -> tuple[int, dict[str, int]]:
    return warps, {"BLOCK_D": 1 << (dim - 1).bit_length()}


def _in_parts(dim: int) -> tuple[int, dict[str, int]]:
    warps = 4 if dim > 1024 else 1
    return warps, {"PART": 256 * warps}


# The kernels of the 14B model: tokens have 5120 values, and 13824 inside the feed forward.
MODULATE = {form: modulate_spec(5120, form) for form in FORMS}
QUANTIZE = {(dim, form): quantize_spec(dim, form) for dim in (5120, 13824) for form in FORMS}
