"""Writes the tiny transformer with outliers: much the same function, and hard for 8 bits.

A few channels of what enters each linear become 20 to 100 times as large, as those of large trained
transformers are, and the weights that read them smaller by the same factor (SmoothQuant turned
around: Xiao et al. 2022). Random weights alone have no such channels and flatter 8-bit rows. Where
GELU lies between the two, in the feed forward, the function changes a little. Self attention looks
at few tokens and adds more than in the tiny model, where nearly nothing of it is seen.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALLEST, LARGEST = 20.0, 100.0  # factors
ONE_IN = 64  # channels
SHARPER, LOUDER = 4.0, 4.0  # times the logits of self attention, and what it adds
SHIFT1, SCALE1, SHIFT2, SCALE2 = 0, 1, 3, 4  # rows of a block's modulation


def write_outliers(checkpoint: Path, path: Path, seed: int = 0) -> Path:
    """Writes a checkpoint in converted names as one of FP32 weights with outliers at `path`."""
    save_file(with_outliers(load_file(checkpoint), seed), path)
    return path


def with_outliers(weights: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Makes outliers in weights under converted names, which become FP32."""
    made = {name: weight.float().clone() for name, weight in weights.items()}
    draw = torch.Generator().manual_seed(seed)
    dim, inner = made["head.head.weight"].shape[1], made["blocks.0.ffn.0.weight"].shape[0]
    seen = factors(dim, draw)  # the same channels in all blocks: they share the step's modulation
    _modulate_more(made, seen)
    layers = {name.split(".")[1] for name in made if name.startswith("blocks.")}
    for n in sorted(layers, key=int):
        block = f"blocks.{n}."
        for reader in ("self_attn.q", "self_attn.k", "self_attn.v", "ffn.0"):
            made[f"{block}{reader}.weight"] /= seen
        made[f"{block}self_attn.norm_q.weight"] *= SHARPER
        for end in ("weight", "bias"):
            made[f"{block}self_attn.o.{end}"] *= LOUDER
        for end in ("weight", "bias"):
            made[f"{block}norm3.{end}"] *= seen
        made[f"{block}cross_attn.q.weight"] /= seen
        _move(made, [f"{block}self_attn.v"], f"{block}self_attn.o", factors(dim, draw))
        values = [f"{block}cross_attn.v", f"{block}cross_attn.v_img"]
        _move(made, values, f"{block}cross_attn.o", factors(dim, draw))
        _move(made, [f"{block}ffn.0"], f"{block}ffn.2", factors(inner, draw))
    return made


def factors(width: int, draw: torch.Generator) -> Tensor:
    """[width] fp32: one, but for one channel in `ONE_IN`."""
    found = torch.ones(width)
    count = max(1, width // ONE_IN)
    share = torch.rand(count, generator=draw)
    large = SMALLEST * torch.exp(share * math.log(LARGEST / SMALLEST))
    found[torch.randperm(width, generator=draw)[:count]] = large
    return found


def _move(made: dict[str, Tensor], makers: list[str], reader: str, by: Tensor) -> None:
    """Channels between linears become larger, and the columns that read them smaller."""
    for maker in makers:
        made[f"{maker}.weight"] *= by[:, None]
        made[f"{maker}.bias"] *= by
    made[f"{reader}.weight"] /= by


def _modulate_more(made: dict[str, Tensor], by: Tensor) -> None:
    """Enlarges what LayerNorm is modulated to before attention and feed forward: both parts of the
    sum 1 + scale of the step + scale of the block, and of the shifts.
    """
    step = made["time_projection.1.weight"].unflatten(0, (6, -1))
    bias = made["time_projection.1.bias"].unflatten(0, (6, -1))
    tables = [
        weight[0]
        for name, weight in made.items()
        if name.startswith("blocks.") and name.endswith(".modulation")
    ]
    for row in (SHIFT1, SCALE1, SHIFT2, SCALE2):
        step[row] *= by[:, None]
        bias[row] *= by
        for table in tables:
            table[row] *= by
    for table in tables:
        table[[SCALE1, SCALE2]] += by - 1
