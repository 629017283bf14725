"""Estimates a job before anything is rendered: size, frames, forwards, work."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.denoise.segments import segments_of
from engine.denoise.windows import evaluations, latent_frames
from engine.flow import Check, Recipe, Request, Source, go_on
from engine.masks.looked import Look
from engine.media.framing import Size
from engine.media.video import VideoInfo, frame_count
from engine.memory import ClipShape
from engine.residency import shape_of
from engine.source import load_source

# In a forward of the 14B model with so many tokens, attention computes as much as the products.
_EVEN_TOKENS = 29_000


@dataclass(frozen=True, slots=True)
class DryRun:
    """The size of a job, and the work that it takes."""

    shape: ClipShape  # of what is denoised at once
    frames: int  # of the clip
    segments: int  # that it is made in, one after the other
    fps: float
    forwards: int  # whole ones of the transformer
    work: float  # tokens in all forwards, attention counted as so many more

    def seconds(self, other: "DryRun", denoise_s: float, rest_s: float) -> float:
        """Estimates the seconds of this job from those of `other`."""
        pixels = _pixels(self) / _pixels(other)
        return denoise_s * self.work / other.work + rest_s * pixels


def measure(request: Request, check: Check = go_on, look: Look | None = None) -> Source:
    """Measures the media of a job. A dance is counted and nobody is looked for in it, but where
    framing needs joints, by `look`.

    Raises `BadMedia` as rendering would, and what `check` raises.
    """
    return load_undanced(request, check, look)


def load_undanced(request: Request, check: Check, look: Look | None = None) -> Source:
    """Reads media as they are; a dance becomes frames without a skeleton."""
    return load_source(request, _counted, check, look)


def dry_run(request: Request, source: Source) -> DryRun:
    """Counts the forwards of a job and their work."""
    shape, settings = shape_of(request, source), request.settings
    planned = segments_of(settings, len(source.skeleton))
    each = [evaluations(settings.recipe, latent_frames(one.frames)) for one in planned]
    forwards = shape.contexts * sum(each)
    work = forwards * shape.tokens * (1 + shape.tokens / _EVEN_TOKENS)
    return DryRun(shape, planned[-1].end, len(planned), source.fps, forwards, work)


def sized(recipe: Recipe, height: int, width: int, frames: int, fps: float) -> Source:
    """Makes a source of these sizes without content, for code that looks at the sizes alone."""
    size = (height // 2, width // 2) if recipe.half_render else (height, width)
    return Source(_nothing(3, height, width), _nothing(frames, *size, 3), fps, None)


def _counted(
    request: Request, video: VideoInfo, picture: Tensor, canvas: Size, check: Check
) -> tuple[Tensor, float]:
    fps = request.settings.fps
    return _nothing(frame_count(video, fps, request.settings.frames), *canvas, 3), fps or video.fps


def _nothing(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def _pixels(run: DryRun) -> int:
    return run.shape.height * run.shape.width * run.frames
