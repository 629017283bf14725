"""Clips of packages are those of the exact model, within what 8 bits allow, by every way."""

import builtins
import dataclasses
import io
import math
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.quality.suite import conditions_of
from engine.build.make import Order, make_package
from engine.config import state_dir
from engine.demo.weights import demo_weights
from engine.denoise.sampler import SAMPLERS
from engine.diskcache import DiskCache
from engine.errors import BadPackage, MissingModel, TooLarge, Unavailable
from engine.flow import Request, Settings, Source
from engine.load import load_exact, load_package
from engine.machine.upload import PackageWeights
from engine.media.video import probe_video, read_video
from engine.models.tensorfile import TensorFile
from engine.package.folder import Package
from engine.pose.networks import Networks
from engine.program import ModelSettings, choose_package
from engine.recipes import RECIPES
from engine.stage_dump import StageDump
from kernels.arch import SM86, SM89, SM90
from kernels.attention import FORMS
from tests.support.built import tiny_package
from tests.support.clips import clip
from tests.support.compiled import STATE, each_arch
from tests.support.packages import reseal

GATE = 0.999  # cosine of latents, at 8 bits
PROMPT = "a dancer in the rain"
QUICK = dataclasses.replace(RECIPES["preview"]["official"], sampler="euler", steps=2, cfg=2.0)
READERS = {"TensorFile", "Package", "PackageWeights", "DiskCache"}
OFFICIAL, PRODUCTION = RECIPES["preview"]["official"], RECIPES["preview"]["production"]


def settings(attention=None):
    return ModelSettings(torch.device("cpu"), "fp32", attention, state_dir())


def load(path, attention=None, models=None):
    models = models or demo_weights(state_dir()).models
    networks = Networks(models, torch.device("cpu"), state_dir())
    chosen = choose_package(path, torch.device("cpu"))
    return load_package(chosen, models, networks, settings(attention))


@cache
def packaged(arch=SM90, attention=None):
    return load(tiny_package(arch), attention)


@cache
def exact():
    demo = demo_weights(state_dir())
    networks = Networks(demo.models, torch.device("cpu"), state_dir())
    return load_exact(demo.checkpoint, [], demo.models, networks, settings())


def ask(recipe, **changes):
    given = {"prompt": PROMPT, "negative_prompt": "blur", "seed": 3, "width": 96, "height": 64}
    return Request(Path("x.png"), Path("x.mp4"), "pose", Settings(recipe, **given | changes))


@cache
def told(frames, cfg):
    """What a transformer is told of a clip of noise."""
    draw = torch.Generator().manual_seed(frames)
    picture = 2 * torch.rand(3, 64, 96, generator=draw) - 1
    skeleton = (255 * torch.rand(frames, 32, 48, 3, generator=draw)).byte()
    request = ask(dataclasses.replace(OFFICIAL, cfg=cfg))
    return conditions_of(exact().encoders, request, Source(picture, skeleton, 16.0, None))


def latents(pipeline, recipe, frames=9, **changes):
    return pipeline.denoise(ask(recipe, **changes), told(frames, recipe.cfg))


@cache
def wanted(recipe, frames=9):
    return latents(exact(), recipe, frames)


def cosine(got, want):
    return torch.cosine_similarity(got.double().flatten(), want.double().flatten(), dim=0).item()


def assert_near(got, want):
    assert got.shape == want.shape
    assert cosine(got, want) >= GATE
    assert got.std().item() == pytest.approx(want.std().item(), rel=0.02)


# --- the same latents


@each_arch
@pytest.mark.parametrize("name", RECIPES["preview"])
def test_a_package_of_any_architecture_makes_the_clip_of_the_exact_model(arch, name):
    """By its references, on the CPU; INT8 weights."""
    recipe = dataclasses.replace(RECIPES["preview"][name], steps=6)
    assert_near(latents(packaged(arch), recipe), wanted(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [SM89, SM90], ids=lambda arch: arch.name)
def test_errors_do_not_add_up_over_all_steps_of_the_official_recipe(arch):
    assert_near(latents(packaged(arch), OFFICIAL), wanted(OFFICIAL))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_solver_makes_the_clip_of_the_exact_model(sampler):
    """And of no other solver: their clips lie within the gate of each other. Two grids of Euler
    are one at 4 steps.
    """
    recipe = dataclasses.replace(PRODUCTION, sampler=sampler, steps=4, cfg=2.0)
    got = latents(packaged(SM89), recipe)
    assert_near(got, wanted(recipe))
    others = (wanted(dataclasses.replace(recipe, sampler=other)) for other in SAMPLERS)
    assert max(cosine(got, want) for want in others) == cosine(got, wanted(recipe))


@pytest.mark.parametrize("name", RECIPES["preview"])
def test_a_clip_of_97_frames_in_windows_is_that_of_the_exact_model(name):
    recipe = dataclasses.replace(RECIPES["preview"][name], steps=2)
    assert_near(latents(packaged(), recipe, 97), wanted(recipe, 97))
    alone = dataclasses.replace(recipe, window_frames=97)
    assert cosine(wanted(recipe, 97), latents(exact(), alone, 97)) < GATE


def test_the_gate_tells_other_clips():
    """Other texts are held in denoise/test_packaged.py: random weights hardly answer to them."""
    recipe = dataclasses.replace(OFFICIAL, steps=6)
    assert cosine(wanted(recipe), wanted(dataclasses.replace(recipe, shift=3.0))) < GATE
    assert cosine(wanted(recipe), latents(exact(), recipe, seed=4)) < GATE


@pytest.mark.parametrize("attention", [*FORMS, "sdpa"])
def test_every_attention_makes_the_clip_of_the_exact_model(attention):
    recipe = dataclasses.replace(PRODUCTION, steps=4)
    got = latents(packaged(SM90, attention), recipe)
    assert_near(got, wanted(recipe))
    is_default = torch.equal(got, latents(packaged(), recipe))
    assert is_default == (attention == "int8fp8")


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ("flash", r"no attention 'flash' for packages, only .*int8fp8.*, sdpa"),
        ("xformers", "xformers was asked for, but"),
    ],
)
def test_an_attention_that_is_not_there_is_told(attention, says):
    with pytest.raises(Unavailable, match=says):
        load(tiny_package(SM90), attention)


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ("int8fp8", "sm86 has no attention int8fp8, only int8. Ask for that, or for none by name."),
        ("fp8", "sm86 has no attention fp8, only int8. Ask for that, or for none by name."),
        ("flash", "There is no attention 'flash' for packages, only int8, sdpa."),
    ],
)
def test_an_architecture_without_e4m3_names_the_attention_that_it_has(attention, says):
    with pytest.raises(Unavailable) as caught:
        load(tiny_package(SM86), attention)
    assert str(caught.value) == says


def test_the_default_attention_is_that_of_the_architecture():
    recipe = dataclasses.replace(PRODUCTION, steps=2)
    usual = latents(packaged(SM86), recipe)
    assert torch.equal(usual, latents(packaged(SM86, "int8"), recipe))
    assert not torch.equal(usual, latents(packaged(SM86, "sdpa"), recipe))


def test_a_package_with_weights_that_its_gpu_does_not_multiply_is_refused(tmp_path):
    strange = shutil.copytree(tiny_package(SM89, "fp8"), tmp_path / "sm86")

    def for_another(body):
        kept = [file for file in body["files"] if not file["path"].startswith("kernels/")]
        return body | {"arch": "sm86", "native": {"kernels": []}, "files": kept}

    reseal(strange, for_another)
    says = "holds weights of fp8e4nv, which sm86 does not multiply; i8 is expected. Build"
    with pytest.raises(BadPackage, match=says):
        load(strange)


# --- whole jobs


def test_a_machine_without_gpu_that_runs_out_of_memory_says_so_in_a_sentence():
    def work():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes were asked for.")

    with pytest.raises(TooLarge, match=r"ran out of memory \(denoise: DefaultCPU"):
        packaged().memory.attempt("denoise", work)


@pytest.fixture
def request_of(tmp_path):
    def make(frames=9, **changes):
        rng = np.random.default_rng(0)
        picture, pose = tmp_path / "ref.png", tmp_path / "pose.mp4"
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(picture)
        clip(pose, frames)
        given = {"recipe": dataclasses.replace(PRODUCTION, steps=2)} | changes
        return dataclasses.replace(ask(**given), image=picture, motion=pose)

    return make


def run(pipeline, request, folder):
    folder.mkdir()
    made = pipeline.run(request, folder / "clip.mp4", "test", StageDump(folder))
    return made, load_file(folder / "latents.safetensors")


def frames_of(path):
    return torch.cat([*read_video(probe_video(path))]).float()


def psnr(got, want):
    assert got.shape == want.shape
    return 10 * math.log10(255**2 / (got - want).square().mean().item())


def test_a_job_is_that_of_the_exact_model_from_the_media_to_the_frames(
    request_of, tmp_path, caplog
):
    (made, kept), (plain, want) = (
        run(pipeline, request_of(), tmp_path / name)
        for name, pipeline in (("package", packaged()), ("exact", exact()))
    )
    assert kept.keys() == want.keys()
    for name in kept.keys() - {"latents"}:
        assert torch.equal(kept[name], want[name]), name
    assert_near(kept["latents"], want["latents"])
    # random weights of a VAE make noise of the slightest change
    assert psnr(frames_of(made.path), frames_of(plain.path)) > 28
    assert (made.frames, made.notes) == (9, ())
    assert not (tmp_path / "package" / "activations.safetensors").exists()
    assert "activations.safetensors is kept by the exact model alone" in caplog.text


def test_the_job_after_a_job_is_not_changed_by_it(request_of, tmp_path):
    request = request_of()
    longer = dataclasses.replace(PRODUCTION, steps=1, window_frames=13, overlap_frames=4)
    pipeline = packaged()
    _, first = run(pipeline, request, tmp_path / "1")
    run(pipeline, request_of(33, recipe=longer), tmp_path / "2")
    _, again = run(pipeline, request_of(), tmp_path / "3")
    assert torch.equal(first["latents"], again["latents"])


@pytest.mark.slow
def test_a_clip_of_326_frames_is_that_of_the_exact_model(request_of, tmp_path):
    request = request_of(326, recipe=PRODUCTION)
    made, kept = run(packaged(), request, tmp_path / "package")
    _, want = run(exact(), request, tmp_path / "exact")
    assert_near(kept["latents"], want["latents"])
    assert made.frames == probe_video(made.path).frames == 325
    per_frame = [cosine(a, b) for a, b in zip(kept["latents"].unbind(1), want["latents"].unbind(1))]
    assert min(per_frame) >= GATE  # at the seams too


# --- what is beside a package


@pytest.fixture(scope="module")
def with_prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text(f"{PROMPT}\nblur\n", encoding="utf-8")
    demo = demo_weights(state_dir())
    order = Order(SM90, demo.checkpoint, prompts=folder / "prompts.txt", models=demo.models)
    return make_package(order, folder / "out", STATE)


@pytest.fixture
def models(tmp_path):
    """A models folder of one's own."""
    return Path(shutil.copytree(demo_weights(state_dir()).models, tmp_path / "models"))


def test_prompts_that_a_package_holds_need_no_text_encoder(
    with_prompts, models, request_of, tmp_path
):
    shutil.rmtree(models / "text_encoders")
    pipeline = load(with_prompts, models=models)
    _, kept = run(pipeline, request_of(), tmp_path / "held")
    _, want = run(packaged(), request_of(), tmp_path / "made")
    assert cosine(kept["text"], want["text"]) > GATE  # BF16
    assert_near(kept["latents"], want["latents"])
    other = request_of(prompt="a dancer in the snow")
    with pytest.raises(MissingModel, match=r"There is no text encoder .*text_encoders"):
        pipeline.run(other, tmp_path / "clip.mp4", "test", StageDump(None))
    assert not (tmp_path / "clip.mp4").exists()
    _, again = run(pipeline, request_of(), tmp_path / "again")
    assert torch.equal(again["latents"], kept["latents"])


def test_damaged_prompts_are_told_when_the_package_is_loaded(with_prompts, tmp_path):
    package = Path(shutil.copytree(with_prompts, tmp_path / "sm90"))
    held = package / "prompts.safetensors"
    data = bytearray(held.read_bytes())
    data[-3] ^= 1  # of a number, which no reader of the format could tell
    held.write_bytes(data)
    with pytest.raises(BadPackage, match=r"prompts\.safetensors is damaged"):
        load(package)


@pytest.mark.parametrize(("field", "other"), [("count", 3), ("encoder_sha256", "0" * 64)])
def test_prompts_that_are_not_those_of_the_manifest_are_told(with_prompts, tmp_path, field, other):
    package = Path(shutil.copytree(with_prompts, tmp_path / "sm90"))
    reseal(package, lambda body: body["prompts"].update({field: other}))
    with pytest.raises(BadPackage, match=r"holds 2 prompts of the encoder .* by the manifest"):
        load(package)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("vae", "No VAE in"),
        ("clip_vision", "No image encoder in"),
        ("text_encoders", "No text encoder in"),
        ("", "There is no models folder"),
    ],
)
def test_a_model_that_is_missing_is_named_before_weights_are_read(models, gone, says, tmp_path):
    shutil.rmtree(models / gone)
    package = Path(shutil.copytree(tiny_package(SM90), tmp_path / "sm90"))
    weights = package / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))  # whoever reads it finds it damaged
    with pytest.raises(MissingModel, match=says):
        load(package, models=models)


def test_damaged_weights_are_told_when_the_package_is_loaded(tmp_path):
    package = Path(shutil.copytree(tiny_package(SM90), tmp_path / "sm90"))
    weights = package / "weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BadPackage, match=r"weights\.bin is damaged: \S+ has sha256"):
        load(package)


def test_without_a_gpu_one_of_several_packages_must_be_named(tmp_path):
    for arch in (SM89, SM90):
        (tmp_path / arch.name).symlink_to(tiny_package(arch))
    with pytest.raises(BadPackage, match="holds packages for sm89, sm90; name one of them"):
        load(tmp_path)
    assert load(tmp_path / "sm89").denoiser.name == "the package sm89"


@pytest.mark.parametrize(
    ("name", "says"), [("nowhere", "does not exist"), ("", "holds no package")]
)
def test_a_folder_without_a_package_is_told(tmp_path, name, says):
    with pytest.raises(BadPackage, match=says):
        load(tmp_path / name)


# --- the second job of a warm worker


@pytest.fixture
def opened(monkeypatch):
    """Paths that are opened, and tensors that are read, from here on."""
    found = []

    def watched(real):
        def call(path, *args, **kwargs):
            found.append(str(path))
            return real(path, *args, **kwargs)

        return call

    for place, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat")):
        monkeypatch.setattr(place, name, watched(getattr(place, name)))
    for kind, name in (
        (TensorFile, "__init__"),
        (TensorFile, "open"),
        (Package, "read"),
        (PackageWeights, "visit"),
        (DiskCache, "read"),
    ):
        real = getattr(kind, name)

        def call(self, *args, real=real, what=f"{kind.__name__}.{name}", **kwargs):
            found.append(what)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, call)
    return found


def test_the_second_job_of_a_warm_worker_reads_no_model_again(tmp_path, opened):
    """Another picture and seed, one prompt that is known and in the first job was not."""
    pipeline = load(tiny_package(SM90))
    pose, prompt = tmp_path / "pose.mp4", f"never seen before: {tmp_path}"
    clip(pose, 9)
    made = []
    for seed in (1, 2):
        picture = tmp_path / f"{seed}.png"
        draw = np.random.default_rng(seed)
        Image.fromarray(draw.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(picture)
        given = Settings(QUICK, prompt=prompt, width=96, height=64, seed=seed, audio=False)
        request = Request(picture, pose, "pose", given)
        opened.clear()
        pipeline.run(request, tmp_path / f"{seed}.mp4", "test", StageDump(None))
        made.append({*opened})
    homes = tiny_package(SM90), demo_weights(state_dir()).models, state_dir()

    def models(paths):
        tensors = {path for path in paths if path.partition(".")[0] in READERS}
        return tensors | {path for path in paths if path.startswith(tuple(map(str, homes)))}

    first, second = map(models, made)
    assert {"PackageWeights.visit", "TensorFile.open", "DiskCache.read"} <= first
    assert second == set()
    assert str(tmp_path / "2.png") in made[1]  # what the job brings is seen
