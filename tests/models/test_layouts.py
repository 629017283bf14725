"""A weight is the same whatever format a file holds it in, but for what that format loses."""

import base64

import pytest
import torch

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.formats.rotation import rotate
from engine.models.formats.weights import StoredWeights
from engine.models.lora import Lora
from engine.models.tensorfile import TensorFile
from kernels.fp8 import E4M3, INT8R, quantize_rows
from kernels.fp8 import rotate as rotate_rows
from tests.support.checkpoints import SMALL, loaded, save, small_weights, to_sat
from tests.support.layouts import (
    GGUF_TYPES,
    LAYOUTS,
    Model,
    fp8,
    gguf_of,
    hadamard,
    int8,
    model_in,
    w4a4,
    w4a8,
)

ROUNDED = ("ConvRot", "ConvRot of params", "W4A4", "W4A8")  # turned back by other sums


def assert_means(got, want, layout):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if layout in ROUNDED:
            assert (got[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
        else:
            assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_in_every_layout_loads_to_what_its_codes_mean(tmp_path, layout):
    model = model_in(layout, small_weights())
    assert_means(loaded(model.save(tmp_path / "m.safetensors")), model.means, layout)


@pytest.mark.parametrize("layout", ["FP8 squares", "ConvRot", "MXFP8", "NVFP4", "quanto"])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_formats_are_found_under_every_prefix(tmp_path, layout, prefix):
    model = model_in(layout, small_weights(), prefix)
    assert_means(loaded(model.save(tmp_path / "m.safetensors")), model.means, layout)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_a_gguf_model_loads_to_what_its_blocks_mean(tmp_path, kind):
    means = gguf_of(kind, small_weights(), tmp_path / "m.gguf")
    assert_means(loaded(tmp_path / "m.gguf"), means, kind)


def test_layouts_may_be_mixed_in_one_file(tmp_path):
    weights, tensors, means = small_weights(), {}, {}
    for n, layout in enumerate(("NVFP4", "MXFP8", "FP8 rows", "ConvRot", "BF16")):
        model = model_in(layout, weights)
        for name in (name for k, name in enumerate(sorted(weights)) if k % 5 == n):
            stem = name.removesuffix(".weight")
            mine = [one for one in model.tensors if one == name or one.startswith(f"{stem}.")]
            own = [one for one in mine if not (one.endswith(".bias") and one != name)]
            tensors |= {one: model.tensors[one] for one in own}
            means[name] = model.means[name]
    got = loaded(save(tensors, tmp_path / "m.safetensors"))
    assert_means(got, {name: means[name] for name in got}, "ConvRot")


def rotated(group):
    return int8(group=group, format="int8_tensorwise", convrot=True, convrot_groupsize=group)


SIZES = {
    **{f"ConvRot in groups of {n}": rotated(n) for n in (4, 16, 64, 256, 1024)},
    **{f"W4A4 in groups of {n}": w4a4(n) for n in (4, 16, 256)},
    **{f"W4A8 in groups of {n}": w4a8(n) for n in (16, 256)},
    **{f"FP8 in groups of {n}": fp8("groups", "scale_weight", size=n) for n in (16, 32, 128, 512)},
    **{f"FP8 in squares of {n}": fp8("squares", size=n, format="float8_e4m3fn_blockwise",
                                     group_size=n) for n in (16, 32, 128)},
    **{f"INT8 in squares of {n}": int8("squares", size=n, format="int8_blockwise", group_size=n)
       for n in (16, 128)},
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("case", SIZES)
def test_groups_of_other_sizes_are_read(tmp_path, case, prefix):
    weight = torch.randn(384, 1024) * torch.rand(384, 1)
    written = SIZES[case](weight)
    tensors = {f"{prefix}blocks.7.ffn.0.{end}": t for end, t in written.tensors.items()}
    got, _ = read(
        Model(tensors, {}).save(tmp_path / "m.safetensors"), "blocks.7.ffn.0.weight", (384, 1024)
    )
    assert (got - written.means).abs().max() <= 1e-6 * written.means.abs().max()
    if not any(kind in case for kind in ("ConvRot", "W4")):
        assert torch.equal(got, written.means)


# --- what a format loses of one Gaussian weight: docs/reference/formats.md 9

LOSS = {
    "BF16": 0.166, "FP8 scale_weight": 2.65, "FP8 comfy_quant": 2.65, "FP8 rows": 2.65,
    "FP8 E5M2": 5.3, "INT8 rows": 0.88, "quanto": 0.88, "MXFP8": 2.66, "NVFP4": 9.5,
    "NVFP4 inverse": 9.5, "NVFP4 alpha": 9.5, "INT8 tensor": 1.15, "INT8 squares": 0.87,
    "AWQ": 9.0, "FP8 cast": 3.3,
}  # fmt: skip
THEN_FP8_ROWS = {"FP8 scale_weight": 3.91, "INT8 rows": 2.78, "MXFP8": 4.04, "NVFP4": 10.0}
# rotated, in groups that do not line up with rows that were made otherwise: errors add as squares
THEN_INT8_ROWS = {"BF16": 0.88, "FP8 scale_weight": 2.81, "INT8 rows": 1.24, "quanto": 1.24,
                  "MXFP8": 2.83, "NVFP4": 9.6}  # fmt: skip
GGUF_LOSS = {"Q8_0": 0.54, "Q5_1": 3.8, "Q4_1": 7.8, "Q4_0": 8.6}


@pytest.fixture(scope="module")
def gaussian():
    return torch.randn(512, 5120, generator=torch.Generator().manual_seed(1)) * 0.02


def read(path, name="blocks.0.ffn.0.weight", shape=(512, 5120)):
    stored = StoredWeights(TensorFile(path))
    out = torch.full(shape, torch.nan)
    stored.read(name, out)
    return out, stored[name]


def error(got, want):
    return 100 * ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("layout", LOSS)
def test_the_error_of_a_gaussian_weight_is_that_of_its_format(tmp_path, gaussian, layout):
    model = model_in(layout, {"blocks.0.ffn.0.weight": gaussian})
    got, stored = read(model.save(tmp_path / "m.safetensors"))
    assert torch.equal(got, model.means["blocks.0.ffn.0.weight"])
    assert error(got, gaussian) == pytest.approx(LOSS[layout], rel=0.1)
    if stored.loss:
        assert error(got, gaussian) == pytest.approx(stored.loss, rel=0.1)
    if layout in THEN_FP8_ROWS:
        packed = quantize_rows(got, E4M3).dequantize()
        assert error(packed, gaussian) == pytest.approx(THEN_FP8_ROWS[layout], rel=0.1)
    if layout in THEN_INT8_ROWS:
        packed = quantize_rows(got, INT8R).dequantize()  # as they stand: rotated
        turned = rotate_rows(gaussian)
        assert error(packed, turned) == pytest.approx(THEN_INT8_ROWS[layout], rel=0.1)


@pytest.mark.parametrize("group", [256, 64, 16])
def test_rotated_rows_of_a_gaussian_weight_lose_what_int8_rows_do(tmp_path, gaussian, group):
    settings = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    written = int8(group=group, **settings)(gaussian)
    tensors = {f"blocks.0.ffn.0.{end}": t for end, t in written.tensors.items()}
    got, stored = read(Model(tensors, {}).save(tmp_path / "m.safetensors"))
    assert error(got, gaussian) == pytest.approx(0.88, rel=0.1)
    unturned = written.tensors["weight"].float() * written.tensors["weight_scale"]
    assert error(unturned, gaussian) > 100  # read as plain INT8 it is noise
    assert torch.allclose(rotate(unturned, group), got)
    assert stored.loss == 0.88


@pytest.mark.parametrize("kind", GGUF_LOSS)
def test_the_error_of_a_gaussian_weight_is_that_of_its_blocks(tmp_path, gaussian, kind):
    means = gguf_of(kind, {"blocks.0.ffn.0.weight": gaussian}, tmp_path / "m.gguf")
    got, stored = read(tmp_path / "m.gguf")
    assert torch.equal(got, means["blocks.0.ffn.0.weight"])
    assert error(got, gaussian) == pytest.approx(GGUF_LOSS[kind], rel=0.1)
    assert stored.loss == pytest.approx(GGUF_LOSS[kind])


def test_the_matrix_of_convrot_is_regular_and_its_own_inverse():
    for size in (4, 16, 64, 256):
        h = rotate(torch.eye(size), size)
        assert torch.equal(h, hadamard(size))
        assert torch.equal(h, h.T)
        assert torch.allclose(h @ h, torch.eye(size), atol=1e-6)
        assert torch.equal(h.sum(1), torch.ones(size))
    h16, h256 = hadamard(16), hadamard(256)
    assert (h16[0, 3], h16[3, 0], h16[0, 15], h256[0, 0]) == (-0.25, -0.25, 0.25, 1 / 16)


# --- beside the weights


@pytest.mark.parametrize("layout", ["FP8 rows", "NVFP4", "MXFP8", "ConvRot", "BF16"])
def test_a_factor_of_the_input_multiplies_the_columns(tmp_path, layout):
    model, factor = model_in(layout, small_weights()), torch.rand(128) + 0.5
    model.tensors["blocks.0.self_attn.q.pre_quant_scale"] = factor.bfloat16()
    name = "blocks.0.self_attn.q.weight"
    want = model.means | {name: model.means[name] * factor.bfloat16().float()}
    assert_means(loaded(model.save(tmp_path / "m.safetensors")), want, "ConvRot")


@pytest.mark.parametrize("layout", ["FP8 scale_weight", "ConvRot", "NVFP4", "quanto"])
def test_a_lora_is_added_to_what_the_codes_mean(tmp_path, layout):
    model = model_in(layout, small_weights())
    name = "blocks.0.cross_attn.o.weight"
    down, up = torch.randn(4, 128), torch.randn(128, 4)
    stem = f"diffusion_model.{name.removesuffix('.weight')}"
    lora = save({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up},
                tmp_path / "lora.safetensors")  # fmt: skip
    checkpoint = Checkpoint(model.save(tmp_path / "m.safetensors"), loras=[Lora(lora)])
    got = torch.empty(128, 128)
    checkpoint.read_into(name, got)
    assert torch.allclose(got, model.means[name] + up @ down, atol=1e-5)
    assert checkpoint.codes(name) is None


def test_what_four_bits_lost_is_told_once_for_a_format(tmp_path, caplog):
    Checkpoint(model_in("NVFP4", small_weights()).save(tmp_path / "m.safetensors"))
    told = [record.getMessage() for record in caplog.records if "lost about" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("m.safetensors: 24 weights are stored as NVFP4, which lost about 9.5")


def test_int8_without_a_word_of_rotation_is_told(tmp_path, caplog):
    Checkpoint(model_in("INT8 rows", small_weights()).save(tmp_path / "m.safetensors"))
    assert "and 23 more is INT8 and nothing in the file says how" in caplog.text


# --- the codes themselves


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("FP8 scale_weight", "fp8"), ("FP8 rows", "fp8"), ("FP8 cast", "fp8"),
        ("MXFP8", "mxfp8"), ("ConvRot", None), ("FP8 E5M2", None), ("FP8 groups", None),
        ("FP8 squares", None), ("INT8 rows", None), ("INT8 rows, told", None),
        ("NVFP4", None), ("BF16", None), ("quanto", None),
    ],
)  # fmt: skip
def test_codes_and_their_scales_mean_the_weight(tmp_path, layout, form):
    model = model_in(layout, small_weights())
    checkpoint = Checkpoint(model.save(tmp_path / "m.safetensors"))
    name = "blocks.1.ffn.2.weight"
    codes = checkpoint.codes(name)
    if form is None:
        assert codes is None
        return
    assert codes.kind == form
    got = {
        "fp8": lambda: codes.q.float() * codes.s[:, None],
        "mxfp8": lambda: (
            codes.q.float().unflatten(1, (-1, 32)) * 2.0 ** (codes.s.float()[..., None] - 127)
        ).flatten(1),
    }[form]()
    assert torch.allclose(got, model.means[name], atol=1e-6)
    assert (got.shape, codes.q.shape) == ((128, 192), (128, 192))
    assert checkpoint.codes("blocks.0.norm3.weight") is None


def test_codes_of_a_fused_weight_are_those_of_its_part(tmp_path):
    weights = small_weights()
    stored = to_sat(weights)
    name = "model.diffusion_model.transformer.layers.0.attention.query_key_value"
    scale = torch.rand(3 * SMALL.dim, 1) + 0.5
    stored[f"{name}.weight"] = stored[f"{name}.weight"].to(torch.float8_e4m3fn)
    stored[f"{name}.weight_scale"] = scale
    checkpoint = Checkpoint(save(stored, tmp_path / "m.safetensors"))
    codes = checkpoint.codes("blocks.0.self_attn.k.weight")
    assert torch.equal(codes.s, scale[128:256, 0])
    got = torch.empty(128, 128)
    checkpoint.read_into("blocks.0.self_attn.k.weight", got)
    assert torch.equal(got, codes.q.float() * codes.s[:, None])


def test_a_file_of_quanto_may_have_its_map_beside_it(tmp_path):
    model = model_in("quanto", small_weights())
    encoded = model.metadata.pop("quantization_map_base64")
    (tmp_path / "m_map.json").write_bytes(base64.b64decode(encoded))
    path = model.save(tmp_path / "m.safetensors")
    assert_means(loaded(path), model.means, "quanto")
    (tmp_path / "m_map.json").write_text('{"blocks.0.ffn.0": {"weights": "qint4"}}')
    with pytest.raises(BadCheckpoint, match=r"blocks\.0\.ffn\.0 is stored as quanto's qint4"):
        Checkpoint(path)
