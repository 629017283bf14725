"""Has the exact model perform a scene, of one segment or of several that know how the last ended.

Everything that the network is told is made here from pictures and masks, as the engine does it.
Sources: docs/reference/scail2.md 6, 7 and 10.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.nano_scail2.scenes import FRAMES, Frames, Mode, Scene, driving_mask, picture_mask
from engine.config import MASK_CHANNELS, ROLE_CHANNELS, state_dir
from engine.denoise.sampler import denoise, noise_like, seeded
from engine.denoise.segments import kept, plan
from engine.flow import Recipe, Roles
from engine.masks.colours import driving_channels, reference_channels
from engine.media.framing import frames_to_u8, image_to_network, skeleton_to_network
from engine.models.dit import Context, Scail
from engine.models.locate import IMAGE_ENCODER, TEXT_ENCODER, VAE, find_model
from engine.models.text import embed_prompts
from engine.models.vae import Vae, load_vae
from engine.models.vision import VisionEncoder
from engine.recipes import PROMPT

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Troupe:
    """The transformer and the models beside it."""

    model: Scail
    vae: Vae
    vision: VisionEncoder
    text: Tensor  # [512, text_dim]


@dataclass(frozen=True, slots=True)
class Given:
    """What goes in: pictures and masks of one size. The mode is told by its masks and by name."""

    mode: Mode
    picture: Frames  # [H, W, 3]
    picture_mask: Frames  # [1, H, W, 3]
    driving: Frames  # [T, H, W, 3]
    driving_mask: Frames  # [T, H, W, 3]


def given(scene: Scene, mode: Mode) -> Given:
    return Given(
        mode,
        scene.picture.frames[0],
        picture_mask(scene, mode),
        scene.driving.frames,
        driving_mask(scene, mode),
    )


def troupe(model: Scail, models: Path) -> Troupe:
    encoder = find_model(models, TEXT_ENCODER)
    [text] = embed_prompts([PROMPT], encoder, models, state_dir(), CPU, torch.float32)
    return Troupe(
        model,
        load_vae(find_model(models, VAE), CPU, torch.float32),
        VisionEncoder(find_model(models, IMAGE_ENCODER), CPU, torch.float32),
        text,
    )


@torch.inference_mode()
def perform(troupe: Troupe, given: Given, recipe: Recipe, seed: int) -> Frames:
    """Makes the frames [T, H, W, 3] u8."""
    model = troupe.model
    image = image_to_network(torch.from_numpy(given.picture))
    context = model.embed_context(troupe.text, troupe.vision(image))
    reference = troupe.vae.encode([image[:, None]])
    generator = seeded(seed)
    made = image.new_empty(3, 0, *image.shape[1:])  # finished frames in -1..1
    segments = plan("even", len(given.driving), FRAMES)
    for segment, part in zip(segments, kept(segments), strict=True):
        seen = segment.driving
        history = None
        if segment.history_frames:
            history = troupe.vae.encode([made[:, segment.history]])
        shown = replace(given, driving=given.driving[seen], driving_mask=given.driving_mask[seen])
        latents = _segment(troupe, shown, context, reference, history, recipe, generator)
        frames = torch.cat(list(troupe.vae.decode(latents)), dim=1)[:, part]
        made = torch.cat([made, frames], dim=1)
    return frames_to_u8(made).numpy()


def _segment(
    troupe: Troupe,
    given: Given,
    context: Context,
    reference: Tensor,
    history: Tensor | None,
    recipe: Recipe,
    generator: torch.Generator,
) -> Tensor:
    """The latents [16, t, h, w] of one segment; its first stay as history has them."""
    driving = troupe.vae.encode([skeleton_to_network(torch.from_numpy(given.driving))])
    shape = (*driving.shape[:2], *reference.shape[2:])
    roles = Roles(
        given.mode,
        reference_channels(image_to_network(torch.from_numpy(given.picture_mask[0]))),
        driving_channels(torch.from_numpy(given.driving_mask)),
        reference[:, :0],
        reference.new_zeros(ROLE_CHANNELS, 0, *reference.shape[2:]),
    )
    noise, known, count = noise_like(shape, generator), None, 0
    if history is not None:
        count = history.shape[1]
        noise[:, :count] = history
        known = torch.zeros(MASK_CHANNELS, *shape[1:])
        known[:, :count] = 1

    def velocity(latents: Tensor, step: int, timestep: float) -> Tensor:
        found = troupe.model(
            latents, timestep, context, reference, driving, history=known, roles=roles
        )
        found[:, :count] = 0.0
        return found

    return denoise(velocity, noise, recipe, lambda: noise_like(shape, generator), lambda _: None)
