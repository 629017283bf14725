"""Has a pipeline perform a scene, from the frames as they were drawn: no file has changed them.

What comes after the media of a job is the engine's own: conditions, segments, history, decoding.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.nano_scail2.scenes import FPS, Frames, Mode, Scene, driving_mask, picture_mask
from benchmarks.quality.suite import settings
from engine.conditioning import condition_motion, condition_pictures
from engine.demo.presets import PRESETS
from engine.demo.weights import DemoWeights
from engine.denoise.segments import kept, segments_of
from engine.flow import Request, RoleFrames, SegmentPlan, Settings, Source
from engine.load import load_exact
from engine.media.framing import image_to_network
from engine.pipeline import Pipeline
from engine.pose.networks import Networks
from engine.recipes import PROMPT

PRESET = PRESETS["nano-scail2"]


@dataclass(frozen=True, slots=True)
class Given:
    """What goes in: pictures and masks of one size."""

    mode: Mode
    picture: Frames  # [1, H, W, 3]
    picture_mask: Frames  # [1, H, W, 3]
    driving: Frames  # [T, H, W, 3]
    driving_mask: Frames  # [T, H, W, 3]


def given(scene: Scene, mode: Mode) -> Given:
    return Given(
        mode,
        scene.picture.frames,
        picture_mask(scene, mode),
        scene.driving.frames,
        driving_mask(scene, mode),
    )


def exact(weights: DemoWeights) -> Pipeline:
    """Loads the model as it was trained."""
    how = settings(None)
    networks = Networks(weights.models, how.device, how.state)
    return load_exact(weights.checkpoint, [], weights.models, networks, how)


@torch.inference_mode()
def perform(
    pipeline: Pipeline,
    given: Given,
    seed: int,
    segments: SegmentPlan = "even",
    history: bool = True,
) -> Frames:
    """Makes the frames [T, H, W, 3] u8. Without history, segments know nothing of each other."""
    request, source = _job(given, seed, segments)
    roles = source.roles
    assert roles is not None
    pictures = condition_pictures(pipeline.encoders, request, source)
    made = source.skeleton[:0]
    planned = segments_of(request.settings, len(source.skeleton))
    for number, (segment, part) in enumerate(zip(planned, kept(planned), strict=True)):
        tail = made[segment.history] if segment.history_frames and history else None
        shown, masks = segment.stretch(source.skeleton), segment.stretch(roles.driving)
        told = condition_motion(pipeline.encoders, pictures, source, shown, masks, tail)
        latents = pipeline.denoise(request, told, number=number)
        frames = torch.cat([some.cpu() for some in pipeline.decode(latents)])
        made = torch.cat([made, frames[part]])
    return made.numpy()


def _job(given: Given, seed: int, segments: SegmentPlan) -> tuple[Request, Source]:
    asked = Settings(PRESET.recipe, PROMPT, seed=seed, mode=given.mode, segments=segments)
    nowhere = Path("drawn")  # no stage behind the media looks for a file
    roles = RoleFrames(
        given.mode, _picture(given.picture_mask), torch.from_numpy(given.driving_mask)
    )
    source = Source(
        _picture(given.picture), torch.from_numpy(given.driving), FPS, None, roles=roles
    )
    return Request(nowhere, nowhere, "video", asked), source


def _picture(frames: Frames) -> Tensor:
    return image_to_network(torch.from_numpy(frames[0]))
