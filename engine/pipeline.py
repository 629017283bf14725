"""The whole system on one screen: a request goes in, an MP4 comes out, stage by stage."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from engine.clock import Clock, Progress
from engine.conditioning import Encoders, condition_motion, condition_pictures
from engine.denoise.guidance import Denoiser
from engine.denoise.preview import previewed
from engine.denoise.sampler import denoise, noise_like, seeded
from engine.denoise.segments import Segment, ending, kept, segments_of, within_clip
from engine.denoise.windows import (
    ClipVelocity,
    Retold,
    Watch,
    evaluations,
    in_latents,
    reporting,
    share_noise,
    unwatched,
    windowed,
    within,
)
from engine.drift.steady import Steady
from engine.errors import NotFinite, TooLarge
from engine.flow import Check, Clip, Conditions, Request, Source
from engine.machine.exhausted import ran_out
from engine.masks.looked import Look
from engine.media.blank import refuse_blank
from engine.media.mp4 import encode_mp4
from engine.residency import Memory
from engine.source import MotionCapture, load_source
from engine.stage_dump import StageDump

log = logging.getLogger(__name__)


class Pipeline:
    """Owns the loaded models. A job finds nothing of the job before it that changes its clip."""

    def __init__(
        self,
        denoiser: Denoiser,
        encoders: Encoders,
        capture: MotionCapture,
        memory: Memory,
        look: Look | None = None,  # finds joints, for framing
    ) -> None:
        self.denoiser = denoiser
        self.encoders = encoders
        self.capture = capture
        self.memory = memory
        self.look = look

    def run(
        self,
        request: Request,
        out: Path,
        comment: str,
        dump: StageDump,
        watch: Watch = unwatched,
        source: Source | None = None,
    ) -> Clip:
        """Writes the clip to `out`, all of it or nothing. Raises an `EngineError`.

        The settings of `request` are those that `recipes.check_settings` has seen. `source` are its
        media, if `check_source` has read them; else they are read now.
        """
        clock, told = Clock(), Retold(watch)
        with clock("media"):
            source = source or self._source(request, lambda: told("media", 0.0))
            dump.keep_skeleton(source)
        told("media", 1.0)
        self.memory.prepare(request, source)
        segments = segments_of(request.settings, len(source.skeleton))
        steady = Steady(request.settings.drift, source, len(segments))
        with clock("decode"):  # pulls what it encodes: all other stages have laps of their own
            frames = self._frames(request, source, segments, steady, clock, dump, told)
            count = encode_mp4(frames, source.fps, out, source.audio, comment, check=told.again)
        dump.keep_drift(steady.report)
        dump.keep_timings(clock.laps)
        height, width = source.image.shape[1:]
        for note in steady.notes:
            log.warning("%s", note)
        seed = request.settings.seed
        notes = *source.notes, *self.memory.notes, *steady.notes
        return Clip(out, width, height, count, source.fps, seed, clock.laps, notes, steady.report)

    def _source(self, request: Request, check: Check) -> Source:
        try:
            return load_source(request, self.capture, check, self.look)
        except RuntimeError as error:  # no plan knows of the networks of motion capture
            if not ran_out(error):
                raise
            raise TooLarge(
                "The GPU ran out of memory in motion capture. Ask for fewer frames, or give the "
                "skeleton itself as a video."
            ) from error

    def _frames(
        self,
        request: Request,
        source: Source,
        segments: Sequence[Segment],
        steady: Steady,
        clock: Clock,
        dump: StageDump,
        watch: Watch,
    ) -> Iterator[Tensor]:
        """Frames [n, H, W, 3] u8 as they are made, one segment of the clip after the other.

        A segment begins with finished frames of the one before, which it is told.
        """
        pictures: Conditions | None = None
        tail: Tensor | None = None
        for number, (segment, part) in enumerate(zip(segments, kept(segments), strict=True)):
            told = within(watch, number, len(segments))
            with clock("conditioning"):
                pictures = pictures or self._pictures(request, source)
                conditions = self._conditions(pictures, source, segment, tail)
            told("conditioning", 1.0)
            with clock("denoise"):
                latents = self._latents(request, conditions, dump, told, number)
            finished = self._finished(latents, segment, part, told)
            checked = partial(told, "decode", 1.0)
            finished = steady.hand_on(finished, checked, clock)
            following = segments[number + 1 : number + 2]
            tail = yield from ending(finished, sum(one.history_frames for one in following))

    def _pictures(self, request: Request, source: Source) -> Conditions:
        work = partial(condition_pictures, self.encoders, request, source)
        return self.memory.attempt("conditioning", work)

    def _conditions(
        self, pictures: Conditions, source: Source, segment: Segment, tail: Tensor | None
    ) -> Conditions:
        frames = segment.stretch(source.skeleton)
        masks = None if source.roles is None else segment.stretch(source.roles.driving)
        work = partial(condition_motion, self.encoders, pictures, source, frames, masks, tail)
        return self.memory.attempt("conditioning", work)

    def _latents(
        self, request: Request, conditions: Conditions, dump: StageDump, watch: Watch, number: int
    ) -> Tensor:
        def work() -> Tensor:
            with dump.recording(self.denoiser.recorded):
                latents = self.denoise(request, conditions, watch, number)
                self.require_finite(latents)
                dump.keep_latents(conditions, latents, number + 1)
            return latents

        return self.memory.attempt("denoise", work)

    def _finished(
        self, latents: Tensor, segment: Segment, part: slice, watch: Watch
    ) -> Iterator[Tensor]:
        """Frames of a segment that go into the clip, none of them blank. They are decoded again
        from the start where the GPU ran out of memory.
        """

        def decoded() -> Iterator[Tensor]:
            with self.encoders.vae_home.present():
                yield from self.decode(latents, watch)

        made = within_clip(self.memory.attempt_each("decode", decoded), part)
        return refuse_blank(made, segment.start + part.start)

    def denoise(
        self,
        request: Request,
        conditions: Conditions,
        watch: Watch = unwatched,
        number: int = 0,
    ) -> Tensor:
        """Latents [16, t, h, w] of segment `number`, of any length: long ones in windows.

        Each segment has a seed of its own, the next after that of the one before.
        """
        recipe, shape = request.settings.recipe, conditions.pose.shape
        cut = in_latents(recipe.window_frames, recipe.overlap_frames)
        generator = seeded((request.settings.seed + number) % 2**64)
        noise = noise_like((*shape[:2], *conditions.reference.shape[2:]), generator)
        noise = share_noise(noise, cut, generator)
        with (
            self.denoiser.home.present(),
            Progress("denoise", recipe.steps, "step") as progress,
        ):
            total = evaluations(recipe, shape[1])
            velocity = reporting(self.denoiser.bind(conditions, recipe), total, watch)
            return denoise(
                self._previewed(windowed(velocity, cut), request.preview),
                noise.to(self.denoiser.device),
                recipe,
                draw=lambda: noise_like(tuple(noise.shape), generator),
                progress=progress.reach,
                history=conditions.history,
            )

    def _previewed(self, velocity: ClipVelocity, path: Path | None) -> ClipVelocity:
        if path is None:
            return velocity
        assert self.encoders.colours is not None
        return previewed(velocity, self.encoders.colours().frames, path)

    def require_finite(self, latents: Tensor) -> None:
        if not latents.isfinite().all():
            raise NotFinite(
                f"{self.denoiser.name} gives numbers that are not finite. Use "
                "another precision; if it stays, the weights or a LoRA are damaged."
            )

    def decode(self, latents: Tensor, watch: Watch = unwatched) -> Iterator[Tensor]:
        """Frames [n, H, W, 3] u8, handed out as they are made."""
        total = latents.shape[1]
        with Progress("decode", total) as progress:
            for done, frames in enumerate(self.encoders.decode(latents), start=1):
                watch("decode", done / total)
                yield frames
                progress.advance()
