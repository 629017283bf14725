"""The parts of a block that become TensorRT plans: what each is given, computes and returns.

    block      one block of the transformer, whole
    pre, post  a block up to the product q | k | v, and from attention's result on: between them
               goes our own attention, fed by `kernels.rope`
    context    keys and values of text and picture for a block's cross attention, once a clip

The definition is `engine.models.dit.Block` (docs/reference/denoiser.md 3.5). Weights are inputs, so
a plan serves all layers; their names are a package's without `blocks.n.`. One definition is
computed with three kinds of `Numerics`. It rounds where `engine.denoise.block` does, except in
attention: scales of q and k must be constants here, and RMSNorm makes constants do.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.build.operators import E4M3, attention8, rotate, to_e4m3, widen
from engine.config import HEAD_SIZE, TEXT_TOKENS, ModelConfig
from engine.models.dit import EPS
from engine.tensorrt.plans import TOKENS, Port
from kernels.fp8 import E4M3_MAX, TINY

VISION_TOKENS = 257
SOFTMAX_FACTOR = 1 / math.sqrt(HEAD_SIZE)  # multiplies q

# After RMSNorm |q| and |k| are at most sqrt(D) times their norm's largest weight; RoPE keeps that,
# and k without its mean over the tokens, which softmax does not see, has twice as much at most.
# These scales hold weights of 12 at D = 5120. E4M3 is as exact for small values as for large ones
# down to 1/64, so room costs nothing.
Q_SCALE = 1 / 4  # of q / sqrt(K)
K_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class Numerics:
    """The types that a segment computes in."""

    between: torch.dtype  # of tensors between two products
    quantised: bool  # False: weights come as FP32


EXACT = Numerics(torch.float32, quantised=False)  # to compare with `dit.Block`
TWIN = Numerics(torch.float32, quantised=True)  # for onnxruntime, which has no BF16
DEPLOY = Numerics(torch.bfloat16, quantised=True)  # for TensorRT-RTX


SegmentTensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class SegmentRecipe:
    """The computation of a segment, with the names of its inputs and outputs."""

    compute: Callable[[Numerics, SegmentTensors], tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attentions8: int = 0  # in FP8
    attentions: int = 0  # in another type


class Segment(nn.Module):
    """One graph: `forward` takes the tensors of `inputs` in order and returns those of `outputs`.

    S is at least 2. `config.ffn` is that of the package's weights, padded.
    """

    def __init__(self, name: str, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        known = {port.name: port for port in _ports(config, numerics)}
        self.name, self.numerics, self.recipe = name, numerics, SEGMENTS[name]
        self.inputs = tuple(known[port] for port in self.recipe.inputs)
        self.outputs = tuple(known[port] for port in self.recipe.outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip((port.name for port in self.inputs), tensors, strict=True))
        return self.recipe.compute(self.numerics, named)


def _block(n: Numerics, t: SegmentTensors) -> tuple[Tensor, ...]:
    return _after(n, t, _attend(n, t, *_qkv(n, t, parts=3)))


def _pre(n: Numerics, t: SegmentTensors) -> tuple[Tensor, ...]:
    return tuple(_qkv(n, t, parts=1))


def _post(n: Numerics, t: SegmentTensors) -> tuple[Tensor, ...]:
    return _after(n, t, t["attention"])


def _context(n: Numerics, t: SegmentTensors) -> tuple[Tensor, ...]:
    """Computes keys, into which the weight of q's RMSNorm is put, and values: see `cross_keys`."""
    made = []
    for name in ("text", "vision"):
        k, v = (part.to(n.between) for part in _linear(n, t, name, t[name], parts=2))
        k = F.rms_norm(k.float(), k.shape[-1:], t[f"{name}_norm_k"], EPS) * t["cross_norm_q"]
        made += [k.to(n.between), v]
    return tuple(made)


def _qkv(n: Numerics, t: SegmentTensors, parts: int) -> list[Tensor]:
    """Computes q | k | v [1, S, 3 D], or each of them, split before they are scaled: otherwise the
    builder would write the product twice.
    """
    shift, scale, *_ = t["modulation"].unbind(dim=1)
    made = _linear(n, t, "qkv", _modulate(t["x"], shift, scale), parts)
    return [part.to(n.between) for part in made]


def _attend(n: Numerics, t: SegmentTensors, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes self attention of q, k, v [1, S, D] before RMSNorm and RoPE -> [1, S, D] fp32."""
    q, k = (
        rotate(_heads(F.rms_norm(x.float(), x.shape[-1:], t[norm], EPS)), t["cos"], t["sin"])
        for x, norm in ((q, "norm_q"), (k, "norm_k"))
    )
    q = q * SOFTMAX_FACTOR
    if not n.quantised:
        return _merge(F.scaled_dot_product_attention(q, k, _heads(v), scale=1.0))
    k = k - k.mean(dim=2, keepdim=True)
    peak = v.float().abs().amax(dim=1, keepdim=True).clamp_min(TINY) / E4M3_MAX  # [1, 1, D]
    v = _heads(v.float() / peak)
    codes = ((q, Q_SCALE), (k, K_SCALE), (v, 1.0))
    seen = attention8(*(to_e4m3(x, scale, n.between) for x, scale in codes))
    return _merge(seen).float() * peak


def _after(n: Numerics, t: SegmentTensors, attention: Tensor) -> tuple[Tensor, ...]:
    """Computes the rest of a block, from the output projection of self attention on: the new x."""
    _, _, gate1, shift2, scale2, gate2 = t["modulation"].unbind(dim=1)
    x = t["x"] + gate1 * _linear(n, t, "o", attention)[0]
    rows = _modulate(x, t["norm3_shift"], t["norm3_scale"])
    seen = _cross_attend(n, t, _linear(n, t, "cross_q", rows)[0].to(n.between))
    x = x + _linear(n, t, "cross_o", seen)[0]
    inner = _linear(n, t, "up", _modulate(x, shift2, scale2))[0]
    inner = F.gelu(inner, approximate="tanh").to(n.between)
    return (x + gate2 * _linear(n, t, "down", inner)[0],)


def _cross_attend(n: Numerics, t: SegmentTensors, q: Tensor) -> Tensor:
    """Computes cross attention of q [1, S, D] before its RMSNorm, whose weight the keys hold."""
    q = F.rms_norm(q.float(), q.shape[-1:], None, EPS) * SOFTMAX_FACTOR
    # Two attentions of one q kill the builder (docs/reference/tensorrt.md 1), so one of them gets
    # 2 q and k / 2.
    seen = [
        F.scaled_dot_product_attention(
            _heads((q * factor).to(n.between)),
            _heads(t[f"{name}_k"] * (1 / factor)),
            _heads(t[f"{name}_v"]),
            scale=1.0,
        )
        for name, factor in (("text", 1.0), ("vision", 2.0))
    ]
    return _merge(seen[0] + seen[1])


def _linear(n: Numerics, t: SegmentTensors, name: str, x: Tensor, parts: int = 1) -> list[Tensor]:
    """Multiplies x [1, S, in], any float, by a weight -> parts [1, S, out / parts] fp32."""
    codes, scales, bias = (t[f"{name}.{field}"] for field in ("q", "s", "bias"))
    if n.quantised:
        x = x.float()
        peak = x.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) / E4M3_MAX  # [1, S, 1]
        product = to_e4m3(x / peak, 1.0, n.between) @ widen(codes, n.between).mT
        products = [part.float() * peak for part in _split(product, parts)]
    else:
        products = _split(x @ codes.mT, parts)
    made = zip(products, _split(scales, parts), _split(bias, parts))
    return [product * s + b for product, s, b in made]


def _split(x: Tensor, parts: int) -> list[Tensor]:
    return [x] if parts == 1 else list(x.chunk(parts, dim=-1))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2)  # [1, N, S, K]


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [1, S, D]


def _weights(*linears: str) -> tuple[str, ...]:
    return tuple(f"{linear}.{field}" for linear in linears for field in ("q", "s", "bias"))


_KEYS = ("text_k", "text_v", "vision_k", "vision_v")
_REST = (
    *_weights("o"), "norm3_shift", "norm3_scale", *_weights("cross_q", "cross_o", "up", "down"),
)  # fmt: skip

SEGMENTS: Mapping[str, SegmentRecipe] = {
    "block": SegmentRecipe(
        _block,
        ("x", "modulation", "cos", "sin", *_KEYS, *_weights("qkv"), "norm_q", "norm_k", *_REST),
        ("out",),
        attentions8=1,
        attentions=2,
    ),
    "pre": SegmentRecipe(_pre, ("x", "modulation", *_weights("qkv")), ("qkv",)),
    "post": SegmentRecipe(
        _post, ("x", "attention", "modulation", *_KEYS, *_REST), ("out",), attentions=2
    ),
    "context": SegmentRecipe(
        _context,
        (
            "text", "vision", *_weights("text"), "text_norm_k", *_weights("vision"),
            "vision_norm_k", "cross_norm_q",
        ),
        _KEYS,
    ),
}  # fmt: skip


def _ports(config: ModelConfig, numerics: Numerics) -> list[Port]:
    """Lists all ports of segments. The residual stream, scales, norms and tables are fp32.

    `modulation` is that of the block and the time step together, smoothing applied; `out` is the
    new x; `qkv` and `attention` are what `kernels.rope` takes and self attention returns.
    """
    dim, ffn = config.dim, config.ffn
    codes = E4M3 if numerics.quantised else torch.float32
    linears = {
        "qkv": (3 * dim, dim), "o": (dim, dim), "cross_q": (dim, dim), "cross_o": (dim, dim),
        "up": (ffn, dim), "down": (dim, ffn), "text": (2 * dim, dim), "vision": (2 * dim, dim),
    }  # fmt: skip
    ports = [Port(f"{name}.q", codes, (1, *shape)) for name, shape in linears.items()]
    fp32: dict[str, tuple[int | str, ...]] = {
        "x": (1, TOKENS, dim),
        "out": (1, TOKENS, dim),
        "modulation": (1, 6, dim),
        "cos": (1, TOKENS, HEAD_SIZE // 2),
        "sin": (1, TOKENS, HEAD_SIZE // 2),
        "text": (1, TEXT_TOKENS, dim),
        "vision": (1, VISION_TOKENS, dim),
    }
    norms = "norm_q norm_k norm3_shift norm3_scale cross_norm_q text_norm_k vision_norm_k"
    fp32 |= dict.fromkeys(norms.split(), (dim,))
    for name, (rows, _) in linears.items():
        fp32 |= {f"{name}.s": (rows,), f"{name}.bias": (rows,)}
    between: dict[str, tuple[int | str, ...]] = {
        "qkv": (1, TOKENS, 3 * dim),
        "attention": (1, TOKENS, dim),
        "text_k": (1, TEXT_TOKENS, dim),
        "text_v": (1, TEXT_TOKENS, dim),
        "vision_k": (1, VISION_TOKENS, dim),
        "vision_v": (1, VISION_TOKENS, dim),
    }
    ports += [Port(name, torch.float32, shape) for name, shape in fp32.items()]
    return ports + [Port(name, numerics.between, shape) for name, shape in between.items()]
