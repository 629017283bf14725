"""Counts the bytes of a transformer's weights on a GPU, by what they are needed for."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod

from engine.denoise.block import BlockWeights, ContextWeights
from engine.denoise.packaged import TIME
from engine.denoise.packed import packed_bytes
from engine.package.manifest import Entry

LARGE_BYTES, LARGE_ROUND, SMALL_ROUND = 2**20, 2 * 2**20, 512  # of PyTorch's allocator


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """The bytes of a package's tensors."""

    blocks: int  # of the blocks, which every step needs
    outside: int  # before and after the blocks, in FP32
    contexts: int  # of those that the keys of text and picture are made with, rounded
    rounding: int  # of `blocks` and `outside`, by PyTorch's allocator
    block: int  # of one of the blocks in one piece, as streamed ones are


def weight_bytes(tensors: Sequence[Entry]) -> WeightBytes:
    """Counts the tensors of a package."""
    steps, once = ({one.name for one in fields(kind)} for kind in (BlockWeights, ContextWeights))
    blocks = [entry.nbytes for entry in tensors if _part(entry) in steps]
    pieces: dict[str, list[int]] = {}
    for entry in tensors:
        if _part(entry) in steps:
            pieces.setdefault(entry.name.split(".")[1], []).append(entry.nbytes)
    outside = [
        4 * prod(entry.shape)
        for entry in tensors
        if _part(entry) is None and not entry.name.startswith(TIME)
    ]
    return WeightBytes(
        blocks=sum(blocks),
        outside=sum(outside),
        contexts=sum(_rounded(entry.nbytes) for entry in tensors if _part(entry) in once),
        rounding=sum(_rounded(nbytes) - nbytes for nbytes in (*blocks, *outside)),
        block=_rounded(max(map(packed_bytes, pieces.values()), default=1)),
    )


def _part(entry: Entry) -> str | None:
    """Names a tensor's part of its block: `qkv` of `blocks.3.qkv.q`. None: it is in none."""
    place, *rest = entry.name.split(".")
    return rest[1] if place == "blocks" and len(rest) > 1 else None


def _rounded(nbytes: int) -> int:
    multiple = LARGE_ROUND if nbytes >= LARGE_BYTES else SMALL_ROUND
    return -(-nbytes // multiple) * multiple
