"""Joints of drawn persons, and a 2D detector that answers with them."""

import numpy as np

from engine.pose.boxes import Detection
from engine.pose.keypoints import Keypoints

# joints of `mask_scenes.drawn_person`, x from the middle and y from the top of somebody 300 high
STANDING = np.array([
    (0, 30), (0, 60), (-38, 60), (-40, 100), (-40, 150), (38, 60), (40, 100), (40, 150),
    (-20, 168), (-20, 235), (-20, 290), (20, 168), (20, 235), (20, 290),
    (-6, 25), (6, 25), (-15, 28), (15, 28),
], float)  # fmt: skip


def points(tall, foot, across, hidden=()):
    """Joints [18, 2] in pixels of a drawn person, and which are seen [18]."""
    visible = np.ones(18, bool)
    visible[list(hidden)] = False
    return STANDING * tall / 300 + [across, foot - tall], visible


def detected(height, width, *persons):
    """The answer of a detector for persons as `points` gives them; boxes are around joints."""
    body = np.stack([joints for joints, _ in persons])
    boxes = np.concatenate([body.min(1) - 8, body.max(1) + 8], axis=1).clip(0, [width, height] * 2)
    none = np.full((len(persons), 68, 2), -1, np.float32)
    found = Keypoints(
        (body / [width, height]).astype(np.float32), np.stack([seen for _, seen in persons]),
        none, np.full((len(persons), 2, 21, 2), -1, np.float32),
    )  # fmt: skip
    return Detection(found, boxes.astype(np.float32))


NOBODY = Detection(detected(9, 9, points(9, 9, 9)).keypoints, np.empty((0, 4), np.float32))


class Drawn:
    """A detector of a picture and a motion, told apart by their first pixel; notes each."""

    def __init__(self, picture, *frames):
        self.answers = {255: picture, **dict(enumerate(frames))}
        self.asked = []

    def __call__(self, frames):
        for frame in frames:
            self.asked.append(int(frame[0, 0, 0]))
            yield self.answers[self.asked[-1]]


NECK, HIPS = 1, [8, 11]


def trunk(height, width, box, neck, hip):
    """The answer of a detector for somebody with a box whose neck and hips alone are seen."""
    joints, seen = np.full((18, 2), -9.0), np.zeros(18, bool)
    joints[NECK], joints[HIPS] = neck, hip
    seen[[NECK, *HIPS]] = True
    found = detected(height, width, (joints, seen))
    return Detection(found.keypoints, np.array([box], np.float32))


def larger_trunk(frames):
    """A detector of the jobs of `tests.support.scail2`: a torso of 20 pixels in the picture's
    square, and of 30 in the dance, where somebody 8 to 40 across is cut by the lower edge.
    """
    for frame in (shown := list(frames)):
        size = frame.shape[:2]
        if len(shown) == 1:
            yield trunk(*size, (24, 16, 56, 48), (40, 22), (40, 42))
        else:
            yield trunk(*size, (8, 16, 40, 64), (24, 24), (24, 54))
