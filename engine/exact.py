"""A checkpoint run as it is, in plain PyTorch: slow, and what every package is compared with."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.flow import Conditions, Recipe
from engine.models.attention import Attention
from engine.models.checkpoint import Checkpoint, load_transformer
from engine.models.dit import Scail
from engine.sampler import guided
from engine.windows import WindowVelocity


class ExactDenoiser:
    """Owns a transformer and its weights."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: Attention
    ) -> None:
        self.device = device
        self.checkpoint = checkpoint
        self._dtype, self._attention = dtype, attention

    @cached_property
    def model(self) -> Scail:
        """Loaded when first used: by then the text encoder has made room for it."""
        return load_transformer(self.checkpoint, self.device, self._dtype, self._attention)

    def bind(self, conditions: Conditions, recipe: Recipe) -> WindowVelocity:
        """The velocity of any window of the clip, guided as the recipe says."""
        self._check(conditions)
        reference, vision = conditions.reference.to(self.device), conditions.vision.to(self.device)
        pose = conditions.pose.to(self.device)
        steps_with_pose = recipe.pose_until * recipe.steps

        def toward(text: Tensor) -> WindowVelocity:
            with torch.inference_mode():
                context = self.model.embed_context(text.to(self.device), vision)

            def velocity(
                latents: Tensor, frames: Sequence[int], step: int, timestep: float
            ) -> Tensor:
                seen = pose[:, list(frames)] if step < steps_with_pose else None
                with torch.inference_mode():
                    return self.model(latents, timestep, context, reference, seen)

            return velocity

        away = None if conditions.negative is None else toward(conditions.negative)
        return guided(toward(conditions.text), away, recipe.cfg)

    def _check(self, conditions: Conditions) -> None:
        config = self.checkpoint.config
        for what, width, wanted in (
            ("text encoder", conditions.text.shape[1], config.text_dim),
            ("image encoder", conditions.vision.shape[1], config.clip_dim),
        ):
            if width != wanted:
                raise BadCheckpoint(
                    f"The {what} makes features {width} wide, {self.checkpoint.path.name} takes "
                    f"{wanted}: they do not belong together."
                )
