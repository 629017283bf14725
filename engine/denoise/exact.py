"""Runs a checkpoint as it is, in plain PyTorch: slow, and the measure of every package."""

from functools import cached_property, partial

import torch
from torch import Tensor

from engine.denoise.guidance import Seen, bind, check_widths, texts
from engine.denoise.windows import WindowVelocity
from engine.flow import Conditions, Recipe
from engine.machine.resident import Resident
from engine.models.attention import Attention
from engine.models.checkpoint import Checkpoint, load_transformer
from engine.models.dit import Context, Scail


class ExactDenoiser:
    """Owns a transformer and its weights."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: Attention
    ) -> None:
        self.device = device
        self.checkpoint = checkpoint
        self.home = Resident()
        self._dtype, self._attention = dtype, attention

    @cached_property
    def model(self) -> Scail:
        """The transformer, loaded when first used: then the text encoder has made room for it."""
        return load_transformer(self.checkpoint, self.device, self._dtype, self._attention)

    @property
    def recorded(self) -> Scail:
        return self.model

    @property
    def name(self) -> str:
        return self.checkpoint.path.name

    def bind(self, conditions: Conditions, recipe: Recipe) -> WindowVelocity:
        check_widths(conditions, self.checkpoint.config, self.name)
        reference, vision = conditions.reference.to(self.device), conditions.vision.to(self.device)
        strength = recipe.pose_strength

        with torch.inference_mode():
            contexts = [
                self.model.embed_context(text.to(self.device), vision) for text in texts(conditions)
            ]

        @torch.inference_mode()
        def forward(
            context: Context, latents: Tensor, step: int, timestep: float, seen: Seen
        ) -> Tensor:
            return self.model(
                latents, timestep, context, reference, seen.pose, seen.history, strength, seen.roles
            )

        forwards = [partial(forward, context) for context in contexts]
        return bind(forwards, recipe, conditions, self.device)
