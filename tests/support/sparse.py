"""Files with the tensors of the 14B model and no data: what headers tell, at its real size."""

import json
import struct
from pathlib import Path

from torch import Size

from engine.config import SCAIL2_14B
from engine.models.checkpoint import parameter_shapes
from engine.models.gguf_walk import TYPES
from engine.models.safetensors_walk import BITS

LINEARS = {  # of a linear [R, C]: ending -> type and shape; and what the file tells
    "FP8": (lambda r, c: {"weight": ("F8_E4M3", (r, c)), "scale_weight": ("F32", ())}, None),
    "ConvRot": (
        lambda r, c: {"weight": ("I8", (r, c)), "weight_scale": ("F32", (r, 1))},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    ),
    "MXFP8": (
        lambda r, c: {"weight": ("F8_E4M3", (r, c)), "weight_scale": ("F8_E8M0", (r, c // 32))},
        {"format": "mxfp8"},
    ),
    "NVFP4": (
        lambda r, c: {
            "weight": ("U8", (r, c // 2)),
            "weight_scale": ("F8_E4M3", (r, c // 16)),
            "weight_scale_2": ("F32", ()),
        },
        {"format": "nvfp4"},
    ),
}


def is_linear(name, shape):
    return name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2


def sparse_safetensors(path: Path, layout: str) -> Path:
    """The file of SCAIL-2 in a layout, in the order of names: small tensors lie far apart."""
    make, told = LINEARS[layout]
    text = json.dumps(told).encode()
    tensors = {}
    for name, shape in parameter_shapes(SCAIL2_14B).items():
        if is_linear(name, shape):
            stem = name.removesuffix(".weight")
            tensors |= {f"{stem}.{ending}": held for ending, held in make(*shape).items()}
            if told:
                tensors[f"{stem}.comfy_quant"] = ("U8", (len(text),))
        else:
            tensors[name] = ("BF16", shape)
    header, place = {}, 0
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        end = place + BITS[dtype] * Size(shape).numel() // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        begin = file.tell()
        file.truncate(begin + place)
        for name in (name for name in tensors if name.endswith("comfy_quant")):
            file.seek(begin + header[name]["data_offsets"][0])
            file.write(text)
    return path


def sparse_gguf(path: Path, type_number: int) -> Path:
    """The file of SCAIL-2 with the linears of its blocks in a type."""
    rows, place = [], 0
    for name, shape in parameter_shapes(SCAIL2_14B).items():
        number = type_number if is_linear(name, shape) else 0
        kind = TYPES[number]
        raw = name.encode()
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        where = struct.pack("<IQ", number, place)
        rows.append(struct.pack("<Q", len(raw)) + raw + sizes + where)
        nbytes = Size(shape).numel() // kind.values * kind.nbytes
        place += -(-nbytes // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), 0) + b"".join(rows)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        file.truncate(file.tell() + place)
    return path
