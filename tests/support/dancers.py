"""A body that stands anywhere, as both kinds of networks see it, and fakes of the networks.

Frames are told apart by their first pixel, so that the fakes need not be asked in order.
"""

import numpy as np

from engine.pose.align import SMPL_OF_SLOT
from engine.pose.boxes import Detection
from engine.pose.camera import base_camera
from engine.pose.keypoints import Keypoints
from engine.pose.nlf import People
from tests.support.standin_models import NlfStandIn

HEIGHT, WIDTH = 128, 96
CAMERA = base_camera(HEIGHT, WIDTH)
SIZE = np.array([WIDTH, HEIGHT], np.float32)
BODY = NlfStandIn().skeleton.numpy()  # [24, 3] mm about its middle, facing the camera
HEAD, WRISTS = 15, (20, 21)
PICTURE = 255  # the first pixel of the reference picture


def body(x=0.0, z=3500.0, y=0.0, size=1.0):
    """A body [24, 3] mm in camera space."""
    return (BODY * size + (x, y, z)).astype(np.float32)


def project(joints, camera=CAMERA):
    """[..., 3] mm -> [..., 2] pixels."""
    x, y, z = np.moveaxis(np.asarray(joints, np.float64), -1, 0)
    return np.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], axis=-1)


def points(*persons, camera=CAMERA, visible=True):
    """Keypoints of bodies [24, 3]: a small round face at the head, small hands at the wrists."""
    count = len(persons)
    shares = project(np.reshape(persons, (count, 24, 3)), camera) / SIZE
    circle = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    ring = 0.03 * np.stack([np.cos(circle), np.sin(circle)], axis=-1)
    ring[30] = 0  # the nose tip is in the middle
    found = np.repeat(shares[:, [HEAD]], 18, axis=1)
    found[:, : len(SMPL_OF_SLOT)] = shares[:, list(SMPL_OF_SLOT)]
    faces = shares[:, [HEAD]] + ring
    hands = shares[:, list(WRISTS), None] + np.linspace(0, 0.03, 21)[:, None]
    return Keypoints(
        found.astype(np.float32),
        np.full((count, 18), visible),
        faces.astype(np.float32),
        hands.astype(np.float32),
    )


def detection(*persons, camera=CAMERA):
    """The answer of a 2D detector for bodies; for nobody, points that are not visible."""
    if not persons:
        return Detection(points(body(), visible=False), np.empty((0, 4), np.float32))
    corners = [(project(one, camera).min(0), project(one, camera).max(0)) for one in persons]
    return Detection(points(*persons, camera=camera), np.float32(corners).reshape(-1, 4))


def people(*persons):
    """The answer of NLF for bodies [24, 3]."""
    corners = [(np.nanmin(project(p), 0), np.nanmax(project(p), 0)) for p in persons]
    boxes = [[*low, *(high - low), 0.9] for low, high in corners]
    return People(np.reshape(persons, (-1, 24, 3)), np.float32(boxes).reshape(-1, 5))


def frames(count, height=HEIGHT, width=WIDTH):
    clip = np.zeros((count, height, width, 3), np.uint8)
    clip[:, 0, 0, 0] = np.arange(count)
    return clip


def picture(height=HEIGHT, width=WIDTH):
    shown = np.zeros((height, width, 3), np.uint8)
    shown[0, 0, 0] = PICTURE
    return shown


class Dancers:
    """The networks' answers for a clip, a list of bodies a frame; counts what they are asked.

    seen: what the 2D detector finds instead of the same bodies; reference: what it finds in the
    picture.
    """

    def __init__(self, *clip, seen=None, reference=None, hashes=("a", "b", "c")):
        self.people = [people(*persons) for persons in clip]
        self.seen = seen or [detection(*persons) for persons in clip]
        self.reference = reference
        self.files = list(hashes)
        self.located, self.detected, self.pictures = [], [], 0

    def hashes(self):
        return self.files

    def locator(self):
        return self

    def detector(self):
        return self

    def locate(self, frames, progress=None):
        numbers = []
        for frame in frames:  # asks for the next when it is done with one, as networks do
            numbers.append(int(frame[0, 0, 0]))
            self.located.append(numbers[-1])
        if progress is not None:
            progress(len(self.located))
        return [self.people[number] for number in numbers]

    def detect(self, frames):
        for frame in frames:
            number = int(frame[0, 0, 0])
            if number == PICTURE:
                self.pictures += 1
                yield self.reference
            else:
                self.detected.append(number)
                yield self.seen[number]
