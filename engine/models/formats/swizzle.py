"""Block scales in the order of cuBLAS: tiles of 128 rows by 4 scales, each tile in 32 x 4 x 4.

docs/reference/formats.md 3.1. No shape of a real weight shows that its scales are swizzled: for
5120 x 5120 nothing is filled up.
"""

from torch import Tensor

from engine.models.formats.held import Shape

_ROWS, _COLUMNS = 128, 4  # of a tile


def swizzled_shape(rows: int, columns: int) -> Shape:
    """The shape of the stored tensor for so many scales."""
    return -(-rows // _ROWS) * _ROWS, -(-columns // _COLUMNS) * _COLUMNS


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales [rows, columns] in their own order, of a stored tensor of `swizzled_shape`."""
    high, wide = scales.shape
    tiles = scales.reshape(high // _ROWS, wide // _COLUMNS, 32, 4, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)[:rows, :columns].contiguous()
