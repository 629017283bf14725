"""The renderer of a tiny package: exact attention while it is asked for, and joints."""

import asyncio
import base64
import shutil

import pytest

from benchmarks.nano.dance import dance
from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.errors import Unavailable
from engine.models.attention import available, find_attention
from engine.pose.joints import JointClip, save_joints
from engine.worker.renderer import load_renderer
from engine.worker.scratch import Scratch
from engine.worker.service import Worker
from handler import respond
from kernels.arch import SM86, SM89
from tests.support.built import tiny_package
from tests.support.workers import endpoint, job, picture


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    yield from serving(SM89, tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def ampere(tmp_path_factory):
    yield from serving(SM86, tmp_path_factory.mktemp("ampere"))


def serving(arch, folder):
    models = demo_weights(state_dir()).models
    given = endpoint(folder, package=tiny_package(arch), models=models, state=state_dir())
    made = Worker(given, Scratch(given.scratch))
    made.start(load_renderer)
    yield made
    made.close()


def ask(worker, given):
    return asyncio.run(respond(worker, given, [].append))


def test_exact_attention_makes_another_clip_and_only_that_one(worker, tmp_path):
    given = job(tmp_path, steps=2, seed=3)
    usual, exact, again = (
        ask(worker, {"input": given["input"] | more})
        for more in ({}, {"attention_mode": "sdpa"}, {})
    )
    assert usual["video"] == again["video"]
    assert usual["video"] != exact["video"]
    assert exact["warnings"] == []


def test_attention_that_is_not_here_is_refused_before_rendering(worker, tmp_path):
    reply = ask(worker, job(tmp_path, action="validate", attention_mode="xformers"))
    assert reply["code"] == "unavailable"


@pytest.mark.parametrize("form", ["int8fp8", "fp8"])
def test_another_form_of_8_bits_is_refused_with_the_form_that_the_gpu_has(ampere, tmp_path, form):
    for action in ("validate", "generate"):
        reply = ask(ampere, job(tmp_path, action=action, attention_mode=form))
        assert reply["code"] == "unavailable"
        assert (
            f"no attention {form} on this worker: its GPU has its own, int8, and sdpa"
            in (reply["error"])
        )
    assert ask(ampere, job(tmp_path, action="validate", attention_mode="int8"))["valid"]


def test_a_refusal_offers_what_is_here_alone(worker, tmp_path):
    """As xformers, which is in the images and needs a GPU."""
    there = "xformers" in available()
    with pytest.raises(Unavailable, match="only sdpa") as told:
        find_attention("flash")
    assert ("xformers" in str(told.value)) is there
    reply = ask(worker, job(tmp_path, attention_mode="sage"))
    assert "sdpa" in reply["error"]
    assert ("xformers" in reply["error"]) is there


def test_joints_are_taken(worker, tmp_path):
    path = tmp_path / "dance.npz"
    save_joints(path, JointClip(dance(9, 16.0, seed=1), 16.0, (896, 512)))
    given = job(tmp_path, steps=1)
    del given["input"]["pose_video_base64"]
    given["input"]["joints_base64"] = base64.b64encode(path.read_bytes()).decode()
    reply = ask(worker, given)
    assert (reply["num_frames"], reply["fps"]) == (9, 16)
    given["input"]["joints_base64"] = picture()
    assert ask(worker, given) == {
        "error": "joints_base64 is a picture; an .npz file of joints is expected.",
        "code": "bad_media",
    }


def test_jobs_go_on_where_the_folder_of_state_was_removed(worker, tmp_path):
    state = tmp_path / "state"
    given = endpoint(
        tmp_path,
        package=worker.endpoint.package, models=worker.endpoint.models, state=state,
    )  # fmt: skip
    made = Worker(given, Scratch(given.scratch))
    made.start(load_renderer)
    shutil.rmtree(state, ignore_errors=True)
    assert "video" in ask(made, job(tmp_path, steps=1))
    made.close()
