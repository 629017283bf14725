"""What the page shows before anything is denoised: pixels, and the route that gives them."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.flow import RoleFrames, Source
from engine.server.overlay import draw
from tests.support.services import Serving, model
from tests.support.workers import HandMade, job


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def source(frames=9, half=False):
    """A white picture of 4x6, and a red dot that moves over its second row."""
    skeleton = torch.zeros(frames, 4, 6, 3, dtype=torch.uint8)
    for number in range(frames):
        skeleton[number, 1, number % 6, 0] = 250
    return Source(torch.ones(3, 4, 6), skeleton[:, ::2, ::2] if half else skeleton, 16.0, None)


def test_a_skeleton_stands_over_the_darkened_picture_in_four_frames():
    drawn = pixels(draw(source()))
    assert drawn.shape == (4, 4 * 6, 3)
    dark = int(255 * 0.45)
    for place, number in enumerate((0, 3, 5, 8)):  # 2.7 and 5.3 are rounded
        frame = drawn[:, 6 * place : 6 * (place + 1)]
        assert frame[1, number % 6].tolist() == [250, 0, 0]
        assert (frame[0] == dark).all()


def test_a_skeleton_of_half_the_size_is_brought_to_that_of_the_picture():
    given = source(1, half=True)
    given.skeleton[0, 1, 2] = 200
    drawn = pixels(draw(given))
    assert drawn.shape == (4, 6, 3)
    assert (drawn[2:, 4:] == 200).all()
    assert (drawn[:2] == int(255 * 0.45)).all()


def test_masks_colour_the_picture_and_the_dance():
    frames = torch.full((2, 4, 6, 3), 100, dtype=torch.uint8)
    driving = torch.zeros_like(frames)
    driving[:, 0, :, 2] = 255
    reference = torch.full((3, 4, 6), -1.0)
    reference[0, 3] = 1.0
    roles = RoleFrames("animation", reference, driving)
    given = replace(source(), skeleton=frames, roles=roles)
    drawn = pixels(draw(given))
    assert drawn.shape == (4, 3 * 6, 3)
    assert drawn[3, 0].tolist() == [255, 127, 127]
    assert drawn[0, 0].tolist() == [255, 255, 255]
    assert drawn[0, 6].tolist() == [50, 50, 177]
    assert drawn[1, 6].tolist() == [100, 100, 100]


def test_large_frames_are_shrunk_by_a_whole_number():
    tall = Source(
        torch.zeros(3, 1280, 704), torch.zeros(1, 1280, 704, 3, dtype=torch.uint8), 16.0, None
    )
    assert pixels(draw(tall)).shape == (427, 235, 3)


@pytest.fixture
def service(tmp_path):
    started = Serving(tmp_path, model(HandMade()))
    yield started
    started.stop()


def test_the_route_answers_with_a_picture_and_renders_nothing(service, tmp_path):
    given = job(tmp_path)["input"]
    status, told = service.ask("POST", "/overlay", {"input": given}, browser="0" * 32)
    assert (status, told["status"], told["action"]) == (200, "COMPLETED", "overlay")
    assert (told["output"]["frames"], told["output"]["warnings"]) == (9, [])
    status, headers, png = service.send("GET", told["output"]["picture_url"])
    assert (status, headers["content-type"]) == (200, "image/png")
    assert pixels(png).shape == (64, 4 * 96, 3)
    assert service.ask("GET", "/jobs", browser="0" * 32)[1] == {"jobs": []}
    assert "overlay" in service.ask("GET", "/info")[1]["features"]


def test_a_look_at_bad_media_fails_as_the_clip_would(service, tmp_path):
    given = job(tmp_path, image_base64="AAAA")["input"]
    _, told = service.ask("POST", "/overlay", {"input": given})
    assert (told["status"], told["output"]) == ("FAILED", {"code": "bad_media"})
