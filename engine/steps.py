"""How the blocks of one evaluation are run: one launch after another, or as one CUDA graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.block import BlockWeights, ContextKeys, block_modulation, run_block
from engine.models.dit import Rope
from kernels.ops import Ops


class Steps(Protocol):
    def __call__(
        self,
        x: Tensor,
        modulation: Tensor,
        context: Sequence[ContextKeys],
        rope: Rope,
        kept: int,
    ) -> Tensor:
        """x [S, D] fp32, used up; modulation [6, D] of the time step; context of each block.
        Returns the first `kept` tokens after the last block, valid until the next call.
        """
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """Launches one after another."""

    ops: Ops
    weights: Sequence[BlockWeights]

    def __call__(
        self,
        x: Tensor,
        modulation: Tensor,
        context: Sequence[ContextKeys],
        rope: Rope,
        kept: int,
    ) -> Tensor:
        for n, (weights, seen) in enumerate(zip(self.weights, context, strict=True), start=1):
            last = n == len(self.weights)
            own = block_modulation(weights, modulation)
            x = run_block(self.ops, weights, seen, x, own, rope, kept if last else None)
        return x
