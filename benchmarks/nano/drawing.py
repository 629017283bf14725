"""The drawing of a person: where the sample picture comes from.

A drawing is a list of soft parts, each a blend of round cones in space, painted from far to near.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.nano.dance import ARMS, FLOOR, LEGS, SIDES, Array, unit
from benchmarks.nano.paint import Cone, ConePart, Tint, cover, inside, paint
from engine.errors import BadMedia
from engine.pose.camera import base_camera

Hair = Literal["short", "bob", "ponytail", "bun"]


@dataclass(frozen=True, slots=True)
class Look:
    """Colours and proportions of a drawing. Lengths are shares of the limb they cover."""

    skin: Tint = (226, 170, 138)
    hair: Tint = (66, 40, 38)
    top: Tint = (238, 108, 91)
    stripe: Tint = (255, 226, 190)
    trousers: Tint = (47, 66, 102)
    shoes: Tint = (250, 247, 240)
    soles: Tint = (238, 108, 91)
    wall: Tint = (250, 229, 205)
    disc: Tint = (255, 203, 140)
    floor: Tint = (214, 176, 148)
    style: Hair = "bob"
    sleeves: float = 0.34  # of the arm
    legs: float = 0.93  # of the leg
    flare: float = 1.05  # hem of the trousers against the ankle of a slim pair
    girth: float = 1.0  # thickness of body and limbs
    head: float = 1.14


@dataclass(frozen=True, slots=True)
class Room:
    """Colours of a room, and the disc on its wall."""

    wall: Tint
    disc: Tint
    floor: Tint
    centre: tuple[float, float] = (0.0, -250.0)  # of the disc, mm right of and below the camera
    radius: float = 1020.0  # mm


_SKINS: tuple[Tint, ...] = (
    (244, 205, 176), (226, 170, 138), (190, 130, 96), (141, 90, 64), (92, 58, 44),
)  # fmt: skip
_HAIRS: tuple[Tint, ...] = (
    (34, 28, 32), (66, 40, 38), (120, 72, 44), (196, 150, 90), (150, 52, 40), (150, 150, 150),
)  # fmt: skip


def random_look(rng: np.random.Generator, hue: float | None = None) -> Look:
    """Another person in other clothes in another room; `hue` of the shirt, in turns, or any."""
    styles: tuple[Hair, ...] = ("short", "bob", "ponytail", "bun")
    hue = rng.uniform(0, 1) if hue is None else hue

    def tint(turn: float, vivid: float, light: float) -> Tint:
        """A colour so far round the wheel from this look's hue, a little at random."""
        angle = 2 * np.pi * (hue + turn + rng.uniform(-0.04, 0.04) + np.array([0, 1 / 3, 2 / 3]))
        level = light * (1 - vivid * (0.5 - 0.5 * np.cos(angle))) * rng.uniform(0.9, 1)
        red, green, blue = (int(255 * value) for value in level)
        return red, green, blue

    return Look(
        skin=_SKINS[rng.integers(len(_SKINS))],
        hair=_HAIRS[rng.integers(len(_HAIRS))],
        top=tint(0, 0.75, 0.95),
        stripe=tint(0.1, 0.25, 1.0),
        trousers=tint(0.5, 0.6, rng.uniform(0.3, 0.75)),
        shoes=tint(0.6, 0.3, rng.uniform(0.3, 1.0)),
        soles=tint(0, 0.6, 0.95),
        wall=tint(0.45, 0.22, 0.98),
        disc=tint(0.5, 0.4, 1.0),
        floor=tint(0.45, 0.35, 0.82),
        style=styles[rng.integers(len(styles))],
        sleeves=float(rng.choice((0.25, 0.36, 0.95))),
        legs=float(rng.choice((0.4, 0.8, 0.93))),
        flare=rng.uniform(0.95, 1.5),
        girth=rng.uniform(0.88, 1.18),
        head=rng.uniform(1.02, 1.15),
    )


@dataclass(frozen=True, slots=True)
class BodyFrame:
    """Three directions of a part of the body."""

    left: Array
    up: Array
    front: Array

    def __call__(self, left: float, up: float, front: float) -> Array:
        return left * self.left + up * self.up + front * self.front


def draw_dancer(joints: ArrayLike, height: int, width: int, look: Look) -> NDArray[np.uint8]:
    """A picture [H, W, 3] of one person. joints [24, 3] mm before the camera, else BadMedia."""
    person = np.asarray(joints, np.float64)
    if person.shape != (24, 3) or not (np.isfinite(person).all() and (person[:, 2] > 500).all()):
        raise BadMedia(
            f"Joints {person.shape} cannot be drawn. Give [24, 3] finite mm, z above 500."
        )
    camera = base_camera(height, width)
    canvas = draw_room([person], height, width, Room(look.wall, look.disc, look.floor))
    for part in _parts(person, look):
        paint(canvas, part, camera)
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


def draw_person(joints: Array, height: int, width: int, look: Look) -> Array:
    """One person without a room: colours over black, then what is covered, 0..1: [H, W, 4]."""
    camera = base_camera(height, width)
    canvas = np.zeros((height, width, 4))
    for part in _parts(joints, look):
        paint(canvas, part, camera)
    return canvas


def draw_room(people: Sequence[Array], height: int, width: int, room: Room) -> Array:
    """Wall, disc and floor [H, W, 3] in 0..255, with the shadows of people [24, 3] on the floor."""
    camera = base_camera(height, width)
    mm = camera.fy / 4600  # pixels in a millimetre of wall
    edge = camera.cy + mm * FLOOR  # where wall and floor meet
    v, u = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    canvas = np.empty((height, width, 3))
    canvas[:] = np.array(room.wall) * (0.94 + 0.07 * np.clip(v / edge, 0, 1))[..., None]
    x, y = room.centre
    disc = np.hypot(u - camera.cx - x * mm, v - camera.cy - y * mm) - room.radius * mm
    cover(canvas, np.array(room.disc, np.float64), inside(disc))
    ground, v = canvas[int(edge) :], v[int(edge) :]
    z = camera.fy * FLOOR / (v - camera.cy)
    x = (u - camera.cx) * z / camera.fx
    shadow = np.zeros(z.shape)
    for joints in people:
        spot = 0.20 * _spot(x - joints[0, 0] - 60, z - joints[0, 2], 330, 240)
        shadow = np.maximum(shadow, spot)
        for foot in joints[[7, 8, 10, 11]]:
            lift = max(0.0, FLOOR - 45 - foot[1])
            spread = 95 + 0.6 * lift
            dark = 0.5 * np.exp(-lift / 90) * _spot(x - foot[0], z - foot[2], spread, spread)
            shadow = np.maximum(shadow, dark)
    bright = 0.93 + 0.12 * np.clip((v - edge) / (height - edge), 0, 1)
    colour = np.array(room.floor) * (bright * (1 - shadow))[..., None]
    cover(ground, colour, inside(edge - v))
    cover(ground, np.array(room.floor) * 0.8, inside(v - edge - 9 * mm) * inside(edge - v))
    return canvas


def _spot(x: Array, z: Array, wide: float, deep: float) -> Array:
    """A soft blot, 1 in its middle."""
    return np.exp(-((x / wide) ** 2)) * np.exp(-((z / deep) ** 2))


def _parts(joints: Array, look: Look) -> Iterator[ConePart]:
    """All parts, far ones first. Legs are under the shirt; arms and hair before or behind it."""
    trunk, head = _trunk_frame(joints), _head_frame(joints)
    depth = joints[9, 2]
    groups = [
        (depth - 1, _trunk(joints, trunk, look)),
        (depth - 2, _head(joints, head, look)),
        (depth + 75 * -head.front[2], _back_hair(joints, head, look)),
    ]
    for side, (leg, arm) in enumerate(zip(LEGS, ARMS)):
        outward = SIDES[side] * trunk.left
        order = joints[list(leg[1:]), 2].mean() - depth
        groups.append((depth + 1000 + order, _leg(joints[list(leg)], trunk, look)))
        order = joints[list(arm[1:]), 2] @ (0.1, 0.25, 0.4, 0.25) - 60
        groups.append((order, _arm(joints[list(arm[1:])], outward, trunk, look)))
    groups.append((depth + 1999, _seat(joints, trunk, look)))
    for _, parts in sorted(groups, key=lambda group: -group[0]):
        yield from parts


def _frame(left: Array, up: Array) -> BodyFrame:
    up = unit(up)
    left = unit(left - up * (left @ up))
    return BodyFrame(left, up, np.cross(left, up))


def _trunk_frame(joints: Array) -> BodyFrame:
    return _frame(joints[16] - joints[17], joints[12] - joints[0])


def _head_frame(joints: Array) -> BodyFrame:
    """The head looks where the chest does; it leans as neck and head joint say."""
    chest = _trunk_frame(joints)
    return _frame(chest.left, joints[15] - joints[12] - chest.front * 25)


def _seat(joints: Array, trunk: BodyFrame, look: Look) -> list[ConePart]:
    at, wide = joints[0] - trunk.up * 45, trunk.left * 60
    return [ConePart([(at - wide, at + wide, 92 * look.girth, 92 * look.girth)], look.trousers)]


def _shoe_axes(ankle: Array, foot: Array) -> tuple[Array, Array]:
    """Ahead and down of a foot: its bone falls by 58 of 138 mm when it stands flat."""
    bone = unit(foot - ankle)
    side = np.cross(bone, (0.0, 1.0, 0.0))
    side = unit(side) if float(side @ side) > 1e-6 else np.array([1.0, 0, 0])
    below = np.cross(side, bone)
    flat = np.arctan2(58, 125)
    return bone * np.cos(flat) - below * np.sin(flat), bone * np.sin(flat) + below * np.cos(flat)


def _leg(leg: Array, trunk: BodyFrame, look: Look) -> list[ConePart]:
    """Joints: hip, knee, ankle, foot."""
    hip, knee, ankle, foot = leg
    g = look.girth
    ahead, down = _shoe_axes(ankle, foot)
    heel, toe = ankle - ahead * 32 + down * 38, foot + ahead * 48 - down * 14
    sole = down * 13
    hem = knee + (ankle - knee) * np.clip(2 * look.legs - 1, 0, 1)
    top = hip + (knee - hip) * np.clip(2 * look.legs, 0, 1)
    calf = knee + (ankle - knee) * 0.35
    cloth = [(hip, top, 88 * g, (88 - 22 * min(1, 2 * look.legs)) * g)]
    if look.legs > 0.5:
        cloth += [(knee, hem + (ankle - knee) * 0.03, 66 * g, 52 * g * look.flare)]
    edge = (cloth[-1][0], cloth[-1][1], 0.0, cloth[-1][3])
    return [
        ConePart([(knee, calf, 55 * g, 57 * g), (calf, ankle, 57 * g, 34)], look.skin, blend=15),
        ConePart([(heel + sole, toe + sole, 40, 38)], look.soles),
        ConePart(
            [(heel, toe, 41, 37), (ankle, ankle + (heel - ankle) * 0.3, 40, 42)], look.shoes, 18
        ),
        ConePart(cloth, look.trousers, blend=5, hem=edge),
    ]


def _trunk(joints: Array, trunk: BodyFrame, look: Look) -> list[ConePart]:
    """Shirt with its stripes, and the neck that rises from it."""
    g = look.girth
    hem, waist, chest, neck = joints[0] + trunk(0, -50, 0), joints[3], joints[9], joints[12]
    shirt: list[Cone] = [
        (hem - trunk.left * 66, hem + trunk.left * 66, 97 * g, 97 * g),
        (neck - trunk.up * 30, chest, 50, 92 * g),
    ]
    for x, shoulder in zip(SIDES, joints[16:18]):
        tip = shoulder - trunk(30 * x, 3, 0)
        rib, side = chest + trunk(64 * x, 18, 4), waist + trunk(50 * x, 10, 0)
        shirt += [
            (neck - trunk.up * 30, tip, 50, 46 * g),
            (tip, rib, 48 * g, 92 * g),
            (rib, side, 92 * g, 84 * g),
            (side, hem + trunk.left * 66 * x, 84 * g, 97 * g),
        ]
    edge = (neck, hem - trunk.up * 40, 0.0, 60 * g)
    parts = [ConePart(shirt, look.top, blend=16, hem=edge)]
    for up, thick in ((62, 17), (14, 8)):
        at = chest + trunk.up * up
        band = [(at - trunk.left * 300, at + trunk.left * 300, thick, thick)]
        parts.append(ConePart(band, look.stripe, ink=0, within=shirt))
    base, top = neck + trunk(0, -30, 12), joints[15]
    collar: list[Cone] = [(base, top, 62, 54)]
    throat: list[Cone] = [(base, top, 50, 46)]
    chin = [(top + trunk(-14, 8, 20), top + trunk(14, 8, 20), 62, 62)]
    return [
        *parts,
        ConePart(collar, look.stripe, within=shirt, ink=0, shade=0),
        ConePart(throat, look.skin, ink=0.6, shade=0),
        ConePart(chin, _deeper(look.skin, 0.84), within=throat, ink=0, shade=0),
    ]


def _arm(arm: Array, outward: Array, trunk: BodyFrame, look: Look) -> list[ConePart]:
    """Joints: shoulder, elbow, wrist, hand."""
    shoulder, elbow, wrist, hand = arm
    g = look.girth
    along = unit(hand - wrist)
    across = unit(trunk.front - along * (trunk.front @ along) + 1e-6)
    tips = hand + along * 62
    thumb = wrist + along * 38 + across * 20
    skin: list[Cone] = [
        (shoulder, elbow, 46 * g, 37 * g),
        (elbow, wrist, 38 * g, 25 * g),
        (wrist, hand, 25, 31),
        (hand, tips, 31, 17),
        (thumb, thumb + along * 48 + across * 16, 14, 9),
    ]
    cuff = min(1.0, 2 * look.sleeves)
    end = shoulder + (elbow - shoulder) * cuff
    sleeve: list[Cone] = [(shoulder, end, 50 * g, (56 - 6 * cuff) * g)]
    if look.sleeves > 0.5:
        sleeve.append((elbow, elbow + (wrist - elbow) * (2 * look.sleeves - 1), 50 * g, 40 * g))
    inside = shoulder - outward * 30 + trunk.up * 14
    seam = [(inside, inside - outward * 60, 68 * g, 68 * g)]
    edge = (sleeve[-1][0], sleeve[-1][1], 0.0, sleeve[-1][3])
    return [
        ConePart(skin, look.skin, blend=6, seam=seam),
        ConePart(sleeve, look.top, blend=10, seam=seam, hem=edge),
    ]


def _skull(joints: Array, head: BodyFrame, look: Look) -> Array:
    return joints[15] + head(0, 66 * look.head, 14)


def _back_hair(joints: Array, head: BodyFrame, look: Look) -> list[ConePart]:
    at, k = _skull(joints, head, look), look.head
    cones: dict[Hair, Sequence[Cone]] = {
        "short": [(at + head(0, 0, -20), at + head(0, -42, -34), 90 * k, 62 * k)],
        "bob": [
            (at + head(52 * x, 10, -22), at + head(70 * x, -104 * k, -18), 62 * k, 46 * k)
            for x in SIDES
        ]
        + [(at + head(0, 10, -30), at + head(0, -100 * k, -34), 88 * k, 62 * k)],
        "ponytail": [
            (at + head(0, 40, -92), at + head(30, -70, -150), 40, 46),
            (at + head(30, -70, -150), at + head(20, -220, -140), 46, 12),
        ],
        "bun": [(at + head(-6, 112 * k, -30), at + head(6, 112 * k, -30), 48, 48)],
    }
    return [ConePart(cones[look.style], look.hair, blend=20)]


def _head(joints: Array, head: BodyFrame, look: Look) -> list[ConePart]:
    at, k = _skull(joints, head, look), look.head
    towards = float(-head.front @ unit(at))  # 1: full face, 0: profile, -1: from behind
    jaw: list[Cone] = [
        (at + head(0, 6, 4), at + head(0, -26 * k, 20), 88 * k, 76 * k),
        (at + head(0, -26 * k, 20), at + head(0, -82 * k, 26), 76 * k, 42 * k),
    ]
    ears: list[Cone] = [
        (at + head(88 * k * x, -8, 0), at + head(82 * k * x, -34, 4), 19, 13) for x in SIDES
    ]
    cap: list[Cone] = [
        (at + head(0, 14, -6), at + head(0, 0, -16), 98 * k, 96 * k),
        (at + head(0, 0, -24), at + head(0, -40 * k, -30), 94 * k, 72 * k),
    ]
    gloss = [at + k * head(*place, 0) for place in ((-66, 44), (-44, 70), (-10, 82))]
    shine = [(a, b, 5 * k, 5 * k) for a, b in pairwise(gloss)]
    shown = float(np.clip((towards + 0.5) / 0.6, 0, 1))
    brow, chin = 60 * k * shown, 76 * k * shown
    opening: list[Cone] = [
        (at + head(-30 * k, 0, 60), at + head(-18 * k, -110 * k, 60), brow, chin),
        (at + head(26 * k, -22, 60), at + head(18 * k, -110 * k, 60), brow, chin),
    ]
    face = opening if shown > 0 else ()
    glossy = _mixed(look.hair, (255, 236, 214), 0.2)
    return [
        *([] if look.style == "bob" else [ConePart(ears, look.skin)]),
        ConePart(jaw, look.skin, blend=20),
        *_face(at, head, towards, look),
        ConePart(cap, look.hair, blend=10, without=face),
        ConePart(shine, glossy, ink=0, shade=0, without=face),
    ]


def _face(at: Array, head: BodyFrame, towards: float, look: Look) -> Iterator[ConePart]:
    """Cheeks, eyes, brows, nose and mouth, as far as they are on the near side of the head."""
    k = look.head
    ink, lip = _deeper(look.hair, 0.55), (178, 66, 66)

    def line(points: Sequence[tuple[float, float]], radius: float) -> list[Cone]:
        """Cones through points (left, up) on the front of the head."""
        spots = [
            at + k * head(x, y, np.sqrt(max(0.0, 91**2 - x * x - 0.3 * y * y))) for x, y in points
        ]
        return [(a, b, radius * k, radius * k) for a, b in pairwise(spots)]

    def seen(x: float) -> bool:
        """Is the front of the head at this place turned to the camera?"""
        return bool(-head(x / 91, 0, np.sqrt(1 - (x / 91) ** 2)) @ unit(at) > 0.22)

    for x in SIDES:
        if seen(44 * x):
            yield ConePart(line([(50 * x, -44), (46 * x, -44)], 15), (236, 110, 100), 0, 0, 0, 0.35)
        if seen(32 * x):
            yield ConePart(line([(33 * x, -8), (33 * x, -20)], 9.5), ink, ink=0, shade=0)
            yield ConePart(
                line([(30 * x, -8), (30.5 * x, -8)], 3.2), (255, 255, 255), ink=0, shade=0
            )
            brow = line([(18 * x, 13), (32 * x, 18), (46 * x, 13)], 4)
            yield ConePart(brow, ink, ink=0, shade=0, opacity=0.85)
    if towards > 0.2:
        nose = line([(2, -26), (5, -40), (-3, -42)], 3.6)
        yield ConePart(nose, _deeper(look.skin, 0.74), ink=0, shade=0)
        smile = line([(-22, -60), (-12, -67), (0, -70), (12, -67), (22, -60)], 4.2)
        yield ConePart(smile, lip, ink=0, shade=0)


def _mixed(colour: Tint, other: Tint, share: float) -> Tint:
    red, green, blue = (int(a + (b - a) * share) for a, b in zip(colour, other))
    return red, green, blue


def _deeper(colour: Tint, share: float) -> Tint:
    red, green, blue = (int(value * share) for value in colour)
    return red, green, blue
