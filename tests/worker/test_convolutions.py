"""Convolutions of the VAE have their plans before the first job, for the sizes of jobs."""

import logging
from types import SimpleNamespace

import pytest
import torch

from engine.conditioning import Encoders
from engine.config import Defaults, defaults, state_dir
from engine.demo.weights import demo_weights
from engine.jobs.parse import parse_job
from engine.jobs.served import PREVIEW
from engine.jobs.usual import usual_sizes
from engine.machine.resident import Resident
from engine.media.framing import frames_to_u8
from engine.models.vae import Vae, in_layout
from engine.models.vae_decode import VaeDecoder
from engine.residency import Memory, Movable
from engine.worker import renderer
from engine.worker.convolutions import choose_plans
from kernels.arch import SM89
from kernels.channel_norm import channel_norm_reference
from tests.support.built import tiny_package
from tests.support.workers import endpoint

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Scene:
    """A pipeline whose VAE notes what it is asked for, and which may run out."""

    def __init__(self, fails=None):
        self.seen, self.home, self.fails = [], [], fails or {}
        vae = SimpleNamespace(encode=self.encode)
        home = Resident(lambda: self.home.append("+"), lambda: self.home.append("-"))
        encoders = Encoders(None, None, vae, self.decode, vae_home=home)
        nothing = Resident()
        after = {"decode": lambda: self.home.append("release")}
        memory = Memory(None, Movable(nothing, nothing, home, lambda _: None, after))
        self.pipeline = SimpleNamespace(encoders=encoders, memory=memory)

    def note(self, what, shape):
        self.seen.append((what, tuple(shape), torch.backends.cudnn.benchmark))
        if error := self.fails.get(tuple(shape)):
            raise error

    def encode(self, pieces):
        for piece in pieces:
            self.note("encode", piece.shape)

    def decode(self, latents):
        self.note("decode", latents.shape)
        for count in (1, 4):
            yield torch.zeros(count, 8, 8, 3, dtype=torch.uint8)


def clock():
    ticks = iter(range(100))
    return lambda: next(ticks) / 4


def test_every_size_is_met_in_all_forms_before_the_first_job_and_its_time_is_told(caplog):
    caplog.set_level(logging.INFO)
    scene, before = Scene(), torch.backends.cudnn.benchmark
    choose_plans(scene.pipeline, [(672, 416), (512, 896)], GPU, clock())
    assert scene.seen == [
        ("encode", (3, 1, 672, 416), True),
        ("encode", (3, 5, 336, 208), True),
        ("decode", (16, 2, 84, 52), True),
        ("encode", (3, 1, 512, 896), True),
        ("encode", (3, 5, 256, 448), True),
        ("decode", (16, 2, 64, 112), True),
    ]
    assert torch.backends.cudnn.benchmark is before
    assert caplog.messages == [
        "plans             250 ms, of the VAE at 416x672",
        "plans             250 ms, of the VAE at 896x512",
    ]
    assert scene.home == ["release"] * 2  # the buffers of one size make room for the next


def test_without_a_gpu_nothing_is_chosen(caplog):
    scene = Scene()
    choose_plans(scene.pipeline, [(672, 416)], CPU)
    assert scene.seen == []
    assert caplog.messages == []


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("GET was unable to find an engine to execute this computation")],
)  # fmt: skip
def test_a_size_that_does_not_fit_now_is_left_to_its_job_and_that_is_said(caplog, error):
    scene = Scene({(16, 2, 84, 52): error})
    choose_plans(scene.pipeline, [(672, 416), (64, 64)], GPU, clock())
    assert "at 416x672 are left to the first job: " in caplog.text
    assert scene.seen[-1][:2] == ("decode", (16, 2, 8, 8))
    assert not torch.backends.cudnn.benchmark


def test_another_error_ends_the_start():
    scene = Scene({(16, 2, 84, 52): RuntimeError("CUDA error: an illegal memory access")})
    with pytest.raises(RuntimeError, match="illegal memory"):
        choose_plans(scene.pipeline, [(672, 416)], GPU)


def test_a_real_vae_takes_what_it_is_given(caplog):
    vae = Vae(8)
    for weight in vae.parameters():
        weight.data = in_layout(torch.zeros_like(weight))
    vae.requires_grad_(False).eval()
    decoder = VaeDecoder(vae, channel_norm_reference, frames_to_u8)
    pipeline = SimpleNamespace(
        encoders=Encoders(None, None, vae, decoder.decode), memory=Memory.unplanned()
    )
    choose_plans(pipeline, [(64, 96)], GPU)
    assert "left to the first job" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [(672, 416)]),
        ({"recipe": "official"}, [(896, 512), (512, 896)]),
        ({"max_pixels": 96 * 160}, [(128, 96)]),
    ],
)
def test_the_sizes_are_those_of_requests_that_name_none(changes, sizes):
    defaults = Defaults(**changes)
    assert usual_sizes(defaults, PREVIEW) == sizes
    settings = parse_job(
        {"input": {"image_url": "https://a/b.png", "video_url": "https://a/b.mp4"}}, defaults
    ).settings
    if settings.height is not None:
        assert sizes == [(settings.height, settings.width)]


def test_a_worker_chooses_plans_for_the_usual_sizes_before_it_takes_jobs(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(renderer, "choose_plans", lambda *given: asked.append(given[1:]))
    monkeypatch.setattr(renderer, "_warm", lambda *_: None)
    models = demo_weights(state_dir()).models
    given = endpoint(tmp_path, package=tiny_package(SM89), models=models, state=state_dir())
    renderer.load_renderer(given)
    assert asked == [(usual_sizes(defaults(), PREVIEW), renderer.find_device())]
    assert asked[0][0]
