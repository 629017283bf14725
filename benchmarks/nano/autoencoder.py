"""The VAE, differentiable and for batches: what `engine.models.vae` computes, same weights.

A 3 x 3 x 3 causal convolution is one 2D convolution over a frame and the two before it, stacked in
channels: on a CPU that has a fast backward pass. Tensors are [B, T, C, H, W]; the first frame of
each clip is a chunk of its own, as in the stream. Source: docs/reference/encoders.md section 1.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import LATENT_CHANNELS
from engine.models.vae import LATENT_MEAN, LATENT_STD, Down, FrameAttention, ResBlock, Vae

AutoencoderLayer: TypeAlias = Any  # what torch's containers hold: they say no more than Module


def encode(vae: Vae, clips: Tensor) -> Tensor:
    """Clips [B, 4k + 1, 3, H, W] in -1..1 -> normalised latents [B, k + 1, 16, H/8, W/8]."""
    x = _causal(vae.encoder.conv1, clips)
    for layer in (*vae.encoder.downsamples, *vae.encoder.middle):
        x = _layer(layer, x)
    x = _causal(vae.encoder.head["2"], _active(vae.encoder.head["0"], x))
    mean = _each(x, lambda y: F.conv2d(y, vae.conv1.weight[:, :, 0], vae.conv1.bias))
    return (mean[:, :, :LATENT_CHANNELS] - _row(LATENT_MEAN)) / _row(LATENT_STD)


def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Normalised latents [B, t, 16, h, w] -> clips [B, 4t - 3, 3, 8h, 8w], not clamped."""
    z = latents * _row(LATENT_STD) + _row(LATENT_MEAN)
    z = _each(z, lambda y: F.conv2d(y, vae.conv2.weight[:, :, 0], vae.conv2.bias))
    x = _causal(vae.decoder.conv1, z)
    for layer in (*vae.decoder.middle, *vae.decoder.upsamples):
        x = _layer(layer, x)
    return _causal(vae.decoder.head["2"], _active(vae.decoder.head["0"], x))


def _layer(layer: AutoencoderLayer, x: Tensor) -> Tensor:
    if isinstance(layer, ResBlock):
        return _res_block(layer, x)
    if isinstance(layer, FrameAttention):
        return _attention(layer, x)
    return _down(layer, x) if isinstance(layer, Down) else _up(layer, x)


def _res_block(block: AutoencoderLayer, x: Tensor) -> Tensor:
    y = _causal(block.residual["2"], _active(block.residual["0"], x))
    y = _causal(block.residual["6"], _active(block.residual["3"], y))
    if (short := block.shortcut) is None:
        return x + y
    return y + _each(x, lambda frame: F.conv2d(frame, short.weight[:, :, 0], short.bias))


def _attention(layer: AutoencoderLayer, x: Tensor) -> Tensor:
    *_, c, h, w = x.shape
    qkv = _each(_norm(layer.norm, x), layer.to_qkv).flatten(3).transpose(2, 3)  # [B, T, h w, 3C]
    q, k, v = qkv.split(c, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return x + _each(mixed.transpose(2, 3).unflatten(-1, (h, w)), layer.proj)


def _down(layer: AutoencoderLayer, x: Tensor) -> Tensor:
    x = _each(F.pad(x, (0, 1, 0, 1)), layer.resample["1"])
    if layer.time_conv is None or x.shape[1] == 1:
        return x
    stacked = torch.cat([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]], dim=2)
    return torch.cat([x[:, :1], _stacked_conv(layer.time_conv, stacked)], dim=1)


def _up(layer: AutoencoderLayer, x: Tensor) -> Tensor:
    if layer.time_conv is not None and x.shape[1] > 1:
        pairs = _causal(layer.time_conv, x[:, 1:]).unflatten(2, (2, -1)).flatten(1, 2)
        x = torch.cat([x[:, :1], pairs], dim=1)
    return _each(F.interpolate(x, scale_factor=(1, 2, 2)), layer.resample["1"])


def _causal(conv: AutoencoderLayer, x: Tensor) -> Tensor:
    """Convolves every frame with the two before it, zeros before the first."""
    if x.shape[1] == 1:  # a picture sees the last tap alone
        weight = conv.weight[:, :, 2]
        return _each(x, lambda y: F.conv2d(y, weight, conv.bias, padding=weight.shape[-1] // 2))
    past = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    return _stacked_conv(conv, torch.cat([past[:, :-2], past[:, 1:-1], past[:, 2:]], dim=2))


def _stacked_conv(conv: AutoencoderLayer, x: Tensor) -> Tensor:
    weight = conv.weight.transpose(1, 2).flatten(1, 2)  # [C_out, 3 C_in, k, k]
    return _each(x, lambda y: F.conv2d(y, weight, conv.bias, padding=weight.shape[-1] // 2))


def _active(norm: AutoencoderLayer, x: Tensor) -> Tensor:
    return F.silu(_norm(norm, x))


def _norm(norm: AutoencoderLayer, x: Tensor) -> Tensor:
    scale = (x.square().mean(2, keepdim=True) + 1e-24).rsqrt()
    return x * scale * norm.gamma.view(-1, 1, 1)


def _each(x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """Works on all frames of all clips as one batch of pictures."""
    y = work(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


def _row(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)
