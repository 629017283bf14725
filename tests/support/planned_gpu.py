"""A GPU that has as much memory as a test says, with models that write down where they are sent."""

import dataclasses

import torch

from engine.flow import Recipe, Request, Settings, Source
from engine.machine.ladder import LADDER
from engine.machine.resident import Resident
from engine.memory import ClipShape, EncoderBytes, plan
from engine.package.folder import open_package
from engine.residency import Memory, Movable
from kernels.arch import SM90
from tests.support.built import tiny_package

QUICK = Recipe(sampler="euler", steps=2, cfg=1.0, shift=5.0)
GB = 10**9
ENCODERS = EncoderBytes(text=0, vision=GB, vae=GB)
# of two blocks none is worth streaming: this is as low as a clip of the tiny model goes
IN_TURNS = next(rung for rung in LADDER if not (rung.blocks_stay or rung.streams))


def full():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a")


class Moves:
    """A model that says when it comes and goes, and may not fit."""

    def __init__(self, diary, name):
        self.diary, self.name, self.fits = diary, name, True
        self.home = Resident(self.arrive, self.leave)

    def arrive(self):
        self.diary.append(f"+{self.name}")
        if not self.fits:
            raise full()

    def leave(self):
        self.diary.append(f"-{self.name}")


class Gpu:
    """A planner with so much memory, and models that keep a diary."""

    def __init__(self, free=1000 * GB):
        self.free, self.diary, self.shapes, self.kept = free, [], [], []
        self.manifest, self.streams = open_package(tiny_package(SM90)).manifest, []
        self.blocks, self.vision, self.vae = (
            Moves(self.diary, name) for name in ("blocks", "vision", "vae")
        )
        movable = Movable(
            self.blocks.home,
            self.vision.home,
            self.vae.home,
            self.use_graphs,
            {
                "denoise": lambda: self.diary.append("forget"),
                "decode": lambda: self.diary.append("release"),
            },
            self,
            self.streams.append,
        )
        self.memory = Memory(self.plan, movable)

    def keep(self, *, weights, texts):
        self.kept.append((weights, texts))

    def use_graphs(self, wanted):
        self.diary.append(f"graphs {wanted}")

    def plan(self, shape):
        self.shapes.append(shape)
        return plan(self.manifest, shape, ENCODERS, self.free)

    def free_for(self, rung):
        """Bytes with which this rung is the first that fits the clip of these tests."""
        found = plan(self.manifest, ClipShape(64, 96, 9), ENCODERS, self.free)
        while found.rung is not rung:
            found = plan(self.manifest, ClipShape(64, 96, 9), ENCODERS, found.peak_bytes - 1)
        return found.peak_bytes


def made(gpu, height=64, width=96, frames=9):
    """A request and its media, as `Memory.prepare` sees them."""
    picture, skeleton = torch.zeros(1).expand(3, height, width), torch.zeros(1, dtype=torch.uint8)
    source = Source(picture, skeleton.expand(frames, height, width, 3), 16.0, None)
    recipe = dataclasses.replace(QUICK, steps=50)  # so many that graphs are recorded
    return Request(None, None, "pose", Settings(recipe)), source
