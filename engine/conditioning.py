"""Prompt, picture and skeleton of a clip as the encoders see them, for the transformer.

Each picture is encoded as one frame, skeleton or dance at half size, a stretch at a time.
Sources: docs/reference/denoiser.md 5, docs/reference/encoders.md 4, docs/reference/scail2.md.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.clock import over
from engine.config import ROLE_CHANNELS
from engine.errors import NotFinite
from engine.flow import Conditions, Request, RoleFrames, Roles, Source
from engine.machine.resident import Resident
from engine.masks.colours import driving_channels, reference_channels
from engine.media.framing import frames_to_network, skeleton_to_network
from engine.models.latent_colours import LatentColours
from engine.models.vae import Vae
from engine.models.vision import VisionEncoder

PIECE = 16  # frames of the motion encoded at once


@dataclass(frozen=True, slots=True)
class Encoders:
    """The models beside the transformer, and which of them are on the GPU only when used."""

    text: Callable[[Sequence[str]], list[Tensor]]  # prompts -> [512, text_dim] each
    vision: VisionEncoder
    vae: Vae
    decode: Callable[[Tensor], Iterator[Tensor]]  # latents [16, t, h, w] -> [n, H, W, 3] u8 each
    vision_home: Resident = field(default_factory=Resident)
    vae_home: Resident = field(default_factory=Resident)
    colours: Callable[[], LatentColours] | None = None  # for previews; None: there are none


@torch.inference_mode()
def condition_pictures(encoders: Encoders, request: Request, source: Source) -> Conditions:
    """Encodes what stays the same through a clip: prompts and pictures. Of the motion it has no
    frame yet.

    The negative prompt is encoded only if the recipe looks at it.
    """
    prompts = [request.settings.prompt]
    if request.settings.recipe.cfg != 1:
        prompts.append(request.settings.negative_prompt)
    text, *negative = encoders.text(prompts)
    with encoders.vision_home.present():
        vision = encoders.vision(source.image)
    if not vision.isfinite().all():
        raise NotFinite("The image encoder gives numbers that are not finite: its file is damaged.")
    shown = _shown(source, cuts=request.settings.recipe.cuts_reference)
    further = () if source.roles is None else source.roles.further
    with encoders.vae_home.present():
        reference = encoders.vae.encode([shown[:, None]])
        latents = [encoders.vae.encode([picture[:, None]]) for picture, _ in further]
    height, width = reference.shape[2:]
    return Conditions(
        text=text,
        negative=negative[0] if negative else None,
        vision=vision,
        reference=reference,
        pose=reference.new_zeros(len(reference), 0, height // 2, width // 2),
        roles=None if source.roles is None else _roles(source.roles, reference, latents),
    )


@torch.inference_mode()
def condition_motion(
    encoders: Encoders,
    told: Conditions,
    source: Source,
    frames: Tensor,
    masks: Tensor | None,
    tail: Tensor | None = None,
) -> Conditions:
    """Adds a stretch of the motion to `told`, what `condition_pictures` made of `source`.

    `frames` [n, H, W, 3] u8 of the skeleton, or of the dance, and its `masks` in the same shape;
    n = 4k + 1. `tail` [m, H, W, 3] u8 are the finished frames that the stretch begins with.
    """
    with encoders.vae_home.present():
        pose = encoders.vae.encode(_half_size(frames, source.image.shape[1:]))
        history = None if tail is None else encoders.vae.encode([frames_to_network(tail)])
    roles = told.roles
    if roles is not None:
        assert masks is not None
        roles = replace(roles, driving=driving_channels(masks).to(roles.reference.device))
    return replace(told, pose=pose, history=history, roles=roles)


def _roles(frames: RoleFrames, reference: Tensor, latents: Sequence[Tensor]) -> Roles:
    """The channels of the pictures' masks, beside their latents; of the motion's none yet."""
    device, plane = reference.device, reference.shape[2:]
    empty = reference.new_zeros(len(reference), 0, *plane)
    no_masks = reference.new_zeros(ROLE_CHANNELS, 0, *plane)
    masks = [reference_channels(mask).to(device) for _, mask in frames.further]
    return Roles(
        mode=frames.mode,
        reference=reference_channels(frames.reference).to(device),
        driving=no_masks[..., : plane[0] // 2, : plane[1] // 2],
        additional=torch.cat([empty, *latents], dim=1),
        additional_masks=torch.cat([no_masks, *masks], dim=1),
    )


def _shown(source: Source, *, cuts: bool) -> Tensor:
    """The picture as the VAE sees it. In replacement it was placed, or it is black where its mask
    shows nobody, if the recipe cuts it out (docs/reference/scail2.md 8).
    """
    roles = source.roles
    if source.placed is not None:
        return source.placed
    if roles is None or roles.mode != "replacement" or not cuts:
        return source.image
    return source.image.where((roles.reference > 0).any(0), -1.0)


def _half_size(frames: Tensor, size: Sequence[int]) -> Iterator[Tensor]:
    """The frames as [3, n, H/2, W/2] in -1..1, a few at a time, for a clip of `size`."""
    is_half = frames.shape[1:3] != size
    for some in over(frames.split(PIECE), "encode motion"):
        if is_half:
            yield (some.permute(3, 0, 1, 2).float() - 127.5) / 127.5
        else:
            yield skeleton_to_network(some)
