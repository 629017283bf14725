"""2D whole-body keypoints of one frame, as every detector delivers and the overlay draws them."""

from dataclasses import dataclass

from engine.pose.arrays import Bools, Floats


@dataclass(frozen=True, slots=True)
class Keypoints:
    """Coordinates are shares of the picture's width and height, x right, y down.

    Hidden face and hand points are negative. `body` follows OpenPose: 0 nose, 1 neck, 2-4 right
    arm, 5-7 left arm, 8-10 right leg, 11-13 left leg, 14-17 eyes and ears, 18-23 feet if known.
    """

    body: Floats  # [P, 18 or 24, 2]
    visible: Bools  # [P, 18 or 24]
    faces: Floats  # [P, 68, 2]
    hands: Floats  # [P, 2, 21, 2] the person's left, then right
