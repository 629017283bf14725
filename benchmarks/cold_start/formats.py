"""Suite `formats`: how fast a weight of each format of checkpoint becomes FP32, in the page cache.

A weight of the 14B model in codes drawn at random, read as a package's build reads it.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.record import Figure, Suite
from benchmarks.timing import columns, interleaved, require, spread
from engine.models.formats.weights import StoredWeights
from engine.models.gguf_walk import TYPES
from engine.models.tensorfile import TensorFile

ROWS, COLUMNS = 5120, 5120
NAME = "blocks.0.ffn.0.weight"
CHECKED_ROWS = slice(256, 320)
E4M3 = torch.float8_e4m3fn
GGUF = ("Q8_0", "Q5_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "IQ4_XS")

Codes = Mapping[str, Tensor]  # by ending


@dataclass(frozen=True, slots=True)
class FormatRow:
    """One format."""

    name: str
    mb_per_s: float  # of the file: codes and scales; median of the rounds
    noise_mb_per_s: float
    weights_per_s: float  # millions


def measure_formats(runs: int = 5) -> tuple[str, list[FormatRow]]:
    """Reads one weight of each format in turns.

    Raises `WrongResult` if rows that are read alone differ from those of the whole, or if there are
    numbers that are not finite.
    """
    with TemporaryDirectory(prefix="scail-formats-") as folder:
        files = write_files(Path(folder))
        stored = {name: StoredWeights(TensorFile(path)) for name, path in files.items()}
        out = torch.empty(ROWS, COLUMNS)
        for name, weights in stored.items():
            check(name, weights, out)
        works = {name: partial(read, weights, out) for name, weights in stored.items()}
        found = interleaved(works, lambda work: work(), runs)
        rows = []
        for name, seconds in found.items():
            speeds = [files[name].stat().st_size / 1e6 / one for one in seconds]
            median, noise = spread(speeds) or (0.0, 0.0)
            rate = ROWS * COLUMNS / 1e6 / (spread(seconds) or (1.0, 0.0))[0]
            rows.append(FormatRow(name, median, noise, rate))
    return "parts that were read alone, and finite numbers", rows


def read(weights: StoredWeights, out: Tensor) -> float:
    """Seconds that a weight takes."""
    begin = perf_counter()
    weights.read(NAME, out)
    return perf_counter() - begin


def check(name: str, weights: StoredWeights, out: Tensor) -> None:
    weights.read(NAME, out)
    part = torch.empty_like(out[CHECKED_ROWS])
    weights.read(NAME, part, CHECKED_ROWS.start)
    require(bool(out.isfinite().all()), f"{name} has values that are not finite")
    require(torch.equal(part, out[CHECKED_ROWS]), f"rows of {name} differ when read alone")


def write_files(folder: Path) -> dict[str, Path]:
    """A file for each format, by its name."""
    torch.manual_seed(0)
    files = {}
    for name, make in SAFETENSORS.items():
        files[name] = folder / f"{len(files)}.safetensors"
        stem = NAME.removesuffix(".weight")
        save_file({f"{stem}.{end}": held.contiguous() for end, held in make().items()}, files[name])
    for name in GGUF:
        files[f"GGUF {name}"] = folder / f"{name}.gguf"
        write_gguf(files[f"GGUF {name}"], name)
    return files


def write_gguf(path: Path, kind: str) -> None:
    """Blocks of random bytes below 48: as halves, all scales that they make are finite."""
    number, size = next((n, t) for n, t in TYPES.items() if t.name == kind)
    raw = NAME.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(raw)) + raw
    head += struct.pack("<I2QIQ", 2, COLUMNS, ROWS, number, 0)
    data = _bytes(48, ROWS, COLUMNS // size.values * size.nbytes)
    path.write_bytes(head + bytes(-len(head) % 32) + data.numpy().tobytes())


def _bytes(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, dtype=torch.uint8)


def _told(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _fp8(*scale: int) -> Codes:
    return {"weight": _bytes(120, ROWS, COLUMNS).view(E4M3), "weight_scale": torch.ones(scale)}


def _int8(told: str | None) -> Codes:
    codes = _bytes(256, ROWS, COLUMNS).view(torch.int8)
    beside = {} if told is None else {"comfy_quant": _told(told)}
    return {"weight": codes, "weight_scale": torch.ones(ROWS, 1), **beside}


SAFETENSORS: Mapping[str, Callable[[], Codes]] = {
    "BF16": lambda: {"weight": torch.randn(ROWS, COLUMNS).bfloat16()},
    "FP8, one scale": partial(_fp8),
    "FP8, squares": lambda: {
        **_fp8(ROWS // 128, COLUMNS // 128),
        "comfy_quant": _told('{"format": "float8_e4m3fn_blockwise", "group_size": 128}'),
    },
    "INT8 rows": partial(_int8, None),
    "ConvRot": partial(_int8, '{"format": "int8_tensorwise", "convrot": true}'),
    "MXFP8": lambda: {
        "weight": _bytes(120, ROWS, COLUMNS).view(E4M3),
        "weight_scale": _bytes(120, ROWS, COLUMNS // 32),
    },
    "NVFP4": lambda: {
        "weight": _bytes(256, ROWS, COLUMNS // 2),
        "weight_scale": _bytes(120, ROWS, COLUMNS // 16).view(E4M3),
        "weight_scale_2": torch.ones(()),
        "comfy_quant": _told('{"format": "nvfp4"}'),
    },
    "quanto": lambda: {
        "weight._data": _bytes(256, ROWS, COLUMNS).view(torch.int8),
        "weight._scale": torch.ones(ROWS, 1).bfloat16(),
    },
}


def formats_table(rows: Sequence[FormatRow]) -> str:
    """Columns for a terminal."""
    lines = [(row.name, row.mb_per_s, row.noise_mb_per_s, row.weights_per_s) for row in rows]
    return columns({"MB/s": ".0f", "+-": ".0f", "M weights/s": ".0f"}, lines)


def formats_figures(rows: Sequence[FormatRow]) -> list[Figure]:
    return [Figure(row.name, row.mb_per_s, "MB/s", row.noise_mb_per_s, "higher") for row in rows]


SUITE = Suite(measure_formats, formats_table, formats_figures)
