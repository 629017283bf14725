"""Trains the nano transformer by rectified flow; run again, it goes on where it stopped."""

import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.nano.latents import load
from benchmarks.nano.training import StepLoss, train
from benchmarks.nano.transformer import (
    BatchConditions,
    Texts,
    fresh_transformer,
    texts_of,
    velocity,
)
from engine.config import NANO, state_dir
from engine.models.dit import Scail
from engine.models.locate import TEXT_ENCODER, find_model
from engine.models.text import embed_prompts
from engine.recipes import NEGATIVE_PROMPT, PROMPT

SEED = 2
PROMPTS = (PROMPT, "a person dances", "someone dances in a room", "", NEGATIVE_PROMPT)
EMPTY = (3, 4)  # what stands for no prompt
NO_TEXT, NO_POSE = 0.1, 0.1  # shares of the steps
SHIFT = 3.0  # of the noise levels: more of the noisy ones, where poses are decided
BODY = 2.0  # added to the weight of the loss where the skeleton is
CROSS = ".cross_attn."  # has little to say here: Adam will do, and costs nothing
RATES = (0.015, 1.5e-3)  # of Muon and of Adam
VISION_TOKENS, VISION_SEEN = 257, 63


@dataclass(frozen=True, slots=True)
class Batch:
    """The latent frames of a window, and how many windows a step has."""

    frames: int
    count: int


# Share of the training after which a row of chances for BATCHES holds.
BATCHES = (Batch(1, 16), Batch(2, 10), Batch(3, 8), Batch(5, 5))
CHANCES = (
    (0.0, (0.6, 0.4, 0.0, 0.0)),
    (0.25, (0.25, 0.3, 0.25, 0.2)),
    (0.55, (0.05, 0.1, 0.25, 0.6)),
)


def losses(
    model: Scail, texts: Texts, clean: Tensor, known: BatchConditions, weight: Tensor
) -> Tensor:
    """Mean squared error of the velocity at random noise levels, one a clip."""
    level = torch.rand(len(clean))
    sigma = SHIFT * level / (1 + (SHIFT - 1) * level)
    noise = torch.randn_like(clean)
    wide = sigma.view(-1, 1, 1, 1, 1)
    found = velocity(model, texts, (1 - wide) * clean + wide * noise, 1000 * sigma, known)
    return (weight * (found - (noise - clean)).square()).mean() / weight.mean()


def body_weight(pose: Tensor) -> Tensor:
    """[B, 1, t, h, w]: larger where the skeleton is and next to it."""
    middle = pose.flatten(-2).median(-1).values[..., None, None]
    drawn = ((pose - middle).abs().mean(1) > 0.25).float()
    near = F.max_pool2d(drawn, 3, stride=1, padding=1)
    return 1 + BODY * F.interpolate(near, scale_factor=2)[:, None]


class LatentPool:
    """Holds all encoded scenes."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        self.scenes = [load(path) for path in sorted(folder.glob("*.safetensors"))]

    def batch(self, batch: Batch) -> tuple[Tensor, BatchConditions]:
        """Clean latents [B, 16, t, h, w] and all that is known of them."""
        drawn = self.rng.choices(self.scenes, k=batch.count)
        starts = [self.rng.randint(0, scene.clip.shape[1] - batch.frames) for scene in drawn]
        cuts = [slice(start, start + batch.frames) for start in starts]
        empty = self.rng.random() < NO_TEXT
        choices = EMPTY if empty else [n for n in range(len(PROMPTS)) if n not in EMPTY]
        has_pose = self.rng.random() >= NO_POSE
        pose = torch.stack([scene.pose[:, cut] for scene, cut in zip(drawn, cuts)]).float()
        clean = torch.stack([scene.clip[:, cut] for scene, cut in zip(drawn, cuts)]).float()
        return clean, BatchConditions(
            texts=torch.tensor(self.rng.choices(choices, k=batch.count)),
            vision=torch.stack([scene.vision for scene in drawn])[:, self._seen()].float(),
            reference=torch.stack([scene.reference for scene in drawn]).float(),
            pose=pose if has_pose else None,
        )

    def _seen(self) -> list[int]:
        """The class token and some of the others: their mean says the same, for a quarter."""
        return [0, *self.rng.sample(range(1, VISION_TOKENS), VISION_SEEN)]


def train_transformer(latents: Path, folder: Path, models: Path, minutes: float) -> None:
    """Leaves scail.pt in the folder, which has the average of the weights too."""
    torch.manual_seed(SEED)
    encoder, cpu = find_model(models, TEXT_ENCODER), torch.device("cpu")
    texts = texts_of(embed_prompts(PROMPTS, encoder, models, state_dir(), cpu, torch.float32))
    model = fresh_transformer(NANO)
    inner = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and CROSS not in name]
    rng = random.Random(SEED)
    pool = LatentPool(latents, rng)

    def loss_of(done: float) -> StepLoss:
        chances = [row for since, row in CHANCES if done >= since][-1]
        batch = rng.choices(BATCHES, chances)[0]
        clean, known = pool.batch(batch)
        weight = torch.ones(()) if known.pose is None else body_weight(known.pose)
        kind = f"{batch.frames}{'' if known.pose is not None else 'n'}"
        return StepLoss(losses(model, texts, clean, known, weight), kind, len(pool.scenes))

    path = folder / "scail.pt"
    train(path, model, inner, rng, SEED, minutes, RATES, loss_of, average=deepcopy(model))
