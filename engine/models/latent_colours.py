"""Colours straight from latents, without the decoder: a linear map, fitted to the VAE at hand.

A latent pixel holds 8x8 pixels of a frame. Their mean colour is nearly linear in its 16 numbers, so
one product shows what a clip will be while it is still being denoised. The map is fitted by least
squares to what the VAE makes of drawings of clouds and blocks, always the same ones.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import LATENT_CHANNELS, VAE_STRIDE
from engine.diskcache import DiskCache
from engine.models.vae import Vae

_CLIPS, _FRAMES, _SIDE = 8, 5, 128
_SCALES = (4, 8, 16, 32)  # sides of the noise that clouds are blown up from
_SEED = 20261130
_KEPT_BYTES = 2**20
COUNT = 3 * (LATENT_CHANNELS + 1)
_FLOATS = struct.Struct(f"<{COUNT}f")


@dataclass(frozen=True, slots=True)
class LatentColours:
    """RGB = weight @ latent + bias, where colours lie in -1..1."""

    weight: Tensor  # [3, 16] fp32
    bias: Tensor  # [3] fp32

    @classmethod
    def of(cls, values: Sequence[float]) -> "LatentColours":
        """Makes the map of its numbers. Raises `ValueError` for another count of them."""
        if len(values) != COUNT:
            raise ValueError(f"{len(values)} numbers; a map of latents to colours has {COUNT}")
        table = torch.tensor(values, dtype=torch.float32).view(3, -1)
        return cls(table[:, :-1].contiguous(), table[:, -1].contiguous())

    @property
    def values(self) -> list[float]:
        """The numbers of the map: of red, green and blue 16 weights and a bias each."""
        return torch.cat([self.weight, self.bias[:, None]], dim=1).flatten().tolist()

    def frames(self, latents: Tensor) -> Tensor:
        """Shows latents [16, n, h, w], any float: [n, h, w, 3] u8, on their device."""
        seen = torch.einsum("kc,cnhw->nhwk", self.weight.to(latents), latents)
        levels = (seen + self.bias.to(latents)) * 127.5 + 127.5
        return levels.nan_to_num(127.5).round().clamp(0, 255).to(torch.uint8)


def latent_colours(vae: Vae, cache: Path) -> LatentColours:
    """Returns the map of a VAE, fitted now or read from the folder of the cache."""
    kept = DiskCache(cache, _KEPT_BYTES)
    key = f"colours of latents {_SEED} {name_of(vae)}"
    if (data := kept.read(key)) is not None and len(data) == _FLOATS.size:
        return LatentColours.of(_FLOATS.unpack(data))
    made = fit_colours(vae)
    kept.write(key, _FLOATS.pack(*made.values))
    return made


@torch.inference_mode()
def fit_colours(vae: Vae) -> LatentColours:
    """Fits the map to drawn clips that the VAE encodes, on its device."""
    latents, colours = list[Tensor](), list[Tensor]()
    for clip in drawn_clips():
        encoded = vae.encode([clip])
        latents.append(encoded.flatten(1).T.double().cpu())
        colours.append(_means(clip).flatten(1).T.double())
    known = torch.cat(latents)
    known = torch.cat([known, known.new_ones(len(known), 1)], dim=1)
    found = torch.linalg.lstsq(known, torch.cat(colours), driver="gelsd").solution.float()
    return LatentColours(found[:-1].T.contiguous(), found[-1].contiguous())


def drawn_clips() -> list[Tensor]:
    """Draws the clips that the map is fitted to: [3, n, H, W] fp32 in -1..1 each."""
    draw = np.random.default_rng(_SEED)  # the same numbers on every machine
    return [_clip(draw, _SCALES[number % len(_SCALES)]) for number in range(_CLIPS)]


def _clip(draw: np.random.Generator, scale: int) -> Tensor:
    """Clouds of colour that drift, with flat blocks on them."""
    first, last = (
        torch.from_numpy(draw.normal(0, 0.6, (1, 3, scale, scale))).float() for _ in range(2)
    )
    big = [F.interpolate(one, _SIDE, mode="bilinear")[0] for one in (first, last)]
    share = torch.linspace(0, 1, _FRAMES)[None, :, None, None]
    clip = big[0][:, None] * (1 - share) + big[1][:, None] * share
    for _ in range(4):
        top, left = draw.integers(0, _SIDE - 32, 2)
        colour = torch.from_numpy(draw.uniform(-1, 1, 3)).float()
        clip[:, :, top : top + 32, left : left + 32] = colour[:, None, None, None]
    return clip.clamp(-1, 1)


def _means(clip: Tensor) -> Tensor:
    """The mean colours [3, t, h, w] of the pixels behind each latent one of a clip."""
    frames, rows, columns = VAE_STRIDE
    small = F.avg_pool2d(clip.transpose(0, 1), (rows, columns)).transpose(0, 1)
    later = small[:, 1:].unflatten(1, (-1, frames)).mean(2)
    return torch.cat([small[:, :1], later], dim=1)


def name_of(vae: Vae) -> str:
    """Names a VAE by the weights next to its latents, as BF16 holds them."""
    near = (vae.conv1, vae.conv2)
    weights = (weight for conv in near for weight in conv.parameters())
    held = b"".join(
        weight.detach().bfloat16().cpu().view(torch.int16).numpy().tobytes() for weight in weights
    )
    return hashlib.sha256(held).hexdigest()
