"""The decoder of a `Vae` as data: its layers prepared to run on buffers, and what memory they need.

Doubling a picture and convolving it is one convolution of the small picture: a pixel of the large
one sees 2 x 2 cells of it, so 9 taps become 4. In half precision their sums are rounded once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from engine.models.vae import Decoder, FrameAttention, FrameConv, Norm, ResBlock, Up, in_layout
from kernels.channel_norm import PAST

# For the first and the second pixel of a cell: which of 3 taps of the large picture fall on which
# of 2 taps of the small one.
_TAPS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


@dataclass(frozen=True, slots=True)
class Causal:
    """A norm with SiLU, and the convolution that sees what it makes."""

    gamma: Tensor  # [C_in] fp32
    conv: FrameConv
    bias: Tensor  # [C_out] fp32, of the convolution


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """A `ResBlock`, prepared."""

    first: Causal
    second: Causal
    shortcut: nn.Conv3d | None


@dataclass(frozen=True, slots=True)
class Doubling:
    """An `Up`, prepared: its doubling and its convolution are one."""

    time_conv: FrameConv | None
    weight: Tensor  # [4 C_out, C, 2, 2], the four pixels of a cell one after the other
    bias: Tensor  # [C_out]


DecoderLayer: TypeAlias = ResidualBlock | FrameAttention | Doubling


def prepared_layers(decoder: Decoder) -> list[DecoderLayer]:
    """The layers between the first convolution and the head, in order."""
    return [_prepared(layer) for layer in _layers(decoder)]


def prepared_head(decoder: Decoder) -> Causal:
    return _causal(decoder.head["0"], decoder.head["2"])


@dataclass(frozen=True, slots=True)
class ConvStep:
    """A causal convolution in the step of one latent, and the frames that go through it."""

    conv: FrameConv
    frames: int
    height: int
    width: int

    @property
    def history_shape(self) -> tuple[int, int, int, int]:
        return PAST, self.height, self.width, self.conv.in_channels

    @property
    def window_values(self) -> int:
        return (PAST + self.frames) * self.height * self.width * self.conv.in_channels


def conv_steps(decoder: Decoder, height: int, width: int) -> Iterator[ConvStep]:
    """Yields all causal convolutions in order, for latents of height x width."""
    frames = 1
    yield ConvStep(decoder.conv1, frames, height, width)
    for layer in _layers(decoder):
        if isinstance(layer, ResBlock):
            for name in ("2", "6"):
                yield ConvStep(_frame_conv(layer.residual[name]), frames, height, width)
        elif isinstance(layer, Up):
            if layer.time_conv is not None:
                yield ConvStep(layer.time_conv, frames, height, width)
                frames *= 2
            height, width = 2 * height, 2 * width
    yield ConvStep(_frame_conv(decoder.head["2"]), frames, height, width)


def largest_pair(decoder: Decoder, height: int, width: int) -> int:
    """The number of values in the largest two tensors that live at once between convolutions.

    In a block they are its sum and its branch; while doubling, the cells and the pixels.
    """
    frames, largest = 1, 0
    for layer in _layers(decoder):
        if isinstance(layer, ResBlock):
            before, after = (_frame_conv(layer.residual[n]).in_channels for n in ("2", "6"))
            pair = frames * height * width * (max(before, after) + after)
        elif isinstance(layer, Up):
            frames *= 1 if layer.time_conv is None else 2
            channels = _conv2d(layer.resample["1"]).out_channels
            pair = 4 * frames * channels * ((height + 1) * (width + 1) + height * width)
            height, width = 2 * height, 2 * width
        else:
            continue  # attention works on the smallest pictures
        largest = max(largest, pair)
    return largest


def _layers(decoder: Decoder) -> Iterator[nn.Module]:
    yield from decoder.middle
    yield from decoder.upsamples


def _prepared(layer: nn.Module) -> DecoderLayer:
    if isinstance(layer, ResBlock):
        parts = layer.residual
        first, second = (_causal(parts[a], parts[b]) for a, b in (("0", "2"), ("3", "6")))
        return ResidualBlock(first, second, layer.shortcut)
    if isinstance(layer, Up):
        conv = _conv2d(layer.resample["1"])
        assert conv.bias is not None
        taps = torch.tensor(_TAPS, device=conv.weight.device)
        weight = torch.einsum("apk,bql,ockl->abocpq", taps, taps, conv.weight.detach().float())
        weight = in_layout(weight.flatten(0, 2).to(conv.weight.dtype))
        return Doubling(layer.time_conv, weight, conv.bias.detach())
    assert isinstance(layer, FrameAttention)
    return layer


def _causal(norm: nn.Module, conv: nn.Module) -> Causal:
    conv = _frame_conv(conv)
    assert isinstance(norm, Norm) and conv.bias is not None
    gamma, bias = (p.detach().flatten().float() for p in (norm.gamma, conv.bias))
    return Causal(gamma, conv, bias)


def _frame_conv(module: nn.Module) -> FrameConv:
    assert isinstance(module, FrameConv)
    return module


def _conv2d(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module
