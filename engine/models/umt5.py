"""The UMT5 encoder in plain PyTorch, from rows of its table of tokens to an embedding.

Its attention is not scaled, each block has its own table of distances, and norms only scale
(docs/reference/encoders.md 2.1). In BF16 each step is rounded where the official encoder rounds it.
Parameters carry the names of the transformers library.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_DISTANCE = 128  # tokens further apart share a bucket
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The sizes of an encoder."""

    width: int  # C
    heads: int  # N
    inner: int  # N * K, which need not be the width
    hidden: int  # of the feed forward
    blocks: int
    buckets: int  # of distances, for both signs


class Stack(nn.Module):
    """Rows of real tokens -> their embedding."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.block = nn.Sequential(*(Block(shape) for _ in range(shape.blocks)))
        self.final_layer_norm = Norm(shape.width)

    def forward(self, rows: Tensor) -> Tensor:
        """[L, C] in and out, in the dtype of the weights."""
        return self.final_layer_norm(self.block(rows))


class Block(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.layer = nn.Sequential(AttentionLayer(shape), FeedForwardLayer(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class AttentionLayer(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(shape)
        self.layer_norm = Norm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x))


class FeedForwardLayer(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(shape)
        self.layer_norm = Norm(shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class SelfAttention(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v = (nn.Linear(shape.width, shape.inner, bias=False) for _ in range(3))
        self.o = nn.Linear(shape.inner, shape.width, bias=False)
        # from a table: to draw one on the meta device imports PyTorch's compiler, a second
        table = torch.empty(shape.buckets, shape.heads)
        self.relative_attention_bias = nn.Embedding.from_pretrained(table)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            made(x).unflatten(1, (self.heads, -1)).transpose(0, 1)  # [N, L, K]
            for made in (self.q, self.k, self.v)
        )
        table = self.relative_attention_bias
        bias = table(buckets(len(x), table.num_embeddings, x.device)).permute(2, 0, 1)  # [N, L, L]
        weights = (q @ k.transpose(1, 2) + bias).softmax(-1)
        return self.o((weights @ v).transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(gelu(self.wi_0(x)) * self.wi_1(x))


class Norm(nn.Module):
    """RMSNorm with FP32 statistics; its result is rounded before it is scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + EPS)).to(self.weight.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form, step by step: PyTorch's own is not rounded between the steps in BF16."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def buckets(length: int, count: int, device: torch.device) -> Tensor:
    """Numbers of buckets [L, L] of key minus query: half of `count` for each sign, of these the
    first half for one distance each, the others for longer and longer ranges.
    """
    places = torch.arange(length, device=device)
    apart = places[None] - places[:, None]
    signed = count // 2
    exact = signed // 2
    distance = apart.abs()
    far = torch.log(distance.float() / exact) / math.log(MAX_DISTANCE / exact) * (signed - exact)
    # no distance is far below `exact`, where the logarithm of zero has no place
    far = (exact + far.clamp(min=0).long()).clamp(max=signed - 1)
    return signed * (apart > 0) + torch.where(distance < exact, distance, far)
