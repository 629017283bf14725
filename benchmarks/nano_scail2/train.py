"""Trains the nano SCAIL-2 by rectified flow; run again, it goes on where it stopped.

It begins as the nano Preview. Each step has one mode; some have two latents of clean history, which
the network is told of and not judged by (docs/reference/scail2.md 7).
"""

import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.nano.train import (
    CROSS,
    EMPTY,
    NO_TEXT,
    PROMPTS,
    SHIFT,
    VISION_SEEN,
    VISION_TOKENS,
    Batch,
)
from benchmarks.nano.training import StepLoss, train
from benchmarks.nano.transformer import Texts, texts_of
from benchmarks.nano_scail2.latents import SHARES, Encoded, load
from benchmarks.nano_scail2.scenes import MODES
from benchmarks.nano_scail2.transformer import DrivenConditions, masked_transformer, velocity
from engine.config import NANO_SCAIL2, VAE_STRIDE, state_dir
from engine.demo.presets import NANO_HOME
from engine.masks.colours import CLASSES, PERSONS
from engine.models.dit import Scail
from engine.models.locate import TEXT_ENCODER, find_model
from engine.models.text import embed_prompts

START = NANO_HOME / "diffusion_models" / "scail_nano_fp16.safetensors"
SEED = 12
BODY = 6.0  # added to the weight of the loss where people are
RATES = (0.015, 1.5e-3)  # of Muon and of Adam
HISTORY = 2  # latents that a later segment knows: 5 frames
GOES_ON = 0.35  # share of the long batches that have history
WORN = 0.15  # the most noise in history, which was decoded and encoded before it is seen
LOOK_AGAIN = 100  # steps after which scenes that were encoded meanwhile are loaded
PEOPLE = [[*CLASSES].index(name) for name in PERSONS[:2]]  # classes of a scene's persons

# Share of the training after which a row of chances for BATCHES holds.
BATCHES = (Batch(1, 16), Batch(2, 10), Batch(4, 6), Batch(5, 5))
CHANCES = (
    (0.0, (0.5, 0.3, 0.1, 0.1)),
    (0.2, (0.25, 0.25, 0.25, 0.25)),
    (0.5, (0.05, 0.1, 0.25, 0.6)),
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step is trained on."""

    clean: Tensor  # [B, 16, t, h, w]
    known: DrivenConditions
    weight: Tensor  # [B, 1, t, h, w] of the loss


def losses(model: Scail, texts: Texts, drawn: Drawn) -> Tensor:
    """Mean squared error of the velocity at random noise levels, one a clip."""
    clean, weight = drawn.clean, drawn.weight
    level = torch.rand(len(clean))
    sigma = SHIFT * level / (1 + (SHIFT - 1) * level)
    noise = torch.randn_like(clean)
    wide = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - wide) * clean + wide * noise
    with torch.autocast("cpu", torch.bfloat16):  # 1.6 times as fast where AVX-512 knows BF16
        found = velocity(model, texts, noisy, 1000 * sigma, drawn.known)
    return (weight * (found.float() - (noise - clean)).square()).mean() / weight.mean()


def people_weight(driving_mask: Tensor) -> Tensor:
    """[B, 28, t, h/2, w/2] -> [B, 1, t, h, w]: larger where somebody is."""
    channels = [
        position * len(CLASSES) + kind for position in range(VAE_STRIDE[0]) for kind in PEOPLE
    ]
    there = (driving_mask[:, channels].amax(1) > 0.02).float()
    return 1 + BODY * F.interpolate(there, scale_factor=2)[:, None]


class LatentPool:
    """Holds all encoded scenes, and loads those that are new when it is asked to."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.scenes: dict[str, Encoded] = {}
        self.look()

    def look(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.stem not in self.scenes:
                self.scenes[path.stem] = load(path)

    def draw(self, batch: Batch) -> Drawn:
        """Draws clips of one mode. Clips that go on begin where a segment does."""
        rng = self.rng
        mode = rng.choice(MODES)
        drawn = rng.choices(list(self.scenes.values()), k=batch.count)
        goes_on = batch.frames > HISTORY and rng.random() < GOES_ON
        starts = [
            0 if goes_on else rng.randint(0, one.driving.shape[1] - batch.frames) for one in drawn
        ]
        cuts = [slice(start, start + batch.frames) for start in starts]
        empty = rng.random() < NO_TEXT
        choices = EMPTY if empty else [n for n in range(len(PROMPTS)) if n not in EMPTY]

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(one, name) for one in drawn]).float()

        def cut(name: str) -> Tensor:
            whole = [getattr(one, name)[:, part] for one, part in zip(drawn, cuts, strict=True)]
            return torch.stack(whole).float()

        clean, driving_mask = cut(mode), cut(f"{mode}_driving_mask") / SHARES
        weight, history = people_weight(driving_mask), None
        if goes_on:
            history = clean[:, :, :HISTORY]
            worn = WORN * torch.rand(batch.count, 1, 1, 1, 1)
            history = history + worn * torch.randn_like(history)
            weight[:, :, :HISTORY] = 0.0
        return Drawn(
            clean,
            DrivenConditions(
                texts=torch.tensor(rng.choices(choices, k=batch.count)),
                vision=stacked("vision")[:, self._seen()],
                mode=mode,
                reference=stacked("reference"),
                reference_mask=stacked(f"{mode}_reference_mask") / SHARES,
                driving=cut("driving"),
                driving_mask=driving_mask,
                history=history,
            ),
            weight,
        )

    def _seen(self) -> list[int]:
        """The class token and some of the others: their mean says the same, for a quarter."""
        return [0, *self.rng.sample(range(1, VISION_TOKENS), VISION_SEEN)]


def train_transformer(latents: Path, folder: Path, models: Path, minutes: float) -> None:
    """Leaves scail2.pt in the folder, which has the average of the weights too."""
    torch.manual_seed(SEED)
    encoder, cpu = find_model(models, TEXT_ENCODER), torch.device("cpu")
    texts = texts_of(embed_prompts(PROMPTS, encoder, models, state_dir(), cpu, torch.float32))
    model = masked_transformer(NANO_SCAIL2, load_file(START))
    inner = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and CROSS not in name]
    rng = random.Random(SEED)
    pool = LatentPool(latents, rng)
    steps = 0

    def loss_of(done: float) -> StepLoss:
        nonlocal steps
        steps += 1
        if steps % LOOK_AGAIN == 0:
            pool.look()
        chances = [row for since, row in CHANCES if done >= since][-1]
        batch = rng.choices(BATCHES, chances)[0]
        drawn = pool.draw(batch)
        known = drawn.known
        kind = f"{batch.frames}{known.mode[0]}{'h' if known.history is not None else ''}"
        return StepLoss(losses(model, texts, drawn), kind, len(pool.scenes))

    path = folder / "scail2.pt"
    train(path, model, inner, rng, SEED, minutes, RATES, loss_of, average=deepcopy(model))
