"""From the fused QKV product to what self attention takes: norm, rotate, split, quantise.

    q = rotate(rmsnorm(q) * norm_q), k likewise     a norm over all D; a rotation of the pairs
                                                    (2j, 2j + 1) of every head by cos, sin
    Qkv8 = quantize_qkv(q, k, v)      blocks, smooth K, INT8 mixed, V transposed (kernels.layout)

Six small kernels, because each needs a number from all that the one before it saw:
    rms_inverse             1 / rms of q and of k, per token
    statistics, combine     the mean of k and the largest |v| over all tokens, per channel
    queries, keys, values   codes and scales

Shapes    qkv [S, 3 D] bf16, q | k | v;  norm_q, norm_k [D] fp32;  cos, sin [S, K / 2] fp32
Numerics  fp32 from the load to the code; the mean is that of all tokens, though any would be exact
Traffic   17 D bytes a token: 4 D for 1 / rms, 4 D for the statistics, 9 D for the codes. A product
          that gave the sums of squares and the peaks of its tiles as well would save 6 D; the
          squares alone 4 D, 0.7 % of a forward (`benchmarks/results/README.md`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arch import ARCHS, SM90, Arch, archs_with
from kernels.fp8 import LIMITS, TINY
from kernels.layout import (
    HEAD,
    K_BLOCK,
    KEY_PADDING,
    LOGIT_SCALE,
    MIX_DIGITS,
    Q_BLOCK,
    V_LIMIT,
    Qkv8,
    padded_keys,
    quantize_qkv,
)
from kernels.signature import Axis, require
from kernels.spec import Bank, Constant, KernelError, KernelSpec, Tuning

EPS = 1e-6  # in every RMSNorm
ROTATED_AT_ONCE = 1024  # tokens of `rotate_in_place`: a tenth of a gigabyte at D 5120


class RopeSpecs(NamedTuple):
    """The kernels for one width of tokens, one dtype of q and k, and one of v."""

    rms_inverse: KernelSpec
    statistics: KernelSpec
    combine: KernelSpec
    queries: KernelSpec
    keys: KernelSpec
    values: KernelSpec


def rms_inverse_reference(x: Tensor, dim: int, count: int) -> Tensor:
    """The definition: x [S, several * dim] -> [count, S] fp32 for the first `count` slices."""
    slices = x.float().unflatten(1, (-1, dim)).transpose(0, 1)[:count]
    return (slices.square().mean(dim=-1) + EPS).rsqrt()


def rotated_heads(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q and k after norm and RoPE, and v: [S, N, K] fp32 each."""
    q, k, v = qkv.float().chunk(3, dim=1)
    q, k = (F.rms_norm(x, x.shape[1:], w, EPS) for x, w in ((q, norm_q), (k, norm_k)))
    q, k, v = (x.unflatten(1, (-1, HEAD)) for x in (q, k, v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def rotate_in_place(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    at_once: int = ROTATED_AT_ONCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `rotated_heads`, rounded to the dtype of qkv, in the memory of qkv: q and k replace
    what they were made of, v stays as it is. Returns views [S, N, K].

    It takes `at_once` tokens at a time: what they need in FP32 is six times as large as they are.
    """
    dim = len(norm_q)
    for begin in range(0, len(qkv), at_once):
        tokens = slice(begin, begin + at_once)
        for first, weight in ((0, norm_q), (dim, norm_k)):
            _rotate_rows(qkv[tokens, first : first + dim], weight, cos[tokens], sin[tokens])
    q, k, v = (side.unflatten(1, (-1, HEAD)) for side in qkv.chunk(3, dim=1))
    return q, k, v


def _rotate_rows(side: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    normed = F.rms_norm(side.float(), weight.shape, weight, EPS).unflatten(1, (-1, HEAD))
    side.copy_(_rotate(normed, cos, sin).flatten(1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def rope_reference(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype = torch.int8,
    v_limit: float = V_LIMIT,
    v_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Qkv8:
    """The definition, in plain PyTorch."""
    return quantize_qkv(*rotated_heads(qkv, norm_q, norm_k, cos, sin), dtype, v_limit, v_dtype)


def rms_inverse(bank: Bank, x: Tensor, dim: int, count: int) -> Tensor:
    """Returns 1 / rms of the first `count` slices of each row, [count, S] fp32, where x is
    [S, several * dim] bf16. Cross attention has one slice, its q: dim = D, count = 1.

    Raises `KernelError` for other shapes and types.
    """
    require("rms_inverse", "x", x, (Axis("S"), Axis("columns", dim)), torch.bfloat16)
    parts = x.shape[1] // dim
    if not 1 <= count <= parts:
        raise KernelError(f"rms_inverse, count: expected 1 to {parts} slices, found {count}")
    inverse = x.new_empty(count, len(x), dtype=torch.float32)
    bank.launch(rms_inverse_spec(dim, parts), (len(x), count), x, inverse)
    return inverse


def rope(
    bank: Bank,
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype = torch.int8,
    v_limit: float = V_LIMIT,
    v_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Qkv8:
    """qkv [S, 3 D] bf16, the rest fp32 -> q and k in `dtype`, v in `v_dtype`; |vt| <= `v_limit`.

    Both dtypes are int8 or e4m3. Raises `KernelError` for other shapes and types.
    """
    dim = _check(qkv, norm_q, norm_k, cos, sin)
    specs = rope_specs(dim, dtype, v_dtype)
    tokens, heads, keys = len(qkv), dim // HEAD, padded_keys(len(qkv))
    inverse = rms_inverse(bank, qkv, dim, 2)  # that of q, that of k
    mean, vs = _mean_and_peak(bank, specs, qkv, inverse, norm_k, cos, sin, v_limit)
    made = Qkv8(
        q=qkv.new_empty(heads, tokens, HEAD, dtype=dtype),
        qs=mean.new_empty(heads, -(-tokens // Q_BLOCK)),
        k=qkv.new_empty(heads, keys, HEAD, dtype=dtype),
        ks=mean.new_empty(heads, keys // K_BLOCK),
        vt=qkv.new_empty(heads, HEAD, keys, dtype=v_dtype),
        vs=vs.view(heads, HEAD),
        tokens=tokens,
    )
    bank.launch(
        specs.queries, (made.qs.shape[1], heads // _block(bank, specs.queries, "HEADS")),
        qkv, inverse, norm_q, cos, sin, made.q, made.qs, tokens,
    )  # fmt: skip
    bank.launch(
        specs.keys, (made.ks.shape[1], heads // _block(bank, specs.keys, "HEADS")),
        qkv, inverse, norm_k, cos, sin, mean, made.k, made.ks, tokens,
    )  # fmt: skip
    grid = keys // _block(bank, specs.values, "BLOCK"), heads
    bank.launch(specs.values, grid, qkv, vs, made.vt, tokens)
    return made


def _mean_and_peak(
    bank: Bank,
    specs: RopeSpecs,
    qkv: Tensor,
    inverse: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    v_limit: float,
) -> tuple[Tensor, Tensor]:
    """Returns the mean of k and the scales of v, [D] fp32 each."""
    tokens, dim = len(qkv), len(norm_k)
    blocks = -(-tokens // _block(bank, specs.statistics, "BLOCK"))
    sums, peaks = norm_k.new_empty(2, blocks, dim)
    grid = blocks, dim // HEAD // _block(bank, specs.statistics, "HEADS")
    bank.launch(specs.statistics, grid, qkv, inverse, norm_k, cos, sin, sums, peaks, tokens)
    mean, vs = norm_k.new_empty(2, dim)
    grid = (dim // _block(bank, specs.combine, "COLUMNS"),)
    bank.launch(specs.combine, grid, sums, peaks, mean, vs, blocks, tokens, v_limit)
    return mean, vs


def _block(bank: Bank, spec: KernelSpec, name: str) -> int:
    return bank.tuning(spec).blocks[name]


def _check(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor) -> int:
    """Returns D. Raises `KernelError` for other shapes and types."""
    require("rope", "qkv", qkv, (Axis("S"), Axis("3 D", 3 * HEAD)), torch.bfloat16)
    tokens, dim = len(qkv), qkv.shape[1] // 3
    require("rope", "norm_q", norm_q, (dim,), torch.float32)
    require("rope", "norm_k", norm_k, (dim,), torch.float32)
    require("rope", "cos", cos, (tokens, HEAD // 2), torch.float32)
    require("rope", "sin", sin, (tokens, HEAD // 2), torch.float32)
    return dim


@cache
def rms_inverse_spec(dim: int, parts: int) -> KernelSpec:
    """The kernel of `rms_inverse` for rows of `parts` slices of `dim` values."""
    return KernelSpec(
        name=f"rms_inverse.{parts}x{dim}",
        device="rope:rms_inverse_kernel",
        signature="*bf16 *fp32",
        constants={"ROW": parts * dim, "D": dim, "EPS": EPS},
        tuning=_tuned(4, BLOCK_D=1 << (dim - 1).bit_length()),
    )


@cache
def rope_specs(
    dim: int, dtype: torch.dtype, v_dtype: torch.dtype = torch.float8_e4m3fn
) -> RopeSpecs:
    """The kernels of `rope` for tokens of `dim` values, q and k in `dtype`, v in `v_dtype`."""
    for wanted in (dtype, v_dtype):
        if wanted not in LIMITS:
            raise KernelError(f"rope makes {' or '.join(map(str, LIMITS))}, not {wanted}")
    codes, v_codes = ("i8" if d == torch.int8 else "fp8e4nv" for d in (dtype, v_dtype))
    both, one = f"{dim}", f"{codes}_{dim}"  # names of kernels for both dtypes, and for one
    rotation = "*bf16 *fp32 *fp32 *fp32 *fp32"  # qkv, 1 / rms, weight, cos, sin
    shape = {"D": dim, "HEAD": HEAD}
    limits = {**shape, "LIMIT": LIMITS[dtype], "TINY": TINY}
    limits["DIGITS"] = MIX_DIGITS if dtype == torch.int8 else 0
    q_limits = {**limits, "BLOCK": Q_BLOCK, "FACTOR": LOGIT_SCALE}
    k_limits = {**limits, "BLOCK": K_BLOCK}
    return RopeSpecs(
        rms_inverse_spec(dim, 3),
        _spec(
            "statistics", both, f"{rotation} *fp32 *fp32 i32", shape, _rotating(dim, 8, BLOCK=64)
        ),
        _spec(
            "combine", both, "*fp32 *fp32 *fp32 *fp32 i32 i32 fp32", {"D": dim, "TINY": TINY},
            _tuned(8, ROWS=64, COLUMNS=32),
        ),
        _spec(
            "queries", one, f"{rotation} *{codes} *fp32 i32", q_limits,
            _rotating(dim, 16, archs_with(codes)),
        ),
        _spec(
            "keys", one, f"{rotation} *fp32 *{codes} *fp32 i32", k_limits,
            _rotating(dim, 8, archs_with(codes)),
        ),
        _spec(
            "values", f"{v_codes}_{dim}", f"*bf16 *fp32 *{v_codes} i32", shape,
            _tuned(8, archs_with(v_codes), BLOCK=KEY_PADDING),
        ),
    )  # fmt: skip


def _spec(
    kernel: str,
    variant: str,
    signature: str,
    constants: Mapping[str, Constant],
    tuning: Mapping[Arch, Tuning],
) -> KernelSpec:
    device = f"rope:{kernel}_kernel"
    return KernelSpec(f"rope_{kernel}.{variant}", device, signature, constants, tuning)


def _tuned(warps: int, archs: Sequence[Arch] = ARCHS, **blocks: int) -> dict[Arch, Tuning]:
    return {arch: Tuning(warps, 1, blocks, arch.toolkits[0]) for arch in archs}


def _rotating(
    dim: int, warps: int, archs: Sequence[Arch] = ARCHS, **blocks: int
) -> dict[Arch, Tuning]:
    """Lets a program rotate up to 8 heads of its tokens, STAGES - 1 of them loaded ahead.

    At a latency of 1 us a multiprocessor of an H200 must have 36 KB under way to keep its memory
    busy: two heads. Those of the others need 8 to 11 KB.
    """
    blocks = {"HEADS": math.gcd(dim // HEAD, 8), **blocks}
    stages = {arch: 3 if arch is SM90 else 2 for arch in archs}
    return {
        arch: Tuning(warps, n, {**blocks, "STAGES": n}, arch.toolkits[0])
        for arch, n in stages.items()
    }


# The kernels of the 14B model: 40 heads, and the norm of cross attention's q.
ROPE = {(qk, v): rope_specs(5120, qk, v) for qk in LIMITS for v in LIMITS}
RMS_INVERSE = rms_inverse_spec(5120, 1)
