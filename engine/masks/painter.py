"""Logits of a segmenter -> labels of persons at the size of the clip, binary and without crumbs.

logits -> bilinear -> the larger wins, above 0 -> holes and islands -> grow. Labels become colours
where a job needs them. Formulas: docs/reference/masks.md 6.1.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.media.framing import Size

GROWN = 16  # the most pixels that a person may be grown or shrunk by

# at a short side of 512; lengths go with it, areas with its square
_SHORT_SIDE, _SPECK = 512, 64  # pixels: a smaller hole or island is none

Bytes = NDArray[np.uint8]


def paint_labels(logits: Tensor, size: Size, grow: int = 0) -> Tensor:
    """Paints one frame: logits [P, h, w] of the whole frame -> labels [H, W] u8 at `size`.

    Person n of the logits has label n + 1, and where two overlap, whose logit is larger. `grow`
    is the radius of a disc in pixels at a short side of 512; below 0 it shrinks. Raises
    `BadRequest` for more persons than colours, or a `grow` beyond `GROWN`.
    """
    if len(logits) > LIMITS.max_identities:
        raise BadRequest(
            f"{len(logits)} persons are to be painted; there are {LIMITS.max_identities} colours. "
            "Ask for fewer persons."
        )
    check_grow(grow)
    if not len(logits):
        return torch.zeros(size, dtype=torch.uint8)
    large = F.interpolate(logits.float()[None], size, mode="bilinear", align_corners=False)[0]
    most, who = large.max(0)
    labels = torch.where(most > 0, who + 1, 0).to(torch.uint8)
    return grown(without_specks(labels.cpu()), grow)


def check_grow(grow: int) -> None:
    """Raises `BadRequest` for a growth that would not be of edges any more."""
    if abs(grow) > GROWN:
        raise BadRequest(f"Masks are to grow by {grow}; -{GROWN} to {GROWN} pixels are taken.")


def without_specks(labels: Tensor) -> Tensor:
    """Gives what is smaller than a speck the label next to it: [H, W] u8 -> [H, W] u8.

    A hole in a person is filled and an island beside one is taken away. Larger holes are real.
    """
    held: Bytes = labels.numpy()
    least = _SPECK * (min(held.shape) / _SHORT_SIDE) ** 2
    is_speck = np.zeros(held.shape, bool)
    for label in np.unique(held):
        corners = 4 if label == 0 else 8  # persons hold together by corners, background does not
        found, areas, stats, _ = cv2.connectedComponentsWithStats(
            (held == label).astype(np.uint8), connectivity=corners
        )
        is_small = stats[:found, cv2.CC_STAT_AREA] < least
        is_small[0] = False  # the other labels
        if is_small.any():
            is_speck |= is_small[np.asarray(areas, np.int32)]
    if not is_speck.any() or is_speck.all():
        return labels
    _, told = cv2.distanceTransformWithLabels(
        is_speck.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    nearest = np.asarray(told, np.int32)
    known = np.zeros(int(nearest.max()) + 1, np.uint8)
    known[nearest[~is_speck]] = held[~is_speck]
    return torch.from_numpy(known[nearest])


def grown(labels: Tensor, grow: int) -> Tensor:
    """Grows persons by a disc of radius `grow`, or shrinks them below 0: [H, W] u8 -> [H, W] u8.

    `grow` is in pixels at a short side of 512. Nobody grows over another; between two, who is
    nearer does.
    """
    held: Bytes = labels.numpy()
    radius = abs(grow) * min(held.shape) / _SHORT_SIDE
    persons = [int(label) for label in np.unique(held) if label]
    if not grow or not persons:
        return labels
    if grow < 0:
        kept = np.zeros_like(held)
        for person in persons:
            kept[_distances(held == person) > radius] = person
        return torch.from_numpy(kept)
    away = np.stack([_distances(held != person) for person in persons])  # [P, H, W]
    nearest = np.array(persons, np.uint8)[away.argmin(0)]
    return torch.from_numpy(np.where((held == 0) & (away.min(0) <= radius), nearest, held))


def _distances(is_inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """How far each pixel inside is from the nearest one outside; 0 outside."""
    return np.asarray(
        cv2.distanceTransform(is_inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE),
        np.float32,
    )
