"""Makes the velocity of a clip's windows, guided as a recipe says, from a model told one text."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.denoise.sampler import guided
from engine.denoise.windows import WindowVelocity, sees_skeleton
from engine.errors import BadCheckpoint
from engine.flow import Conditions, Recipe
from engine.machine.resident import Resident

# latents [16, t, h, w], step index, timestep, skeleton [16, t, h/2, w/2] or None -> velocity
GuidedForward: TypeAlias = Callable[[Tensor, int, float, Tensor | None], Tensor]


class Denoiser(Protocol):
    """A loaded transformer: `engine.denoise.exact` or `engine.denoise.packaged`."""

    @property
    def name(self) -> str:
        """Names what it was loaded from, for messages."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def home(self) -> Resident:
        """The home of its blocks, which decides if they stay on the device between clips."""
        ...

    @property
    def recorded(self) -> nn.Module | None:
        """The module whose linears can be recorded, if there is one."""
        ...

    def bind(self, conditions: Conditions, recipe: Recipe) -> WindowVelocity:
        """The velocity of any window of the clip, guided as the recipe says."""
        ...


def texts(conditions: Conditions) -> list[Tensor]:
    """The prompt of a clip, then its negative one if it has one: [L, text_dim] each."""
    return [text for text in (conditions.text, conditions.negative) if text is not None]


def bind(forwards: Sequence[GuidedForward], recipe: Recipe, pose: Tensor) -> WindowVelocity:
    """Joins `forwards`, the model told each of a clip's `texts`, to a guided velocity.

    `pose` is the skeleton of the whole clip [16, t, h/2, w/2] on the device of the model. It is
    seen from the recipe's `pose_from` until before `pose_until`, which are shares of all steps.
    """

    def showing(forward: GuidedForward) -> WindowVelocity:
        def velocity(latents: Tensor, frames: Sequence[int], step: int, timestep: float) -> Tensor:
            seen = pose[:, list(frames)] if sees_skeleton(recipe, step) else None
            return forward(latents, step, timestep, seen)

        return velocity

    toward, *away = (showing(forward) for forward in forwards)
    return guided(toward, away[0] if away else None, recipe.cfg)


def check_widths(conditions: Conditions, config: ModelConfig, name: str) -> None:
    """Raises `BadCheckpoint` for features of encoders that the model `name` was not trained on."""
    for what, width, wanted in (
        ("text encoder", conditions.text.shape[1], config.text_dim),
        ("image encoder", conditions.vision.shape[1], config.clip_dim),
    ):
        if width != wanted:
            raise BadCheckpoint(
                f"The {what} makes features {width} wide, {name} takes {wanted}: they do not "
                "belong together."
            )
