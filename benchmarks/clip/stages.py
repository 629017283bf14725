"""Clocks around what a pipeline calls, so that its stages are seen without changing it.

The engine's own laps are media, conditioning, denoise and decode. What is wrapped here divides
them; the rest of a lap belongs to the stage that nothing can be wrapped around.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.clip.scene import dance_joints
from engine.denoise.guidance import Denoiser
from engine.denoise.windows import WindowVelocity
from engine.flow import Check, Conditions, Recipe, go_on
from engine.machine.resident import Resident
from engine.pipeline import Pipeline
from engine.pose.align import Mode
from engine.pose.arrays import Frame
from engine.pose.capture import capture_skeleton
from engine.pose.extract import CapturedMotion, Dance, PoseExtractor
from engine.pose.skeleton import draw_skeleton

T = TypeVar("T")

FETCH, DECODE, RENDER = "fetch", "decode", "render"
TEXT, VISION, VAE_ENCODE = "text encoder", "image encoder", "VAE encode"
CONTEXT, FORWARDS, SAMPLER = "context", "forwards", "sampler"
VAE_DECODE, VIDEO_ENCODE = "VAE decode", "video encode"
STAGES = (
    FETCH, DECODE, RENDER, TEXT, VISION, VAE_ENCODE, CONTEXT, FORWARDS, SAMPLER, VAE_DECODE,
    VIDEO_ENCODE,
)  # fmt: skip


class Spans:
    """Keeps the time that each named piece of work took, in order."""

    def __init__(self, wait: Callable[[], object] = bool) -> None:
        """`wait` returns when the device has done what it was given."""
        self._wait = wait
        self._found: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._wait()
        self._found.append((name, 1000 * (time.perf_counter() - start)))

    def of(self, name: str) -> list[float]:
        """The ms of every time that this name was used."""
        return [ms for given, ms in self._found if given == name]

    def each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Passes items on; making one is timed, and what is done with it is not."""
        while True:
            with self(name):
                item = next(items, None)
            if item is None:
                return
            yield item


def stages(spans: Spans, laps_ms: Mapping[str, float]) -> dict[str, float]:
    """ms of each stage, from the spans of a job and the engine's laps of the same."""
    held = {name: sum(spans.of(name)) for name in STAGES}
    held[VAE_ENCODE] = spans.of(VAE_ENCODE)[0]  # the VAE is at home for decoding too
    held[DECODE] = laps_ms["media"] - held[RENDER]
    held[TEXT] = laps_ms["conditioning"] - held[VISION] - held[VAE_ENCODE]
    held[SAMPLER] = laps_ms["denoise"] - held[CONTEXT] - held[FORWARDS]
    held[VIDEO_ENCODE] = laps_ms["decode"] - held[VAE_DECODE]
    return held


def timed_pipeline(pipeline: Pipeline, spans: Spans) -> Pipeline:
    """A pipeline of the same models, with clocks. The dance is taken to be known."""
    encoders = pipeline.encoders
    timed_encoders = replace(
        encoders,
        decode=lambda latents: spans.each(VAE_DECODE, encoders.decode(latents)),
        vision_home=TimedResident(encoders.vision_home, VISION, spans),
        vae_home=TimedResident(encoders.vae_home, VAE_ENCODE, spans),
    )
    capture = partial(capture_skeleton, KnownDance(spans))
    denoiser = TimedDenoiser(pipeline.denoiser, spans)
    return Pipeline(denoiser, timed_encoders, capture, pipeline.memory, pipeline.look)


class TimedResident(Resident):
    """A model's home; the time is from when the model comes until it goes."""

    def __init__(self, inner: Resident, name: str, spans: Spans) -> None:
        super().__init__()
        self._inner, self._name, self._spans = inner, name, spans

    @contextmanager
    def present(self) -> Iterator[None]:
        with self._spans(self._name), self._inner.present():
            yield


class TimedDenoiser:
    """An `engine.denoise.guidance.Denoiser`."""

    def __init__(self, inner: Denoiser, spans: Spans) -> None:
        self.name, self.device = inner.name, inner.device
        self.home, self.recorded = inner.home, inner.recorded
        self._bind, self._spans = inner.bind, spans

    def bind(self, conditions: Conditions, recipe: Recipe) -> WindowVelocity:
        with self._spans(CONTEXT):
            velocity = self._bind(conditions, recipe)

        def timed(latents: Tensor, frames: Sequence[int], step: int, timestep: float) -> Tensor:
            with self._spans(FORWARDS):
                return velocity(latents, frames, step, timestep)

        return timed


class KnownDance(PoseExtractor):
    """Gives the joints that the video was drawn from. The video is decoded, the networks are not
    asked, and nothing is fitted: nobody knows where the picture's body is.
    """

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def motion(
        self, dance: Dance, read: Callable[[], NDArray[np.uint8]], check: Check = go_on
    ) -> CapturedMotion:
        return CapturedMotion(dance_joints(len(read())), [])

    def skeleton(
        self,
        motion: CapturedMotion,
        picture: Frame | None,
        height: int,
        width: int,
        mode: Mode = "exact",
    ) -> Iterator[Frame]:
        return self._spans.each(RENDER, draw_skeleton(motion.joints, height, width))
