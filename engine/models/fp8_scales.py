"""The scales of a checkpoint's FP8 weights: which belongs to which, and that none is left over.

Programs write them as `X.scale_weight` or `X.weight_scale` beside `X.weight`, at times under
another prefix than the weights. Read without its scale a weight would be finite and hundreds of
times too large, so a scale that belongs to no weight is an error.
"""

import json
import logging
import math
from collections.abc import Iterable, Sequence

from engine.errors import BadCheckpoint
from engine.models.tensorfile import TensorFile

log = logging.getLogger(__name__)

SCALES = (".scale_weight", ".weight_scale")
# of the activations, for programs that compute in FP8
ACTIVATION_SCALES = (".scale_input", ".input_scale", ".output_scale")
FORMAT = ".comfy_quant"  # JSON that says how a linear is stored
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"  # of the file: the same JSON for all linears
KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise")


def is_beside(name: str) -> bool:
    """Tells if a tensor belongs to a stored weight and is none itself."""
    ends = (*SCALES, *ACTIVATION_SCALES, FORMAT)
    return name.endswith(ends) or name == MARKER or name.endswith(f".{MARKER}")


class Fp8Scales:
    """The scales of one file. Ask for each weight, then `require_all_used`."""

    def __init__(self, file: TensorFile, prefixes: Sequence[str]) -> None:
        """Raises `BadCheckpoint` for linears that are stored in a way that is not read."""
        self._file, self._prefixes = file, prefixes
        self._unused = {name for name in file if name.endswith(SCALES)}
        self._without: list[str] = []  # FP8 weights
        marked = any(name == MARKER or name.endswith(f".{MARKER}") for name in file)
        self._is_scaled = marked or bool(self._unused)
        self._check_formats()
        told = [name for name in file if name.endswith(ACTIVATION_SCALES)]
        if told:
            log.warning(
                "%s: %d scales of activations (%s, ...) are not used, the engine measures its own",
                file.path.name, len(told), told[0],
            )  # fmt: skip

    def find(self, name: str, prefix: str) -> str | None:
        """The name of a stored weight's scale; None if there is none.

        Raises `BadCheckpoint` if there are two, or one that does not fit the weight.
        """
        stem = name.removeprefix(prefix).removesuffix(".weight")
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
        self._unused.discard(found[0])
        return found[0]

    def require_all_used(self) -> None:
        """Raises `BadCheckpoint` for a scale without weight, and in a file that has scales for a
        weight without one. Warns of a file whose FP8 weights have none at all.
        """
        file = self._file.path.name
        if self._unused:
            raise BadCheckpoint(
                f"{file}: {min(self._unused)}{_more(self._unused)} scales no weight that is read "
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

    def _check_formats(self) -> None:
        for name in self._file:
            if name.endswith(FORMAT):
                with self._file.open(name) as tensor:
                    self._check_format(name, bytes(tensor.flatten().tolist()))
        if METADATA in self._file.metadata:
            told = _json(self._file.metadata[METADATA])
            layers = told.get("layers") if isinstance(told, dict) else None
            if not isinstance(layers, dict):
                raise BadCheckpoint(
                    f"{self._file.path.name}: its {METADATA} names no layers; fetch it again."
                )
            for name, value in layers.items():
                self._check_format(f"{METADATA} of {name}", value)

    def _check_format(self, name: str, told: object) -> None:
        told = _json(told) if isinstance(told, bytes) else told
        kind = told.get("format") if isinstance(told, dict) else told
        if kind not in KNOWN_FORMATS:
            raise BadCheckpoint(
                f"{self._file.path.name}: {name} says that it is stored as {str(kind)[:60]!r}; "
                f"only {', '.join(KNOWN_FORMATS)} and 16 or 32 bits are read."
            )


def _json(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _more(names: Iterable[str]) -> str:
    count = len([*names]) - 1
    return f" and {count} more" if count else ""
