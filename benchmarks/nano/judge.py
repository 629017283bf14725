"""Judges a clip of a known scene: are the limbs where they should be, in the right colours?

The character is what differs from the empty room, and each of its pixels belongs to the limb whose
true bones are nearest. The result and the true drawing are taken apart in the same way.
"""

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.nano.dance import ARMS, LEGS, Array
from benchmarks.nano.drawing import draw_dancer
from benchmarks.nano.scenes import HEIGHT, WIDTH, Frames, ScenePlan
from benchmarks.quality.metrics import psnr
from engine.pose.camera import base_camera

TRUNK, HEAD = (0, 3, 6, 9, 12), (12, 15)
LIMBS = (*ARMS, *LEGS)  # chains of joints, the four that are judged
CHAINS = (*LIMBS, TRUNK, HEAD)
DIFFERENT = 24.0  # levels, the largest of three channels, from the room
BINS = 8  # of each channel
AWAY = 20_000.0  # mm to the side: out of the picture with the shadow


@dataclass(frozen=True, slots=True)
class LimbVerdict:
    limb_iou: float  # masks of arms and legs, mean of the four
    identity: float  # colour histogram distance, mean over limbs: 0 the same, 1 nothing in common
    psnr: float  # dB


def judge(frames: Frames, truth: Frames, planned: ScenePlan) -> LimbVerdict:
    """Both [T, H, W, 3] u8, `planned` the scene that `truth` shows."""
    room = empty_room(planned)
    made, real = (body_of(clip, room) for clip in (frames, truth))
    near = limbs_of(planned.joints[:, 0])
    limbs = [near == number for number in range(len(LIMBS))]
    return LimbVerdict(
        limb_iou=fmean(iou(made & limb, real & limb) for limb in limbs),
        identity=fmean(_distance(frames, truth, real & limb) for limb in limbs),
        psnr=psnr(torch.from_numpy(frames), torch.from_numpy(truth)),
    )


def limbs_of(joints: NDArray[np.floating]) -> NDArray[np.int8]:
    """For each pixel the number of the chain whose bones are nearest: [T, H, W], of [T, 24, 3]."""
    return np.argmin(chain_distances(joints), axis=0).astype(np.int8)


def chain_distances(joints: NDArray[np.floating]) -> Array:
    """Pixels from each pixel to each chain of bones: [chains, T, H, W], of joints [T, 24, 3]."""
    camera = base_camera(HEIGHT, WIDTH)
    flat = joints[..., :2] / joints[..., 2:] * (camera.fx, camera.fy) + (camera.cx, camera.cy)
    pixels = np.stack(np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5), -1)
    return np.stack([
        np.min([_to_bone(pixels, flat[:, a], flat[:, b]) for a, b in pairwise(chain)], axis=0)
        for chain in CHAINS
    ])  # fmt: skip


def _to_bone(pixels: Array, start: Array, end: Array) -> Array:
    """Distance of pixels [H, W, 2] to bones between [T, 2] and [T, 2]: [T, H, W]."""
    axis = (end - start)[:, None, None]
    away = pixels - start[:, None, None]
    share = np.clip((away * axis).sum(-1) / np.maximum((axis * axis).sum(-1), 1e-9), 0, 1)
    return np.linalg.norm(away - share[..., None] * axis, axis=-1)


def empty_room(planned: ScenePlan) -> NDArray[np.uint8]:
    """The room [H, W, 3] of a scene without its dancer."""
    return draw_dancer(planned.pictured + np.array([AWAY, 0, 0]), HEIGHT, WIDTH, planned.look)


def body_of(
    frames: Frames, room: NDArray[np.uint8], levels: float = DIFFERENT
) -> NDArray[np.bool_]:
    """The pixels of the character, which differ so much from the room: [T, H, W]."""
    return np.abs(frames.astype(np.int16) - room).max(-1) >= levels


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union, over all frames at once."""
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 1.0


def _distance(frames: Frames, truth: Frames, mask: NDArray[np.bool_]) -> float:
    """The Hellinger distance of the colours that lie where the true part is."""
    made, true = (
        cv2.calcHist([clip[mask].reshape(-1, 1, 3)], [0, 1, 2], None, [BINS] * 3, [0, 256] * 3)
        for clip in (frames, truth)
    )
    return cv2.compareHist(made, true, cv2.HISTCMP_BHATTACHARYYA)
