"""Trains the VAE of the nano Preview further, on vivid rooms and on videos at half size.

Run again, it goes on where it stopped.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.nano.start import normalise
from benchmarks.nano.train_vae import WIDTH, Crop, losses
from benchmarks.nano.training import StepLoss, train
from benchmarks.nano_scail2.scenes import MODES, Scene, read
from engine.demo.presets import NANO_HOME
from engine.media.framing import skeleton_to_network
from engine.models.vae import Vae

START = NANO_HOME / "vae" / "wan_2.1_vae.safetensors"
SEED = 11
HELD = 200  # scenes in memory at a time
RATES = (0.004, 6e-4)  # of Muon and of Adam
CROPS = (  # `skeleton` stands for the driving video at half size
    Crop(1, 64, 64, False, 8, 0.4),
    Crop(1, 96, 96, False, 4, 0.15),
    Crop(5, 64, 64, False, 4, 0.15),
    Crop(9, 48, 48, False, 4, 0.15),
    Crop(9, 64, 48, True, 3, 0.15),
)


class ScenePool:
    """Holds some scenes in memory, exchanged little by little; finds those that are new."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.held: list[tuple[list[Tensor], Tensor]] = []

    def crop(self, crop: Crop) -> Tensor:
        """[B, T, 3, H, W] in -1..1."""
        return torch.stack([self._one(crop) for _ in range(crop.batch)])

    def _one(self, crop: Crop) -> Tensor:
        if len(self.held) < HELD or self.rng.random() < 0.2:
            paths = sorted(self.folder.glob("*[0-9].npz"))
            self.held.append(_clips(read(self.rng.choice(paths))))
            self.held = self.held[-HELD:]
        full, half = self.rng.choice(self.held)
        clip = half if crop.skeleton else self.rng.choice(full)
        t, _, h, w = clip.shape
        place: Callable[[int], int] = lambda room: self.rng.randint(0, room)  # noqa: E731
        t, y, x = place(t - crop.frames), place(h - crop.height), place(w - crop.width)
        clip = clip[t : t + crop.frames, :, y : y + crop.height, x : x + crop.width]
        return clip.float() / 127.5 - 1


def _clips(scene: Scene) -> tuple[list[Tensor], Tensor]:
    """Clips [T, 3, H, W] u8 at full size, and the driving video at half size."""
    shown = [scene.driving, *(scene.targets[mode] for mode in MODES)]
    full = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in shown]
    half = skeleton_to_network(torch.from_numpy(scene.driving.frames)).transpose(0, 1)
    return full, (half * 127.5 + 127.5).byte()


def train_vae(scenes: Path, folder: Path, minutes: float) -> None:
    """Leaves vae.pt in the folder."""
    torch.manual_seed(SEED)
    vae = Vae(WIDTH)
    vae.load_state_dict({name: weight.float() for name, weight in load_file(START).items()})
    inner = [p for p in vae.parameters() if p.ndim >= 3 and min(p.shape[0], p.shape[1]) >= 8]
    rng = random.Random(SEED)
    pool = ScenePool(scenes, rng)
    normalise(vae, torch.cat([pool.crop(CROPS[0]) for _ in range(4)]).transpose(1, 2))

    def loss_of(_: float) -> StepLoss:
        crop = rng.choices(CROPS, [crop.share for crop in CROPS])[0]
        with torch.autocast("cpu", torch.bfloat16):  # 1.6 times as fast where AVX-512 knows BF16
            loss, error = losses(vae, pool.crop(crop))
        kind = f"{crop.frames}{'h' if crop.skeleton else ''}"
        return StepLoss(loss, kind, -10 * float(torch.log10(error / 4)))

    train(folder / "vae.pt", vae, inner, rng, SEED, minutes, RATES, loss_of)
