"""The VAE as its training begins: colours already pass, everything else is random."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.nano.autoencoder import AutoencoderLayer, encode
from engine.config import LATENT_CHANNELS
from engine.models.vae import LATENT_MEAN, LATENT_STD, Down, FrameConv, ResBlock, Up, Vae

STEADY = 3.0  # the constant beside colours before a head


def fresh_vae(width: int) -> Vae:
    """Residual branches start at zero, and the mean colour of each cell passes from end to end.

    Channels 0 to 2 carry it, all others start at random. Before a head they come with both signs,
    as silu(x) - silu(-x) = x, beside a constant that keeps the norm from dividing by their length.
    No convolution sees the past at first: what is learned on pictures holds for clips.
    """
    vae: AutoencoderLayer = Vae(width)
    layers: Iterable[AutoencoderLayer] = vae.modules()
    for module in layers:
        if isinstance(module, FrameConv):
            nn.init.zeros_(module.weight[:, :, :-1])
        if isinstance(module, ResBlock):
            last: AutoencoderLayer = module.residual["6"]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    encoder, decoder = vae.encoder, vae.decoder
    downs: list[AutoencoderLayer] = [
        layer for layer in encoder.downsamples if isinstance(layer, Down)
    ]
    ups: list[AutoencoderLayer] = [layer for layer in decoder.upsamples if isinstance(layer, Up)]
    with torch.no_grad():
        _pass(encoder.conv1, (-1, 1, 1))
        _pass(decoder.conv1, (-1, 1, 1))
        for layer in (*encoder.downsamples, *decoder.upsamples):
            if isinstance(layer, ResBlock) and layer.shortcut is not None:
                _pass(layer.shortcut, (0, 0, 0))
        for down in downs:
            _pass(down.resample["1"], (slice(0, 2), slice(0, 2)), 0.25)
        for up in ups:
            _pass(up.resample["1"], (1, 1))
        for layer in (*downs, *ups):
            if layer.time_conv is not None:
                _repeat(layer.time_conv, isinstance(layer, Down))
        _through_norm(downs[-1].resample["1"], encoder.head["2"])
        _through_norm(ups[-1].resample["1"], decoder.head["2"])
        _in_units(vae)
    return vae


@torch.no_grad()
def normalise(vae: AutoencoderLayer, clips: Tensor) -> None:
    """Changes the outermost layers so that latents of clips [B, 3, T, H, W] have mean 0, spread 1.

    With m and s of what the encoder says now, a raw value r becomes r / s + k, and back.
    """
    latents = torch.cat([encode(vae, clip[None].transpose(1, 2)) for clip in clips])
    cells = latents.transpose(0, 2).flatten(1)  # [16, cells]
    m, s = cells.mean(1), cells.std(1)
    mean, std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    k = mean * (1 - 1 / s) - m * std / s
    rows = slice(0, LATENT_CHANNELS)
    vae.conv1.weight[rows] /= s.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[rows] = vae.conv1.bias[rows] / s + k
    matrix = vae.conv2.weight.flatten(1)
    vae.conv2.bias -= matrix @ (s * k)
    vae.conv2.weight.copy_((matrix * s).view_as(vae.conv2.weight))


def _repeat(time_conv: AutoencoderLayer, is_down: bool) -> None:
    """Begins as the mean of two frames on the way down, and as the frame twice on the way up."""
    nn.init.zeros_(time_conv.weight)
    nn.init.zeros_(time_conv.bias)
    taps, count = ((1, 2), 1) if is_down else ((2,), 2)
    same = torch.eye(time_conv.weight.shape[1]).repeat(count, 1) / len(taps)
    for tap in taps:
        time_conv.weight[:, :, tap, 0, 0] = same


def _through_norm(conv: AutoencoderLayer, head: AutoencoderLayer) -> None:
    """Gives colours both signs in the last convolution before a head, which takes them back."""
    conv.weight[3:6], conv.bias[3:6] = -conv.weight[:3], 0.0
    conv.weight[6], conv.bias[6] = 0.0, STEADY
    _pass(head, (-1, 1, 1))
    head.weight[[0, 1, 2], [3, 4, 5], -1, 1, 1] = -1.0


def _in_units(vae: AutoencoderLayer) -> None:
    """Puts the outermost layers into the units of the official latents."""
    _pass(vae.conv1, (0, 0, 0))
    _pass(vae.conv2, (0, 0, 0))
    mean, std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    rows = slice(0, LATENT_CHANNELS)
    vae.conv1.weight[rows] *= std.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[rows] = mean
    vae.conv2.weight.copy_(vae.conv2.weight / std.view(-1, 1, 1, 1))
    vae.conv2.bias.copy_(-vae.conv2.weight.flatten(1) @ mean)


def _pass(conv: AutoencoderLayer, taps: tuple[int | slice, ...], share: float = 1.0) -> None:
    """Lets the first three channels through as they are."""
    conv.weight[:3], conv.bias[:3] = 0.0, 0.0
    for channel in range(3):
        conv.weight[(channel, channel, *taps)] = share
