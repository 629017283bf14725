"""The blocks as a CUDA graph: hundreds of launches cost the host what one does.

A graph is recorded for each context and number of tokens, at the second evaluation that has them,
if it will be replayed often enough in this clip. Recording needs memory of its own for tensors
between kernels, which all graphs share.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from engine.denoise.block import ContextKeys
from engine.denoise.block_runner import BlockRunner, Pass
from engine.machine.exhausted import ran_out

KEPT_GRAPHS = 4  # with and without a skeleton, for the prompt and the negative prompt

# A recording takes the host as long as launching does once, and memory for the whole clip: it is
# made where at least so many evaluations of its kind are left. A clip of six steps has none.
FEWEST_REPLAYS = 8

# records the launches of a function and returns a function that repeats them
GraphRecorder: TypeAlias = Callable[[Callable[[], object]], Callable[[], None]]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph with the memory that it reads and writes, which must live as long."""

    given: Pass
    replay: Callable[[], None]


def is_recorded(evaluations: int) -> bool:
    """Tells if a clip with so many evaluations of a kind records them, after the first."""
    return evaluations > FEWEST_REPLAYS


class GraphedBlocks:
    """Runs the blocks as `runner` does, recorded where that is possible. A `BlockRunner` itself."""

    def __init__(self, runner: BlockRunner, record: GraphRecorder) -> None:
        self._runner, self._record_graph = runner, record
        self._seen: OrderedDict[tuple[int, int, int], _Recorded | Sequence[ContextKeys]] = (
            OrderedDict()
        )

    def __call__(self, given: Pass) -> Tensor:
        key = id(given.context), len(given.x), given.kept
        known = self._seen.get(key)
        if known is None:  # the first run sets up what may not be set up while recording
            self._remember(key, given.context)
            return self._runner(given)
        if not isinstance(known, _Recorded):
            if given.left < FEWEST_REPLAYS:
                return self._runner(given)
            known = self._record(given)
            self._remember(key, known)
        known.given.x.copy_(given.x)
        known.given.modulation.copy_(given.modulation)
        known.replay()
        return known.given.x[: given.kept]

    def forget(self) -> None:
        """Gives the memory of all graphs back."""
        self._seen.clear()

    def _remember(
        self, key: tuple[int, int, int], value: "_Recorded | Sequence[ContextKeys]"
    ) -> None:
        self._seen[key] = value  # holds the context, so no other can get its id
        self._seen.move_to_end(key)
        while len(self._seen) > KEPT_GRAPHS:
            self._seen.popitem(last=False)

    def _record(self, given: Pass) -> _Recorded:
        own = replace(given, x=given.x.clone(), modulation=given.modulation.clone())
        return _Recorded(own, self._record_graph(lambda: self._runner(own)))


class CudaGraphRecorder:
    """Records CUDA graphs that share one pool of memory: they never run at the same time, and the
    result of one is used before the next one runs.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may allocate meanwhile: encoders load, frames are copied
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:  # a recording that cannot end hides why
            if not ran_out(error) and ran_out(error.__context__):
                assert error.__context__ is not None
                raise error.__context__ from None
            raise
        return graph.replay
