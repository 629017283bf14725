"""The image tower of CLIP in plain PyTorch: all blocks but the last, and no norm behind them.

Blocks norm what they read, one more norm stands before the first, GELU is the exact one
(docs/reference/encoders.md 3.1). Parameters carry the names of the transformers library.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.attention import sdpa

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class TowerShape:
    """The sizes of a tower."""

    width: int  # C
    heads: int  # N
    hidden: int  # of the feed forward
    blocks: int  # without the last one, which is not built
    patch: int  # pixels a side
    side: int  # patches a side

    @property
    def pixels(self) -> int:
        """Pixels a side of the picture."""
        return self.side * self.patch


class Tower(nn.Module):
    """Normalised pixels -> tokens, the class token first."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(shape.width, eps=EPS)  # so it is spelt in the files
        blocks = nn.Sequential(*(Block(shape) for _ in range(shape.blocks)))
        self.encoder = nn.ModuleDict({"layers": blocks})

    def forward(self, pixels: Tensor) -> Tensor:
        """Takes [3, H, W] and returns [1 + n, C], both in the dtype of the weights."""
        return self.encoder["layers"](self.pre_layrnorm(self.embeddings(pixels)))


class Embeddings(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(shape.width))
        self.patch_embedding = nn.Conv2d(3, shape.width, shape.patch, shape.patch, bias=False)
        # from a table: to draw one on the meta device imports PyTorch's compiler, a second
        places = torch.empty(1 + shape.side**2, shape.width)
        self.position_embedding = nn.Embedding.from_pretrained(places)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels[None])[0].flatten(1).T  # [n, C]
        tokens = torch.cat([self.class_embedding[None], patches])
        return tokens + self.position_embedding.weight


class Block(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(shape.width, eps=EPS) for _ in range(2))
        self.self_attn = SelfAttention(shape)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(shape.width, shape.width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            made(x).unflatten(1, (self.heads, -1))  # [S, N, K]
            for made in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(sdpa(q, k, v).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.hidden)
        self.fc2 = nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
