"""The parameters of a file of tensors, whatever format each is stored in, read in FP32.

Finds the format of each and accounts for the rest of the file: what belongs to no parameter is an
error if weights would be wrong without it, else a note.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.formats.collect import Collection, collect
from engine.models.formats.fp8 import CAST, LARGEST_CAST, SCALES
from engine.models.formats.held import WEIGHT, Codes, Held, Tensors, Weight
from engine.models.formats.quanto import FORMAT as QUANTO_FORMAT
from engine.models.formats.quanto import MAP as QUANTO_MAP
from engine.models.formats.table import ACTIVATIONS, BESIDE, known_kind, weight_of
from engine.models.formats.told import METADATA, more
from engine.models.tensorfile import TensorFile

USED_METADATA = (METADATA, QUANTO_FORMAT, QUANTO_MAP)
INPUT_FACTOR = "pre_quant_scale"  # [C]: what the input of a linear is multiplied by
FEW_BITS_LOSS = 3.0  # per cent of a weight that a format may lose without a word
_CHUNK = 1 << 19  # values that are dequantised at once: they stay in the processor's cache
_SHOWN = 40


class StoredWeights:
    """The parameters of a file under their names without the model's prefix.

    Opening raises `BadCheckpoint` for all that the headers contradict; no weight is read.
    """

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        held = collect(file)
        self._weights = {name: _weight(held.held(name)) for name in held.own}
        self._is_scaled = held.is_marked or any(
            scale in endings for endings in held.beside.values() for scale in SCALES
        )
        self.notes = [*held.notes, *self._notes_of_casts(held), *self._account(held)]
        self.notes += _notes_of(self._weights.values())  # all an operator should know

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def read(self, name: str, out: Tensor, first: int = 0) -> None:
        """Writes rows of a weight, from `first` on, into `out` in the type of `out`.

        `out` may be smaller than a weight that was filled up. Raises `BadCheckpoint` for damage
        that shows; values that are not finite are the caller's to look for.
        """
        weight = self._weights[name]
        target = out if out.ndim else out.view(1)
        if len(weight.shape) not in (0, target.ndim):  # leading ones of a table
            target = target.view(*weight.shape)
        with self._open(weight) as tensors:
            if weight.is_plain and INPUT_FACTOR not in tensors:
                plain = tensors[WEIGHT] if tensors[WEIGHT].ndim else tensors[WEIGHT].view(1)
                target.copy_(plain[first : first + len(target)])
            else:
                self._require_factors(weight, tensors)
                _fill(weight, tensors, target, first)
        if weight.kind == CAST and self._is_scaled and _reaches(out, LARGEST_CAST):
            raise BadCheckpoint(self._lost_scale([weight.names[WEIGHT]]))

    def _require_factors(self, weight: Weight, tensors: Tensors) -> None:
        """Raises `BadCheckpoint` if a factor of the input is 0 or below."""
        if INPUT_FACTOR in tensors and bool((tensors[INPUT_FACTOR].float() <= 0).any()):
            raise BadCheckpoint(
                f"{self.file.path.name}: {weight.names[INPUT_FACTOR]} goes down to "
                f"{tensors[INPUT_FACTOR].float().min().item():g}; factors above 0 are expected. "
                "Fetch the file again."
            )

    def codes(self, name: str) -> Codes | None:
        """The codes of a weight as they are stored, if a package could hold them as they are.

        None for formats that have to be dequantised, and if the linear's input has a factor. Codes
        of a weight that was filled up are as large as it is stored.
        """
        weight = self._weights[name]
        if weight.codes is None:
            return None
        with self._open(weight) as tensors:
            return weight.codes.read(tensors)

    def _open(self, weight: Weight) -> "_Opened":
        return _Opened(self.file, weight.names)

    def _notes_of_casts(self, held: Collection) -> list[str]:
        """Says which FP8 weights have no scales. Raises if the file says that they have some."""
        cast = [w.names[WEIGHT] for w in self._weights.values() if w.kind == CAST]
        matrices = [n for n in cast if len(self.file.shape(n)) > 1]
        has_scales = any(s in endings for endings in held.beside.values() for s in SCALES)
        if matrices and held.is_marked and not has_scales:
            raise BadCheckpoint(self._lost_scale(matrices))
        if not matrices:
            return []
        others = ", while others have" if has_scales else ""
        return [
            f"{matrices[0]}{more(matrices)}: FP8 weights have no scales{others}; they are taken as "
            "plain numbers"
        ]

    def _lost_scale(self, names: Sequence[str]) -> str:
        return (
            f"{self.file.path.name}: {names[0]}{more(names)} is stored in FP8 and its scale is not "
            "in the file: its codes reach the end of their range, or a marker says that it has "
            "one. Part of the file is missing."
        )

    def _account(self, held: Collection) -> list[str]:
        """Every tensor and every word of the file is used, refused or told."""
        used = {stored for weight in self._weights.values() for stored in weight.names.values()}
        left: dict[str, list[str]] = defaultdict(list)
        for endings in held.beside.values():
            for ending, names in endings.items():
                left[ending] += [n for n in names if n not in used and not held.is_ignored(n)]
        file, notes = self.file.path.name, list[str]()
        if lost := [name for ending in BESIDE for name in left[ending]]:
            raise BadCheckpoint(
                f"{file}: {min(lost)}{more(lost)} scales no weight that is read "
                "from the file: it is damaged, or named in a way that is not known here."
            )
        stems = {name.removesuffix(".weight") for name in (*self._weights, *held.ignored)}
        stray = [said for stem, said in held.told.items() if stem not in stems]
        for said in stray:
            known_kind(said, self.file)
        if stray:
            source = f"{stray[0].source}{more(stray)}"
            notes.append(f"{source} is told of no weight that is read")
        if unused := [name for ending in ACTIVATIONS for name in left[ending]]:
            notes.append(
                f"{len(unused)} scales of activations ({unused[0]}, ...) are not used, the engine "
                "measures its own"
            )
        if held.ignored:
            notes.append(f"ignored {len(held.ignored)} tensors outside {held.prefix}")
        for names, what in (
            (self.file.left_out, "are no tensors and not used"),
            (self.file.beside, "lie beside the weights and are not used"),
        ):
            if names:
                notes.append(f"{', '.join(name[:_SHOWN] for name in names[:10])} {what}")
        return notes


class _Opened(ExitStack):
    """The tensors of a weight, mapped while the block lasts."""

    def __init__(self, file: TensorFile, names: Mapping[str, str]) -> None:
        super().__init__()
        self._file, self._names = file, names

    def __enter__(self) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().__enter__()
        return {key: self.enter_context(self._file.open(n)) for key, n in self._names.items()}


def _weight(held: Held) -> Weight:
    weight = weight_of(held)
    if INPUT_FACTOR not in held:
        return weight
    columns = weight.shape[-1] if len(weight.shape) == 2 else 0
    held.require_numbers(INPUT_FACTOR, *[(columns - filled,) for filled in range(weight.padding)])
    names = {**weight.names, INPUT_FACTOR: held.tensors[INPUT_FACTOR]}
    return replace(weight, names=names, codes=None)


def _fill(weight: Weight, tensors: Tensors, target: Tensor, first: int) -> None:
    """Dequantises rows of a weight, some at a time."""
    rows = weight.open(tensors)
    factor = tensors[INPUT_FACTOR].float().flatten() if INPUT_FACTOR in tensors else None
    step = max(1, _CHUNK // max(1, torch.Size(weight.shape[1:]).numel()))
    for begin in range(0, len(target), step):
        end = min(begin + step, len(target))
        part = rows(first + begin, first + end)
        if target.ndim == 2:
            part = part[:, : target.shape[1]]
        target[begin:end] = part if factor is None else part.float() * factor


def _reaches(weight: Tensor, largest: float) -> bool:
    low, high = torch.aminmax(weight)
    return bool(high >= largest) or bool(low <= -largest)


def _notes_of(weights: Iterable[Weight]) -> list[str]:
    """What the formats have to say, once for each sentence, with how many weights it is about."""
    about: dict[str, list[str]] = defaultdict(list)
    lossy: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        for note in weight.notes:
            about[note].append(weight.names[WEIGHT])
        if weight.loss > FEW_BITS_LOSS:
            lossy[weight.kind].append(weight)
    notes = [f"{names[0]}{more(names)} {note}" for note, names in about.items()]
    return notes + [
        f"{len(held)} weights are stored as {kind}, which lost about {held[0].loss:g} % of each: "
        "all that is made from them has that error"
        for kind, held in lossy.items()
    ]
