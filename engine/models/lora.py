"""A LoRA file: small changes to weights, merged in FP32.

    W' = W + strength * (alpha / rank * up @ down + diff),    bias' = bias + strength * diff_b

Layout of lightx2v's rank-64 files and of their likes: `diffusion_model.MODULE` before
`.lora_down.weight` and `.lora_up.weight` (or `lora_A` and `lora_B`), `.alpha`, `.diff`, `.diff_b`.
Without an alpha the factor alpha / rank is 1.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.tensorfile import TensorFile

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


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to one weight: a product of two stored tensors, or one."""

    tensors: tuple[str, ...]  # (down, up) or (diff,)
    alpha: str | None = None


class Lora:
    """One LoRA file and its strength. Raises `BadCheckpoint` if it is not one."""

    def __init__(self, path: Path, strength: float = 1.0) -> None:
        self.path = path
        self.strength = strength
        self._file = TensorFile(path)
        self._changes: dict[str, list[Change]] = {}  # by the name of the weight

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Finds the weights that this file changes; each must be in `shapes` and fit."""
        modules: dict[str, dict[str, str]] = {}  # module -> kind -> stored name
        for name in self._file:
            module, kind = self._parse(name)
            modules.setdefault(module, {})[kind] = name
        for module, kinds in modules.items():
            if ("down" in kinds) != ("up" in kinds):
                raise BadCheckpoint(f"{self.path.name} has only half of the pair for {module}.")
            weight = f"{module}.weight" if f"{module}.weight" in shapes else module
            if "down" in kinds:
                change = Change((kinds["down"], kinds["up"]), kinds.get("alpha"))
                self._add(weight, change, shapes)
            if "diff" in kinds:
                self._add(weight, Change((kinds["diff"],)), shapes)
            if "diff_b" in kinds:
                self._add(f"{module}.bias", Change((kinds["diff_b"],)), shapes)

    def changes(self, name: str) -> bool:
        return name in self._changes

    def add_to(self, name: str, weight: Tensor) -> None:
        """Adds all that this file changes to a weight, FP32 on the CPU, in place."""
        for change in self._changes[name]:
            factor = self.strength
            if len(change.tensors) == 1:
                with self._file.open(change.tensors[0]) as diff:
                    weight.add_(diff.float().view_as(weight), alpha=factor)
                continue
            with (
                self._file.open(change.tensors[0]) as down,
                self._file.open(change.tensors[1]) as up,
            ):
                if change.alpha is not None:
                    with self._file.open(change.alpha) as alpha:
                        factor *= alpha.item() / len(down)
                flat = weight.view(len(weight), -1)
                flat.addmm_(up.float().flatten(1), down.float().flatten(1), alpha=factor)

    def _parse(self, name: str) -> tuple[str, str]:
        short = next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
        for ending, kind in KINDS.items():
            if short.endswith(ending):
                return short.removesuffix(ending), kind
        raise BadCheckpoint(
            f"{self.path.name}: {name} is no part of a LoRA; names that end in "
            f"{', '.join(KINDS)} are expected."
        )

    def _add(self, weight: str, change: Change, shapes: Mapping[str, tuple[int, ...]]) -> None:
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

    def _shape(self, change: Change) -> tuple[int, ...] | None:
        """What the change adds up to, as rows and columns; None if its parts do not fit."""
        shapes = [_flat(self._file.shape(name)) for name in change.tensors]
        if len(shapes) == 1:
            return shapes[0]
        down, up = shapes
        if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
            return None
        return up[0], down[1]


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with everything after the first axis in one."""
    if len(shape) < 2:
        return shape
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns
