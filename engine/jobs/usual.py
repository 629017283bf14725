"""What an endpoint gives to requests that say nothing, and the sizes that it never exceeds."""

import dataclasses
import math
from collections.abc import Mapping

from engine.config import KINDS, LIMITS, SIZE_MULTIPLE, TRAINED_SIZE, Defaults
from engine.flow import KindName, RecipeName, Settings
from engine.jobs.served import Served, mode_of
from engine.recipes import NEGATIVE_PROMPT, PROMPT, RECIPES, SEED, row_of

# The settings where neither request nor workflow says anything. Those of Preview are what the
# endpoints in production have (docs/reference/runpod.md A.2), or the released script, with the size
# of training and the rate of the motion. Size and rate of a clip of SCAIL-2 are always these.
SAID_NOWHERE: Mapping[KindName, Mapping[RecipeName, Settings]] = {
    "preview": {
        "production": Settings(
            RECIPES["preview"]["production"],
            prompt=PROMPT,
            negative_prompt=NEGATIVE_PROMPT,
            seed=SEED,
            width=416,
            height=672,
            fps=24.0,
        ),
        "official": Settings(RECIPES["preview"]["official"], prompt=PROMPT, seed=SEED),
    },
    "scail2": {
        name: Settings(recipe, prompt=PROMPT, seed=SEED, segments=KINDS["scail2"].segments[0])
        for name, recipe in RECIPES["scail2"].items()
    },
}


def usual_settings(
    name: RecipeName | None, defaults: Defaults, served: Served
) -> tuple[Settings, list[str]]:
    """Finds the settings of a request that names its recipe at most: a demo has its own.

    The sentences say if what it names has another name here. Raises `BadRequest` for a recipe that
    the kind of model does not have.
    """
    kind = served.kind.name
    row, said = row_of(kind, name or defaults.recipe)
    settings = SAID_NOWHERE[kind][row]
    if served.usual is not None and name is None and defaults.recipe is None:
        settings = served.usual
    settings = dataclasses.replace(settings, fit=defaults.fit, mode=mode_of(None, served))
    return settings, [] if said is None or name is None else [said]


def usual_sizes(defaults: Defaults, served: Served) -> list[tuple[int, int]]:
    """Lists the sizes (height, width) of clips whose requests name none: one, or both ways that the
    size of training is turned.
    """
    settings, _ = usual_settings(None, defaults, served)
    usual, _ = capped(settings, defaults)
    if usual.width is None or usual.height is None:
        short, long = TRAINED_SIZE
        return [(long, short), (short, long)]
    return [(usual.height, usual.width)]


def capped(settings: Settings, defaults: Defaults) -> tuple[Settings, list[str]]:
    """Makes the size one that the network can have, and keeps to the caps of the endpoint.

    The sentences say what became another. A size that is left to the picture stays so where the
    size of training is within the cap.
    """
    said: list[str] = []
    width, height, frames = settings.width, settings.height, settings.frames
    most_pixels = defaults.max_pixels
    if width is None and height is None and most_pixels is not None:
        width, height = TRAINED_SIZE if math.prod(TRAINED_SIZE) > most_pixels else (None, None)
    if width is not None and height is not None:
        asked = f"{width}x{height}"
        if all(LIMITS.min_side <= side <= LIMITS.max_side for side in (width, height)):
            width, height = _floored(width), _floored(height)
            if most_pixels is not None:
                width, height = _shrunk(width, height, most_pixels)
        if f"{width}x{height}" != asked:
            said.append(
                f"The size {asked} becomes {width}x{height}: sides are multiples of "
                f"{SIZE_MULTIPLE}, within the pixels that this endpoint makes."
            )
    most = defaults.max_frames
    if most is not None and (frames is None or frames > most):
        said.append(f"The clip has at most {most} frames on this endpoint.")
        frames = most
    return dataclasses.replace(settings, width=width, height=height, frames=frames), said


def _floored(side: float) -> int:
    return max(LIMITS.min_side, int(side) // SIZE_MULTIPLE * SIZE_MULTIPLE)


def _shrunk(width: int, height: int, most: int) -> tuple[int, int]:
    """Shrinks a size to at most `most` pixels; the shape stays, as far as multiples allow."""
    if width * height <= most:
        return width, height
    ratio = math.sqrt(most / (width * height))
    height = _floored(height * ratio)
    return _floored(min(width * ratio, most / height)), min(
        height, _floored(most / LIMITS.min_side)
    )
