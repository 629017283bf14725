"""A worker that has loaded a package of SCAIL-2 serves its kind, and refuses the other by name."""

import asyncio
import logging
from dataclasses import replace

import pytest

from engine.config import TINY_SCAIL2, state_dir
from engine.demo.presets import PRESETS
from engine.package.folder import open_package
from engine.package.manifest import MergedLora, SourceFile
from engine.worker.renderer import load_renderer
from engine.worker.scratch import Scratch
from engine.worker.service import Worker
from engine.worker.serving import served_by
from handler import respond
from kernels.arch import SM89
from tests.support.built import tiny_package
from tests.support.packages import MANIFEST
from tests.support.scail2 import body
from tests.support.workers import endpoint


def ask(worker, given):
    return asyncio.run(respond(worker, given, [].append))


def start(folder, kind, **changes):
    models = PRESETS["tiny"].weights(state_dir()).models
    package = tiny_package(SM89, kind=kind)
    given = endpoint(folder, package=package, models=models, **changes)
    worker = Worker(given, Scratch(given.scratch))
    worker.start(load_renderer)
    return worker


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    made = start(tmp_path_factory.mktemp("package"), "scail2")
    yield made
    made.close()


def test_both_modes_are_served_from_a_package(worker):
    assert worker.health()["model"] == "SCAIL-2"
    for mode in ("animation", "replacement"):
        reply = ask(worker, body(mode=mode))
        assert "video" in reply, reply


def test_the_log_of_a_start_says_the_kind(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        worker = start(tmp_path, "scail2")
    worker.close()
    assert "SCAIL-2 is served: animation and replacement" in caplog.text


def test_a_worker_of_preview_refuses_masks_by_name(tmp_path):
    worker = start(tmp_path, "preview")
    try:
        assert worker.health()["model"] == "SCAIL-Preview"
        assert ask(worker, body())["error"] == (
            "mask_base64 is for SCAIL-2; this worker serves SCAIL-Preview. "
            "Leave it out, or take a package of SCAIL-2."
        )
    finally:
        worker.close()


def test_a_recipe_of_the_other_model_is_the_endpoints_problem_and_told_to_every_job(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("RECIPE", "fast8")
    worker = start(tmp_path, "preview")
    try:
        want = "There is no recipe fast8 for SCAIL-Preview, only production and official."
        assert worker.health()["problem"] == want
        assert ask(worker, body()) == {"error": want, "code": "bad_request"}
    finally:
        worker.close()


def package(*loras):
    config = replace(TINY_SCAIL2, layers=3)  # no demo is so deep
    whole = SourceFile("scail.safetensors", 1, "", None)
    return replace(MANIFEST, model_kind="scail2", model=config, sources=(whole, *loras))


def lora(role, rank, strength):
    return SourceFile(f"{role}.safetensors", 1, "", MergedLora(strength, role, rank))


def test_what_is_merged_into_a_package_decides_recipes_and_modes():
    plain = served_by(package())
    assert {*plain.refused} == {"turbo", "fast8"}
    assert "build_engine.py --arch" in plain.refused["turbo"]
    turbo = served_by(package(lora("distill", 64, 0.8), lora("dpo", 128, 1.0)))
    assert {*turbo.refused} == {"official", "fast8"}
    assert turbo.modes == ("animation", "replacement")
    relit = served_by(package(lora("relight", 128, 1.0)))
    assert relit.modes == ("replacement",)
    assert served_by(open_package(tiny_package(SM89)).manifest).modes == ()
