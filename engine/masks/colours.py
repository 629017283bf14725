"""Mask colours: black and white for the background, a colour for each person, 28 channels of them.

Black is background that the clip shall not show, white is background that it shall show, and a
colour is the same person in all pictures of a job. The network reads seven classes, four frames of
them to a latent frame, without a VAE. Formulas: docs/reference/masks.md 1 and 2.

A colour as a number has bit 0 for red, bit 1 for green, bit 2 for blue.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import VAE_STRIDE
from engine.media.framing import skeleton_to_network

BLACK, WHITE = 0, 7
# in the order of the network's channels
CLASSES = {
    "white": WHITE, "red": 1, "green": 2, "blue": 4, "yellow": 3, "magenta": 5, "cyan": 6,
}  # fmt: skip
PERSONS = ("blue", "red", "green", "magenta", "cyan", "yellow")  # person 1, person 2, ..
PERSON_COLOURS = tuple(CLASSES[name] for name in PERSONS)
BLUE = PERSON_COLOURS[0]

# A channel is on above 225 of 255. In FP32, for 225 itself is larger than the number in FP64.
THRESHOLD = float(np.float32((225 - 127.5) / 127.5))

_GROUP = VAE_STRIDE[0]  # frames of a latent frame
_CELL = VAE_STRIDE[1]  # pixels a side of a latent cell
_AT_ONCE = 16  # frames in work


def paint(colours: Tensor) -> Tensor:
    """Paints numbers of colours [.., H, W] u8 as RGB of 0 and 255: [.., H, W, 3] u8."""
    palette = torch.tensor([[255 * (n >> bit & 1) for bit in range(3)] for n in range(8)])
    return palette.to(torch.uint8)[colours.int()]


def numbers_of(frames: Tensor) -> Tensor:
    """Finds the numbers of colours in painted frames [.., H, W, 3] u8: [.., H, W] u8."""
    red, green, blue = (frames >> 7).unbind(-1)
    return red | green << 1 | blue << 2


def mask_channels(frames: Tensor) -> Tensor:
    """Compresses colours [F, 3, a, b] fp32 in -1..1 to [28, (F - 1)/4 + 1, a/8, b/8] fp32.

    F = 4k + 1; a/8 and b/8 are rounded up. A value is the share of a cell that a class covers.
    """
    return _grouped(torch.cat([_shares(some) for some in frames.split(_AT_ONCE)]))


def driving_channels(frames: Tensor) -> Tensor:
    """Compresses the mask of a driving clip [T, H, W, 3] u8 to [28, t, H/16, W/16] fp32.

    T = 4k + 1. The colours are averaged over 2x2 before they are classed, so a person loses the
    edge to black, and gains it against white. A slice of a long clip is a clip of its own.
    """
    halves = (skeleton_to_network(some).transpose(0, 1) for some in frames.split(_AT_ONCE))
    return _grouped(torch.cat([_shares(half) for half in halves]))


def reference_channels(colours: Tensor) -> Tensor:
    """Compresses the mask of a picture [3, H, W] fp32 to [28, 1, H/8, W/8] fp32."""
    return mask_channels(colours[None])


def show_black(colours: Tensor) -> Tensor:
    """Turns what is nearly black white, in a mask [3, H, W] fp32 in about -1..1.

    It is the rule by which the SAT program mends masks of older preprocessing
    (docs/reference/masks.md 3.3).
    """
    return torch.where(colours.amax(0) < -0.5, colours.new_ones(()), colours)


def _shares(frames: Tensor) -> Tensor:
    """The share of each class in each cell: [n, 3, a, b] fp32 -> [n, 7, a/8, b/8] fp32."""
    red, green, blue = (frames > THRESHOLD).int().unbind(1)
    colours = (red + 2 * green + 4 * blue)[:, None]
    classes = torch.tensor(list(CLASSES.values())).view(1, -1, 1, 1)
    cells = [-(-side // _CELL) for side in frames.shape[2:]]
    return F.interpolate((colours == classes).float(), cells, mode="area")


def _grouped(shares: Tensor) -> Tensor:
    """Four frames to a latent frame, the first of the clip alone: it fills a group by itself.

    [F, 7, a', b'] -> [28, (F - 1)/4 + 1, a', b'], channel = 7 * place in the group + class.
    """
    assert len(shares) % _GROUP == 1, f"{len(shares)} frames fill no whole latent frames"
    first = shares[:1].expand(_GROUP - 1, -1, -1, -1)
    groups = torch.cat([first, shares]).unflatten(0, (-1, _GROUP))
    return groups.flatten(1, 2).transpose(0, 1).contiguous()
