"""Film cuts: frames of a driving video that show something else than the frame before.

Source: docs/reference/masks.md 5.4.
"""

import numpy as np
from torch import Tensor

from engine.drift.regions import owners_of
from engine.masks.cuts import is_cut

_STEP = 4  # pixels: nobody is as small


def film_cuts(driving: Tensor, masks: Tensor) -> list[int]:
    """Lists the frames that begin something new, of a video and its masks [T, H, W, 3] u8.

    They are of another picture than the frame before, or show other persons and none of those
    before.
    """
    cuts, before, persons_before = list[int](), None, set[int]()
    for number, (frame, mask) in enumerate(zip(driving, masks, strict=True)):
        picture = frame.numpy()
        persons = set(np.unique(owners_of(mask[::_STEP, ::_STEP].numpy())).tolist()) - {0}
        is_other = before is not None and is_cut(before, picture)
        are_others = bool(persons and persons_before) and not persons & persons_before
        if is_other or are_others:
            cuts.append(number)
        before, persons_before = picture, persons
    return cuts
