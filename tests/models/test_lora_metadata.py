"""What a LoRA file tells of its strength beside the pairs is followed, told or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.lora import Lora
from tests.support.checkpoints import save, small_weights
from tests.support.loras import ONE, RANK


def told(tmp_path, metadata, lora=ONE, name="lora.safetensors"):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in lora.items()}, path, metadata=metadata)
    else:
        torch.save(lora, path)
    return Checkpoint(save(small_weights(), tmp_path / "m.safetensors"), loras=[Lora(path)])


def factor_of(checkpoint, module="blocks.0.ffn.0", lora=ONE):
    down, up = (tensor.float() for name, tensor in lora.items() if module in name)
    got = torch.empty(192, 128)
    checkpoint.read_into(f"{module}.weight", got)
    change = got - small_weights()[f"{module}.weight"]
    return (change / (up @ down)).median().item()


ADAPTER = "lora_adapter_metadata"


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"transformer.r": RANK, "transformer.lora_alpha": 8}, 2),
        ({"r": RANK, "lora_alpha": 8}, 2),
        ({"lora_alpha": 8}, 2),
        ({"r": RANK, "lora_alpha": 8, "use_rslora": True}, 4),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"ffn.0": RANK}}, 2),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"blocks.0.ffn.0": 2}}, 0.5),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"transformer.blocks.0.ffn.0": 2}}, 0.5),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {}, "use_dora": False}, 2),
        ({"text_encoder.lora_alpha": 8}, 1),
        ({"diffusion_model.lora_alpha": 8}, 2),
        ({"transformer": {"lora_alpha": 8, "r": RANK}}, 2),
        ({"transformer.lora_alpha": 8, "lora_alpha": 8}, 2),
        ({"lora_alpha": 8, "peft_type": "LORA", "use_rslora": None}, 2),
        ({"r": RANK}, 1),
    ],
)
def test_an_alpha_in_the_metadata_scales_the_pairs(tmp_path, settings, factor):
    checkpoint = told(tmp_path, {"format": "pt", ADAPTER: json.dumps(settings)})
    assert factor_of(checkpoint) == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_alpha_in_the_configuration_beside_a_peft_file_scales_the_pairs(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    checkpoint = told(tmp_path, None, name=name)
    assert factor_of(checkpoint) == pytest.approx(2, rel=1e-3)


def test_a_configuration_beside_a_file_of_another_name_is_told(tmp_path, caplog):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    assert factor_of(told(tmp_path, None)) == pytest.approx(1, rel=1e-3)
    assert "the adapter_config.json beside it is read for a file called adapter_m" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "a JSON object is expected"),
        ('{"lora_alpha": "8"}', "lora_alpha is '8', a number"),
        ('{"lora_alpha": NaN}', "lora_alpha is 'nan', a number"),
        ('{"lora_alpha": 1' + "0" * 400 + "}", "a number is expected"),
        ('{"lora_alpha": true}', "a number is expected"),
        ('{"lora_alpha": 8, "r": 16}', r"the rank 16, its pair has 4"),
        ('{"lora_alpha": 8, "use_dora": true}', "has use_dora 'True', and the file holds no magn"),
        ('{"lora_alpha": 8, "fan_in_fan_out": true}', "has fan_in_fan_out"),
        ('{"lora_alpha": 8, "alpha_pattern": {"ffn.7": 1}}', r"for ffn\.7, for which the file has"),
        ('{"lora_alpha": 8, "alpha_pattern": {".*q": 1}}', "plain names of modules"),
        ('{"lora_alpha": 8, "alpha_pattern": [1]}', "an object is expected"),
        ('{"use_rslora": true}', "has use_rslora and no lora_alpha"),
        ('{"lora_alpha": 8, "use_rslora": "false"}', "use_rslora is 'false', true or false"),
        ('{"lora_alpha": 8, "transformer.lora_alpha": 4}', "gives lora_alpha twice"),
        (
            '{"peft_type": "LOHA", "alpha": 8}',
            "has peft_type 'LOHA', and the file holds chang",
        ),
    ],
)
def test_metadata_that_cannot_be_followed_are_refused(tmp_path, text, message):
    with pytest.raises(BadCheckpoint, match=rf"^lora\.safetensors: lora_adapter_meta.*{message}"):
        told(tmp_path, {ADAPTER: text})


def test_an_alpha_beside_its_pair_that_contradicts_the_metadata_is_refused(tmp_path):
    alpha = {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(8.0)}
    same = told(tmp_path, {ADAPTER: '{"lora_alpha": 8}'}, ONE | alpha)
    assert factor_of(same) == pytest.approx(2, rel=1e-3)
    with pytest.raises(BadCheckpoint, match=r"alpha makes the factor 2, its metadata 1\."):
        told(tmp_path, {ADAPTER: '{"lora_alpha": 4}'}, ONE | alpha)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_alpha": "8"}, "metadata lora_alpha are not used"),
        ({"scale": "2", "format": "pt"}, "metadata scale are not used"),
        ({ADAPTER: '{"text_encoder.lora_alpha": 8}'}, "text_encoder.lora_alpha is of another mod"),
        ({ADAPTER: '{"r": 4}'}, "has no lora_alpha: pairs without an alpha have the factor 1"),
        ({ADAPTER: '{"scaling": 2}'}, "scaling is not known and not used"),
        ({"ss_network_alpha": "8"}, "the ss_network_alpha 8 of its metadata is not used"),
    ],
)
def test_metadata_that_are_not_used_are_told(tmp_path, caplog, metadata, message):
    assert factor_of(told(tmp_path, metadata)) == pytest.approx(1, rel=1e-3)
    assert message in caplog.text


def test_notes_of_the_training_need_no_word(tmp_path, caplog):
    told(
        tmp_path, {"format": "pt", "ss_steps": "9", "modelspec.title": "a", "sshs_model_hash": "b"}
    )
    assert not caplog.text
