"""Scenes for SCAIL-2: people dance in a video, and others, in a picture, shall take their place.

In both modes those of the picture take over the very joints of those whom they follow. The room is
that of the picture in animation and that of the video in replacement. Masks are exact: a pixel is a
person's where more than half of it was painted as that person.
A scene is a function of its number. Numbers from `HELD_OUT` on are never trained on.
Masks and modes: docs/reference/masks.md 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.nano.dance import Array, BodyProportions, dance
from benchmarks.nano.drawing import Look, Room, draw_person, draw_room, random_look
from benchmarks.nano.paint import Tint
from kernels.whole_file import whole_file

HEIGHT, WIDTH = 160, 96
FRAMES = 17  # 5 latents, one segment
FPS = 24.0
HELD_OUT = 1_000_000
LONGEST = 240  # frames of a dance from which a scene takes a stretch
PALETTE: tuple[Tint, ...] = ((0, 0, 255), (255, 0, 0))  # left to right: blue, red
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
PAIRS = 3  # every third scene has two persons
NEARER = ((750.0, 1050.0), (-150.0, 150.0))  # mm before where `dance` puts them: one, two persons
ASIDE = ((0.0, 130.0), (490.0, 60.0))  # mm from the middle, and how far off that
APART = 0.25  # turns of hue between people who must not be taken for each other

Frames: TypeAlias = NDArray[np.uint8]  # [T, H, W, 3]
Mode: TypeAlias = Literal["animation", "replacement"]
MODES: tuple[Mode, ...] = ("animation", "replacement")
# What lies behind the people in the mask of the video and in that of the picture.
BEHIND: dict[Mode, tuple[Tint, Tint]] = {
    "animation": (BLACK, WHITE),
    "replacement": (WHITE, BLACK),
}


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """Everything that a scene's number decides, before anything is drawn. P persons, 1 or 2."""

    joints: Array  # [P, T, 24, 3] mm of those who dance, left to right
    dancers: tuple[Look, ...]  # whom the video shows
    heroes: tuple[Look, ...]  # whom the picture shows; each takes the place of the same dancer
    pictured: Array  # [P, 24, 3] mm of the heroes in the picture
    stage: Room  # of the video
    studio: Room  # of the picture


@dataclass(frozen=True, slots=True)
class Shown:
    """A drawn clip, and whose each pixel is: 0 the room's, n + 1 that of person n."""

    frames: Frames
    owners: NDArray[np.uint8]  # [T, H, W]


@dataclass(frozen=True, slots=True)
class Scene:
    """What goes in, and what shall come out in each mode. The picture is a clip of one frame."""

    driving: Shown
    picture: Shown
    targets: dict[Mode, Shown]


def plan(number: int, frames: int = FRAMES, persons: int | None = None) -> ScenePlan:
    """Plans the scene of a number, the same on any machine; every third has two persons."""
    persons = persons or 1 + (number % PAIRS == 0)
    rng = np.random.default_rng([20261130, number, persons])
    hues, rooms = _hues(rng, persons), rng.uniform(0, 1)
    looks = [random_look(rng, hue) for hue in hues]
    longest = max(LONGEST, frames + 1)
    return ScenePlan(
        joints=np.stack([
            _placed(_stretch(rng, longest, frames), _place(rng, persons, place))
            for place in range(persons)
        ]),
        dancers=tuple(looks[:persons]),
        heroes=tuple(looks[persons:]),
        pictured=np.stack([
            _placed(_stretch(rng, longest, 1)[0], _place(rng, persons, place))
            for place in rng.permutation(persons)
        ]),
        stage=_room(rng, rooms),
        studio=_room(rng, rooms + rng.uniform(0.3, 0.7)),
    )  # fmt: skip


def _hues(rng: np.random.Generator, persons: int) -> list[float]:
    """Hues of dancers, then of heroes: far apart in each of the two, and between follower pairs."""
    base = rng.uniform(0, 1)
    heroes = [base + 0.5 * n + rng.uniform(-0.08, 0.08) for n in range(persons)]
    dancers = [hero + rng.choice((-1, 1)) * rng.uniform(APART, 0.5) for hero in heroes]
    return [float(hue % 1) for hue in (*dancers, *heroes)]


def _stretch(rng: np.random.Generator, longest: int, frames: int) -> NDArray[np.float32]:
    """So many frames [T, 24, 3] of the dance of some body."""
    body = BodyProportions(*rng.uniform(0.92, 1.08, 5))
    start = int(rng.integers(0, longest - frames))
    return dance(longest, FPS, int(rng.integers(2**31)), body)[start : start + frames, 0]


def _place(rng: np.random.Generator, persons: int, place: int) -> Array:
    """How far a person is moved from where `dance` puts it, mm."""
    middle, spread = ASIDE[persons - 1]
    left_or_right = 2 * place - 1
    aside = left_or_right * middle + rng.uniform(-spread, spread)
    return np.array([aside, 0.0, -rng.uniform(*NEARER[persons - 1])])


def _placed(joints: NDArray[np.float32], shift: Array) -> Array:
    return joints.astype(np.float64) + shift


def _room(rng: np.random.Generator, hue: float) -> Room:
    """A room in shades of one hue, with its disc anywhere on the wall."""

    def tint(turn: float, vivid: float, light: float) -> Tint:
        angle = 2 * np.pi * (hue + turn + np.array([0, 1 / 3, 2 / 3]))
        red, green, blue = (
            int(255 * value) for value in light * (1 - vivid * (0.5 - 0.5 * np.cos(angle)))
        )
        return red, green, blue

    return Room(
        wall=tint(0, rng.uniform(0.3, 0.7), rng.uniform(0.7, 1.0)),
        disc=tint(rng.uniform(-0.15, 0.15), rng.uniform(0.1, 0.6), rng.uniform(0.8, 1.0)),
        floor=tint(rng.uniform(-0.1, 0.1), rng.uniform(0.3, 0.6), rng.uniform(0.5, 0.85)),
        centre=(rng.uniform(-900, 900), rng.uniform(-1200, 100)),
        radius=rng.uniform(500, 1100),
    )


def scene(planned: ScenePlan) -> Scene:
    """Draws all of a scene; people are painted once and put into both rooms."""
    moving = [layers(looks, planned.joints) for looks in (planned.dancers, planned.heroes)]
    still = layers(planned.heroes, planned.pictured[:, None])
    rooms: dict[Mode, Room] = {"animation": planned.studio, "replacement": planned.stage}
    return Scene(
        driving=put_into(planned.stage, planned.joints, moving[0]),
        picture=put_into(planned.studio, planned.pictured[:, None], still),
        targets={
            mode: put_into(room, planned.joints, moving[1]) for mode, room in rooms.items()
        },
    )  # fmt: skip


def layers(looks: tuple[Look, ...], joints: Array, times: int = 1) -> list[list[Array]]:
    """For each person, whose joints are [P, T, 24, 3], its painted frames [H, W, 4].

    Sides are `times` as long as those of scenes.
    """
    return [
        [draw_person(pose, times * HEIGHT, times * WIDTH, look) for pose in poses]
        for look, poses in zip(looks, joints, strict=True)
    ]


def put_into(room: Room, joints: Array, painted: list[list[Array]]) -> Shown:
    """Lays people over a room, the farther one first, and keeps whose each pixel is."""
    frames, owners = [], []
    height, width, _ = painted[0][0].shape
    for t in range(joints.shape[1]):
        canvas = draw_room(list(joints[:, t]), height, width, room)
        owner = np.zeros((height, width), np.uint8)
        for person in np.argsort(-joints[:, t, 0, 2]):
            layer = painted[person][t]
            canvas = canvas * (1 - layer[..., 3:]) + layer[..., :3]
            owner[layer[..., 3] > 0.5] = person + 1
        frames.append(np.rint(np.clip(canvas, 0, 255)).astype(np.uint8))
        owners.append(owner)
    return Shown(np.stack(frames), np.stack(owners))


def mask(owners: NDArray[np.uint8], behind: Tint) -> Frames:
    """Colours [T, H, W, 3] of a mask: of each person its own, and what lies behind them."""
    return np.array([behind, *PALETTE], np.uint8)[owners]


def driving_mask(made: Scene, mode: Mode) -> Frames:
    return mask(made.driving.owners, BEHIND[mode][0])


def picture_mask(made: Scene, mode: Mode) -> Frames:
    """[1, H, W, 3]."""
    return mask(made.picture.owners, BEHIND[mode][1])


def write(number: int, folder: Path) -> Path:
    """Writes the scene once; a killed run leaves no file that is cut short."""
    path = folder / f"{number:07}.npz"
    if not path.exists():
        made = scene(plan(number))
        shown = {"driving": made.driving, "picture": made.picture, **made.targets}
        arrays = {f"{name} frames": clip.frames for name, clip in shown.items()}
        arrays |= {f"{name} owners": clip.owners for name, clip in shown.items()}
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return path


def read(path: Path) -> Scene:
    with np.load(path) as file:
        clips = {
            name: Shown(file[f"{name} frames"], file[f"{name} owners"])
            for name in ("driving", "picture", *MODES)
        }
    return Scene(clips["driving"], clips["picture"], {mode: clips[mode] for mode in MODES})
