"""Pairs 2D persons with 3D persons, which two detectors list in orders of their own."""

from collections.abc import Sequence

import numpy as np

from engine.pose.align import SMPL_OF_SLOT
from engine.pose.arrays import Bools, Floats
from engine.pose.bones import FARTHEST
from engine.pose.camera import Camera
from engine.pose.keypoints import Keypoints

FARTHEST_SHARE = 0.25  # of the picture's larger side; points farther off belong to someone else


def match(
    frames: Sequence[Keypoints], joints: Floats, camera: Camera, height: int, width: int
) -> list[Keypoints]:
    """The 2D persons of every frame in the columns of the 3D persons, hidden where there is none.

    joints [T, P, 24, 3] mm in the space of `camera`. A pair is believed if the body points that
    both show lie, on average, nearer than a quarter of the picture.
    """
    return [
        _reordered(frame, _columns(frame, persons, camera, height, width), joints.shape[1])
        for frame, persons in zip(frames, joints, strict=True)
    ]


def _columns(
    frame: Keypoints, persons: Floats, camera: Camera, height: int, width: int
) -> dict[int, int]:
    """The pairing of 3D with 2D persons that has the smallest sum of distances."""
    from scipy.optimize import linear_sum_assignment  # slow to import: only when used

    if not len(frame.body):
        return {}
    slots = len(SMPL_OF_SLOT)  # body points that have a joint
    placed = persons[:, list(SMPL_OF_SLOT)]
    size = np.array([width, height], np.float64)
    found = frame.body[:, :slots] * size  # [Q, 14, 2] pixels
    is_shown = frame.visible[:, :slots] & np.isfinite(found).all(-1)
    z = placed[..., 2]
    is_placed = (z > 0.01) & (np.abs(placed) < FARTHEST).all(-1)  # False for NaN and for missing
    z = np.where(is_placed, z, 1)
    x = camera.fx * placed[..., 0] / z + camera.cx
    y = camera.fy * placed[..., 1] / z + camera.cy
    shared = is_placed[:, None] & is_shown[None]  # [P, Q, 14]
    offsets = np.stack([x, y], axis=-1)[:, None] - found[None]  # [P, Q, 14, 2]
    distances = np.where(shared, np.linalg.norm(offsets, axis=-1), 0).sum(-1)  # [P, Q]
    limit = FARTHEST_SHARE * max(height, width)
    counts = shared.sum(-1)
    costs = np.where(counts > 0, distances / np.maximum(counts, 1), limit)
    pairs = zip(*linear_sum_assignment(np.minimum(costs, limit)))
    return {int(p): int(q) for p, q in pairs if costs[p, q] < limit}


def _reordered(frame: Keypoints, columns: dict[int, int], persons: int) -> Keypoints:
    body = _hidden(frame.body, persons)
    visible: Bools = np.zeros((persons, *frame.visible.shape[1:]), np.bool_)
    faces, hands = _hidden(frame.faces, persons), _hidden(frame.hands, persons)
    for p, q in columns.items():
        body[p], visible[p] = frame.body[q], frame.visible[q]
        faces[p], hands[p] = frame.faces[q], frame.hands[q]
    return Keypoints(body, visible, faces, hands)


def _hidden(like: Floats, persons: int) -> Floats:
    return np.full((persons, *like.shape[1:]), -1, np.float32)
