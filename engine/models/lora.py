"""A LoRA file: small changes to weights, merged in FP32.

    W' = W + strength * (alpha / rank * change + diff),    bias' = bias + strength * diff_b

The names are read in `engine.models.lora_names`, the kinds of change in `engine.models.lora_delta`,
magnitudes (DoRA) in `engine.models.lora_magnitude`. An alpha is a tensor beside its change; without
one the file's metadata may tell it (`engine.models.lora_metadata`), and else alpha / rank is 1.
All tensors of a file are merged, or it is refused; the one exception is told by `OTHER_INPUT`.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.errors import BadCheckpoint, BadRequest
from engine.models.lora_delta import Delta, RowReader, Shape, delta_of, flat, whole
from engine.models.lora_magnitude import per_output, renorm
from engine.models.lora_metadata import ADAPTER, AdapterScale, read_scale, warn_of_told_alpha
from engine.models.lora_names import EXPECTED, modules_by_joined_name, other_kind, parse
from engine.models.tensorfile import TensorFile, is_finite

log = logging.getLogger(__name__)

# LoRAs of the image-to-video model change it for its 36 input channels; SCAIL's has 20
OTHER_INPUT = "patch_embedding.weight"
LARGEST = torch.finfo(torch.float32).max
CHUNK_ROWS = 512  # of a change, made at once

Step = Literal["set", "renorm", "add"]  # in the order in which they are done


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A change of one weight."""

    step: Step
    delta: Delta
    factor: float = 1.0  # alpha / rank; without rank 1
    magnitude: str | None = None  # the stored tensor, of "renorm"


class Lora:
    """One LoRA file and its strength.

    Raises `BadCheckpoint` if it is not one, `BadRequest` for a strength that is no FP32 number.
    """

    def __init__(self, path: Path, strength: float = 1.0) -> None:
        if not abs(strength) <= LARGEST:  # NaN is refused too
            raise BadRequest(
                f"The strength of {path.name} is {strength}; a finite number is expected, mostly "
                "from 0 to 1."
            )
        self.path = path
        self.strength = strength
        self._file = TensorFile(path, top_key="module")
        self._changes: dict[str, list[WeightChange]] = {}  # by the name of the weight
        self.changes_other_input = False  # of the image-to-video model, which is left out

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Finds the weights that this file changes; each must be in `shapes` and fit.

        Only the values of the alphas are read.
        """
        self._changes = {}
        modules = self._modules(modules_by_joined_name(shapes))
        self._file.warn_of_metadata(ADAPTER)
        scale = read_scale(self.path, self._file.metadata)
        if scale is not None:
            scale.check(modules)
        else:
            pairs = [kinds for kinds in modules.values() if "down" in kinds]
            without_alpha = sum("alpha" not in kinds for kinds in pairs)
            warn_of_told_alpha(self.path, self._file.metadata, without_alpha)
        for module, kinds in modules.items():
            self._add_module(module, kinds, scale, shapes)
        if all(
            change.factor == 0 and change.step == "add"
            for held in self._changes.values()
            for change in held
        ):
            log.warning("%s: every alpha in it is 0, so it changes nothing", self.path.name)
        if not self._changes:
            raise BadCheckpoint(
                f"{self.path.name} changes nothing: none of its {len(self._file)} tensors can be "
                "added to a weight of this model."
            )

    @property
    def files(self) -> tuple[Path, ...]:
        return self._file.files

    def changes(self, name: str) -> bool:
        return name in self._changes

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._file.metadata

    @property
    def changed(self) -> tuple[str, ...]:
        """The weights that this file changes, once it was checked."""
        return tuple(self._changes)

    @property
    def differences(self) -> tuple[str, ...]:
        """Those of `changed` that a stored tensor is added to as it is."""
        is_whole = {name: any(len(one.delta.names) == 1 for one in held)
                    for name, held in self._changes.items()}  # fmt: skip
        return tuple(name for name in is_whole if is_whole[name])

    @property
    def rank(self) -> int | None:
        """The largest rank of its changes; None: it has none."""
        changes = (change for held in self._changes.values() for change in held)
        return max((change.delta.rank for change in changes if change.delta.rank), default=None)

    def changed_by(self, step: Step) -> frozenset[str]:
        """The weights that this file changes in that step."""
        return frozenset(
            name
            for name, held in self._changes.items()
            if any(change.step == step for change in held)
        )

    def summary(self) -> dict[str, object]:
        """What was found by `check`, for JSON."""
        held = [change for changes in self._changes.values() for change in changes]
        return {
            "weights": len(self._changes),
            "changes": dict(Counter(change.delta.kind for change in held)),
            "ranks": sorted({change.delta.rank for change in held if change.delta.rank}),
            "factors": sorted({round(change.factor, 6) for change in held if change.delta.rank}),
            "with_magnitudes": sum(change.step == "renorm" for change in held),
            "replaced": sum(change.step == "set" for change in held),
        }

    def apply(self, step: Step, name: str, weight: Tensor) -> None:
        """Does a step of this file's changes to a finite weight, FP32 on the CPU, in place.

        Raises `BadCheckpoint` if the result is not finite.
        """
        for change in self._changes.get(name, ()):
            if change.step != step:
                continue
            rows = weight.view(len(weight), -1)
            with self._opened(change.delta.names) as tensors:
                delta = change.delta.open(tensors)
                if change.step == "set":
                    rows.copy_(delta(0, len(rows)).view(rows.shape))
                elif change.magnitude is not None:
                    with self._open(change.magnitude) as magnitude:
                        renorm(rows, delta, change.factor, magnitude, self.strength)
                else:
                    _add(rows, delta, self.strength * change.factor)
            if not is_finite(weight):
                used = " and ".join(change.delta.names)
                raise BadCheckpoint(
                    f"{self.path.name}: {name} is not finite once {used} are added with strength "
                    f"{self.strength}. Use a smaller strength, or fetch the file again."
                )

    # --- what the file changes

    def _modules(self, joined: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The stored names by module and kind."""
        modules: dict[str, dict[str, str]] = {}
        adapters: set[str] = set()
        for name in (*self._file, *self._file.left_out):
            key = parse(name, joined)
            if key is None:
                if name in self._file.left_out:
                    continue
                kind = other_kind(name)
                what = f"belongs to {kind}, which is not read" if kind else "is no part of a LoRA"
                raise BadCheckpoint(
                    f"{self.path.name}: {name} {what}; names that end in {EXPECTED} are expected."
                )
            if name in self._file.left_out:
                raise BadCheckpoint(
                    f"{self.path.name}: {name} is no tensor, one is expected. Save the file as "
                    ".safetensors."
                )
            adapters |= {key.adapter} if key.adapter else set()
            other = modules.setdefault(key.module, {}).setdefault(key.kind, name)
            if other != name:
                raise BadCheckpoint(f"{self.path.name}: {other} and {name} mean the same tensor.")
        if len(adapters) > 1:
            raise BadCheckpoint(
                f"{self.path.name} holds the adapters {', '.join(sorted(adapters)[:5])}; a file "
                "with one is expected."
            )
        for names, what in (
            (self._file.left_out, "are no tensors and not used"),
            (self._file.beside, "lie beside the weights and are not used"),
        ):
            if names:
                log.warning("%s: %s %s", self.path.name, ", ".join(names[:5])[:200], what)
        return modules

    def _add_module(
        self,
        module: str,
        kinds: Mapping[str, str],
        scale: AdapterScale | None,
        shapes: Mapping[str, Shape],
    ) -> None:
        weight = f"{module}.weight" if f"{module}.weight" in shapes else module
        if "reshape_weight" in kinds:
            self._require_shape(kinds["reshape_weight"], weight, shapes)
        if "set_weight" in kinds:
            self._add(weight, self._whole("set", kinds["set_weight"], weight, shapes), shapes)
        delta = delta_of(self._file, module, kinds)
        if delta is not None:
            self._add_delta(module, weight, kinds, delta, scale, shapes)
        elif lost := next(
            (kinds[kind] for kind in ("up_bias", "magnitude") if kind in kinds), None
        ):
            raise BadCheckpoint(
                f"{self.path.name}: {lost} belongs to a pair that is not in the file."
            )
        elif kinds.keys() == {"alpha"}:
            raise BadCheckpoint(
                f"{self.path.name}: {kinds['alpha']} changes nothing, the pair that it scales "
                "is not in the file."
            )
        elif "alpha" in kinds:
            log.warning("%s: %s is not used, it scales no pair", self.path.name, kinds["alpha"])
        for kind, target in (
            ("diff", weight),
            ("diff_b", f"{module}.bias"),
            ("diff_m", f"{module}.modulation"),
        ):
            if kind in kinds:
                self._add(target, self._whole("add", kinds[kind], target, shapes), shapes)

    def _add_delta(
        self,
        module: str,
        weight: str,
        kinds: Mapping[str, str],
        delta: Delta,
        scale: AdapterScale | None,
        shapes: Mapping[str, Shape],
    ) -> None:
        factor = self._factor(module, kinds, delta, scale)
        magnitude = kinds.get("magnitude")
        if magnitude is not None and weight in shapes:
            per_output(self.path, magnitude, self._file.shape(magnitude), shapes[weight])
        step: Step = "add" if magnitude is None else "renorm"
        self._add(weight, WeightChange(step, delta, factor, magnitude), shapes)
        if "up_bias" in kinds:
            bias = f"{module}.bias"
            change = self._whole("add", kinds["up_bias"], bias, shapes)
            self._add(bias, replace(change, factor=factor), shapes)

    def _whole(
        self, step: Step, name: str, weight: str, shapes: Mapping[str, Shape]
    ) -> WeightChange:
        """A stored tensor as a change of a weight."""
        rows = next(iter(shapes.get(weight, ())), 1)
        return WeightChange(step, whole(self._file, name, rows))

    def _add(self, weight: str, change: WeightChange, shapes: Mapping[str, Shape]) -> None:
        if weight not in shapes:
            raise BadCheckpoint(
                f"{self.path.name} changes {weight}, which this model does not have: "
                "the LoRA belongs to another model."
            )
        found, expected = change.delta.shape, flat(shapes[weight])
        if len(change.delta.names) == 1:  # tables and vectors may have, or lack, leading ones
            plain = [_without_leading_ones(self._file.shape(change.delta.names[0])),
                     _without_leading_ones(shapes[weight])]  # fmt: skip
            found = expected if plain[0] == plain[1] else found
        rank = change.delta.rank or 0
        if found == expected and rank <= sum(expected):
            self._changes.setdefault(weight, []).append(change)
        elif weight == OTHER_INPUT and found is not None and found[0] == expected[0]:
            self.changes_other_input = True
            log.warning(
                "%s: its change of %s is left out, it is for other input channels (%s, here %s)",
                self.path.name, weight, found[1:], expected[1:],
            )  # fmt: skip
        else:
            names = change.delta.names
            stored = ", ".join(f"{n} {list(self._file.shape(n))}" for n in names)
            raise BadCheckpoint(
                f"{self.path.name}: {stored} cannot be added to {weight} {list(shapes[weight])}."
            )

    def _require_shape(self, name: str, weight: str, shapes: Mapping[str, Shape]) -> None:
        """Raises unless a stored shape is the one that the weight has: none is filled up."""
        count = math.prod(self._file.shape(name))
        with self._file.open(name) as tensor:
            is_list = tensor.ndim == 1 and count <= 8 and not tensor.is_floating_point()
            told = tuple(tensor.tolist()) if is_list and not tensor.is_complex() else None
        if told is None or told != shapes.get(weight):
            raise BadCheckpoint(
                f"{self.path.name}: {name} asks for the shape {list(told or ())} of {weight}, "
                f"which has {list(shapes.get(weight, ()))}: it is for a model with other inputs."
            )

    # --- reading

    @contextmanager
    def _open(self, name: str) -> Iterator[Tensor]:
        """A stored tensor in FP32, which must not be written to."""
        with self._file.open(name) as tensor:
            if not tensor.is_floating_point():
                raise BadCheckpoint(
                    f"{self.path.name}: {name} is stored as {tensor.dtype}; only floating point "
                    "tensors, FP8 to FP32, are read."
                )
            yield tensor.float()

    @contextmanager
    def _opened(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        with ExitStack() as stack:
            yield [stack.enter_context(self._open(name)) for name in names]

    def _factor(
        self, module: str, kinds: Mapping[str, str], delta: Delta, scale: AdapterScale | None
    ) -> float:
        """Alpha / rank, by the tensor beside the change or else by the metadata."""
        alpha, rank, first = kinds.get("alpha"), delta.rank, delta.names[0]
        told = scale.factor(module, rank) if scale is not None and rank != 0 else None
        if alpha is None:
            return self._finite(scale.source if scale else first, 1.0 if told is None else told)
        if rank is None:  # of a LoKr that is whole: its alpha is a nominal size
            return 1.0 if told is None else self._finite(first, told)
        if math.prod(self._file.shape(alpha)) != 1 or not rank:
            raise BadCheckpoint(
                f"{self.path.name}: {alpha} {list(self._file.shape(alpha))} over the rank {rank} "
                f"of {first} is no factor; one number over a rank above 0 is expected."
            )
        with self._file.open(alpha) as tensor:
            factor = math.nan if tensor.is_complex() else tensor.double().item() / rank
        if told is not None and not math.isclose(told, factor, rel_tol=1e-2):
            raise BadCheckpoint(
                f"{self.path.name}: {alpha} makes the factor {factor:g}, its metadata {told:g}. "
                "Fetch the file again, or remove one of the two."
            )
        return self._finite(f"{self.path.name}: {alpha}", factor)

    def _finite(self, source: str, factor: float) -> float:
        if not abs(self.strength * factor) <= LARGEST:
            raise BadCheckpoint(f"{source} makes the factor {factor}, a finite one is expected.")
        return factor


def merge(loras: Sequence[Lora], name: str, weight: Tensor) -> None:
    """Merges all files into a finite weight, FP32 on the CPU, in place.

    Values that replace others come first, then magnitudes, then what is added, so that the order
    of the files does not matter. Raises `BadCheckpoint` if the result is not finite.
    """
    steps: tuple[Step, ...] = ("set", "renorm", "add")
    for step in steps:
        for lora in loras:
            lora.apply(step, name, weight)


def require_one_magnitude(loras: Sequence[Lora]) -> None:
    """Raises `BadCheckpoint` if two files replace a weight, or its magnitudes: only one can."""
    steps: tuple[tuple[Step, str], ...] = (("set", "replace"), ("renorm", "set the magnitudes of"))
    for step, does in steps:
        seen: dict[str, Path] = {}
        for lora in loras:
            for name in sorted(lora.changed_by(step)):
                if name in seen:
                    raise BadCheckpoint(
                        f"{seen[name].name} and {lora.path.name} both {does} {name}; give one."
                    )
                seen[name] = lora.path


def _add(rows: Tensor, delta: RowReader, factor: float) -> None:
    for first in range(0, len(rows), CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, len(rows))
        rows[first:last].add_(delta(first, last).view(rows[first:last].shape), alpha=factor)


def _without_leading_ones(shape: Shape) -> Shape:
    first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def file_and_strength(text: str) -> tuple[Path, float]:
    """Parses FILE or FILE:STRENGTH, as command lines give it."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
