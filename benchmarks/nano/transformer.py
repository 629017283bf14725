"""The transformer, differentiable and for batches: what `engine.models.dit` computes, same weights.

Padding rows of a text are all the same, so they are one row here with the logarithm of their number
added to its attention logits. B clips, t latent frames, S tokens, D features, L text rows.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import HEAD_SIZE, LATENT_CHANNELS, MASK_CHANNELS, ModelConfig
from engine.models.dit import (
    EPS,
    PATCH,
    POSE_COLUMN_SHIFT,
    ROPE_DIMS,
    ROPE_THETA,
    TIME_FREQUENCIES,
    Rope,
    Scail,
    rope_tables,
    rotate,
    split_heads,
)

TransformerLayer: TypeAlias = Any  # what torch's containers hold: they say no more than Module
PEAK = 3.0  # length of the pairs that tie a head to a place, where what it reads has about 1
NEAREST = 0.03  # the slowest frequency that tells neighbours apart
# Layer -> for each head where it looks at first: the same place in the picture, the skeleton there
# in the same frame, or wherever training takes it.
FIRST_LOOKS = (
    ("place", "skeleton"),
    ("place", "skeleton"),
    ("free", "skeleton"),
    ("place", "free"),
    ("free", "skeleton"),
    ("place", "free"),
)


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts for which the network is trained, each as what it holds and one row of padding."""

    rows: Tensor  # [P, L, text_dim]
    bias: Tensor  # [P, L] logarithm of how often a row stands there; -inf: not at all


@dataclass(frozen=True, slots=True)
class BatchConditions:
    """Everything that is known about a batch of clips."""

    texts: Tensor  # [B] numbers of texts
    vision: Tensor  # [B, 257, clip_dim]; in training fewer, drawn at random
    reference: Tensor  # [B, 16, 1, h, w]
    pose: Tensor | None  # [B, 16, t, h/2, w/2]


@dataclass(frozen=True, slots=True)
class Known:
    """What a batch of clips is told by words and by the picture as a whole."""

    texts: Tensor  # [B] numbers of texts
    vision: Tensor  # [B, n, clip_dim]


@dataclass(frozen=True, slots=True)
class Told:
    """The keys of cross attention: each text once, however many clips have it."""

    texts: Tensor  # [P, L, D]
    chosen: Tensor  # [B]
    bias: Tensor  # [P, L]
    vision: Tensor  # [B, n, D]


def texts_of(padded: list[Tensor]) -> Texts:
    """Takes encoded prompts [512, text_dim] that are zero where padded."""
    counts = [int(text.abs().sum(1).ne(0).sum()) for text in padded]
    longest = max(counts) + 1
    bias = torch.full((len(padded), longest), -math.inf)
    for row, count, text in zip(bias, counts, padded, strict=True):
        row[:count] = 0.0
        row[count] = math.log(len(text) - count)
    return Texts(torch.stack([text[:longest] for text in padded]), bias)


def velocity(
    model: Scail, texts: Texts, latents: Tensor, timesteps: Tensor, known: BatchConditions
) -> Tensor:
    """Latents [B, 16, t, h, w], timesteps [B] of 0..1000 -> velocity, same shape."""
    _, _, t, h, w = latents.shape
    grid = t, h // PATCH[1], w // PATCH[2]
    picture = torch.cat([masked(known.reference, 1.0), masked(latents, 0.0)], dim=2)
    tokens = flatten(model.patch_embedding(picture))
    if known.pose is not None:
        skeleton = flatten(model.patch_embedding_pose(masked(known.pose, 1.0)))
        tokens = torch.cat([tokens, skeleton], dim=1)
    rope = rope_tables(grid, known.pose is not None, tokens.device)
    told = Known(known.texts, known.vision)
    return velocity_of(model, texts, tokens, rope, grid, timesteps, told)


def velocity_of(
    model: Scail,
    texts: Texts,
    tokens: Tensor,
    rope: Rope,
    grid: tuple[int, int, int],
    timesteps: Tensor,
    known: Known,
) -> Tensor:
    """Tokens [B, S, D], those of a picture first, then of the video -> velocity [B, 16, t, h, w].

    `grid` counts frames, rows and columns of the video's tokens.
    """
    e = model.time_embedding(_sinusoids(timesteps))
    modulation = model.time_projection(e).unflatten(1, (6, 1, -1))  # [B, 6, 1, D]
    context = Told(
        model.text_embedding(texts.rows), known.texts, texts.bias, model.img_emb(known.vision)
    )
    for block in model.blocks:
        tokens = _block(block, tokens, modulation, context, rope)
    t, rows, columns = grid
    area = rows * columns
    shift, scale = (e[:, None] + model.head.modulation).unsqueeze(2).unbind(1)
    patches = model.head.head(_modulate(tokens[:, area : area * (1 + t)], shift, scale))
    patches = patches.view(-1, *grid, *PATCH[1:], LATENT_CHANNELS)
    return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(
        len(tokens), LATENT_CHANNELS, t, PATCH[1] * rows, PATCH[2] * columns
    )


def _block(
    block: TransformerLayer,
    x: Tensor,
    modulation: Tensor,
    context: Told,
    rope: Rope,
) -> Tensor:
    own = block.modulation[0, :, None]  # [6, 1, D]
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + own).unbind(1)
    attn = block.self_attn
    y = _modulate(x, shift1, scale1)
    q, k = (
        rotate(split_heads(norm(side(y))), rope)
        for norm, side in ((attn.norm_q, attn.q), (attn.norm_k, attn.k))
    )
    x = x + gate1 * attn.o(_attend(q, k, split_heads(attn.v(y))))
    x = x + _cross(block.cross_attn, block.norm3(x), context)
    return x + gate2 * block.ffn(_modulate(x, shift2, scale2))


def _cross(cross: TransformerLayer, x: Tensor, context: Told) -> Tensor:
    q = split_heads(cross.norm_q(cross.q(x)))
    k, v = cross.norm_k(cross.k(context.texts)), cross.v(context.texts)
    k, v = (split_heads(side)[context.chosen] for side in (k, v))
    found = _attend(q, k, v, context.bias[context.chosen][:, None, None])
    k, v = cross.norm_k_img(cross.k_img(context.vision)), cross.v_img(context.vision)
    return cross.o(found + _attend(q, split_heads(k), split_heads(v)))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, S, N, K] each -> [B, S, D].

    Written out: in BF16 on a CPU, PyTorch's own takes two to three times as long.
    """
    q, k, v = (side.transpose(1, 2) for side in (q, k, v))
    logits = (q * HEAD_SIZE**-0.5) @ k.transpose(-1, -2)
    logits = logits if bias is None else logits + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def masked(latents: Tensor, value: float) -> Tensor:
    b, _, *size = latents.shape
    return torch.cat([latents, latents.new_full((b, MASK_CHANNELS, *size), value)], dim=1)


def flatten(tokens: Tensor) -> Tensor:
    return tokens.flatten(2).transpose(1, 2)  # [B, S, D]


def _sinusoids(timesteps: Tensor) -> Tensor:
    half = TIME_FREQUENCIES // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angles = timesteps[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def fresh_transformer(config: ModelConfig) -> Scail:
    """Blocks begin as the identity, some heads looking where an animator would look first.

    A constant in the biases of q and k, rotated by RoPE, makes logits that depend on the distance
    of two tokens alone: the reference at the same place and the skeleton are found from the first
    step on, in place of after thousands.
    """
    model = Scail(config)
    blocks: TransformerLayer = model.blocks
    last: TransformerLayer = model.time_projection[1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    nn.init.zeros_(model.head.head.weight)
    nn.init.zeros_(model.head.head.bias)
    nn.init.zeros_(model.head.modulation)
    for number, block in enumerate(blocks):
        for out in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
        nn.init.zeros_(block.modulation)
        with torch.no_grad():
            block.modulation[:, (2, 5)] = 1.0  # gates
            for head, look in enumerate(FIRST_LOOKS[number % len(FIRST_LOOKS)]):
                rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
                q, k = _look(look)
                block.self_attn.q.bias[rows] += q
                block.self_attn.k.bias[rows] += k
    return model


def _look(kind: str) -> tuple[Tensor, Tensor]:
    """Biases [K] of q and k whose rotated product is largest where `kind` says."""
    if kind == "free":
        return torch.zeros(HEAD_SIZE), torch.zeros(HEAD_SIZE)
    lengths, angles = [], []
    for axis, size in enumerate(ROPE_DIMS):
        rates = ROPE_THETA ** -(torch.arange(0, size, 2) / size)
        told = (rates > NEAREST) & (kind == "skeleton" or axis > 0)
        lengths.append(PEAK * told)
        far = POSE_COLUMN_SHIFT if kind == "skeleton" and axis == 2 else 0
        angles.append(rates * far)
    length, angle = torch.cat(lengths), torch.cat(angles)
    q = torch.stack([length * angle.cos(), length * angle.sin()], dim=1).flatten()
    k = torch.stack([length, torch.zeros_like(length)], dim=1).flatten()
    return q, k
