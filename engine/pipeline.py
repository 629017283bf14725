"""The whole system on one screen: a request goes in, an MP4 comes out, stage by stage."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from engine.binding import Denoiser
from engine.blank import refuse_blank
from engine.clock import Clock
from engine.conditioning import Encoders, condition
from engine.errors import NotFinite, TooLarge
from engine.flow import Clip, Conditions, Recipe, Request, Source
from engine.media.mp4 import encode_mp4
from engine.recipes import check_request
from engine.residency import Memory
from engine.sampler import denoise, noise_like, seeded
from engine.source import Capture, load_source
from engine.stages import Stages
from engine.windows import WindowVelocity, in_latents, share_noise, windowed, windows

# stage, share of it that is done; called between forwards, and what it raises ends the job
Watch: TypeAlias = Callable[[str, float], None]


def unwatched(stage: str, share: float) -> None:
    """Nobody waits."""


class Pipeline:
    """Owns the loaded models. A job keeps nothing of the job before it."""

    def __init__(
        self, denoiser: Denoiser, encoders: Encoders, capture: Capture, memory: Memory
    ) -> None:
        self.denoiser = denoiser
        self.encoders = encoders
        self.capture = capture
        self.memory = memory

    def run(
        self,
        request: Request,
        out: Path,
        comment: str,
        stages: Stages,
        watch: Watch = unwatched,
    ) -> Clip:
        """Writes the clip to `out`, all of it or nothing. Raises an `EngineError`."""
        check_request(request)
        clock = Clock()
        with clock("media"):
            source = self._source(request)
            stages.keep_skeleton(source)
        watch("media", 1.0)
        self.memory.prepare(request, source)
        while True:
            try:
                self._make(request, source, out, comment, stages, clock, watch)
                break
            except torch.OutOfMemoryError as error:
                self.memory.step_down(error)
        stages.keep_timings(clock.laps)
        frames, (height, width) = len(source.skeleton), source.image.shape[1:]
        notes = tuple(self.memory.notes)
        return Clip(out, width, height, frames, source.fps, request.seed, clock.laps, notes)

    def _source(self, request: Request) -> Source:
        try:
            return load_source(request, self.capture)
        except torch.OutOfMemoryError as error:  # no plan knows of the networks of motion capture
            raise TooLarge(
                "The GPU ran out of memory in motion capture. Ask for fewer frames, or give the "
                "skeleton itself as a video."
            ) from error

    def _make(
        self,
        request: Request,
        source: Source,
        out: Path,
        comment: str,
        stages: Stages,
        clock: Clock,
        watch: Watch,
    ) -> None:
        with clock("conditioning"), self.memory.stage("conditioning"):
            conditions = condition(self.encoders, request, source)
        watch("conditioning", 1.0)
        with clock("denoise"), self.memory.stage("denoise"), stages.watch(self.denoiser.watched):
            latents = self.denoise(request, conditions, watch)  # [16, t, h, w]
            self.require_finite(latents)
            stages.keep_latents(conditions, latents)
        with clock("decode"), self.memory.stage("decode"), self.encoders.vae_home.present():
            audio = source.audio
            frames = refuse_blank(self.decode(latents, watch))
            encode_mp4(frames, source.fps, out, audio=audio, comment=comment)

    def denoise(self, request: Request, conditions: Conditions, watch: Watch = unwatched) -> Tensor:
        """Latents [16, t, h, w] of the clip, of any length: long ones in windows."""
        recipe, shape = request.recipe, conditions.pose.shape
        cut = in_latents(recipe.window_frames, recipe.overlap_frames)
        generator = seeded(request.seed)
        noise = noise_like((*shape[:2], *conditions.reference.shape[2:]), generator)
        noise = share_noise(noise, cut, generator)
        with (
            self.denoiser.home.present(),
            tqdm(total=recipe.steps, desc="denoise", unit="step", disable=None) as bar,
        ):
            total = evaluations(recipe, shape[1])
            velocity = _watched(self.denoiser.bind(conditions, recipe), total, watch)
            return denoise(
                windowed(velocity, cut),
                noise.to(self.denoiser.device),
                recipe,
                draw=lambda: noise_like(tuple(noise.shape), generator),
                progress=lambda done: _advance(bar, done),
            )

    def require_finite(self, latents: Tensor) -> None:
        if not latents.isfinite().all():
            raise NotFinite(
                f"{self.denoiser.name} gives numbers that are not finite. Use "
                "another precision; if it stays, the weights or a LoRA are damaged."
            )

    def decode(self, latents: Tensor, watch: Watch = unwatched) -> Iterator[Tensor]:
        """Frames [n, H, W, 3] u8, handed out as they are made."""
        total = latents.shape[1]
        with tqdm(total=total, desc="decode", disable=None) as bar:
            for done, frames in enumerate(self.encoders.decode(latents), start=1):
                watch("decode", done / total)
                yield frames
                bar.update()


def evaluations(recipe: Recipe, latents: int) -> int:
    """How often the velocity of a window is asked for, in all steps of a clip."""
    cut = in_latents(recipe.window_frames, recipe.overlap_frames)
    return sum(len(windows(step, latents, cut)) for step in range(recipe.steps))


def _watched(velocity: WindowVelocity, total: int, watch: Watch) -> WindowVelocity:
    """Tells `watch` after each of `total` evaluations."""
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


def _advance(bar: tqdm, done: int) -> None:
    bar.update(done - bar.n)
