"""The VAE's decoder for a GPU: the numbers of `Vae.decode` with a fraction of its memory traffic.

Nothing is joined. The norm before a causal convolution writes into the window that the convolution
reads and brings the past there (kernels/channel_norm.py). All windows share one piece of memory; a
clip remembers two frames for each convolution. Biases and residual sums ride with the next norm.

The step of one latent is always the same, on the same memory: the first is run, and is what cuDNN
chooses its algorithms by; then it is captured and replayed. The frames go to the host while the
next step runs. Source: docs/reference/encoders.md 1.4, 1.6 to 1.8.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import LATENT_CHANNELS, VAE_STRIDE
from engine.models.vae import (
    LATENT_MEAN,
    LATENT_STD,
    WIDTH,
    Decoder,
    FrameConv,
    Vae,
    check_latents,
    pointwise,
)
from engine.models.vae_layers import (
    Causal,
    Doubling,
    ResidualBlock,
    conv_steps,
    largest_pair,
    prepared_head,
    prepared_layers,
)
from kernels.channel_norm import PAST, ChannelNorm, carry

Finish: TypeAlias = Callable[[Tensor], Tensor]  # pixels [3, n, H, W] fp32 -> what is handed out
# Records the work of a function without doing it, and returns a function that does it.
DecodeRecorder: TypeAlias = Callable[[Callable[[], object]], Callable[[], None]]


class VaeDecoder:
    """Runs the weights of a `Vae`, which it neither copies nor changes. Between clips it keeps the
    buffers of one size (`decode_bytes`); clips that are decoded at once have their own.
    """

    def __init__(
        self, vae: Vae, norm: ChannelNorm, finish: Finish, capture: DecodeRecorder | None = None
    ) -> None:
        """`norm` launches the kernel, or is the reference. `finish` runs on the device as part of
        the step, and clamps. `capture` makes CUDA graphs; without it every step is run.
        """
        weight = vae.conv2.weight.detach()
        self.norm, self.finish, self.capture = norm, finish, capture
        self.mix, self.decoder, self.weight = vae.conv2, vae.decoder, weight
        self.layers, self.head = prepared_layers(vae.decoder), prepared_head(vae.decoder)
        # Divided by the rounded reciprocal, as in `Vae.decode_step`.
        self.share = torch.tensor(LATENT_STD, device=weight.device).reciprocal()
        self.mean = torch.tensor(LATENT_MEAN, device=weight.device)
        self.no_bias = torch.zeros(vae.decoder.conv1.out_channels, device=weight.device)
        self._idle: _Stream | None = None

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Normalised latents [16, t, h, w] -> on the host what `finish` makes of [3, 1, H, W], then
        of [3, 4, H, W] each. While a piece is with the caller the next one is computed.

        Raises `EngineError` at once if the latents cannot be used.
        """
        check_latents(latents)
        return self._decode(latents)

    def release(self) -> None:
        """Gives the buffers back; the next clip makes new ones."""
        self._idle = None

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        size = latents.shape[2], latents.shape[3]
        stream, self._idle = self._idle, None
        if stream is None or stream.size != size:
            del stream  # so that its memory is free for the next one
            stream = _Stream(self, size)
        waiting: Callable[[], Tensor] | None = None
        for number, latent in enumerate(latents.split(1, dim=1)):
            coming = to_host(stream.advance(latent, is_first=number == 0))
            if waiting is not None:
                yield waiting()
            waiting = coming
        assert waiting is not None
        yield waiting()
        self._idle = stream


class _Stream:
    """The buffers of a clip and the captured step. While a step runs, x [n, h, w, C], branch and
    bias are a sum that the next layer completes.
    """

    def __init__(self, net: VaeDecoder, size: tuple[int, int]) -> None:
        self.net, self.size = net, size
        steps = list(conv_steps(net.decoder, *size))
        self.latent = net.mean.new_zeros(LATENT_CHANNELS, 1, *size)
        self.histories = {step.conv: net.weight.new_zeros(step.history_shape) for step in steps}
        self.memory = net.weight.new_empty(max(step.window_values for step in steps))
        self.x = self._recorded = self.latent
        self.branch: Tensor | None = None
        self.bias = net.no_bias
        self._has_run = False
        self._replay: Callable[[], None] | None = None

    @torch.inference_mode()
    def advance(self, latent: Tensor, *, is_first: bool) -> Tensor:
        """Decodes the next latent [16, 1, h, w]. The result lasts until the next call."""
        self.latent.copy_(latent)
        if is_first:
            for history in self.histories.values():
                history.zero_()
            return self._step(is_first=True)
        if self.net.capture is None or not self._has_run:
            with fastest_convolutions():
                self._has_run = True
                return self._step()
        self._replay = self._replay or self.net.capture(self._record)
        self._replay()
        return self._recorded

    def _record(self) -> None:
        self._recorded = self._step()

    def _step(self, *, is_first: bool = False) -> Tensor:
        net, conv = self.net, self.net.decoder.conv1
        z = self.latent.permute(1, 2, 3, 0) / net.share + net.mean  # [1, h, w, 16]
        window = self._window(conv, 1, *self.size)
        window[PAST:] = pointwise(z.to(self.memory), net.mix)
        carry(window, self.histories[conv])
        self._begin(conv(window))
        for layer in net.layers:
            if isinstance(layer, ResidualBlock):
                self._block(layer)
            elif isinstance(layer, Doubling):
                self._double(layer, is_first=is_first)
            else:
                self._begin(layer(self._settled(self.x), {}))
        window = self._normed(net.head, self.x, self.branch, self.bias)
        self._begin(self.latent)  # the sum is in the window
        return net.finish(net.head.conv(window).float().permute(3, 0, 1, 2))

    def _block(self, block: ResidualBlock) -> None:
        window = self._normed(block.first, self.x, self.branch, self.bias)
        self._begin(self.x)
        if block.shortcut is not None:
            self.x = pointwise(self.x, block.shortcut)
        y = block.first.conv.convolve(window, None)
        window = self._normed(block.second, y, None, block.first.bias)
        del y  # its memory is the branch's
        self.branch, self.bias = block.second.conv.convolve(window, None), block.second.bias

    def _double(self, layer: Doubling, *, is_first: bool) -> None:
        """Doubles rows and columns and, except at the first frame of a clip, frames."""
        if layer.time_conv is None or is_first:
            self._begin(self._settled(self.x))
        else:
            conv = layer.time_conv
            window = self._window(conv, *self.x.shape[:3])
            self._settled(window[PAST:])
            carry(window, self.histories[conv])
            self._begin(conv(window))  # both frames of a pair side by side
            self.x = self.x.unflatten(-1, (2, -1)).movedim(3, 1).flatten(0, 1)
        cells = F.conv2d(self.x.permute(0, 3, 1, 2), layer.weight, padding=1)
        self._begin(cells.permute(0, 2, 3, 1).contiguous())
        del cells
        self._begin(_spread(self.x, layer.bias))

    def _begin(self, x: Tensor) -> None:
        """Makes x a complete sum, to which no branch is added."""
        self.x, self.branch, self.bias = x, None, self.net.no_bias[: x.shape[-1]]

    def _settled(self, out: Tensor) -> Tensor:
        """Completes the sum of a block, in `out`."""
        assert self.branch is not None
        return torch.add(self.x, self.branch, out=out).add_(self.bias)

    def _normed(self, layer: Causal, x: Tensor, branch: Tensor | None, bias: Tensor) -> Tensor:
        """Fills the window of a convolution, and completes x if there is a branch."""
        window = self._window(layer.conv, *x.shape[:3])
        self.net.norm(x, branch, bias, layer.gamma, window, self.histories[layer.conv])
        return window

    def _window(self, conv: FrameConv, frames: int, height: int, width: int) -> Tensor:
        shape = PAST + frames, height, width, conv.in_channels
        return self.memory[: math.prod(shape)].view(shape)


def _spread(cells: Tensor, bias: Tensor) -> Tensor:
    """Puts the pixels of cells in their places: [n, h + 1, w + 1, 4 C] -> [n, 2 h, 2 w, C].

    The second pixel of a cell, either way, was computed one cell further on.
    """
    count, height, width, channels = *cells.shape[:3], len(bias)
    shape = count, height - 1, 2, width - 1, 2, channels
    frame, row, column, _ = cells.stride()
    strides = frame, row, row + 2 * channels, column, column + channels, 1
    out = torch.add(cells.as_strided(shape, strides), bias, out=cells.new_empty(shape))
    return out.view(count, 2 * (height - 1), 2 * (width - 1), channels)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Lets cuDNN time its algorithms for the sizes it meets here and remember the best.

    Its guesses for convolutions of three dimensions may be far from the best.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def to_host(pixels: Tensor) -> Callable[[], Tensor]:
    """Starts a copy, in the order of the stream; the result waits for it and returns it."""
    if not pixels.is_cuda:
        copy = pixels.clone()
        return lambda: copy
    # PyTorch reuses pinned memory, once nobody holds the tensor.
    host = torch.empty_like(pixels, device="cpu", pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return host

    return wait


def decode_bytes(height: int, width: int, dtype: torch.dtype, vae_width: int = WIDTH) -> int:
    """The most bytes that decoding a clip of height x width pixels takes, without the weights, the
    decoded frames and cuDNN's workspace.

    It is the sum of two frames for each causal convolution, the largest window, and the two
    largest tensors between convolutions: 3.4 GB for 512 x 896 in half precision.
    """
    decoder = _outline(vae_width)
    size = height // VAE_STRIDE[1], width // VAE_STRIDE[2]
    steps = list(conv_steps(decoder, *size))
    kept = sum(math.prod(step.history_shape) for step in steps)
    window = max(step.window_values for step in steps)
    latent = LATENT_CHANNELS * size[0] * size[1] * torch.float32.itemsize
    return latent + (kept + window + largest_pair(decoder, *size)) * dtype.itemsize


@cache
def _outline(width: int) -> Decoder:
    """A decoder whose weights have shapes and no memory."""
    with torch.device("meta"):
        return Decoder(width)
