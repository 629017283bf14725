"""Each FP8 weight is read with its scale, and a scale that belongs to none is an error."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from tests.support.checkpoints import SMALL, assert_equal, loaded, save, small_weights, to_fp8


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_fp8_weights_are_multiplied_with_their_scales(tmp_path, scale_name):
    weights = small_weights()
    stored = to_fp8(weights, scale_name)
    got = loaded(save(stored, tmp_path / "fp8.safetensors"))
    name = "blocks.1.ffn.2.weight"
    scale = stored[name.removesuffix("weight") + scale_name]
    assert torch.equal(got[name], stored[name].float() * scale)
    for name, weight in weights.items():
        step = weight.abs().max() / 448 * 16.1  # half the widest gap of E4M3, and FP32 rounding
        assert (got[name] - weight).abs().max() <= step, name


def test_fp8_rows_may_have_a_scale_each(tmp_path):
    stored = to_fp8(small_weights())
    name = "blocks.0.self_attn.q.weight"
    scales = torch.rand(SMALL.dim, 1) + 0.5
    stored["blocks.0.self_attn.q.scale_weight"] = scales
    got = loaded(save(stored, tmp_path / "fp8.safetensors"))
    assert torch.equal(got[name], stored[name].float() * scales)


def test_a_scale_of_the_wrong_length_is_refused(tmp_path):
    stored = to_fp8(small_weights())
    stored["blocks.0.self_attn.q.scale_weight"] = torch.ones(7)
    with pytest.raises(BadCheckpoint, match=r"scale_weight has 7 values"):
        Checkpoint(save(stored, tmp_path / "fp8.safetensors"))


PREFIXED = "model.diffusion_model."


@pytest.mark.parametrize(
    ("weights_under", "scales_under"),
    [(PREFIXED, ""), ("", PREFIXED), ("diffusion_model.", PREFIXED), (PREFIXED, PREFIXED)],
)
@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scales_are_found_under_another_prefix_than_their_weights(
    tmp_path, weights_under, scales_under, scale_name
):
    stored = to_fp8(small_weights(), scale_name)
    want = loaded(save(stored, tmp_path / "plain.safetensors"))
    held = {
        (scales_under if name.endswith(scale_name) else weights_under) + name: tensor
        for name, tensor in stored.items()
    }
    assert_equal(loaded(save(held, tmp_path / "split.safetensors")), want)


Q = "blocks.0.self_attn.q"
SQUARE = torch.ones(16, SMALL.dim // 16)
ODD_SCALES = {
    "of no weight": (lambda s: s | {"elsewhere.scale_weight": torch.ones(())}, "scales no weight"),
    "of a bias that is not there": (
        lambda s: s | {f"{Q}.biases.scale_weight": torch.ones(())},
        r"biases\.scale_weight scales no weight",
    ),
    "of a module and not its weight": (
        lambda s: s | {"blocks.0.self_attn.weight_scale": torch.ones(())},
        "scales no weight",
    ),
    "under a prefix that nobody knows": (
        lambda s: s | {f"net.{Q}.scale_weight": s.pop(f"{Q}.scale_weight")},
        r"net\.blocks.*scales no weight",
    ),
    "of both spellings": (lambda s: s | {f"{Q}.weight_scale": torch.ones(())}, "has two scales"),
    "under two prefixes": (
        lambda s: s | {f"{PREFIXED}{Q}.scale_weight": torch.ones(())},
        "has two scales",
    ),
    "missing for one weight": (
        lambda s: {name: t for name, t in s.items() if name != f"{Q}.scale_weight"},
        rf"{Q}\.weight is stored in FP8 and its scale is not",
    ),
    "missing for all weights of a marked file": (
        lambda s: {
            name: t for name, t in s.items() if not name.endswith(("scale_weight", "comfy_quant"))
        },
        r"weight and \d+ more is stored in FP8 and its scale is not in the file",
    ),
    "of blocks that are as many as rows": (
        lambda s: s | {f"{Q}.scale_weight": SQUARE},
        r"has 128 values \[16, 8\]; one, or one for each row",
    ),
    "of bytes": (
        lambda s: s | {f"{Q}.scale_weight": torch.ones(SMALL.dim, dtype=torch.uint8)},
        r"scale_weight is stored as U8; a scale of 16",
    ),
    "of another format": (
        lambda s: s | {f"{Q}.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}')).byte()},
        r"told as mxfp8 by .*comfy_quant, has no weight_scale; one is expected",
    ),
    "of a format that makes no sense": (
        lambda s: s | {f"{Q}.comfy_quant": torch.zeros(3, dtype=torch.uint8)},
        r"comfy_quant says that it is stored as 'None'",
    ),
    "of a second stage": (
        lambda s: s | {f"{Q}.weight_scale_2": torch.ones(())},
        "weight_scale_2 scales no weight",
    ),
}


@pytest.mark.parametrize("case", ODD_SCALES)
def test_a_scale_that_would_not_be_used_or_is_missing_is_an_error(tmp_path, case):
    change, message = ODD_SCALES[case]
    stored = change(to_fp8(small_weights()))
    with pytest.raises(BadCheckpoint, match=message):
        loaded(save(stored, tmp_path / "fp8.safetensors"))


def with_format(told, **more):
    """The file of `to_fp8` with what a tensor beside a weight says of its format."""
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return {f"{Q}.comfy_quant": torch.tensor(list(text)).byte(), **more}


FP8, NO_SCALE = {"format": "float8_e4m3fn"}, re.compile("scale_weight|scaled_fp8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_format(FP8 | {"convrot": True}), r"columns are rotated \(convrot\)"),
        (with_format({"params": {"convrot": True}, **FP8}), "columns are rotated"),
        ({f"{Q}.comfy_quant": torch.ones(3)}, r"stored as F32 \[3\]; the bytes of a text"),
        ({f"{Q}.comfy_quant": torch.tensor([1000])}, r"stored as I64 \[1\]; the bytes"),
        ({f"{Q}.scale_weight": torch.tensor(-1.0)}, "scale_weight is -1 for a weight that is not"),
        ({f"{Q}.scale_weight": torch.tensor(0.0)}, "scale_weight is 0 for a weight that is not 0"),
    ],
)
def test_a_format_or_a_scale_that_makes_no_sense_is_an_error(tmp_path, changes, message):
    with pytest.raises(BadCheckpoint, match=message):
        loaded(save(to_fp8(small_weights()) | changes, tmp_path / "fp8.safetensors"))


def test_a_file_that_tells_formats_and_has_no_scales_is_no_file_of_plain_numbers(tmp_path):
    stored = to_fp8(small_weights()) | with_format(FP8)
    bare = {name: t for name, t in stored.items() if not NO_SCALE.search(name)}
    with pytest.raises(BadCheckpoint, match=r"told as float8_e4m3fn by .* has no scale"):
        loaded(save(bare, tmp_path / "fp8.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            with_format({"format": "float8_e5m2"}),
            "is F8_E4M3, and .* says float8_e5m2: it is taken",
        ),
        (
            with_format(FP8 | {"group_size": 64}),
            "is told with group_size by .*, which is not known",
        ),
        (
            {"blocks.9.x.comfy_quant": with_format(FP8)[f"{Q}.comfy_quant"]},
            r"blocks\.9\.x\.comfy_quant is told of no weight that is read",
        ),
    ],
)
def test_a_format_that_the_tensors_contradict_is_told(tmp_path, caplog, changes, message):
    stored = to_fp8(small_weights())
    want = loaded(save(stored, tmp_path / "plain.safetensors"))
    assert_equal(loaded(save(stored | changes, tmp_path / "fp8.safetensors")), want)
    assert re.search(message, caplog.text)


def test_scales_of_another_model_in_the_file_are_left_out_with_it(tmp_path, caplog):
    stored = {PREFIXED + name: t for name, t in to_fp8(small_weights()).items()}
    want = loaded(save(stored, tmp_path / "plain.safetensors"))
    stored["text_encoders.x.weight"] = torch.ones(2, 2).to(torch.float8_e4m3fn)
    stored["text_encoders.x.weight_scale"] = torch.ones(())
    stored["text_encoders.x.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}')).byte()
    assert_equal(loaded(save(stored, tmp_path / "whole.safetensors")), want)
    assert "ignored 1 tensors outside model.diffusion_model." in caplog.text


def test_a_scale_that_is_a_number_and_no_tensor_is_refused(tmp_path):
    stored = {name: t for name, t in to_fp8(small_weights()).items() if not NO_SCALE.search(name)}
    torch.save(stored | {f"{Q}.scale_weight": 0.5}, tmp_path / "fp8.pt")
    with pytest.raises(BadCheckpoint, match=r"q\.scale_weight is no tensor, one is expected"):
        Checkpoint(tmp_path / "fp8.pt")


def test_formats_in_the_metadata_of_a_file_are_read(tmp_path):
    stored = {name: t.contiguous() for name, t in to_fp8(small_weights()).items()}
    for told, message in (
        ({"layers": {Q: {"format": "float8_e4m3fn"}}}, None),
        ({"layers": {Q: "nvfp5"}}, "of blocks.* is stored as 'nvfp5'"),
        ({"layers": {Q: "nvfp4"}}, "told as nvfp4 by .*has codes of the type F8_E4M3; U8 is exp"),
        ({"layers": {f"{PREFIXED}{Q}": "int8_tensorwise"}}, "codes of the type F8_E4M3; I8 is"),
        ([], "names no layers"),
    ):
        path = tmp_path / "m.safetensors"
        save_file(stored, path, metadata={"_quantization_metadata": json.dumps(told)})
        if message is None:
            assert loaded(path)
        else:
            with pytest.raises(BadCheckpoint, match=message):
                Checkpoint(path)


def test_fp8_weights_without_any_scale_are_plain_numbers_and_that_is_told(tmp_path, caplog):
    weights = small_weights()
    stored = {
        name: w.to(torch.float8_e4m3fn) if w.ndim == 2 and name.startswith("blocks") else w
        for name, w in weights.items()
    }
    got = loaded(save(stored, tmp_path / "cast.safetensors"))
    assert_equal(got, {name: w.float() for name, w in stored.items()})
    assert "FP8 weights have no scales" in caplog.text


def test_scales_of_activations_are_left_out_with_a_word(tmp_path, caplog):
    loaded(save(to_fp8(small_weights()), tmp_path / "fp8.safetensors"))
    assert "24 scales of activations" in caplog.text


def test_a_scale_for_each_value_of_a_vector_is_applied(tmp_path):
    weights = small_weights()
    name, scales = "blocks.0.norm3", torch.rand(SMALL.dim) + 0.5
    stored = weights | {f"{name}.scale_weight": scales}
    got = loaded(save(stored, tmp_path / "m.safetensors"))[f"{name}.weight"]
    assert torch.equal(got, weights[f"{name}.weight"] * scales)
