"""A worker that serves SCAIL-2: both modes from request to clip, and what others send it."""

import asyncio
import base64
import json

import numpy as np
import pytest

from engine.media.video import probe_video
from handler import respond
from tests.support.scail2 import (
    FRAMES,
    RED,
    SIZE,
    WHITE,
    Exact,
    body,
    dance,
    labels,
    mask_video,
    noise,
    npz,
    png,
    square,
)
from tests.support.workers import left_in, started


def ask(worker, given):
    return asyncio.run(respond(worker, given, [].append))


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    made = started(tmp_path_factory.mktemp("scail2"), Exact())
    yield made
    made.close()


def test_health_says_which_model_and_which_modes(worker, tmp_path):
    told = ask(worker, {"input": {"action": "health"}})
    assert (told["status"], told["model"]) == ("ready", "SCAIL-2")
    assert told["modes"] == ["animation", "replacement"]


@pytest.mark.parametrize("mode", ["animation", "replacement"])
@pytest.mark.parametrize("mask", [npz(labels()), mask_video(FRAMES)], ids=["npz", "video"])
def test_both_modes_come_out_at_the_rate_and_length_of_the_video(worker, tmp_path, mode, mask):
    reply = ask(worker, body(mode=mode, mask_base64=mask))
    assert "error" not in reply, reply
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(reply["video"]))
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (FRAMES, 16, 96, 64)
    assert left_in(worker) == []


def test_all_media_reach_the_model(worker):
    """Another picture, mask or further picture is another clip."""
    changes = [
        {}, {"mask_base64": npz(labels(person=2))}, {"reference_mask_base64": png(square(left=8))},
        {"references": [{"base64": png(noise()[::-1])}]},
        {"references": [{"base64": png(noise()[::-1]), "mask_base64": png(square())}]},
        {"mode": "animation"},
    ]  # fmt: skip
    clips = [ask(worker, body(**change))["video"] for change in changes]
    assert len(set(clips)) == len(clips)


def test_validate_tells_segments_and_forwards(worker):
    told = ask(worker, body(action="validate", steps=3, cfg=2.0))
    found = {key: told[key] for key in ("valid", "width", "height", "num_frames", "fps")}
    assert found == {"valid": True, "width": 96, "height": 64, "num_frames": 9, "fps": 16.0}
    assert (told["segments"], told["forwards"], told["memory"]) == (1, 6, None)
    assert (told["settings"]["mode"], told["settings"]["segments"]) == ("replacement", "even")
    json.dumps(told)


def test_files_of_an_input_folder_may_be_masks_and_pictures(worker):
    folder = worker.endpoint.inputs[0]
    folder.mkdir(exist_ok=True)
    given = body(references=[{"path": "ref.png", "mask_path": "m.png"}])
    (folder / "mask.npz").write_bytes(base64.b64decode(given["input"].pop("mask_base64")))
    (folder / "ref.png").write_bytes(base64.b64decode(png(noise())))
    (folder / "m.png").write_bytes(base64.b64decode(png(square())))
    given["input"]["mask_path"] = "mask.npz"
    assert "video" in ask(worker, given)


def test_animation_needs_no_masks_and_says_what_it_took_for_granted(worker):
    reply = ask(worker, body(mode=None, mask_base64=None, reference_mask_base64=None))
    assert "video" in reply
    assert any("The motion has no mask" in said for said in reply["warnings"])


def grey(value):
    return np.full((*SIZE, 3), value, np.uint8)


PHOTO = "".join(base64.b64encode(np.random.default_rng(1).bytes(3000)).decode())
HOSTILE = {
    # of other sizes, lengths, depths and colours
    "a mask of another shape": {"mask_base64": npz(labels(size=(64, 64)))},
    "a mask upright": {"mask_base64": npz(labels(size=(96, 64)))},
    "a mask that is too short": {"mask_base64": npz(labels(frames=4))},
    "a mask that is too long": {"mask_base64": npz(labels(frames=40))},
    "a mask of one picture": {"mask_base64": png(square())},
    "a mask video of another length": {"mask_base64": mask_video(frames=4)},
    "a mask video of another shape": {"mask_base64": mask_video(size=(64, 64))},
    "labels of floats": {"mask_base64": npz(labels().astype(np.float32))},
    "labels of 64 bits": {"mask_base64": npz(labels().astype(np.int64) * 1000)},
    "labels of persons that are not there": {"mask_base64": npz(labels(person=9))},
    "labels of five dimensions": {"mask_base64": npz(labels()[None, None])},
    "eight persons": {"mask_base64": npz(np.zeros((FRAMES, 8, *SIZE), bool))},
    "labels of no size": {"mask_base64": npz(np.zeros((FRAMES, 0, 0), np.uint8))},
    "an npz of something else": {"mask_base64": npz(labels(), "joints")},
    "a mask of objects": {"mask_base64": npz(np.array(["a"] * FRAMES))},
    "a mask without a person": {"mask_base64": npz(labels() * 0)},
    "a mask of photographs": {"reference_mask_base64": png(noise())},
    "a mask of nobody in the picture": {"reference_mask_base64": png(grey(0))},
    "a reference mask of another shape": {"reference_mask_base64": png(square((96, 96)))},
    "a reference mask that is a video": {"reference_mask_base64": mask_video()},
    "a mask of grey": {"reference_mask_base64": png(grey(90))},
    "a mask that is no file": {"mask_base64": "AAAA"},
    "a mask that is cut": {"mask_base64": npz(labels())[:200]},
    "a mask of noise": {"mask_base64": PHOTO},
    "a mask that is empty": {"mask_base64": "data:image/png;base64,"},
    "no mask in replacement": {"mask_base64": None},
    # further pictures
    "seven further pictures": {"references": [{"base64": png(square())}] * 7},
    "a further picture that is a video": {"references": [{"base64": dance()}]},
    "a further picture that is an npz": {"references": [{"base64": npz(labels())}]},
    "a further picture that is nothing": {"references": [{"base64": "AAAA"}]},
    "a further picture of one pixel": {"references": [{"base64": png(grey(1)[:1, :1])}]},
    "a further mask of another shape": {
        "references": [{"base64": png(noise()), "mask_base64": png(square((96, 96)))}]
    },
    "a further mask that is a video": {
        "references": [{"base64": png(noise()), "mask_base64": mask_video()}]
    },
    "a further picture of this machine": {"references": [{"url": "http://127.0.0.1/a.png"}]},
    "a further picture of the disk": {"reference_path": ["/etc/passwd"]},
    "a mask of the disk": {"mask_base64": None, "mask_path": "/etc/passwd"},
    "a mask by a file address": {"mask_base64": None, "mask_url": "file:///etc/passwd"},
    # fields of other types, and of another motion
    "a mode of numbers": {"mode": 7},
    "a mask in a list": {"mask_base64": [npz(labels())]},
    "nested junk": {"references": [{"url": {"url": [{"url": None}]}}]},
    "null in a list": {"references": [None]},
    "segments of numbers": {"segments": 81},
    "replacement of a skeleton": {"video_base64": None, "pose_video_base64": dance()},
    "seven persons": {"persons": 7},
    "a recipe of the other model and junk": {"recipe": "turbo ", "segments": "turbo"},
    "the camera of the other model": {"align": "official"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_ends_in_a_sentence_and_leaves_nothing(worker, case):
    reply = ask(worker, body(**HOSTILE[case]))
    assert {*reply} == {"error", "code"}, (case, reply.keys(), reply.get("warnings"))
    assert reply["code"] in ("bad_request", "bad_media")
    said = reply["error"]
    assert said.endswith(".")
    assert said.isprintable()
    assert len(said) < 600
    assert "/etc" not in said
    assert "Traceback" not in said
    assert left_in(worker) == []


def test_the_worker_is_as_good_as_new_after_all_that(worker):
    assert "video" in ask(worker, body())
    assert ask(worker, {"input": {"action": "health"}})["status"] == "ready"


def test_a_mask_that_is_white_on_black_is_a_matte(worker):
    reply = ask(worker, body(reference_mask_base64=png(square(colour=WHITE))))
    assert "video" in reply
    red = ask(worker, body(reference_mask_base64=png(square(colour=RED))))
    assert any("which the video" in said or "which no" in said for said in red["warnings"])
