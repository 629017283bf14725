"""What a LoRA is for is told from its content, and by its name where that cannot tell."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from engine.models.lora_roles import role_of
from tests.support.checkpoints import SMALL, SMALL_SCAIL2, save, small_weights

RANK = 4
TEN = [f"{side}_attn.{one}" for side in ("self", "cross") for one in "qkvo"] + ["ffn.0", "ffn.2"]
PICTURE = ["cross_attn.k_img", "cross_attn.v_img"]


def pairs(modules, rank=RANK):
    """Pairs for linears of all blocks, as SCAIL-2's own LoRAs have."""
    shapes = {name: weight.shape for name, weight in small_weights().items()}
    found = {}
    for n in range(SMALL.layers):
        for module in modules:
            rows, columns = shapes[f"blocks.{n}.{module}.weight"]
            stem = f"diffusion_model.blocks.{n}.{module}"
            found[f"{stem}.lora_down.weight"] = torch.randn(rank, columns).bfloat16()
            found[f"{stem}.lora_up.weight"] = torch.randn(rows, rank).bfloat16()
    return found


def checked(tmp_path, tensors, name="lora", metadata=None, config=SMALL_SCAIL2):
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path, metadata=metadata)
    lora = Lora(path, 0.8)
    Checkpoint(save(small_weights(config=config), tmp_path / "model.safetensors"), loras=[lora])
    return lora


# --- roles

DIFFERENCES = {
    "a norm": {"diffusion_model.blocks.0.norm3.diff": torch.randn(128)},
    "a table": {"diffusion_model.blocks.0.diff_m": torch.randn(1, 6, 128)},
    "the head": {"diffusion_model.head.head.diff_b": torch.randn(64)},
    "an input of another model": {
        "diffusion_model.patch_embedding.diff": torch.randn(128, 36, 1, 2, 2)
    },
}


@pytest.mark.parametrize("what", DIFFERENCES)
@pytest.mark.parametrize("name", ["fast", "wan2.1_DPO"])
def test_the_difference_of_two_models_is_a_distillation_whatever_it_is_called(tmp_path, name, what):
    lora = checked(tmp_path, pairs(TEN + PICTURE) | DIFFERENCES[what], name)
    assert role_of(lora) == "distill"
    assert lora.rank == RANK


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("wan2.1_SCAIL_2_DPO_lora_bf16", "dpo"),
        ("bias-aware-dpo-lora", "dpo"),
        ("wan2.1_SCAIL_2_relight_lora_bf16", "relight"),
        ("relighting-lora", "relight"),
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16", "distill"),
        ("my_character", "other"),
        ("fast", "other"),
    ],
)
def test_pairs_alone_are_told_by_the_name_of_the_file(tmp_path, name, role):
    assert role_of(checked(tmp_path, pairs(TEN), name)) == role


def test_a_renamed_file_is_told_by_the_title_in_its_metadata(tmp_path):
    titled = {"modelspec.title": "SCAIL-2 DPO", "ss_output_name": "x"}
    assert role_of(checked(tmp_path, pairs(TEN), "1", titled)) == "dpo"
    said_elsewhere = {"modelspec.description": "not a DPO"}
    assert role_of(checked(tmp_path, pairs(TEN), "2", said_elsewhere)) == "other"


def test_a_lora_of_the_picture_too_is_neither_dpo_nor_relight(tmp_path):
    """Neither of SCAIL-2's changes what is made of CLIP."""
    for name in ("my_dpo", "my_relight"):
        assert role_of(checked(tmp_path, pairs(TEN + PICTURE), name)) == "other"
    assert role_of(checked(tmp_path, pairs(TEN + PICTURE), "my_distill")) == "distill"


def test_biases_beside_the_pairs_say_nothing(tmp_path):
    biases = {"diffusion_model.blocks.0.ffn.0.diff_b": torch.randn(SMALL.ffn)}
    assert role_of(checked(tmp_path, pairs(TEN) | biases, "dpo")) == "dpo"
    assert role_of(checked(tmp_path, pairs(TEN) | biases, "style")) == "other"


def test_the_rank_is_the_largest_of_the_pairs(tmp_path):
    mixed = pairs(["ffn.0"], 3) | pairs(["self_attn.q"], 7) | pairs(["cross_attn.o"], 5)
    assert checked(tmp_path, mixed, "1").rank == 7
    assert checked(tmp_path, DIFFERENCES["a norm"], "2").rank is None


# --- of which model


@pytest.mark.parametrize(
    ("name", "metadata", "config", "says"),
    [
        ("wan2.1_SCAIL_2_DPO_lora_bf16", None, SMALL, "SCAIL-2, and .* is SCAIL-Preview"),
        ("scail2-style", None, SMALL, "SCAIL-2, and .* is SCAIL-Preview"),
        ("x", {"ss_base_model_version": "SCAIL-2"}, SMALL, "SCAIL-2, and .* is SCAIL-Preview"),
        ("SCAIL-Preview_style", None, SMALL_SCAIL2, "SCAIL-Preview, and .* is SCAIL-2"),
        ("x", {"modelspec.title": "scail_preview hat"}, SMALL_SCAIL2, "SCAIL-Preview, and .* is"),
    ],
)
def test_a_lora_that_says_it_is_of_the_other_model_is_refused(
    tmp_path, name, metadata, config, says
):
    with pytest.raises(BadCheckpoint, match=rf"{name}\.safetensors says that it is for {says}"):
        checked(tmp_path, pairs(TEN), name, metadata, config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("scail_2", SMALL_SCAIL2),
        ("scail-preview", SMALL),
        ("scail-preview-and-scail2", SMALL),
        ("wan2.1_scail_21", SMALL),  # another number
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16", SMALL),
    ],
)
def test_a_lora_of_this_model_or_of_none_in_particular_is_merged(tmp_path, name, config, caplog):
    checked(tmp_path, pairs(TEN), name, config=config)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["bias-aware-dpo-lora", "relighting-lora"])
def test_a_role_that_only_scail_2_has_is_told_on_preview(tmp_path, name, caplog):
    caplog.set_level(logging.WARNING, "engine")
    checked(tmp_path, pairs(TEN), name, config=SMALL)
    (said,) = caplog.messages
    assert "of SCAIL-2, and is merged into SCAIL-Preview, which it was not trained on" in said


def test_a_lora_for_masks_has_no_place_in_preview(tmp_path):
    change = {"diffusion_model.patch_embedding_mask.diff_b": torch.randn(128)}
    assert checked(tmp_path, change).changed == ("patch_embedding_mask.bias",)
    with pytest.raises(BadCheckpoint, match=r"patch_embedding_mask\.bias, which this model does"):
        checked(tmp_path, change, config=SMALL)
