"""The scales of a checkpoint's FP8 weights: which belongs to which, and that none is left over.

Programs write them as `X.scale_weight` or `X.weight_scale` beside `X.weight`, at times under
another prefix than the weights. Read without its scale a weight would be finite and hundreds of
times too large, so a scale that belongs to no weight is an error. What a file tells of its formats
is compared with what it holds.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from engine.errors import BadCheckpoint
from engine.models.tensorfile import TensorFile

log = logging.getLogger(__name__)

SCALES = (".scale_weight", ".weight_scale")
# of the activations, for programs that compute in FP8
ACTIVATION_SCALES = (".scale_input", ".input_scale", ".output_scale")
FORMAT = ".comfy_quant"  # JSON that says how a linear is stored
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"  # of the file: the same JSON for all linears
KNOWN_FORMATS = {  # and the types of their weights, as the two containers call them
    "float8_e4m3fn": ("F8_E4M3", "torch.float8_e4m3fn"),
    "float8_e5m2": ("F8_E5M2", "torch.float8_e5m2"),
    "float8_e4m3fn_rowwise": ("F8_E4M3", "torch.float8_e4m3fn"),
}
ROTATED = "convrot"  # a flag beside the format: weights that no reader here turns back
_PLAIN = ("format", "params", "full_precision_matrix_mult")  # entries that mean nothing here


class Format(NamedTuple):
    """How a file says that a linear is stored."""

    source: str  # as messages call the place where it says so
    kind: str
    settings: Mapping[str, object]  # beside the format, those that are set


def is_beside(name: str) -> bool:
    """Tells if a tensor belongs to a stored weight and is none itself."""
    ends = (*SCALES, *ACTIVATION_SCALES, FORMAT)
    return name.endswith(ends) or name == MARKER or name.endswith(f".{MARKER}")


class Fp8Scales:
    """The scales of one file. Ask for each weight, then `require_all_used`."""

    def __init__(self, file: TensorFile, prefixes: Sequence[str]) -> None:
        """Raises `BadCheckpoint` for scales and formats that cannot be read."""
        self._file, self._prefixes = file, prefixes
        if odd := [name for name in file.left_out if name.endswith((*SCALES, FORMAT))]:
            raise BadCheckpoint(
                f"{file.path.name}: {odd[0]} is no tensor, one is expected. Save the file as "
                ".safetensors."
            )
        self._unused = {name for name in file if name.endswith(SCALES)}
        self._without: list[str] = []  # FP8 weights
        self._not_fp8: list[str] = []  # that have a scale
        self._asked: set[str] = set()
        self._formats = {  # by the linear's name; what a tensor says beats the file's metadata
            **{name: _format(f"{METADATA} of {name}", told) for name, told in self._layers()},
            **{
                name.removesuffix(FORMAT): _format(name, self._told(name))
                for name in file
                if name.endswith(FORMAT)
            },
        }
        self._contradicted: list[str] = []
        marked = any(name == MARKER or name.endswith(f".{MARKER}") for name in file)
        self._is_scaled = marked or bool(self._unused) or bool(self._formats)
        told = [name for name in file if name.endswith(ACTIVATION_SCALES)]
        if told:
            log.warning(
                "%s: %d scales of activations (%s, ...) are not used, the engine measures its own",
                file.path.name, len(told), told[0],
            )  # fmt: skip

    def find(self, name: str, prefix: str) -> str | None:
        """The name of a stored weight's scale; None if there is none.

        Raises `BadCheckpoint` if there are two, one that does not fit the weight, or a format that
        is not read.
        """
        self._asked.add(name)
        stem = name.removeprefix(prefix).removesuffix(".weight")
        self._check_format(name, stem)
        places = (before + stem + end for before in self._prefixes for end in SCALES)
        found = [place for place in places if place in self._file]
        if len(found) > 1:
            raise BadCheckpoint(
                f"{self._file.path.name} has two scales for {name}: {found[0]} and {found[1]}; "
                "one is expected."
            )
        shape = self._file.shape(name)
        if not found:
            if self._file.is_fp8(name) and len(shape) > 1:
                self._without.append(name)
            return None
        scale = self._file.shape(found[0])
        rows = next(iter(shape), 1)
        if math.prod(scale) != 1 and (scale[0] != rows or math.prod(scale) != rows):
            raise BadCheckpoint(
                f"{self._file.path.name}: {found[0]} has {math.prod(scale)} values "
                f"{list(scale)}; one, or one for each row of {name} {list(shape)}, is expected."
            )
        if not self._file.is_fp8(name):
            self._not_fp8.append(name)
        self._unused.discard(found[0])
        return found[0]

    def require_all_used(self) -> None:
        """Raises `BadCheckpoint` for a scale or a foreign format without weight, and in a file that
        has scales for a weight without one. Warns of what the file says and does not hold.
        """
        file = self._file.path.name
        unused = {name for name in self._unused if not self._is_ignored(_scaled_by(name))}
        if unused:
            raise BadCheckpoint(
                f"{file}: {min(unused)}{_more(unused)} scales no weight that is read "
                "from the file: it is damaged, or named in a way that is not known here."
            )
        if self._without and self._is_scaled:
            raise BadCheckpoint(
                f"{file}: {self._without[0]}{_more(self._without)} is stored in FP8 and its scale "
                "is not in the file, while others are: part of the file is missing."
            )
        if self._without:
            log.warning(
                "%s: %d FP8 weights have no scales, they are taken as plain numbers",
                file, len(self._without),
            )  # fmt: skip
        if self._not_fp8:
            log.warning(
                "%s: %s%s is not stored in FP8 and has a scale, by which it is multiplied",
                file, self._not_fp8[0], _more(self._not_fp8),
            )  # fmt: skip
        stray = [told for name, told in self._formats.items() if not self._is_ignored(name)]
        for told in stray:
            self._require_known(told)
        if stray:
            log.warning(
                "%s: %s%s is told of no weight that is read", file, stray[0].source, _more(stray)
            )
        if self._contradicted:
            log.warning(
                "%s: %s%s; the tensors are taken as they are stored",
                file, self._contradicted[0], _more(self._contradicted),
            )  # fmt: skip

    def _is_ignored(self, stem: str) -> bool:
        """Tells if a name belongs to a tensor of another model in the file, which is not read."""
        held = [name for name in (f"{stem}.weight", stem) if name in self._file]
        return bool(held) and not self._asked.intersection(held)

    def _check_format(self, name: str, stem: str) -> None:
        held = self._file.dtype(name)
        for told in (self._formats.pop(before + stem, None) for before in self._prefixes):
            if told is None:
                continue
            self._require_known(told)
            if held not in KNOWN_FORMATS[told.kind]:
                self._contradicted.append(f"{told.source} says {told.kind} and {name} is {held}")
            elif told.settings:
                some = ", ".join(sorted(told.settings)[:5])
                self._contradicted.append(f"{told.source} has {some[:80]}, which is not known here")

    def _require_known(self, told: Format) -> None:
        if told.kind not in KNOWN_FORMATS:
            raise BadCheckpoint(
                f"{self._file.path.name}: {told.source} says that it is stored as "
                f"{told.kind!r}; only {', '.join(KNOWN_FORMATS)} and 16 or 32 bits are read."
            )
        if ROTATED in told.settings:
            raise BadCheckpoint(
                f"{self._file.path.name}: {told.source} says that its columns are rotated "
                f"({ROTATED}), which is not read. Use a copy that is not."
            )

    def _layers(self) -> Iterable[tuple[str, object]]:
        if METADATA not in self._file.metadata:
            return []
        told = _json(self._file.metadata[METADATA])
        layers = told.get("layers") if isinstance(told, dict) else None
        if not isinstance(layers, dict):
            raise BadCheckpoint(
                f"{self._file.path.name}: its {METADATA} names no layers; fetch it again."
            )
        return layers.items()

    def _told(self, name: str) -> object:
        with self._file.open(name) as tensor:
            if tensor.dtype != torch.uint8:
                raise BadCheckpoint(
                    f"{self._file.path.name}: {name} is stored as {tensor.dtype}; the bytes of a "
                    "text are expected."
                )
            return _json(bytes(tensor.flatten().tolist()))


def _format(source: str, told: object) -> Format:
    if not isinstance(told, dict):
        return Format(source, str(told)[:60], {})
    inner = told.get("params")
    settings = {**(inner if isinstance(inner, dict) else {}), **told}
    return Format(
        source,
        str(settings.get("format"))[:60],
        {key: value for key, value in settings.items() if value and key not in _PLAIN},
    )


def _scaled_by(scale: str) -> str:
    """The name of the module that a scale is named after."""
    return scale.rpartition(".")[0]


def _json(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _more(names: Iterable[object]) -> str:
    count = len([*names]) - 1
    return f" and {count} more" if count else ""
