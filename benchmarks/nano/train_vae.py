"""Trains the nano VAE on crops of scenes; run again, it goes on where it stopped.

python -m benchmarks.nano.train_vae SCENES FOLDER --minutes 25
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import LATENT_CHANNELS
from engine.media.framing import skeleton_to_network
from engine.models.vae import LATENT_MEAN, LATENT_STD, Down, FrameConv, ResBlock, Up, Vae

from .autoencoder import decode, encode
from .optimizer import NanoOptimizer
from .scenes import read
from .training import Log, keep, resume, schedule

WIDTH = 8
SEED = 1
BATCH = 4
NOISE = 0.12  # added to latents of spread 1, so that their neighbourhood decodes as they do
HELD = 300  # scenes in memory at a time
STEADY = 3.0  # the constant beside colours before a head
RATES = (0.006, 1e-3)  # of Muon and of AdamW


@dataclass(frozen=True, slots=True)
class Crop:
    """What a step looks at."""

    frames: int
    height: int
    width: int
    skeleton: bool
    batch: int
    share: float  # of the steps


PICTURES = (Crop(1, 64, 64, False, 8, 0.8), Crop(1, 64, 48, True, 8, 0.2))
CLIPS = (
    Crop(1, 96, 96, False, 4, 0.1),
    Crop(5, 64, 64, False, BATCH, 0.4),
    Crop(9, 48, 48, False, BATCH, 0.3),
    Crop(9, 64, 48, True, 2, 0.2),
)
STILL = 0.35  # share of the time in which it sees pictures alone


def fresh_vae(width: int = WIDTH) -> Vae:
    """Residual branches start at zero, and the mean colour of each cell passes from end to end.

    No convolution sees the past at first: what is learned on pictures holds for clips.

    Channels 0 to 2 carry it, all others start at random. Before a head they come with both signs,
    as silu(x) - silu(-x) = x, beside a constant that keeps the norm from dividing by their length.
    """
    vae = Vae(width)
    for module in vae.modules():
        if isinstance(module, FrameConv):
            nn.init.zeros_(module.weight[:, :, :-1])
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.residual["6"].weight)
            nn.init.zeros_(module.residual["6"].bias)
    encoder, decoder = vae.encoder, vae.decoder
    downs = [layer for layer in encoder.downsamples if isinstance(layer, Down)]
    ups = [layer for layer in decoder.upsamples if isinstance(layer, Up)]
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
                nn.init.zeros_(layer.time_conv.weight)
                nn.init.zeros_(layer.time_conv.bias)
                taps, count = ((1, 2), 1) if isinstance(layer, Down) else ((2,), 2)
                same = torch.eye(layer.time_conv.weight.shape[1]).repeat(count, 1) / len(taps)
                for tap in taps:
                    layer.time_conv.weight[:, :, tap, 0, 0] = same
        for last, head in ((downs[-1], encoder.head["2"]), (ups[-1], decoder.head["2"])):
            conv = last.resample["1"]
            conv.weight[3:6], conv.bias[3:6] = -conv.weight[:3], 0.0
            conv.weight[6], conv.bias[6] = 0.0, STEADY
            _pass(head, (-1, 1, 1))
            head.weight[[0, 1, 2], [3, 4, 5], -1, 1, 1] = -1.0
        _pass(vae.conv1, (0, 0, 0))
        _pass(vae.conv2, (0, 0, 0))
        mean, std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
        rows = slice(0, len(mean))
        vae.conv1.weight[rows] *= std.view(-1, 1, 1, 1, 1)
        vae.conv1.bias[rows] = mean
        vae.conv2.weight.copy_(vae.conv2.weight / std.view(-1, 1, 1, 1))
        vae.conv2.bias.copy_(-vae.conv2.weight.flatten(1) @ mean)
    return vae


@torch.no_grad()
def normalise(vae: Vae, clips: Tensor) -> None:
    """Folds into the outermost layers what gives latents of clips [B, 3, T, H, W] mean 0, spread 1.

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


def _pass(conv: nn.Module, taps: tuple[int | slice, ...], share: float = 1.0) -> None:
    """The first three channels go through as they are."""
    conv.weight[:3], conv.bias[:3] = 0.0, 0.0
    for channel in range(3):
        conv.weight[(channel, channel, *taps)] = share


def losses(vae: Vae, clips: Tensor) -> tuple[Tensor, Tensor]:
    """What is minimised, and the mean squared error of pixels in -1..1."""
    latents = encode(vae, clips)
    made = decode(vae, latents + NOISE * torch.randn_like(latents))
    off = made - clips
    edges = sum(off.diff(dim=axis).abs().mean() for axis in (-1, -2))
    spread = latents.transpose(0, 2).flatten(1)  # [16, cells]
    unit = spread.mean(1).square().mean() + (spread.std(1) - 1).square().mean()
    return off.abs().mean() + 0.5 * edges + 0.02 * unit, off.square().mean().detach()


class Pool:
    """Some scenes in memory, exchanged little by little; more of them may appear meanwhile."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.held: list[tuple[Tensor, Tensor]] = []

    def crop(self, crop: Crop) -> Tensor:
        """[B, T, 3, H, W] in -1..1."""
        return torch.stack([self._one(crop) for _ in range(crop.batch)])

    def _one(self, crop: Crop) -> Tensor:
        if len(self.held) < HELD or self.rng.random() < 0.2:
            found = read(self.rng.choice(list(self.folder.glob("*[0-9].npz"))))
            half = skeleton_to_network(torch.from_numpy(found.skeleton))
            self.held.append((torch.from_numpy(found.frames), (half * 127.5 + 127.5).byte()))
            self.held = self.held[-HELD:]
        frames, half = self.rng.choice(self.held)
        clip = half.transpose(0, 1) if crop.skeleton else frames.permute(0, 3, 1, 2)
        t, _, h, w = clip.shape
        place: Callable[[int], int] = lambda room: self.rng.randint(0, room)  # noqa: E731
        t, y, x = place(t - crop.frames), place(h - crop.height), place(w - crop.width)
        clip = clip[t : t + crop.frames, :, y : y + crop.height, x : x + crop.width]
        return clip.float() / 127.5 - 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenes", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=25.0, help="of the whole training")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    vae = fresh_vae()
    inner = [p for p in vae.parameters() if p.ndim >= 3 and min(p.shape[0], p.shape[1]) >= 8]
    chosen = {id(p) for p in inner}
    optimizer = NanoOptimizer(inner, [p for p in vae.parameters() if id(p) not in chosen])
    pool = Pool(args.scenes, random.Random(SEED))
    normalise(vae, torch.cat([pool.crop(PICTURES[0]) for _ in range(4)]).transpose(1, 2))
    state = resume(args.folder / "vae.pt", vae, optimizer)
    rng = random.Random(SEED + state.step)
    pool.rng, log = rng, Log(args.folder / "vae.csv")
    started = time.monotonic() - state.seconds
    while (spent := time.monotonic() - started) < 60 * args.minutes:
        rate = schedule(state.step, spent / (60 * args.minutes))
        optimizer.set_rates(rate * RATES[0], rate * RATES[1])
        crops = PICTURES if spent < STILL * 60 * args.minutes else CLIPS
        crop = rng.choices(crops, [crop.share for crop in crops])[0]
        loss, error = losses(vae, pool.crop(crop))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        state.step, state.seconds = state.step + 1, time.monotonic() - started
        kind = f"{crop.frames}{'s' if crop.skeleton else ''}"
        log.add(state.step, state.seconds, kind, loss.item(), -10 * float(torch.log10(error / 4)))
        if state.step % 50 == 0:
            keep(args.folder / "vae.pt", vae, optimizer, state)
    keep(args.folder / "vae.pt", vae, optimizer, state)


if __name__ == "__main__":
    main()
