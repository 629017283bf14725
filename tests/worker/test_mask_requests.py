"""A worker that serves SCAIL-2: masks shown, placed, cast, returned, and made where none come."""

import asyncio
import base64
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine.flow import Warned
from engine.masks.made import MadeMasks
from handler import respond
from tests.support.core_workflows import core
from tests.support.drawn_joints import larger_trunk
from tests.support.scail2 import (
    FRAMES,
    SIZE,
    Exact,
    body,
    labels,
    mask_video,
    npz,
    square,
    tiny_pipeline,
)
from tests.support.workers import left_in, started


def ask(worker, given):
    return asyncio.run(respond(worker, given, [].append))


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    made = started(tmp_path_factory.mktemp("scail2"), Exact())
    yield made
    made.close()


def test_the_action_masks_shows_who_becomes_whom_and_renders_nothing(worker):
    told = ask(worker, body(action="masks"))
    assert "video" not in told
    for still in told["stills"]:
        picture = Image.open(io.BytesIO(base64.b64decode(still)))
        assert (picture.format, picture.width) == ("JPEG", 2 * SIZE[1])
    assert len(told["stills"]) == 3
    assert (told["width"], told["height"], told["num_frames"]) == (96, 64, FRAMES)
    (standing,) = told["framing"]
    assert (standing["person"], standing["height"], standing["foot_line"]) == ("blue", 32, 48)
    assert {one["kind"] for one in told["warned"]} <= {"small"}
    assert left_in(worker) == []
    json.dumps(told)


def test_stills_of_noise_fit_the_reply_with_the_masks_beside_them(worker, monkeypatch):
    """The platform drops a reply that is too large, and calls the job a success."""
    usual = ask(worker, body(action="masks", return_masks=True))
    stills, masks = (
        sum(len(base64.b64decode(one)) for one in found)
        for found in (usual["stills"], [usual["masks"]])
    )
    most = stills * 2 // 3 + masks
    monkeypatch.setattr("engine.worker.masks.clip_limit", lambda name: most)
    told = ask(worker, body(action="masks", return_masks=True))
    assert (told["masks"], len(told["stills"])) == (usual["masks"], 3)
    assert sum(len(base64.b64decode(one)) for one in told["stills"]) <= most - masks < stills


def test_validate_tells_scale_foot_line_and_what_is_cropped(worker):
    tall = np.zeros((FRAMES, *SIZE), np.uint8)
    tall[:, 8:60, 30:60] = 1
    (standing,) = ask(worker, body(action="validate", mask_base64=npz(tall)))["framing"]
    assert standing["scale"] == pytest.approx(52 / 32, abs=1e-3)
    assert (standing["foot_line"], standing["motion_foot_line"]) == (60, 60)
    assert standing["cropped"] == 0
    as_is = ask(worker, body(action="validate", mask_base64=npz(tall), framing="as-is"))
    assert as_is["framing"][0]["scale"] == 1
    assert any("--framing auto places it" in one for one in as_is["warnings"])


def test_framing_reaches_the_model(worker):
    tall = npz(np.pad(labels()[:, 20:40], ((0, 0), (10, 34), (0, 0))))
    clips = {
        framing: ask(worker, body(mask_base64=tall, framing=framing))["video"]
        for framing in ("auto", "as-is")
    }
    assert clips["auto"] != clips["as-is"]
    moved = [
        ask(worker, body(mask_base64=tall, framing=framing, mode="animation"))["video"]
        for framing in (None, "auto", "driving")
    ]
    assert moved[0] == moved[1] != moved[2]
    reply = ask(worker, body(framing="driving"))
    assert "shown in replacement" in reply["error"]


def test_masks_are_returned_for_reuse_and_say_the_same(worker):
    first = ask(worker, body(return_masks=True, mask_base64=mask_video()))
    again = ask(worker, body(mask_base64=first["masks"], reference_mask_base64=None))
    assert again["video"] == first["video"]
    shown = ask(worker, body(action="masks", return_masks="yes"))
    held = np.load(io.BytesIO(base64.b64decode(shown["masks"])))
    assert np.array_equal(held["masks"], labels())
    assert np.array_equal(held["reference"][0], (square()[..., 2] > 0).astype(np.uint8))
    planned = ask(worker, body(action="validate", return_masks=True))
    assert any("validate returns none" in one for one in planned["warnings"])
    without = ask(worker, body(return_masks=True, mode=None, mask_base64=None))
    assert "masks" not in without
    assert any("there are no masks of this job" in one for one in without["warnings"])


def test_who_mends_masks_in_another_order(worker):
    held = labels()
    held[:, :8, :16] = 1
    held[:, 16:48][labels()[:, 16:48] == 1] = 2
    for who in ("2,1", [2, 1], ["red", "blue"]):
        told = ask(worker, body(mask_base64=npz(held), who=who, action="validate"))
        assert told["framing"][0]["person"] == "blue"
        assert told["framing"][0]["foot_line"] == 48
    red = body(mask_base64=npz(labels(person=2)), who="red", action="validate")
    assert ask(worker, red)["framing"][0]["person"] == "blue"
    refused = {
        "3": "who names person 3; mask_base64.npz shows 1 (blue).", "7": "persons by number",
        "1,1": "names a person twice",
    }  # fmt: skip
    for who, sentence in refused.items():
        assert sentence in ask(worker, body(who=who))["error"], who


def test_strict_makes_a_warning_an_error(worker):
    reply = ask(worker, body(mode="animation", mask_base64=None, strict=True))
    assert reply["code"] == "bad_media"
    assert reply["error"].startswith("Strict: a warning is an error here. The motion has no mask")
    assert "warnings" in ask(worker, body(mode="animation", mask_base64=None))


def test_without_masks_and_without_a_segmenter_it_is_said_what_to_put_where(worker):
    reply = ask(worker, body(action="masks", mode=None, mask_base64=None))
    assert "send mask_url, mask_path or mask_base64, or put SAM 2.1" in reply["error"]
    assert "into the folder sam2" in reply["error"]


class Looking(Exact):
    """A worker whose detector sees joints."""

    def load(self, endpoint):
        return dataclasses.replace(super().load(endpoint), look=larger_trunk)


def test_where_legs_are_cut_joints_tell_the_size_in_validate_and_masks(worker, tmp_path):
    cut = np.zeros((FRAMES, *SIZE), np.uint8)
    cut[:, 16:, 8:40] = 1
    looking = started(tmp_path, Looking())
    try:
        for action in ("validate", "masks"):
            wanted = body(action=action, mask_base64=npz(cut))
            told, blind = ask(looking, wanted), ask(worker, wanted)
            (standing,) = told["framing"]
            assert standing["scale"] == pytest.approx(1.5, rel=1e-4)
            assert standing["top"] == pytest.approx(24 - 1.5 * 22, abs=1e-3)  # necks meet
            assert not any("nothing tells how large" in one for one in told["warnings"])
            assert any("No face is seen" in one for one in told["warnings"])
            assert blind["framing"][0]["scale"] == 1
            assert any("nothing tells how large" in one for one in blind["warnings"])
    finally:
        looking.close()


def test_a_clip_is_framed_by_joints_too(worker, monkeypatch):
    cut = np.zeros((FRAMES, *SIZE), np.uint8)
    cut[:, 16:, 8:40] = 1
    monkeypatch.setattr(tiny_pipeline(), "look", larger_trunk)
    told = ask(worker, body(mask_base64=npz(cut)))
    assert "video" in told
    assert any("No face is seen" in one for one in told["warnings"])


@dataclasses.dataclass
class Making(Exact):
    """A worker whose segmenter knows the dance."""

    def load(self, endpoint):
        plain = super().load(endpoint)
        served = dataclasses.replace(plain.served, makes_masks=True)
        return dataclasses.replace(plain, served=served, segment=self.segment)

    def segment(self, wanted, check):
        check()
        self.wanted = wanted
        held = torch.from_numpy(labels(wanted.count))
        reference = torch.from_numpy((square()[..., 2] > 0).astype(np.uint8))
        boxes = torch.tensor([8.0, 16, 40, 48]).expand(wanted.count, 1, 4)
        scores = torch.ones(wanted.count, 1)
        warned = (Warned("swap", "The segmenter is not sure.", 3),)
        return MadeMasks(held, reference, boxes, scores, wanted.fps, "", (1,), "drawn", "", warned)


def test_a_worker_with_a_segmenter_makes_the_masks_that_are_not_sent(tmp_path):
    maker = Making()
    worker = started(tmp_path, maker)
    try:
        sent = ask(worker, body())
        made = ask(worker, body(mask_base64=None, reference_mask_base64=None, return_masks=True))
        assert made["video"] == sent["video"]
        held = np.load(io.BytesIO(base64.b64decode(made["masks"])))
        assert np.array_equal(held["masks"], labels())
        assert str(held["model"]) == "drawn"  # as they were made, with all that is known of them
        assert "The segmenter is not sure." in made["warnings"]
        assert (maker.wanted.persons, maker.wanted.mode) == (None, "replacement")
        shown = ask(worker, body(action="masks", mode=None, mask_base64=None, persons=1, who="1"))
        assert len(shown["stills"]) == 3
        assert (maker.wanted.persons, maker.wanted.who) == (1, (1,))
        graph = core(n42_max_objects=1)  # of whose nodes a tracker follows one person
        given = {"mode": None, "mask_base64": None, "steps": None, "workflow": graph}
        assert "stills" in ask(worker, body(action="masks", **given))
        assert (maker.wanted.persons, maker.wanted.mode) == (1, "animation")
        told = ask(worker, body(mode=None, mask_base64=None))  # animation is not asked for masks
        assert any("The motion has no mask" in one for one in told["warnings"])
        assert left_in(worker) == []
    finally:
        worker.close()
