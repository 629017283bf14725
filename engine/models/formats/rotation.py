"""The rotation of ConvRot: groups of columns times a regular Hadamard matrix.

    H_4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]] / 2       H_4g = H_g kron H_4

It is symmetric and its own inverse, and each of its rows sums to 1: not Sylvester's
(docs/reference/formats.md 4.2).
"""

import torch
from torch import Tensor

from engine.models.formats.held import Held

GROUP = 256  # of files that do not tell, and of packages (`kernels.fp8.rotate`)


def rotate(rows: Tensor, group: int) -> Tensor:
    """Rows [n, C] fp32 with each group of columns times the matrix, which also turns them back.

    Along one axis of 4 after the other, H_4 is half of the sum less the value across.
    """
    digits = [4] * (group.bit_length() // 2)
    turned = rows.view(-1, *digits)
    for axis in range(1, turned.ndim):
        a, b, c, d = turned.unbind(axis)
        half = ((a + b) + (c + d)) * 0.5
        turned = torch.stack([half - d, half - c, half - b, half - a], axis)
    return turned.reshape(rows.shape)


def rotated_group(held: Held, columns: int) -> int:
    """The size of the groups that the file tells. Raises `BadCheckpoint` for one that is none."""
    group = held.number("convrot_groupsize", GROUP)
    if group not in (4**n for n in range(1, 8)) or columns % group:
        raise held.error(
            f"convrot_groupsize {group} for {columns} columns",
            "a power of 4 that divides them (others mean another matrix)",
        )
    return group
