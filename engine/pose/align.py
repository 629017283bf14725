"""Camera fit on the reference body: the dancer stands where the person of the picture stands.

One pinhole camera K' is fitted for the whole clip, on the dancer's joints in the first frame and
the reference picture's 2D body. The joints never change. The 2D face and hands follow K', so that
they stay on the drawn bones. Source: docs/reference/pose.md 5 and 11.

One switch, `Mode`, chooses between the two ways to do it:

exact     the true optimum in closed form; hidden points are ignored and stay hidden
official  scipy's L-BFGS-B on the reference program's cost, from its start and with its defaults;
          where it stops early depends on the processor, there as here. Hidden points are treated
          as points at (-1, -1)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from engine.errors import BadMedia
from engine.pose.arrays import AnyFloats, Bools, Doubles, Floats
from engine.pose.bones import FARTHEST
from engine.pose.camera import Camera, base_camera
from engine.pose.keypoints import Keypoints

log = logging.getLogger(__name__)

Mode = Literal["exact", "official"]
Body = Literal["down", "central", "none"]  # legs decide, arms decide, too few points to decide

NEAREST_MM = 0.01  # a joint at this depth or nearer has no place in the picture
SMPL_OF_SLOT = (15, 12, 17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7)  # SMPL joint of OpenPose 0..13
NECK, LOWER, UPPER = 1, (9, 10, 12, 13), (0, 2, 3, 5, 6)  # OpenPose slots
WEIGHTS: dict[Body, tuple[float, float]] = {"down": (1, 4), "central": (8, 1)}  # neck, each other
M_RANGE, S_RANGE = (0.7, 1.4), (0.8, 1.15)
FACE_SCALE_RANGE = (0.8, 1.5)
NOSE_TIP, FACE_POINTS_NEEDED = 30, 10  # of the 68; the second is for `exact` alone
HEAD, WRISTS = 15, (20, 21)  # SMPL joints; left wrist, then right
FLAT_PX2 = 1e-12  # variance below which points count as one row or column


@dataclass(frozen=True, slots=True)
class Alignment:
    """The fitted camera, and what `place` must know to move the 2D points with it."""

    camera: Camera  # K'
    m: float  # focal length as a share of the base camera's
    s: float  # the vertical focal length is m * s times the base camera's
    body: Body
    mode: Mode
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Matches:
    """Points that dance and reference have in common; the neck comes first if it is there."""

    points: Floats  # [n, 3] mm, Z > 0
    pixels: Floats  # [n, 2], where the reference shows them
    body: Body
    has_neck: bool

    @property
    def weights(self) -> Doubles:
        """The factors [n] of the squared distances of the points."""
        neck, other = WEIGHTS[self.body]
        weights = np.full(len(self.points), other, np.float64)
        if self.has_neck:
            weights[0] = neck
        return weights


def fit(
    joints: Floats, reference: Keypoints, height: int, width: int, mode: Mode = "exact"
) -> Alignment:
    """The camera that puts the dancer on the reference's person (docs/reference/pose.md 5.2).

    `joints` [24, 3] mm, camera space, of the first driving frame that shows the dancer. With too
    few points in common the base camera is kept and a warning logged: `body` is then "none".
    """
    both = matches(joints, reference, height, width, mode)
    if len(both.points) < 2 or not (both.points[:, 2] > NEAREST_MM).all():
        log.warning(
            "the camera is not aligned: it takes two body points or more, all in front of the "
            "camera, seen in the dance and in the reference; there are %d",
            len(both.points),
        )
        base = base_camera(height, width)
        return Alignment(base, 1.0, 1.0, "none", mode, height, width)
    found = solve(both, height, width, mode)
    log.info(
        "camera aligned on the %s body: m %.4f, s %.4f (%s)", both.body, found.m, found.s, mode
    )
    return found


def matches(joints: Floats, reference: Keypoints, height: int, width: int, mode: Mode) -> Matches:
    """The points that the fit compares (docs/reference/pose.md 5.2)."""
    points = np.asarray(joints, np.float32)[list(SMPL_OF_SLOT)]  # [14, 3]
    slots, body = _slots(points, reference, mode)
    size = np.array([width, height], np.float32)
    seen = reference.body[0, slots] if slots else np.zeros((0, 2))
    return Matches(points[slots], seen.astype(np.float32) * size, body, NECK in slots)


def solve(both: Matches, height: int, width: int, mode: Mode) -> Alignment:
    """Minimises the weighted squared distance in pixels over m, s and a shift of the picture."""
    base = base_camera(height, width)
    p, r = np.asarray(both.points, np.float64), np.asarray(both.pixels, np.float64)
    if mode == "official":
        m, s, right, down = _official(p, r, base, both.weights)
        camera = Camera(base.fx * m, base.fx * m * s, base.cx + right, base.cy + down)
        return Alignment(camera, m, s, both.body, mode, height, width)
    weights = both.weights[:, None] / both.weights.sum()
    rays = base.fx * p[:, :2] / p[:, 2:]  # [n, 2] pixels from the picture's centre
    ray, seen = (weights * rays).sum(0), (weights * r).sum(0)  # [2] weighted means
    spread = (weights * (rays - ray) ** 2).sum(0)  # [2] Sxx, Syy
    slope = (weights * (rays - ray) * (r - seen)).sum(0)  # [2] Sxu, Syv
    a, b = _exact(spread, slope)
    cx, cy = (seen - np.array([a, b]) * ray).tolist()
    camera = Camera(base.fx * a, base.fx * b, cx, cy)
    return Alignment(camera, a, b / a, both.body, mode, height, width)


def place(
    clip: Sequence[Keypoints], joints: Floats, reference: Keypoints, alignment: Alignment
) -> list[Keypoints]:
    """Puts the first person's face and hands where the aligned bones will be drawn.

    `joints` [T, 24, 3] mm: that person in every frame of the clip, zeros where missing. Other
    persons and frames without a person stay as they are. The face is first brought to the
    reference's size, then everything is moved (docs/reference/pose.md 5.3, 5.4).
    """
    if len(clip) != len(joints):
        raise BadMedia(
            f"There are 2D points of {len(clip)} frames and 3D joints of {len(joints)}. "
            "Both must come from the same frames."
        )
    scale = face_scale(clip, reference, alignment.mode)
    scaled = scale_faces(clip, scale, alignment.mode)
    return [shift(frame, at, alignment) for frame, at in zip(scaled, joints)]


def face_scale(clip: Sequence[Keypoints], reference: Keypoints, mode: Mode) -> float:
    """The reference's face as a multiple of the dancer's, kept in 0.8 to 1.5; 1 if unknown.

    It is measured in the first frame with a person; in `exact` mode in the first that shows the
    nose tip and ten face points which the reference shows too.
    """
    if not len(reference.faces):
        return 1.0
    wanted = reference.faces[0]
    for frame in clip:
        if not len(frame.faces):
            continue
        face = frame.faces[0]
        use = np.arange(len(face)) != NOSE_TIP  # [68]
        if mode == "exact":
            both = _shown(face) & _shown(wanted)
            use &= both
            if not both[NOSE_TIP] or use.sum() < FACE_POINTS_NEEDED:
                continue
        have, want = (
            np.linalg.norm(points[use] - points[NOSE_TIP], axis=-1).mean()
            for points in (face, wanted)
        )
        return float(np.clip(want / have, *FACE_SCALE_RANGE)) if have >= 1e-6 else 1.0
    return 1.0


def scale_faces(clip: Sequence[Keypoints], scale: float, mode: Mode) -> list[Keypoints]:
    """Scales the first person's face about its nose tip and the body about its nose.

    Source: docs/reference/pose.md 5.3.
    """
    return [_scale_face(frame, scale, mode) for frame in clip]


def shift(frame: Keypoints, joints: Floats, alignment: Alignment) -> Keypoints:
    """Moves the first person's points as K' moves joints [24, 3] (docs/reference/pose.md 5.4)."""
    if not len(frame.body):
        return frame
    moves = _moves(joints, alignment)  # [24, 2]
    exact = alignment.mode == "exact"
    face = frame.faces[0] + moves[HEAD]
    hands = []
    for hand, wrist in zip(frame.hands[0], WRISTS):
        moved = hand + moves[wrist]
        if not exact or _shown(hand)[0]:
            growth = np.array([alignment.m, alignment.m * alignment.s])
            moved = (moved - moved[0]) * growth + moved[0]
        hands.append(_keep_hidden(hand, moved) if exact else moved)
    if exact:
        face = _keep_hidden(frame.faces[0], face)
    return _with_first_person(frame, frame.body[0] + moves[HEAD], face, np.stack(hands))


def _slots(points: Floats, reference: Keypoints, mode: Mode) -> tuple[list[int], Body]:
    """The OpenPose slots to compare, neck first, and the part of the body they belong to."""
    if not len(reference.body):
        return [], "none"
    measured = np.asarray((np.abs(points) < FARTHEST).all(axis=-1))  # [14]
    known = measured & (np.where(measured[:, None], points, 0).sum(-1) != 0)
    placed = np.asarray(np.isfinite(reference.body[0, : len(points)]).all(axis=-1))
    usable = known & placed & reference.visible[0, : len(points)]
    lower = [slot for slot in LOWER if usable[slot]]
    upper = [slot for slot in UPPER if usable[slot]]
    # The reference program takes the neck without asking whether it was seen.
    neck = [NECK] if usable[NECK] or (mode == "official" and placed[NECK]) else []
    if len(lower) == len(LOWER):
        return neck + lower, "down"
    return neck + upper, "central"


def _exact(spread: Doubles, slope: Doubles) -> tuple[float, float]:
    """(a, b) = (m, m s) with the least of spread . (a^2, b^2) - 2 slope . (a, b) in the bounds."""
    (low_m, high_m), (low_s, high_s) = M_RANGE, S_RANGE
    (sxx, syy), (sxu, syv) = spread.tolist(), slope.tolist()
    if sxx < FLAT_PX2:  # one column: the width says nothing about m
        return 1.0, 1.0 if syy < FLAT_PX2 else _clip(syv / syy, low_s, high_s)
    a = sxu / sxx
    if syy < FLAT_PX2:  # one row: nothing about s
        a = _clip(a, low_m, high_m)
        return a, a
    b = syv / syy
    if low_m <= a <= high_m and low_s * a <= b <= high_s * a:
        return a, b
    edges: list[tuple[float, float]] = []  # the best point of each edge of the allowed polygon
    for k in S_RANGE:
        best = _clip((sxu + k * syv) / (sxx + k * k * syy), low_m, high_m)
        edges.append((best, k * best))
    for side in M_RANGE:
        edges.append((side, _clip(b, low_s * side, high_s * side)))
    return min(edges, key=lambda e: sxx * (e[0] - a) ** 2 + syy * (e[1] - b) ** 2)


def _official(
    points: Doubles, pixels: Doubles, base: Camera, weights: Doubles
) -> tuple[float, float, float, float]:
    """m, s and the shift at which scipy's minimiser stops with its defaults."""
    from scipy.optimize import minimize  # slow to import: only when used

    f, (x, y, z) = base.fx, points.T
    width, height = 2 * base.cx, 2 * base.cy

    def cost(unknowns: Doubles) -> float:
        m, s, right, down = unknowns
        u = (f * m) * x / z + (base.cx + right)
        v = ((f * m) * s) * y / z + (base.cy + down)
        squared = (pixels - np.stack([u, v], axis=-1)) ** 2
        return squared[:1].sum() * weights[0] + squared[1:].sum() * weights[1]

    bounds = (M_RANGE, S_RANGE, (-width, width), (-height, height))
    m, s, right, down = minimize(cost, (1.0, 1.0, 0.0, 0.0), bounds=bounds).x.tolist()
    return m, s, right, down


def _scale_face(frame: Keypoints, scale: float, mode: Mode) -> Keypoints:
    if not len(frame.body):
        return frame
    face, body = frame.faces[0], frame.body[0]
    larger_face = (face - face[NOSE_TIP]) * np.float32(scale) + face[NOSE_TIP]
    larger_body = (body - body[0]) * np.float32(scale) + body[0]
    if mode == "exact":
        larger_face = _keep_hidden(face, larger_face) if _shown(face)[NOSE_TIP] else face
        larger_body = larger_body if frame.visible[0, 0] else body
    return _with_first_person(frame, larger_body, larger_face, frame.hands[0])


def _moves(joints: Floats, alignment: Alignment) -> Doubles:
    """The move of each joint from K0 to K' [24, 2], as shares of the picture; 0 if missing."""
    base, camera = base_camera(alignment.height, alignment.width), alignment.camera
    points = np.asarray(joints, np.float64)
    usable = (np.abs(points) < FARTHEST).all(-1) & (points[:, 2] > NEAREST_MM)
    x, y, z = np.where(usable[:, None], points, 1.0).T
    right = ((camera.fx - base.fx) * x / z + camera.cx - base.cx) / alignment.width
    down = ((camera.fy - base.fy) * y / z + camera.cy - base.cy) / alignment.height
    return np.where(usable[:, None], np.stack([right, down], axis=-1), 0.0)


def _shown(points: Floats) -> Bools:
    """True for points that are shown: hidden ones are negative, and NaN is hidden too."""
    return np.asarray((np.isfinite(points) & (points >= 0)).all(axis=-1))


def _keep_hidden(before: Floats, after: AnyFloats) -> AnyFloats:
    return np.where(_shown(before)[:, None], after, before)


def _with_first_person(
    frame: Keypoints,
    body: AnyFloats,
    face: AnyFloats,
    hands: AnyFloats,
) -> Keypoints:
    """A copy of the frame with other points for its first person."""
    copies = [frame.body.copy(), frame.faces.copy(), frame.hands.copy()]
    for copy, first in zip(copies, (body, face, hands)):
        copy[0] = first
    return replace(frame, body=copies[0], faces=copies[1], hands=copies[2])


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
