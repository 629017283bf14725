"""A LoRA file: small changes to weights, merged in FP32.

    W' = W + strength * (alpha / rank * up @ down + diff),    bias' = bias + strength * diff_b

Layout of lightx2v's rank-64 files and of their likes: `diffusion_model.MODULE` before
`.lora_down.weight` and `.lora_up.weight` (or `lora_A` and `lora_B`), `.alpha`, `.diff`, `.diff_b`.
Without an alpha the factor alpha / rank is 1.
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
from engine.models.tensorfile import TensorFile, is_finite

log = logging.getLogger(__name__)

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
KINDS = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
# LoRAs of the image-to-video model change it for its 36 input channels; SCAIL's has 20
OTHER_INPUT = "patch_embedding.weight"
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A change of one weight: the product of two stored tensors, or one stored tensor."""

    tensors: tuple[str, ...]  # (down, up) or (diff,)
    factor: float = 1.0  # alpha / rank


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

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Finds the weights that this file changes; each must be in `shapes` and fit.

        Only the values of the alphas are read.
        """
        self._changes = {}
        modules: dict[str, dict[str, str]] = {}  # module -> kind -> stored name
        for name in self._file:
            module, kind = self._parse(name)
            other = modules.setdefault(module, {}).setdefault(kind, name)
            if other != name:
                raise BadCheckpoint(f"{self.path.name}: {other} and {name} mean the same tensor.")
        for module, kinds in modules.items():
            if ("down" in kinds) != ("up" in kinds):
                raise BadCheckpoint(f"{self.path.name} has only half of the pair for {module}.")
            weight = f"{module}.weight" if f"{module}.weight" in shapes else module
            if "down" in kinds:
                factor = self._factor(kinds["down"], kinds["alpha"]) if "alpha" in kinds else 1.0
                self._add(weight, WeightChange((kinds["down"], kinds["up"]), factor), shapes)
            if "diff" in kinds:
                self._add(weight, WeightChange((kinds["diff"],)), shapes)
            if "diff_b" in kinds:
                self._add(f"{module}.bias", WeightChange((kinds["diff_b"],)), shapes)
            if kinds.keys() == {"alpha"}:
                raise BadCheckpoint(
                    f"{self.path.name}: {kinds['alpha']} changes nothing, the pair that it scales "
                    "is not in the file."
                )
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

    def _factor(self, down: str, alpha: str) -> float:
        """Alpha / rank."""
        rank = next(iter(self._file.shape(down)), 0)
        if math.prod(self._file.shape(alpha)) != 1 or not rank:
            raise BadCheckpoint(
                f"{self.path.name}: {alpha} {list(self._file.shape(alpha))} over the rank {rank} "
                f"of {down} is no factor; one number over a rank above 0 is expected."
            )
        with self._file.open(alpha) as tensor:
            factor = math.nan if tensor.is_complex() else tensor.double().item() / rank
        if not abs(self.strength * factor) <= LARGEST:
            raise BadCheckpoint(
                f"{self.path.name}: {alpha} makes the factor {factor}, a finite one is expected."
            )
        return factor

    def _parse(self, name: str) -> tuple[str, str]:
        short = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
        for ending, kind in KINDS.items():
            if short.endswith(ending):
                return short.removesuffix(ending), kind
        raise BadCheckpoint(
            f"{self.path.name}: {name} is no part of a LoRA; names that end in "
            f"{', '.join(KINDS)} are expected."
        )

    def _add(
        self, weight: str, change: WeightChange, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        if weight not in shapes:
            raise BadCheckpoint(
                f"{self.path.name} changes {weight}, which this model does not have: "
                "the LoRA belongs to another model."
            )
        found, expected = self._shape(change), _flat(shapes[weight])
        if found == expected:
            self._changes.setdefault(weight, []).append(change)
        elif weight == OTHER_INPUT and found is not None and found[0] == expected[0]:
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
