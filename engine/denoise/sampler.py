"""Flow matching: noise levels fall from nearly 1 (noise) to 0 (clip) along the learned velocity.

A sampler is a grid of noise levels and a solver that walks it. `euler` is that of the official
program of SCAIL-Preview, `unipc` and `dpm++_official` those of SCAIL-2's; `euler_simple` is what
ComfyUI's templates run, `dpm++_sde` and `dpm++` what production does (docs/reference/denoiser.md 4,
10, docs/reference/scail2.md 4). Solvers work in FP32 on latents and in FP64 on the few scalars of a
step. They treat each number of the latents alone, so that frames which are history, known and put
back at every level, change nothing in the others.

Seeds are part of the contract. One generator serves a job and is drawn from in this order:
the noise of the whole clip, the shuffles of `engine.denoise.windows.share_noise`, then for
`dpm++_sde` the noise of each step but the last, again for the whole clip.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVarTuple

import torch
from torch import Tensor

from engine.config import LIMITS
from engine.errors import BadRequest
from engine.flow import Recipe

# latents [C, t, h, w] fp32, step index, timestep (1000 * noise level) -> same shape, fp32
Velocity = Callable[[Tensor, int, float], Tensor]
Draw = Callable[[], Tensor]  # standard normal noise for one step, in the shape of the latents

TRAINED_LEVELS = 1000  # timesteps the model was trained on

Inputs = TypeVarTuple("Inputs")


@dataclass(frozen=True, slots=True)
class Grid:
    """The noise levels of n steps and what the network is told at each of them."""

    sigmas: Tensor  # [n + 1] fp32, falling, the last is 0
    timesteps: list[float]  # [n]


@dataclass(frozen=True, slots=True)
class Sampler:
    grid: Callable[[int, float], Grid]  # steps, shift
    solve: Callable[[Velocity, Tensor, Grid, Draw], Iterator[Tensor]]  # latents after each step


def denoise(
    velocity: Velocity,
    noise: Tensor,
    recipe: Recipe,
    draw: Draw,
    progress: Callable[[int], None],
    history: Tensor | None = None,
) -> Tensor:
    """Makes the latents of a clip from noise [C, t, h, w] fp32, in the same shape.

    It reads sampler, steps and shift of the recipe. `draw` is called by `dpm++_sde` alone.
    `progress` is told after each step how many are done; what it raises ends the job. `history`
    [C, n, h, w] fp32 are the first latents of the result, known before (`trajectory`).
    Raises `BadRequest` for an unknown sampler and for steps or a shift that make no grid.
    """
    latents = noise
    for done, after in enumerate(trajectory(velocity, noise, recipe, draw, history), start=1):
        latents = after
        progress(done)
    return latents


def trajectory(
    velocity: Velocity,
    noise: Tensor,
    recipe: Recipe,
    draw: Draw,
    history: Tensor | None = None,
) -> Iterator[Tensor]:
    """The latents [C, t, h, w] after each step of `denoise`; the last are the clip.

    `history` [C, n, h, w] is what the velocity sees in the first n frames at every noise level,
    clean, and what they are after every step (docs/reference/scail2.md 7).
    """
    chosen, levels = _sampler(recipe.sampler), grid(recipe.sampler, recipe.steps, recipe.shift)
    if history is None:
        return chosen.solve(velocity, noise, levels, draw)
    known = history.to(noise)
    if known.ndim != noise.ndim or known.shape[1] >= noise.shape[1]:
        raise BadRequest(
            f"The history has the shape {tuple(known.shape)}, which leaves nothing to make of "
            f"latents of the shape {tuple(noise.shape)}: fewer frames are expected."
        )

    def put_back(latents: Tensor) -> Tensor:
        return torch.cat([known, latents[:, known.shape[1] :]], dim=1)

    def informed(latents: Tensor, step: int, timestep: float) -> Tensor:
        return velocity(put_back(latents), step, timestep)

    return map(put_back, chosen.solve(informed, noise, levels, draw))


def grid(sampler: str, steps: int, shift: float) -> Grid:
    """Makes the noise levels of a sampler. Raises `BadRequest` if these figures make none."""
    chosen = _sampler(sampler)
    if steps < 1 or not 0 < shift <= LIMITS.max_shift:
        raise BadRequest(
            f"{steps} steps at shift {shift} cannot be run: there must be at least 1 step, and "
            f"the shift must be above 0 and at most {LIMITS.max_shift:g}."
        )
    levels = chosen.grid(steps, shift)
    if not bool((levels.sigmas.diff() < 0).all()):
        raise BadRequest(
            f"{steps} steps at shift {shift} have noise levels that 32-bit numbers cannot tell "
            "apart. Use fewer steps or a shift nearer to 5."
        )
    return levels


def guided(
    conditional: Callable[[*Inputs], Tensor],
    unconditional: Callable[[*Inputs], Tensor] | None,
    scale: float,
) -> Callable[[*Inputs], Tensor]:
    """Applies classifier-free guidance, v_u + scale * (v_c - v_u), to velocities alike in inputs.

    At scale 1, and without a negative prompt, it is `conditional` itself: one evaluation a step.
    """
    if unconditional is None or scale == 1:
        return conditional

    def velocity(*inputs: *Inputs) -> Tensor:
        away = unconditional(*inputs)
        return away + scale * (conditional(*inputs) - away)

    return velocity


def seeded(seed: int) -> torch.Generator:
    """Makes the CPU generator of a job. Raises `BadRequest` for a seed that is not 0 .. 2**64 - 1.

    PyTorch's CPU generator reads the low 32 bits of a seed only. The high ones are mixed in here,
    so that seeds 2**32 apart differ; below 2**32 it is PyTorch's own generator for that seed.
    """
    if not 0 <= seed < 2**64:
        raise BadRequest(f"The seed is {seed}; it must be a whole number from 0 to 2**64 - 1.")
    low, high = seed & 0xFFFF_FFFF, seed >> 32
    mixed = low ^ (high * 0x9E37_79B1 & 0xFFFF_FFFF)  # an odd factor maps each `high` elsewhere
    return torch.Generator().manual_seed(mixed)


def noise_like(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws standard normal noise [C, t, h, w] fp32 on the CPU.

    Time is drawn before channels, as in the official program (docs/reference/denoiser.md 4.4).
    """
    channels, frames, *plane = shape
    return torch.randn(frames, channels, *plane, generator=generator).transpose(0, 1).contiguous()


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise BadRequest(f"There is no sampler called {name!r}. Choose one of: {known}.")
    return SAMPLERS[name]


def _official_grid(steps: int, shift: float) -> Grid:
    """Makes the levels of docs/reference/denoiser.md 4.2. Timesteps are not rounded."""
    done = torch.arange(steps + 1, dtype=torch.float64) / steps
    sigmas = 1 - (done / (shift + done - shift * done)).float()
    return Grid(sigmas, (sigmas[:-1] * TRAINED_LEVELS).tolist())


def _production_grid(steps: int, shift: float, *, shifted_start: bool) -> Grid:
    """Makes the levels of docs/reference/denoiser.md 10: evenly from the highest level of the
    model's own table, then shifted.

    The DPM++ family shifts the start as well, so that it is shifted twice. Which numbers are FP32
    and which FP64 decides to which side a timestep is truncated.
    """
    start = torch.tensor(1 - 1 / TRAINED_LEVELS, dtype=torch.float32)
    if shifted_start:
        start = _shift(start, shift)
    first = start.item()
    levels = _shift(first - torch.arange(steps, dtype=torch.float64) * (first / steps), shift)
    timesteps = (levels * TRAINED_LEVELS).long().double()
    return Grid(torch.cat([levels.float(), torch.zeros(1)]), timesteps.tolist())


def _evenly_shifted_grid(steps: int, shift: float) -> Grid:
    """Makes the levels of `dpm++` in the official program of SCAIL-2: docs/reference/scail2.md 4.

    All is FP64, or whole timesteps would be truncated to others.
    """
    levels = _shift(1 - torch.arange(steps, dtype=torch.float64) * (1 / steps), shift)
    timesteps = (levels * TRAINED_LEVELS).long().double()
    return Grid(torch.cat([levels.float(), torch.zeros(1)]), timesteps.tolist())


def _simple_grid(steps: int, shift: float) -> Grid:
    """Picks levels of the model's own table, as ComfyUI's `simple`: docs/reference/scail2.md 4."""
    apart = TRAINED_LEVELS / steps
    picked = [TRAINED_LEVELS - int(step * apart) for step in range(steps)]
    levels = _shift(torch.tensor(picked, dtype=torch.float64) / TRAINED_LEVELS, shift)
    sigmas = torch.cat([levels.float(), torch.zeros(1)])
    return Grid(sigmas, (sigmas[:-1] * TRAINED_LEVELS).tolist())


def _shift(levels: Tensor, shift: float) -> Tensor:
    return shift * levels / (1 + (shift - 1) * levels)


# In the solvers `clean` is the clip as a velocity predicts it, `past` the prediction before.


def _euler(velocity: Velocity, latents: Tensor, levels: Grid, draw: Draw) -> Iterator[Tensor]:
    for step, (sigma, after) in enumerate(pairwise(levels.sigmas.tolist())):
        latents = latents + (after - sigma) * velocity(latents, step, levels.timesteps[step])
        yield latents


def _dpm(
    velocity: Velocity, latents: Tensor, levels: Grid, draw: Draw, *, stochastic: bool
) -> Iterator[Tensor]:
    """Solves by DPM-Solver++(2M), midpoint, an ODE or an SDE: docs/reference/denoiser.md 10."""
    past, past_h = latents, math.inf
    for step, (sigma, after) in enumerate(pairwise(levels.sigmas.tolist())):
        clean = latents - sigma * velocity(latents, step, levels.timesteps[step])
        if after == 0:  # h is infinite and all other terms vanish
            yield clean
            return
        h = _log_ratio(after) - _log_ratio(sigma)
        # from pure noise h is infinite, and so is past_h a step later: both are of first order
        bend = 0.0 if past_h == math.inf else h / past_h / 2
        target = clean + (clean - past) * bend
        if stochastic:
            share = -math.expm1(-2 * h)  # of the variance that is drawn anew
            latents = after / sigma * math.exp(-h) * latents + (1 - after) * share * target
            latents = latents + after * math.sqrt(share) * draw().to(latents.device)
        else:
            latents = after / sigma * latents + (1 - after) * -math.expm1(-h) * target
        past, past_h = clean, h
        yield latents


@dataclass(frozen=True, slots=True)
class _Move:
    """One step of UniPC: the next evaluation both ends it and corrects it."""

    kept: Tensor  # share of the latents that stays
    gain: float
    clean: Tensor  # as predicted at the start of the step
    bend: Tensor  # change of `clean` over a step of this length, from the step before
    weights: tuple[float, float]  # of the bend and of the newest change of `clean`

    def predict(self) -> Tensor:
        return self.kept + self.gain * (self.clean + self.bend / 2)

    def correct(self, clean: Tensor) -> Tensor:
        of_bend, of_change = self.weights
        change = clean - self.clean
        return self.kept + self.gain * (self.clean + of_bend * self.bend + of_change * change)


def _unipc(velocity: Velocity, latents: Tensor, levels: Grid, draw: Draw) -> Iterator[Tensor]:
    """Solves by UniPC of order 2, B(h) = e^h - 1. Latents after a step are the predictor's."""
    move: _Move | None = None
    past_h = math.inf
    for step, (sigma, after) in enumerate(pairwise(levels.sigmas.tolist())):
        clean = latents - sigma * velocity(latents, step, levels.timesteps[step])
        if after == 0:  # as in `_dpm`; a corrector would correct latents that nobody reads
            yield clean
            return
        if move is not None:
            latents = move.correct(clean)
        h = _log_ratio(after) - _log_ratio(sigma)
        past = clean if move is None else move.clean
        move = _Move(
            kept=after / sigma * latents,
            gain=(1 - after) * -math.expm1(-h),
            clean=clean,
            bend=(clean - past) * (h / past_h),
            weights=_corrector_weights(h, past_h),
        )
        past_h = h
        latents = move.predict()
        yield latents


def _corrector_weights(h: float, past_h: float) -> tuple[float, float]:
    """The solution of [1 1; r 1] w = b in the UniPC paper, r = -past_h / h; at first w = 0, 1/2."""
    if past_h == math.inf:
        return 0.0, 0.5
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    of_bend = (b_1 - b_2) / (1 + past_h / h)
    return of_bend, b_1 - of_bend


def _log_ratio(sigma: float) -> float:
    """Lambda, the logarithm of signal over noise; minus infinity for pure noise."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf


SAMPLERS = {
    "euler": Sampler(_official_grid, _euler),
    "dpm++_sde": Sampler(
        partial(_production_grid, shifted_start=True), partial(_dpm, stochastic=True)
    ),
    "dpm++": Sampler(
        partial(_production_grid, shifted_start=True), partial(_dpm, stochastic=False)
    ),
    "unipc": Sampler(partial(_production_grid, shifted_start=False), _unipc),
    "dpm++_official": Sampler(_evenly_shifted_grid, partial(_dpm, stochastic=False)),
    "euler_simple": Sampler(_simple_grid, _euler),
}
