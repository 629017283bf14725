"""Makes the velocity of a clip's windows, guided as a recipe says, from a model told one text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from engine.config import MASK_CHANNELS, ModelConfig
from engine.denoise.sampler import guided
from engine.denoise.windows import WindowVelocity, sees_skeleton
from engine.errors import BadCheckpoint
from engine.flow import Conditions, Recipe, Roles
from engine.machine.resident import Resident


@dataclass(frozen=True, slots=True)
class Seen:
    """The conditions of a window that change with its frames, and with the step."""

    pose: Tensor | None  # [16, t, h/2, w/2]; None: the skeleton is not seen at this step
    history: Tensor | None  # [4, t, h, w], 1 where a frame is known; None: no frame is
    roles: Roles | None  # None: the model takes no masks


# latents [16, t, h, w], step index, timestep, what is seen -> velocity
GuidedForward: TypeAlias = Callable[[Tensor, int, float, Seen], Tensor]


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


def bind(
    forwards: Sequence[GuidedForward], recipe: Recipe, conditions: Conditions, device: torch.device
) -> WindowVelocity:
    """Joins `forwards`, the model told each of a clip's `texts`, to a guided velocity.

    The skeleton of the whole clip is moved to `device`, that of the model. It is seen from the
    recipe's `pose_from` until before `pose_until`, which are shares of all steps.
    """
    pose, known = conditions.pose.to(device), _known(conditions)
    roles = None if conditions.roles is None else conditions.roles.to(device)

    def seen_at(frames: list[int], step: int) -> Seen:
        return Seen(
            pose[:, frames] if sees_skeleton(recipe, step) else None,
            None if known is None else known[:, frames].to(device),
            None if roles is None else roles.at(frames),
        )

    def showing(forward: GuidedForward) -> WindowVelocity:
        def velocity(latents: Tensor, frames: Sequence[int], step: int, timestep: float) -> Tensor:
            return forward(latents, step, timestep, seen_at(list(frames), step))

        return velocity

    toward, *away = (showing(forward) for forward in forwards)
    return guided(toward, away[0] if away else None, recipe.cfg)


def _known(conditions: Conditions) -> Tensor | None:
    """Marks the frames of a clip that its history gives: [4, t, h, w], 1 in all four channels."""
    if conditions.history is None:
        return None
    frames, plane = conditions.pose.shape[1], conditions.reference.shape[2:]
    known = torch.zeros(MASK_CHANNELS, frames, *plane)
    known[:, : conditions.history.shape[1]] = 1
    return known


def check_widths(conditions: Conditions, config: ModelConfig, name: str) -> None:
    """Raises `BadCheckpoint` for features of encoders that the model `name` was not trained on."""
    assert (conditions.roles is not None) == bool(config.mask_dim)
    for what, width, wanted in (
        ("text encoder", conditions.text.shape[1], config.text_dim),
        ("image encoder", conditions.vision.shape[1], config.clip_dim),
    ):
        if width != wanted:
            raise BadCheckpoint(
                f"The {what} makes features {width} wide, {name} takes {wanted}: they do not "
                "belong together."
            )
