"""The job of suite `clip`: a drawn dancer, a drawn dance, and a package that renders them.

The files come as those of a job do: by the worker's own download over HTTP. The server is on this
machine, so the time has everything but the network.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from shutil import copyfile

import torch

from benchmarks.cold_start.suite import prepare
from benchmarks.media import serving
from benchmarks.nano.dance import dance
from benchmarks.nano.dancer import FPS, PICTURE, SEED
from benchmarks.nano.drawing import Look, draw_dancer
from engine.config import SCAIL_14B, TINY, models_dir
from engine.denoise.packaged import PackagedDenoiser
from engine.jobs.fetch import Wanted, fetch_url
from engine.jobs.wire import Internet
from engine.load import load_package
from engine.media.framing import crop_frames
from engine.media.mp4 import encode_mp4
from engine.pipeline import Pipeline
from engine.pose.arrays import Floats
from engine.pose.networks import Networks
from engine.program import ModelSettings, choose_package

_VIDEO_SIZE = 1280, 720  # height and width of the dance, as phones make it
_DRAWN_SIZE = 320, 180  # drawn at this and enlarged: drawing is slow and not measured
_VIDEO = "dance.mp4"
_HOST = "media.example.org"
_ADDRESS = "93.184.215.14"  # a public one, as the worker wants; it is never asked


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pipeline that is ready for its first job."""

    pipeline: Pipeline
    weights: str  # "tiny", "14B", or layers and width of what is neither
    gpu: str | None  # the driver's name of it, None on a CPU


def load(folder: Path, package: Path | None, models: Path | None) -> Loaded:
    """Loads the package, or a tiny one made in `folder`; no prompt has been seen before.

    Raises `WrongResult` if the tiny one cannot be made, and what `choose_package` and
    `load_package` raise.
    """
    if package is None:
        made = prepare(folder, None, models)  # in a process of its own: its memory is not ours
        package, models = made.package, made.models
    models = models or models_dir()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device = torch.device("cuda" if gpu else "cpu")
    settings = ModelSettings(device, "bf16" if gpu else "fp32", None, folder / "state")
    networks = Networks(models, device, settings.state)
    pipeline = load_package(choose_package(package, device), models, networks, settings)
    assert isinstance(pipeline.denoiser, PackagedDenoiser)
    model = pipeline.denoiser.config
    known = {TINY: "tiny", SCAIL_14B: "14B"}
    return Loaded(pipeline, known.get(model, f"{model.layers}x{model.dim}"), gpu)


def dance_joints(count: int) -> Floats:
    """[count, 1, 24, 3] mm: the demo's dance, as long as wanted."""
    return dance(count, FPS, SEED)


def write_media(folder: Path, count: int) -> None:
    """Writes the picture, and `count` frames of somebody else who dances."""
    folder.mkdir()
    copyfile(PICTURE, folder / PICTURE.name)
    drawn = (draw_dancer(one[0], *_DRAWN_SIZE, Look()) for one in dance_joints(count))
    enlarged = (crop_frames(torch.from_numpy(frame)[None], _VIDEO_SIZE) for frame in drawn)
    encode_mp4(enlarged, FPS, folder / _VIDEO)


def fetch(job: Path, network: Internet) -> tuple[Path, Path]:
    """Downloads picture and video of a job into its folder, as the worker does."""
    address = f"http://{_HOST}"
    image = fetch_url(f"{address}/{PICTURE.name}", Wanted("image_url", "picture", job), network)
    video = fetch_url(f"{address}/{_VIDEO}", Wanted("video_url", "video", job), network)
    return image, video


@contextmanager
def served(folder: Path) -> Iterator[Internet]:
    """An Internet in which every host is this folder."""
    with serving(partial(_Files, directory=str(folder))) as port:

        def connect(address: str, asked: int, timeout_s: float) -> socket.socket:
            return socket.create_connection(("127.0.0.1", port), timeout_s)

        yield Internet(lambda host, asked, timeout_s: [_ADDRESS], connect)


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: requests are no news."""
