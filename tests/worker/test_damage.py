"""No input of a client, however damaged, costs a warm worker: bodies and media by chance."""

import asyncio
import base64
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from benchmarks.nano.dance import dance
from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.pose.joints import JointClip, save_joints
from engine.worker.renderer import load_renderer
from engine.worker.scratch import Scratch
from engine.worker.service import Worker
from handler import respond
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.clips import clip
from tests.support.workers import FPS, FRAMES, endpoint, left_in

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
STRANGE = (
    None, True, "", " ", [], {}, [[]], {"a": {}}, -1, 0, 10**400, 1e308, float("nan"), "\0",
    "\ud800", "x" * 5000, "-0", "1e999", "None", ["a"] * 100, {"": None}, "http://[", "{", "[1]",
    "/etc/passwd",
)  # fmt: skip

FIELDS = (
    "prompt", "seed", "workflow", "images", "persons", "align", "attention_mode", "max_seconds",
    "output", "image_url", "recipe", "frame_load_cap", "cfg", "shift", "context_frames",
    "video_path",
)  # fmt: skip


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worker")
    models = demo_weights(state_dir()).models
    given = endpoint(folder, package=tiny_package(SM89), models=models, state=state_dir())
    made = Worker(given, Scratch(given.scratch))
    made.start(load_renderer)
    yield made
    made.close()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Whole media by the field that they are sent in."""
    folder = tmp_path_factory.mktemp("media")
    pictures = []
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind in KINDS:
        file = io.BytesIO()
        Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(file, kind, exif=exif)
        pictures.append(file.getvalue())
    save_joints(folder / "dance.npz", JointClip(dance(9, 16.0, seed=1), 16.0, (896, 512)))
    video = clip(folder / "skeleton.mp4", FRAMES).read_bytes()
    return {
        "image_base64": pictures,
        "pose_video_base64": [video],
        "joints_base64": [(folder / "dance.npz").read_bytes()],
    }


def damaged(data, draw):
    """Changes bytes, cuts, doubles or empties a stretch; one time in eight it changes nothing."""
    way, data = draw.randrange(8), bytearray(data)
    start = draw.randrange(len(data))
    length = draw.randrange(1, max(2, min(64, len(data) - start)))
    if way < 3:
        for _ in range(draw.randrange(1, 9)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif way == 3:
        del data[start:]
    elif way == 4:
        data[start : start + length] = data[start : start + length] * 2
    elif way == 5:
        del data[start : start + length]
    elif way == 6:
        data[start : start + length] = bytes([draw.choice((0, 255))]) * length
    return bytes(data)


def body(media, draw):
    """Draws a job of damaged media, with strange values here and there."""
    motion = draw.choice(("pose_video_base64", "joints_base64", "joints_base64"))
    given = {"width": 96, "height": 64, "fps": FPS, "steps": 1, "action": "validate"}
    for field in ("image_base64", motion):
        data = draw.choice(media[field])
        data = damaged(data, draw) if draw.randrange(4) else data
        given[field] = base64.b64encode(data).decode()
    if draw.randrange(8) == 0:
        del given["action"]
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        given[draw.choice((*given, *FIELDS))] = draw.choice(STRANGE)
    whole = {"id": draw.choice(("a", "sync-b", STRANGE[13], None, 7, "../x")), "input": given}
    way = draw.randrange(12)
    if way == 0:
        whole["input"] = draw.choice(STRANGE)
    elif way == 1:
        whole["input"] = json.dumps(given)[: draw.randrange(400)]
    elif way == 2:
        whole["s3Config"] = {
            key: draw.choice((*STRANGE, "https://10.0.0.1", "arn:aws:s3:::x"))
            for key in ("endpointUrl", "accessId", "accessSecret", "bucketName")
        }
    return whole


def check(worker, media, seeds):
    for seed in seeds:
        given = body(media, random.Random(seed))
        reply = asyncio.run(respond(worker, given, [].append))
        assert "refresh_worker" not in reply, (seed, reply)
        assert reply.get("code") != "internal", (seed, reply)
        assert len(json.dumps(reply)) < 150_000, seed
        assert left_in(worker) == [], seed
    assert worker.health()["status"] == "ready"


def test_a_sample_of_damage_costs_no_worker(worker, media):
    check(worker, media, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_much_damage_costs_no_worker(worker, media, part):
    check(worker, media, range(1000 + 100 * part, 1100 + 100 * part))


@pytest.mark.parametrize(
    "arrays",
    [
        {"joints": np.zeros((9, 0, 24, 3))}, {"joints": np.full((9, 1, 24, 3), np.nan)},
        {"joints": np.array([object()])}, {"joints": np.zeros((2**16, 1, 1, 1), bool)}, {},
        {"joints": np.zeros(0), "fps": np.zeros(0)},
        {"joints": np.zeros((9, 1, 24, 3)), "fps": "x"},
    ],
    ids=["nobody", "no numbers", "objects", "truths", "nothing", "empty", "a rate in words"],
)  # fmt: skip
def test_joints_that_are_none_cost_no_worker(worker, media, arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    given = {
        "image_base64": base64.b64encode(media["image_base64"][0]).decode(),
        "joints_base64": base64.b64encode(file.getvalue()).decode(),
    }
    reply = asyncio.run(respond(worker, {"input": given}, [].append))
    assert (reply.get("code"), "refresh_worker" in reply) == ("bad_media", False)
