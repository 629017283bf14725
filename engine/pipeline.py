"""The whole system on one screen: a request goes in, an MP4 comes out, stage by stage."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.binding import Denoiser
from engine.clock import Clock
from engine.conditioning import Encoders, condition
from engine.errors import NotFinite
from engine.flow import Clip, Conditions, Request, Source
from engine.media.mp4 import encode_mp4
from engine.request import check_request
from engine.residency import Memory
from engine.sampler import denoise, noise_like, seeded
from engine.source import Capture, load_source
from engine.stages import Stages
from engine.windows import in_latents, share_noise, windowed


class Pipeline:
    """Owns the loaded models. A job keeps nothing of the job before it."""

    def __init__(
        self, denoiser: Denoiser, encoders: Encoders, capture: Capture, memory: Memory
    ) -> None:
        self.denoiser = denoiser
        self.encoders = encoders
        self.capture = capture
        self.memory = memory

    def run(self, request: Request, out: Path, comment: str, stages: Stages) -> Clip:
        """Writes the clip to `out`, all of it or nothing. Raises an `EngineError`."""
        check_request(request)
        clock = Clock()
        with clock("media"):
            source = load_source(request, self.capture)
            stages.keep_skeleton(source)
        self.memory.prepare(request, source)
        while True:
            try:
                self._make(request, source, out, comment, stages, clock)
                break
            except torch.OutOfMemoryError as error:
                self.memory.step_down(error)
        stages.keep_timings(clock.laps)
        frames, (height, width) = len(source.skeleton), source.image.shape[1:]
        notes = tuple(self.memory.notes)
        return Clip(out, width, height, frames, source.fps, request.seed, clock.laps, notes)

    def _make(
        self,
        request: Request,
        source: Source,
        out: Path,
        comment: str,
        stages: Stages,
        clock: Clock,
    ) -> None:
        with clock("conditioning"), self.memory.stage("conditioning"):
            conditions = condition(self.encoders, request, source)
        with clock("denoise"), self.memory.stage("denoise"), stages.watch(self.denoiser.watched):
            latents = self.denoise(request, conditions)  # [16, t, h, w]
            self.require_finite(latents)
            stages.keep_latents(conditions, latents)
        with clock("decode"), self.memory.stage("decode"), self.encoders.vae_home.present():
            audio = source.audio
            encode_mp4(self.decode(latents), source.fps, out, audio=audio, comment=comment)

    def denoise(self, request: Request, conditions: Conditions) -> Tensor:
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
            velocity = self.denoiser.bind(conditions, recipe)
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

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames [n, H, W, 3] u8, handed out as they are made."""
        with tqdm(total=latents.shape[1], desc="decode", disable=None) as bar:
            for frames in self.encoders.decode(latents):
                yield frames
                bar.update()


def _advance(bar: tqdm, done: int) -> None:
    bar.update(done - bar.n)
