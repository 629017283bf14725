"""Files that people have and that are not read are refused by the name of their format."""

import json

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import BadCheckpoint
from engine.models.checkpoint import Checkpoint
from engine.models.foreign_formats import TAKE
from tests.support.checkpoints import SMALL_SCAIL2, small_weights


def told(**settings):
    """What ComfyUI writes beside a linear."""
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def blocks_of(rows, columns, size):
    """The shape of block scales, which are swizzled in tiles of 128x4."""
    return -(-rows // 128) * 128, -(-columns // size // 4) * 4


def mxfp8(stem, weight, scales=torch.uint8, **settings):
    found = {
        f"{stem}.weight": weight.to(torch.float8_e4m3fn),
        f"{stem}.weight_scale": torch.full(
            blocks_of(*weight.shape, 32), 127, dtype=torch.uint8
        ).view(scales),
    }
    return found | ({f"{stem}.comfy_quant": told(**settings)} if settings else {})


def nvfp4(stem, weight):
    return {
        f"{stem}.weight": torch.zeros(len(weight), weight.shape[1] // 2, dtype=torch.uint8),
        f"{stem}.weight_scale": torch.ones(blocks_of(*weight.shape, 16)).to(torch.float8_e4m3fn),
        f"{stem}.weight_scale_2": torch.ones(()),
        f"{stem}.comfy_quant": told(format="nvfp4"),
    }


def int8(stem, weight, **settings):
    found = {
        f"{stem}.weight": (weight * 100).to(torch.int8),
        f"{stem}.weight_scale": torch.ones(len(weight), 1),
    }
    return found | ({f"{stem}.comfy_quant": told(**settings)} if settings else {})


def quanto(stem, weight):
    return {
        f"{stem}.weight._data": (weight * 100).to(torch.int8),
        f"{stem}.weight._scale": torch.ones(len(weight), 1).bfloat16(),
        f"{stem}.input_scale": torch.ones(()),
        f"{stem}.output_scale": torch.ones(()),
    }


CONVROT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
E8M0 = torch.float8_e8m0fnu
LAYOUTS = {
    "mxfp8": (lambda *of: mxfp8(*of, format="mxfp8"), "MXFP8"),
    "mxfp8, scales by their type": (lambda *of: mxfp8(*of, E8M0, format="mxfp8"), "MXFP8"),
    "mxfp8 that says nothing": (mxfp8, "MXFP8"),
    "nvfp4": (nvfp4, "NVFP4"),
    "convrot": (lambda *of: int8(*of, **CONVROT), r"INT8 with rotated columns \(ConvRot\)"),
    "int8": (int8, "INT8"),
    "quanto": (quanto, "quanto's INT8"),
}


def stored(layout, only=""):
    found = {}
    for name, weight in small_weights(config=SMALL_SCAIL2).items():
        stem = name.removesuffix(".weight")
        if name.startswith(f"blocks.{only}") and name.endswith("weight") and weight.ndim == 2:
            found |= layout(stem, weight)
        else:
            found[name] = weight.half()
    return found


@pytest.mark.parametrize("only", ["", "1"], ids=["all blocks", "one block"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_a_format_that_is_not_read_is_refused_by_its_name(tmp_path, name, only):
    layout, called = LAYOUTS[name]
    path = tmp_path / "wan2.1_14B_SCAIL_2.safetensors"
    save_file(stored(layout, only), path)
    with pytest.raises(BadCheckpoint, match=rf"blocks\.\d\.\S+ is stored in {called}, which") as e:
        Checkpoint(path)
    assert str(e.value).endswith(f"{TAKE}.")


def test_rotated_columns_are_told_where_the_metadata_alone_say_so(tmp_path):
    path = tmp_path / "model.safetensors"
    layers = {"blocks.0.ffn.0": CONVROT}
    save_file(stored(int8), path, {"_quantization_metadata": json.dumps({"layers": layers})})
    with pytest.raises(BadCheckpoint, match=r"INT8 with rotated columns \(ConvRot\)"):
        Checkpoint(path)


@pytest.mark.parametrize("name", ["SCAIL-2-Q4_K_M.gguf", "model.safetensors", "model.pt"])
def test_a_gguf_file_is_refused_by_its_name_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    with pytest.raises(BadCheckpoint, match=rf"{name} is a GGUF file, which is not read"):
        Checkpoint(tmp_path / name)
