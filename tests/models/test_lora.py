"""LoRAs merge by their formula, in FP32, and a file of another model is refused."""

import logging

import pytest
import torch

from engine.errors import BadCheckpoint, BadRequest
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from tests.support.checkpoints import save, small_weights
from tests.support.loras import ONE, RANK, merged, pair, with_alpha


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
    "empty": ({}, r"lora\.safetensors changes nothing: none of its 0 tensors"),
    "only for other inputs": (
        {"diffusion_model.patch_embedding.diff": torch.ones(128, 36, 1, 2, 2)},
        "changes nothing: none of its 1 tensors",
    ),
    "an alpha alone": (
        {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(4.0)},
        r"blocks\.0\.ffn\.0\.alpha changes nothing",
    ),
    "an alpha alone for nothing known": (
        {"diffusion_model.elsewhere.alpha": torch.tensor(4.0)},
        r"elsewhere\.alpha changes nothing",
    ),
    "an alpha alone beside a pair": (
        pair("blocks.0.ffn.0", 192, 128) | {"blocks.1.ffn.0.alpha": torch.tensor(4.0)},
        r"blocks\.1\.ffn\.0\.alpha changes nothing",
    ),
    "two alphas": (with_alpha(torch.ones(2)), r"ffn\.0\.alpha \[2\] over the rank 4 of"),
    "no alpha in it": (with_alpha(torch.ones(0)), r"ffn\.0\.alpha \[0\] over the rank 4 of"),
    "an alpha that is NaN": (with_alpha(torch.tensor(torch.nan)), r"alpha makes the factor nan"),
    "an infinite alpha": (with_alpha(torch.tensor(torch.inf)), r"alpha makes the factor inf"),
    "a complex alpha": (with_alpha(torch.tensor(1j)), r"alpha makes the factor nan"),
    "an alpha beyond FP32": (
        with_alpha(torch.tensor(1e300, dtype=torch.float64)),
        r"alpha makes the factor 2\.5e\+299, a finite one",
    ),
    "of rank 0": (
        {name: t[:0] if "down" in name else t[:, :0] for name, t in ONE.items()},
        r"cannot be added to blocks\.0\.ffn\.0\.weight",
    ),
    "of rank 0 with an alpha": (
        {name: t[:0] if "down" in name else t[:, :0] for name, t in ONE.items()}
        | {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(4.0)},
        r"over the rank 0 of .*lora_down\.weight is no factor",
    ),
    "without axes": (
        {name: torch.tensor(1.0) for name in ONE}
        | {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(4.0)},
        r"over the rank 0 of .*lora_down\.weight is no factor",
    ),
    "of both kinds at once": (
        ONE | pair("blocks.0.ffn.0", 192, 128, "lora_A", "lora_B"),
        r"lora_(A|down)\.weight and .*lora_(A|down)\.weight mean the same|"
        r"lora_(B|up)\.weight and .*lora_(B|up)\.weight mean the same",
    ),
    "of integers": (
        {name: t.to(torch.int8) for name, t in ONE.items()},
        r"lora_down\.weight is stored as torch\.int8",
    ),
    "two adapters": (
        pair("blocks.0.ffn.0", 192, 128, "lora_A.one", "lora_B.one")
        | pair("blocks.1.ffn.0", 192, 128, "lora_A.two", "lora_B.two"),
        "holds the adapters one, two; a file with one",
    ),
    "a bias without its pair": (
        {"diffusion_model.blocks.0.ffn.0.lora_B.bias": torch.ones(192)},
        r"lora_B\.bias belongs to a pair that is not",
    ),
    "a core": (
        ONE | {"diffusion_model.blocks.0.ffn.0.lora_mid.weight": torch.ones(4, 4, 1, 1)},
        "belongs to LoCon with a core",
    ),
    "of a text encoder": (
        {f"lora_te_{k.removeprefix('diffusion_model.')}": v for k, v in ONE.items()},
        "changes lora_te_blocks.*another model",
    ),
    "joined names of another model": (
        {"lora_unet_down_blocks_0.lora_down.weight": torch.ones(4, 128)}
        | {"lora_unet_down_blocks_0.lora_up.weight": torch.ones(192, 4)},
        "changes down_blocks_0, which this model does not have",
    ),
    "a table for a module without one": (
        {"diffusion_model.blocks.0.ffn.0.diff_m": torch.ones(192)},
        r"changes blocks\.0\.ffn\.0\.modulation, which",
    ),
    "no LoRA": ({"blocks.0.ffn.0.weight": torch.ones(2)}, r"is no part of a LoRA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_lora_that_does_not_fit_is_refused(tmp_path, case):
    lora, message = WRONG[case]
    with pytest.raises(BadCheckpoint, match=message):
        merged(tmp_path, lora)


@pytest.mark.parametrize("strength", [torch.nan, torch.inf, -torch.inf, 1e39, 10**400])
def test_a_strength_that_is_no_fp32_number_is_refused(tmp_path, strength):
    with pytest.raises(BadRequest, match=r"strength of lora\.safetensors is .*finite number is"):
        Lora(save(ONE, tmp_path / "lora.safetensors"), strength)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["pair", "diff"])
def test_a_lora_with_values_that_are_not_finite_is_named_and_not_the_model(tmp_path, odd, kind):
    module = "diffusion_model.blocks.0.ffn.0"
    lora = dict(ONE) if kind == "pair" else {f"{module}.diff": torch.zeros(192, 128)}
    name = next(iter(lora))
    lora[name] = lora[name].clone()
    lora[name][1, 2] = odd
    with pytest.raises(BadCheckpoint, match=rf"^lora\.safetensors: blocks\.0.*once {name}"):
        merged(tmp_path, lora)
    weights = small_weights()
    weights["blocks.0.ffn.0.weight"][0, 0] = torch.nan
    with pytest.raises(
        BadCheckpoint, match=r"^model\.safetensors: blocks\.0\.ffn\.0\.weight holds"
    ):
        merged(tmp_path, lora, weights=weights)


def test_a_strength_that_carries_a_weight_beyond_fp32_is_told(tmp_path):
    with pytest.raises(BadCheckpoint, match=r"with strength 3e\+38\. Use a smaller strength"):
        merged(tmp_path, ONE, 3e38)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_reading_or_opening_twice_merges_once(tmp_path, kind):
    weights = small_weights()  # FP32: what is mapped needs no conversion
    model = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(weights, model)
    else:
        save(weights, model)
    lora = Lora(save(ONE, tmp_path / "lora.safetensors"))
    down, up = (tensor.float() for tensor in ONE.values())
    want = weights["blocks.0.ffn.0.weight"] + up @ down
    for _ in range(2):
        checkpoint = Checkpoint(model, loras=[lora])
        for _ in range(2):
            got = torch.empty(192, 128)
            checkpoint.read_into("blocks.0.ffn.0.weight", got)
            assert torch.allclose(got, want, atol=1e-5)


def test_differences_may_lack_or_have_leading_ones(tmp_path):
    table, norm = torch.randn(6, 128), torch.randn(1, 128)
    lora = {
        "blocks.1.diff_m": table,
        "blocks.0.norm3.diff": norm,
        "blocks.0.norm3.diff_b": norm * 2,
    }
    weights, got = small_weights(), merged(tmp_path, lora)
    for name, change in (
        ("blocks.1.modulation", table[None]),
        ("blocks.0.norm3.weight", norm[0]),
        ("blocks.0.norm3.bias", norm[0] * 2),
    ):
        assert torch.allclose(got[name], weights[name] + change, atol=1e-6), name


def test_a_file_whose_alphas_are_all_0_is_told(tmp_path, caplog):
    got = merged(tmp_path, with_alpha(torch.tensor(0.0)))["blocks.0.ffn.0.weight"]
    assert torch.equal(got, small_weights()["blocks.0.ffn.0.weight"])
    assert "every alpha in it is 0, so it changes nothing" in caplog.text


def test_the_bias_of_a_pair_is_added_with_the_factor_of_the_pair(tmp_path):
    bias, module = torch.randn(192), "diffusion_model.blocks.0.ffn.0"
    lora = ONE | {f"{module}.lora_B.bias": bias, f"{module}.alpha": torch.tensor(8.0)}
    got = merged(tmp_path, lora, 0.5)["blocks.0.ffn.0.bias"]
    want = small_weights()["blocks.0.ffn.0.bias"] + 0.5 * 2 * bias
    assert torch.allclose(got, want, atol=1e-6)


def test_an_alpha_beside_a_difference_is_told_and_scales_nothing(tmp_path, caplog):
    module = "diffusion_model.blocks.0.norm3"
    lora = {f"{module}.diff": torch.ones(128), f"{module}.alpha": torch.tensor(8.0)}
    got = merged(tmp_path, lora)["blocks.0.norm3.weight"]
    assert torch.allclose(got, small_weights()["blocks.0.norm3.weight"] + 1)
    assert f"{module}.alpha is not used" in caplog.text


def test_entries_of_a_pytorch_file_that_are_no_tensors_are_told(tmp_path, caplog):
    path = tmp_path / "lora.pt"
    torch.save(ONE | {"epoch": 3}, path)
    model = save(small_weights(), tmp_path / "m.safetensors")
    Checkpoint(model, loras=[Lora(path)])
    assert "epoch are no tensors" in caplog.text
    torch.save(ONE | {"diffusion_model.blocks.0.ffn.0.alpha": 8.0}, path)
    with pytest.raises(BadCheckpoint, match=r"ffn\.0\.alpha is no tensor, one is expected"):
        Checkpoint(model, loras=[Lora(path)])
