"""LoRAs merge by their formula, in FP32, and a file of another model is refused."""

import logging

import pytest
import torch
from checkpoints import save, small_weights

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora

RANK = 4


def merged(tmp_path, lora, strength=1.0, weights=None):
    path = save(weights or small_weights(), tmp_path / "model.safetensors")
    lora_path = save(lora, tmp_path / "lora.safetensors")
    checkpoint = Checkpoint(path, loras=[Lora(lora_path, strength)])
    out = {}
    for name in checkpoint:
        out[name] = torch.full(checkpoint.shape(name), torch.nan)
        checkpoint.read_into(name, out[name])
    return out


def pair(module, rows, columns, down="lora_down", up="lora_up"):
    return {
        f"diffusion_model.{module}.{down}.weight": torch.randn(RANK, columns).bfloat16(),
        f"diffusion_model.{module}.{up}.weight": torch.randn(rows, RANK).bfloat16(),
    }


@pytest.mark.parametrize("names", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("alpha", [None, 8.0])
@pytest.mark.parametrize("strength", [1.0, 0.6, -1.0])
def test_a_pair_is_added_with_alpha_over_rank_and_strength(tmp_path, names, alpha, strength):
    weights = small_weights()
    lora = pair("blocks.1.ffn.0", 192, 128, *names)
    down, up = (tensor.float() for tensor in lora.values())
    if alpha is not None:
        lora["diffusion_model.blocks.1.ffn.0.alpha"] = torch.tensor(alpha)
    got = merged(tmp_path, lora, strength)
    factor = strength * (1.0 if alpha is None else alpha / RANK)
    want = weights.pop("blocks.1.ffn.0.weight") + factor * (up @ down)
    assert torch.allclose(got["blocks.1.ffn.0.weight"], want, atol=1e-5)
    assert all(torch.equal(got[name], weight) for name, weight in weights.items())


def test_differences_of_weights_biases_and_tables_are_added(tmp_path):
    weights = small_weights()
    lora = {
        "diffusion_model.blocks.0.norm3.diff": torch.randn(128),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(128).half(),
        "diffusion_model.head.modulation.diff": torch.randn(1, 2, 128),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.randn(128),
    }
    got = merged(tmp_path, lora, 0.5)
    for name, key in (
        ("blocks.0.norm3.weight", "diffusion_model.blocks.0.norm3.diff"),
        ("blocks.0.norm3.bias", "diffusion_model.blocks.0.norm3.diff_b"),
        ("head.modulation", "diffusion_model.head.modulation.diff"),
        ("blocks.0.self_attn.q.bias", "diffusion_model.blocks.0.self_attn.q.diff_b"),
    ):
        assert torch.allclose(got[name], weights[name] + 0.5 * lora[key].float(), atol=1e-6), name


def test_two_loras_add_up_and_one_weight_may_have_a_pair_and_a_difference(tmp_path):
    weights = small_weights()
    one = pair("blocks.0.cross_attn.k_img", 128, 128)
    two = {"diffusion_model.blocks.0.cross_attn.k_img.diff": torch.randn(128, 128)} | one
    down, up = (tensor.float() for tensor in one.values())
    path = save(weights, tmp_path / "model.safetensors")
    loras = [
        Lora(save(one, tmp_path / "1.safetensors"), 0.25),
        Lora(save(two, tmp_path / "2.safetensors")),
    ]
    got = torch.empty(128, 128)
    name = "blocks.0.cross_attn.k_img"
    Checkpoint(path, loras=loras).read_into(f"{name}.weight", got)
    want = weights[f"{name}.weight"] + 1.25 * (up @ down) + two[f"diffusion_model.{name}.diff"]
    assert torch.allclose(got, want, atol=1e-5)


def test_the_scale_of_fp8_weights_is_not_applied_to_the_lora(tmp_path):
    weights = small_weights()
    name = "blocks.0.self_attn.o.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights["blocks.0.self_attn.o.scale_weight"] = torch.tensor(0.5)
    lora = pair("blocks.0.self_attn.o", 128, 128)
    down, up = (tensor.float() for tensor in lora.values())
    got = merged(tmp_path, lora, weights=weights)
    assert torch.allclose(got[name], weights[name].float() * 0.5 + up @ down, atol=1e-5)


def test_the_patch_embedding_of_an_image_to_video_lora_is_left_out_with_a_warning(tmp_path, caplog):
    lora = {"diffusion_model.patch_embedding.diff": torch.ones(128, 36, 1, 2, 2)}
    lora |= pair("blocks.0.self_attn.q", 128, 128)
    with caplog.at_level(logging.WARNING):
        got = merged(tmp_path, lora)
    assert torch.equal(got["patch_embedding.weight"], small_weights()["patch_embedding.weight"])
    assert "patch_embedding.weight is left out" in caplog.text


WRONG = {
    "another model's": (pair("blocks.9.ffn.0", 192, 128), r"changes blocks\.9\.ffn\.0.*another"),
    "half a pair": (
        dict([next(iter(pair("blocks.0.ffn.0", 192, 128).items()))]),
        r"only half of the pair for blocks\.0\.ffn\.0",
    ),
    "of another width": (pair("blocks.0.ffn.0", 192, 64), r"cannot be added.*\[192, 128\]"),
    "of two ranks": (
        pair("blocks.0.ffn.0", 192, 128)
        | {"diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.ones(192, RANK + 1)},
        r"cannot be added to blocks\.0\.ffn\.0\.weight",
    ),
    "no LoRA": ({"blocks.0.ffn.0.weight": torch.ones(2)}, r"is no part of a LoRA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, case):
    lora, message = WRONG[case]
    with pytest.raises(BadCheckpoint, match=message):
        merged(tmp_path, lora)
