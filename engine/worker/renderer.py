"""Loads the worker's renderer: a package and the other models, warm, as functions."""

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from engine.clock import Clock
from engine.config import defaults
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.windows import Watch
from engine.errors import EngineError, Unavailable, UnsupportedGpu
from engine.flow import Clip, KindName, Recipe, Request, Settings
from engine.jobs.like import comment_for
from engine.jobs.served import Served
from engine.jobs.usual import usual_sizes
from engine.load import load_package
from engine.machine.device import find_device
from engine.machine.heap import keep_freed_memory
from engine.masks.segment import segment_with
from engine.media.mp4 import encode_mp4
from engine.models.attention import ATTENTIONS, Attention, available, find_attention
from engine.pipeline import Pipeline
from engine.pose.networks import Networks
from engine.program import (
    ChosenPackage,
    MakeProgram,
    ModelSettings,
    choose_package,
    make_program,
)
from engine.recipes import row_of
from engine.source import load_source
from engine.stage_dump import StageDump
from engine.worker.convolutions import choose_plans
from engine.worker.endpoint import Endpoint
from engine.worker.service import Renderer
from engine.worker.serving import served_by

log = logging.getLogger(__name__)

# A step of each kind that the usual recipe has: with and without the skeleton.
_WARM: Mapping[KindName, Recipe] = {
    "preview": Recipe("dpm++_sde", 2, cfg=1.0, shift=5.0, pose_until=0.5, half_render=True),
    "scail2": Recipe("euler_simple", 2, cfg=1.0, shift=8.0),
}
_WARM_SIDE, _WARM_FRAMES = 64, 9
_WARM_PROMPT = "the human starts to dance"  # most jobs have it, packages hold its embedding


def load_renderer(endpoint: Endpoint) -> Renderer:
    """Loads what makes clips. Raises what `choose_package` and `load_package` raise.

    Without a GPU it raises `UnsupportedGpu`, unless the endpoint allows a CPU; what `find_device`
    raises for a GPU that PyTorch cannot use.
    """
    device = find_device()
    if device.type == "cpu" and not endpoint.allows_cpu:
        raise UnsupportedGpu(
            "There is no GPU here, and a worker without one takes hours for a clip. Take a "
            "machine with a GPU; for a test with a tiny package set SCAIL_ALLOW_CPU=1."
        )
    return renderer_of(choose_package(endpoint.package, device), endpoint, device)


def renderer_of(
    chosen: ChosenPackage,
    endpoint: Endpoint,
    device: torch.device,
    make: MakeProgram = make_program,
) -> Renderer:
    """Loads a package that was chosen, and makes the first clip. `make` binds its operations to
    what computes them. Raises what `load_package` raises.
    """
    gpu, package = chosen.gpu, chosen.package
    served = served_by(package.manifest)
    sizes = usual_sizes(defaults(), served)  # a recipe of another model ends here
    if gpu is None:
        keep_freed_memory()
    settings = ModelSettings(device, "fp32" if gpu is None else "bf16", None, endpoint.state)
    networks = Networks(endpoint.models, device, endpoint.state)
    pipeline = load_package(chosen, endpoint.models, networks, settings, make)
    denoiser = pipeline.denoiser
    assert isinstance(denoiser, PackagedDenoiser)
    with Clock()("warm"):
        _warm(pipeline, served, endpoint.scratch)
        choose_plans(pipeline, sizes, device)
    if said := row_of(served.kind.name, defaults().recipe)[1]:
        log.info("%s", said)
    log.info("%s is served: %s", served.kind.title, " and ".join(served.modes) or "animation")

    def run(request: Request, out: Path, watch: Watch) -> Clip:
        comment = comment_for(request.settings, served.kind.name, "SCAIL")
        return pipeline.run(request, out, comment, StageDump(None), watch)

    return Renderer(
        engine=f"scail-engine {version('scail-engine')} {package.manifest.arch} "
        f"{package.digest[:12]}",
        gpu="CPU" if gpu is None else gpu.name,
        attention=chosen.arch.attention,
        run=run,
        attending=lambda name: denoiser.attending(_plain(name, chosen.arch.attention)),
        plan=pipeline.memory.foresee,
        high_water=lambda: _high_water(device),
        served=served,
        segment=segment_with(endpoint.models, device, endpoint.state),
        see=lambda request, check: load_source(request, pipeline.capture, check, pipeline.look),
        look=networks.look,
    )


def _plain(name: str, own: str) -> Attention:
    """Finds an attention of 16 bits, to be taken for a while in place of the worker's own.

    Raises `Unavailable` for a name that is neither, another form of 8 bits among them.
    """
    if name in ATTENTIONS:
        return find_attention(name)
    raise Unavailable(
        f"There is no attention {name} on this worker: its GPU has its own, {own}, and "
        f"{' and '.join(available())} beside it. Ask for one of these, or for none by name."
    )


def _warm(pipeline: Pipeline, served: Served, scratch: Path) -> None:
    """Makes the smallest clip, so that the first job finds kernels loaded and memory mapped.

    A sheet of grey is no picture, so its clip may be refused. What matters will fail again.
    """
    with TemporaryDirectory(prefix="warm-", dir=scratch) as folder:
        picture, skeleton, clip = (Path(folder, name) for name in ("a.png", "b.mp4", "c.mp4"))
        Image.radial_gradient("L").resize((_WARM_SIDE, _WARM_SIDE)).save(picture)
        encode_mp4([_ramp()], 16.0, skeleton)
        settings = Settings(
            _WARM[served.kind.name],
            _WARM_PROMPT,
            width=_WARM_SIDE,
            height=_WARM_SIDE,
            audio=False,
            mode=next(iter(served.kind.modes), None),
        )
        request = Request(picture, skeleton, "pose", settings)
        try:
            pipeline.run(request, clip, "warm", StageDump(None))
        except EngineError as error:
            log.warning("the first clip, of nothing, did not come out: %s", error)


def _ramp() -> Tensor:
    """Draws a ramp of grey, as frames [n, H, W, 3] u8."""
    line = torch.linspace(0, 255, _WARM_SIDE).to(torch.uint8)
    return line[None, None, :, None].expand(_WARM_FRAMES, _WARM_SIDE, -1, 3).contiguous()


def _high_water(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak
