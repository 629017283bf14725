"""The whole system on one screen: a request goes in, an MP4 comes out, stage by stage."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from engine.clock import Clock
from engine.conditioning import Encoders, condition
from engine.denoise.guidance import Denoiser
from engine.denoise.sampler import denoise, noise_like, seeded
from engine.denoise.windows import (
    Watch,
    evaluations,
    in_latents,
    reporting,
    share_noise,
    unwatched,
    windowed,
)
from engine.errors import NotFinite, TooLarge
from engine.flow import Check, Clip, Conditions, Request, Source
from engine.machine.exhausted import ran_out
from engine.media.blank import refuse_blank
from engine.media.mp4 import encode_mp4
from engine.residency import Memory
from engine.source import MotionCapture, load_source
from engine.stage_dump import StageDump


class Pipeline:
    """Owns the loaded models. A job finds nothing of the job before it that changes its clip."""

    def __init__(
        self, denoiser: Denoiser, encoders: Encoders, capture: MotionCapture, memory: Memory
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
        dump: StageDump,
        watch: Watch = unwatched,
    ) -> Clip:
        """Writes the clip to `out`, all of it or nothing. Raises an `EngineError`.

        The settings of `request` are those that `recipes.check_settings` has seen.
        """
        clock = Clock()
        with clock("media"):
            source = self._source(request, lambda: watch("media", 0.0))
            dump.keep_skeleton(source)
        watch("media", 1.0)
        self.memory.prepare(request, source)
        attempt = self.memory.attempt
        with clock("conditioning"):
            conditions = attempt("conditioning", lambda: condition(self.encoders, request, source))
        watch("conditioning", 1.0)
        with clock("denoise"):
            latents = attempt("denoise", lambda: self._latents(request, conditions, dump, watch))
        with clock("decode"):
            attempt("decode", lambda: self._write(latents, source, out, comment, watch))
        dump.keep_timings(clock.laps)
        frames, (height, width) = len(source.skeleton), source.image.shape[1:]
        seed, notes = request.settings.seed, (*source.notes, *self.memory.notes)
        return Clip(out, width, height, frames, source.fps, seed, clock.laps, notes)

    def _source(self, request: Request, check: Check) -> Source:
        try:
            return load_source(request, self.capture, check)
        except RuntimeError as error:  # no plan knows of the networks of motion capture
            if not ran_out(error):
                raise
            raise TooLarge(
                "The GPU ran out of memory in motion capture. Ask for fewer frames, or give the "
                "skeleton itself as a video."
            ) from error

    def _latents(
        self, request: Request, conditions: Conditions, dump: StageDump, watch: Watch
    ) -> Tensor:
        with dump.recording(self.denoiser.recorded):
            latents = self.denoise(request, conditions, watch)
            self.require_finite(latents)
            dump.keep_latents(conditions, latents)
        return latents

    def _write(
        self, latents: Tensor, source: Source, out: Path, comment: str, watch: Watch
    ) -> None:
        done = 0.0

        def told(stage: str, share: float) -> None:
            nonlocal done
            done = share
            watch(stage, share)

        with self.encoders.vae_home.present():
            frames = refuse_blank(self.decode(latents, told))
            encode_mp4(
                frames, source.fps, out, source.audio, comment, check=lambda: watch("decode", done)
            )

    def denoise(self, request: Request, conditions: Conditions, watch: Watch = unwatched) -> Tensor:
        """Latents [16, t, h, w] of the clip, of any length: long ones in windows."""
        recipe, shape = request.settings.recipe, conditions.pose.shape
        cut = in_latents(recipe.window_frames, recipe.overlap_frames)
        generator = seeded(request.settings.seed)
        noise = noise_like((*shape[:2], *conditions.reference.shape[2:]), generator)
        noise = share_noise(noise, cut, generator)
        with (
            self.denoiser.home.present(),
            tqdm(total=recipe.steps, desc="denoise", unit="step", disable=None) as bar,
        ):
            total = evaluations(recipe, shape[1])
            velocity = reporting(self.denoiser.bind(conditions, recipe), total, watch)
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


def _advance(bar: tqdm, done: int) -> None:
    bar.update(done - bar.n)
