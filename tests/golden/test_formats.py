"""Golden files of formats and LoRA dialects are met, whatever their shapes, and mistakes show."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.golden.verify import recompute
from tests.support.layouts import GGUF_TYPES, LAYOUTS, gguf_of, model_in, swizzled, told

ROTATED = ("ConvRot", "W4A4")


@pytest.mark.golden
def test_the_golden_files_of_formats_and_loras_are_met(golden):
    checks = list(recompute(golden / "formats"))
    assert [check for check in checks if check.ok is not True] == []
    expected = sum(
        len(load_file(path)) for path in (golden / "formats").glob("*.expected.safetensors")
    )
    assert len(checks) == expected > 150
    exact = [check for check in checks if check.tolerance == 0]
    assert len(exact) > 50 and all(check.error == 0 for check in exact)
    files = {path.name for path in (golden / "formats").iterdir() if "expected" not in path.name}
    met = {check.check.partition(":")[0] for check in checks}
    assert files - met == {"README.md", "lora_base.safetensors"}


def failures(folder):
    return [check.check for check in recompute(folder) if check.ok is not True]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_set_of_other_shapes_is_met_in_every_layout(tmp_path, layout, prefix):
    shapes = {"blocks.3.ffn.0.weight": (192, 320), "blocks.0.self_attn.q.weight": (64, 64)}
    weights = {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    weights["blocks.0.norm3.bias"] = torch.randn(64)
    if layout in ("MXFP8", "MXFP8 in U8, untold", "NVFP4"):  # filled up
        weights["blocks.1.ffn.0.weight"] = torch.randn(150, 72)
    model = model_in(layout, weights, prefix)
    model.save(tmp_path / "set.safetensors")
    save_file({n: t.contiguous() for n, t in model.means.items()},
              tmp_path / "set.expected.safetensors")  # fmt: skip
    checks = list(recompute(tmp_path))
    assert len(checks) == len(weights)
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_a_gguf_set_is_met(tmp_path, kind):
    means = gguf_of(kind, {"blocks.2.ffn.0.weight": torch.randn(7, 96)}, tmp_path / "a.gguf")
    save_file(means, tmp_path / "a.gguf.expected.safetensors")
    assert failures(tmp_path) == []


@pytest.fixture
def formats(golden, tmp_path):
    shutil.copytree(golden / "formats", tmp_path / "formats")
    for path in (tmp_path / "formats").iterdir():
        path.chmod(0o644)
    (tmp_path / "formats").chmod(0o755)
    return tmp_path / "formats"


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    held = change(load_file(path))
    save_file({name: t.contiguous() for name, t in held.items()}, path, metadata)


def flipped(packed):
    return (packed << 4) | (packed >> 4)


Q = "blocks.0.self_attn.q"
MISTAKES = {
    "nibbles in the other order": (
        "nvfp4_lightx2v", lambda t: t | {f"{Q}.weight": flipped(t[f"{Q}.weight"])}, 1,
    ),
    "scales in their own order": (
        "mxfp8_nvfp4",
        lambda t: t | {f"{Q}.weight_scale": swizzled(t[f"{Q}.weight_scale"].view(torch.uint8))
                       .view(t[f"{Q}.weight_scale"].dtype)},
        1,
    ),
    "columns left rotated": (
        "int8",
        lambda t: t | {"blocks.0.self_attn.v.comfy_quant": told(format="int8_tensorwise")},
        1,
    ),
    "another size of groups": (
        "int8",
        lambda t: t | {"blocks.0.self_attn.v.comfy_quant": told(
            format="int8_tensorwise", convrot=True, convrot_groupsize=64)},
        1,
    ),
    "a factor of the input left out": (
        "mxfp8_nvfp4",
        lambda t: {n: v for n, v in t.items() if not n.endswith("pre_quant_scale")},
        1,
    ),
    "scales of activations taken": (
        "fp8_comfy_quant",
        lambda t: t | {f"{Q}.weight_scale": t[f"{Q}.weight_scale"] * t[f"{Q}.input_scale"]},
        1,
    ),
    "an alpha of twice": (
        "lora_loha",
        lambda t: {n: v * 2 if n.endswith("alpha") else v for n, v in t.items()},
        1,
    ),
    "magnitudes of the other axis": (
        "lora_dora_in",
        lambda t: {n: v.T if n.endswith("dora_scale") else v for n, v in t.items()},
        1,
    ),
    "a tensor that is missing": (
        "lora_diff", lambda t: {n: v for n, v in t.items() if "modulation" not in n}, 1,
    ),
    "a change too many": (
        "lora_diff",
        lambda t: t | {"diffusion_model.time_projection.1.diff": torch.ones(192, 32)},
        1,
    ),
    "a file that is damaged": (
        "nvfp4_lightx2v", lambda t: t | {f"{Q}.input_global_scale": torch.zeros(())}, None,
    ),
}  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_file_or_of_a_reader_shows(formats, case):
    name, change, count = MISTAKES[case]
    rewrite(formats / f"{name}.safetensors", change)
    failed = failures(formats)
    assert failed
    assert all(check.startswith(name) for check in failed)
    if count is not None:
        assert len(failed) == count


@pytest.mark.golden
def test_a_result_without_its_file_and_a_lora_without_weights_fail(formats):
    (formats / "int8.safetensors").unlink()
    assert failures(formats) == ["int8.expected.safetensors: no int8.safetensors or int8.pt or "
                                 "int8.gguf beside it"]  # fmt: skip
    (formats / "lora_base.safetensors").unlink()
    without = [check for check in failures(formats) if "no weights beside it" in check]
    assert len(without) == len([*formats.glob("lora_*.expected.safetensors")])


@pytest.mark.golden
def test_checkpoints_that_no_result_lies_beside_are_told_as_unknown(golden, tmp_path):
    for name in ("mixed.gguf", "lora_sat.pt"):
        shutil.copy(golden / "formats" / name, tmp_path / name)
    assert {(check.check, check.ok) for check in recompute(tmp_path)} == {
        ("mixed.gguf", None), ("lora_sat.pt", None),
    }  # fmt: skip
