"""Masks of a job that brings none: its files are read, and SAM 2 is gone when they are made.

The networks leave the GPU before anything else of a clip comes: what a clip needs is planned
without them. Source: docs/reference/masks.md 7.8.
"""

from pathlib import Path

import numpy as np
import torch

from engine.clock import Progress
from engine.errors import TooLarge
from engine.flow import Check, go_on
from engine.machine.exhausted import ran_out
from engine.masks.corrections import Correction
from engine.masks.follow import Frames
from engine.masks.kept import Clip, MaskMaker
from engine.masks.made import MadeMasks
from engine.masks.make import Wish
from engine.masks.making import Segment, Wanted, labels_of, sha256_of
from engine.masks.networks import MaskFiles
from engine.masks.reader import read_reference_mask
from engine.masks.sam2_find import SEGMENTER
from engine.masks.still import Picture
from engine.media.framing import crop_clip
from engine.media.picture import load_layers
from engine.media.video import read_video
from engine.models.locate import search

_OPAQUE = 128  # and above
_DONE = {"boxes": "looking for persons", "masks": "masks"}


def segment_with(
    models: Path,
    device: torch.device,
    state: Path,
    segmenter: Path | None = None,
    corrections: tuple[Correction, ...] = (),
) -> Segment | None:
    """What makes masks with the networks of a models folder; None if SAM 2 is not there.

    `segmenter` names a folder or a file of SAM 2 that is to be taken. What is given back raises
    `MissingModel`, `BadCheckpoint`, `BadMedia`, `NobodyFound`, `TooLarge` for this GPU, and
    `BadRequest` for persons that do not fit, or on a CPU unless that was asked for.
    """
    if segmenter is None and search(models, SEGMENTER) is None:
        return None
    files = MaskFiles(models, device, state, segmenter)
    maker = MaskMaker(files.networks, state)

    def segment(wanted: Wanted, check: Check = go_on) -> MadeMasks:
        files.require()
        clip = Clip(sha256_of(wanted.video.path), wanted.whole, wanted.count, wanted.fps)
        wish = Wish(wanted.mode, wanted.persons, wanted.who, wanted.grow, corrections)
        count = wanted.persons or 1
        bars = _Bars()
        try:
            return maker.masks(
                clip, lambda: _frames(wanted, check), _picture(wanted, check), wish, check,
                bars.tell, lambda: files.require_time(wanted.count, count, wanted.is_patient),
            )  # fmt: skip
        except RuntimeError as error:  # what the plan of the clip before has left is too little
            if not ran_out(error):
                raise
            raise TooLarge(
                "The GPU ran out of memory while masks were made. Take SAM 2.1 small, or give a "
                "file of masks."
            ) from error
        finally:
            bars.close()
            files.release()

    return segment


def _frames(wanted: Wanted, check: Check) -> Frames:
    video = read_video(wanted.video, wanted.shown_at, wanted.count, check=check)
    return crop_clip(video, wanted.count, wanted.whole).numpy()


def _picture(wanted: Wanted, check: Check) -> Picture:
    """The picture, with the labels of its mask or of its opacity if it has either."""
    pixels, alpha = load_layers(wanted.image)
    size = pixels.shape[0], pixels.shape[1]
    has_alpha = alpha is not None and not bool((alpha >= _OPAQUE).all())
    labels = None
    if wanted.reference is not None or has_alpha:
        mask = read_reference_mask(wanted.reference, alpha, size, size, wanted.mode, check)
        labels = labels_of(mask.numbers)
    return Picture(np.asarray(pixels.numpy()), sha256_of(wanted.image), labels)


class _Bars:
    """The progress of each kind of work."""

    def __init__(self) -> None:
        self._bars: dict[str, Progress] = {}

    def tell(self, what: str, done: int, total: int) -> None:
        if what not in self._bars:
            self._bars[what] = Progress(_DONE[what], total, "frame")
        self._bars[what].reach(done)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
