"""A body and a procedural dance: where the sample joints come from.

The body has the 24 joints of SMPL. Its trunk is posed by rotations, its limbs are laid from the
trunk to where hands and feet shall be, so bones keep their lengths and planted feet stay put.
Camera space: millimetres, x right, y down, z forward; the dancer's left is at +x. T frames.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import BadRequest

Array = NDArray[np.floating]
Curve = Callable[[Array], Array]

BEATS_PER_MINUTE = 110.0
TURN_BEATS = 5.0  # one turn of the body takes five steps
PHRASE_BEATS = 2.0  # how long the arms keep to one move
FLOOR = 960.0  # y of the floor: the camera hangs at the height of the pelvis
DISTANCE = 3400.0  # z of the dancer
ELBOW = (0.48, 0.5, 0.72)  # where elbows bend to: outward, down, back
SOLE = 82.0  # height of an ankle over the floor
LEGS = ((1, 4, 7, 10), (2, 5, 8, 11))  # hip, knee, ankle, foot
ARMS = ((13, 16, 18, 20, 22), (14, 17, 19, 21, 23))  # collar, shoulder, elbow, wrist, hand

SIDES = np.array([1.0, -1.0])  # left, right: the sign of x


@dataclass(frozen=True, slots=True)
class BodyProportions:
    """Bone lengths of an adult of 1.7 m, each group times a factor."""

    trunk: float = 1.0
    arms: float = 1.0
    legs: float = 1.0
    shoulders: float = 1.0
    hips: float = 1.0

    @property
    def leg(self) -> tuple[float, float]:
        """Thigh and shin, mm."""
        return 395 * self.legs, 405 * self.legs

    @property
    def arm(self) -> tuple[float, float, float]:
        """Upper arm, forearm and the palm, mm."""
        return 265 * self.arms, 245 * self.arms, 80 * self.arms


@dataclass(frozen=True, slots=True)
class Pose:
    """The motion of a body in T frames. Angles in radians about x, y, z; side 0 is left."""

    pelvis: Array  # [T, 3] mm
    turn: Array  # [T, 3] of the pelvis against the room
    bend: Array  # [T, 3] of the chest against the pelvis
    nod: Array  # [T, 3] of the head against the chest
    hands: Array  # [T, 2, 3] wrists from the shoulders: outward, down, back; 1 is an arm's length
    drag: Array  # [T, 2, 3] what pulls the hands out of line with the forearms, same axes
    ankles: Array  # [T, 2, 3] mm
    headings: Array  # [T, 2] of the feet about y
    tiptoe: Array  # [T, 2] pitch of the feet, toes down


def skeleton(pose: Pose, body: BodyProportions) -> Array:
    """The joints [T, 24, 3] of a pose, mm."""
    joints = np.zeros((len(pose.pelvis), 24, 3))
    pelvis = rotation(pose.turn)
    bends = [pelvis @ rotation(pose.bend * share) for share in (1 / 3, 2 / 3, 1)]
    chest, head = bends[2], bends[2] @ rotation(pose.nod)
    trunk, hips, shoulders = body.trunk, 85 * body.hips, body.shoulders

    joints[:, 0] = pose.pelvis
    joints[:, 3] = joints[:, 0] + pelvis @ (0, -105 * trunk, 12)
    joints[:, 6] = joints[:, 3] + bends[0] @ (0, -130 * trunk, -2)
    joints[:, 9] = joints[:, 6] + bends[1] @ (0, -60 * trunk, -6)
    joints[:, 12] = joints[:, 9] + chest @ (0, -205 * trunk, 12)
    joints[:, 15] = joints[:, 12] + head @ (0, -95, -25)
    for side, x in enumerate(SIDES):
        hip, knee, ankle, foot = LEGS[side]
        joints[:, hip] = joints[:, 0] + pelvis @ (x * hips, 75, 0)
        joints[:, [knee, ankle, foot]] = _leg_joints(joints[:, hip], pose, side, body)
        collar, shoulder, *arm = ARMS[side]
        joints[:, collar] = joints[:, 9] + chest @ (75 * x * shoulders, -125 * trunk, 8)
        joints[:, shoulder] = joints[:, collar] + chest @ (105 * x * shoulders, -18, 0)
        joints[:, arm] = _arm_joints(joints[:, shoulder], chest, pose, side, body)
    return joints


def _leg_joints(hip: Array, pose: Pose, side: int, body: BodyProportions) -> Array:
    """Knee, ankle and foot [T, 3, 3]. The knee bends to where hips and foot, halfway, point."""
    heading = pose.headings[:, side]
    ahead = rotation(_about_y((heading + pose.turn[:, 1]) / 2)) @ (0.12 * SIDES[side], 0, -1)
    knee, ankle = _reach(hip, pose.ankles[:, side], body.leg, ahead)
    sole = rotation(_about_y(heading) + _about_x(pose.tiptoe[:, side]))
    return np.stack([knee, ankle, ankle + sole @ (0, 58, -125)], 1)


def _arm_joints(
    shoulder: Array, chest: Array, pose: Pose, side: int, body: BodyProportions
) -> Array:
    """Elbow, wrist and hand [T, 3, 3]. The elbow bends outward, down and back."""
    (upper, lower, palm), mirror = body.arm, np.array([SIDES[side], 1, 1])
    aim = chest @ (_soft(pose.hands[:, side]) * (upper + lower) * mirror)[..., None]
    elbow, wrist = _reach(
        shoulder, shoulder + aim[..., 0], (upper, lower), chest @ (np.array(ELBOW) * mirror)
    )
    pull = (chest @ (pose.drag[:, side] * mirror)[..., None])[..., 0]
    return np.stack([elbow, wrist, wrist + palm * unit((wrist - elbow) / lower + pull)], 1)


def rotation(angles: Array) -> Array:
    """Angles [..., 3] about x, y, z -> matrices [..., 3, 3]: about z first, about y last.

    A positive x leans forward, a positive y turns towards the own right, a positive z lowers the
    left side.
    """
    (cx, cy, cz), (sx, sy, sz) = (np.moveaxis(f(angles), -1, 0) for f in (np.cos, np.sin))
    zero, one = np.zeros_like(cx), np.ones_like(cx)
    about_x = [[one, zero, zero], [zero, cx, -sx], [zero, sx, cx]]
    about_y = [[cy, zero, sy], [zero, one, zero], [-sy, zero, cy]]
    about_z = [[cz, -sz, zero], [sz, cz, zero], [zero, zero, one]]
    x, y, z = (np.moveaxis(np.array(m), (0, 1), (-2, -1)) for m in (about_x, about_y, about_z))
    return y @ x @ z


def _about_x(angle: Array) -> Array:
    return angle[..., None] * np.array([1.0, 0, 0])


def _about_y(angle: Array) -> Array:
    return angle[..., None] * np.array([0, 1.0, 0])


def _reach(
    root: Array, target: Array, lengths: tuple[float, float], pole: Array
) -> tuple[Array, Array]:
    """Middle and end of two bones laid from root to target [T, 3], bent towards the pole."""
    first, second = lengths
    gap = target - root
    distance = np.linalg.norm(gap, axis=-1, keepdims=True)
    along = gap / distance
    distance = np.clip(distance, abs(first - second) + 60, 0.999 * (first + second))
    foot = (first**2 - second**2 + distance**2) / (2 * distance)
    side = unit(pole - along * (pole * along).sum(-1, keepdims=True))
    middle = root + along * foot + side * np.sqrt(first**2 - foot**2)
    return middle, root + along * distance


def _soft(aim: Array) -> Array:
    """Shortens a reach so that it nears a straight arm without ever locking the elbow."""
    length = np.linalg.norm(aim, axis=-1, keepdims=True)
    return 0.985 * aim / (1 + length**8) ** (1 / 8)


def unit(vector: Array) -> Array:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def standing(body: BodyProportions | None = None) -> Array:
    """The joints [24, 3] of the relaxed stand of the reference picture, mm."""
    one = np.ones((1, 1))
    pose = Pose(
        pelvis=np.array([[-14.0, FLOOR - 935 * (body.legs if body else 1.0), DISTANCE]]),
        turn=one * (0, -0.10, 0.045),
        bend=one * (0.01, 0.05, -0.09),
        nod=one * (0.02, 0.06, 0.09),
        hands=one[..., None] * [(0.24, 1.35, -0.05), (0.34, 1.25, -0.22)],
        drag=one[..., None] * [(-0.06, 0, -0.15), (-0.08, 0, -0.2)],
        ankles=one[..., None]
        * [(140, FLOOR - SOLE, DISTANCE - 55), (-105, FLOOR - SOLE, DISTANCE + 10)],
        headings=one * (-0.42, 0.30),
        tiptoe=one * (0, 0),
    )
    return skeleton(pose, body or BodyProportions())[0]


def dance(
    frames: int, fps: float, seed: int, body: BodyProportions | None = None
) -> NDArray[np.float32]:
    """The joints [T, 1, 24, 3] of a dance at 110 beats a minute, mm. Another seed, another dance.

    A step on every beat, hips over the standing foot, a bounce and a nod, arm moves in phrases of
    two beats and one turn on the spot. Raises BadRequest if there is nothing to dance.
    """
    if frames < 1 or not 0 < fps < np.inf:
        raise BadRequest(f"A dance of {frames} frames at {fps} fps; give at least 1 and above 0.")
    body, rng = body or BodyProportions(), np.random.default_rng(seed)
    beat = np.arange(frames) / fps * (BEATS_PER_MINUTE / 60)
    facing = _turning(beat[-1], rng)
    ankles, headings, tiptoe = _footwork(beat, facing, rng)
    arms = _moves(beat[-1], rng)
    sway = rng.uniform(0.13, 0.17)
    dip = rng.uniform(34, 46)
    lead = np.cos(np.pi * (beat - 0.575))  # +1: all on the right leg, -1: on the left
    down = 0.5 + 0.5 * np.cos(2 * np.pi * beat)  # 1 on the beat
    twist = sway * np.sin(np.pi * beat)
    pelvis = (ankles * (0.5 + 0.34 * np.stack([-lead, lead], -1))[..., None]).sum(1)
    pelvis[:, 1] = FLOOR - 925 * body.legs + dip * down
    pose = Pose(
        pelvis=pelvis,
        turn=np.stack([0.03 + 0.02 * down, facing(beat) + twist, sway * lead], -1),
        bend=np.stack([0.02 + 0.07 * down, -1.9 * twist, -1.7 * sway * lead], -1),
        nod=np.stack([0.20 * down - 0.08, 0.9 * twist, 0.85 * sway * lead], -1),
        hands=arms(beat),
        drag=-2.2 * (arms(beat + 0.05) - arms(beat - 0.05)),
        ankles=ankles,
        headings=headings,
        tiptoe=tiptoe,
    )
    return skeleton(_grounded(pose, body), body)[:, None].astype(np.float32)


def ease(x: Array) -> Array:
    """0 to 1 with a start and an end at rest: the least jerky way."""
    x = np.clip(x, 0, 1)
    return x**3 * (10 - 15 * x + 6 * x * x)


def _turning(beats: float, rng: np.random.Generator) -> Curve:
    """Which way the body faces at a beat, radians: one turn, as near the middle as steps allow."""
    start = max(1.0, np.round((beats - TURN_BEATS) / 2 + rng.uniform(-0.3, 0.3)))
    full = rng.choice((-2, 2)) * np.pi
    return lambda beat: full * ease((beat - start) / TURN_BEATS)


def _footwork(beat: Array, facing: Curve, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Ankles [T, 2, 3], headings [T, 2] and toe pitch [T, 2]: left and right step in turn.

    A foot moves on arcs about the dancer's spot and only while it is in the air.
    """
    stand = np.array([[0.0, 115, 0, 0, 0], [0.0, -115, 0, 0, 0]])  # heading, outward, back, spot
    place = np.repeat(stand[None], len(beat), axis=0)  # [T, 2, 5]
    air = np.zeros((len(beat), 2))
    for step in range(int(beat[-1]) + 1):
        side = step % 2
        x = SIDES[side]
        spot = rng.uniform((-50, -50), (50, 50))
        heading = facing(np.array(step + 1.6))
        reach = (x * rng.uniform(85, 165), rng.uniform(-75, 45))
        landing = np.array([heading, *reach, *spot])
        done = (beat - step - 0.1) / 0.85
        place[:, side] += ease(done)[:, None] * (landing - stand[side])
        stand[side] = landing
        done = np.clip(done, 0, 1)
        air[:, side] += 64 * (done * (1 - done)) ** 3
    heading, outward, back, x, z = np.moveaxis(place, -1, 0)
    c, s = np.cos(heading), np.sin(heading)
    height = FLOOR - SOLE - 105 * air
    ankles = (x + c * outward + s * back, height, DISTANCE + z - s * outward + c * back)
    return np.stack(ankles, -1), heading - 0.22 * SIDES, 0.42 * air


def _moves(beats: float, rng: np.random.Generator) -> Curve:
    """The places of the hands at a beat: one move a phrase, each melting into the next."""
    phrases = int(beats / PHRASE_BEATS) + 2
    order = [int(i) for _ in range(phrases) for i in rng.permutation(len(_MOVES))][:phrases]
    sway = rng.uniform(0.85, 1.1)

    def hands(beat: Array) -> Array:
        result = _MOVES[order[0]](beat) * 1.0
        for number in range(1, phrases):
            share = ease(beat - PHRASE_BEATS * number + 0.5)[:, None, None]
            result += share * (_MOVES[order[number]](beat) - _MOVES[order[number - 1]](beat))
            result += share * (1 - share) * (1.1, 0, -0.7)  # round the body, not through it
        return result * (1, sway, 1)

    return hands


def _sides(outward: ArrayLike, down: ArrayLike, back: ArrayLike) -> Array:
    """[T, 2, 3] of three rows, each [T, 2] or less."""
    return np.stack(np.broadcast_arrays(outward, down, back), -1).astype(np.float64)


def _phase(beat: Array, period: float, lag: float) -> Array:
    """[T, 2] the angle of a movement of so many beats, the right side behind by the lag."""
    return 2 * np.pi * beat[:, None] / period - np.array([0, lag])


def _wave(beat: Array) -> Array:
    """Arms out to the sides, a wave running through from one hand to the other."""
    angle = _phase(beat, 2, 0.75 * np.pi)
    return _sides(0.98, -0.12 - 0.52 * np.sin(angle), -0.30 + 0.12 * np.cos(angle))


def _roll(beat: Array) -> Array:
    """Forearms rolling about each other before the chest."""
    angle = _phase(beat, 1, np.pi)
    return _sides(-0.10, 0.30 - 0.20 * np.sin(angle), -0.60 - 0.17 * np.cos(angle))


def _sky(beat: Array) -> Array:
    """One hand reaches for the sky while the other comes down to the shoulder."""
    up = 0.5 + 0.5 * np.sin(_phase(beat, 2, np.pi))
    return _sides(0.42 - 0.06 * up, 0.22 - 1.40 * up, -0.40 + 0.28 * up)


def _crown(beat: Array) -> Array:
    """Both arms draw a wide circle from the hips to over the head."""
    angle = 1.55 - 1.15 * np.cos(_phase(beat, 4, 0.25))
    return _sides(0.20 + 0.82 * np.sin(angle) ** 2, 1.10 * np.cos(angle), -0.28)


def _swing(beat: Array) -> Array:
    """Bent arms swing past the hips, one forward while the other goes back."""
    angle = _phase(beat, 2, np.pi)
    return _sides(0.30, 0.52 - 0.14 * np.sin(angle), -0.28 - 0.36 * np.sin(angle))


_MOVES = (_wave, _roll, _sky, _crown, _swing)


def _grounded(pose: Pose, body: BodyProportions) -> Pose:
    """Lowers a pose as much as it takes for the legs to reach every step with bent knees."""
    joints = skeleton(pose, body)
    gap = pose.ankles - joints[:, [1, 2]]
    level = (gap[..., [0, 2]] ** 2).sum(-1)
    allowed = np.sqrt((0.985 * sum(body.leg)) ** 2 - level)
    drop = max(0.0, float((gap[..., 1] - allowed).max()))
    return replace(pose, pelvis=pose.pelvis + np.array([0, drop, 0]))
