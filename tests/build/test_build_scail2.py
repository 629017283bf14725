"""A build makes packages of SCAIL-2 for every architecture, masks and merged LoRAs in place."""

import json

import pytest
import torch
from safetensors.torch import save_file

import build_engine
from engine.build.export import export
from engine.build.make import Order, make_package
from engine.build.segments import DEPLOY, SEGMENTS, Segment
from engine.config import SCAIL2_14B, TINY, TINY_SCAIL2, state_dir
from engine.demo.presets import PRESETS, preset_of
from engine.demo.weights import demo_weights, scail2_weights
from engine.errors import BadCheckpoint, Unavailable
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from engine.package.contents import expected_tensors
from engine.package.folder import open_package
from engine.package.manifest import MergedLora
from engine.package.merged import NeededLora, check_recipe_loras, served_modes
from engine.package.search import find_packages
from kernels.arch import SM89, SM90, SM120
from tests.support.built import tiny_package
from tests.support.checkpoints import save, small_weights, to_sat
from tests.support.compiled import STATE, each_arch

MASKS = "patch_embedding_mask"


@pytest.fixture(scope="module")
def weights():
    return scail2_weights(state_dir()).checkpoint


def read(checkpoint, name):
    out = torch.empty(checkpoint.shape(name))
    checkpoint.read_into(name, out)
    return out


# --- what is built


@each_arch
def test_a_tiny_package_is_built_for_every_architecture(arch, weights):
    package = open_package(tiny_package(arch, kind="scail2"), arch)
    package.verify()
    manifest = package.manifest
    assert (manifest.model_kind, manifest.model) == ("scail2", TINY_SCAIL2)
    assert manifest.weights == "int8" and len(manifest.rotation.linears) == 16
    assert package.path.parts[-2:] == ("scail2", arch.name)
    kernels = {kernel.name for kernel in open_package(tiny_package(arch), arch).kernels}
    assert {kernel.name for kernel in package.kernels} == kernels  # the blocks are the same


def test_the_embedding_of_masks_is_outside_the_blocks_in_full(weights):
    package, checkpoint = open_package(tiny_package(SM90, kind="scail2")), Checkpoint(weights)
    names = package.names
    assert names.index(f"{MASKS}.bias") < names.index("patch_embedding_pose.bias")
    assert names.index(f"{MASKS}.weight") < names.index("blocks.0.text.q")
    weight = package.read(f"{MASKS}.weight")
    assert (weight.dtype, weight.shape) == (torch.float32, (256, 28 * 4))
    assert torch.equal(weight, read(checkpoint, f"{MASKS}.weight").flatten(1))
    assert torch.equal(package.read(f"{MASKS}.bias"), read(checkpoint, f"{MASKS}.bias"))


def test_the_real_model_keeps_it_in_fp32_as_the_other_embeddings():
    made = expected_tensors(SCAIL2_14B, SCAIL2_14B.ffn, "int8")
    assert made[f"{MASKS}.weight"] == ((5120, 112), ("float32",))
    assert made["patch_embedding.weight"].dtypes == ("float32",)


@pytest.mark.parametrize("layout", ["sat", "WanGP"])
def test_every_layout_of_names_makes_the_same_package(layout, tmp_path):
    held = small_weights(config=TINY_SCAIL2)
    plain = save(held, tmp_path / "plain.safetensors")
    if layout == "sat":
        other = tmp_path / "fsdp2_rank_0000_checkpoint.pt"
        torch.save({"module": to_sat(held)}, other)
    else:
        renamed = {
            name.replace("patch_embedding_mask", "mask_patch_embedding").replace(
                "patch_embedding_pose", "pose_patch_embedding"
            ): weight
            for name, weight in held.items()
        }
        other = save(renamed, tmp_path / "scail2_14B_mbf16.safetensors")
    one, two = (
        open_package(make_package(Order(SM90, path), tmp_path / path.stem, STATE))
        for path in (plain, other)
    )
    assert one.manifest.tensors == two.manifest.tensors


# --- LoRAs


LINEARS = [f"{side}_attn.{one}" for side in ("self", "cross") for one in "qkvo"] + [
    "ffn.0",
    "ffn.2",
]


def lora(path, rank, modules=LINEARS, seed=1, **more):
    """A LoRA file of pairs for linears of both blocks."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for n in range(TINY.layers):
        for module in modules:
            rows, columns = {"ffn.0": (512, 256), "ffn.2": (256, 512)}.get(module, (256, 256))
            stem = f"diffusion_model.blocks.{n}.{module}"
            found[f"{stem}.lora_down.weight"] = torch.randn(rank, columns, generator=draw) * 0.05
            found[f"{stem}.lora_up.weight"] = torch.randn(rows, rank, generator=draw) * 0.05
    save_file(found | more, path)
    return path


def distillation(path, rank=64):
    """Pairs for all linears and differences beside them, as published ones have."""
    changes = {
        "diffusion_model.blocks.0.norm3.diff": torch.full((256,), 0.01),
        "diffusion_model.patch_embedding.diff": torch.zeros(256, 36, 1, 2, 2),
        f"diffusion_model.{MASKS}.diff_b": torch.full((256,), 0.5),
    }
    return lora(path, rank, [*LINEARS, "cross_attn.k_img", "cross_attn.v_img"], 2, **changes)


@pytest.fixture(scope="module")
def turbo(weights, tmp_path_factory):
    """A package as the fast recipe wants it, and the files that were merged."""
    folder = tmp_path_factory.mktemp("turbo")
    loras = (
        (distillation(folder / "steps.safetensors"), 0.8),
        (lora(folder / "wan2.1_SCAIL_2_DPO_lora_bf16.safetensors", 128), 1.0),
    )
    order = Order(SM90, weights, loras, weights="fp8")  # whose rows lie as they are
    return open_package(make_package(order, folder / "out", STATE)), loras


def test_distillation_and_dpo_are_merged_and_told_with_strength_role_and_rank(turbo, weights):
    package, loras = turbo
    assert [(one.file, one.lora) for one in package.manifest.sources] == [
        (weights.name, None),
        ("steps.safetensors", MergedLora(0.8, "distill", 64)),
        ("wan2.1_SCAIL_2_DPO_lora_bf16.safetensors", MergedLora(1.0, "dpo", 128)),
    ]
    checkpoint = Checkpoint(weights, loras=[Lora(*one) for one in loras])
    bias = package.read(f"{MASKS}.bias")
    assert torch.equal(bias, read(checkpoint, f"{MASKS}.bias"))
    assert torch.allclose(bias - read(Checkpoint(weights), f"{MASKS}.bias"), torch.tensor(0.4))
    for field, name in (("o", "self_attn.o"), ("cross_q", "cross_attn.q"), ("down", "ffn.2")):
        stored = package.read(f"blocks.1.{field}.q").float()
        got = stored * package.read(f"blocks.1.{field}.s")[:, None]
        want = read(checkpoint, f"blocks.1.{name}.weight")
        plain = read(Checkpoint(weights), f"blocks.1.{name}.weight")
        assert (got - want).norm() < 0.04 * want.norm() < 0.5 * (got - plain).norm()


def test_recipes_are_checked_against_what_a_build_wrote(turbo):
    manifest = turbo[0].manifest
    check_recipe_loras([NeededLora("distill", 64, 0.8), NeededLora("dpo", None, 1.0)], manifest)
    assert served_modes(manifest) == ("animation", "replacement")
    with pytest.raises(Unavailable, match=r"--checkpoint scail2_tiny_bf16\.safetensors --out DIR"):
        check_recipe_loras([], manifest)


def test_a_package_with_a_relight_lora_serves_replacement_alone(weights, tmp_path):
    relight = lora(tmp_path / "relighting-lora.safetensors", 128)
    order = Order(SM90, weights, ((relight, 1.0),))
    package = open_package(make_package(order, tmp_path / "out", STATE))
    assert package.manifest.loras[0].lora == MergedLora(1.0, "relight", 128)
    assert served_modes(package.manifest) == ("replacement",)


def test_a_lora_of_scail_2_is_refused_for_preview_before_anything_is_written(tmp_path):
    dpo = lora(tmp_path / "wan2.1_SCAIL_2_DPO_lora_bf16.safetensors", 8)
    order = Order(SM90, demo_weights(state_dir()).checkpoint, ((dpo, 1.0),))
    with pytest.raises(BadCheckpoint, match="says that it is for SCAIL-2"):
        make_package(order, tmp_path / "out", STATE)
    assert not (tmp_path / "out").exists()


# --- TensorRT


@pytest.mark.parametrize(
    "arch", [pytest.param(SM89, marks=pytest.mark.slow), SM120], ids=lambda arch: arch.name
)
def test_both_programs_are_built_and_the_plans_are_those_of_any_model_of_this_width(
    arch, weights, tmp_path
):
    """Masks and further pictures are tokens before a block sees them."""
    order = Order(arch, weights, programs=("native", "tensorrt"))
    package = open_package(make_package(order, tmp_path, STATE))
    package.verify()
    assert (package.manifest.model_kind, package.manifest.weights) == ("scail2", "fp8")
    plans = package.manifest.tensorrt["plans"]
    assert plans.keys() == SEGMENTS.keys() == {"block", "pre", "post", "context"}
    for name, plan in plans.items():
        segment = Segment(name, TINY, DEPLOY)
        assert plan["inputs"] == [list(port.record()) for port in segment.inputs]
        assert len(package.file(f"plans/{plan['file']}")) == plan["bytes"]
    export(Segment("pre", TINY, DEPLOY), tmp_path / "pre.onnx")
    assert package.file("plans/pre.onnx") == (tmp_path / "pre.onnx").read_bytes()


# --- the command and the preset


def test_the_command_builds_both_presets_beside_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SCAIL_STATE", str(STATE))
    for name in ("tiny", "tiny-scail2"):
        build_engine.main(["--arch", "sm90", "--preset", name, "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / kind / "sm90") for kind in ("preview", "scail2")
    ]
    assert [held.kind for held in find_packages(tmp_path)] == ["preview", "scail2"]
    report = open_package(tmp_path / "scail2").file("report.json")
    assert json.loads(report)["tensors"]


def test_a_preset_is_known_by_its_model():
    assert preset_of(TINY) is PRESETS["tiny"]
    assert preset_of(TINY_SCAIL2) is PRESETS["tiny-scail2"]
    assert preset_of(SCAIL2_14B) is None


def test_the_tiny_weights_are_the_same_each_time_and_share_the_models_beside_them(tmp_path):
    one, two = (scail2_weights(tmp_path / name) for name in "ab")
    assert one.checkpoint.read_bytes() == two.checkpoint.read_bytes()
    assert one.models == demo_weights(tmp_path / "a").models
    assert Checkpoint(one.checkpoint).config == TINY_SCAIL2
    assert scail2_weights(tmp_path / "a") == one
