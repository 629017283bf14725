"""quanto's INT8: `X.weight._data` with a scale a row in `X.weight._scale`.

    W = data * float(scale)                                     docs/reference/formats.md 5

The reference multiplies in the scale's 16 bits; here it is done in FP32.
"""

import base64
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from engine.errors import BadCheckpoint
from engine.models.formats.fp8 import scaled_rows
from engine.models.formats.held import WEIGHT, Held, Weight
from engine.models.formats.int8 import LOSS_OF_ROWS, one_or_rows
from engine.models.formats.told import shown
from engine.models.tensorfile import TensorFile

DATA, SCALE = "._data", "weight._scale"
FORMAT, MAP = "quantization_format", "quantization_map_base64"  # entries of the metadata
_READ = "qint8"
_MOST_BYTES = 16 << 20


def is_quanto(held: Held) -> bool:
    return held.tensors[WEIGHT].endswith(DATA)


def quanto(held: Held) -> Weight:
    if held.dtype() != "I8":
        raise held.error(f"quanto's codes as {held.dtype()}", f"I8 ({_READ})")
    rows, columns = held.require_matrix()
    held.require_numbers(SCALE, (rows, 1))
    names = {ending: held.tensors[ending] for ending in (WEIGHT, SCALE)}
    reader = partial(scaled_rows, held, SCALE, one_or_rows)
    return Weight("INT8 rows of quanto", LOSS_OF_ROWS, names, (rows, columns), reader)


def quantization_map(file: TensorFile) -> dict[str, str]:
    """The linears that a file says quanto has quantised, and how. Older files have the map beside.

    Raises `BadCheckpoint` for a map that is none, and for a format that is not quanto's.
    """
    told = file.metadata.get(FORMAT)
    if told not in (None, "quanto"):
        raise BadCheckpoint(
            f"{file.path.name}: its {FORMAT} is {told[:40]!r}; quanto, or none, is expected."
        )
    beside = file.path.with_name(f"{file.path.stem}_map.json")
    if MAP in file.metadata:
        source, text = f"{file.path.name}: its {MAP}", _decoded(file)
    elif beside.is_file() and any(name.endswith(DATA) for name in file):
        source, text = str(beside.name), _read(beside)
    else:
        return {}
    try:
        held = json.loads(text)
        return {name: _weights(entry) for name, entry in held.items()}
    except (ValueError, RecursionError, AttributeError) as error:
        raise BadCheckpoint(f"{source} is no map of linears: {error}.") from error


def _weights(entry: object) -> str:
    return shown(str(entry.get("weights") if isinstance(entry, Mapping) else entry), 40)


def _decoded(file: TensorFile) -> bytes:
    try:
        return base64.b64decode(file.metadata[MAP], validate=True)
    except ValueError as error:
        raise BadCheckpoint(f"{file.path.name}: its {MAP} is no base64: {error}.") from error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size <= _MOST_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    raise BadCheckpoint(f"{path.name} has more than {_MOST_BYTES} bytes; it is no map of linears.")


def require_read(file: TensorFile, told: Mapping[str, str]) -> None:
    """Raises `BadCheckpoint` for a linear that quanto has stored in anything but INT8."""
    for name, kind in told.items():
        if kind != _READ:
            raise BadCheckpoint(
                f"{file.path.name}: {shown(name)} is stored as quanto's {kind}; {_READ} is read."
            )
