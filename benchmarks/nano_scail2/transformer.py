"""SCAIL-2's transformer, differentiable and for batches: what `engine.models.dit` computes.

Blocks, texts and head are those of `benchmarks/nano/transformer.py`; new are the masks, the clean
history and the two placements of the picture (docs/reference/scail2.md 3). All clips of a batch
have the same mode. B clips, t latent frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.nano.transformer import Known, Texts, flatten, masked, velocity_of
from engine.config import ModelConfig
from engine.flow import Mode
from engine.models.dit import PATCH, Scail, rope_tables

QUIET = 0.05  # spread of the fresh weights of the mask's embedding


@dataclass(frozen=True, slots=True)
class DrivenConditions:
    """Everything that is known about a batch of clips."""

    texts: Tensor  # [B] numbers of texts
    vision: Tensor  # [B, 257, clip_dim]; in training fewer, drawn at random
    mode: Mode
    reference: Tensor  # [B, 16, 1, h, w]
    reference_mask: Tensor  # [B, 28, 1, h, w]
    driving: Tensor  # [B, 16, t, h/2, w/2]
    driving_mask: Tensor  # [B, 28, t, h/2, w/2]
    history: Tensor | None = None  # [B, 16, n, h, w] of the clip before: its first n latents


def velocity(
    model: Scail, texts: Texts, latents: Tensor, timesteps: Tensor, known: DrivenConditions
) -> Tensor:
    """Latents [B, 16, t, h, w], timesteps [B] of 0..1000 -> velocity, same shape.

    Where there is history it takes the place of the latents; the velocity there says nothing.
    """
    _, _, t, h, w = latents.shape
    grid = t, h // PATCH[1], w // PATCH[2]
    video = masked(latents, 0.0)
    if known.history is not None:
        n = known.history.shape[2]
        video = torch.cat([masked(known.history, 1.0), video[:, :, n:]], dim=2)
    picture = torch.cat([masked(known.reference, 1.0), video], dim=2)
    b, channels, _, *size = known.reference_mask.shape
    unmasked = known.reference_mask.new_zeros(b, channels, t, *size)
    roles = torch.cat([known.reference_mask, unmasked], dim=2)
    embed_mask = model.patch_embedding_mask
    assert embed_mask is not None
    tokens = torch.cat(
        [
            flatten(model.patch_embedding(picture) + embed_mask(roles)),
            flatten(
                model.patch_embedding_pose(masked(known.driving, 1.0))
                + embed_mask(known.driving_mask)
            ),
        ],
        dim=1,
    )
    rope = rope_tables(grid, True, tokens.device, 0, known.mode)
    told = Known(known.texts, known.vision)
    return velocity_of(model, texts, tokens, rope, grid, timesteps, told).reshape(latents.shape)


def masked_transformer(config: ModelConfig, unmasked: dict[str, Tensor]) -> Scail:
    """A SCAIL-2 that begins as a Preview of the same size: its masks say nearly nothing yet."""
    model = Scail(config)
    embed_mask = model.patch_embedding_mask
    assert embed_mask is not None
    nn.init.normal_(embed_mask.weight, std=QUIET)
    assert embed_mask.bias is not None
    nn.init.zeros_(embed_mask.bias)
    fresh = {f"patch_embedding_mask.{name}": w for name, w in embed_mask.state_dict().items()}
    model.load_state_dict({**{name: w.float() for name, w in unmasked.items()}, **fresh})
    return model
