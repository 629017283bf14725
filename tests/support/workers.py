"""A worker whose clips are made by hand, and jobs to send it."""

import base64
import io
from contextlib import contextmanager

from PIL import Image

from engine.flow import Clip
from engine.media.mp4 import encode_mp4
from engine.worker.endpoint import Endpoint
from engine.worker.joblog import Redactor
from engine.worker.scratch import Scratch
from engine.worker.service import Renderer, Worker
from tests.support.clips import clip, numbered

FRAMES, FPS, SIZE = 9, 16, (64, 96)


class HandMade:
    """Renders grey frames in some forwards. `outcomes` are raised, one a run, or None."""

    def __init__(self, *outcomes, forwards=3, each=None, plan=None, notes=("a note",), drift=()):
        self.notes, self.drift = notes, drift
        self.outcomes, self.forwards, self.each, self.plan = [*outcomes], forwards, each, plan
        self.requests, self.attentions, self.folders, self.used = [], [], [], "int8fp8"

    def run(self, request, out, watch):
        self.requests.append(request)
        self.attentions.append(self.used)
        self.folders.append(out.parent)
        for done in range(self.forwards):
            if self.each is not None:
                self.each(done)
            watch("denoise", (done + 1) / self.forwards)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        height, width = SIZE
        encode_mp4([numbered(FRAMES, height, width)], FPS, out)
        laps = {"media": 1.25, "denoise": 20.0, "decode": 10.0}
        seed = request.settings.seed
        return Clip(out, width, height, FRAMES, FPS, seed, laps, self.notes, self.drift)

    @contextmanager
    def attending(self, name):
        self.used = name
        yield
        self.used = "int8fp8"

    def load(self, endpoint):
        return Renderer(
            "hand-made", "no GPU", "int8fp8", self.run, self.attending, lambda _: self.plan,
            lambda: None,
        )  # fmt: skip


def endpoint(folder, **changes):
    given = {
        "package": folder / "packages", "models": folder / "models", "state": folder / "state",
        "scratch": folder / "jobs", "inputs": (folder / "input",), "allows_cpu": True,
        "on_runpod": False, "bucket": None, "redact": Redactor(("hunter2hunter2",)),
    }  # fmt: skip
    return Endpoint(**given | changes)


def started(folder, renderer, **changes):
    given = endpoint(folder, **changes)
    worker = Worker(given, Scratch(given.scratch))
    worker.start(renderer.load)
    return worker


def picture():
    file = io.BytesIO()
    Image.radial_gradient("L").resize((96, 64)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def skeleton(folder):
    made = clip(folder / "skeleton.mp4", FRAMES)
    packed = base64.b64encode(made.read_bytes()).decode()
    made.unlink()
    return packed


def job(folder, name="job-1", beside=(), **changes):
    given = {
        "image_base64": picture(),
        "pose_video_base64": skeleton(folder),
        "width": 96,
        "height": 64,
        "fps": FPS,
    }
    return {"id": name, "input": given | changes, **dict(beside)}


def left_in(worker):
    """Lists the folders of jobs that are there, or were left."""
    return [path for path in worker.endpoint.scratch.glob("worker-*/*") if path.is_dir()]
