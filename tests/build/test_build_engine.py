"""A build makes a package that opens of a checkpoint, or a sentence and no package."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import build_engine
from engine.build.make import Order, make_package, read_prompts
from engine.config import TINY, ModelConfig, state_dir
from engine.demo.weights import demo_weights
from engine.denoise.block import LINEARS
from engine.errors import BadCheckpoint, BadPackage, BadRequest, BuildFailed
from engine.models.dit import Linear, Scail
from engine.models.latent_colours import LatentColours, fit_colours, name_of
from engine.models.locate import VAE, find_model
from engine.models.stored_prompts import load_prompts
from engine.models.vae import load_vae
from engine.package.folder import open_package
from engine.package.search import find_packages
from kernels.aot.cubin import spec_digest
from kernels.arch import SM86, SM89, SM90, SM120
from kernels.gemm import GEMM
from tests.support.built import tiny_package
from tests.support.checkpoints import save, small_weights
from tests.support.compiled import STATE, each_arch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo():
    return demo_weights(state_dir())


def run(arguments):
    """The command as a user runs it."""
    command = [sys.executable, ROOT / "build_engine.py", *arguments]
    environment = os.environ | {"SCAIL_STATE": str(STATE)}
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


# --- what is built


@each_arch
def test_a_tiny_package_is_built_for_every_architecture(arch):
    package = open_package(tiny_package(arch), arch)
    manifest = package.manifest
    package.verify()
    assert manifest.model == TINY
    assert manifest.weights == "int8"
    assert manifest.driver == arch.driver
    assert {entry.dtype for entry in manifest.tensors if entry.name.endswith(".q")} == {"int8"}
    linears = [f"blocks.{n}.{field}" for n in range(TINY.layers) for field in LINEARS]
    assert sorted(manifest.rotation.linears) == sorted(linears)
    assert (manifest.rotation.kind, manifest.rotation.group) == ("regular-hadamard", 256)
    held = {kernel.name: kernel for kernel in package.kernels}
    ways = [way for way in GEMM.values() if arch in way.bias.tuning]
    for way in ways:
        for spec in way.specs:
            if way.dtype == torch.int8:
                assert held[spec.name].spec == spec_digest(spec, arch)
                assert held[spec.name].toolkit in arch.toolkits
    rows = {name for name in held if name.startswith(("modulate.", "quantize."))}
    assert rows == {"modulate.i8r_256", "quantize.i8r_256", "quantize.i8r_512"}
    report = json.loads(package.file("report.json"))
    assert {error["name"] for error in report["tensors"]} >= {*linears}


def test_the_manifest_says_what_the_package_was_made_of(demo):
    manifest = open_package(tiny_package(SM89)).manifest
    (source,) = manifest.sources
    assert (source.file, source.bytes) == (demo.checkpoint.name, demo.checkpoint.stat().st_size)
    assert manifest.toolchain["torch"] == torch.__version__
    assert manifest.toolchain["ptxas 12.6"] == "12.6.85"
    assert all(len(digest) == 64 for digest in manifest.wheels.values())
    assert len(manifest.wheels) >= 4


@pytest.mark.parametrize(
    ("arch", "why"),
    [(SM89, "takes fp8 weights, not int8"), (SM90, "not for sm90")],
    ids=["sm89", "sm90"],
)
def test_the_manifest_says_why_there_is_no_tensorrt_program(arch, why):
    assert why in open_package(tiny_package(arch)).manifest.tensorrt["absent"]


@pytest.mark.parametrize("arch", [SM89, SM120], ids=lambda arch: arch.name)
def test_both_programs_are_built_where_both_exist(arch, demo, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    order = Order(arch, demo.checkpoint, programs=("native", "tensorrt"))
    package = open_package(make_package(order, tmp_path, STATE))
    package.verify()
    assert package.manifest.weights == "fp8" and package.manifest.rotation is None
    assert "TensorRT takes fp8 weights, which are less exact than int8" in caplog.text
    for n in range(TINY.layers):  # which the program would not multiply by
        assert torch.equal(package.read(f"blocks.{n}.inner"), torch.ones(TINY.ffn))
    program = package.manifest.tensorrt
    assert program["arch"] == arch.name
    assert set(program["plans"]) == {"block", "pre", "post", "context"}
    for plan in program["plans"].values():
        assert len(package.file(f"plans/{plan['file']}")) == plan["bytes"]
    assert package.file("plans/block.onnx") != package.file("plans/block_fp32.onnx")


def test_the_same_order_gives_the_same_bytes(demo, tmp_path):
    again = open_package(make_package(Order(SM120, demo.checkpoint), tmp_path, STATE))
    first = open_package(tiny_package(SM120))
    assert again.manifest == first.manifest


# --- prompts and calibration


def test_prompts_are_embedded_into_the_package(demo, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a dance\n\n a  dance in the rain \na dance\n", encoding="utf-8")
    order = Order(SM90, demo.checkpoint, prompts=file, models=demo.models)
    package = open_package(make_package(order, tmp_path / "out", STATE))
    stored = load_prompts(package.path / "prompts.safetensors")
    assert list(stored.rows) == ["a dance", "a dance in the rain"]
    assert package.manifest.prompts.count == 2
    assert package.manifest.prompts.encoder_sha256 == stored.encoder_sha256
    assert all(rows.isfinite().all() for rows in stored.rows.values())
    assert package.manifest.colours is None  # no VAE was given


def test_a_package_built_with_a_vae_knows_the_colours_of_its_previews(demo, tmp_path):
    path = find_model(demo.models, VAE)
    order = Order(SM90, demo.checkpoint, vae=path)
    stored = open_package(make_package(order, tmp_path / "out", STATE)).manifest.colours
    vae = load_vae(path, torch.device("cpu"), torch.float32)
    fitted = fit_colours(vae)
    assert LatentColours.of(stored.values).values == pytest.approx(fitted.values, abs=1e-3)
    assert stored.vae == name_of(vae) == name_of(vae.bfloat16())  # as a GPU holds it


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"\xff\xfe\x00", "no text file"),
        (b"x" * 5000, "prompt 1 has 5000 characters"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_refused(tmp_path, content, says):
    (tmp_path / "prompts").write_bytes(content)
    with pytest.raises(BadRequest, match=says):
        read_prompts(tmp_path / "prompts")
    with pytest.raises(BadRequest, match="nowhere"):
        read_prompts(tmp_path / "nowhere")


def activations(folder, outlier):
    """Writes what `generate --stages` keeps; `outlier` is the largest value that enters `down`."""
    folder.mkdir()
    held = {}
    with torch.device("meta"):
        model = Scail(TINY)
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            width = module.in_features
            peak = outlier if name.endswith("ffn.2") else 3.0
            held[f"{name}.absmax"] = torch.full((width,), peak)
            held[f"{name}.mean_square"] = torch.ones(width)
    save_file(held, folder / "activations.safetensors")
    return folder


def test_calibration_decides_the_multipliers_of_each_linear(demo, tmp_path):
    calibration = activations(tmp_path / "seen", 300.0)
    order = Order(SM89, demo.checkpoint, calibration=calibration)
    package = open_package(make_package(order, tmp_path / "out", STATE))
    plain = open_package(tiny_package(SM89))
    assert package.manifest.rotation == plain.manifest.rotation  # R spreads rare giants
    for name in ("blocks.0.smooth", "blocks.0.inner"):
        # equal columns need no clip, and even channels no multipliers
        assert torch.equal(package.read(name), torch.ones_like(plain.read(name)))
        assert not torch.equal(plain.read(name), torch.ones_like(plain.read(name)))


# --- what is refused


def refused(kind, says, order, out):
    with pytest.raises(kind, match=says):
        make_package(order, out, STATE)
    with pytest.raises(BadPackage):
        open_package(out, order.arch)


def test_an_order_that_contradicts_itself_is_refused(demo, tmp_path):
    order = Order(SM89, demo.checkpoint)
    both = ("native", "tensorrt")
    for changes, says in (
        ({"programs": ("tensorrt",)}, "native or native,tensorrt"),
        ({"programs": ("native", "cuda")}, "native or native,tensorrt"),
        ({"programs": both, "weights": "int8"}, "takes fp8 weights, not int8"),
        ({"programs": both, "arch": SM90}, "not for sm90"),
        ({"programs": both, "arch": SM86}, "for sm89 and sm120, not for sm86"),
        (
            {"weights": "fp8", "arch": SM86},
            r"fp8, and sm86 \(RTX 3090.*multiply them. Leave",
        ),
        ({"calibration": tmp_path / "nowhere"}, r"holds no activations\.safetensors"),
        ({"prompts": tmp_path / "nowhere"}, "no text file"),
    ):
        refused(BadRequest, says, dataclasses.replace(order, **changes), tmp_path / "out")


def test_a_checkpoint_of_another_model_leaves_no_package(tmp_path):
    weights = small_weights()
    del weights["patch_embedding_pose.weight"]
    other = save(weights, tmp_path / "wan.safetensors")
    refused(BadCheckpoint, "another Wan model", Order(SM89, other), tmp_path / "out")
    narrow = save(small_weights(), tmp_path / "narrow.safetensors")  # 128 wide
    refused(BuildFailed, "multiple of 256", Order(SM89, narrow), tmp_path / "out")


def test_weights_that_are_damaged_leave_no_package(tmp_path):
    config = ModelConfig(layers=1, dim=256, ffn=512, text_dim=32, clip_dim=48)
    weights = small_weights(config=config)
    weights["blocks.0.ffn.2.weight"][3, 5] = torch.nan
    broken = save(weights, tmp_path / "broken.safetensors")
    refused(
        BadCheckpoint, r"blocks\.0\.ffn\.2\.weight.*not finite", Order(SM89, broken), tmp_path / "o"
    )


def test_a_folder_that_cannot_be_written_is_a_sentence(demo, tmp_path):
    (tmp_path / "file").write_text("")
    refused(BuildFailed, "cannot be written", Order(SM89, demo.checkpoint), tmp_path / "file")


# --- the command


def test_the_command_prints_the_package(tmp_path):
    done = run(["--arch", "sm120", "--preset", "tiny", "--out", tmp_path])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "preview" / "sm120")
    assert open_package(tmp_path, SM120).manifest.model == TINY


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arch", "sm89"], "either --checkpoint or --preset"),
        (["--arch", "sm89", "--preset", "tiny", "--checkpoint", "x"], "either --checkpoint or"),
        (["--arch", "sm89", "--checkpoint", "nowhere.safetensors"], "There is no file"),
        (["--arch", "sm90", "--preset", "tiny", "--programs", "native,tensorrt"], "not for sm90"),
        (["--arch", "sm90", "--kernels-only"], "--kernels-only takes --arch alone"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, tmp_path, arguments, says):
    with pytest.raises(SystemExit) as ended:
        build_engine.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
    assert said[-1].startswith("error: ")
    assert find_packages(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, number):
    config = ModelConfig(layers=4, dim=512, ffn=2048, text_dim=64, clip_dim=160)
    source = save(small_weights(config=config), tmp_path / "model.safetensors")
    arguments = ["--arch", "sm120", "--checkpoint", source, "--out", tmp_path / "stopped"]
    command = [sys.executable, ROOT / "build_engine.py", *arguments]
    environment = os.environ | {"SCAIL_STATE": str(STATE)}
    weights = tmp_path / "stopped" / "preview" / "sm120.partial" / "weights.bin"
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (weights.exists() and weights.stat().st_size > 5e6) and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(number)
    child.communicate()
    assert child.returncode != 0
    assert find_packages(tmp_path / "stopped") == []
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stderr
    whole = make_package(Order(SM120, source), tmp_path / "whole", STATE)
    assert open_package(tmp_path / "stopped", SM120).manifest == open_package(whole).manifest


@pytest.mark.slow
def test_kernels_of_the_14b_model_that_were_compiled_ahead_are_not_compiled_again():
    """Compiles them twice, as an image does. What is compiled is written, so its time changes."""
    found = []
    for _ in range(2):
        done = run(["--arch", "sm89", "--kernels-only"])
        assert done.returncode == 0, done.stderr
        assert "kernels for sm89 in" in done.stdout
        found.append({path: path.stat().st_mtime_ns for path in (STATE / "cubins").glob("*.json")})
    assert len(found[0]) > 0 and found[0].items() <= found[1].items()


def test_a_package_has_somewhere_to_go(capsys):
    with pytest.raises(SystemExit) as ended:
        build_engine.main(["--arch", "sm89", "--preset", "tiny"])
    assert ended.value.code == 2
    assert "Give --out" in capsys.readouterr().err
