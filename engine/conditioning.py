"""Prompt, picture and skeleton of a clip as the encoders see them, for the transformer.

The picture is encoded as one frame, the skeleton at half size.
Sources: docs/reference/denoiser.md 5, docs/reference/encoders.md 4.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import NotFinite
from engine.flow import Conditions, Request, Source
from engine.machine.resident import Resident
from engine.media.framing import skeleton_to_network
from engine.models.vae import Vae
from engine.models.vision import VisionEncoder

PIECE = 16  # skeleton frames encoded at once


@dataclass(frozen=True, slots=True)
class Encoders:
    """The models beside the transformer, and which of them are on the GPU only when used."""

    text: Callable[[Sequence[str]], list[Tensor]]  # prompts -> [512, text_dim] each
    vision: VisionEncoder
    vae: Vae
    decode: Callable[[Tensor], Iterator[Tensor]]  # latents [16, t, h, w] -> [n, H, W, 3] u8 each
    vision_home: Resident = field(default_factory=Resident)
    vae_home: Resident = field(default_factory=Resident)


@torch.inference_mode()
def condition(encoders: Encoders, request: Request, source: Source) -> Conditions:
    """Runs the encoders; on the negative prompt only if the recipe looks at it."""
    prompts = [request.settings.prompt]
    if request.settings.recipe.cfg != 1:
        prompts.append(request.settings.negative_prompt)
    text, *negative = encoders.text(prompts)
    with encoders.vision_home.present():
        vision = encoders.vision(source.image)
    if not vision.isfinite().all():
        raise NotFinite("The image encoder gives numbers that are not finite: its file is damaged.")
    with encoders.vae_home.present():
        reference = encoders.vae.encode([source.image[:, None]])
        pose = encoders.vae.encode(_half_size(source))
    return Conditions(
        text=text,
        negative=negative[0] if negative else None,
        vision=vision,
        reference=reference,
        pose=pose,
    )


def _half_size(source: Source) -> Iterator[Tensor]:
    """The skeleton as [3, n, H/2, W/2] in -1..1, a few frames at a time."""
    is_half = source.skeleton.shape[1:3] != source.image.shape[1:]
    pieces = source.skeleton.split(PIECE)
    for frames in tqdm(pieces, "encode skeleton", disable=None):
        if is_half:
            yield (frames.permute(3, 0, 1, 2).float() - 127.5) / 127.5
        else:
            yield skeleton_to_network(frames)
