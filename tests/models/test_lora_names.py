"""Every way in which programs name the tensors of a LoRA leads to the weight that is meant."""

import pytest
import torch
from safetensors.torch import load_file

from engine.config import TINY
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from tests.support.checkpoints import save, small_weights
from tests.support.loras import RANK, merged


def dotted(prefix):
    return lambda module: prefix + module


def joined(prefix):
    return lambda module: prefix + module.replace(".", "_")


NAMES = {
    "musubi": joined("lora_unet_"),
    "Wan-Fun": joined("lora_unet__"),
    "LyCORIS": joined("lycoris_"),
    "PEFT": dotted("base_model.model."),
    "PEFT around diffusers": dotted("base_model.model.transformer."),
    "diffsynth": dotted("pipe.dit."),
    "a part": dotted("dit."),
    "ComfyUI": dotted("model.diffusion_model."),
    "kohya of a dotted kind": dotted("unet."),
    "distributed": dotted("module."),
    "compiled": dotted("_orig_mod."),
    "bare": dotted(""),
}
MODULES = [
    "blocks.1.cross_attn.k_img",
    "time_embedding.2",
    "text_embedding.2",
    "blocks.0.self_attn.q",
]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_down.weight", "lora_up.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora_A", "lora_B"),
    ],
)
def test_every_way_to_name_a_module_is_merged(tmp_path, names, down, up):
    weights, lora, want = small_weights(), {}, {}
    for module in MODULES:
        key = NAMES[names](module)
        lora[f"{key}.{down}"] = torch.randn(RANK, 128)
        lora[f"{key}.{up}"] = torch.randn(128, RANK)
        lora[f"{key}.alpha"] = torch.tensor(2.0)
        product = lora[f"{key}.{up}"] @ lora[f"{key}.{down}"]
        want[f"{module}.weight"] = weights[f"{module}.weight"] + 2 / RANK * product
    got = merged(tmp_path, lora)
    for name, weight in weights.items():
        assert torch.allclose(got[name], want.get(name, weight), atol=1e-5), name


def test_a_pair_whose_ending_is_part_of_the_modules_last_name_is_merged(tmp_path):
    lora = {
        "unet.blocks.0.self_attn.q_lora.down.weight": torch.randn(RANK, 128),
        "unet.blocks.0.self_attn.q_lora.up.weight": torch.randn(128, RANK),
    }
    down, up = lora.values()
    want = small_weights()["blocks.0.self_attn.q.weight"] + up @ down
    assert torch.allclose(merged(tmp_path, lora)["blocks.0.self_attn.q.weight"], want, atol=1e-5)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_tables_norms_and_biases_have_other_endings_too(tmp_path, prefix):
    join = joined(prefix) if prefix.endswith("_") else dotted(prefix)
    weights = small_weights()
    table, norm, bias = torch.randn(1, 6, 128), torch.randn(128), torch.randn(128)
    lora = {
        f"{join('blocks.1')}.diff_m": table,
        f"{join('head')}.diff_m": table[:, :2].clone(),
        f"{join('blocks.0.norm3')}.w_norm": norm,
        f"{join('blocks.0.norm3')}.b_norm": bias,
    }
    got = merged(tmp_path, lora, 0.5)
    for name, change in (
        ("blocks.1.modulation", table),
        ("head.modulation", table[:, :2]),
        ("blocks.0.norm3.weight", norm),
        ("blocks.0.norm3.bias", bias),
    ):
        assert torch.allclose(got[name], weights[name] + 0.5 * change, atol=1e-6), name


CASES = ("musubi-lora_unet_", "peft-base_model", "pipe.dit", "lycoris_", "diffsynth-default",
         "lightx2v-diff_m", "diffusers-alpha-in-metadata")  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_the_cases_of_people_are_merged_with_their_factor(golden, tmp_path, case):
    path = golden / "cases" / f"lora-{case}.safetensors"
    held = load_file(path)
    down, up = sorted((t for t in held.values() if t.ndim == 2), key=lambda t: t.shape)
    told = "metadata" in case
    factor = 2.0 if told else 0.5 if any("alpha" in name for name in held) else 1.0
    weights = small_weights(config=TINY)
    checkpoint = Checkpoint(save(weights, tmp_path / "m.safetensors"), loras=[Lora(path)])
    got = {name: torch.empty(checkpoint.shape(name)) for name in checkpoint}
    for name, out in got.items():
        checkpoint.read_into(name, out)
    name = "blocks.0.self_attn.q.weight"
    assert torch.allclose(got[name], weights.pop(name) + factor * up @ down, atol=1e-6)
    if case == "lightx2v-diff_m":
        table = weights.pop("blocks.0.modulation") + 0.01
        assert torch.allclose(got["blocks.0.modulation"], table, atol=1e-6)
    assert all(torch.equal(got[name], weight) for name, weight in weights.items())
