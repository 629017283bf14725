"""Joints and keypoints -> the frames of the skeleton video that the denoiser follows."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from engine.flow import Check, go_on
from engine.pose.arrays import Floats, Frame
from engine.pose.bones import bones, palettes
from engine.pose.camera import Camera, base_camera
from engine.pose.keypoints import Keypoints
from engine.pose.overlay import composite, overlay
from engine.pose.render import render


def draw_skeleton(
    joints: Floats,
    height: int,
    width: int,
    *,
    camera: Camera | None = None,
    keypoints: Sequence[Keypoints] | None = None,
    check: Check = go_on,
) -> Iterator[Frame]:
    """RGB frames [H, W, 3] u8, one at a time, from joints [T, P, 24, 3] mm in camera space.

    camera: fitted to the reference picture; else that of the canvas (docs/reference/pose.md 5.1),
    whatever the size of the picture that the joints were found in. keypoints: one entry a frame.
    check: called with each frame; what it raises ends the drawing.
    """
    clip = [bones(frame, palettes(joints.shape[1])) for frame in joints]
    frames = render(clip, camera or base_camera(height, width), height, width)
    points = keypoints if keypoints is not None else [None] * len(clip)
    for frame, drawn in zip(frames, points, strict=True):
        check()
        rgb = np.empty((height, width, 3), np.uint8)
        cv2.cvtColor(frame, cv2.COLOR_RGBA2RGB, rgb)
        yield rgb if drawn is None else composite(rgb, overlay(drawn, height, width))
