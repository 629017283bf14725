"""A block runner: its interface, and the plain one, which launches one kernel after another."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from engine.denoise.block import BlockWeights, ContextKeys, block_modulation, run_block
from engine.models.dit import Rope
from kernels.ops import Ops


@dataclass(frozen=True, slots=True)
class Pass:
    """The inputs of the blocks in one evaluation."""

    x: Tensor  # [S, D] fp32, used up
    modulation: Tensor  # [6, D] fp32, of the time step
    context: Sequence[ContextKeys]  # for each block
    rope: Rope
    kept: int  # so many tokens are asked for, the first ones
    left: int = 1  # evaluations of this context and number of tokens in the clip, from here on


class Blocks(Protocol):
    """The weights of all blocks. Those of one are whole while its kernels are launched, that is
    until the next are asked for.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[BlockWeights]: ...


# returns the kept tokens after the last block, valid until the next call
BlockRunner: TypeAlias = Callable[[Pass], Tensor]


@dataclass(frozen=True, slots=True)
class LaunchedBlocks:
    """Launches the kernels of one block after another. A `BlockRunner`."""

    ops: Ops
    weights: Blocks

    def __call__(self, given: Pass) -> Tensor:
        x = given.x
        for n, (weights, seen) in enumerate(zip(self.weights, given.context, strict=True), start=1):
            kept = given.kept if n == len(self.weights) else None
            own = block_modulation(weights, given.modulation)
            x = run_block(self.ops, weights, seen, x, own, given.rope, kept)
        return x
