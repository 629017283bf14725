"""Integers of four bits: ConvRot's W4A4, codes with a codebook (W4A8), and AWQ's with zero points.

docs/reference/formats.md 4.3. The low nibble is the even column in all three.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.models.formats.held import (
    WEIGHT,
    WIDE,
    Held,
    RowReader,
    Tensors,
    Weight,
    as_bytes,
    require_positive,
)
from engine.models.formats.int8 import ROTATED, turned_back
from engine.models.formats.rotation import rotate, rotated_group

TYPES = ("I8", "U8")  # of a byte with two codes
_SCALE, _ZEROS = "weight_scale", "weight_zeros"
_RELATIVE, _CHANNEL, _CODEBOOK = "weight_s_rel", "weight_s_channel", "weight_codebook"
_CORRECTION = "weight_correction"
_W4A4_LOSS, _W4A8_LOSS, _AWQ_LOSS = 16.0, 8.1, 9.0
_LARGEST = 127.0
_ASYMMETRIC_GROUP, _AWQ_GROUP = 16, 64


def convrot_w4a4(held: Held) -> Weight:
    """W = code * s, turned back; codes are two's complement."""
    rows, columns = _matrix(held)
    held.require_numbers(_SCALE, (rows,), (rows, 1))
    group = _group(held, columns)

    def read(tensors: Tensors) -> RowReader:
        scale = tensors[_SCALE].float().view(-1, 1)

        def part(first: int, last: int) -> Tensor:
            codes = _nibbles(tensors[WEIGHT][first:last])
            weight = ((codes ^ 8) - 8).float()
            require_positive(held, _SCALE, scale[first:last], weight)
            return weight.mul_(scale[first:last])

        return part

    return _weight(
        held, "INT4 rows, rotated (ConvRot W4A4)", _W4A4_LOSS, columns,
        partial(turned_back, read, group), _SCALE,
    )  # fmt: skip


def asym_w4a8(held: Held) -> Weight:
    """W = clamp(round(book[u] * s_rel), -127, 127) * s_channel, turned back."""
    if _CORRECTION in held:
        raise held.error(f"a {_CORRECTION}", "symmetric codes")
    rows, columns = _matrix(held)
    size = held.number("group_size", _ASYMMETRIC_GROUP)
    if columns % size:
        raise held.error(f"group_size {size}", f"one that divides {columns} columns")
    held.require_numbers(_RELATIVE, (rows, columns // size), types=("F8_E4M3", "U8"))
    held.require_numbers(_CHANNEL, (rows,), (rows, 1))
    if _CODEBOOK in held:
        held.require_numbers(_CODEBOOK, (16,))
    group = _group(held, columns)

    def read(tensors: Tensors) -> RowReader:
        relative = as_bytes(tensors[_RELATIVE]).view(torch.float8_e4m3fn).float()[..., None]
        channel = tensors[_CHANNEL].float().view(-1, 1)
        plain = torch.arange(-8.0, 8.0)
        book = tensors[_CODEBOOK].float() if _CODEBOOK in tensors else plain
        if bool((relative < 0).any()) or not bool((relative != 0).any()):
            raise held.error(
                f"{_RELATIVE} from {relative.min().item():g} to {relative.max().item():g}",
                "scales above 0",
            )
        if not bool(book.isfinite().all()) or not bool((book != 0).any()):
            raise held.error(f"a {_CODEBOOK} of zeros, or not finite", "numbers")

        def part(first: int, last: int) -> Tensor:
            codes = _nibbles(tensors[WEIGHT][first:last])
            values = book.index_select(0, codes.flatten()).view(last - first, -1, size)
            values = (values * relative[first:last]).round_().clamp_(-_LARGEST, _LARGEST)
            weight = values.view(last - first, -1)
            require_positive(held, _CHANNEL, channel[first:last], weight)
            return rotate(weight.mul_(channel[first:last]), group)

        return part

    endings = (_RELATIVE, _CHANNEL, *([_CODEBOOK] if _CODEBOOK in held else []))
    return _weight(
        held, "INT4 with a codebook, rotated (W4A8)", _W4A8_LOSS, columns, read, *endings
    )


def awq_w4a16(held: Held) -> Weight:
    """W = (u - 8) * s + z, with a scale and a zero for each group of columns."""
    rows, columns = _matrix(held)
    size = held.number("group_size", _AWQ_GROUP)
    if columns % size:
        raise held.error(f"group_size {size}", f"one that divides {columns} columns")
    for ending in (_SCALE, _ZEROS):
        held.require_numbers(ending, (columns // size, rows), types=WIDE)

    def read(tensors: Tensors) -> RowReader:
        scale, zeros = (tensors[ending].float().T for ending in (_SCALE, _ZEROS))

        def part(first: int, last: int) -> Tensor:
            codes = (_nibbles(tensors[WEIGHT][first:last]) - 8).float().unflatten(-1, (-1, size))
            require_positive(held, _SCALE, scale[first:last, :, None], codes)
            weight = codes * scale[first:last, :, None] + zeros[first:last, :, None]
            return weight.view(last - first, -1)

        return part

    return _weight(held, "INT4 with zero points (AWQ)", _AWQ_LOSS, columns, read, _SCALE, _ZEROS)


def _group(held: Held, columns: int) -> int:
    """Columns that are rotated together, as they always are in these formats."""
    if not held.flag(ROTATED, default=True):
        raise held.error(f"{ROTATED} false", "true, as the format is rotated")
    return rotated_group(held, columns)


def _matrix(held: Held) -> tuple[int, int]:
    rows, half = held.require_matrix()
    return rows, 2 * half


def _weight(
    held: Held,
    kind: str,
    loss: float,
    columns: int,
    read: Callable[[Tensors], RowReader],
    *endings: str,
) -> Weight:
    names = {ending: held.tensors[ending] for ending in (WEIGHT, *endings)}
    return Weight(kind, loss, names, (held.shape()[0], columns), read)


def _nibbles(packed: Tensor) -> Tensor:
    """The codes 0 to 15 as int32, twice as many columns, the low nibble first."""
    byte = as_bytes(packed.contiguous()).int()
    return torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
