"""FP8 codes with float scales: one a tensor, a row, a group of columns or a square block.

    W = float(code) * s                                       docs/reference/formats.md 2

A file without scales holds plain numbers that were cast. The scale always multiplies.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.formats.decode import decoded
from engine.models.formats.held import (
    WEIGHT,
    WIDE,
    Codes,
    Held,
    KeptCodes,
    RowReader,
    Tensors,
    Weight,
    require_positive,
)
from engine.models.tensorfile import FP8

SCALES = ("scale_weight", "weight_scale")
CAST = "FP8 cast without scales"
LARGEST_CAST = 100.0  # no weight of a network reaches it; codes that lack their scale do
LOSS = {"F8_E4M3": 2.65, "F8_E5M2": 5.3}
CAST_LOSS = {"F8_E4M3": 3.3, "F8_E5M2": 5.3}  # of values near 0.02, below the range of E4M3
SPREADS = {"tensor": "a tensor", "rows": "a row", "groups": "a group", "blocks": "a block"}
BLOCK = 128  # of blockwise formats that do not tell

Spread = Callable[[Tensor, int, int], Tensor]  # scale as stored, rows [first, last) -> broadcasts


def is_scaled(held: Held) -> bool:
    """True for a weight with a scale, in FP8 or, of odd files, in 16 or 32 bits."""
    return held.first(*SCALES) is not None and held.dtype() in (*FP8, *WIDE)


def scaled(held: Held) -> Weight:
    """A weight whose scale's shape says what it is for."""
    ending = _scale_of(held)
    count, shape = math.prod(held.shape(ending)), held.shape()
    rows = next(iter(shape), 1)
    if count == 1:
        return _weight(held, ending, "tensor", partial(_one, len(shape)))
    if held.shape(ending)[0] == rows and count == rows:
        return _weight(held, ending, "rows", partial(_rows, len(shape)))
    scale = held.shape(ending)
    if len(shape) == 2 and len(scale) == 3 and (scale[0], scale[2]) == (rows, 1):
        groups = scale[1]
        if groups and shape[1] % groups == 0:
            return _weight(held, ending, "groups", partial(_groups, shape[1] // groups))
    raise BadCheckpoint(
        f"{held.file.path.name}: {held.tensors[ending]} has {count} values {list(scale)}; one, or "
        f"one for each row of {held.tensors[WEIGHT]} {list(shape)}, is expected."
    )


def blockwise(held: Held) -> Weight:
    """A weight with a scale for each square of `group_size`, which the file tells."""
    ending = _scale_of(held)
    (rows, columns), block = held.require_matrix(), held.number("group_size", BLOCK)
    if rows % block or columns % block:
        raise held.error(f"group_size {block}", "one that divides its rows and columns")
    held.require_numbers(ending, (rows // block, columns // block))
    return _weight(held, ending, "blocks", partial(spread_blocks, block))


def is_cast(held: Held) -> bool:
    """True for FP8 without a scale."""
    return held.dtype() in FP8


def cast(held: Held) -> Weight:
    codes = KeptCodes("fp8", _cast_codes) if _is_e4m3_matrix(held) else None
    return Weight(
        CAST, CAST_LOSS[held.dtype()], _names(held), held.shape(), _plain, codes=codes,
        is_plain=True,
    )  # fmt: skip


def spread_blocks(block: int, scale: Tensor, first: int, last: int) -> Tensor:
    """The scales of rows [first, last) in a shape that broadcasts over [n, C / block, block]."""
    return scale[torch.arange(first, last) // block][..., None]


def scaled_rows(
    held: Held, ending: str, spread: Spread, tensors: Tensors, *, group: int = 0
) -> RowReader:
    """Rows of codes times their scales; `group` columns share one if it is not 0."""
    scale = tensors[ending].float()

    def rows(first: int, last: int) -> Tensor:
        weight = decoded(tensors[WEIGHT][first:last])
        shaped = weight.unflatten(-1, (-1, group)) if group else weight
        factor = spread(scale, first, last)
        require_positive(held, ending, factor, shaped)
        shaped *= factor
        return weight

    return rows


def _scale_of(held: Held) -> str:
    ending = held.first(*SCALES)
    if ending is None:
        raise held.error("no scale", "weight_scale")
    if held.dtype(ending) not in WIDE:
        raise BadCheckpoint(
            f"{held.file.path.name}: {held.tensors[ending]} is stored as {held.dtype(ending)}; a "
            "scale of 16 or 32 bits is expected."
        )
    return ending


def _weight(held: Held, ending: str, per: str, spread: Spread) -> Weight:
    dtype, notes = held.dtype(), tuple[str, ...]()
    if dtype in WIDE:
        kind, loss = f"{dtype} with a scale for {SPREADS[per]}", 0.0
        notes = ("is not stored in FP8 and has a scale, by which it is multiplied",)
    else:
        kind, loss = f"{dtype.replace('F8', 'FP8')} with a scale for {SPREADS[per]}", LOSS[dtype]
    group = _group(held, ending, per)
    reader = partial(scaled_rows, held, ending, spread, group=group)
    is_kept = _is_e4m3_matrix(held) and per in ("tensor", "rows")
    codes = KeptCodes("fp8", partial(_codes, ending)) if is_kept else None
    return Weight(kind, loss, _names(held, ending), held.shape(), reader, codes=codes, notes=notes)


def _is_e4m3_matrix(held: Held) -> bool:
    return held.dtype() == "F8_E4M3" and len(held.shape()) == 2


def _group(held: Held, ending: str, per: str) -> int:
    if per not in ("groups", "blocks"):
        return 0
    return held.shape()[1] // held.shape(ending)[1]


def _names(held: Held, *endings: str) -> dict[str, str]:
    return {ending: held.tensors[ending] for ending in (WEIGHT, *endings)}


def _plain(tensors: Tensors) -> RowReader:
    return lambda first, last: tensors[WEIGHT][first:last]


def _one(ndim: int, scale: Tensor, first: int, last: int) -> Tensor:
    return scale.reshape([1] * ndim)


def _rows(ndim: int, scale: Tensor, first: int, last: int) -> Tensor:
    return scale.flatten()[first:last].view(-1, *[1] * (ndim - 1))


def _groups(group: int, scale: Tensor, first: int, last: int) -> Tensor:
    return scale[first:last]


def _codes(ending: str, tensors: Tensors) -> Codes:
    q = tensors[WEIGHT].clone()
    s = tensors[ending].float().flatten()
    return Codes("fp8", q, s.expand(len(q)).clone())


def _cast_codes(tensors: Tensors) -> Codes:
    q = tensors[WEIGHT].clone()
    return Codes("fp8", q, torch.ones(len(q)))
