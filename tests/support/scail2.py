"""Media of a small job for SCAIL-2: a square of blue dances, and who is who in it."""

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from engine.config import KINDS, state_dir
from engine.demo.presets import PRESETS
from engine.jobs.served import Served
from engine.load import load_exact
from engine.pose.networks import Networks
from engine.program import ModelSettings
from engine.stage_dump import StageDump
from engine.worker.service import Renderer
from tests.support.clips import clip, run_ffmpeg

SIZE, FRAMES = (64, 96), 9  # rows and columns of picture and dance
BLUE, RED, WHITE = (0, 0, 255), (255, 0, 0), (255, 255, 255)


@cache
def tiny_pipeline():
    """The exact model of the preset tiny-scail2."""
    demo = PRESETS["tiny-scail2"].weights(state_dir())
    settings = ModelSettings(torch.device("cpu"), "fp32", "sdpa", state_dir())
    networks = Networks(demo.models, settings.device, state_dir())
    return load_exact(demo.checkpoint, [], demo.models, networks, settings)


@dataclass
class Exact:
    """A worker's renderer that runs the exact model."""

    modes: tuple = KINDS["scail2"].modes

    def load(self, endpoint):
        return Renderer(
            "exact", "CPU", "sdpa",
            lambda request, out, watch: tiny_pipeline().run(
                request, out, "test", StageDump(None), watch
            ),
            lambda name: None, lambda shape: None, lambda: None,
            Served(KINDS["scail2"], self.modes),
        )  # fmt: skip


def png(pixels, mode=None):
    """Packs pixels [h, w, ..] u8 as base64."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def noise(size=SIZE, channels=3):
    return np.random.default_rng(0).integers(0, 255, (*size, channels), dtype=np.uint8)


def square(size=SIZE, colour=BLUE, ground=(0, 0, 0), left=24):
    """A picture of a mask: a square of a colour."""
    pixels = np.empty((*size, 3), np.uint8)
    pixels[:] = ground
    pixels[16:48, left : left + 32] = colour
    return pixels


def npz(array, name="masks"):
    file = io.BytesIO()
    np.savez_compressed(file, **{name: array})
    return base64.b64encode(file.getvalue()).decode()


def labels(frames=FRAMES, size=SIZE, person=1):
    """Labels [T, h, w] u8 of somebody who walks."""
    made = np.zeros((frames, *size), np.uint8)
    for n in range(frames):
        made[n, 16:48, 8 + n : 40 + n] = person
    return made


@cache
def dance():
    """The video of the dance in base64."""
    with TemporaryDirectory() as folder:
        return packed(clip(Path(folder) / "dance.mp4", FRAMES))


@cache
def mask_video(frames=FRAMES, size=SIZE, colour=BLUE):
    """A mask as a lossless video, in base64."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mask.mkv"
        pixels = np.stack([square(size, colour, left=8 + n) for n in range(frames)])
        run_ffmpeg(
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}", "-r", 16,
            "-i", "-", "-c:v", "ffv1", "-pix_fmt", "gbrp", path, stdin=pixels.tobytes(),
        )  # fmt: skip
        return packed(path)


def packed(path):
    return base64.b64encode(path.read_bytes()).decode()


def body(**changes):
    """A job in replacement, of one step; what is None is left out."""
    given = {
        "image_base64": png(noise()), "video_base64": dance(), "mask_base64": npz(labels()),
        "reference_mask_base64": png(square()), "mode": "replacement", "steps": 1,
        "width": 96, "height": 64,
    } | changes  # fmt: skip
    return {"id": "job-1", "input": {k: v for k, v in given.items() if v is not None}}
