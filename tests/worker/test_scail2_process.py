"""`python handler.py` with a package of SCAIL-2, asked over HTTP: both modes, masks in any form."""

import base64
import os

import pytest

from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.media.video import probe_video
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.scail2 import FRAMES, body, labels, npz
from tests.worker.test_process import Process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "mask.npz").write_bytes(base64.b64decode(npz(labels())))
    return folder


@pytest.fixture(scope="module")
def worker(tmp_path_factory, inputs):
    started = Process(
        tmp_path_factory.mktemp("scail2"),
        SCAIL_PACKAGE=str(tiny_package(SM89, kind="scail2")),
        SCAIL_MODELS=str(demo_weights(state_dir()).models),
        SCAIL_STATE=os.environ["SCAIL_STATE"],
        SCAIL_INPUTS=str(inputs),
        SCAIL_ALLOW_CPU="1",
    )
    yield started.wait_until_ready()
    started.kill()


@pytest.mark.parametrize("mode", ["animation", "replacement"])
@pytest.mark.parametrize("mask", [{}, {"mask_base64": None, "mask_path": "mask.npz"}])
def test_both_modes_are_answered_over_http(worker, tmp_path, mode, mask):
    told = worker.output(**body(mode=mode, **mask)["input"])
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(told["video"], validate=True))
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (FRAMES, 96, 64, 16)
    assert (told["num_frames"], told["fps"]) == (FRAMES, 16.0)
    assert worker.left() == []


def test_health_and_log_say_the_model_and_refusals_are_sentences(worker):
    told = worker.output(action="health")
    assert (told["model"], told["modes"]) == ("SCAIL-2", ["animation", "replacement"])
    assert "SCAIL-2 is served: animation and replacement" in worker.said()
    answer = worker.ask(body(references=["https://a.example"] * 7))
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("7 further pictures are given; at most 4 are taken")
    mask = body()["input"]["mask_base64"]
    worker.output(**body()["input"])
    assert mask[:60] not in worker.said()
