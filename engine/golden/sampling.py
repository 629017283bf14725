"""Golden data of sampling: the windows of long clips, and the trajectories of the solvers."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.denoise.sampler import grid, trajectory
from engine.denoise.windows import in_latents, latent_frames, windows
from engine.errors import BadCheckpoint, BadRequest
from engine.flow import Recipe
from engine.golden.check import Check, compare
from engine.models.tensorfile import TensorFile

SIGMAS = 1e-6
LATENTS = 2e-5

SAMPLER_OF = {"sde-dpmsolver++": "dpm++_sde", "dpmsolver++": "dpm++", "unipc": "unipc"}

_NAME = re.compile(r"(?P<case>(?P<algorithm>.+)\.n(?P<steps>\d+)\.shift(?P<shift>[\d.]+))\.\w+")


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    is_windows = "cases" in names and names <= {"about", "cases"}
    return is_windows or any(_NAME.fullmatch(name) for name in names)


def checks(path: Path) -> Iterator[Check]:
    """Checks each case. Raises `BadCheckpoint` for a file that cannot be read."""
    return _windows(path) if path.suffix == ".json" else _solvers(path)


def _windows(path: Path) -> Iterator[Check]:
    try:
        cases = list(json.loads(path.read_text(encoding="utf-8"))["cases"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadCheckpoint(f"{path.name} is not a list of windowing cases: {error!r}") from error
    for number, case in enumerate(cases):
        name = f"{path.name}: case {number}"
        try:
            yield from _windows_case(f"{path.name}: {case['name']}", case)
        except (KeyError, TypeError, BadRequest) as error:
            yield Check(f"{name}: not a windowing case: {error!r}", None, 0, False)


def _windows_case(name: str, case: Mapping[str, object]) -> Iterator[Check]:
    frames, context, overlap, stride, steps = (
        _whole(case, key)
        for key in ("frames", "context_frames", "context_overlap", "context_stride", "steps")
    )
    windowing, latents = in_latents(context, overlap, stride), latent_frames(frames)
    figures = {
        "latents": latents,
        "window": windowing.window,
        "overlap": windowing.overlap,
        "stride": windowing.stride,
    }
    for key, figure in figures.items():
        yield compare(f"{name}: {key}", figure, _whole(case, key), 0)
    want = case["windows"]
    if not isinstance(want, list) or len(want) != steps:
        yield Check(f"{name}: windows: not a list of {steps} steps", None, 0, False)
        return
    for step in range(steps):
        wrong = float(windows(step, latents, windowing) != want[step])
        yield Check(f"{name}: windows of step {step}", wrong, 0, not wrong)


def _whole(case: Mapping[str, object], key: str) -> int:
    value = case[key]
    if not isinstance(value, int):
        raise TypeError(f"{key} is {value!r}, not a whole number")
    return value


def _solvers(path: Path) -> Iterator[Check]:
    file = TensorFile(path)
    matches = filter(None, map(_NAME.fullmatch, file))
    for match in {match["case"]: match for match in matches}.values():
        name = f"{path.name}: {match['case']}"
        sampler = SAMPLER_OF.get(match["algorithm"])
        if sampler is None:
            yield Check(f"{name}: no such sampler here", None, None, None)
            continue
        recipe = Recipe(sampler, int(match["steps"]), cfg=1.0, shift=float(match["shift"]))
        try:
            yield from _solver_case(name, recipe, partial(_tensor, file, match["case"]))
        except (KeyError, BadRequest) as error:
            yield Check(f"{name}: cannot be recomputed: {error}", None, LATENTS, False)


def _solver_case(name: str, recipe: Recipe, tensor: Callable[[str], Tensor]) -> Iterator[Check]:
    levels = grid(recipe.sampler, recipe.steps, recipe.shift)
    yield compare(f"{name}.sigmas", levels.sigmas, tensor("sigmas"), SIGMAS)
    yield compare(f"{name}.timesteps", levels.timesteps, tensor("timesteps"), 0)
    noisy = recipe.sampler == "dpm++_sde"
    step_noise = tensor("step_noise") if noisy else torch.empty(0)
    if noisy and len(step_noise) < recipe.steps - 1:  # the last step needs none
        found = f"noise of {len(step_noise)} steps, not {recipe.steps}"
        yield Check(f"{name}.step_noise: {found}", None, LATENTS, False)
        return
    draw = partial(next, iter(step_noise))
    latents = list(trajectory(_velocity, tensor("noise"), recipe, draw))
    yield compare(f"{name}.after_step", torch.stack(latents), tensor("after_step"), LATENTS)


def _tensor(file: TensorFile, case: str, what: str) -> Tensor:
    with file.open(f"{case}.{what}") as tensor:
        return tensor.clone()


def _velocity(latents: Tensor, step: int, timestep: float) -> Tensor:
    """The analytic velocity of the files' README."""
    waves = 0.3 * torch.sin(3 * latents)
    return 0.7 * latents - waves + 0.2 * torch.cos(torch.tensor(timestep / 200))
