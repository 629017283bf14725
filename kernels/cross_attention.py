"""Cross attention to text and picture in one pass: a softmax each, results added.

    o = softmax(q'. kt / sqrt(K)) vt + softmax(q'. ki / sqrt(K)) vi,    q' = RMSNorm(q) * w

q arrives as its projection left it. Its RMSNorm needs no pass of its own: 1 / rms is one number a
token and scales its logits, and w lies in the keys, which are made once a clip.

The rows of padded text are all alike, so they are one key whose weight counts as often as there
are rows: log2 of their number is added to its logit. A bias of minus infinity leaves out what only
fills a tile.

Shapes    q [S, D] bf16, rms_inv [S] fp32, D = N * K;  `CrossKeys` of text and of picture
          -> o [S, D] bf16.  The projection after it takes 8-bit rows, whose scales span all heads:
          `kernels.modulate` quantises them.
Numerics  products of BF16 summed in FP32, softmax in FP32. With 769 keys at most it is 1 % of a
          forward's work: 8 bits would save little.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arch import SM80, SM86, SM89, SM90, SM120
from kernels.layout import HEAD, LOGIT_SCALE
from kernels.signature import Axis, require
from kernels.spec import Bank, KernelError, KernelSpec, Loop, Tuning

KEY_TILE = 64  # cached keys are a multiple of it, and it of every tile in use


@dataclass(frozen=True, slots=True)
class CrossKeys:
    """Keys and values of one context. P is their number, padded to a multiple of `KEY_TILE`."""

    k: Tensor  # [P, D] bf16, normalised, times the weight of q's RMSNorm
    v: Tensor  # [P, D] bf16
    bias: Tensor  # [P] fp32, added to logits in units of log2; -inf where there is no key


def cross_keys(k: Tensor, v: Tensor, q_weight: Tensor, repeats: int = 1) -> CrossKeys:
    """Prepares a context: k (after its own RMSNorm) and v [L, D], any float; q_weight [D] is the
    weight of q's RMSNorm. The last row stands for `repeats` equal rows.

    Raises `KernelError` for other shapes.
    """
    require("cross_keys", "k", k, (Axis("L"), Axis("D", HEAD)))
    require("cross_keys", "v", v, k.shape)
    if repeats < 1:
        raise KernelError(f"cross_keys, repeats: expected 1 or more, found {repeats}")
    padding = -len(k) % KEY_TILE
    bias = k.new_zeros(len(k), dtype=torch.float32)
    bias[-1] = math.log2(repeats)
    return CrossKeys(
        F.pad(k.float() * q_weight.float(), (0, 0, 0, padding)).bfloat16(),
        F.pad(v, (0, 0, 0, padding)).bfloat16(),
        F.pad(bias, (0, padding), value=-math.inf),
    )


def cross_attention_reference(
    q: Tensor, rms_inv: Tensor, text: CrossKeys, vision: CrossKeys
) -> Tensor:
    """The definition, in plain PyTorch: [S, D] fp32."""
    q = q.float() * rms_inv[:, None] * LOGIT_SCALE
    return _attend(q, text) + _attend(q, vision)


def _attend(q: Tensor, keys: CrossKeys) -> Tensor:
    q, k, v = (_heads(side) for side in (q, keys.k, keys.v))
    p = ((q @ k.mT + keys.bias) * math.log(2)).softmax(dim=-1)  # [N, S, P]
    return (p @ v).transpose(0, 1).flatten(1)


def tiled_reference(
    tuning: Tuning, q: Tensor, rms_inv: Tensor, text: CrossKeys, vision: CrossKeys
) -> Tensor:
    """The definition with the iterations and the rounding of the kernel: [S, D] bf16. Weights are
    BF16 beside the largest logit so far, and so is what text gives.
    """
    scale, keys = rms_inv[:, None] * LOGIT_SCALE, tuning.blocks["BLOCK_KEYS"]
    told, seen = (_attend_in_tiles(q, scale, one, keys) for one in (text, vision))
    return (told.bfloat16().float() + seen).bfloat16()


def _attend_in_tiles(q: Tensor, scale: Tensor, context: CrossKeys, keys: int) -> Tensor:
    q, k, v = (_heads(side) for side in (q, context.k, context.v))
    top = q.new_full((*q.shape[:2], 1), -math.inf)  # [N, S, 1]
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for k_tile, v_tile, bias in zip(k.split(keys, 1), v.split(keys, 1), context.bias.split(keys)):
        logits = (q @ k_tile.mT).double() * scale + bias  # a fused multiply-add rounds once
        new_top = torch.maximum(top, logits.float().amax(dim=-1, keepdim=True))
        shrink, p = torch.exp2(top - new_top), torch.exp2(logits.float() - new_top)
        total = total * shrink + p.sum(dim=-1, keepdim=True)
        out = out * shrink + p.bfloat16().float() @ v_tile
        top = new_top
    return (out / total).transpose(0, 1).flatten(1)


def _heads(x: Tensor) -> Tensor:
    return x.float().unflatten(-1, (-1, HEAD)).transpose(0, 1)  # [N, S, K]


def cross_attention(
    bank: Bank, q: Tensor, rms_inv: Tensor, text: CrossKeys, vision: CrossKeys
) -> Tensor:
    """Takes q [S, D] bf16 before its RMSNorm, rms_inv [S] fp32 = 1 / sqrt(mean(q^2) + eps), and
    returns [S, D] bf16. Raises `KernelError` for other shapes and types.
    """
    require(CROSS_ATTENTION.name, "q", q, (Axis("S"), Axis("D", HEAD)), torch.bfloat16)
    tokens, width = q.shape
    require(CROSS_ATTENTION.name, "rms_inv", rms_inv, (tokens,), torch.float32)
    for name, keys in (("text", text), ("vision", vision)):
        _check(name, keys, width)
    out = torch.empty_like(q)
    grid = (-(-tokens // bank.tuning(CROSS_ATTENTION).blocks["BLOCK_Q"]), width // HEAD)
    contexts = (text.k, text.v, text.bias, vision.k, vision.v, vision.bias)
    sizes = (tokens, len(text.k), len(vision.k), width)
    bank.launch(CROSS_ATTENTION, grid, q, rms_inv, *contexts, out, *sizes)
    return out


def _check(name: str, keys: CrossKeys, width: int) -> None:
    shape = Axis("P", KEY_TILE), width
    require(CROSS_ATTENTION.name, f"k of {name}", keys.k, shape, torch.bfloat16)
    require(CROSS_ATTENTION.name, f"v of {name}", keys.v, keys.k.shape, torch.bfloat16)
    require(CROSS_ATTENTION.name, f"bias of {name}", keys.bias, (len(keys.k),), torch.float32)


def _tuning(keys: int, toolkit: str) -> Tuning:
    return Tuning(8, 2, {"BLOCK_Q": 128, "BLOCK_KEYS": keys}, toolkit)


CROSS_ATTENTION = KernelSpec(
    name="cross_attention",
    device="cross_attention:cross_attention_kernel",
    signature="*bf16 *fp32 *bf16 *bf16 *fp32 *bf16 *bf16 *fp32 *bf16 i32 i32 i32 i32",
    constants={"HEAD": HEAD, "LOGIT_SCALE": LOGIT_SCALE},
    tuning={
        SM80: _tuning(32, "12.6"),
        SM86: _tuning(32, "12.6"),
        SM89: _tuning(32, "12.6"),
        SM90: _tuning(64, "12.6"),
        SM120: _tuning(32, "12.8"),
    },
    multiples_of_16=(10, 11, 12),  # keys of both contexts, and the width
    loop=Loop(
        {
            SM80: ("HMMA.16816.F32.BF16",),
            SM86: ("HMMA.16816.F32.BF16",),
            SM89: ("HMMA.16816.F32.BF16",),
            SM90: ("HGMMA.64x64x16.F32.BF16", "HGMMA.64x128x16.F32.BF16"),
            SM120: ("HMMA.16816.F32.BF16",),
        },
        max_shared_loads=16,  # the biases of a tile, two at a time
    ),
)
