"""Suite `media`: the work on pictures, videos and skeletons beside the networks, on a CPU.

Rendering, resizing and base64 run on one thread; ffmpeg decodes and encodes with its own. Times
are for one frame.
"""

import base64
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.record import Suite
from benchmarks.timing import RUNS, Row, figures, measure, require, table
from engine.golden import render as golden_render
from engine.jobs.job import Bucket
from engine.machine.heap import keep_freed_memory
from engine.media.framing import crop_frames
from engine.media.mp4 import encode_mp4
from engine.media.picture import load_image
from engine.media.video import probe_video, read_video
from engine.pose.arrays import Floats
from engine.pose.camera import base_camera
from engine.pose.joints import load_joints
from engine.pose.keypoints import Keypoints
from engine.pose.skeleton import draw_skeleton
from engine.worker.upload import upload

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden" / "pose"
DEMO = ROOT / "engine" / "demo"

FRAMES = 16
HEIGHT, WIDTH = 896, 512  # of the clip that is decoded and encoded
MOST_LEVELS = 8.0  # that a decoded clip may be off, which is 30 dB
RESIZE_LEVELS = 2  # Pillow rounds between its two passes
BODY_BYTES, BODY_FRAMES = 10_000_000, 81  # the largest reply, and the clip that it would be
HEAD, WRISTS = 15, (20, 21)  # SMPL joints


# Height, width, and the number of dancers in view
SCENES = ((512, 896, 1), (896, 512, 1), (672, 416, 1), (336, 208, 1), (512, 896, 2))


def measure_media() -> tuple[str, list[Row]]:
    """Says how the renderer was checked, and gives the times. Raises `WrongResult`."""
    if not torch.cuda.is_available():
        keep_freed_memory()  # as the worker does: a third of base64's time is fresh pages
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        return _measure_all()
    finally:  # other suites are measured in this process
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _measure_all() -> tuple[str, list[Row]]:
    checked = check_renderer(GOLDEN)
    rows = [row for scene in SCENES for row in measure_scene(*scene)]
    body = np.random.default_rng(0).bytes(BODY_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        rows += measure_video(Path(folder) / "clip.mp4")
        rows += [measure_resize(), *measure_base64(body), measure_upload(body, Path(folder))]
    return checked, rows


def check_renderer(golden: Path) -> str:
    """Holds the renderer against what the official program drew, where that is at hand."""
    checks = [
        check
        for path in sorted(golden.glob("*.npz"))
        if golden_render.recognises(_names(path), {})
        for check in golden_render.checks(path)
    ]
    failed = [check.check for check in checks if not check.ok]
    require(not failed, f"The renderer fails {len(failed)} golden checks, first {failed[:1]}")
    if checks:
        return f"{len(checks)} golden checks"
    return "two equal runs of each scene; the golden frames are not beside this checkout"


def measure_scene(height: int, width: int, persons: int) -> Iterator[Row]:
    """Draws a frame of the demo's dance without and with the overlay."""
    dance = load_joints(DEMO / "dance.npz").joints[::4][:FRAMES]
    apart = 450 * (2 * np.arange(persons) - persons + 1)  # mm between two dancers
    joints = np.repeat(dance, persons, axis=1)
    joints[..., 0] += apart.astype(np.float32)[:, None]
    points = [_keypoints(frame, height, width) for frame in joints]
    name = f"skeleton {height}x{width}, {persons} in view"
    for suffix, drawn in (("", None), (" + overlay", points)):

        def draw(drawn: list[Keypoints] | None = drawn) -> list[NDArray[np.uint8]]:
            return list(draw_skeleton(joints, height, width, keypoints=drawn))

        frames = draw()
        require(np.array_equal(frames, draw()), f"{name}{suffix}: two runs differ")
        require(all(frame.any() for frame in frames), f"{name}{suffix}: a frame is black")
        yield measure(name + suffix, draw, len(frames))


def measure_video(path: Path) -> Iterator[Row]:
    """Encode and decode a moving picture with a skeleton before it."""
    clip = _clip(3 * FRAMES)

    def encode() -> None:
        encode_mp4([clip], 16.0, path)

    def decode() -> Tensor:
        return torch.cat(list(read_video(probe_video(path))))

    encode()
    found = decode()
    require(found.shape == clip.shape, f"Decoded {list(found.shape)}, encoded {list(clip.shape)}")
    off = float((found.float() - clip.float()).square().mean().sqrt())
    require(off <= MOST_LEVELS, f"The decoded clip is {off:.1f} levels from the encoded one")
    size = f"{HEIGHT}x{WIDTH}"
    yield measure(f"encode {size}", encode, len(clip))
    yield measure(f"decode {size}", decode, len(clip))


def measure_resize() -> Row:
    """Cover and crop frames of 1080p, as they come from a camera."""
    shown = Image.open(DEMO / "dancer.png").convert("RGB").resize((1920, 1080))
    frames = torch.from_numpy(np.array(shown)).expand(4, -1, -1, -1).contiguous()
    name = f"cover and crop 1080x1920 to {HEIGHT}x{WIDTH}"
    wide = int(1920 * HEIGHT / 1080)
    left = (wide - WIDTH) // 2
    covered = np.array(shown.resize((wide, HEIGHT), Image.Resampling.BICUBIC))
    want = torch.from_numpy(covered[:, left : left + WIDTH])
    error = int((crop_frames(frames, (HEIGHT, WIDTH)).int() - want.int()).abs().max())
    require(error <= RESIZE_LEVELS, f"The resized frame is {error} levels from Pillow's")
    return measure(name, lambda: crop_frames(frames, (HEIGHT, WIDTH)), len(frames))


def measure_base64(body: bytes) -> Iterator[Row]:
    """Turns the video of an answer into text, and that of a request back; ms for each frame."""
    text = base64.b64encode(body)
    require(base64.b64decode(text, validate=True) == body, "base64 does not give the body back")
    size = f"{len(body) // 10**6} MB of {BODY_FRAMES} frames"
    yield measure(f"base64 encode {size}", lambda: base64.b64encode(body), BODY_FRAMES)
    yield measure(
        f"base64 decode {size}", lambda: base64.b64decode(text, validate=True), BODY_FRAMES
    )


def measure_upload(body: bytes, folder: Path) -> Row:
    """Puts the same body into a bucket, by what the worker uploads with, over loopback.

    The bucket is a thread of this process: its part is counted. The first upload, which imports
    what signs, is not.
    """
    clip = folder / "body.mp4"
    clip.write_bytes(body)
    arrived: list[bytes] = []
    with serving(partial(_Put, arrived)) as port:
        bucket = Bucket(f"http://127.0.0.1:{port}", "key", "secret", "clips", is_operators=True)
        name = f"upload {len(body) // 10**6} MB of {BODY_FRAMES} frames"
        upload(clip, bucket, "job", _go_on)
        row = measure(name, lambda: upload(clip, bucket, "job", _go_on), BODY_FRAMES)
    require(arrived == [body] * len(arrived), f"{name}: the bucket got others")
    require(len(arrived) == RUNS + 1, f"{name}: {len(arrived)} bodies arrived")
    return row


def _go_on() -> None:
    """A check that lets an upload go on."""


@contextmanager
def serving(answer: Callable[..., BaseHTTPRequestHandler]) -> Iterator[int]:
    """An HTTP server of this process, on a port of its own, while it is open."""
    with ThreadingHTTPServer(("127.0.0.1", 0), answer) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class _Put(BaseHTTPRequestHandler):
    """Takes what is put into a bucket."""

    protocol_version = "HTTP/1.1"

    def __init__(self, arrived: list[bytes], *given: object) -> None:
        self._arrived = arrived
        super().__init__(*given)  # pyright: ignore[reportArgumentType]

    def do_PUT(self) -> None:
        self._arrived.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: what a suite prints is its table."""


def _names(path: Path) -> frozenset[str]:
    with np.load(path, allow_pickle=False) as file:
        return frozenset(file.files)


def _keypoints(joints: Floats, height: int, width: int) -> Keypoints:
    """Faces and hands where heads and wrists [P, 24, 3] are seen, about as large as people's."""
    camera = base_camera(height, width)
    x, y, z = np.moveaxis(joints[:, [HEAD, *WRISTS]], -1, 0)
    seen = np.stack([camera.fx * x / z + camera.cx, camera.fy * y / z + camera.cy], axis=-1)
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * 90 * camera.fx / z[:, :1, None]
    fingers = np.linspace(0, 1, 21)[:, None] * 120 * camera.fx / z[:, 1:, None, None]
    size = np.array([width, height], np.float32)
    body = np.repeat(seen[:, :1], 18, axis=1)
    body[:, 14:18, 0] += np.array([-15, 15, -40, 40]) * camera.fx / z[:, :1]
    return Keypoints(
        (body / size).astype(np.float32),
        np.ones(body.shape[:2], np.bool_),
        ((seen[:, :1] + circle) / size).astype(np.float32),
        ((seen[:, 1:, None] + fingers) / size).astype(np.float32),
    )


def _clip(count: int) -> Tensor:
    """[count, HEIGHT, WIDTH, 3] u8: the demo's picture moving past, the dance before it."""
    dance = load_joints(DEMO / "dance.npz").joints[:count]
    ground = crop_frames(load_image(DEMO / "dancer.png")[None], (HEIGHT, WIDTH))[0]
    frames = [torch.from_numpy(frame) for frame in draw_skeleton(dance, HEIGHT, WIDTH)]
    return torch.stack([
        torch.where(frame > 0, frame, ground.roll(8 * t, dims=1)) for t, frame in enumerate(frames)
    ])  # fmt: skip


SUITE = Suite(measure_media, table, figures)
