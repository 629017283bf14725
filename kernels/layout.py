"""How queries, keys and values lie in memory between the RoPE kernel and self attention.

    q ~ q8 * qs      one scale a head and `Q_BLOCK` queries, log2(e) / sqrt(K) folded in, so that
                     exp2(q . k) is what softmax needs
    k - mean ~ k8 * ks   one scale a head and `K_BLOCK` keys. The mean over tokens adds the same
                     number to all logits of a query, which softmax does not see: only the
                     differences between keys are worth their bits ("smooth K")
    v ~ vt * vs      one scale a head and channel; transposed, as products of 8 bits need it

INT8 queries and keys are mixed: R of kernels/fp8.py over each 64 neighbours. It leaves products as
they are and lets no channel take more than its share of the steps
(docs/reference/rotation.md 4.1).

Keys are padded with zeros to a multiple of `KEY_PADDING`, a multiple of every tile in use. The
logits of padding are exactly 0 and its values too, so attention can take it back out. Since the
mean of k is gone, each query's mean logit is 0 as well: padding never outweighs the keys.

Within each `KEY_GROUP` keys V lies in `KEY_ORDER`: the place that a key's weight has in the
registers of the matrix product which computed it is then the place where the next product wants
it, and no lane has to ask another one (docs/reference/performance.md 0.2). K keeps its order.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8 import E4M3_MAX, LIMITS, TINY, to_8bit

HEAD = 128  # K, the size of a head
Q_BLOCK = 128  # queries that share a scale
K_BLOCK = 64  # keys that share a scale
KEY_PADDING = 128  # padded keys are a multiple of it
KEY_GROUP = 16
KEY_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)  # place in V -> key in the group

MIX_DIGITS = 3  # of base 4, of a place among the neighbours that `mix` mixes

LOGIT_SCALE = math.log2(math.e) / math.sqrt(HEAD)  # a factor of qs

# The largest |vt|. Where 128 products with P <= 448 are summed in FP16, 448 * 1.125 * 128 < 65504.
V_LIMIT = E4M3_MAX
V_LIMIT_FP16 = 1.125


@dataclass(frozen=True, slots=True)
class Qkv8:
    """The operands of self attention with N heads over S tokens. P is `padded_keys(S)`."""

    q: Tensor  # [N, S, K] int8, mixed, or e4m3
    qs: Tensor  # [N, ceil(S / Q_BLOCK)] fp32
    k: Tensor  # [N, P, K], dtype of q; zero from S on
    ks: Tensor  # [N, P / K_BLOCK] fp32
    vt: Tensor  # [N, K, P] e4m3 or int8, keys in KEY_ORDER; zero for keys from S on
    vs: Tensor  # [N, K] fp32
    tokens: int  # S

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k, v [N, S, K] fp32, keys in their own order; q is in the units of exp2, k
        without its mean, and both are mixed if they are INT8.
        """
        q = self.q.float() * spread(self.qs, Q_BLOCK, self.q.shape[1])
        k = self.k[:, : self.tokens].float() * spread(self.ks, K_BLOCK, self.tokens)
        v = unpermute_keys(self.vt).mT.float() * self.vs[:, None]
        return q, k, v[:, : self.tokens]


def padded_keys(tokens: int) -> int:
    return -(-tokens // KEY_PADDING) * KEY_PADDING


def mix(x: Tensor) -> Tensor:
    """Applies R to each 64 neighbours of the last axis: its own inverse."""
    parts = x.unflatten(-1, (-1, *(MIX_DIGITS * (4,))))
    for digit in range(1, MIX_DIGITS + 1):
        parts = 0.5 * parts.sum(dim=-digit, keepdim=True) - parts
    return parts.reshape(x.shape)


def permute_keys(vt: Tensor) -> Tensor:
    """Moves the keys of the last axis from their own order to `KEY_ORDER` in each group."""
    return vt.unflatten(-1, (-1, KEY_GROUP))[..., list(KEY_ORDER)].flatten(-2)


def unpermute_keys(vt: Tensor) -> Tensor:
    """Undoes `permute_keys`."""
    places = [KEY_ORDER.index(key) for key in range(KEY_GROUP)]
    return vt.unflatten(-1, (-1, KEY_GROUP))[..., places].flatten(-2)


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dtype: torch.dtype = torch.int8,
    v_limit: float | None = None,
    v_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Qkv8:
    """The definition, in plain PyTorch. q, k (after RMSNorm and RoPE) and v: [S, N, K], any float.
    q and k become `dtype` and v `v_dtype`, int8 or e4m3 each; `v_limit` defaults to the largest
    value of `v_dtype`.
    """
    tokens = len(q)
    q, k, v = (side.float().transpose(0, 1).contiguous() for side in (q, k, v))  # [N, S, K]
    keys = padded_keys(tokens)
    k = k - k.mean(dim=1, keepdim=True)
    if dtype == torch.int8:
        q, k = mix(q), mix(k)
    q8, qs = _quantize_blocks(q, Q_BLOCK, dtype)
    k8, ks = _quantize_blocks(_pad(k, keys), K_BLOCK, dtype)
    vs = v.abs().amax(dim=1).clamp_min(TINY) / (v_limit or LIMITS[v_dtype])  # [N, K]
    vt = permute_keys(_pad(v / vs[:, None], keys).mT.contiguous())
    return Qkv8(q8, qs * LOGIT_SCALE, k8, ks, to_8bit(vt, v_dtype), vs, tokens)


def _quantize_blocks(x: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Turns x [N, S, K] into codes [N, S, K] and scales [N, ceil(S / block)]."""
    tokens = x.shape[1]
    blocks = _pad(x, -(-tokens // block) * block).unflatten(1, (-1, block))
    s = blocks.abs().amax(dim=(2, 3)).clamp_min(TINY) / LIMITS[dtype]
    return to_8bit(x / spread(s, block, tokens), dtype), s


def spread(s: Tensor, block: int, tokens: int) -> Tensor:
    """Repeats the scales of blocks [N, B] for their tokens: [N, S, 1]."""
    return s.repeat_interleave(block, dim=1)[:, :tokens, None]


def _pad(x: Tensor, tokens: int) -> Tensor:
    return F.pad(x, (0, 0, 0, tokens - x.shape[1]))
