"""The changes that a LoRA's tensors stand for, made some rows at a time in FP32.

    pair  up @ down          LoHa  (w1_a @ w1_b) * (w2_a @ w2_b)          LoKr  kron(w1, w2)

docs/reference/formats.md 7.2. All axes of a weight after the first count as one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.lora_names import HADAMARD, KRONECKER
from engine.models.tensorfile import TensorFile

Shape: TypeAlias = tuple[int, ...]
RowReader: TypeAlias = Callable[[int, int], Tensor]  # rows [first, last) of a change


@dataclass(frozen=True, slots=True)
class Delta:
    """A change of one weight."""

    kind: str  # as people call it
    names: tuple[str, ...]  # of the stored tensors it is made of
    shape: Shape | None  # rows and columns; None if its tensors do not fit each other
    open: Callable[[Sequence[Tensor]], RowReader]  # of the tensors in fp32
    rank: int | None = None  # that an alpha is divided by; None: an alpha means nothing


def flat(shape: Shape) -> Shape:
    """The shape as rows and columns: all axes after the first are one."""
    return shape if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def delta_of(file: TensorFile, module: str, kinds: Mapping[str, str]) -> Delta | None:
    """What the tensors of a module make; None if they are none of the kinds above.

    Raises `BadCheckpoint` if a part is missing, or if there is more than one kind.
    """
    found = [
        make(file, module, kinds)
        for endings, make in (
            (("down", "up"), _pair),
            (HADAMARD, _hadamard),
            (KRONECKER, _kronecker),
        )
        if any(ending in kinds for ending in endings)
    ]
    if len(found) > 1:
        raise BadCheckpoint(
            f"{file.path.name} has more than one kind of change for {module}: "
            f"{found[0].names[0]} and {found[1].names[0]}; one is expected."
        )
    return found[0] if found else None


def whole(file: TensorFile, name: str, rows: int) -> Delta:
    """The change of a weight with so many rows that one stored tensor is."""

    def read(tensors: Sequence[Tensor]) -> RowReader:
        return lambda first, last: tensors[0].reshape(rows, -1)[first:last]

    return Delta("difference", (name,), flat(file.shape(name)), read)


def _pair(file: TensorFile, module: str, kinds: Mapping[str, str]) -> Delta:
    if ("down" in kinds) != ("up" in kinds):
        raise BadCheckpoint(f"{file.path.name} has only half of the pair for {module}.")
    names = kinds["down"], kinds["up"]
    down, up = (flat(file.shape(name)) for name in names)
    fits = len(down) == len(up) == 2 and up[1] == down[0] and down[0] > 0

    def read(tensors: Sequence[Tensor]) -> RowReader:
        down, up = (tensor.flatten(1) for tensor in tensors)
        return lambda first, last: up[first:last] @ down

    return Delta("pair", names, (up[0], down[1]) if fits else None, read, next(iter(down), 0))


def _hadamard(file: TensorFile, module: str, kinds: Mapping[str, str]) -> Delta:
    if lost := [ending for ending in HADAMARD if ending not in kinds]:
        raise BadCheckpoint(f"{file.path.name} lacks {lost[0]} of the LoHa for {module}.")
    names = tuple(kinds[ending] for ending in HADAMARD)
    shapes = [flat(file.shape(name)) for name in names]
    fits = all(len(shape) == 2 and 0 not in shape for shape in shapes)
    if fits:
        (a, r), (s, b), (c, t), (u, d) = shapes
        fits = (r, t, a, b) == (s, u, c, d)

    def read(tensors: Sequence[Tensor]) -> RowReader:
        a1, b1, a2, b2 = (tensor.flatten(1) for tensor in tensors)
        return lambda first, last: (a1[first:last] @ b1) * (a2[first:last] @ b2)

    shape = (shapes[0][0], shapes[1][1]) if fits else None
    return Delta("LoHa", names, shape, read, next(iter(shapes[1]), 0))


def _kronecker(file: TensorFile, module: str, kinds: Mapping[str, str]) -> Delta:
    """LoKr, whose two factors are whole or products; of two whole ones no alpha is used."""
    parts = [_factor(file, module, kinds, number) for number in ("lokr_w1", "lokr_w2")]
    (names1, shape1, rank1), (names2, shape2, rank2) = parts
    shape = None
    if shape1 is not None and shape2 is not None:
        shape = shape1[0] * shape2[0], shape1[1] * shape2[1]

    def read(tensors: Sequence[Tensor]) -> RowReader:
        w1 = _product(tensors[: len(names1)])
        w2 = _product(tensors[len(names1) :])

        def rows(first: int, last: int) -> Tensor:
            row = torch.arange(first, last)
            outer, inner = w1[row // len(w2)], w2[row % len(w2)]
            return (outer[:, :, None] * inner[:, None, :]).flatten(1)

        return rows

    rank = rank2 if rank2 is not None else rank1
    return Delta("LoKr", (*names1, *names2), shape, read, rank)


def _factor(
    file: TensorFile, module: str, kinds: Mapping[str, str], name: str
) -> tuple[tuple[str, ...], Shape | None, int | None]:
    """The tensors of one factor, its shape, and its rank if it is a product."""
    halves = [f"{name}_a" in kinds, f"{name}_b" in kinds]
    if (name in kinds) == all(halves) or (name in kinds and any(halves)):
        raise BadCheckpoint(
            f"{file.path.name}: the LoKr for {module} has {name} neither whole nor as a product "
            f"of {name}_a and {name}_b."
        )
    if name in kinds:
        shape = flat(file.shape(kinds[name]))
        return (kinds[name],), shape if len(shape) == 2 and 0 not in shape else None, None
    names = kinds[f"{name}_a"], kinds[f"{name}_b"]
    a, b = (flat(file.shape(one)) for one in names)
    fits = len(a) == len(b) == 2 and a[1] == b[0] and 0 not in (*a, *b)
    return names, (a[0], b[1]) if fits else None, next(iter(b), 0)


def _product(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].flatten(1)
    return tensors[0].flatten(1) @ tensors[1].flatten(1)
