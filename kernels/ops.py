"""The operations of a transformer block as a record of functions: compiled kernels or references.

`native_ops` launches kernels through a bank; `reference_ops` is plain PyTorch and runs anywhere.
Both quantise at the same places by the same rules and hand on BF16, so that they lie closer to each
other than to exact arithmetic (tests/denoise/test_block.py), and each can stand in for the other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from kernels import attention as self_attention
from kernels import gemm as product
from kernels import modulate as norm
from kernels.arch import Arch
from kernels.attention import ATTENTION
from kernels.channel_norm import CHANNEL_NORM
from kernels.cross_attention import (
    CROSS_ATTENTION,
    CrossKeys,
    cross_attention,
    tiled_reference,
)
from kernels.fp8 import RowForm, Rows, quantize_rows
from kernels.gemm import GEMM, Gemm
from kernels.layout import Qkv8
from kernels.rope import (
    rms_inverse,
    rms_inverse_reference,
    rms_inverse_spec,
    rope,
    rope_reference,
    rope_specs,
    rotate_in_place,
)
from kernels.spec import Bank, KernelError, KernelSpec

# Rows have the form of the weight that they meet next.
Modulate: TypeAlias = Callable[[Tensor, Tensor, Tensor, RowForm], Rows]
Heads = TypeVar("Heads")  # q, k and v of all heads as one attention wants them
CrossAttend: TypeAlias = Callable[[Tensor, Tensor, CrossKeys, CrossKeys], Tensor]
Plain: TypeAlias = tuple[Tensor, Tensor, Tensor]  # q, k, v [S, N, K] bf16
Product: TypeAlias = Callable[[Rows, Rows, Tensor], Tensor]
Gelu: TypeAlias = Callable[[Rows, Rows, Tensor, Tensor], Tensor]
Residual: TypeAlias = Callable[[Rows, Rows, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Ops(Generic[Heads]):
    """S tokens of width D = N * K. The residual stream x, scales, vectors and tables are fp32, all
    between two products is bf16.
    """

    # x [S, D], shift [D], scale [D] -> rows of layernorm(x) * (1 + scale) + shift
    modulate: Modulate
    # x [S, any width] -> its rows
    quantize: Callable[[Tensor, RowForm], Rows]
    # x [S, D] -> 1 / rms of each row [S] fp32
    rms_inverse: Callable[[Tensor], Tensor]
    # q | k | v [S, 3 D], used up; RMSNorm weights of q and of k [D], cos and sin [S, K / 2]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Heads]
    # heads, number of queries: the first so many tokens look at all -> [queries, D]
    attention: Callable[[Heads, int], Tensor]
    # q [S, D] before its RMSNorm, its 1 / rms [S], text, picture -> [S, D]
    cross_attention: CrossAttend
    # rows [S, in], weight [out, in], bias [out] -> [S, out]
    gemm: Product
    # `gemm`, then GELU (tanh), then times a multiplier [out]
    gemm_gelu: Gelu
    # rows [S, in], weight [out, in], bias, gate [out], x [S, out]: x += gate * product, in place
    gemm_residual: Residual
    attention_bits: int = 8  # of q, k and v between `rope` and `attention`


def native_ops(
    bank: Bank, arch: Arch, *, attention: KernelSpec | None = None, gemm: Sequence[Gemm] = ()
) -> Ops[Qkv8]:
    """Launches the kernels of `bank`, which must be those of `arch`.

    `attention` is one of `ATTENTION` and `gemm` holds some of `GEMM`, one a dtype of weights: the
    choice of a measurement. Without one the architecture's first is taken, for attention that of
    its own form. Raises `KernelError` for a variant that does not fit.
    """
    attention = attention or self_attention.variants(arch.attention, arch)[0]
    ways = {**first_ways(arch), **{way.dtype: way for way in gemm}}
    for spec in (attention, *(way.bias for way in ways.values())):
        if arch not in spec.tuning:
            raise KernelError(f"{spec.name} is not tuned for {arch.name}")
    qk, v, v_limit = self_attention.formats(attention)
    return Ops(
        modulate=partial(norm.modulate, bank),
        quantize=partial(norm.quantize, bank),
        rms_inverse=lambda x: rms_inverse(bank, x, x.shape[1], 1)[0],
        rope=partial(rope, bank, dtype=qk, v_limit=v_limit, v_dtype=v),
        attention=partial(self_attention.attention, bank, attention),
        cross_attention=partial(cross_attention, bank),
        gemm=lambda a, b, *rest: product.gemm(bank, ways[b.q.dtype], a, b, *rest),
        gemm_gelu=lambda a, b, *rest: product.gemm_gelu(bank, ways[b.q.dtype], a, b, *rest),
        gemm_residual=lambda a, b, *rest: product.gemm_residual(bank, ways[b.q.dtype], a, b, *rest),
    )


def native_specs(dim: int, ffn: int, forms: Iterable[RowForm], arch: Arch) -> list[KernelSpec]:
    """Lists all kernels that `native_ops` may launch for tokens of `dim` values and weights of
    `forms`, and the VAE's norm: every form of attention and every way to multiply, to choose from
    by measurement.
    """
    specs = [CROSS_ATTENTION, rms_inverse_spec(dim, 1), *CHANNEL_NORM.values()]
    for form in sorted(set(forms), key=str):
        specs.append(norm.modulate_spec(dim, form))
        specs += [norm.quantize_spec(width, form) for width in sorted({dim, ffn})]
        specs += [spec for way in GEMM.values() if way.dtype == form.dtype for spec in way.specs]
    for spec in ATTENTION.values():
        if arch in spec.tuning:
            qk, v, _ = self_attention.formats(spec)
            specs += [spec, *rope_specs(dim, qk, v)]
    unique = {spec.name: spec for spec in specs if arch in spec.tuning}
    return [unique[name] for name in sorted(unique)]


def reference_ops(
    attention: KernelSpec = ATTENTION["i8_fp8_f32"], arch: Arch | None = None
) -> Ops[Qkv8]:
    """Computes by the definitions what `native_ops` compute with this variant of attention, as it
    is tuned for `arch`; None: for the first that has it.
    """
    arch = arch or next(iter(attention.tuning))
    tuning = attention.tuning[arch]
    qk, v, v_limit = self_attention.formats(attention)
    return Ops(
        modulate=norm.modulate_reference,
        quantize=quantize_rows,
        rms_inverse=lambda x: rms_inverse_reference(x, x.shape[1], 1)[0],
        rope=partial(rope_reference, dtype=qk, v_limit=v_limit, v_dtype=v),
        attention=lambda qkv, queries: self_attention.variant_reference(
            attention, tuning, qkv, queries
        ).bfloat16(),
        cross_attention=partial(tiled_reference, CROSS_ATTENTION.tuning[arch]),
        gemm=product.gemm_reference,
        gemm_gelu=product.gemm_gelu_reference,
        gemm_residual=product.gemm_residual_reference,
    )


def first_ways(arch: Arch) -> Mapping[torch.dtype, Gemm]:
    """Returns the way to multiply rows of each dtype where nothing was timed."""
    found: dict[torch.dtype, Gemm] = {}
    for way in GEMM.values():
        if arch in way.bias.tuning:
            found.setdefault(way.dtype, way)
    return found


def plain_attention(ops: Ops, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Ops[Plain]:
    """Replaces self attention by `attend` in 16 bits: q, k, v [S, N, K] bf16 -> [S, N, K].

    It is slower and has no errors of 8 bits: try a clip with it that came out wrong. The heads lie
    where the product wrote them, so that it needs no more memory than attention in 8 bits.
    """

    def attention(qkv: Plain, queries: int) -> Tensor:
        q, k, v = qkv
        return attend(q[:queries], k, v).flatten(1)

    return replace(ops, rope=rotate_in_place, attention=attention, attention_bits=16)
