"""A LoRA file: small changes to weights, merged in FP32.

    W' = W + strength * (alpha / rank * up @ down + diff),    bias' = bias + strength * diff_b

The names are read in `engine.models.lora_names`. An alpha is a tensor beside its pair; without one
the file's metadata may tell it (`engine.models.lora_metadata`), and else alpha / rank is 1. Every
tensor of a file is merged, or the file is refused; the one exception is told by `OTHER_INPUT`.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import BadCheckpoint, BadRequest
from engine.models.lora_metadata import ADAPTER, AdapterScale, read_scale, warn_of_told_alpha
from engine.models.lora_names import EXPECTED, modules_by_joined_name, other_kind, parse
from engine.models.tensorfile import TensorFile, is_finite

log = logging.getLogger(__name__)

# LoRAs of the image-to-video model change it for its 36 input channels; SCAIL's has 20
OTHER_INPUT = "patch_embedding.weight"
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A change of one weight: the product of two stored tensors, or one stored tensor."""

    tensors: tuple[str, ...]  # (down, up) or (diff,)
    factor: float = 1.0  # alpha / rank, or 1 for a diff


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
        self._file = TensorFile(path)
        self._changes: dict[str, list[WeightChange]] = {}  # by the name of the weight
        self.changes_other_input = False  # of the image-to-video model, which is left out

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Finds the weights that this file changes; each must be in `shapes` and fit.

        Only the values of the alphas are read.
        """
        self._changes = {}
        modules = self._modules(modules_by_joined_name(shapes))
        self._file.warn_of_metadata(ADAPTER)
        scale = read_scale(self.path, self._file.metadata)
        if scale is not None:
            scale.check([module for module, kinds in modules.items() if "down" in kinds])
        pairs = [kinds for kinds in modules.values() if "down" in kinds]
        if scale is None:
            without_alpha = sum("alpha" not in kinds for kinds in pairs)
            warn_of_told_alpha(self.path, self._file.metadata, without_alpha)
        for module, kinds in modules.items():
            self._add_module(module, kinds, scale, shapes)
        if all(change.factor == 0 for held in self._changes.values() for change in held):
            log.warning("%s: every alpha in it is 0, so it changes nothing", self.path.name)
        if not self._changes:
            raise BadCheckpoint(
                f"{self.path.name} changes nothing: none of its {len(self._file)} tensors can be "
                "added to a weight of this model."
            )

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
        if self._file.left_out:
            some = ", ".join(self._file.left_out[:5])
            log.warning("%s: %s are no tensors and not used", self.path.name, some)
        return modules

    def _add_module(
        self,
        module: str,
        kinds: Mapping[str, str],
        scale: AdapterScale | None,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        if ("down" in kinds) != ("up" in kinds):
            raise BadCheckpoint(f"{self.path.name} has only half of the pair for {module}.")
        if "up_bias" in kinds and "up" not in kinds:
            raise BadCheckpoint(
                f"{self.path.name}: {kinds['up_bias']} belongs to a pair that is not in the file."
            )
        weight = f"{module}.weight" if f"{module}.weight" in shapes else module
        if "down" in kinds:
            factor = self._factor(module, kinds, scale)
            self._add(weight, WeightChange((kinds["down"], kinds["up"]), factor), shapes)
            if "up_bias" in kinds:
                self._add(f"{module}.bias", WeightChange((kinds["up_bias"],), factor), shapes)
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
                self._add(target, WeightChange((kinds[kind],)), shapes)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._file.files

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
        is_whole = {name: any(len(one.tensors) == 1 for one in held)
                    for name, held in self._changes.items()}  # fmt: skip
        return tuple(name for name in is_whole if is_whole[name])

    @property
    def rank(self) -> int | None:
        """The largest rank of its pairs; None: it has none."""
        changes = (change for held in self._changes.values() for change in held)
        ranks = [self._file.shape(pair.tensors[0])[0] for pair in changes if len(pair.tensors) > 1]
        return max(ranks, default=None)

    def changes(self, name: str) -> bool:
        return name in self._changes

    def add_to(self, name: str, weight: Tensor) -> None:
        """Adds all changes of this file to a finite weight, FP32 on the CPU, in place.

        Raises `BadCheckpoint` if the sum is not finite.
        """
        for change in self._changes[name]:
            factor = self.strength * change.factor
            if len(change.tensors) == 1:
                with self._open(change.tensors[0]) as diff:
                    weight.add_(diff.reshape(weight.shape), alpha=factor)
            else:
                with self._open(change.tensors[0]) as down, self._open(change.tensors[1]) as up:
                    flat = weight.view(len(weight), -1)
                    flat.addmm_(up.flatten(1), down.flatten(1), alpha=factor)
            if not is_finite(weight):
                raise BadCheckpoint(
                    f"{self.path.name}: {name} is not finite once {' and '.join(change.tensors)} "
                    f"are added with strength {self.strength}. Use a smaller strength, or fetch "
                    "the file again."
                )

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

    def _factor(self, module: str, kinds: Mapping[str, str], scale: AdapterScale | None) -> float:
        """Alpha / rank, by the tensor beside the pair or else by the metadata."""
        down, alpha = kinds["down"], kinds.get("alpha")
        rank = next(iter(self._file.shape(down)), 0)
        told = scale.factor(module, rank) if scale is not None and rank else None
        if alpha is None:
            return self._finite(scale.source if scale else down, 1.0 if told is None else told)
        if math.prod(self._file.shape(alpha)) != 1 or not rank:
            raise BadCheckpoint(
                f"{self.path.name}: {alpha} {list(self._file.shape(alpha))} over the rank {rank} "
                f"of {down} is no factor; one number over a rank above 0 is expected."
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

    def _add(
        self, weight: str, change: WeightChange, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        if weight not in shapes:
            raise BadCheckpoint(
                f"{self.path.name} changes {weight}, which this model does not have: "
                "the LoRA belongs to another model."
            )
        found, expected = self._shape(change), _flat(shapes[weight])
        if len(change.tensors) == 1:  # tables and vectors are also written without, or with, ones
            plain = [_without_leading_ones(self._file.shape(change.tensors[0])),
                     _without_leading_ones(shapes[weight])]  # fmt: skip
            found = expected if plain[0] == plain[1] else found
        if found == expected:
            self._changes.setdefault(weight, []).append(change)
        elif weight == OTHER_INPUT and found is not None and found[0] == expected[0]:
            self.changes_other_input = True
            log.warning(
                "%s: its change of %s is left out, it is for other input channels (%s, here %s)",
                self.path.name, weight, found[1:], expected[1:],
            )  # fmt: skip
        else:
            stored = ", ".join(f"{n} {list(self._file.shape(n))}" for n in change.tensors)
            raise BadCheckpoint(
                f"{self.path.name}: {stored} cannot be added to {weight} {list(shapes[weight])}."
            )

    def _shape(self, change: WeightChange) -> tuple[int, ...] | None:
        """Rows and columns of the change; None if its two tensors do not fit each other."""
        shapes = [_flat(self._file.shape(name)) for name in change.tensors]
        if len(shapes) == 1:
            return shapes[0]
        down, up = shapes
        if len(down) != 2 or len(up) != 2 or up[1] != down[0] or down[0] == 0:
            return None
        return up[0], down[1]


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as rows and columns: all axes after the first are one."""
    if len(shape) < 2:
        return shape
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns


def file_and_strength(text: str) -> tuple[Path, float]:
    """Parses FILE or FILE:STRENGTH, as command lines give it."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0
