"""Clips of the nano model: by the exact model, and by a package whose operations are given."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import load_file

from engine.build.make import Order, make_package
from engine.config import state_dir
from engine.demo.presets import NANO_HOME, PRESETS
from engine.flow import Request, Settings
from engine.load import load_exact, load_package
from engine.media.video import probe_video, read_video
from engine.pose.networks import Networks
from engine.program import ModelSettings, Program, choose_package
from engine.stage_dump import StageDump
from kernels.attention import ATTENTION
from kernels.channel_norm import channel_norm_reference
from kernels.gemm import GEMM
from tests.support.clips import clip
from tests.support.compiled import STATE
from virtual_gpu.bank import VirtualBank

NANO = PRESETS["nano"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    frames: torch.Tensor  # [n, H, W, 3] fp64, of the MP4
    latents: torch.Tensor


@cache
def nano_package(arch):
    folder = Path(mkdtemp(dir=state_dir()))
    order = Order(arch, NANO.weights(state_dir()).checkpoint, weights="int8")
    return make_package(order, folder, STATE)


def settings():
    return ModelSettings(CPU, "fp32", None, state_dir())


def networks():
    return Networks(NANO_HOME, CPU, state_dir())


@cache
def exact():
    demo = NANO.weights(state_dir())
    return load_exact(demo.checkpoint, [], demo.models, networks(), settings())


def packaged(arch, ops):
    """A package whose operations are these."""
    program = Program(ops, lambda vae: channel_norm_reference, None)
    chosen = choose_package(nano_package(arch), CPU)
    return load_package(chosen, NANO_HOME, networks(), settings(), lambda *_: program)


def bank_of(arch, orders):
    """Holds the machine code of the package: nothing is compiled anew."""
    bank = VirtualBank(arch, STATE, orders)
    for cubin in choose_package(nano_package(arch), CPU).package.kernels:
        bank.load(cubin)
    return bank


def pairs(arch):
    """Yields every kernel for attention and every way to multiply, each at least once."""
    specs = [spec for spec in ATTENTION.values() if arch in spec.tuning]
    ways = {}
    for way in (way for way in GEMM.values() if arch in way.bias.tuning):
        if way.dtype == torch.int8:  # of the weights
            ways.setdefault(way.dtype, []).append(way)
    for n in range(max(len(specs), *map(len, ways.values()))):
        yield specs[n % len(specs)], [held[n % len(held)] for held in ways.values()]


def request_of(folder, recipe, frames=9, seed=3):
    height, width = NANO.size
    pose = folder / "pose.mp4"
    if not pose.exists():
        clip(pose, frames)
    given = Settings(recipe, prompt="a dancer", seed=seed, width=width, height=height)
    return Request(NANO_HOME / "dancer.png", pose, "pose", given)


def run(pipeline, request):
    """Makes a clip in a folder of its own beside the request's skeleton."""
    folder = Path(mkdtemp(dir=request.motion.parent))
    made = pipeline.run(request, folder / "clip.mp4", "test", StageDump(folder))
    frames = torch.cat([*read_video(probe_video(made.path))]).double()
    return Made(frames, load_file(folder / "latents.safetensors")["latents"])


def psnr(got, want):
    return 10 * math.log10(255**2 / (got.frames - want.frames).square().mean().item())
