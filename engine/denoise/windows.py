"""Long clips: the transformer sees a window of latent frames at a time, the results are blended.

The windows move from step to step, so that no seam stays in one place; whoever waits for the clip
is told after each of them how far it is. Frames here are latent frames, except in `in_latents`. The
schedule is `uniform_standard` of docs/reference/denoiser.md 10.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.config import VAE_STRIDE
from engine.errors import BadRequest
from engine.flow import Recipe

# latents of the window [C, c, h, w], its frames, step index, timestep -> velocity, same shape
WindowVelocity = Callable[[Tensor, Sequence[int], int, float], Tensor]
# latents of the clip [C, t, h, w], step index, timestep: a velocity of `sampler.py`
ClipVelocity = Callable[[Tensor, int, float], Tensor]
# stage, share of it that is done; called between forwards, and what it raises ends the job
Watch: TypeAlias = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Windowing:
    """The cut of a long clip. Raises `BadRequest` for figures that cut none."""

    window: int  # frames seen at once
    overlap: int  # frames shared with the next window
    stride: int = 1  # window spacings in use: every frame, every 2nd, every 4th, ...

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.window or self.stride < 1:
            raise BadRequest(
                f"Windows of {self.window} latent frames with an overlap of {self.overlap} and a "
                f"stride of {self.stride} cannot be made: the overlap must be shorter than the "
                f"window and the stride at least 1. (A latent frame is {VAE_STRIDE[0]} frames.)"
            )


def in_latents(frames: int, overlap: int, stride: int = VAE_STRIDE[0]) -> Windowing:
    """Makes the windowing from figures in pixel frames, as requests give them."""
    return Windowing(latent_frames(frames), overlap // VAE_STRIDE[0], stride // VAE_STRIDE[0])


def latent_frames(frames: int) -> int:
    """Counts the latent frames that so many pixel frames become."""
    return (frames - 1) // VAE_STRIDE[0] + 1


def windows(step: int, latents: int, windowing: Windowing) -> list[list[int]]:
    """Lists the frames of each window at a step, in the order of evaluation.

    Every frame of the clip is in at least one window; no window holds a frame twice.
    """
    if latents <= windowing.window:
        return [list(range(latents))]
    looped = _looped(step, latents, windowing)
    placed: list[list[int]] = []
    for number, frames in enumerate(looped):
        seam = _seam(frames)
        if seam is None:
            placed.append(frames)
            continue
        moved = latents - 1 - (frames[-1] - frames[0]) % latents
        placed.append([moved + (frame - frames[0]) % latents for frame in frames])
        following = looped[number + 1] if number + 1 < len(looped) else placed[0]
        if frames[seam] not in following:
            placed.append(_run(frames[seam], latents, windowing))
    for frame in range(latents):  # wide spacings alone leave gaps, where several windows moved
        if not any(frame in frames for frames in placed):
            placed.append(_run(frame, latents, windowing))
    return [list(frames) for frames in dict.fromkeys(map(tuple, placed))]


def windowed(velocity: WindowVelocity, windowing: Windowing) -> ClipVelocity:
    """Makes the velocity of a clip of any length by blending those of its windows.

    A clip that fits one window is evaluated as it is.
    """

    def whole(latents: Tensor, step: int, timestep: float) -> Tensor:
        count = latents.shape[1]
        parts = windows(step, count, windowing)
        if len(parts) == 1:
            return velocity(latents, parts[0], step, timestep)
        weights = blending(parts, count, windowing).to(latents.device)
        blended = torch.zeros_like(latents)
        for frames, weight in zip(parts, weights, strict=True):
            part = velocity(latents[:, frames], frames, step, timestep)
            blended[:, frames] += weight[frames, None, None] * part
        return blended

    return whole


def blending(parts: Sequence[Sequence[int]], latents: int, windowing: Windowing) -> Tensor:
    """Weighs each window in each frame: [windows, t] fp32, the sum over windows is 1.

    Weights ramp over the overlap at the edges of a window that are not edges of the clip. Ramps
    never reach 0: a frame that only window edges hold keeps a velocity.
    """
    # without an overlap it is infinite, and all weights are one
    ramp = (torch.arange(windowing.window) + 0.5) / windowing.overlap
    rising = ramp.clamp(max=1)
    weights = torch.zeros(len(parts), latents)
    for weight, frames in zip(weights, parts, strict=True):
        inner = torch.ones(len(frames))
        if frames[0] > 0:
            inner = torch.minimum(inner, rising)
        if frames[-1] < latents - 1:
            inner = torch.minimum(inner, rising.flip(0))
        weight[list(frames)] = inner
    return weights / weights.sum(0)


def share_noise(noise: Tensor, windowing: Windowing, generator: torch.Generator) -> Tensor:
    """Replaces stretches of noise [C, t, h, w] after the first window by earlier ones, shuffled.

    Later windows then start from the noise of earlier ones in another order ("freenoise"), so
    that they make the same scene. One permutation is drawn from the job's generator per stretch.
    """
    shared = noise.clone()
    latents, fresh = noise.shape[1], windowing.window - windowing.overlap
    for target in range(windowing.window, latents, fresh):
        source = target - windowing.window
        length = min(fresh, latents - target)
        order = source + torch.randperm(length, generator=generator)
        shared[:, target : target + length] = shared[:, order.to(noise.device)]
    return shared


def _looped(step: int, latents: int, windowing: Windowing) -> list[list[int]]:
    """Lists windows on a clip closed to a loop. Ordered halving of the step gives their start."""
    halving = int(f"{step:064b}"[::-1], 2) / 2**64
    start = round(latents * halving)
    window, overlap = windowing.window, windowing.overlap
    strides = min(windowing.stride, math.ceil(math.log2(latents / window)) + 1)
    looped: list[list[int]] = []
    for spacing in (2**power for power in range(strides)):
        if (window - 1) * spacing >= latents:
            break  # the window would be longer than the clip
        first = int(halving * spacing) + start
        firsts = range(first, latents + start, window * spacing - overlap)
        looped += [[(first + i * spacing) % latents for i in range(window)] for first in firsts]
    return looped


def _seam(frames: list[int]) -> int | None:
    """Finds the place in a window of its first frame past the end of the clip, on the loop."""
    return next((i for i in range(1, len(frames)) if frames[i] < frames[i - 1]), None)


def _run(first: int, latents: int, windowing: Windowing) -> list[int]:
    """A window of consecutive frames from `first` on, or the last one of the clip."""
    first = min(first, latents - windowing.window)
    return list(range(first, first + windowing.window))


def unwatched(stage: str, share: float) -> None:
    """Tells nobody: a `Watch` for a clip that nobody waits for."""


class Retold:
    """A `Watch` that can be asked again between what it is told: `again` is a `Check`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._last = ("media", 0.0)

    def __call__(self, stage: str, share: float) -> None:
        self._last = (stage, share)
        self._watch(stage, share)

    def again(self) -> None:
        self._watch(*self._last)


def within(watch: Watch, number: int, count: int) -> Watch:
    """Makes a watch for one of `count` parts of a job that are alike, the first being 0."""
    return lambda stage, share: watch(stage, (number + share) / count)


def sees_skeleton(recipe: Recipe, step: int) -> bool:
    """Tells if the skeleton is seen at a step: from `pose_from` until before `pose_until`."""
    return recipe.pose_from <= step / recipe.steps < recipe.pose_until


def evaluations(recipe: Recipe, latents: int) -> int:
    """Counts how often the velocity of a window is asked for, in all steps of a clip."""
    return sum(evaluations_of_each(recipe, latents))


def evaluations_of_each(recipe: Recipe, latents: int) -> tuple[int, int]:
    """Counts the `evaluations` that see the skeleton, and those that do not."""
    cut, counts = in_latents(recipe.window_frames, recipe.overlap_frames), [0, 0]
    for step in range(recipe.steps):
        counts[not sees_skeleton(recipe, step)] += len(windows(step, latents, cut))
    return counts[0], counts[1]


def reporting(velocity: WindowVelocity, total: int, watch: Watch) -> WindowVelocity:
    """Makes a velocity that tells `watch` after each of `total` evaluations."""
    done = 0

    def told(latents: Tensor, frames: Sequence[int], step: int, timestep: float) -> Tensor:
        nonlocal done
        found = velocity(latents, frames, step, timestep)
        if found.is_cuda:  # the host would queue the whole clip, and nothing could be called off
            torch.cuda.current_stream(found.device).synchronize()
        done += 1
        watch("denoise", done / total)
        return found

    return told
