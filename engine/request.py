"""What may be asked for: recipes with their defaults, and the one check of a job's settings."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.config import LIMITS
from engine.errors import BadRequest, OutputError
from engine.flow import Recipe, Request
from engine.media.framing import check_size
from engine.sampler import grid

RECIPES = {
    # the released sampling script (spec/denoiser.md 4)
    "official": Recipe(sampler="euler", steps=50, cfg=4.0, shift=5.0),
    # the workflow in production (spec/denoiser.md 4.6): distilled weights, half the steps see poses
    "production": Recipe(
        sampler="dpm++_sde",
        steps=6,
        cfg=1.0,
        shift=5.0,
        pose_until=0.5,
        window_frames=80,
        overlap_frames=20,
        half_render=True,
    ),
}


def check_request(request: Request) -> None:
    """Raises `BadRequest` for settings that no clip can be made with."""
    recipe = request.recipe
    _check_range("steps", recipe.steps, 1, LIMITS.max_steps)
    _check_range("cfg", recipe.cfg, 0, LIMITS.max_cfg)
    _check_range("shift", recipe.shift, 0.01, LIMITS.max_shift)
    _check_range("seed", request.seed, 0, 2**64 - 1)
    check_shape(request.width, request.height, request.fps, request.frames, request.persons)
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        if len(text) > LIMITS.max_prompt_chars:
            raise BadRequest(
                f"The {name} has {len(text)} characters; at most {LIMITS.max_prompt_chars} fit."
            )
    grid(recipe.sampler, recipe.steps, recipe.shift)


def check_shape(
    width: int | None, height: int | None, fps: float | None, frames: int | None, persons: int
) -> None:
    """The part of `check_request` that motion capture alone looks at."""
    _check_range("persons", persons, 1, LIMITS.max_persons)
    if fps is not None:
        _check_range("fps", fps, 1, LIMITS.max_fps)
    if frames is not None:
        _check_range("frames", frames, 1, LIMITS.max_frames)
    if (width is None) != (height is None):
        raise BadRequest("Width and height are given together, or neither.")
    if width is not None and height is not None:
        check_size(height, width)


def check_output(path: Path, suffix: str, *inputs: Path) -> None:
    """Raises `OutputError` now rather than after minutes of work.

    `inputs`: files that the result must not replace.
    """
    if path.suffix.lower() != suffix:
        raise OutputError(f"{path.name} should end in {suffix}.")
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; the name of a file is expected.")
        if not path.absolute().parent.is_dir():
            raise OutputError(f"There is no folder {path.absolute().parent} for {path.name}.")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or a pipe; the name of a file is expected.")
        if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
            raise OutputError(f"{path} is an input; the result needs a name of its own.")
        with TemporaryDirectory(dir=path.absolute().parent, prefix=".probe-"):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise BadRequest(f"The {name} is {value}; it must be {low:g} to {high:g}.")
