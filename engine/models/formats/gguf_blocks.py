"""Weights of GGUF files: blocks of 32 or 256 values, which the `gguf` package dequantises.

docs/reference/formats.md 6. The package sees rows of bytes whose sizes were checked by
`engine.models.gguf_walk`, some at a time.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.formats.held import WEIGHT, Held, RowReader, Tensors, Weight
from engine.models.tensorfile import Blocks

# relative error of a Gaussian weight in per cent; of types that nobody can write here, about
LOSS = {
    "Q8_0": 0.54, "Q6_K": 1.9, "Q5_1": 3.8, "Q5_0": 4.2, "Q5_K": 3.7, "Q4_1": 7.8, "Q4_0": 8.6,
    "Q4_K": 7.4, "IQ4_NL": 7.5, "IQ4_XS": 7.5, "Q3_K": 15.0, "IQ3_S": 14.0, "IQ3_XXS": 17.0,
    "Q2_K": 28.0, "IQ2_S": 26.0, "IQ2_XS": 28.0, "IQ2_XXS": 30.0, "IQ1_M": 40.0, "IQ1_S": 42.0,
    "TQ2_0": 50.0, "TQ1_0": 50.0, "MXFP4": 12.0,
}  # fmt: skip


def is_blocks(held: Held) -> bool:
    return held.file.blocks(held.tensors[WEIGHT]) is not None


def blocks(held: Held) -> Weight:
    stored = held.file.blocks(held.tensors[WEIGHT])
    assert stored is not None
    name = stored.type.name
    return Weight(
        f"GGUF {name}", LOSS[name], {WEIGHT: held.tensors[WEIGHT]}, stored.shape,
        partial(_open, held, stored),
    )  # fmt: skip


def _require_equal_blocks(held: Held, stored: Blocks, packed: Tensor) -> None:
    """Raises `BadCheckpoint` if rows of zeros are blocks with codes of their own: a writer's blocks
    of zeros are all alike, and others have lost their scales.
    """
    blocks = packed.reshape(-1, stored.type.nbytes)
    if bool((blocks != blocks[0]).any()):
        raise BadCheckpoint(
            f"{held.file.path.name}: {held.tensors[WEIGHT]} has scales of 0 for rows that are not "
            "0; scales above 0 are expected. Fetch the file again."
        )


def _open(held: Held, stored: Blocks, tensors: Tensors) -> RowReader:
    # here: no other file needs it, and its import takes a third of a second
    from gguf import GGMLQuantizationType, dequantize

    kind, packed = GGMLQuantizationType[stored.type.name], tensors[WEIGHT]

    def unpack(first: int, last: int) -> Tensor:
        try:
            with np.errstate(all="ignore"):  # what is not finite is told of the weight
                found = dequantize(packed[first:last].numpy(), kind)
        except (ValueError, NotImplementedError, AssertionError, IndexError) as error:
            raise BadCheckpoint(
                f"{held.file.path.name}: {held.tensors[WEIGHT]} cannot be dequantised as "
                f"{stored.type.name}: {error}. Fetch the file again."
            ) from error
        weight = torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))
        if not bool(weight.any()):
            _require_equal_blocks(held, stored, packed[first:last])
        return weight

    values = packed.shape[1] // stored.type.nbytes * stored.type.values  # of a stored row
    width = math.prod(stored.shape[1:])  # of a row of the weight: another where axes were joined

    def rows(first: int, last: int) -> Tensor:
        begin, end = first * width, last * width
        before = begin // values
        found = unpack(before, -(-end // values)).flatten()
        return found[begin - before * values : end - before * values].view(-1, *stored.shape[1:])

    return rows
