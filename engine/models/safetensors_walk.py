"""The header of a safetensors file, walked and checked before any byte is taken for a weight.

u64 length, JSON of that length, data. Each tensor has a type, a shape and its place in the data;
together they fill the data without a gap (docs/reference/formats.md 1.4). The library would map
the file to read the header, and the system then reads megabytes around each page that is touched.
"""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeGuard

from engine.errors import BadCheckpoint

_MOST_HEADER_BYTES = 100 << 20  # as the library has it
_MOST_AXES = 16
_MOST_NAME = 1024  # characters
_METADATA = "__metadata__"
BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """One tensor of the file, as it lies there."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    nbytes: int


class SafetensorsHeader(NamedTuple):
    """All that the header tells."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def walk(path: Path) -> SafetensorsHeader:
    """Reads the header of a file. Raises `BadCheckpoint` for all that cannot be as it says."""
    size = path.stat().st_size
    try:
        with path.open("rb", buffering=0) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MOST_HEADER_BYTES, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            text = file.read(length)
        told = json.loads(text, object_pairs_hook=_once)
        if not isinstance(told, dict):
            raise ValueError("its header is no JSON object")
        return _checked(told, 8 + length, size)
    except (ValueError, RecursionError, OSError) as error:
        raise BadCheckpoint(
            f"{path.name} is damaged or cut short ({size} bytes): {error}. Fetch it again."
        ) from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError("its header gives a name twice")
    return held


def _checked(told: Mapping[str, object], begin: int, size: int) -> SafetensorsHeader:
    metadata = told.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no texts")
    tensors = {
        name: _tensor(name, entry, begin) for name, entry in told.items() if name != _METADATA
    }
    order = sorted((held.start, held.start + held.nbytes, name) for name, held in tensors.items())
    edges = [(begin, begin, "the header"), *order, (size, size, "the end of the file")]
    for (_, end, before), (start, _, after) in pairwise(edges):
        if end != start:
            what = "overlap" if end > start else "leave a gap"
            raise ValueError(f"{before[:80]} and {after[:80]} {what} at byte {min(end, start)}")
    return SafetensorsHeader(tensors, metadata)


def _tensor(name: str, entry: object, begin: int) -> StoredTensor:
    if len(name) > _MOST_NAME or not name.isprintable():
        raise ValueError(f"it names a tensor {name[:40]!r}, of {len(name)} characters")
    told = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (told.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape):
        raise ValueError(f"{name[:80]} is {str(dtype)[:20]} {str(shape)[:80]}")
    if dtype not in BITS or len(shape) > _MOST_AXES:
        raise ValueError(f"{name[:80]} is {str(dtype)[:20]} {str(shape)[:80]}")
    if not _are_sizes(place) or len(place) != 2:
        raise ValueError(f"{name[:80]} lies at {str(place)[:40]}")
    bits, nbytes = math.prod(shape) * BITS[dtype], place[1] - place[0]
    if bits != 8 * nbytes:
        raise ValueError(f"{name[:80]}, {dtype} {shape}, has {nbytes} bytes")
    return StoredTensor(dtype, tuple(shape), begin + place[0], nbytes)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 62
        for size in value
    )
