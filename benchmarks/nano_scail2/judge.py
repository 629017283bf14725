"""Judges a clip of a known scene: do the right people move as they should, in the right room?

Three questions. Are arms and legs where the dance has them? Has everybody the colours of the
picture, not those of the dancer they follow or of another person? Is the room the right one?
Truth is the drawing of the scene; whose a pixel is comes from how it was painted.
"""

from dataclasses import dataclass
from statistics import fmean

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.nano.dance import Array
from benchmarks.nano.drawing import draw_room
from benchmarks.nano.judge import BINS, CHAINS, LIMBS, body_of, chain_distances, iou
from benchmarks.nano_scail2.scenes import HEIGHT, WIDTH, Frames, Mode, Scene, ScenePlan
from benchmarks.quality.metrics import psnr

# Levels from the room at which a person begins: half of what people differ from these rooms by,
# which is 84 to 147 in the median. There the edge of a blurred person stays where it is.
DIFFERENT = 48.0
NEAR = 3  # pixels about people in which the room is not judged: their edges are blurred


@dataclass(frozen=True, slots=True)
class Colours:
    """The distance of a person's colours from others: Hellinger, 0 the same, 1 none in common."""

    own: float  # as the picture has this person
    follower: float  # from the dancer whose place it takes
    others: float  # the nearest of the other persons in the picture; 1 if there is none

    @property
    def right(self) -> bool:
        return self.own < min(self.follower, self.others)


@dataclass(frozen=True, slots=True)
class Verdict:
    limb_iou: float  # masks of arms and legs, mean of the four, then of persons
    colours: tuple[Colours, ...]  # of each person
    background_db: float  # PSNR to the room of the driving video, away from people
    psnr: float  # dB of all pixels to the true clip

    @property
    def right_colours(self) -> bool:
        """Has everybody the colours that it should have?"""
        return all(one.right for one in self.colours)


def judge(frames: Frames, planned: ScenePlan, true: Scene, mode: Mode) -> Verdict:
    """Judges frames [T, H, W, 3] u8 made for a scene, which may be fewer than the scene has."""
    count = len(frames)
    target = true.targets[mode]
    owners = target.owners[:count]
    away = outside(np.maximum(owners, true.driving.owners[:count]))
    driving = true.driving.frames[:count]
    return Verdict(
        limb_iou=limb_iou(frames, target.frames[:count], planned, mode),
        colours=tuple(
            colours(frames, owners, true, person) for person in range(len(planned.heroes))
        ),
        background_db=psnr(torch.from_numpy(frames[away]), torch.from_numpy(driving[away])),
        psnr=psnr(torch.from_numpy(frames), torch.from_numpy(target.frames[:count])),
    )


def limb_iou(frames: Frames, truth: Frames, planned: ScenePlan, mode: Mode) -> float:
    """Compares masks of limbs: what differs from the empty room where a limb's bones are near."""
    room = empty_room(planned, mode)
    made, real = (body_of(clip, room, DIFFERENT) for clip in (frames, truth))
    near = nearest_chains(planned.joints[:, : len(frames)])
    limbs = [
        near == person * len(CHAINS) + number
        for person in range(len(planned.joints))
        for number in range(len(LIMBS))
    ]
    return fmean(iou(made & limb, real & limb) for limb in limbs)


def nearest_chains(joints: NDArray[np.floating]) -> NDArray[np.int64]:
    """For each pixel the chain of bones that is nearest, counted over persons: [T, H, W]."""
    return np.argmin(np.concatenate([chain_distances(one) for one in joints]), axis=0)


def empty_room(planned: ScenePlan, mode: Mode) -> NDArray[np.uint8]:
    """The room [H, W, 3] of a mode without its people and their shadows."""
    room = {"animation": planned.studio, "replacement": planned.stage}[mode]
    drawn: Array = draw_room([], HEIGHT, WIDTH, room)
    return np.rint(drawn).astype(np.uint8)


def colours(frames: Frames, owners: NDArray[np.uint8], true: Scene, person: int) -> Colours:
    """Compares one person of the clip with all of whom it might have the colours."""
    mine = histogram(frames[owners == person + 1])
    count = int(true.picture.owners.max())
    pictured = [
        distance(mine, histogram(true.picture.frames[true.picture.owners == n + 1]))
        for n in range(count)
    ]
    followed = true.driving.frames[true.driving.owners == person + 1]
    return Colours(
        own=pictured[person],
        follower=distance(mine, histogram(followed)),
        others=min([d for n, d in enumerate(pictured) if n != person], default=1.0),
    )


def histogram(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Counts colours of pixels [n, 3] in cubes of 32 levels, each shared with its neighbours."""
    counted = cv2.calcHist([pixels.reshape(-1, 1, 3)], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3)
    for axis in range(3):
        padded = np.pad(counted, [(1, 1) if n == axis else (0, 0) for n in range(3)], "edge")
        before, after = (np.take(padded, range(start, start + BINS), axis) for start in (0, 2))
        counted = (before + 2 * counted + after) / 4
    return counted.astype(np.float32)


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The Hellinger distance of two histograms."""
    return cv2.compareHist(one, other, cv2.HISTCMP_BHATTACHARYYA)


def outside(owners: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels [T, H, W] that are more than `NEAR` from everybody."""
    kernel = np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)
    return np.stack([cv2.dilate((one > 0).astype(np.uint8), kernel) == 0 for one in owners])
