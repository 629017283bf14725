"""MXFP8: E4M3 codes, and a power of two for each 32 neighbouring columns of a row.

W[r, c] = float(code[r, c]) * 2^(e(r, c / 32) - 127)        docs/reference/formats.md 3.2
"""

from functools import partial

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.formats.decode import decoded
from engine.models.formats.held import (
    WEIGHT,
    Codes,
    Held,
    KeptCodes,
    RowReader,
    Tensors,
    Weight,
    as_bytes,
)
from engine.models.formats.swizzle import swizzled_shape, unswizzle

GROUP = 32  # neighbouring columns with one scale; rows and columns are filled up to it too
LOSS = 2.66
_SCALE, _SCALE_TYPES = "weight_scale", ("F8_E8M0", "U8")
_NAN = 255
_MANTISSA_BITS = 23  # of fp32, whose exponent has the same offset


def is_mxfp8(held: Held) -> bool:
    """True for E4M3 with block scales of one byte: E8M0, or U8 in the shape of swizzled tiles."""
    if _SCALE not in held or held.dtype() not in ("F8_E4M3", "F8_E5M2"):
        return False
    return held.dtype(_SCALE) == "F8_E8M0" or (
        held.dtype(_SCALE) == "U8" and held.shape(_SCALE) == _shape_of_scales(held)
    )


def mxfp8(held: Held) -> Weight:
    if held.dtype() != "F8_E4M3":
        raise held.error(f"codes in {held.dtype()}", "F8_E4M3 for MXFP8")
    rows, columns = held.require_matrix()
    if columns % GROUP:
        raise held.error(f"{columns} columns", f"a multiple of {GROUP} for MXFP8")
    held.require_group(GROUP)
    held.require_numbers(_SCALE, _shape_of_scales(held), types=_SCALE_TYPES)
    names = {ending: held.tensors[ending] for ending in (WEIGHT, _SCALE)}
    return Weight(
        "MXFP8", LOSS, names, (rows, columns), partial(_open, held), padding=GROUP,
        codes=KeptCodes("fp8", partial(_codes, held)),
    )  # fmt: skip


def _shape_of_scales(held: Held) -> tuple[int, ...]:
    shape = held.shape()
    return swizzled_shape(shape[0], -(-shape[1] // GROUP)) if len(shape) == 2 else ()


def _exponents(held: Held, tensors: Tensors) -> Tensor:
    """The bytes of the scales [R, C / 32] in their own order. Raises for those that are NaN."""
    rows, columns = held.require_matrix()
    exponents = unswizzle(as_bytes(tensors[_SCALE]), rows, columns // GROUP)
    name = f"{held.file.path.name}: {held.tensors[_SCALE]}"
    if bool((exponents == _NAN).any()):
        raise BadCheckpoint(f"{name} holds scales that are NaN. Fetch the file again.")
    if not bool(exponents.any()) and bool((tensors[WEIGHT].float() != 0).any()):
        raise BadCheckpoint(
            f"{name} is 0 for a weight that is not 0; scales above 0 are expected. Fetch the file "
            "again."
        )
    return exponents


def _open(held: Held, tensors: Tensors) -> RowReader:
    bits = _exponents(held, tensors).int() << _MANTISSA_BITS  # 0 stays 0
    scales = bits.view(torch.float32)[..., None]

    def rows(first: int, last: int) -> Tensor:
        weight = decoded(tensors[WEIGHT][first:last])
        weight.unflatten(-1, (-1, GROUP)).mul_(scales[first:last])
        return weight

    return rows


def _codes(held: Held, tensors: Tensors) -> Codes:
    return Codes("mxfp8", tensors[WEIGHT].clone(), _exponents(held, tensors))
