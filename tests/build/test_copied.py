"""Codes of a file whose form is the package's become its rows, bit by bit, and mean the weights."""

import pytest
import torch
from safetensors.torch import load_file

from engine.build.calibration import Activations, Channels, choose
from engine.build.copied import rows_of
from engine.build.quantize import KEPT, Quantization, groups
from engine.build.report import copied_names
from engine.config import ModelConfig
from engine.denoise.block import LINEARS
from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.formats.held import Codes
from engine.models.formats.weights import StoredWeights
from engine.models.lora import Lora
from engine.models.tensorfile import TensorFile
from kernels.fp8 import E4M3, INT8R, Rows, quantize_rows, rotate
from tests.support.checkpoints import save, small_weights, to_sat
from tests.support.layouts import LAYOUTS, Model, hadamard, int8, model_in, mxfp8

MODEL = ModelConfig(layers=2, dim=256, ffn=512, text_dim=64, clip_dim=64)
CONVROT = int8(group=256, format="int8_tensorwise", convrot=True)
KINDS = {  # of files, with the form of packages that hold their codes
    "FP8 scale_weight": E4M3, "FP8 comfy_quant": E4M3, "FP8 rows": E4M3, "FP8 cast": E4M3,
    "MXFP8": E4M3, "ConvRot": INT8R,
}  # fmt: skip
EVERY = [f"blocks.{n}.{part}.weight" for n in range(2) for parts in LINEARS.values()
         for part in parts]  # fmt: skip


@pytest.fixture(autouse=True)
def convrot_of_256(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "ConvRot", CONVROT)


@pytest.fixture(scope="module")
def weights():
    return small_weights(config=MODEL)


def package(checkpoint, form, seen=None):
    """The tensors of a package, and the names of what was copied, as its report has them."""
    tensors, errors = {}, []
    for group in groups(Quantization(checkpoint, form, seen)):
        made, found = group.make()
        tensors |= made
        errors += found
    for one in errors:
        if len(one.copied) == len(LINEARS.get(one.kind, ())):
            assert one.relative < 1e-6
    return tensors, [*copied_names(errors)]


def opened(layout, weights, folder):
    model = model_in(layout, weights)
    return model, Checkpoint(model.save(folder / "m.safetensors"))


@pytest.mark.parametrize("layout", KINDS)
def test_a_package_of_the_same_form_means_the_very_weights_of_the_file(tmp_path, weights, layout):
    model, checkpoint = opened(layout, weights, tmp_path)
    form = KINDS[layout]
    tensors, copied = package(checkpoint, form)
    assert sorted(copied) == sorted(EVERY)
    for n in range(2):
        block = f"blocks.{n}."
        assert torch.equal(tensors[f"{block}smooth"], torch.ones(2, 256))
        assert torch.equal(tensors[f"{block}inner"], torch.ones(512))
        assert torch.equal(tensors[f"{block}norm3_shift"], model.means[f"{block}norm3.bias"])
        for field, parts in LINEARS.items():
            q, s = tensors[f"{block}{field}.q"], tensors[f"{block}{field}.s"]
            got = Rows(q, s).dequantize()
            got = rotate(got) if form.rotated else got
            want = torch.cat([model.means[f"{block}{part}.weight"] for part in parts])
            assert (got - want).norm() <= 5e-7 * want.norm()


@pytest.mark.parametrize("layout", KINDS)
def test_a_package_of_the_other_form_is_rounded_anew(tmp_path, weights, layout):
    _, checkpoint = opened(layout, weights, tmp_path)
    other = E4M3 if KINDS[layout].rotated else INT8R
    tensors, copied = package(checkpoint, other)
    assert copied == []
    assert tensors["blocks.0.up.q"].abs().float().amax(1).min() == other.limit


@pytest.mark.golden
def test_rotated_codes_of_the_reference_are_ours_with_each_group_reversed(golden):
    stored = StoredWeights(TensorFile(golden / "formats/int8.safetensors"))
    expected = load_file(golden / "formats/int8.expected.safetensors")
    kept = [name for name in stored if stored[name].codes is not None]
    assert kept == ["blocks.0.ffn.2.weight", "blocks.0.self_attn.v.weight"]  # groups of 256
    for name in kept:
        rows, want = rows_of(stored.codes(name)), expected[name]
        got = rotate(rows.dequantize())
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
        same = Rows(stored.codes(name).q, rows.s).dequantize()  # in the file's order
        assert (rotate(same) - want).norm() > want.norm()


@pytest.mark.golden
@pytest.mark.parametrize("file", ["fp8_scale_weight", "fp8_kijai", "fp8_comfy_quant",
                                  "fp8_rows_blocks", "mxfp8_nvfp4"])  # fmt: skip
def test_float_codes_of_the_reference_mean_what_its_dequantiser_says(golden, file):
    stored = StoredWeights(TensorFile(golden / f"formats/{file}.safetensors"))
    expected = load_file(golden / f"formats/{file}.expected.safetensors")
    kept = [name for name in stored if stored[name].codes is not None]
    assert kept
    for name in kept:
        want = expected[name]
        got = rows_of(stored.codes(name)).dequantize()[: len(want), : want.shape[1]]
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_the_matrix_of_the_file_is_ours_with_its_columns_reversed():
    assert torch.equal(hadamard(256).flip(1), rotate(torch.eye(256)))


# --- what one Gaussian weight has lost in a package: docs/reference/formats.md 9

LOST = {"FP8 scale_weight": 2.65, "FP8 comfy_quant": 2.65, "FP8 rows": 2.65, "FP8 cast": 3.3,
        "MXFP8": 2.66, "ConvRot": 0.88}  # fmt: skip


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 5120, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.mark.parametrize("layout", LOST)
def test_a_weight_loses_nothing_more_in_a_package_that_copies_its_codes(tmp_path, gaussian, layout):
    model = model_in(layout, {"blocks.0.ffn.0.weight": gaussian})
    stored = StoredWeights(TensorFile(model.save(tmp_path / "m.safetensors")))
    rows = rows_of(stored.codes("blocks.0.ffn.0.weight"))
    want = rotate(gaussian) if rows.rotated else gaussian
    error = 100 * ((rows.dequantize() - want).norm() / want.norm()).item()
    assert error == pytest.approx(LOST[layout], rel=0.1)


# --- exponents of MXFP8


def test_blocks_far_below_the_largest_of_their_row_lose_what_e4m3_rows_lose():
    weight = torch.randn(64, 256) * 0.02
    weight[:, 32:64] *= 2.0**-9
    weight[:, 64:96] *= 2.0**-30
    weight[:, 96:128] = 0
    weight[3] = 0
    written = mxfp8()(weight)
    codes = Codes("mxfp8", written.tensors["weight"], exponents(written))
    got = rows_of(codes).dequantize()
    again = quantize_rows(written.means).dequantize()
    lost = (got - written.means).abs().amax(1)
    assert bool((lost <= written.means.abs().amax(1) * 2.0**-17).all())
    assert lost.norm() < 0.01 * (again - written.means).norm()
    assert not got[3].any() and bool(rows_of(codes).s[3] > 0)


def exponents(written):
    """The bytes of the scales in the order of the blocks, as the largest codes tell them."""
    shape = written.means.shape
    values = written.tensors["weight"].float().view(shape[0], -1, 32).abs().amax(2)
    meant = written.means.view(shape[0], -1, 32).abs().amax(2)
    return torch.where(meant > 0, (meant / values).log2().round() + 127, 0).to(torch.uint8)


# --- what has to be rounded anew


def test_a_weight_that_a_lora_changes_is_rounded_anew_and_the_others_are_copied(tmp_path, weights):
    lora = save(
        {
            "diffusion_model.blocks.0.self_attn.k.lora_A.weight": torch.randn(4, 256) * 0.1,
            "diffusion_model.blocks.0.self_attn.k.lora_B.weight": torch.randn(256, 4) * 0.1,
        },
        tmp_path / "lora.safetensors",
    )
    for layout, lost in (("FP8 rows", ["k"]), ("ConvRot", ["q", "k", "v"])):
        model, _ = opened(layout, weights, tmp_path)
        merged = Checkpoint(tmp_path / "m.safetensors", loras=[Lora(lora)])
        tensors, copied = package(merged, KINDS[layout])
        anew = {f"blocks.0.self_attn.{part}.weight" for part in lost}
        assert set(EVERY) - set(copied) == anew  # a rotated product has one set of multipliers
        name = "blocks.0.self_attn.k.weight"
        want, rows = torch.empty(256, 256), slice(256, 512)
        merged.read_into(name, want)
        got = Rows(tensors["blocks.0.qkv.q"], tensors["blocks.0.qkv.s"]).dequantize()[rows]
        if KINDS[layout].rotated:
            got = rotate(got) * tensors["blocks.0.smooth"][0]
        assert (got - want).norm() < 0.04 * want.norm()
        assert (got - model.means[name]).norm() > 0.1 * want.norm()


def test_a_linear_that_stays_in_16_bits_is_rounded_beside_its_copied_neighbours(tmp_path, weights):
    model, _ = opened("FP8 rows", weights, tmp_path)
    name = "blocks.1.self_attn.v"
    model.tensors[f"{name}.weight"] = weights[f"{name}.weight"].bfloat16()
    del model.tensors[f"{name}.weight_scale"]
    checkpoint = Checkpoint(model.save(tmp_path / "m.safetensors"))
    tensors, copied = package(checkpoint, E4M3)
    assert set(EVERY) - set(copied) == {f"{name}.weight"}
    want = quantize_rows(weights[f"{name}.weight"])
    assert torch.equal(tensors["blocks.1.qkv.q"][512:].float(), want.q.float())
    assert torch.equal(tensors["blocks.1.qkv.s"][512:], want.s)


def test_fused_codes_of_the_official_names_are_copied_by_their_parts(tmp_path, weights):
    stored = to_sat(weights)
    name = "model.diffusion_model.transformer.layers.0.attention.query_key_value"
    scale = torch.rand(768, 1) + 0.5
    stored[f"{name}.weight"] = stored[f"{name}.weight"].to(torch.float8_e4m3fn)
    stored[f"{name}.weight_scale"] = scale
    checkpoint = Checkpoint(save(stored, tmp_path / "m.safetensors"))
    tensors, copied = package(checkpoint, E4M3)
    assert copied == [f"blocks.0.self_attn.{part}.weight" for part in "qkv"]
    assert torch.equal(tensors["blocks.0.qkv.q"].float(), stored[f"{name}.weight"].float())
    assert torch.equal(tensors["blocks.0.qkv.s"], scale[:, 0])


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("FP8 groups", {}), ("FP8 squares", {}), ("FP8 E5M2", {}),
        ("FP8 rows", {"pre_quant_scale": torch.full((256,), 2.0)}),
        ("MXFP8", {"pre_quant_scale": torch.full((256,), 2.0)}),
    ],
)  # fmt: skip
def test_other_scales_and_factors_of_the_input_are_rounded_anew(tmp_path, weights, layout, change):
    model, _ = opened(layout, weights, tmp_path)
    model.tensors.update({f"blocks.0.self_attn.o.{end}": held for end, held in change.items()})
    checkpoint = Checkpoint(model.save(tmp_path / "m.safetensors"))
    assert checkpoint.kept_by("blocks.0.self_attn.o.weight") is None
    assert checkpoint.codes("blocks.0.self_attn.o.weight") is None
    assert "blocks.0.self_attn.o.weight" not in package(checkpoint, E4M3)[1]


@pytest.mark.parametrize("group", [16, 64])
def test_codes_that_were_rotated_in_other_groups_are_rounded_anew(
    tmp_path, weights, monkeypatch, group
):
    made = int8(group=group, format="int8_tensorwise", convrot=True, convrot_groupsize=group)
    monkeypatch.setitem(LAYOUTS, "ConvRot", made)
    _, checkpoint = opened("ConvRot", weights, tmp_path)
    assert package(checkpoint, INT8R)[1] == []


def test_a_weight_that_was_filled_up_is_rounded_anew(tmp_path):
    model = ModelConfig(layers=1, dim=256, ffn=528, text_dim=64, clip_dim=64)
    held, checkpoint = opened("MXFP8", small_weights(config=model), tmp_path)
    assert held.tensors["blocks.0.ffn.2.weight"].shape == (256, 544)
    copied = package(checkpoint, E4M3)[1]
    assert "blocks.0.self_attn.o.weight" in copied
    assert not {"blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight"} & set(copied)


def test_the_feed_forward_is_filled_up_around_copied_codes(tmp_path):
    model = ModelConfig(layers=1, dim=256, ffn=320, text_dim=64, clip_dim=64)
    held, checkpoint = opened("FP8 rows", small_weights(config=model), tmp_path)
    tensors, copied = package(checkpoint, E4M3)
    assert "blocks.0.ffn.2.weight" in copied and "blocks.0.ffn.0.weight" in copied
    up, down = (Rows(tensors[f"blocks.0.{f}.q"], tensors[f"blocks.0.{f}.s"]).dequantize()
                for f in ("up", "down"))  # fmt: skip
    assert (up.shape, down.shape) == ((512, 256), (256, 512))
    assert torch.equal(up[:320], held.means["blocks.0.ffn.0.weight"]) and not up[320:].any()
    assert torch.equal(down[:, :320], held.means["blocks.0.ffn.2.weight"])
    assert not down[:, 320:].any()
    assert bool((tensors["blocks.0.up.s"] > 0).all())


# --- where the inputs were seen


def seen(outliers):
    rms = torch.ones(256)
    rms[:outliers] = 60.0
    return Channels(absmax=4 * rms, mean_square=rms.square())


def test_rows_that_are_kept_cost_nothing_where_inputs_are_even(gaussian):
    weight = gaussian[:256, :256]
    anew = choose(weight, seen(0), [INT8R, E4M3], INT8R, True)
    kept = choose(weight, seen(0), [INT8R, E4M3], INT8R, True, [INT8R])
    assert kept.estimates[0].weight == 0 < anew.estimates[0].weight
    assert torch.equal(kept.smooth, torch.ones(256)) and kept.form == INT8R


def test_multipliers_win_over_kept_rows_where_channels_stand_out(gaussian):
    kept = choose(gaussian[:256, :256], seen(3), [INT8R], INT8R, True, [INT8R])
    assert kept.smooth.max() / kept.smooth.min() > 2
    assert kept.estimates[0].how.startswith("smoothed")


def test_calibration_copies_where_it_chooses_no_multipliers(tmp_path, weights):
    _, checkpoint = opened("ConvRot", weights, tmp_path)
    names = [name.removesuffix(".weight") for name in EVERY]
    even = {name: Channels(torch.full((n,), 4.0), torch.ones(n)) for name in names
            for n in [512 if "ffn.2" in name else 256]}  # fmt: skip
    spread = even | {"blocks.0.self_attn.o": seen(3)}
    copied = package(checkpoint, INT8R, Activations(spread))[1]
    assert set(EVERY) - set(copied) == {"blocks.0.self_attn.o.weight"}


def test_the_reason_says_that_nobody_measured(tmp_path, weights):
    _, checkpoint = opened("ConvRot", weights, tmp_path)
    made = {group.name: group.make for group in groups(Quantization(checkpoint, INT8R))}
    assert made["blocks.0.qkv"]()[1][0].reason == KEPT


# --- codes that mean nothing


def damaged(name, value):
    def change(tensors):
        held = tensors[name]
        flat = held.view(torch.uint8) if held.element_size() == 1 else held
        flat = flat.clone()
        flat.view(-1)[0] = value
        return tensors | {name: flat.view(held.dtype)}

    return change


@pytest.mark.parametrize(
    ("layout", "name", "value", "message"),
    [
        ("FP8 rows", "weight", 0x7F, "not finite"),
        ("FP8 cast", "weight", 0xFF, "not finite"),
        ("MXFP8", "weight", 0x7F, "not finite"),
        ("MXFP8", "weight_scale", 255, "scales that are NaN"),
        ("MXFP8", "weight_scale", 254, "not finite"),
        ("FP8 rows", "weight_scale", torch.nan, "not finite"),
        ("FP8 rows", "weight_scale", torch.inf, "not finite"),
        ("FP8 rows", "weight_scale", -1.0, "a scale above 0 is expected"),
        ("FP8 rows", "weight_scale", 0.0, "a scale above 0 is expected"),
        ("ConvRot", "weight_scale", torch.nan, "not finite"),
        ("ConvRot", "weight_scale", 0.0, "a scale above 0 is expected"),
        ("ConvRot", "weight_scale", 3e38, "not finite"),
    ],
)
def test_codes_that_mean_nothing_are_not_copied(tmp_path, weights, layout, name, value, message):
    model, _ = opened(layout, weights, tmp_path)
    tensors = damaged(f"blocks.0.self_attn.o.{name}", value)(model.tensors)
    checkpoint = Checkpoint(Model(tensors, model.metadata).save(tmp_path / "m.safetensors"))
    with pytest.raises(BadCheckpoint, match=message):
        package(checkpoint, KINDS[layout])


def test_a_row_of_zeros_with_a_scale_of_0_is_copied_as_zeros(tmp_path, weights):
    for layout in ("FP8 rows", "ConvRot"):
        model, _ = opened(layout, weights, tmp_path)
        held = model.tensors["blocks.0.self_attn.o.weight"].view(torch.int8).clone()
        held[7] = 0
        model.tensors["blocks.0.self_attn.o.weight"] = held.view(
            model.tensors["blocks.0.self_attn.o.weight"].dtype
        )
        model.tensors["blocks.0.self_attn.o.weight_scale"][7] = 0
        checkpoint = Checkpoint(model.save(tmp_path / "m.safetensors"))
        tensors, copied = package(checkpoint, KINDS[layout])
        assert "blocks.0.self_attn.o.weight" in copied
        assert not tensors["blocks.0.o.q"][7].float().any()
        assert tensors["blocks.0.o.s"][7] > 0


def test_the_least_code_of_int8_is_copied(tmp_path, weights):
    model, _ = opened("ConvRot", weights, tmp_path)
    model.tensors["blocks.0.self_attn.o.weight"][3, 5] = -128
    checkpoint = Checkpoint(model.save(tmp_path / "m.safetensors"))
    tensors, copied = package(checkpoint, INT8R)
    assert "blocks.0.self_attn.o.weight" in copied
    assert tensors["blocks.0.o.q"][3, 250] == -128
