"""Packages on the command line: made, shown, run, and refused in one sentence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import build_engine
from engine.__main__ import main
from engine.build.make import Order, make_package
from engine.config import KINDS, state_dir
from engine.demo.weights import demo_weights
from engine.machine.gpu import Gpu
from engine.machine.kernel_choice import Choices, KernelChoice, Variant, keep_choices
from engine.media.video import probe_video
from engine.package.folder import open_package
from engine.package.search import package_home
from kernels.arch import SM89, SM90, SM120
from tests.support.built import tiny_package
from tests.support.clips import clip
from tests.support.compiled import STATE
from tests.support.packages import reseal


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "ok.png")
    clip(tmp_path / "pose.mp4", 5)
    return tmp_path


def call(*arguments):
    """The exit code of a command."""
    try:
        main([*map(str, arguments)])
    except SystemExit as end:
        return end.code
    return 0


def generate(files, *options, out="clip.mp4"):
    return call(
        "generate", "--image", files / "ok.png", "--pose", files / "pose.mp4", "--out", files / out,
        "--width", 96, "--height", 64, "--steps", 1, "--quiet", *options,
    )  # fmt: skip


def refusal(capsys):
    """The one sentence of a command that failed."""
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("DEMO WEIGHTS")]
    assert said.out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def several(tmp_path):
    """A folder of packages for two architectures."""
    for arch in (SM89, SM120):
        shutil.copytree(tiny_package(arch), tmp_path / "packages" / arch.name)
    return tmp_path / "packages"


# --- generate


@pytest.mark.parametrize("arch", [SM89, SM120], ids=lambda arch: arch.name)
def test_a_tiny_package_makes_a_clip_that_says_it_is_a_demo(files, capsys, arch):
    assert generate(files, "--package", tiny_package(arch), "--seed", 5) == 0
    said = capsys.readouterr()
    assert said.err == "DEMO WEIGHTS: random numbers, not a trained model\n"
    assert "5 frames of 96x64 at 16 fps, seed 5" in said.out
    info = probe_video(files / "clip.mp4")
    assert (info.width, info.height, info.frames) == (96, 64, 5)
    assert b"DEMO WEIGHTS, seed 5" in (files / "clip.mp4").read_bytes()


def test_options_of_a_package_reach_it(files, capsys):
    """Each makes another clip than without it."""
    base = ("--package", tiny_package(SM90), "--recipe", "production", "--steps", 2)
    made = {}
    for option in ((), ("--attention", "fp8"), ("--attention", "sdpa"), ("--sampler", "euler")):
        assert generate(files, *base, *option, "--stages", files / "kept") == 0
        made[option] = (files / "kept" / "latents.safetensors").read_bytes()
    capsys.readouterr()
    assert len(set(made.values())) == len(made)


def test_a_models_folder_of_ones_own_is_taken(files, capsys, tmp_path):
    models = Path(shutil.copytree(demo_weights(state_dir()).models, tmp_path / "models"))
    given = ("--package", tiny_package(SM90), "--models", models)
    assert generate(files, *given) == 0
    capsys.readouterr()
    shutil.rmtree(models / "vae")
    assert generate(files, *given, out="other.mp4") == 2
    assert f"No VAE in {models}" in refusal(capsys)
    assert not (files / "other.mp4").exists()


def test_prompts_of_the_package_are_used_where_there_is_no_text_encoder(files, capsys, tmp_path):
    demo = demo_weights(state_dir())
    (tmp_path / "prompts").write_text("a dance\n", encoding="utf-8")
    order = Order(SM90, demo.checkpoint, prompts=tmp_path / "prompts", models=demo.models)
    package = make_package(order, tmp_path / "out", STATE)
    models = Path(shutil.copytree(demo.models, tmp_path / "models"))
    shutil.rmtree(models / "text_encoders")
    given = ("--package", package, "--models", models, "--recipe", "production", "--prompt")
    assert generate(files, *given, " a  dance") == 0  # cleaned alike
    capsys.readouterr()
    assert generate(files, *given, "a walk", out="walk.mp4") == 2
    assert "There is no text encoder" in refusal(capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--checkpoint", "x.safetensors"), "Give --checkpoint or --package, not both."),
        (("--lora", "x.safetensors:0.5"), "a package has its LoRAs merged"),
        (("--attention", "flash"), "no attention 'flash' for packages, only "),
        (("--attention", "xformers"), "Attention xformers was asked for"),
        (("--steps", "0"), "The steps is 0"),
        (("--sampler", "heun"), "There is no sampler called 'heun'"),
        (("--models", "nowhere"), "There is no models folder nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_that_contradict_a_package_are_one_sentence(files, capsys, options, says):
    assert generate(files, "--package", tiny_package(SM90), *options) == 2
    assert says in refusal(capsys)
    assert not (files / "clip.mp4").exists()


@pytest.mark.parametrize(
    ("attention", "says"),
    [("int8", "There is no attention 'int8' here, only sdpa"), ("fp8", "'fp8' here, only sdpa")],
)
def test_an_attention_of_packages_is_none_of_the_exact_model(files, capsys, attention, says):
    assert generate(files, "--attention", attention) == 2
    assert says in refusal(capsys)


def test_without_a_gpu_one_of_several_packages_is_to_be_named(files, several, capsys):
    assert generate(files, "--package", several) == 2
    assert "holds packages for sm89, sm120; name one of them" in refusal(capsys)
    assert generate(files, "--package", several / "sm120") == 0


def broken(name, files):
    """The path of something that is no package, and what is said of it."""
    path = files / "package"
    if name == "no folder":
        return path, "does not exist"
    if name == "a file":
        path.write_text("")
        return path, "is a file, not the folder of a package"
    if name == "an empty folder":
        path.mkdir()
        return path, "holds no package"
    shutil.copytree(tiny_package(SM90), path)
    if name == "weights are gone":
        (path / "weights.bin").unlink()
        return path, "weights.bin is missing"
    if name == "weights are damaged":
        size = (path / "weights.bin").stat().st_size
        (path / "weights.bin").write_bytes(bytes(size))
        return path, "weights.bin is damaged"
    if name == "a kernel is cut":
        kernel = min((path / "kernels").iterdir())
        kernel.write_bytes(kernel.read_bytes()[:-1])
        return path, kernel.name
    if name == "of a newer engine":
        reseal(path, lambda body: body | {"schema": 1000})
        return path, "was made by a newer engine"
    path.rename(files / "sm90.partial")
    return files / "sm90.partial", "is an unfinished build"


BROKEN = [
    "no folder", "a file", "an empty folder", "weights are gone", "weights are damaged",
    "a kernel is cut", "of a newer engine", "an unfinished build",
]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_package_that_cannot_be_used_is_one_sentence(files, capsys, name):
    path, says = broken(name, files)
    assert generate(files, "--package", path) == 2
    assert says in refusal(capsys)
    assert not (files / "clip.mp4").exists()


# --- info


def info(capsys, *options):
    assert call("info", *options) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return json.loads(said.out)


def test_info_shows_what_is_in_a_package(capsys):
    path = tiny_package(SM89)
    found = info(capsys, "--package", path, "--quiet")
    (shown,) = found["packages"]
    held = open_package(path)
    assert (shown["path"], shown["arch"], shown["weights"]) == (str(path), "sm89", "int8")
    assert shown["rotation"] == {"kind": "regular-hadamard", "group": 256, "linears": 16}
    assert shown["digest"] == held.digest
    assert shown["driver_floor"] == held.manifest.driver_floor
    assert shown["tensors"] == len(held.names)
    assert shown["sources"][0]["file"] == "scail_tiny_bf16.safetensors"
    kernels = {kernel["name"]: kernel for kernel in shown["native"]["kernels"]}
    assert kernels.keys() == {kernel.name for kernel in held.kernels}
    assert all(kernel["registers"] > 0 for kernel in kernels.values())
    assert "absent" in shown["tensorrt"]
    assert found["gpu"] is None
    assert found["runs"] == "preview/sm89, by references on the CPU: there is no GPU"
    assert found["variants"] is found["sums"] is None


def test_info_plans_for_a_gpu_that_is_not_here(capsys):
    """Of so small a model everything fits; what it takes is told clip by clip."""
    path = tiny_package(SM89)
    assert info(capsys, "--package", path, "--quiet")["memory"] is None
    (plans,) = info(capsys, "--package", path, "--gpu-memory", 16, "--quiet")["memory"].values()
    assert [*plans][:2] == ["672x416x81, cfg 1", "672x416x81, cfg 2"]
    assert len(plans) == 6
    for told in plans.values():
        assert told["does"] == "everything stays on the GPU"
        assert told["seconds"] == 0
        assert 1.5e9 < told["peak_bytes"] < 16e9
    (plans,) = info(capsys, "--package", path, "--gpu-memory", 2, "--quiet")["memory"].values()
    assert "2.0 GB are free" in plans["1280x704x81, cfg 1"]["refused"]


@pytest.mark.parametrize("given", ["0", "-8", "8GB", "nan", "inf", "5000"])
def test_a_gpu_memory_that_no_gpu_has_is_refused(capsys, given):
    assert call("info", "--package", tiny_package(SM89), f"--gpu-memory={given}") == 2
    assert "gigabytes of GPU memory are expected" in capsys.readouterr().err


def test_gpu_memory_is_of_packages_alone(files, capsys):
    assert call("info", "--gpu-memory", 8) == 2
    assert "--gpu-memory belongs to --package" in capsys.readouterr().err
    assert generate(files, "--gpu-memory", 8) == 2
    assert "--gpu-memory belongs to --package" in capsys.readouterr().err


def test_info_tells_in_what_the_chosen_products_keep_their_sums(monkeypatch, capsys):
    """On a Hopper the fastest sums FP8 in about 14 bits: nobody should have to look for that."""
    gpu = Gpu("NVIDIA H200", "GPU-1", (9, 0), (12, 8), "570.86.15", 150 * 10**9, None)
    path = tiny_package(SM90)
    choice = KernelChoice("gemm.fp8", "fp8_pair", "the fastest", (Variant("fp8_pair", 0.5),))
    monkeypatch.setattr("engine.__main__.find_gpu", lambda: gpu)
    assert info(capsys, "--package", path, "--quiet")["sums"] is None
    keep_choices(Choices((choice,)), open_package(path).digest, gpu, state_dir())
    found = info(capsys, "--package", path, "--quiet")
    assert found["sums"] == {"gemm.fp8": "fp8_pair: about 14 bits, over all of K"}
    assert found["variants"][0]["chosen"] == "fp8_pair"


def test_info_shows_all_packages_of_a_folder(several, capsys):
    found = info(capsys, "--package", several, "--quiet")
    assert [package["arch"] for package in found["packages"]] == ["sm89", "sm120"]
    assert "preview/sm89, preview/sm120" in found["runs"]


@pytest.fixture
def both(tmp_path):
    """A folder of packages of both kinds for one architecture."""
    for kind in KINDS:
        shutil.copytree(tiny_package(SM90, kind=kind), package_home(tmp_path, kind, SM90))
    return tmp_path


def test_info_shows_the_kinds_of_packages_and_that_one_must_be_named(both, monkeypatch, capsys):
    found = info(capsys, "--package", both, "--quiet")
    assert [package["kind"] for package in found["packages"]] == ["preview", "scail2"]
    assert found["packages"][1]["model"]["mask_dim"] == 28
    assert found["runs"].startswith("preview/sm90, scail2/sm90, by references")
    gpu = Gpu("NVIDIA H200", "GPU-1", (9, 0), (12, 8), "570.86.15", 150 * 10**9, None)
    monkeypatch.setattr("engine.__main__.find_gpu", lambda: gpu)
    assert info(capsys, "--package", both, "--quiet")["runs"] == (
        f"none: {both} holds packages of SCAIL-Preview and SCAIL-2 for sm90; name one of them: "
        f"--package {both}/preview or --package {both}/scail2 (SCAIL_PACKAGE of a worker)."
    )
    found = info(capsys, "--package", both / "scail2", "--quiet")
    assert found["runs"] == f"{both}/scail2/sm90, which is of SCAIL-2 and for NVIDIA H200"


def test_info_without_a_package_shows_the_machine(capsys):
    found = info(capsys, "--quiet")
    assert found["packages"] == []
    assert found["runs"] == "the exact model in plain PyTorch on the CPU"


def test_info_verifies_every_byte_if_it_is_told_to(tmp_path, capsys):
    path = shutil.copytree(tiny_package(SM89), tmp_path / "sm89")
    assert info(capsys, "--package", path, "--verify", "--quiet")["packages"][0]["arch"] == "sm89"
    for name in ("weights.bin",):
        data = bytearray((path / name).read_bytes())
        data[-1] ^= 1
        (path / name).write_bytes(data)
        assert info(capsys, "--package", path, "--quiet")["packages"]
        assert call("info", "--package", path, "--verify", "--quiet") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ")
        assert f"{name} is damaged" in said
        data[-1] ^= 1
        (path / name).write_bytes(data)
    assert call("info", "--package", path, "--verify", "--quiet") == 0


def test_there_is_nothing_to_verify_without_a_package(capsys):
    assert call("info", "--verify") == 2
    assert "--verify belongs to --package" in refusal(capsys)


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "weights are damaged"])
def test_info_of_something_that_is_no_package_is_one_sentence(files, capsys, name):
    path, says = broken(name, files)
    assert call("info", "--package", path, "--quiet") == 2
    assert says in refusal(capsys)


# --- build_engine.py


def test_a_text_encoder_that_is_missing_is_told_before_the_first_weight(capsys, tmp_path):
    """Not after an hour of weights."""
    (tmp_path / "prompts").write_text("a dance\n", encoding="utf-8")
    models = Path(shutil.copytree(demo_weights(state_dir()).models, tmp_path / "models"))
    given = ["--arch", "sm90", "--preset", "tiny", "--out", str(tmp_path / "out")]
    given += ["--prompts", str(tmp_path / "prompts"), "--models", str(models)]
    for gone, says in (("tokenizer", "No tokenizer for"), (".", "No text encoder in")):
        shutil.rmtree(models / "text_encoders" / gone)
        with pytest.raises(SystemExit) as end:
            build_engine.main(given)
        assert end.value.code == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_options_are_checked_before_a_package_is_opened(tmp_path, capsys):
    given = ["generate", "--image", "a.png", "--pose", "b.mp4", "--package", str(tmp_path / "no")]
    for wrong, sentence in (
        (["--checkpoint", "c", "--out", "d.mp4"], "Give --checkpoint or --package, not both."),
        (["--steps", "0", "--out", "d.mp4"], "The steps is 0; it must be 1 to 100."),
        (["--out", "d.avi"], "d.avi should end in .mp4."),
    ):
        with pytest.raises(SystemExit) as end:
            main([*given, *wrong])
        assert (end.value.code, capsys.readouterr().err) == (2, f"error: {sentence}\n")
