"""One block of the transformer as the list of fused operations that a GPU runs.

The definition is `engine.models.dit.Block` (spec/denoiser.md 3.5). Here its linears are 8-bit
rows, the residual stream stays FP32 and what lies between two products is BF16 (4.5). A norm is
part of the quantisation of the rows it makes, a bias, GELU, gate and residual of the product they
follow, and RMSNorm of RoPE or of the keys. What depends on text and picture alone is made once a
clip: `context_keys`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.dit import EPS, Block, Linear, Rope
from kernels.cross_attention import CrossKeys, cross_keys
from kernels.fp8 import Rows, quantize_rows
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Form:
    """Formats of a block's weights; the rows that a weight is multiplied with have the same."""

    down: torch.dtype  # of the second product of the feed forward, whose rows have outliers
    others: torch.dtype


FP8 = Form(down=torch.float8_e4m3fn, others=torch.float8_e4m3fn)
INT8 = Form(down=torch.int8, others=torch.int8)
MIXED = Form(down=torch.float8_e4m3fn, others=torch.int8)  # spec/kernels.md 4


@dataclass(frozen=True, slots=True)
class Weight:
    """A linear, or several with one input, their outputs side by side."""

    rows: Rows  # [out, in]
    bias: Tensor  # [out] fp32

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.q.dtype


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Norms and tables are fp32."""

    modulation: Tensor  # [6, D], added to that of the time step
    qkv: Weight  # D -> q | k | v
    norm_q: Tensor  # [D]
    norm_k: Tensor  # [D]
    o: Weight  # D -> D
    norm3_shift: Tensor  # [D], the affine LayerNorm as a modulation
    norm3_scale: Tensor  # [D]
    cross_q: Weight  # D -> D
    cross_o: Weight  # D -> D
    up: Weight  # D -> FFN
    down: Weight  # FFN -> D
    # the rest is for `context_keys`
    cross_norm_q: Tensor  # [D]
    text: Weight  # D -> k | v
    text_norm_k: Tensor  # [D]
    vision: Weight  # D -> k | v
    vision_norm_k: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class ContextKeys:
    """What the cross attention of one block looks at, the same at every step of a clip."""

    text: CrossKeys
    vision: CrossKeys


@torch.no_grad()
def quantize_block(block: Block, form: Form) -> BlockWeights:
    """The same block in 8 bits, on the device where its weights are. Shares no memory with it."""
    attention, cross = block.self_attn, block.cross_attn
    up, down = block.ffn[0], block.ffn[2]
    assert isinstance(up, Linear) and isinstance(down, Linear)
    return BlockWeights(
        modulation=_fp32(block.modulation[0]),
        qkv=_weight(form.others, attention.q, attention.k, attention.v),
        norm_q=_fp32(attention.norm_q.weight),
        norm_k=_fp32(attention.norm_k.weight),
        o=_weight(form.others, attention.o),
        norm3_shift=_fp32(block.norm3.bias),
        norm3_scale=_fp32(block.norm3.weight) - 1,
        cross_q=_weight(form.others, cross.q),
        cross_o=_weight(form.others, cross.o),
        up=_weight(form.others, up),
        down=_weight(form.down, down),
        cross_norm_q=_fp32(cross.norm_q.weight),
        text=_weight(form.others, cross.k, cross.v),
        text_norm_k=_fp32(cross.norm_k.weight),
        vision=_weight(form.others, cross.k_img, cross.v_img),
        vision_norm_k=_fp32(cross.norm_k_img.weight),
    )


def _weight(dtype: torch.dtype, *linears: Linear) -> Weight:
    rows = quantize_rows(torch.cat([linear.weight for linear in linears]), dtype)
    return Weight(rows, _fp32(torch.cat([linear.bias for linear in linears])))


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)


def context_keys(
    ops: Ops, weights: BlockWeights, text: Tensor, vision: Tensor, repeats: int = 1
) -> ContextKeys:
    """text [L, D], vision [257, D], fp32: embedded as in `dit.Context`.

    The last row of text stands for `repeats` equal ones: padding need not be computed 400 times.
    """

    def keys(x: Tensor, weight: Weight, norm_k: Tensor, repeats: int) -> CrossKeys:
        both = ops.gemm(ops.quantize(x.bfloat16(), weight.dtype), weight.rows, weight.bias)
        k, v = both.chunk(2, dim=1)
        k = F.rms_norm(k.float(), norm_k.shape, norm_k, EPS)
        return cross_keys(k, v, weights.cross_norm_q, repeats)

    return ContextKeys(
        keys(text, weights.text, weights.text_norm_k, repeats),
        keys(vision, weights.vision, weights.vision_norm_k, 1),
    )


def run_block(
    ops: Ops,
    weights: BlockWeights,
    context: ContextKeys,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
) -> Tensor:
    """x [S, D] fp32, changed in place and returned; modulation [6, D] fp32, of the time step."""
    w = weights
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation + w.modulation

    rows = ops.modulate(x, shift1, scale1, w.qkv.dtype)
    qkv = ops.gemm(rows, w.qkv.rows, w.qkv.bias)  # [S, 3 D]
    heads = ops.rope(qkv, w.norm_q, w.norm_k, rope.cos[:, 0], rope.sin[:, 0])
    rows = ops.quantize(ops.attention(heads), w.o.dtype)
    ops.gemm_residual(rows, w.o.rows, w.o.bias, gate1, x)

    rows = ops.modulate(x, w.norm3_shift, w.norm3_scale, w.cross_q.dtype)
    q = ops.gemm(rows, w.cross_q.rows, w.cross_q.bias)  # [S, D]
    seen = ops.cross_attention(q, ops.rms_inverse(q), context.text, context.vision)
    rows = ops.quantize(seen, w.cross_o.dtype)
    ops.gemm_residual(rows, w.cross_o.rows, w.cross_o.bias, torch.ones_like(gate1), x)

    rows = ops.modulate(x, shift2, scale2, w.up.dtype)
    inner = ops.gemm_gelu(rows, w.up.rows, w.up.bias)  # [S, FFN]
    rows = ops.quantize(inner, w.down.dtype)
    ops.gemm_residual(rows, w.down.rows, w.down.bias, gate2, x)
    return x
