"""Writes a matrix in each format that files have, and says what it has become.

Every writer follows the definition element by element or by plain indexing, in another way than
the readers: codes and scales as a file holds them, and the FP32 matrix that they stand for.
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2.0


@dataclass(frozen=True)
class Written:
    """One matrix in a file."""

    tensors: dict[str, Tensor]  # by ending: "weight", "weight_scale", ...
    means: Tensor  # [R, C] fp32
    map_entry: dict | None = None  # of quanto


def told(**settings) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def plain(dtype):
    def write(weight):
        return Written({"weight": weight.to(dtype)}, weight.to(dtype).float())

    return write


def fp8(per="tensor", name="weight_scale", code=torch.float8_e4m3fn, size=64, **settings):
    """A scale for the tensor, a row, `size` columns of a row, or a square of `size`."""

    def write(weight):
        rows, columns = weight.shape
        blocks = {
            "tensor": weight.view(1, rows, 1, columns),
            "rows": weight.view(rows, 1, 1, columns),
            "groups": weight.view(rows, 1, columns // size, size),
            "squares": weight.view(rows // size if per == "squares" else rows, -1,
                                   columns // size if per == "squares" else 1,
                                   size if per == "squares" else columns),
        }[per]  # fmt: skip
        largest = torch.finfo(code).max
        scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / largest
        codes = (blocks / scale[:, None, :, None]).to(code)
        means = (codes.float() * scale[:, None, :, None]).reshape(weight.shape)
        shape = {
            "tensor": (), "rows": (rows, 1), "groups": (rows, columns // size, 1),
            "squares": (rows // size, columns // size),
        }[per]  # fmt: skip
        tensors = {"weight": codes.reshape(weight.shape), name: scale.reshape(shape)}
        if settings:
            tensors["comfy_quant"] = told(**settings)
        return Written(tensors, means)

    return write


def cast(weight):
    codes = weight.to(torch.float8_e4m3fn)
    return Written({"weight": codes}, codes.float())


def int8(per="rows", group=0, size=64, **settings):
    """A scale a row, a tensor or a square; `group` columns are rotated together if not 0."""

    def write(weight):
        rows, columns = weight.shape
        h = hadamard(group) if group else torch.eye(1)
        turned = torch.cat([part @ h for part in weight.split(len(h), 1)], 1) if group else weight
        if per == "squares":
            shaped = turned.view(rows // size, size, columns // size, size)
            scale = shaped.abs().amax((1, 3)) / 127
            spread = scale[:, None, :, None].expand(shaped.shape).reshape(weight.shape)
        else:
            scale = turned.abs().amax(1, keepdim=True) / 127
            scale = scale if per == "rows" else scale.max().reshape(())
            spread = scale.expand(weight.shape)
        codes = (turned / spread).round().clamp(-127, 127).to(torch.int8)
        means = codes.float() * spread
        if group:
            means = torch.cat([part @ h for part in means.split(group, 1)], 1)
        tensors = {"weight": codes, "weight_scale": scale.contiguous()}
        if settings:
            tensors["comfy_quant"] = told(**settings)
        return Written(tensors, means)

    return write


def hadamard(size: int) -> Tensor:
    h = H4
    while len(h) < size:
        h = torch.kron(h, H4)
    return h


def swizzled(scales: Tensor) -> Tensor:
    """By the formula for one scale after the other."""
    rows, columns = scales.shape
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    flat = torch.zeros(high * wide, dtype=torch.uint8)
    r, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = ((r // 128) * (wide // 4) + j // 4) * 512
    place += (r % 32) * 16 + ((r % 128) // 32) * 4 + j % 4
    flat[place.flatten()] = scales.view(torch.uint8).flatten()
    return flat.view(high, wide)


def filled(weight: Tensor, multiple: int) -> Tensor:
    rows, columns = (-size % multiple for size in weight.shape)
    return torch.nn.functional.pad(weight, (0, columns, 0, rows))


def mxfp8(is_u8=False, is_told=True):
    def write(weight):
        whole = filled(weight, 32)
        blocks = whole.view(len(whole), -1, 32)
        largest = blocks.abs().amax(2)
        power = torch.ceil(torch.log2(largest.clamp_min(2.0**-120) / 448)).clamp(-127, 127)
        codes = (blocks / 2.0 ** power[..., None]).to(torch.float8_e4m3fn)
        bytes_ = torch.where(largest > 0, power + 127, 0).to(torch.uint8)
        means = codes.float() * 2.0 ** power[..., None]
        scales = swizzled(bytes_[: len(whole)])
        tensors = {
            "weight": codes.reshape(whole.shape),
            "weight_scale": scales if is_u8 else scales.view(torch.float8_e8m0fnu),
        }
        if is_told:
            tensors["comfy_quant"] = told(format="mxfp8")
        return Written(tensors, means.view(whole.shape)[: len(weight), : weight.shape[1]])

    return write


def nvfp4(dialect="comfy"):
    def write(weight):
        whole = filled(weight, 16)
        blocks = whole.view(len(whole), -1, 16)
        t = (weight.abs().max() / 2688).float()
        t = 1 / (1 / t) if dialect == "inverse" else t  # as its reader gets it
        scales = (blocks.abs().amax(2) / 6 / t).to(torch.float8_e4m3fn)
        scale = t * scales.float()
        unit = blocks / scale.clamp_min(1e-30)[..., None]
        index = (unit.abs()[..., None] - E2M1).abs().argmin(-1)
        means = (E2M1[index] * unit.sign() * scale[..., None]).view(whole.shape)
        codes = (index + 8 * (unit < 0)).view(whole.shape)
        even, odd = codes[:, 0::2], codes[:, 1::2]
        packed = even * 16 + odd if dialect == "comfy" else odd * 16 + even
        tensors = {
            "weight": packed.to(torch.uint8),
            "weight_scale": swizzled(scales).view(torch.float8_e4m3fn),
        }
        if dialect == "comfy":
            tensors |= {"weight_scale_2": t, "comfy_quant": told(format="nvfp4")}
        elif dialect == "inverse":
            tensors |= {"weight_global_scale": 1 / t, "input_absmax": torch.tensor(3.0)}
        else:
            tensors |= {"alpha": t / 4, "input_global_scale": torch.tensor(4.0)}
        return Written(tensors, means[: len(weight), : weight.shape[1]])

    return write


def w4a4(group):
    def write(weight):
        h = hadamard(group)
        turned = torch.cat([part @ h for part in weight.split(group, 1)], 1)
        scale = turned.abs().amax(1, keepdim=True) / 7
        codes = (turned / scale).round().clamp(-7, 7)
        means = torch.cat([part @ h for part in (codes * scale).split(group, 1)], 1)
        tensors = {
            "weight": _nibbles(codes.int() & 15).view(torch.int8),
            "weight_scale": scale.flatten(),
            "comfy_quant": told(format="convrot_w4a4", convrot_groupsize=group),
        }
        return Written(tensors, means)

    return write


def w4a8(group):
    def write(weight):
        h = hadamard(group)
        turned = torch.cat([part @ h for part in weight.split(group, 1)], 1)
        channel = turned.abs().amax(1) / 127
        unit = (turned / channel[:, None]).view(len(weight), -1, 16)
        relative = (unit.abs().amax(2) / 8).to(torch.float8_e4m3fn)
        book = torch.linspace(-8, 8, 16)
        wanted = unit / relative.float().clamp_min(1e-6)[..., None]
        index = (wanted[..., None] - book).abs().argmin(-1)
        value = (book[index] * relative.float()[..., None]).round().clamp(-127, 127)
        means = value.view(weight.shape) * channel[:, None]
        means = torch.cat([part @ h for part in means.split(group, 1)], 1)
        tensors = {
            "weight": _nibbles(index.view(weight.shape)).view(torch.int8),
            "weight_s_rel": relative, "weight_s_channel": channel, "weight_codebook": book,
            "comfy_quant": told(format="asym_w4a8_int8", group_size=16, convrot_groupsize=group),
        }  # fmt: skip
        return Written(tensors, means)

    return write


def awq(weight):
    blocks = weight.view(len(weight), -1, 64)
    low, high = blocks.amin(2), blocks.amax(2)
    scale = ((high - low) / 15).bfloat16()
    zeros = (low + 8 * scale.float()).bfloat16()
    codes = ((blocks - zeros.float()[..., None]) / scale.float()[..., None] + 8).round()
    codes = codes.clamp(0, 15)
    means = (codes - 8) * scale.float()[..., None] + zeros.float()[..., None]
    tensors = {
        "weight": _nibbles(codes.view(weight.shape)).view(torch.int8),
        "weight_scale": scale.T.contiguous(), "weight_zeros": zeros.T.contiguous(),
        "comfy_quant": told(format="awq_w4a16", group_size=64),
    }  # fmt: skip
    return Written(tensors, means.view(weight.shape))


def _nibbles(codes: Tensor) -> Tensor:
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def quanto(weight):
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    tensors = {
        "weight._data": codes, "weight._scale": scale,
        "input_scale": torch.ones(()), "output_scale": torch.ones(()),
    }  # fmt: skip
    entry = {"weights": "qint8", "activations": "none"}
    return Written(tensors, codes.float() * scale.float(), entry)


LAYOUTS: dict[str, Callable[[Tensor], Written]] = {
    "BF16": plain(torch.bfloat16),
    "FP16": plain(torch.float16),
    "FP8 scale_weight": fp8(name="scale_weight"),
    "FP8 comfy_quant": fp8(format="float8_e4m3fn"),
    "FP8 E5M2": fp8(code=torch.float8_e5m2, format="float8_e5m2"),
    "FP8 rows": fp8("rows"),
    "FP8 groups": fp8("groups", "scale_weight"),
    "FP8 squares": fp8("squares", format="float8_e4m3fn_blockwise", group_size=64),
    "FP8 cast": cast,
    "INT8 rows": int8(),
    "INT8 rows, told": int8(format="int8_tensorwise"),
    "INT8 tensor": int8("tensor", format="int8_tensorwise"),
    "INT8 squares": int8("squares", format="int8_blockwise", group_size=64),
    "ConvRot": int8(group=64, format="int8_tensorwise", convrot=True, convrot_groupsize=64),
    "ConvRot of params": int8(
        group=16, format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 16}
    ),
    "MXFP8": mxfp8(),
    "MXFP8 in U8, untold": mxfp8(is_u8=True, is_told=False),
    "NVFP4": nvfp4(),
    "NVFP4 inverse": nvfp4("inverse"),
    "NVFP4 alpha": nvfp4("alpha"),
    "W4A4": w4a4(64),
    "W4A8": w4a8(64),
    "AWQ": awq,
    "quanto": quanto,
}
GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # that the package can write


@dataclass(frozen=True)
class Model:
    """A file of weights in a layout, and the weights that it stands for."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    means: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        held = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(held, path, metadata=self.metadata or None)
        return path


def is_linear(name: str, weight: Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2


def model_in(
    layout: str,
    weights: dict[str, Tensor],
    prefix: str = "",
    made: dict[str, Callable[[Tensor], Written]] = LAYOUTS,
) -> Model:
    """The linears of the blocks in a layout, the rest in BF16."""
    tensors, means, entries = {}, {}, {}
    for name, weight in weights.items():
        if not is_linear(name, weight):
            tensors[prefix + name] = weight.bfloat16()
            means[name] = weight.bfloat16().float()
            continue
        stem, written = name.removesuffix(".weight"), made[layout](weight)
        tensors |= {f"{prefix}{stem}.{end}": t for end, t in written.tensors.items()}
        means[name] = written.means
        if written.map_entry:
            entries[stem] = written.map_entry
    metadata = {}
    if entries:
        encoded = base64.b64encode(json.dumps(entries).encode()).decode()
        metadata = {"quantization_format": "quanto", "quantization_map_base64": encoded}
    return Model(tensors, metadata, means)


def gguf_of(type_name: str, weights: dict[str, Tensor], path: Path, arch: str = "wan"):
    """A GGUF file whose linears are in that type; the means of its weights."""
    writer, means = gguf.GGUFWriter(path, arch), {}
    kind = gguf.GGMLQuantizationType[type_name]
    for name, weight in weights.items():
        if is_linear(name, weight):
            packed = gguf.quantize(weight.numpy(), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            means[name] = torch.from_numpy(np.array(gguf.dequantize(packed, kind)))
        else:
            writer.add_tensor(name, weight.numpy())
            means[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means
