"""Trains the nano VAE on crops of scenes; run again, it goes on where it stopped."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.nano.autoencoder import decode, encode
from benchmarks.nano.scenes import read
from benchmarks.nano.start import fresh_vae, normalise
from benchmarks.nano.training import StepLoss, train
from engine.media.framing import skeleton_to_network
from engine.models.vae import Vae

WIDTH = 8
SEED = 1
BATCH = 4
NOISE = 0.12  # added to latents of spread 1, so that their neighbourhood decodes as they do
HELD = 300  # scenes in memory at a time
RATES = (0.006, 1e-3)  # of Muon and of Adam


@dataclass(frozen=True, slots=True)
class Crop:
    """The part of a scene that a step looks at."""

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


def losses(vae: Vae, clips: Tensor) -> tuple[Tensor, Tensor]:
    """The loss that is minimised, and the mean squared error of pixels in -1..1."""
    latents = encode(vae, clips)
    made = decode(vae, latents + NOISE * torch.randn_like(latents))
    off = made - clips
    edges = sum(off.diff(dim=axis).abs().mean() for axis in (-1, -2))
    spread = latents.transpose(0, 2).flatten(1)  # [16, cells]
    unit = spread.mean(1).square().mean() + (spread.std(1) - 1).square().mean()
    return off.abs().mean() + 0.5 * edges + 0.02 * unit, off.square().mean().detach()


class ScenePool:
    """Holds some scenes in memory, exchanged little by little."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.paths, self.rng = sorted(folder.glob("*[0-9].npz")), rng
        self.held: list[tuple[Tensor, Tensor]] = []

    def crop(self, crop: Crop) -> Tensor:
        """[B, T, 3, H, W] in -1..1."""
        return torch.stack([self._one(crop) for _ in range(crop.batch)])

    def _one(self, crop: Crop) -> Tensor:
        if len(self.held) < HELD or self.rng.random() < 0.2:
            found = read(self.rng.choice(self.paths))
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


def train_vae(scenes: Path, folder: Path, minutes: float) -> None:
    """Leaves vae.pt in the folder."""
    torch.manual_seed(SEED)
    vae = fresh_vae(WIDTH)
    inner = [p for p in vae.parameters() if p.ndim >= 3 and min(p.shape[0], p.shape[1]) >= 8]
    rng = random.Random(SEED)
    pool = ScenePool(scenes, rng)
    normalise(vae, torch.cat([pool.crop(PICTURES[0]) for _ in range(4)]).transpose(1, 2))

    def loss_of(done: float) -> StepLoss:
        crops = PICTURES if done < STILL else CLIPS
        crop = rng.choices(crops, [crop.share for crop in crops])[0]
        loss, error = losses(vae, pool.crop(crop))
        kind = f"{crop.frames}{'s' if crop.skeleton else ''}"
        return StepLoss(loss, kind, -10 * float(torch.log10(error / 4)))

    train(folder / "vae.pt", vae, inner, rng, SEED, minutes, RATES, loss_of)
