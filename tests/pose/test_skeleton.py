"""The skeleton video: bones, then the overlay, frame by frame."""

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import Cancelled
from engine.pose.bones import bones, palettes
from engine.pose.camera import Camera, base_camera
from engine.pose.keypoints import Keypoints
from engine.pose.overlay import composite, overlay
from engine.pose.render import render
from engine.pose.skeleton import draw_skeleton

HEIGHT, WIDTH = 96, 64


def dance(frames=4, persons=1):
    rng = np.random.default_rng(0)
    place = rng.uniform((-400, -800, 2500), (400, 800, 3500), (frames, persons, 24, 3))
    return place.astype(np.float32)


def points(frames=4):
    rng = np.random.default_rng(1)

    def frame():
        body, face, hands = (rng.uniform(0.2, 0.8, (1, *n, 2)) for n in ((18,), (68,), (2, 21)))
        seen = np.ones((1, 18), bool)
        return Keypoints(body.astype("f"), seen, face.astype("f"), hands.astype("f"))

    return [frame() for _ in range(frames)]


def rendered(joints, camera):
    clip = [bones(frame, palettes(joints.shape[1])) for frame in joints]
    return [frame[..., :3] for frame in render(clip, camera, HEIGHT, WIDTH)]


@pytest.mark.parametrize("persons", [1, 2])
def test_without_keypoints_the_frames_are_the_rendered_bones(persons):
    joints = dance(persons=persons)
    got = list(draw_skeleton(joints, HEIGHT, WIDTH))
    assert got[0].flags.c_contiguous
    assert np.array_equal(got, rendered(joints, base_camera(HEIGHT, WIDTH)))
    assert all(frame.any() for frame in got)


def test_the_overlay_lies_over_the_bones_of_the_fitted_camera():
    joints, keypoints, camera = dance(), points(), Camera(90.0, 80.0, 40.0, 50.0)
    got = draw_skeleton(joints, HEIGHT, WIDTH, camera=camera, keypoints=keypoints)
    below = rendered(joints, camera)
    want = [composite(rgb, overlay(k, HEIGHT, WIDTH)) for rgb, k in zip(below, keypoints)]
    assert np.array_equal(list(got), want)
    assert not np.array_equal(want, below)


def test_frames_come_one_at_a_time():
    good, bad = points(2)
    bad = replace(bad, hands=bad.hands[:0])  # a person without hands
    frames = draw_skeleton(dance(2), HEIGHT, WIDTH, keypoints=[good, bad])
    first = draw_skeleton(dance(2), HEIGHT, WIDTH, keypoints=points(2))
    assert np.array_equal(next(frames), next(first))
    with pytest.raises(IndexError):  # the second was not looked at before
        next(frames)


def test_a_frame_without_a_person_is_black():
    joints = dance()
    joints[2] = 0
    got = list(draw_skeleton(joints, HEIGHT, WIDTH))
    assert [bool(frame.any()) for frame in got] == [True, True, False, True]


def test_keypoints_for_another_number_of_frames_are_refused():
    with pytest.raises(ValueError, match="zip"):
        list(draw_skeleton(dance(4), HEIGHT, WIDTH, keypoints=points(3)))


def test_drawing_asks_with_each_frame_whether_to_go_on():
    asked = []

    def check():
        asked.append(len(asked))
        if len(asked) == 3:
            raise Cancelled("enough")

    frames = draw_skeleton(dance(9), HEIGHT, WIDTH, check=check)
    with pytest.raises(Cancelled, match="enough"):
        list(frames)
    assert asked == [0, 1, 2]
