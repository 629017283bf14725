"""One block of the transformer as the list of fused operations that a GPU runs.

The definition is `engine.models.dit.Block` (docs/reference/denoiser.md 3.5). Here its linears are
8-bit rows, the residual stream stays FP32, and tensors between two products are BF16 (4.5). A norm
is part of the quantisation of the rows it makes, and so is their rotation; a bias, GELU, gate and
residual are part of the product they follow, and RMSNorm of RoPE or of the keys. Keys that depend
on text and picture alone are made once a clip: `context_keys`.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.dit import EPS, Rope
from kernels.cross_attention import CrossKeys, cross_keys
from kernels.fp8 import E4M3, FORMS, INT8R, RowForm, Rows
from kernels.ops import Ops

# Linears with one input are one product: a field of the weights, and the names in a checkpoint of
# the linears whose outputs it puts side by side.
LINEARS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "o": ("self_attn.o",),
    "cross_q": ("cross_attn.q",),
    "cross_o": ("cross_attn.o",),
    "up": ("ffn.0",),
    "down": ("ffn.2",),
    "text": ("cross_attn.k", "cross_attn.v"),
    "vision": ("cross_attn.k_img", "cross_attn.v_img"),
}


COMMON_TOKENS = 64  # whose mean is what all have in common, as far as rows of 8 bits go

# The form of all linears, as --weights calls it. Calibration may keep some in E4M3.
WEIGHT_FORMS: Mapping[str, RowForm] = {"int8": INT8R, "fp8": E4M3}
_FORM_OF: Mapping[torch.dtype, RowForm] = {form.dtype: form for form in FORMS}


@dataclass(frozen=True, slots=True)
class Weight:
    """A linear, or several of one input with their outputs side by side."""

    rows: Rows  # [out, in]
    bias: Tensor  # [out] fp32

    @property
    def form(self) -> RowForm:
        """That of the rows it is multiplied with."""
        return self.rows.form


@dataclass(frozen=True, slots=True)
class TextWeights:
    """The weights of a block that `text_keys` needs."""

    cross_norm_q: Tensor  # [D]
    text: Weight  # D -> k | v
    text_norm_k: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class PictureWeights:
    """The weights of a block that `picture_keys` needs."""

    cross_norm_q: Tensor  # [D]
    vision: Weight  # D -> k | v
    vision_norm_k: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class ContextWeights:
    """The weights of a block that `context_keys` needs, once a clip: those of both sides."""

    cross_norm_q: Tensor  # [D]
    text: Weight  # D -> k | v
    text_norm_k: Tensor  # [D]
    vision: Weight  # D -> k | v
    vision_norm_k: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """The weights of a block that every step needs. Norms and tables are fp32."""

    modulation: Tensor  # [6, D], added to that of the time step
    smooth: Tensor  # [2, D]: multiplies what enters qkv and up, whose columns are divided by it
    qkv: Weight  # D -> q | k | v
    norm_q: Tensor  # [D]
    norm_k: Tensor  # [D]
    o: Weight  # D -> D
    norm3_shift: Tensor  # [D], the affine LayerNorm as a modulation
    norm3_scale: Tensor  # [D]
    inner: Tensor  # [FFN]: multiplies what enters down, whose columns are divided by it
    cross_q: Weight  # D -> D
    cross_o: Weight  # D -> D
    up: Weight  # D -> FFN
    down: Weight  # FFN -> D


Weights = TypeVar("Weights", BlockWeights, ContextWeights, TextWeights, PictureWeights)
ENDS = ("q", "s", "bias")  # the names of a `Weight`'s tensors end so


def assemble(kind: type[Weights], read: Callable[[str], Tensor]) -> Weights:
    """Makes the weights of a block from its tensors, which are named after the fields: `qkv.q` and
    `qkv.s` are the rows of `qkv`, `qkv.bias` is its bias. INT8 codes are of rotated rows, as
    `engine.package.contents` has checked.
    """

    def part(field: Field) -> Tensor | Weight:
        if field.type is Tensor:
            return read(field.name)
        codes, scales, bias = (read(f"{field.name}.{end}") for end in ENDS)
        return Weight(Rows(codes, scales, _FORM_OF[codes.dtype].rotated), bias)

    parts = {field.name: part(field) for field in fields(kind)}
    return kind(**parts)  # pyright: ignore[reportArgumentType] - each of its field's type


def tensor_names(
    kind: type[BlockWeights] | type[ContextWeights] | type[TextWeights] | type[PictureWeights],
) -> list[str]:
    """The names of the tensors that `assemble` reads."""
    names: list[str] = []
    for field in fields(kind):
        is_plain = field.type is Tensor
        names += [field.name] if is_plain else [f"{field.name}.{end}" for end in ENDS]
    return names


@dataclass(frozen=True, slots=True)
class ContextKeys:
    """The keys and values of one block's cross attention, the same at every step of a clip."""

    text: CrossKeys
    vision: CrossKeys


def context_keys(
    ops: Ops, weights: ContextWeights, text: Tensor, vision: Tensor, repeats: int = 1
) -> ContextKeys:
    """Computes a block's keys of text [L, D] and vision [257, D], fp32, embedded by `dit.Context`.

    The last row of text stands for `repeats` equal ones: padding need not be computed 400 times.
    """

    return ContextKeys(text_keys(ops, weights, text, repeats), picture_keys(ops, weights, vision))


def text_keys(
    ops: Ops, weights: TextWeights | ContextWeights, text: Tensor, repeats: int
) -> CrossKeys:
    """Computes a block's keys of text [L, D], as `context_keys` does."""
    w = weights
    return _keys(ops, text, w.text, w.text_norm_k, w.cross_norm_q, repeats)


def picture_keys(ops: Ops, weights: PictureWeights | ContextWeights, vision: Tensor) -> CrossKeys:
    """Computes a block's keys of vision [257, D], as `context_keys` does."""
    w = weights
    return _keys(ops, vision, w.vision, w.vision_norm_k, w.cross_norm_q, 1)


def _keys(
    ops: Ops, x: Tensor, weight: Weight, norm_k: Tensor, cross_norm_q: Tensor, repeats: int
) -> CrossKeys:
    both = ops.gemm(ops.quantize(x.bfloat16(), weight.form), weight.rows, weight.bias)
    k, v = both.chunk(2, dim=1)
    k = F.rms_norm(k.float(), norm_k.shape, norm_k, EPS)
    return cross_keys(k, v, cross_norm_q, repeats)


def block_modulation(weights: BlockWeights, modulation: Tensor) -> Tensor:
    """Turns the modulation [6, D] fp32 of a time step into that of a block, for `run_block`."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation + weights.modulation
    first, second = weights.smooth
    smoothed = (shift1 * first, (1 + scale1) * first - 1, gate1)
    return torch.stack([*smoothed, shift2 * second, (1 + scale2) * second - 1, gate2])


def run_block(
    ops: Ops,
    weights: BlockWeights,
    context: ContextKeys,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    kept: int | None = None,
) -> Tensor:
    """Runs a block on x [S, D] fp32, in place, with the modulation [6, D] of `block_modulation`.

    Returns the first `kept` tokens, by default all. These look at the others, which are not
    computed themselves: after the last block nobody asks for them.
    """
    w = weights
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation

    # Each tensor is dropped once nobody reads it: they are most of the memory that a block needs.
    rows = ops.modulate(x, shift1, scale1, w.qkv.form)
    qkv = ops.gemm(rows, w.qkv.rows, w.qkv.bias)  # [S, 3 D]
    del rows
    heads = ops.rope(qkv, w.norm_q, w.norm_k, rope.cos[:, 0], rope.sin[:, 0])
    del qkv
    x = x[:kept]
    rows = ops.quantize(ops.attention(heads, len(x)), w.o.form)
    del heads
    ops.gemm_residual(rows, w.o.rows, w.o.bias, gate1, x)
    del rows

    rows = ops.modulate(x, w.norm3_shift, w.norm3_scale, w.cross_q.form)
    q = ops.gemm(rows, w.cross_q.rows, w.cross_q.bias)  # [S, D]
    del rows
    seen, bias = _see(ops, q, context, w.cross_o)
    del q
    rows = ops.quantize(seen, w.cross_o.form)
    del seen
    ops.gemm_residual(rows, w.cross_o.rows, bias, torch.ones_like(gate1), x)
    del rows

    rows = ops.modulate(x, shift2, scale2, w.up.form)
    inner = ops.gemm_gelu(rows, w.up.rows, w.up.bias, w.inner)  # [S, FFN]
    del rows
    rows = ops.quantize(inner, w.down.form)
    del inner
    ops.gemm_residual(rows, w.down.rows, w.down.bias, gate2, x)
    return x


def _see(ops: Ops, q: Tensor, context: ContextKeys, projection: Weight) -> tuple[Tensor, Tensor]:
    """Attends to text and picture: [S, D] bf16 without what all tokens have in common, and the bias
    [D] of the projection, which has what it makes of that.

    Where attention is broad most of the result is the same in all tokens. Its rounding to 8 bits
    would be one and the same error in every token, other for each text, which guidance multiplies
    (docs/reference/rotation.md 4.2). What is left out is the mean over some tokens, as 8 bits hold
    it: so the bias has it exactly, whatever it is. Text and picture each lose their own part of it
    from their values, as the weights of each add up to one.
    """
    inverse, step = ops.rms_inverse(q), common_step(len(q))
    text, vision = context.text, context.vision
    some = q[::step].contiguous(), inverse[::step].contiguous()
    unseen = replace(vision, v=torch.zeros_like(vision.v))
    told, both = (
        ops.cross_attention(*some, text, picture).float().mean(dim=0)
        for picture in (unseen, vision)
    )
    common = ops.quantize(both[None].bfloat16(), projection.form)
    bias = torch.zeros(1, len(projection.bias), device=q.device)
    one = torch.ones_like(projection.bias)
    ops.gemm_residual(common, projection.rows, projection.bias, one, bias)
    seen = common.restore()[0] - told
    less = (
        replace(keys, v=keys.v.clone().sub_(part)) for keys, part in ((text, told), (vision, seen))
    )
    return ops.cross_attention(q, inverse, *less), bias[0]


def common_step(tokens: int) -> int:
    """Returns how far apart the tokens lie whose mean `run_block` takes out."""
    return max(1, tokens // COMMON_TOKENS)
