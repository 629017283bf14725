"""Jobs as they were sent to the endpoints in use, over HTTP to a real worker of the tiny package.

Their addresses are on the Internet, where no test goes, and the worker refuses those of this
machine. So each address is replaced by base64 of a small picture or dance, and each path by one in
the worker's input folder; everything else of the body is sent as it is stored. Workflows are sent
whole: the files that they name lie in the input folder. Motion is captured by stand-in networks.
"""

import base64
import json
import shutil
import socket
import urllib.request
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.media.mp4 import encode_mp4
from engine.media.video import probe_video, read_video
from engine.worker.delivery import clip_limit
from kernels.arch import SM89
from tests.jobs.test_parse import stored
from tests.support.built import tiny_package
from tests.support.clips import run_ffmpeg, tone
from tests.support.standin_models import save_detectors, save_nlf
from tests.worker.test_process import Process

pytestmark = pytest.mark.golden

DANCE_FRAMES, DANCE_FPS = 48, 24
CAPS = {"MAX_PIXELS": "96x160", "MAX_FRAMES": "17"}
CAPPED = {(416, 672): (96, 128), (1280, 736): (160, 64)}  # at most 15360 pixels, sides by 32
ADDRESSES = ("image_url", "images", "video_url", "videos")
WITHOUT_PICTURE = "XiCON-Dance-SCAIL-Serverless__tests__4392464.req.json"
WORKFLOW = "Dance-SCAIL-BPlan__SCAIL_api__c72a07f.api.json"
PATIENCE_S = 1500


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """An input folder with a picture, and a dance with sound."""
    folder = tmp_path_factory.mktemp("input")
    picture = Image.new("RGB", (104, 168), (40, 60, 90))  # of the shape of 416x672
    picture.paste((250, 230, 220), (36, 16, 68, 156))
    picture.save(folder / "person.jpg")
    frames = torch.full((DANCE_FRAMES, 192, 128, 3), 30, dtype=torch.uint8)
    for number in range(DANCE_FRAMES):
        frames[number, 16:176, 40 + number // 3 : 80 + number // 3] = 230
    sound = tone(folder / "tone.wav", DANCE_FRAMES / DANCE_FPS)
    encode_mp4([frames], DANCE_FPS, folder / "silent.mp4")
    run_ffmpeg("-i", folder / "silent.mp4", "-i", sound, "-c:v", "copy", folder / "dance.mp4")
    return folder


@pytest.fixture(scope="module")
def serve(inputs, tmp_path_factory):
    """Starts workers, and ends them."""
    models = tmp_path_factory.mktemp("models") / "all"
    shutil.copytree(demo_weights(state_dir()).models, models)
    save_detectors(models)
    save_nlf(models)
    started = []

    def start(**more):
        settings = {
            "SCAIL_PACKAGE": str(tiny_package(SM89)),
            "SCAIL_MODELS": str(models),
            "SCAIL_STATE": str(state_dir()),
            "SCAIL_INPUTS": str(inputs),
            "SCAIL_ALLOW_CPU": "1",
            "DEFAULT_VIDEO": str(inputs / "dance.mp4"),
        }
        started.append(Process(tmp_path_factory.mktemp("worker"), **settings | more))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def full(serve):
    return serve().wait_until_ready()


@pytest.fixture(scope="module")
def capped(serve):
    return serve(**CAPS).wait_until_ready()


def packed(path):
    return base64.b64encode(path.read_bytes()).decode()


def here(given, inputs):
    """The input of a stored job, with media that this machine has."""
    made = {name: value for name, value in given.items() if name not in ADDRESSES}
    if "image_url" in given or "images" in given:
        made["image_base64"] = packed(inputs / "person.jpg")
    if "video_url" in given or "videos" in given:
        made["video_base64"] = packed(inputs / "dance.mp4")
    if "image_path" in given:
        made["image_path"] = "person.jpg"
    return made


def asked(body):
    """Size, rate, steps and seed of a body that says them, or of the endpoints in use."""
    given = body["input"]
    size = given.get("width", 416), given.get("height", 672)
    return size, given.get("fps", 24), given.get("steps", 6), given.get("seed", 779298828917358)


def frames_at(fps):
    """Returns how many frames the dance has at this rate: whole latents, 4k + 1."""
    return (int(DANCE_FRAMES / DANCE_FPS * fps) - 1) // 4 * 4 + 1


def send(worker, given):
    """Returns the answer to a job that may take its time."""
    url, data = f"http://127.0.0.1:{worker.port}/runsync", json.dumps({"input": given}).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.loads(answer.read())


def output(worker, given):
    answer = send(worker, given)
    assert answer["status"] == "COMPLETED", answer
    return answer["output"]


def heard(path):
    """Seconds of sound that is not silence."""
    samples = path.with_suffix(".raw")
    run_ffmpeg("-i", path, "-vn", "-ac", 1, "-ar", 8000, "-f", "s16le", samples)
    loud = np.flatnonzero(np.abs(np.fromfile(samples, np.int16)) > 500)
    samples.unlink()
    return (loud[-1] - loud[0] + 1) / 8000 if loud.size else 0.0


def checked(reply, path):
    """Describes an MP4, after a look at what must be true of every one."""
    data = base64.b64decode(reply["video"], validate=True)
    assert len(data) <= clip_limit("test-1")
    path.write_bytes(data)
    info = probe_video(path)
    decoded = torch.cat(list(read_video(info)))
    size = reply["width"], reply["height"]
    assert tuple(decoded.shape) == (reply["num_frames"], size[1], size[0], 3)
    assert decoded.float().std() > 1
    assert info.rate == Fraction(reply["fps"])
    assert reply["duration_s"] == round(reply["num_frames"] / reply["fps"], 3)
    if info.has_audio:
        assert abs(heard(path) - reply["duration_s"]) < 0.1
    path.unlink()
    return (info.width, info.height), info.frames, info.fps, info.has_audio


def jobs(golden):
    """Yields name and body of all stored jobs that name a picture."""
    for name, bodies in stored(golden):
        if name != WITHOUT_PICTURE:
            for body in bodies:
                yield name, body


def test_every_stored_job_is_valid_at_its_full_size(full, golden, inputs):
    seen = 0
    for name, body in jobs(golden):
        told = output(full, here(body["input"], inputs) | {"action": "validate"})
        size, fps, steps, seed = asked(body)
        assert (told["valid"], told["width"], told["height"]) == (True, *size), name
        assert (told["fps"], told["num_frames"]) == (fps, frames_at(fps)), name
        assert (told["settings"]["steps"], told["forwards"]) == (steps, steps), name
        assert (told["settings"]["seed"], told["settings"]["kind"]) == (seed, "video"), name
        assert told["settings"]["prompt"] == body["input"]["prompt"], name
        seen += 1
    assert seen == 11


def test_every_stored_job_is_rendered_under_the_caps(capped, golden, inputs, tmp_path):
    clips = {}
    for name, body in jobs(golden):
        reply = output(capped, here(body["input"], inputs))
        size, fps, _, seed = asked(body)
        clip = checked(reply, tmp_path / "clip.mp4")
        assert clip == (CAPPED[size], 17, fps, True), name
        assert reply["seed"] == seed, name
        assert any("at most 17 frames" in said for said in reply["warnings"]), name
        clips.setdefault(json.dumps(body["input"]), set()).add(reply["video"])
    assert len(clips) == 9
    assert {len(same) for same in clips.values()} == {1}  # sent twice, rendered the same
    assert capped.left() == []


def test_the_stored_job_without_a_picture_is_refused_and_the_next_one_served(capped, golden):
    (body,) = dict(stored(golden))[WITHOUT_PICTURE]
    answer = send(capped, body["input"])
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("No picture is given; send image_url")
    assert output(capped, {"action": "health"})["status"] == "ready"


def test_a_stored_job_with_an_address_of_this_machine_is_refused_and_nobody_dialled(capped, golden):
    body = next(body for _, body in jobs(golden) if "image_url" in body["input"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"https://127.0.0.1:{listener.getsockname()[1]}/person.jpg"
        answer = send(capped, body["input"] | {"image_url": address})
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("image_url"), answer


def media_of(workflow, inputs):
    """Puts the files that a workflow names into the input folder."""
    names = workflow["106"]["inputs"]["image"], workflow["130"]["inputs"]["video"]
    for name, file in zip(names, ("person.jpg", "dance.mp4"), strict=True):
        shutil.copy(inputs / file, inputs / name)


def test_a_stored_workflow_is_valid_at_its_full_size_and_rendered_under_the_caps(
    full, capped, golden, inputs, tmp_path
):
    workflow = json.loads((golden / "workflows" / WORKFLOW).read_text("utf-8"))
    media_of(workflow, inputs)
    told = output(full, {"workflow": workflow, "action": "validate"})
    assert (told["width"], told["height"], told["num_frames"]) == (416, 672, frames_at(24))
    assert (told["fps"], told["forwards"], told["settings"]["seed"]) == (24, 6, 779298828917358)
    assert told["settings"]["prompt"] == workflow["368"]["inputs"]["positive_prompt"]
    reply = output(capped, {"workflow": workflow})
    # The box is 96x128, and these workflows fit the picture into it: 79x128, by 32.
    assert checked(reply, tmp_path / "clip.mp4") == ((64, 128), 17, 24, True)
    assert any("Weights are those of this endpoint" in said for said in reply["warnings"])
    again = output(capped, {"workflow": json.dumps(workflow)})
    assert again["video"] == reply["video"]
