"""Draws what a clip will be made of: the first frames, with skeleton or masks over them.

The page shows it before a step is denoised, so that a dancer who was missed, a skeleton beside the
picture or swapped masks cost nothing.
"""

import io

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from engine.flow import Source
from engine.media.framing import frames_to_u8

_SHOWN = 4  # frames beside each other
_DIM = 0.45  # of the picture below a skeleton
_MASK = 0.5  # of the colours of a mask
_SIDE = 480  # of the longest side of one of them


def draw(source: Source) -> bytes:
    """Draws a PNG of some frames beside each other; of a model that takes masks the picture first,
    in the colours of its mask.
    """
    frames = source.skeleton  # [T, h, w, 3] u8
    count = min(_SHOWN, len(frames))
    chosen = torch.linspace(0, len(frames) - 1, count).round().long()
    if source.roles is None:
        below = frames_to_u8(source.image[:, None])[0].float() * _DIM  # [H, W, 3]
        drawn = [_lit(below, _fitted(frames[one], below)) for one in chosen]
    else:
        roles = source.roles
        picture, mask = (frames_to_u8(one[:, None])[0] for one in (source.image, roles.reference))
        drawn = [_coloured(picture, mask)]
        drawn += [_coloured(frames[one], roles.driving[one]) for one in chosen]
    strip = Image.fromarray(torch.cat([_small(one) for one in drawn], dim=1).numpy())
    file = io.BytesIO()
    strip.save(file, "PNG")
    return file.getvalue()


def _lit(below: Tensor, skeleton: Tensor) -> Tensor:
    """Puts a skeleton [H, W, 3] over a darkened picture: it is black where it is not."""
    is_drawn = (skeleton > 0).any(dim=2, keepdim=True)
    return torch.where(is_drawn, skeleton.float(), below).to(torch.uint8)


def _coloured(picture: Tensor, mask: Tensor) -> Tensor:
    """Mixes the colours of a mask [H, W, 3] into a picture, but for black, which says nothing."""
    said = (mask > 0).any(dim=2, keepdim=True)
    mixed = torch.lerp(picture.float(), mask.float(), _MASK)
    return torch.where(said, mixed, picture.float()).to(torch.uint8)


def _fitted(frame: Tensor, below: Tensor) -> Tensor:
    """Brings a skeleton that was drawn at half the size to that of the picture."""
    if frame.shape == below.shape:
        return frame
    grown = functional.interpolate(frame.permute(2, 0, 1)[None].float(), tuple(below.shape[:2]))
    return grown[0].permute(1, 2, 0).to(torch.uint8)


def _small(frame: Tensor) -> Tensor:
    """Shrinks a large frame [H, W, 3] by a whole number."""
    by = -(-max(frame.shape[:2]) // _SIDE)
    return frame[::by, ::by].contiguous()
