"""How a region of a clip looks over a stretch of it: means and spreads of its colours in CIE LAB.

The figures of drift compare two looks. Source: docs/reference/masks.md 5.3.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.drift.regions import Bytes, Scale, owners_of, regions_of
from engine.flow import Check

Lab: TypeAlias = NDArray[np.float32]  # [H, W, 3]: L 0 to 100, a and b about -100 to 100
Triple: TypeAlias = NDArray[np.float64]  # [3]: one for L, a and b each

_LEAST_CHROMA = 1.0  # a ratio to less says nothing


def to_lab(frame: Bytes) -> Lab:
    """Converts sRGB [H, W, 3] u8 to CIE LAB under D65."""
    lab = cv2.cvtColor(frame.astype(np.float32) * np.float32(1 / 255), cv2.COLOR_RGB2LAB)
    return np.asarray(lab, np.float32)


def to_rgb(lab: Lab) -> Bytes:
    """Converts CIE LAB [H, W, 3] to sRGB u8; colours that it does not have are clipped."""
    rgb = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)  # 0 to 1
    return np.asarray(cv2.convertScaleAbs(rgb, alpha=255), np.uint8)


@dataclass(frozen=True, slots=True)
class Look:
    """The colours of a region, pooled over the frames of a stretch."""

    pixels: int  # in all frames
    frames: int  # of the stretch, those without the region too
    frame_pixels: int  # of one frame, all of it
    mean: Triple
    spread: Triple  # standard deviations
    chroma: float  # mean distance from grey

    @property
    def area(self) -> float:
        """The pixels of the region in a frame, on average."""
        return self.pixels / self.frames

    @property
    def share(self) -> float:
        """What part of the frames the region is."""
        return self.area / self.frame_pixels


Looks: TypeAlias = dict[int, Look]  # by the owner of the region


def looks_of(frames: Tensor, masks: Tensor, scale: Scale, check: Check) -> Looks:
    """Measures each region of a stretch of frames and their masks, both [n, H, W, 3] u8.

    `check` is asked at every frame.
    """
    tallies: dict[int, Tally] = {}
    for frame, mask in zip(frames, masks, strict=True):
        check()
        lab = to_lab(frame.numpy())
        _, a, b = cv2.split(lab)
        chroma = np.asarray(cv2.magnitude(a, b), np.float32)
        for owner, region in regions_of(owners_of(mask.numpy()), scale).items():
            tallies.setdefault(owner, Tally()).add(lab, chroma, region)
    size = frames.shape[1] * frames.shape[2]
    looks = {owner: tally.look(len(frames), size) for owner, tally in sorted(tallies.items())}
    return {owner: look for owner, look in looks.items() if look is not None}


class Tally:
    """Sums up a region frame by frame. Means are over all pixels, not over frames."""

    def __init__(self) -> None:
        self._pixels = 0
        self._sums, self._squares, self._chroma = np.zeros(3), np.zeros(3), 0.0

    def add(self, lab: Lab, chroma: NDArray[np.float32], region: Bytes) -> None:
        """Adds the pixels of a frame that are in `region` [H, W] u8; `chroma` is that of `lab`."""
        count = cv2.countNonZero(region)
        if not count:
            return
        mean, spread = (part.ravel() for part in cv2.meanStdDev(lab, mask=region))
        self._pixels += count
        self._sums += count * mean
        self._squares += count * (spread**2 + mean**2)
        self._chroma += count * cv2.mean(chroma, mask=region)[0]

    def look(self, frames: int, frame_pixels: int) -> Look | None:
        """Sums up the region over so many frames; None if no pixel of it was seen."""
        if not self._pixels:
            return None
        mean = self._sums / self._pixels
        variance = np.maximum(self._squares / self._pixels - mean**2, 0)
        chroma = self._chroma / self._pixels
        return Look(self._pixels, frames, frame_pixels, mean, np.sqrt(variance), chroma)


def delta_e(one: Look, other: Look) -> float:
    """Measures the distance of two mean colours (CIE 1976)."""
    return math.dist(one.mean, other.mean)


def chroma_ratio(one: Look, other: Look) -> float | None:
    """Divides mean chromas; None if the other is grey."""
    return None if other.chroma < _LEAST_CHROMA else one.chroma / other.chroma
