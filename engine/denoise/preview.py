"""Shows what a clip will be while it is being denoised: a picture, written anew at every step.

At a noise level sigma latents x and their velocity v say what the clip looks like to the model now:
x - sigma v. Four frames of that become colours by a linear map, without the decoder.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from engine.denoise.sampler import TRAINED_LEVELS
from engine.denoise.windows import ClipVelocity
from kernels.whole_file import whole_file

log = logging.getLogger(__name__)

# latents [16, n, h, w] -> frames [n, h, w, 3] u8
Colours: TypeAlias = Callable[[Tensor], Tensor]

SHOWN = 4  # frames, side by side
_WIDTH = 1024  # pixels that the picture is blown up to, by whole factors


def previewed(velocity: ClipVelocity, colours: Colours, path: Path) -> ClipVelocity:
    """Returns the velocity, which writes the picture to `path`, a PNG, whenever it was asked.

    A picture that cannot be written is told once, and costs the clip nothing.
    """
    failed = False

    def seen(latents: Tensor, step: int, timestep: float) -> Tensor:
        nonlocal failed
        found = velocity(latents, step, timestep)
        if not failed:
            try:
                write_preview(colours(expected(latents, found, timestep)), path)
            except OSError as error:
                failed = True
                log.warning("The preview %s cannot be written: %s.", path, error.strerror)
        return found

    return seen


def expected(latents: Tensor, velocity: Tensor, timestep: float) -> Tensor:
    """Returns some frames of the clip that latents [16, t, h, w] are on the way to: [16, n, h, w].

    They are as far apart as they can be. Fewer than `SHOWN` latents are shown as they are.
    """
    count = latents.shape[1]
    shown = torch.linspace(0, count - 1, min(count, SHOWN)).round().long().to(latents.device)
    return latents[:, shown] - timestep / TRAINED_LEVELS * velocity[:, shown]


def write_preview(frames: Tensor, path: Path) -> None:
    """Writes frames [n, h, w, 3] u8 side by side as a PNG. Whoever reads `path` never sees half of
    it. Raises `OSError`.
    """
    row = torch.cat([*frames.cpu()], dim=1)
    height, width = row.shape[:2]
    factor = max(1, _WIDTH // width)
    size = width * factor, height * factor
    picture = Image.fromarray(row.numpy()).resize(size, Image.Resampling.BICUBIC)
    with whole_file(path) as part:
        picture.save(part, "PNG", compress_level=1)
