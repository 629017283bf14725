"""The blocks of a step, some of which are on their way to the device while others compute."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from engine.denoise.block import BlockWeights
from engine.denoise.packed import BlockSource
from engine.denoise.schedule import Streaming, Turn, first_fill, streamed_blocks, turns
from engine.machine.transfers import Mark, Transfers

Order: TypeAlias = Callable[[int, Streaming], Iterator[Turn]]


class StreamedBlocks:
    """Owns the memory of blocks on a device. Iterating gives the weights of each block in turn, to
    kernels that are launched before the next is asked for: a `Blocks`.
    """

    def __init__(
        self,
        source: BlockSource,
        streaming: Streaming,
        transfers: Transfers,
        device: torch.device,
        order: Order = turns,
    ) -> None:
        """Takes all memory at once, and starts the first copies."""
        self._source, self._streaming, self._transfers = source, streaming, transfers
        self._order, self._layers = order, len(source.layouts)
        passing = streamed_blocks(self._layers, streaming.resident)
        resident = [n for n in range(self._layers) if n not in passing]
        nbytes = max(layout.nbytes for layout in source.layouts)

        def memory() -> Tensor:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

        self._stay = {block: memory() for block in resident}
        self._ring = [memory() for _ in range(streaming.depth)]
        free = transfers.mark()  # what had this memory before may still compute
        # the ring comes first: its blocks are wanted no later, and its copies go on
        self._begin(free)
        self._arriving = {
            block: self._copy(block, memory, free) for block, memory in self._stay.items()
        }

    def __len__(self) -> int:
        return self._layers

    def __iter__(self) -> Iterator[BlockWeights]:
        if self._is_open:  # a step ended halfway: what is in the ring is not what comes first
            self._transfers.finish()
            self._begin(self._transfers.mark())
        self._is_open = True
        for turn in islice(self._turns, self._layers):
            yield self._arrived(turn)
            self._leave(turn)
        self._is_open = False

    def close(self) -> None:
        """Returns when nobody writes into this memory any more."""
        self._transfers.finish()

    def _begin(self, free: Mark) -> None:
        self._is_open = False
        self._turns = self._order(self._layers, self._streaming)
        self._copied = [
            self._copy(block, memory, free)
            for block, memory in zip(first_fill(self._layers, self._streaming), self._ring)
        ]

    def _copy(self, block: int, memory: Tensor, after: Mark) -> Mark:
        return self._transfers.start(partial(self._source.fill, block, memory), after)

    def _arrived(self, turn: Turn) -> BlockWeights:
        if turn.buffer is None:
            memory, copied = self._stay[turn.block], self._arriving.get(turn.block)
        else:
            memory, copied = self._ring[turn.buffer], self._copied[turn.buffer]
        if copied is not None:
            self._transfers.wait(copied)
            self._arriving.pop(turn.block, None)  # one that failed is never taken for whole
        return self._source.layouts[turn.block].weights(memory)

    def _leave(self, turn: Turn) -> None:
        if turn.buffer is not None and turn.refill is not None:
            has_run = self._transfers.mark()
            self._copied[turn.buffer] = self._copy(turn.refill, self._ring[turn.buffer], has_run)
