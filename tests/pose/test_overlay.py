"""The 2D overlay against a plain re-drawing from docs/reference/pose.md 7, and at the edges of its
input."""

import colorsys
import math

import cv2
import numpy as np
import pytest

from engine.pose.keypoints import Keypoints
from engine.pose.overlay import composite, overlay

# --- the plain version: every step as the text says it, a fresh canvas for each person


def redraw(keypoints, height, width):
    total = np.zeros((height, width, 3), np.uint8)
    thin = max(1, min(2, int(min(height, width) / 300)))
    for person in range(len(keypoints.body)):
        canvas = np.zeros((height, width, 3), np.uint8)
        body, seen = keypoints.body[person], keypoints.visible[person]
        canvas = redraw_cheeks(canvas, body, seen, height, width)
        for hand in keypoints.hands[person]:
            pixels = [(int(x * width), int(y * height)) for x, y in hand]
            edges = [
                (0 if k == 0 else 4 * f + k, 4 * f + k + 1) for f in range(5) for k in range(4)
            ]
            for number, (a, b) in enumerate(edges):
                if min(*pixels[a], *pixels[b]) > 0.01:
                    colour = [255 * c for c in colorsys.hsv_to_rgb(number / 20, 1, 1)]
                    cv2.line(canvas, pixels[a], pixels[b], colour, thickness=thin)
            redraw_dots(canvas, pixels, thin, (0, 0, 255))
        face = [(int(x * width), int(y * height)) for x, y in keypoints.faces[person]]
        redraw_dots(canvas, face[17:27] + face[36:68], thin, (255, 255, 255))
        total = ((total.astype(int) + canvas) % 256).astype(np.uint8)
    return total


def redraw_dots(canvas, pixels, thin, colour):
    for x, y in pixels:
        if x > 0.01 and y > 0.01:
            cv2.circle(canvas, (x, y), thin, colour, thickness=-1)


def redraw_cheeks(canvas, body, seen, height, width):
    full = {(0, 14): (85, 0, 255), (14, 16): (170, 0, 255),
            (0, 15): (255, 0, 255), (15, 17): (255, 0, 170)}  # fmt: skip
    for (a, b), colour in full.items():
        if seen[a] and seen[b]:
            (x0, x1), (y0, y1) = body[[a, b], 0] * width, body[[a, b], 1] * height
            length = ((x0 - x1) ** 2 + (y0 - y1) ** 2) ** 0.5
            centre = (int(np.mean([x0, x1])), int(np.mean([y0, y1])))
            angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
            polygon = cv2.ellipse2Poly(centre, (int(length / 2), 4), angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, np.array(polygon), colour)
    canvas = (canvas * 0.6).astype(np.uint8)
    dots = {
        0: (255, 0, 0),
        14: (170, 0, 255),
        15: (255, 0, 255),
        16: (255, 0, 170),
        17: (255, 0, 85),
    }
    for i, colour in dots.items():
        if seen[i]:
            centre = (int(body[i, 0] * width), int(body[i, 1] * height))
            cv2.circle(canvas, centre, 4, colour, thickness=-1)
    return canvas


def replot(bones, canvas):
    """The composite, channel by channel."""
    result = bones.copy()
    for at in np.ndindex(canvas.shape):
        if canvas[at] != 0:
            result[at] = canvas[at]
    return result


# --- persons


def crowd(seed, persons=1, points=18, low=0.1, high=0.9):
    rng = np.random.default_rng(seed)

    def place(*shape):
        return rng.uniform(low, high, (*shape, 2)).astype(np.float32)

    faces, hands = place(persons, 68), place(persons, 2, 21)
    faces[rng.random(faces.shape[:-1]) < 0.1] = -1  # hidden
    hands[rng.random(hands.shape[:-1]) < 0.1] = -1
    visible = rng.random((persons, points)) < 0.8
    visible[:, 0] = True
    return Keypoints(place(persons, points), visible, faces, hands)


def alone(**changed):
    """A person of whom only the given parts are seen."""
    parts = {
        "body": np.zeros((1, 18, 2), np.float32),
        "visible": np.zeros((1, 18), bool),
        "faces": np.full((1, 68, 2), -1, np.float32),
        "hands": np.full((1, 2, 21, 2), -1, np.float32),
    }
    parts |= changed
    return Keypoints(parts["body"], parts["visible"], parts["faces"], parts["hands"])


def face_at(x, y, index=40):
    faces = np.full((1, 68, 2), -1, np.float32)
    faces[0, index] = (x, y)
    return alone(faces=faces)


@pytest.mark.parametrize(
    ("height", "width", "persons", "points"),
    [(336, 208, 1, 18), (512, 896, 2, 24), (599, 700, 1, 24), (600, 640, 1, 18), (960, 901, 3, 18)],
)
def test_every_size_and_number_of_persons_is_drawn_as_the_text_says(height, width, persons, points):
    keypoints = crowd(height, persons, points)
    want = redraw(keypoints, height, width)
    assert want.any()
    assert np.array_equal(overlay(keypoints, height, width), want)


def test_points_beyond_the_border_are_drawn_as_the_text_says():
    keypoints = crowd(3, persons=2, low=-0.5, high=1.5)
    assert np.array_equal(overlay(keypoints, 120, 90), redraw(keypoints, 120, 90))


@pytest.mark.parametrize(("side", "width_of_line"), [(599, 1), (600, 2), (1200, 2)])
def test_lines_are_two_pixels_wide_from_600_pixels_on(side, width_of_line):
    hands = np.full((1, 2, 21, 2), -1, np.float32)
    hands[0, 0, :2] = (0.2, 0.5), (0.8, 0.5)
    drawn = overlay(alone(hands=hands), side, side)
    assert (drawn[:, side // 2, 0] == 255).sum() in ((1,) if width_of_line == 1 else (2, 3))
    assert np.array_equal(drawn, redraw(alone(hands=hands), side, side))


def test_persons_that_overlap_are_added_modulo_256():
    one = face_at(0.5, 0.5)
    faces, hands = np.repeat(one.faces, 2, axis=0), np.repeat(one.hands, 2, axis=0)
    twice = Keypoints(np.zeros((2, 18, 2), np.float32), np.zeros((2, 18), bool), faces, hands)
    assert overlay(twice, 100, 100)[50, 50].tolist() == [254, 254, 254]  # 255 + 255 - 256
    assert overlay(one, 100, 100)[50, 50].tolist() == [255, 255, 255]


def test_the_first_row_and_column_hold_no_points():
    assert not overlay(face_at(0.009, 0.5), 100, 100).any()
    assert not overlay(face_at(0.5, 0.009), 100, 100).any()
    assert overlay(face_at(0.0101, 0.5), 100, 100)[50, 1].tolist() == [255, 255, 255]


def test_jaw_and_nose_are_not_drawn():
    drawn = {i for i in range(68) if overlay(face_at(0.5, 0.5, i), 60, 60).any()}
    assert drawn == {*range(17, 27), *range(36, 68)}


def test_the_body_itself_is_not_drawn_but_a_nose_in_the_corner_is():
    body = np.full((1, 18, 2), 0.5, np.float32)
    body[0, 0] = 0
    visible = np.ones((1, 18), bool)
    visible[0, 14:] = False
    drawn = overlay(alone(body=body, visible=visible), 60, 60)
    assert drawn[0, 0].tolist() == [255, 0, 0]
    assert drawn[20:, 20:].sum() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_points_that_are_no_measurement_are_hidden(value):
    keypoints = crowd(5)
    body, faces, hands = (a.copy() for a in (keypoints.body, keypoints.faces, keypoints.hands))
    body[0, 14], faces[0, 40], hands[0, 0, 5] = value, value, value
    got = overlay(Keypoints(body, keypoints.visible, faces, hands), 200, 150)
    visible = keypoints.visible.copy()
    visible[0, 14] = False
    body[0, 14], faces[0, 40], hands[0, 0, 5] = 0, -1, -1
    assert np.array_equal(got, redraw(Keypoints(body, visible, faces, hands), 200, 150))


def test_a_frame_without_persons_has_no_overlay():
    nobody = crowd(0, persons=0)
    canvas = overlay(nobody, 50, 40)
    assert not canvas.any()
    frame = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    assert np.array_equal(composite(frame, canvas), frame)


def test_the_overlay_replaces_channel_by_channel_and_leaves_its_arguments_alone():
    rng = np.random.default_rng(1)
    rgba = rng.integers(0, 256, (60, 50, 4), np.uint8)
    canvas = overlay(crowd(8), 60, 50)
    canvas[:20] = 0
    before, drawn = rgba.copy(), canvas.copy()
    got = composite(rgba[..., :3], canvas)
    assert np.array_equal(got, replot(rgba[..., :3], canvas))
    assert not np.array_equal(got, rgba[..., :3])
    assert np.array_equal(rgba, before)
    assert np.array_equal(canvas, drawn)
