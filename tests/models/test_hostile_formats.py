"""A damaged, swapped or hostile file of every format ends in a sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from tests.support.checkpoints import loaded, small_weights
from tests.support.layouts import model_in, told

Q = "blocks.0.self_attn.q"  # [128, 128]
ODD = "blocks.1.ffn.2"  # [128, 192]


def put(name, change):
    """The file with one tensor changed; a change that gives None takes it away."""

    def damage(tensors):
        changed = change(tensors[name])
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        return rest if changed is None else rest | {name: changed}

    return damage


def set_to(name, value):
    return lambda tensors: tensors | {name: value}


def bytes_of(value):
    return lambda tensor: torch.full_like(tensor.view(torch.uint8), value).view(tensor.dtype)


def swapped(tensors):
    """Two matrices of different shapes with each other's scales."""
    one, other = f"{Q}.weight_scale", f"{ODD}.weight_scale"
    return tensors | {one: tensors[other], other: tensors[one]}


def retold(**settings):
    return set_to(f"{Q}.comfy_quant", told(**settings))


E4M3_NAN = 0x7F
CASES = {
    # layout, damage, sentence
    "a row scale of 0": (
        "INT8 rows",
        put(f"{Q}.weight_scale", torch.zeros_like),
        "weight_scale is 0 for a weight",
    ),
    "a NaN scale": (
        "INT8 rows",
        put(f"{Q}.weight_scale", lambda s: s * torch.nan),
        "not finite",
    ),
    "an infinite scale": (
        "FP8 rows",
        put(f"{Q}.weight_scale", lambda s: s * torch.inf),
        "not finite",
    ),
    "a scale below 0": (
        "FP8 groups",
        put(f"{Q}.scale_weight", lambda s: -s),
        "for a weight that is not 0",
    ),
    "a scale of 0 for one square": (
        "FP8 squares",
        put(f"{Q}.weight_scale", lambda s: s * torch.tensor([[0.0, 1], [1, 1]])),
        "weight_scale is 0 for a weight that is not 0",
    ),
    "scales of columns": (
        "INT8 rows",
        put(f"{ODD}.weight_scale", lambda s: torch.ones(192)),
        r"weight_scale \[192\]; \[\] or \[1\] or \[128\] or \[128, 1\]",
    ),
    "scales of integers": (
        "INT8 rows",
        put(f"{Q}.weight_scale", lambda s: s.to(torch.int32)),
        "weight_scale as I32",
    ),
    "INT8 without scales": (
        "INT8 rows",
        put(f"{Q}.weight_scale", lambda _: None),
        "nothing beside",
    ),
    "told INT8 without scales": (
        "INT8 rows, told",
        put(f"{Q}.weight_scale", lambda _: None),
        "has no weight_scale",
    ),
    "groups that do not divide": (
        "FP8 groups",
        put(f"{Q}.scale_weight", lambda s: torch.ones(128, 3, 1)),
        "has 384 values",
    ),
    "squares of another size": (
        "FP8 squares",
        retold(format="float8_e4m3fn_blockwise", group_size=32),
        r"weight_scale \[2, 2\]; \[4, 4\] is expected",
    ),
    "squares that do not divide": (
        "FP8 squares",
        retold(format="float8_e4m3fn_blockwise", group_size=48),
        "group_size 48; one that divides its rows and columns",
    ),
    "squares of 0": (
        "FP8 squares",
        retold(format="float8_e4m3fn_blockwise", group_size=0),
        "group_size 0; a whole number above 0",
    ),
    "squares of a text": (
        "INT8 squares",
        retold(format="int8_blockwise", group_size="64"),
        "group_size '64'",
    ),
    "squares of -64": (
        "INT8 squares",
        retold(format="int8_blockwise", group_size=-64),
        "group_size -64",
    ),
    "an absurd square": (
        "INT8 squares",
        retold(format="int8_blockwise", group_size=10**30),
        "whole number above 0",
    ),
    "a rotation that divides nothing": (
        "ConvRot",
        retold(format="int8_tensorwise", convrot=True, convrot_groupsize=256),
        "convrot_groupsize 256 for 128 columns",
    ),
    "a rotation by Sylvester's matrix": (
        "ConvRot",
        retold(format="int8_tensorwise", convrot=True, convrot_groupsize=128),
        "convrot_groupsize 128 .*a power of 4",
    ),
    "a rotation of 0": (
        "ConvRot",
        retold(format="int8_tensorwise", convrot=True, convrot_groupsize=0),
        "groupsize 0",
    ),
    "a rotation of true": (
        "ConvRot",
        retold(format="int8_tensorwise", convrot=True, convrot_groupsize=True),
        "True",
    ),
    "a rotated float": (
        "FP8 comfy_quant",
        retold(format="float8_e4m3fn", convrot=True),
        "columns are rotated",
    ),
    "a format of nobody": (
        "ConvRot",
        retold(format="int3_tensorwise"),
        "stored as 'int3_tensorwise'",
    ),
    "a format that is a list": ("ConvRot", retold(format=[1] * 900), r"stored as '\[1, 1, "),
    "no format": ("ConvRot", retold(convrot=True), "stored as 'None'"),
    "words that are no JSON": (
        "ConvRot",
        set_to(f"{Q}.comfy_quant", torch.full((40,), 123, dtype=torch.uint8)),
        "'None'",
    ),
    "words that nest without end": (
        "ConvRot",
        set_to(f"{Q}.comfy_quant", torch.full((60_000,), 91, dtype=torch.uint8)),
        "'None'",
    ),
    "words as long as a weight": (
        "ConvRot",
        set_to(f"{Q}.comfy_quant", torch.full((1 << 17,), 91, dtype=torch.uint8)),
        "the bytes of a text are expected",
    ),
    "INT8 told as FP8": ("INT8 rows", retold(format="float8_e4m3fn"), "codes of the type I8"),
    "INT8 told as MXFP8": ("INT8 rows", retold(format="mxfp8"), "codes of the type I8; F8_E4M3"),
    "FP8 told as INT8": ("FP8 rows", retold(format="int8_tensorwise"), "codes of the type F8_E4M3"),
    "scales of MXFP8 that are NaN": (
        "MXFP8",
        put(f"{Q}.weight_scale", bytes_of(255)),
        "holds scales that are NaN",
    ),
    "scales of MXFP8 that are 0": (
        "MXFP8",
        put(f"{Q}.weight_scale", bytes_of(0)),
        "weight_scale is 0 for a weight that is not",
    ),
    "scales of MXFP8 that are huge": (
        "MXFP8",
        put(f"{Q}.weight_scale", bytes_of(254)),
        "not finite",
    ),
    "scales of MXFP8 in their own order": (
        "MXFP8",
        put(f"{ODD}.weight_scale", lambda s: s[:, :6]),
        r"\[128, 6\]; \[128, 8\] is expected",
    ),
    "MXFP8 in E5M2": (
        "MXFP8",
        put(f"{Q}.weight", lambda w: w.float().to(torch.float8_e5m2)),
        "codes.*F8_E5M2",
    ),
    "MXFP8 of odd columns": (
        "MXFP8",
        put(f"{Q}.weight", lambda w: w[:, :100]),
        "100 columns; a multiple of 32",
    ),
    "MXFP8 of too many rows": (
        "MXFP8",
        put(f"{Q}.weight", lambda w: torch.cat([w, w])),
        r"weight_scale \[128, 4\]; \[256, 4\]",
    ),
    "MXFP8 with another's scales": ("MXFP8", swapped, "is expected"),
    "scales of NVFP4 that are NaN": (
        "NVFP4",
        put(f"{Q}.weight_scale", bytes_of(E4M3_NAN)),
        "not finite|goes from",
    ),
    "scales of NVFP4 that are 0": (
        "NVFP4",
        put(f"{Q}.weight_scale", bytes_of(0)),
        "above 0 are exp",
    ),
    "scales of NVFP4 below 0": (
        "NVFP4",
        put(f"{Q}.weight_scale", bytes_of(0xB8)),
        "above 0 are exp",
    ),
    "a tensor scale of 0": (
        "NVFP4",
        put(f"{Q}.weight_scale_2", torch.zeros_like),
        "_2 0; a finite",
    ),
    "a tensor scale of NaN": (
        "NVFP4",
        put(f"{Q}.weight_scale_2", lambda t: t * torch.nan),
        "_2 nan",
    ),
    "a tensor scale below 0": (
        "NVFP4",
        put(f"{Q}.weight_scale_2", lambda t: -t),
        "a finite number",
    ),
    "two tensor scales": (
        "NVFP4",
        put(f"{Q}.weight_scale_2", lambda t: torch.ones(2)),
        r"_2 \[2\]; \[\] or \[1\]",
    ),
    "no tensor scale": (
        "NVFP4",
        put(f"{Q}.weight_scale_2", lambda _: None),
        "no scale of the tensor; weight_scale_2",
    ),
    "no tensor scale of lightx2v": (
        "NVFP4 inverse",
        put(f"{Q}.weight_global_scale", lambda _: None),
        "alpha with input_global",
    ),
    "an inverse of 0": (
        "NVFP4 inverse",
        put(f"{Q}.weight_global_scale", torch.zeros_like),
        "a finite number above 0",
    ),
    "an alpha of infinity": (
        "NVFP4 alpha",
        put(f"{Q}.alpha", lambda a: a * torch.inf),
        "alpha inf; a finite",
    ),
    "NVFP4 of odd columns": (
        "NVFP4",
        put(f"{Q}.weight", lambda w: w[:, :60]),
        "120 columns; a multiple of 16",
    ),
    "NVFP4 in three axes": (
        "NVFP4",
        put(f"{Q}.weight", lambda w: w[None]),
        r"\[1, 128, 64\]; rows and columns|rows and col",
    ),
    "U8 with nothing beside it": (
        "BF16",
        set_to(f"{Q}.weight", torch.ones(128, 128, dtype=torch.uint8)),
        "nothing beside it",
    ),
    "W4A4 with a scale for all": (
        "W4A4",
        put(f"{Q}.weight_scale", lambda s: s[:1]),
        r"\[128\] or \[128, 1\] is expected",
    ),
    "W4A4 with scales of 0": (
        "W4A4",
        put(f"{Q}.weight_scale", torch.zeros_like),
        "is 0 for a weight",
    ),
    "W4A8 with a correction": (
        "W4A8",
        set_to(f"{Q}.weight_correction", torch.ones(128)),
        "a weight_correction; symmetric",
    ),
    "W4A8 with a short book": (
        "W4A8",
        put(f"{Q}.weight_codebook", lambda b: b[:8]),
        r"weight_codebook \[8\]; \[16\]",
    ),
    "W4A8 of another group": (
        "W4A8",
        retold(format="asym_w4a8_int8", group_size=32, convrot_groupsize=64),
        r"weight_s_rel \[128, 8\]; \[128, 4\]",
    ),
    "AWQ without zeros": ("AWQ", put(f"{Q}.weight_zeros", lambda _: None), "no weight_zeros; one"),
    "AWQ with turned scales": (
        "AWQ",
        put(f"{ODD}.weight_scale", lambda s: s.T.contiguous()),
        r"\[128, 3\]; \[3, 128\]",
    ),
    "AWQ of a group that does not divide": (
        "AWQ",
        retold(format="awq_w4a16", group_size=48),
        "group_size 48; one that divides 128",
    ),
    "quanto without scales": (
        "quanto",
        put(f"{Q}.weight._scale", lambda _: None),
        r"has no weight\._scale; one is exp",
    ),
    "quanto with scales of 0": (
        "quanto",
        put(f"{Q}.weight._scale", torch.zeros_like),
        r"weight\._scale is 0 for a weight",
    ),
    "quanto in FP8": (
        "quanto",
        put(f"{Q}.weight._data", lambda w: w.to(torch.float8_e4m3fn)),
        "codes as F8_E4M3",
    ),
    "quanto and plain": (
        "quanto",
        set_to(f"{Q}.weight", torch.ones(128, 128)),
        f"{Q}.weight is stored twice",
    ),
    "a factor of the input for the rows": (
        "NVFP4",
        set_to(f"{ODD}.pre_quant_scale", torch.ones(128)),
        r"pre_quant_scale \[128\]; \[192\]",
    ),
    "scales of a weight that is not there": (
        "NVFP4",
        set_to("blocks.7.x.weight_scale_2", torch.ones(())),
        "scales no weight that is read",
    ),
    "MXFP8 in groups of 16": (
        "MXFP8",
        retold(format="mxfp8", group_size=16),
        "group_size 16; 32, which the format has",
    ),
    "NVFP4 in groups of 32": (
        "NVFP4",
        retold(format="nvfp4", group_size=32),
        "group_size 32; 16, which the format has",
    ),
    "a rotation that is a text": (
        "ConvRot",
        retold(format="int8_tensorwise", convrot="false", convrot_groupsize=64),
        "convrot 'false'; true or false",
    ),
    "a rotation that is a number": (
        "INT8 rows, told",
        retold(format="int8_tensorwise", convrot=1),
        "convrot 1; true or false",
    ),
    "W4A4 that is not rotated": (
        "W4A4",
        retold(format="convrot_w4a4", convrot=False, convrot_groupsize=64),
        "convrot false; true, as the format is rotated",
    ),
    "W4A8 with scales of 0": (
        "W4A8",
        put(f"{Q}.weight_s_rel", bytes_of(0)),
        "weight_s_rel from 0 to 0; scales above 0",
    ),
    "W4A8 with scales below 0": (
        "W4A8",
        put(f"{Q}.weight_s_rel", bytes_of(0xB8)),
        "weight_s_rel from -1 to -1; scales above 0",
    ),
    "W4A8 with scales that are NaN": (
        "W4A8",
        put(f"{Q}.weight_s_rel", bytes_of(E4M3_NAN)),
        "not finite",
    ),
    "W4A8 with a row scale of 0": (
        "W4A8",
        put(f"{Q}.weight_s_channel", torch.zeros_like),
        "weight_s_channel is 0 for a weight",
    ),
    "W4A8 with a book of infinities": (
        "W4A8",
        put(f"{Q}.weight_codebook", lambda b: b * torch.inf),
        "a weight_codebook of zeros, or not finite",
    ),
    "W4A8 with a book of zeros": (
        "W4A8",
        put(f"{Q}.weight_codebook", torch.zeros_like),
        "a weight_codebook of zeros",
    ),
    "AWQ with scales of 0": (
        "AWQ",
        put(f"{Q}.weight_scale", torch.zeros_like),
        "weight_scale is 0 for a weight that is not 0",
    ),
    "AWQ with zeros that are NaN": (
        "AWQ",
        put(f"{Q}.weight_zeros", lambda z: z * torch.nan),
        "not finite",
    ),
    "quanto with scales that are NaN": (
        "quanto",
        put(f"{Q}.weight._scale", lambda s: s * torch.nan),
        "not finite",
    ),
    "quanto with a scale for all": (
        "quanto",
        put(f"{Q}.weight._scale", lambda s: s[:1]),
        r"weight\._scale \[1, 1\]; \[128, 1\] is expected",
    ),
    "NVFP4 with an inverse that is NaN": (
        "NVFP4 inverse",
        put(f"{Q}.weight_global_scale", lambda s: s * torch.nan),
        "weight_global_scale nan; a finite number above 0",
    ),
    "NVFP4 with another's scales": ("NVFP4", swapped, "is expected"),
    "FP8 with another's scales": (
        "FP8 groups",
        lambda t: t | {f"{ODD}.scale_weight": t[f"{Q}.scale_weight"][:64].clone()},
        "scale_weight has 128 values",
    ),
    "a factor of the input of 0": (
        "ConvRot",
        set_to(f"{Q}.pre_quant_scale", torch.zeros(128)),
        "pre_quant_scale goes down to 0; factors above 0",
    ),
    "a factor of the input below 0": (
        "BF16",
        set_to(f"{Q}.pre_quant_scale", torch.linspace(-1, 1, 128)),
        "pre_quant_scale goes down to -1; factors above 0",
    ),
    "a factor of the input that is NaN": (
        "FP8 rows",
        set_to(f"{Q}.pre_quant_scale", torch.full((128,), torch.nan)),
        "not finite",
    ),
    "a name with a line in it": (
        "FP8 rows",
        set_to("blocks.0.q\nweight", torch.ones(1)),
        r"names a tensor 'blocks\.0\.q\\nweight', of 17 characters",
    ),
    "a name without end": (
        "FP8 rows",
        set_to("a" * 5000, torch.ones(1)),
        "names a tensor 'aaaa.*, of 5000 characters",
    ),
    "Nunchaku": (
        "BF16",
        set_to(f"{Q}.wscales", torch.ones(4)),
        "is of Nunchaku, whose weights are",
    ),
    "GPTQ": ("BF16", set_to(f"{Q}.qweight", torch.ones(4).int()), "is of GPTQ, AWQ or Nunchaku"),
    "MLX": (
        "BF16",
        lambda t: (
            t
            | {
                f"{Q}.weight": torch.ones(128, 16, dtype=torch.uint32),
                f"{Q}.scales": torch.ones(128, 2),
            }
        ),
        "is of MLX, whose weights are not read",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_not_as_its_format_says_ends_in_a_sentence(tmp_path, case):
    layout, damage, message = CASES[case]
    model = model_in(layout, small_weights())
    path = tmp_path / "m.safetensors"
    held = {name: t.contiguous() for name, t in damage(model.tensors).items()}
    save_file(held, path, metadata=model.metadata or None)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        loaded(path)
    text = str(caught.value)
    assert text.startswith("m.safetensors")
    assert len(text) < 700 and "\n" not in text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"quantization_format": "awq"}, "quantization_format is 'awq'"),
        ({"quantization_map_base64": "%%%"}, "is no base64"),
        ({"quantization_map_base64": "eyJh"}, "is no map of linears"),
        ({"quantization_map_base64": "WzFd"}, "is no map of linears"),
        (
            {"quantization_map_base64": "eyJibG9ja3MuMC5mZm4uMCI6IHsid2VpZ2h0cyI6ICJxaW50NCJ9fQ=="},
            "is stored as quanto's qint4; qint8 is read",
        ),
        ({"_quantization_metadata": "{"}, "names no layers"),
        ({"_quantization_metadata": '{"layers": {"blocks.9.q": "nvfp9"}}'}, "stored as 'nvfp9'"),
        ({"_quantization_metadata": "[" * 100_000}, "names no layers"),
        ({"_quantization_metadata": '{"layers": {"a\\nb": "x"}}'}, r"metadata of a\?b says"),
    ],
)
def test_metadata_that_make_no_sense_end_in_a_sentence(tmp_path, metadata, message):
    path = tmp_path / "m.safetensors"
    held = {name: tensor.contiguous() for name, tensor in small_weights().items()}
    save_file(held, path, metadata=metadata)
    with pytest.raises(BadCheckpoint, match=message):
        Checkpoint(path)


@pytest.mark.parametrize("layout", ["FP8 rows", "ConvRot", "MXFP8", "NVFP4", "quanto", "W4A8"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_file_of_every_format_that_was_cut_short_is_told(tmp_path, layout, kept):
    path = model_in(layout, small_weights()).save(tmp_path / "m.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BadCheckpoint, match=r"^m\.safetensors is damaged or cut short"):
        Checkpoint(path)


def test_a_missing_scale_among_others_shows_by_the_range_of_the_codes(tmp_path, caplog):
    model = model_in("FP8 rows", small_weights())
    del model.tensors[f"{Q}.weight_scale"]
    with pytest.raises(BadCheckpoint, match=rf"{Q}\.weight is stored in FP8 and its scale is not"):
        loaded(model.save(tmp_path / "m.safetensors"))
    weights = small_weights()  # one that was only cast among scaled ones is read as it is
    model.tensors[f"{Q}.weight"] = weights[f"{Q}.weight"].to(torch.float8_e4m3fn)
    got = loaded(model.save(tmp_path / "m.safetensors"))
    assert torch.equal(got[f"{Q}.weight"], model.tensors[f"{Q}.weight"].float())
    assert f"{Q}.weight: FP8 weights have no scales, while others have" in caplog.text


def overlapping(path):
    """Two tensors in the same bytes of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    same = [name for name in header if name.endswith("weight_scale")][:2]
    header[same[0]]["data_offsets"] = header[same[1]]["data_offsets"]
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])


def test_tensors_in_the_same_bytes_are_refused(tmp_path):
    path = model_in("ConvRot", small_weights()).save(tmp_path / "m.safetensors")
    overlapping(path)
    with pytest.raises(BadCheckpoint, match=r"^m\.safetensors is damaged or cut short"):
        Checkpoint(path)
