"""Weights are read some rows at a time: memory beside the destination does not grow with them."""

import json
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors.torch import save_file

from tests.support.layouts import told

ROWS, COLUMNS = 4096, 5120
WEIGHT_MIB = ROWS * COLUMNS * 4 / 2**20  # 80, as FP32
MOST_MIB = 60  # the bytes of the file, a chunk, scales; not a second weight in FP32

MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from engine.models.formats.weights import StoredWeights
from engine.models.tensorfile import TensorFile

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

import gguf
gguf.dequantize(gguf.quantize(torch.zeros(1, 32).numpy(), 8), 8)
found = {}
for name in sys.argv[1:]:
    stored = StoredWeights(TensorFile(Path(name)))
    (weight,) = stored
    out = torch.ones(stored[weight].shape)
    stored.read(weight, out[:8])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = peak()
    stored.read(weight, out)
    found[name] = peak() - before
print(json.dumps(found))
"""


def codes(high, dtype, columns=COLUMNS):
    return torch.randint(0, high, (ROWS, columns), dtype=torch.uint8).view(dtype)


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


E4M3 = torch.float8_e4m3fn
FILES = {
    "BF16": lambda: {"weight": torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16)},
    "FP8": lambda: {"weight": codes(126, E4M3), "weight_scale": ones()},
    "FP8 squares": lambda: {
        "weight": codes(126, E4M3), "weight_scale": ones(ROWS // 128, COLUMNS // 128),
        "comfy_quant": told(format="float8_e4m3fn_blockwise", group_size=128),
    },
    "ConvRot": lambda: {
        "weight": codes(128, torch.int8), "weight_scale": ones(ROWS, 1),
        "comfy_quant": told(format="int8_tensorwise", convrot=True),
    },
    "MXFP8": lambda: {
        "weight": codes(126, E4M3),
        "weight_scale": torch.full((ROWS, COLUMNS // 32), 120, dtype=torch.uint8),
    },
    "NVFP4": lambda: {
        "weight": codes(256, torch.uint8, COLUMNS // 2), "weight_scale_2": ones(),
        "weight_scale": ones(ROWS, COLUMNS // 16).to(E4M3), "comfy_quant": told(format="nvfp4"),
    },
    "W4A8": lambda: {
        "weight": codes(256, torch.int8, COLUMNS // 2), "weight_s_channel": ones(ROWS),
        "weight_s_rel": ones(ROWS, COLUMNS // 16).to(E4M3),
        "comfy_quant": told(format="asym_w4a8_int8"),
    },
    "quanto": lambda: {
        "weight._data": codes(128, torch.int8),
        "weight._scale": ones(ROWS, 1, dtype=torch.bfloat16),
    },
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="memory is asked of /proc")
def test_reading_a_weight_takes_little_memory_beside_it(tmp_path):
    paths = []
    for name, make in FILES.items():
        paths.append(tmp_path / f"{name}.safetensors")
        save_file({f"blocks.0.ffn.0.{end}": t for end, t in make().items()}, paths[-1])
    kind = gguf.GGMLQuantizationType.Q4_K
    writer = gguf.GGUFWriter(tmp_path / "q4k.gguf", "wan")
    packed = torch.zeros(ROWS, COLUMNS // 256 * 144, dtype=torch.uint8).numpy()
    writer.add_tensor("blocks.0.ffn.0.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths.append(tmp_path / "q4k.gguf")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True
    )
    grown = json.loads(run.stdout)
    assert len(grown) == len(FILES) + 1
    assert {name: mib for name, mib in grown.items() if mib > MOST_MIB} == {}
    assert WEIGHT_MIB == 80
