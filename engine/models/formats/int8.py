"""INT8 codes with float scales, plain or rotated.

    W = code * s, and of ConvRot each group of columns turned back       docs/reference/formats.md 4

Read as plain INT8 a rotated file would give finite noise. A file that does not tell may still be
rotated.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.models.formats.fp8 import BLOCK, SCALES, Spread, scaled_rows, spread_blocks
from engine.models.formats.held import (
    WEIGHT,
    Codes,
    Held,
    KeptCodes,
    RowReader,
    Tensors,
    Weight,
)
from engine.models.formats.rotation import GROUP, rotate, rotated_group

LOSS_OF_ROWS, LOSS_OF_TENSOR = 0.88, 1.15
ROTATED = "convrot"  # a flag beside the format
UNTOLD = (
    "is INT8 and nothing in the file says how: if it was rotated (as some files are), the model "
    "will be noise"
)


def is_int8(held: Held) -> bool:
    """True for I8 codes with a scale."""
    return held.dtype() == "I8" and held.first(*SCALES) is not None


def tensorwise(held: Held) -> Weight:
    """INT8 with a scale a tensor or a row; rotated if the file says so."""
    rows, columns = held.require_matrix()
    ending = held.first(*SCALES) or SCALES[-1]
    shape = held.require_numbers(ending, (), (1,), (rows,), (rows, 1))
    is_one = len(shape) == 0 or shape == (1,)
    is_rotated = held.flag(ROTATED, default=False)
    kind, loss, notes = "INT8 rows", LOSS_OF_ROWS, () if held.told else (UNTOLD,)
    if is_one and rows > 1:
        kind, loss = "INT8 with one scale", LOSS_OF_TENSOR
    reader = partial(scaled_rows, held, ending, one_or_rows)
    names = {key: held.tensors[key] for key in (WEIGHT, ending)}
    if not is_rotated:
        return Weight(kind, loss, names, (rows, columns), reader, notes=notes)
    group = rotated_group(held, columns)
    return Weight(
        f"{kind}, rotated (ConvRot {group})", loss, names, (rows, columns),
        partial(turned_back, reader, group),
        codes=KeptCodes("int8", partial(_codes, ending)) if group == GROUP else None,
    )  # fmt: skip


def blockwise(held: Held) -> Weight:
    """INT8 with a scale for each square of `group_size`."""
    (rows, columns), block = held.require_matrix(), held.number("group_size", BLOCK)
    if rows % block or columns % block:
        raise held.error(f"group_size {block}", "one that divides its rows and columns")
    ending = held.first(*SCALES) or SCALES[-1]
    held.require_numbers(ending, (rows // block, columns // block))
    spread: Spread = partial(spread_blocks, block)
    names = {key: held.tensors[key] for key in (WEIGHT, ending)}
    reader = partial(scaled_rows, held, ending, spread, group=block)
    return Weight("INT8 blocks", LOSS_OF_ROWS, names, (rows, columns), reader)


def turned_back(reader: Callable[[Tensors], RowReader], group: int, tensors: Tensors) -> RowReader:
    """Rows of a reader, whose columns were rotated."""
    rotated = reader(tensors)
    return lambda first, last: rotate(rotated(first, last), group)


def one_or_rows(scale: Tensor, first: int, last: int) -> Tensor:
    """The scales of rows [first, last), which may all have one, as a column."""
    flat = scale.reshape(-1, 1)
    return flat if len(flat) == 1 else flat[first:last]


def _codes(ending: str, tensors: Tensors) -> Codes:
    q = tensors[WEIGHT].clone()
    s = tensors[ending].to(torch.float32).flatten()
    return Codes("convrot", q, s.expand(len(q)).clone())
