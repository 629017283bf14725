"""Causal video VAE of Wan 2.1: pixels to latents and back, streamed in both directions.

A clip goes through in chunks. The first chunk is one frame (one latent), the later ones have any
whole number of latents, and the result does not depend on that number. What a causal layer must
remember of earlier chunks lies in the stream's `History`, never on the module, so streams may run
interleaved; it is updated in place, so that a CUDA graph can hold it. Inside, a tensor is
[n, H, W, C]: channels last is what the convolutions run fastest on and what the norm reduces over.
Source: docs/reference/encoders.md 1.
"""

import math
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import LATENT_CHANNELS, VAE_STRIDE
from engine.errors import BadCheckpoint, EngineError

History = dict[nn.Module, Tensor]  # causal layer -> its last input frames; empty: a new stream

WIDTH = 96  # of the released weights
_FIRST = "encoder.conv1.weight"  # its first axis is the width
_NOTHING = re.compile("(?!)")  # no other tensor may be in the file
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # what convolutions run fastest on
GROWTH = (1, 2, 4, 4)  # channels of the four resolutions, finest first, in widths
ENCODE_STEP = VAE_STRIDE[0]  # frames a chunk after the first: one latent

# The latents' statistics over the training set (docs/reference/encoders.md 1.2).
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class Vae(nn.Module):
    """Encoder and decoder. Parameters have the names and shapes of `Wan2.1_VAE.pth`."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.conv1 = nn.Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = nn.Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(width)

    def encode(self, frames: Iterable[Tensor]) -> Tensor:
        """Pieces [3, n, H, W] of a clip, -1..1, of any n -> normalised latents [16, t, h, w] fp32.

        The clip must have 4k + 1 frames (the caller trims it) and sides that are multiples of 8.
        Raises `EngineError` if it does not, or if a piece is not such a tensor.
        """
        history: History = {}
        latents: list[Tensor] = []
        for chunk in _rechunk(frames, ENCODE_STEP):
            latents.append(self.encode_step(chunk, history))
        if not latents:
            raise EngineError("The VAE got no frames; a clip has 4k + 1 of them.")
        return torch.cat(latents, dim=1)

    def decode(self, latents: Tensor, step: int = 1) -> Iterator[Tensor]:
        """Normalised latents [16, t, h, w] -> [3, 1, H, W], then [3, 4n, H, W] fp32 with n <= step.

        Values are clamped to -1..1. A piece is computed when it is asked for, and lies in memory as
        [n, H, W, 3]. Raises `EngineError` at once if the latents or the step cannot be used.
        """
        check_latents(latents)
        if step < 1:
            raise EngineError(f"The VAE decodes 1 or more latents a step, not {step}.")
        return self._decode(latents, step)

    def _decode(self, latents: Tensor, step: int) -> Iterator[Tensor]:
        history: History = {}
        for start, end in pairwise([0, *range(1, latents.shape[1], step), latents.shape[1]]):
            yield self.decode_step(latents[:, start:end], history).clamp(-1, 1)

    @torch.inference_mode()
    def encode_step(self, frames: Tensor, history: History) -> Tensor:
        """The next frames of a stream, first [3, 1, H, W], then [3, 4n, H, W] -> [16, n, h, w]."""
        _check_step(frames.shape[1], VAE_STRIDE[0], history)
        x = frames.to(self.conv1.weight).permute(1, 2, 3, 0).contiguous()  # [n, H, W, 3]
        x = pointwise(self.encoder(x, history), self.conv1)  # mean, log-variance
        mean = x[..., :LATENT_CHANNELS].float()
        normalised = (mean - _row(LATENT_MEAN, x)) * _row(LATENT_STD, x).reciprocal()
        return normalised.permute(3, 0, 1, 2)

    @torch.inference_mode()
    def decode_step(self, latents: Tensor, history: History) -> Tensor:
        """The next latents of a stream, first [16, 1, h, w], then [16, n, h, w] -> pixels.

        Pixels are [3, 1, H, W], then [3, 4n, H, W], fp32 and not clamped.
        """
        _check_step(latents.shape[1], 1, history)
        z = latents.to(self.conv2.weight.device, torch.float32).permute(1, 2, 3, 0)
        # Divided by the rounded reciprocal, as the model was trained and measured.
        z = z / _row(LATENT_STD, z).reciprocal() + _row(LATENT_MEAN, z)
        x = pointwise(z.to(self.conv2.weight.dtype), self.conv2)
        return self.decoder(x, history).float().permute(3, 0, 1, 2)


class Encoder(nn.Module):
    """[n, H, W, 3] -> mean and log-variance before the last mix [n/4, H/8, W/8, 32]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        a, b, c, d = (width * growth for growth in GROWTH)
        self.conv1 = FrameConv(3, a)
        self.downsamples = nn.ModuleList([
            ResBlock(a, a), ResBlock(a, a), Down(a, in_time=False),
            ResBlock(a, b), ResBlock(b, b), Down(b, in_time=True),
            ResBlock(b, c), ResBlock(c, c), Down(c, in_time=True),
            ResBlock(c, d), ResBlock(d, d),
        ])  # fmt: skip
        self.middle = nn.ModuleList([ResBlock(d, d), FrameAttention(d), ResBlock(d, d)])
        self.head = nn.ModuleDict({"0": Norm(d), "2": FrameConv(d, 2 * LATENT_CHANNELS)})

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = causal(self.conv1, x, history)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, history)
        return causal(self.head["2"], x, history, norm=self.head["0"])


class Decoder(nn.Module):
    """[n, h, w, 16] -> [4n, 8h, 8w, 3], and the stream's first latent -> one frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        a, b, c, d = (width * growth for growth in GROWTH)
        self.conv1 = FrameConv(LATENT_CHANNELS, d)
        self.middle = nn.ModuleList([ResBlock(d, d), FrameAttention(d), ResBlock(d, d)])
        # An upsampling halves the channels; where the next resolution has more, a block mends it.
        self.upsamples = nn.ModuleList([
            ResBlock(d, d), ResBlock(d, d), ResBlock(d, d), Up(d, in_time=True),
            ResBlock(d // 2, c), ResBlock(c, c), ResBlock(c, c), Up(c, in_time=True),
            ResBlock(c // 2, b), ResBlock(b, b), ResBlock(b, b), Up(b, in_time=False),
            ResBlock(b // 2, a), ResBlock(a, a), ResBlock(a, a),
        ])  # fmt: skip
        self.head = nn.ModuleDict({"0": Norm(a), "2": FrameConv(a, 3)})

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = causal(self.conv1, x, history)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, history)
        return causal(self.head["2"], x, history, norm=self.head["0"])


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input. [n, H, W, C_in] -> [n, H, W, C_out]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict({  # the numbers are the checkpoint's
            "0": Norm(channels_in), "2": FrameConv(channels_in, channels_out),
            "3": Norm(channels_out), "6": FrameConv(channels_out, channels_out),
        })  # fmt: skip
        same = channels_in == channels_out
        self.shortcut = None if same else nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = causal(self.residual["2"], x, history, norm=self.residual["0"])
        y = causal(self.residual["6"], y, history, norm=self.residual["3"])
        return y.add_(x if self.shortcut is None else pointwise(x, self.shortcut))


class FrameAttention(nn.Module):
    """Every cell of a frame sees all cells of that frame, with one head; it needs no history."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        n, h, w, c = x.shape
        qkv = pointwise(self.norm(x).to(x.dtype), self.to_qkv)
        q, k, v = qkv.view(n, 1, h * w, 3 * c).chunk(3, dim=-1)  # [n, 1, h w, C]
        mixed = F.scaled_dot_product_attention(q, k, v).view(n, h, w, c)
        return pointwise(mixed, self.proj).add_(x)


class Down(nn.Module):
    """Halves rows and columns; with `in_time` the later frames too."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        time_conv = FrameConv(channels, channels, size=1, time_stride=2)
        self.time_conv = time_conv if in_time else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = _each_frame(self.resample["1"], F.pad(x, (0, 0, 0, 1, 0, 1)))
        if self.time_conv is None:
            return x
        if self not in history:  # the first frame stands for itself, and is the next one's past
            history[self] = x.clone()
            return x
        window = torch.cat([history[self], x])
        history[self].copy_(x[-1:])
        return self.time_conv(window)


class Up(nn.Module):
    """Doubles rows and columns and halves channels; with `in_time` doubles later frames too."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = FrameConv(channels, 2 * channels, size=1) if in_time else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(x, self.time_conv, history)
        n, h, w, c = x.shape
        x = x[:, :, None, :, None].expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c)
        return _each_frame(self.resample["1"], x)

    def _double_frames(self, x: Tensor, time_conv: nn.Module, history: History) -> Tensor:
        if self not in history:  # the first frame stands for itself, and nobody remembers it
            history[self] = x.new_zeros(2, *x.shape[1:])
            return x
        window = torch.cat([history[self], x])
        history[self].copy_(window[-2:])
        pairs = time_conv(window).unflatten(-1, (2, -1))  # [n, h, w, 2, C]
        return pairs.movedim(3, 1).flatten(0, 1)  # [2n, h, w, C]


class Norm(nn.Module):
    """Root mean square norm over the channels: [..., C] of any float type -> the same in fp32."""

    def __init__(self, channels: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        unit = x * (math.sqrt(x.shape[-1]) / length.clamp_min_(1e-12))
        return unit.mul_(self.gamma.flatten())


def causal(conv: nn.Module, x: Tensor, history: History, norm: nn.Module | None = None) -> Tensor:
    """Convolves every frame with the two before it, 3 x 3 x 3; zeros lie before the first.

    Given a norm, the convolution sees SiLU(norm(x)) in place of x. x [n, H, W, C].
    """
    if conv not in history:
        history[conv] = x.new_zeros(2, *x.shape[1:])
    window = x.new_empty(2 + len(x), *x.shape[1:])
    window[:2] = history[conv]
    # One frame at a time, because the norm's fp32 result would be the largest tensor of the step.
    for frame, slot in zip(x, window[2:], strict=True):
        slot.copy_(frame if norm is None else F.silu(norm(frame), inplace=True))
    history[conv].copy_(window[-2:])
    return conv(window)


class FrameConv(nn.Conv3d):
    """Conv3d on frames [n, H, W, C], padded in space and not in time."""

    def __init__(
        self, channels_in: int, channels_out: int, *, size: int = 3, time_stride: int = 1
    ) -> None:
        kernel, stride, border = (3, size, size), (time_stride, 1, 1), (0, size // 2, size // 2)
        super().__init__(channels_in, channels_out, kernel, stride=stride, padding=border)
        self.border = border

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.bias)

    def convolve(self, frames: Tensor, bias: Tensor | None) -> Tensor:
        """Convolves; `bias` is None where the caller adds it later."""
        x = frames[None].permute(0, 4, 1, 2, 3)  # so that PyTorch sees that channels are last
        if x.device.type == "cpu" and x.dtype == torch.float32:
            # The oneDNN kernel that conv3d runs as well, but conv3d judges a clip by C * T * H
            # alone and gives small ones to a loop that takes five times as long.
            y = torch.mkldnn_convolution(
                x, self.weight, bias, self.border, self.stride, self.dilation, self.groups
            )
        else:
            y = F.conv3d(x, self.weight, bias, self.stride, self.border)
        return y.permute(0, 2, 3, 4, 1)[0].contiguous()  # no copy, except of some small ones


def pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Applies a convolution of size 1, which is one matrix for every position."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def in_layout(weight: Tensor) -> Tensor:
    """The weight in the memory layout that convolutions want; no copy if it has that already."""
    return weight.contiguous(memory_format=_LAYOUTS.get(weight.ndim, torch.contiguous_format))


def _each_frame(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _row(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)


def check_latents(latents: Tensor) -> None:
    """Raises `EngineError` if these are not latents [16, t, h, w]."""
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS or not latents.numel():
        raise EngineError(
            f"The VAE decodes latents [{LATENT_CHANNELS}, t, h, w], not {list(latents.shape)}."
        )


def _check_step(count: int, multiple: int, history: History) -> None:
    if history and (count % multiple or not count):
        raise EngineError(
            f"After the first, the VAE takes {multiple}n frames at a time, not {count}; trim the "
            f"clip to {multiple}k + 1."
        )
    if not history and count != 1:
        raise EngineError(f"A stream of the VAE begins with one frame, not {count}.")


def _rechunk(pieces: Iterable[Tensor], step: int) -> Iterator[Tensor]:
    """Frames [3, n, H, W] in pieces of any n -> first 1 frame, then `step`, and what is left."""
    wanted, held = 1, list[Tensor]()
    size: tuple[int, ...] | None = None
    for piece in pieces:
        size = size or tuple(piece.shape[2:])
        _check_piece(piece, size)
        while piece.shape[1]:
            missing = wanted - sum(part.shape[1] for part in held)
            held.append(piece[:, :missing])
            piece = piece[:, missing:]
            if held[-1].shape[1] == missing:
                yield torch.cat(held, dim=1)
                wanted, held = step, []
    if held:
        yield torch.cat(held, dim=1)


def _check_piece(piece: Tensor, size: tuple[int, ...]) -> None:
    stride = VAE_STRIDE[1]
    if piece.ndim != 4 or piece.shape[0] != 3 or not piece.is_floating_point():
        raise EngineError(
            f"The VAE encodes frames [3, n, H, W] of floats in -1..1, not {piece.dtype} "
            f"{list(piece.shape)}."
        )
    height, width = piece.shape[2:]
    if (height, width) != size or height % stride or width % stride or not height * width:
        raise EngineError(
            f"The VAE got a frame of {width}x{height} in a clip of {size[1]}x{size[0]}; all frames "
            f"need one size, with sides that are multiples of {stride}."
        )


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> Vae:
    """Loads `Wan2.1_VAE.pth` or a safetensors copy of it, of any width, ready to run.

    Names are the official ones (docs/reference/encoders.md 1.5); copies that have `model.` in front
    of every name are taken too.
    Raises `MissingModel` if there is no such file, `BadCheckpoint` if it is not this VAE.
    """
    # Here: a machine that only measures draws its weights, and has nothing to read files with.
    from engine.models.fill import Stored, fill
    from engine.models.tensorfile import TensorFile

    file = TensorFile(path)
    prefix = "model." if f"model.{_FIRST}" in file else ""
    first = file.shape(prefix + _FIRST) if prefix + _FIRST in file else ()
    width, *rest = first or (0,)  # a scalar has no width either
    if not width or rest != [3, 3, 3, 3]:
        raise BadCheckpoint(
            f"{path.name} is not a Wan 2.1 VAE: among its {len(file)} tensors there is no {_FIRST} "
            "[width, 3, 3, 3, 3]. Expected Wan2.1_VAE.pth or a copy of it with the same names."
        )
    with torch.device("meta"):
        vae = Vae(width)
    stored = {name: Stored(prefix + name) for name in vae.state_dict()}
    fill(vae, file, stored, _NOTHING, device, dtype)
    for name, weight in vae.named_parameters():
        if not weight.isfinite().all():
            raise BadCheckpoint(
                f"{path.name}: {name} holds values that are not finite in {dtype}. If the file is "
                "right, load it in another type; otherwise fetch it again."
            )
        weight.data = in_layout(weight)
    return vae.requires_grad_(False).eval()
