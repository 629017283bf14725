"""Loads a shipped demo model as a renderer: the exact model in plain PyTorch, on any machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from engine.demo.presets import Preset
from engine.denoise.windows import Watch
from engine.errors import Unavailable
from engine.flow import Clip, KindName, Request, Settings
from engine.jobs.like import comment_for
from engine.jobs.served import Served
from engine.load import load_exact
from engine.machine.heap import keep_freed_memory
from engine.pipeline import Pipeline
from engine.pose.networks import Networks
from engine.program import ModelSettings
from engine.source import load_source
from engine.stage_dump import StageDump
from engine.worker.endpoint import Endpoint
from engine.worker.service import EXACT, Renderer
from engine.worker.serving import served_of


def served_by_demo(preset: Preset) -> Served:
    """Tells what can be asked of a demo model; a request that names no recipe gets its own."""
    served = served_of(preset.config, "the demo model")
    return Served(served.kind, served.modes, who=served.who, usual=usual_of(preset))


def usual_of(preset: Preset) -> Settings:
    """Makes the settings that a demo model was trained for."""
    height, width = preset.size or (None, None)
    segments = preset.config.kind.segments[0]
    return Settings(preset.recipe, height=height, width=width, segments=segments)


def load_demo(preset: Preset, endpoint: Endpoint, device: torch.device) -> Renderer:
    """Loads the weights. Motion capture takes its networks from the endpoint's models folder."""
    if device.type == "cpu":
        keep_freed_memory()
    shipped = preset.weights(endpoint.state)
    precision = "fp32" if device.type == "cpu" else "bf16"
    settings = ModelSettings(device, precision, None, endpoint.state)
    networks = Networks(endpoint.models, device, endpoint.state)
    pipeline = load_exact(shipped.checkpoint, [], shipped.models, networks, settings)
    return Renderer(
        engine=f"scail-engine {version('scail-engine')} demo {preset.config.kind.name}",
        gpu="CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        attention=EXACT,
        run=partial(_run, pipeline, preset.config.kind.name),
        attending=_attending,
        plan=lambda _: None,
        high_water=lambda: None,
        served=served_by_demo(preset),
        see=lambda request, check: load_source(request, pipeline.capture, check, pipeline.look),
        look=networks.look,
    )


def _run(pipeline: Pipeline, kind: KindName, request: Request, out: Path, watch: Watch) -> Clip:
    comment = comment_for(request.settings, kind, "DEMO WEIGHTS")
    return pipeline.run(request, out, comment, StageDump(None), watch)


@contextmanager
def _attending(name: str) -> Iterator[None]:
    raise Unavailable(f"The demo model has no attention {name}, only {EXACT}; leave it out.")
    yield
