"""How far a stage is, told while it runs to whoever waits for the clip."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from engine.denoise.windows import WindowVelocity, in_latents, windows
from engine.flow import Recipe

# stage, share of it that is done; called between forwards, and what it raises ends the job
Watch: TypeAlias = Callable[[str, float], None]


def unwatched(stage: str, share: float) -> None:
    """Nobody waits."""


def evaluations(recipe: Recipe, latents: int) -> int:
    """How often the velocity of a window is asked for, in all steps of a clip."""
    cut = in_latents(recipe.window_frames, recipe.overlap_frames)
    return sum(len(windows(step, latents, cut)) for step in range(recipe.steps))


def watched(velocity: WindowVelocity, total: int, watch: Watch) -> WindowVelocity:
    """Tells `watch` after each of `total` evaluations."""
    done = 0

    def told(latents: Tensor, frames: Sequence[int], step: int, timestep: float) -> Tensor:
        nonlocal done
        found = velocity(latents, frames, step, timestep)
        if found.is_cuda:  # the host would queue the whole clip, and nothing could be called off
            torch.cuda.current_stream(found.device).synchronize()
        done += 1
        watch("denoise", done / total)
        return found

    return told
