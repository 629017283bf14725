"""Synthetic scenes: a drawn character, its dance, the skeleton of that dance, and a picture of it.

A scene is a function of its number. Numbers from `HELD_OUT` on are never trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.nano.dance import BodyProportions, dance
from benchmarks.nano.drawing import Look, draw_dancer, random_look
from engine.pose.skeleton import draw_skeleton
from kernels.whole_file import whole_file

HEIGHT, WIDTH = 160, 96
FRAMES = 21  # 6 latents, so that training windows also start behind the clip's first frame
FPS = 24.0
HELD_OUT = 1_000_000
NEARER = (750.0, 1050.0)  # mm that dancers of a scene stand before where `dance` puts them
ASIDE = 130.0  # mm
LONGEST = 240  # frames of a dance from which a scene takes a stretch

Frames = NDArray[np.uint8]  # [T, H, W, 3]


@dataclass(frozen=True, slots=True)
class Scene:
    """One character twice: as the reference picture shows it, and dancing somewhere."""

    picture: Frames  # [H, W, 3]
    frames: Frames
    skeleton: Frames


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """Everything that a scene's number decides, before anything is drawn."""

    look: Look
    pictured: NDArray[np.float32]  # [24, 3] mm
    joints: NDArray[np.float32]  # [T, 1, 24, 3] mm


def plan(number: int, frames: int = FRAMES) -> ScenePlan:
    """Plans the scene of a number, the same on any machine."""
    rng = np.random.default_rng([20261123, number])
    look = random_look(rng)
    body = BodyProportions(*rng.uniform(0.92, 1.08, 5))
    start = int(rng.integers(0, LONGEST - frames))
    joints = dance(LONGEST, FPS, int(rng.integers(2**31)), body)[start : start + frames]
    other = dance(LONGEST, FPS, int(rng.integers(2**31)), body)[int(rng.integers(0, LONGEST)), 0]
    return ScenePlan(look, _placed(other, rng), _placed(joints, rng))


def _placed(joints: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    shift = (rng.uniform(-ASIDE, ASIDE), 0.0, -rng.uniform(*NEARER))
    return joints + np.array(shift, np.float32)


def scene(number: int) -> Scene:
    planned = plan(number)
    return Scene(
        picture=draw_dancer(planned.pictured, HEIGHT, WIDTH, planned.look),
        frames=draw(planned),
        skeleton=np.stack(list(draw_skeleton(planned.joints, HEIGHT, WIDTH))),
    )


def draw(planned: ScenePlan) -> Frames:
    """Draws the true clip: what a perfect model would make."""
    drawn = [draw_dancer(pose, HEIGHT, WIDTH, planned.look) for pose in planned.joints[:, 0]]
    return np.stack(drawn)


def write(number: int, folder: Path) -> Path:
    """Writes the scene once; a killed run leaves no file that is cut short."""
    path = folder / f"{number:07}.npz"
    if not path.exists():
        made = scene(number)
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(file, picture=made.picture, frames=made.frames, skeleton=made.skeleton)
    return path


def read(path: Path) -> Scene:
    with np.load(path) as file:
        return Scene(file["picture"], file["frames"], file["skeleton"])
