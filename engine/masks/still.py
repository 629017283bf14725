"""The persons of a picture: from a file of masks, or found and painted as in one frame.

Source: docs/reference/masks.md 7.7.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadRequest, NobodyFound
from engine.masks.candidates import candidates, prompt_at
from engine.masks.order import Found
from engine.masks.painter import paint_labels
from engine.masks.person_boxes import BoxFinder
from engine.masks.rectangles import box_of, centre
from engine.masks.segmenter import Segmenter
from engine.masks.stream import Stream
from engine.masks.tracklets import Chain
from engine.media.framing import Size
from engine.pose.arrays import Doubles

_ABSENT = -32.0  # logit of nobody's being there; finite, for it is interpolated


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture whose persons take the places of those of a video."""

    pixels: NDArray[np.uint8]  # [h, w, 3]
    sha256: str  # of its file
    labels: Tensor | None = None  # [h, w] u8 of its mask: 0 background, 1 to 6; None: it has none


@dataclass(frozen=True, slots=True)
class Pictured:
    """Who is where in a picture. R persons, in order."""

    labels: Tensor  # [h, w] u8, 0 background
    numbers: tuple[int, ...]  # [R] the label of each, 1 to 6
    boxes: Doubles  # [R, 4] in pixels of the picture

    @property
    def size(self) -> Size:
        height, width = self.labels.shape
        return height, width

    @property
    def found(self) -> Found:
        """The persons as they are matched with others: in their own order."""
        return Found(self.boxes, range(len(self.numbers)), self.size)


def look_at_picture(
    picture: Picture, segmenter: Segmenter, finder: BoxFinder, wanted: int | None, grow: int = 0
) -> Pictured:
    """Finds the persons of a picture, from left to right; those of its mask are taken as they are.

    `wanted` takes the largest of them. Raises `NobodyFound`, and `BadRequest` for more persons
    than there are colours.
    """
    if picture.labels is not None:
        return labelled(picture.labels)
    height, width, _ = picture.pixels.shape
    boxes = finder(picture.pixels)
    chains = [Chain((0,), box[None, :4], box[None, 4]) for box in boxes]
    persons = candidates(chains, (height, width))[:wanted]
    if not persons:
        raise NobodyFound(
            "Nobody was found in the picture. Give one in which a person is in view, or a mask of "
            "it."
        )
    if len(persons) > LIMITS.max_identities:
        raise BadRequest(
            f"The picture shows {len(persons)} persons; at most {LIMITS.max_identities} have "
            "colours. Say how many are meant, or give a mask of the picture."
        )
    persons.sort(key=lambda chain: centre(chain.boxes[0])[0])
    stream = Stream(segmenter, height, width)
    prompts = [prompt_at(number, chain, 0) for number, chain in enumerate(persons)]
    seen = stream.show(picture.pixels, 0, prompts)
    logits = torch.stack([seen[number].logits for number in range(len(persons))])
    absent = [number for number in seen if seen[number].score <= 0]
    logits[absent] = _ABSENT
    found = labelled(paint_labels(logits, (height, width), grow))
    if len(found.numbers) < len(persons):
        raise NobodyFound(
            f"{len(persons)} persons were found in the picture and {len(found.numbers)} of them "
            "could be cut out. Give a mask of the picture."
        )
    return found


def labelled(labels: Tensor) -> Pictured:
    """Who is where by labels [h, w] u8. Raises `NobodyFound` if they show nobody."""
    held = labels.numpy()
    numbers = tuple(int(number) for number in np.unique(held) if number)
    if not numbers:
        raise NobodyFound("The mask of the picture shows nobody; paint who is meant in a colour.")
    if numbers[-1] > LIMITS.max_identities:
        raise BadRequest(
            f"The mask of the picture has label {numbers[-1]}; 1 to {LIMITS.max_identities} are "
            "persons."
        )
    return Pictured(labels, numbers, np.stack([box_of(held == number) for number in numbers]))
