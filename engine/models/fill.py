"""Fills a library's module, built on the meta device, from a file that names tensors otherwise.

All that the headers tell is checked before a weight is read. Weights are then read one at a time.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import BadCheckpoint
from engine.models.tensorfile import TensorFile

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """The place of a parameter: part `part` of `parts` of a tensor's rows, times its scale."""

    name: str
    part: int = 0
    parts: int = 1
    scale: str | None = None  # the name of another tensor


def dims(file: TensorFile, name: str, count: int) -> Shape:
    """The `count` sizes of a tensor from which a model's dimensions are read, all above zero."""
    if name not in file:
        raise BadCheckpoint(f"{file.path.name}: {name} is missing.")
    shape = file.shape(name)
    if len(shape) != count or 0 in shape:
        raise BadCheckpoint(f"{file.path.name}: {name} is {shape}, expected {count} sizes above 0.")
    return shape


def depth(file: TensorFile, block: re.Pattern[str]) -> int:
    """The number of blocks in a file; in a name `block` finds the block's number as `n`."""
    return count_blocks(file, block, file.path.name)


def count_blocks(names: Iterable[str], block: re.Pattern[str], source: str) -> int:
    """The number of blocks among names, which may be others than those in the file."""
    found = {match["n"] for name in names if (match := block.match(name))}
    expected = {str(number) for number in range(len(found))}
    if found != expected:
        strange, absent = min(found - expected), min(expected - found, key=int)
        raise BadCheckpoint(
            f"{source} holds a block {strange[:20]} but no block {absent}, its blocks should be "
            f"numbered 0 to {len(found) - 1}: part of the weights is missing, or it is another "
            "model."
        )
    return len(found)


def fill(
    module: nn.Module,
    file: TensorFile,
    stored: Mapping[str, Stored],
    ignored: re.Pattern[str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Gives every parameter of `module` its weight, in `dtype` on `device`.

    `stored` says for each parameter where it lies; other names in the file must match `ignored`.
    Raises `BadCheckpoint` with the file, the tensor, what was found and what was expected.
    """
    check_weights(module, file, stored, ignored)
    read_weights(module, file, stored, device, dtype)


def check_weights(
    module: nn.Module, file: TensorFile, stored: Mapping[str, Stored], ignored: re.Pattern[str]
) -> None:
    """Compares the headers of a file with what `fill` would read. Raises what it raises."""
    _check(file, {stored[name]: shape for name, shape in _shapes(module).items()}, ignored)


def read_weights(
    module: nn.Module,
    file: TensorFile,
    stored: Mapping[str, Stored],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Gives every parameter of `module`, as part of a file that was checked, its weight."""
    weights = {
        name: _read(file, stored[name], shape, device, dtype)
        for name, shape in _shapes(module).items()
    }
    module.load_state_dict(weights, strict=True, assign=True)


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _check(file: TensorFile, shapes: Mapping[Stored, Shape], ignored: re.Pattern[str]) -> None:
    missing = [stored.name for stored in shapes if stored.name not in file]
    if missing:
        raise BadCheckpoint(
            f"{file.path.name}: {missing[0]} is missing, and {len(missing) - 1} more; "
            f"the file holds {len(file)} tensors."
        )
    for stored, (rows, *rest) in shapes.items():
        found, expected = file.shape(stored.name), (stored.parts * rows, *rest)
        if _without_leading_ones(found) != _without_leading_ones(expected):
            raise BadCheckpoint(
                f"{file.path.name}: {stored.name} is {found}, expected {expected} "
                "from the shapes of the other tensors."
            )
        if stored.scale is not None:
            scale = file.shape(stored.scale)
            if scale not in ((rows, 1), (rows,)) and math.prod(scale) != 1:
                raise BadCheckpoint(
                    f"{file.path.name}: {stored.scale} is {scale}, expected one number or {rows}."
                )
    used = {name for stored in shapes for name in (stored.name, stored.scale)}
    extra = [name for name in file if name not in used and not ignored.match(name)]
    if extra:
        raise BadCheckpoint(
            f"{file.path.name} holds {extra[0]}, and {len(extra) - 1} more tensors that this model "
            "does not have: it is another model or another way to quantise."
        )


def _without_leading_ones(shape: Shape) -> Shape:
    """Drops the axes of one with which the official CLIP begins vectors and tables."""
    first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def _read(
    file: TensorFile, stored: Stored, shape: Shape, device: torch.device, dtype: torch.dtype
) -> Tensor:
    with file.open(stored.name) as tensor:
        if stored.scale is None and not tensor.is_floating_point():
            raise BadCheckpoint(
                f"{file.path.name}: {stored.name} is {tensor.dtype} without a scale, "
                "expected floating point."
            )
        rows = tensor.reshape(stored.parts * shape[0], *shape[1:])
        rows = rows.chunk(stored.parts)[stored.part].to(device, copy=True)
    if stored.scale is None:
        return rows.to(dtype)
    with file.open(stored.scale) as tensor:
        scale = tensor.to(device, torch.float32).reshape(-1, 1)  # one, or one a row
        return (rows.float() * scale).to(dtype)
