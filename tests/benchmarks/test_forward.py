"""The forward of random weights: built as a package is, right before it is timed, dry on a CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.denoiser.forward import (
    DRY_SIZES,
    ForwardRow,
    blocks,
    drawn_scene,
    forward_figures,
    forward_table,
    measure_sizes,
    plain_block,
    prepared,
)
from benchmarks.denoiser.random_package import WEIGHTS, RandomWeights, drawn, random_package
from benchmarks.timing import WrongResult
from engine.build.make import Order, weights_form
from engine.config import SCAIL_14B, TINY, ModelConfig
from engine.denoise.block import LINEARS, BlockWeights, Weight
from engine.package.folder import open_package
from kernels.arch import SM89, SM90
from kernels.fp8 import LIMITS, rotate
from tests.support.built import tiny_package

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path):
    with prepared(None, tmp_path / "found.jsonl", dry=True) as made:
        yield made


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# --- the package that is no file


@pytest.mark.parametrize("arch", [SM89, SM90], ids=lambda arch: arch.name)
def test_names_shapes_and_dtypes_are_those_of_a_build(arch):
    built = open_package(tiny_package(arch)).manifest
    made = random_package(TINY, arch).manifest
    assert (made.padded_ffn, made.weights) == (built.padded_ffn, built.weights)
    real, own = ({e.name: (e.dtype, e.shape) for e in m.tensors} for m in (built, made))
    assert own == real


def test_at_full_size_it_has_as_many_bytes_as_a_build():
    """A synthetic checkpoint became 16,668,134,656 bytes (benchmarks/results/README.md), before
    blocks had the multipliers behind GELU.
    """
    last = max(random_package(SCAIL_14B, SM90).manifest.tensors, key=lambda entry: entry.offset)
    assert last.offset + last.nbytes == pytest.approx(16_668_134_656 + 40 * 13824 * 4, rel=1e-4)


def test_a_tensor_depends_on_its_name_alone_and_uses_its_codes():
    package = random_package(TINY, SM89)
    weights = RandomWeights(package, CPU)
    wanted = ["blocks.1.up.q", "blocks.0.up.q", "blocks.0.down.q", "blocks.0.up.s"]
    held = weights.read(wanted)
    assert list(held) == [name for name in package.names if name in wanted]
    assert torch.equal(held["blocks.0.up.q"], package.read("blocks.0.up.q"))
    assert not torch.equal(held["blocks.0.up.q"], held["blocks.1.up.q"])
    for name in wanted[1:3]:
        codes = held[name]
        assert codes.float().abs().max() > 0.8 * LIMITS[codes.dtype]
    matrix = held["blocks.0.up.q"].float() * held["blocks.0.up.s"][:, None]
    assert matrix.std().item() == pytest.approx(TINY.dim**-0.5, rel=0.02)


def test_all_tensors_are_finite_and_norms_outside_the_blocks_are_near_one():
    package = random_package(TINY, SM90)
    for entry in package.manifest.tensors:
        tensor = drawn(package, entry.name, CPU)
        assert tensor.dtype == getattr(torch, entry.dtype)
        assert tuple(tensor.shape) == entry.shape
        assert tensor.float().isfinite().all()
        if entry.name.endswith(("proj.0.weight", "proj.4.weight")):
            assert tensor.mean().item() == pytest.approx(1, abs=0.05), entry.name


# --- what is compared


def test_the_plain_block_stands_for_the_weights_of_ours(place):
    scene = drawn_scene(place, DRY_SIZES[0])
    plain = plain_block(place, scene)
    names = {"ffn.0": "up", "ffn.2": "down", "self_attn.o": "o", "cross_attn.q": "cross_q"}
    for name, field in names.items():
        linear, own = plain.get_submodule(name), getattr(scene.weights, field)
        torch.testing.assert_close(linear.weight, rotate(own.rows.dequantize()))
        assert torch.equal(linear.bias, own.bias)
    assert torch.equal(plain.norm3.weight, scene.weights.norm3_scale + 1)
    v = rotate(scene.weights.qkv.rows.dequantize())[2 * TINY.dim :]
    torch.testing.assert_close(plain.self_attn.v.weight, v)


def test_a_block_that_is_right_is_timed_in_turns_with_the_plain_one(place):
    order = []

    def clock(work):
        order.append(work)
        return float(len(order))

    ours, plain = blocks(replace(place, clock=clock), DRY_SIZES[0])
    assert len(order) == 6 and order[:2] == order[2:4] == order[4:]
    assert (ours.what, plain.what) == ("our block", "plain block")
    assert 0 < ours.error < 0.06
    assert (ours.seconds, plain.seconds) == (TINY.layers * 3e-3, TINY.layers * 4e-3)


def wrong(ops, name):
    """Breaks one operation: its result is that of other tokens."""
    right = getattr(ops, name)
    return replace(ops, **{name: lambda *given: right(*given).flip(0)})


@pytest.mark.parametrize("name", ["attention", "cross_attention", "gemm", "gemm_gelu"])
def test_a_block_that_is_wrong_gets_no_time(place, name):
    with pytest.raises(WrongResult, match=r"64x96x5: a block is off by \d"):
        list(blocks(replace(place, ops=wrong(place.ops, name)), DRY_SIZES[0]))


# --- the suite


def test_the_dry_run_goes_through_all_steps_and_gives_no_times(tmp_path, capsys):
    run.main(["forward", "--dry", "--out", str(tmp_path / "found.jsonl")])
    found = lines(tmp_path / "found.jsonl")
    *said, last = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in said[: len(found)]] == found
    assert [line["step"] for line in found] == ["machine"] + 4 * ["forward"]
    assert [line["what"] for line in found[1:]] == [
        "launched", "graph", "our block", "plain block",
    ]  # fmt: skip
    assert {line["size"] for line in found[1:]} == {"64x96x5"}
    assert all(line["seconds"] is None for line in found[1:])
    suite = json.loads(last)["suites"]["forward"]
    assert len(suite["rows"]) == 4 and suite["figures"] == []


def test_what_has_times_is_a_figure_and_memory_stands_beside_the_plan():
    rows = [
        ForwardRow("sm90", "512x896x81", "launched", 3.3, None, 21_000_000_000, 21_900_000_000),
        ForwardRow("sm90", "512x896x81", "graph", 3.1, None, 22_000_000_000, 21_900_000_000),
        ForwardRow("sm90", "512x896x81", "our block", 3.0, 0.06),
        ForwardRow("sm90", "512x896x81", "plain block", None),
    ]
    assert [(figure.name, figure.value) for figure in forward_figures(rows)] == [
        ("sm90 512x896x81 launched", 3.3),
        ("sm90 512x896x81 graph", 3.1),
        ("sm90 512x896x81 our block", 3.0),
    ]
    _, launched, _, block, _ = (line.split() for line in forward_table(rows).splitlines())
    assert launched == ["512x896x81", "sm90", "launched", "3.30", "21000", "21900"]
    assert block == ["512x896x81", "sm90", "our", "block", "3.00", "0.060"]


def test_a_forward_that_is_not_finite_is_no_result(place):
    broken = replace(place, ops=replace(place.ops, gemm_residual=blow_up))
    with pytest.raises(WrongResult, match=r"64x96x5, launched: not finite"):
        measure_sizes(broken)


def blow_up(rows, weight, bias, gate, x):
    x.fill_(float("inf"))


def test_a_forward_that_gives_another_result_each_time_is_no_result(place):
    calls = []

    def uneven(x):
        calls.append(x)
        return place.ops.rms_inverse(x) * len(calls)

    broken = replace(place, ops=replace(place.ops, rms_inverse=uneven))
    with pytest.raises(WrongResult, match=r"launched: two equal runs differ"):
        measure_sizes(broken)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("program", [["run.py", "forward"], ["run.py", "gpu"], ["first_hour.py"]])
def test_without_a_gpu_it_says_how_to_run_dry(program, tmp_path):
    """Runs in a folder that is not the project's."""
    script, *suite = program
    command = [sys.executable, str(ROOT / "benchmarks" / script), *suite, "--out", "found"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if script == "first_hour.py" else 1)  # refused, or failed
    assert "there is no gpu here. use --dry" in done.stderr.lower()


def test_the_form_of_the_random_weights_is_the_default_of_a_build():
    assert weights_form(Order(SM89, Path("model.safetensors"))) == WEIGHTS == "int8"
    manifest = random_package(ModelConfig(layers=1, dim=256, ffn=512), SM89).manifest
    linears = {entry.name for entry in manifest.tensors if entry.name.endswith(".q")}
    assert {entry.dtype for entry in manifest.tensors if entry.name in linears} == {"int8"}
    assert {f"{name}.q" for name in manifest.rotation.linears} == linears
    assert len(linears) == len(LINEARS)
    assert Weight in {field.type for field in BlockWeights.__dataclass_fields__.values()}
