"""What a file says of the formats of its linears: in a tensor beside each, or in its metadata.

Names may have the model's prefix or not, and both ways may be in one file: the tensor wins
(docs/reference/formats.md 1.2).
"""

import json
from collections.abc import Iterable, Mapping

import torch

from engine.errors import BadCheckpoint
from engine.models.formats.held import Told
from engine.models.tensorfile import TensorFile

FORMAT = "comfy_quant"  # ending of a tensor whose bytes are JSON
METADATA = "_quantization_metadata"  # of the file: the same JSON for all linears
_PLAIN = ("format", "params", "full_precision_matrix_mult")  # entries that mean nothing here
_MOST_BYTES = 1 << 16


def told_by_metadata(file: TensorFile) -> dict[str, Told]:
    """By the names of linears as the file has them."""
    if METADATA not in file.metadata:
        return {}
    told = _json(file.metadata[METADATA])
    layers = told.get("layers") if isinstance(told, dict) else None
    if not isinstance(layers, dict):
        raise BadCheckpoint(f"{file.path.name}: its {METADATA} names no layers; fetch it again.")
    return {name: _told(f"{METADATA} of {shown(name)}", entry) for name, entry in layers.items()}


def told_by_tensor(file: TensorFile, name: str) -> Told:
    """What the tensor of that name says. Raises `BadCheckpoint` if it holds no text."""
    count = torch.Size(file.shape(name)).numel()
    if file.dtype(name) != "U8" or count > _MOST_BYTES:
        raise BadCheckpoint(
            f"{file.path.name}: {name} is stored as {file.dtype(name)} {list(file.shape(name))}; "
            "the bytes of a text are expected."
        )
    return _told(name, _json(file.few_bytes(name)))


def _told(source: str, entry: object) -> Told:
    if not isinstance(entry, dict):
        return Told(source, str(entry)[:60])
    inner = entry.get("params")
    settings: Mapping[str, object] = {**(inner if isinstance(inner, dict) else {}), **entry}
    return Told(
        source,
        str(settings.get("format"))[:60],
        {str(key): value for key, value in settings.items() if key not in _PLAIN},
    )


def _json(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def shown(text: str, most: int = 80) -> str:
    """The beginning of a text of a file, as a message may show it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])


def more(names: Iterable[object]) -> str:
    """How many there are beside the first, for the end of a list."""
    count = len([*names]) - 1
    return f" and {count} more" if count > 0 else ""
