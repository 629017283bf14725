"""Operations that ONNX has and PyTorch has not, and what each becomes on export.

Each is a function of tensors that runs anywhere: one module is computed in PyTorch and exported.
Scales are constants and the softmax's results are E4M3 too, as otherwise TensorRT-RTX makes no FP8
kernel, and does not say so (docs/reference/tensorrt.md 0).
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from kernels.fp8 import E4M3_MAX

E4M3 = torch.float8_e4m3fn
SOFTMAX_SCALE = 1 / E4M3_MAX  # its results are at most 1
ONNX_E4M3 = 17  # onnx.TensorProto.FLOAT8E4M3FN


@torch.library.custom_op("scail::to_e4m3", mutates_args=())
def to_e4m3(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Rounds x / scale to E4M3 and multiplies it by scale again, in `dtype`. Saturates."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return (codes.float() * scale).to(dtype)


@to_e4m3.register_fake
def _(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@torch.library.custom_op("scail::widen", mutates_args=())
def widen(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Widens E4M3 codes to `dtype` as they are."""
    return codes.to(dtype)


@widen.register_fake
def _(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


@torch.library.custom_op("scail::rotate", mutates_args=())
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to the pairs (2j, 2j + 1): x [1, N, S, K], cos and sin [1, S, K / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


@rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("scail::attention8", mutates_args=())
def attention8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes e4m3(softmax(q k^T)) v of E4M3 values [1, N, S, K] each; q holds 1 / sqrt(K)."""
    p = torch.softmax(q.float() @ k.float().mT, dim=-1)
    return to_e4m3(p, SOFTMAX_SCALE, q.dtype) @ v


@attention8.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def translations(*, spell_out: bool) -> dict[Callable[..., object], Callable[..., object]]:
    """Translates the operations for `torch.onnx.export`. With `spell_out` attention becomes
    products and a softmax, for onnxruntime; else one operation, which `export` marks for
    TensorRT-RTX.
    """
    op = import_module("onnxscript").opset23  # needed here alone, and its types fit nobody

    def onnx_to_e4m3(x: object, scale: float, dtype: int) -> object:
        number = op.Constant(value_float=scale)
        codes = op.QuantizeLinear(x, op.CastLike(number, x), output_dtype=ONNX_E4M3)
        return op.DequantizeLinear(codes, op.Cast(number, to=dtype))

    def onnx_widen(codes: object, dtype: int) -> object:
        return op.DequantizeLinear(codes, op.Cast(op.Constant(value_float=1.0), to=dtype))

    def onnx_rotate(x: object, cos: object, sin: object) -> object:
        return op.RotaryEmbedding(x, cos, sin, interleaved=1)

    def onnx_attention8(q: object, k: object, v: object) -> object:
        if not spell_out:
            return op.Attention(q, k, v, scale=1.0)[0]
        p = op.Softmax(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), axis=-1)
        scale = op.CastLike(op.Constant(value_float=SOFTMAX_SCALE), q)
        codes = op.QuantizeLinear(p, scale, output_dtype=ONNX_E4M3)
        return op.MatMul(op.DequantizeLinear(codes, scale), v)

    ours = torch.ops.scail
    return {
        ours.to_e4m3.default: onnx_to_e4m3,
        ours.widen.default: onnx_widen,
        ours.rotate.default: onnx_rotate,
        ours.attention8.default: onnx_attention8,
    }
