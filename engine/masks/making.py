"""Masks for a job that brings none, or brings them in another form.

A segmenter is a function: who has one passes it in, and nobody here knows which it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from engine.errors import MissingModel
from engine.flow import Check, Mode, Warned, go_on
from engine.masks.cleaning import BACKGROUND
from engine.masks.colours import PERSON_COLOURS, PERSONS, numbers_of
from engine.masks.made import MadeMasks
from engine.masks.painter import check_grow, grown
from engine.masks.reader import read_driving_mask, read_reference_mask
from engine.masks.saved import sha256_of
from engine.masks.stored import open_reference
from engine.masks.tracks import track
from engine.media.framing import Size, covering_size
from engine.media.picture import load_layers
from engine.media.video import VideoInfo, frame_count

FOLDER = "sam2"  # in the folder of models
FILES = "sam2.1_hiera_large.safetensors (or _base_plus, _small, _tiny)"

_LABEL_OF_COLOUR = torch.zeros(BACKGROUND + 1, dtype=torch.uint8)
_LABEL_OF_COLOUR[list(PERSON_COLOURS)] = torch.arange(1, len(PERSONS) + 1, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The media that masks are wanted of, and what is said about who is in them."""

    image: Path
    video: VideoInfo
    shown_at: float | None  # frames a second of the clip; None: those of the video
    frames: int | None  # at most so many; None: all
    size: Size  # of the clip
    mode: Mode
    reference: Path | None = None  # the mask of the picture, if there is one
    persons: int | None = None  # None: as many as the picture has
    who: tuple[int, ...] = ()  # persons of the video who are person 1, 2, .. of the picture
    grow: int = 0  # pixels at a short side of 512
    is_patient: bool = False  # on a CPU it may take as long as it takes

    @property
    def count(self) -> int:
        return frame_count(self.video, self.shown_at, self.frames)

    @property
    def fps(self) -> float:
        return self.shown_at or self.video.fps

    @property
    def whole(self) -> Size:
        """The size at which all of the video's frame covers the clip."""
        return covering_size(self.video.height, self.video.width, self.size)


Segment: TypeAlias = Callable[[Wanted, Check], MadeMasks]  # raises NobodyFound, BadRequest


def no_segmenter(models: Path, ask: str) -> MissingModel:
    """What to do where masks are wanted and nothing makes them; `ask` names what brings them."""
    return MissingModel(
        f"There is nothing here that makes masks. Put SAM 2.1 (Apache-2.0), as {FILES}, into "
        f"{models / FOLDER}, or give masks with {ask}."
    )


def read_masks(wanted: Wanted, mask: Path, check: Check = go_on) -> MadeMasks:
    """Reads masks of any form into the one that is kept. Notes become warnings.

    Raises what `read_driving_mask` and `read_reference_mask` raise.
    """
    check_grow(wanted.grow)
    driving = read_driving_mask(
        mask, wanted.video, wanted.shown_at, wanted.count, wanted.whole, wanted.mode, check,
        wanted.who,
    )  # fmt: skip
    pixels, alpha = load_layers(wanted.image)
    own = pixels.shape[0], pixels.shape[1]
    given = wanted.reference or open_reference(mask)
    has_mask = given is not None or (alpha is not None and not bool((alpha >= 128).all()))
    shown = read_reference_mask(given, alpha, own, own, wanted.mode, check) if has_mask else None
    tracks = track(driving.colours, PERSONS[: _last(driving.persons)], check)
    notes = [*driving.notes, *(() if shown is None else shown.notes)]
    return MadeMasks(
        labels=torch.stack(
            [grown(labels_of(numbers_of(frame)), wanted.grow) for frame in driving.colours]
        ),
        reference=None if shown is None else grown(labels_of(shown.numbers), wanted.grow),
        boxes=torch.from_numpy(tracks.boxes.astype(np.float32)),
        scores=torch.from_numpy(np.where(tracks.is_seen, 1.0, np.nan).astype(np.float32)),
        fps=wanted.fps,
        source_sha256=sha256_of(wanted.video.path),
        order=wanted.who or tuple(range(1, len(tracks.persons) + 1)),
        model="",
        image_sha256="" if shown is None else sha256_of(wanted.image),
        warned=tuple(Warned("read", note) for note in notes),
    )


def labels_of(numbers: Tensor) -> Tensor:
    """Numbers of colours [.., H, W] u8 -> labels [.., H, W] u8; black and white are 0."""
    return _LABEL_OF_COLOUR[numbers.int()]


def _last(persons: Sequence[str]) -> int:
    return max((PERSONS.index(person) + 1 for person in persons), default=0)
