"""The ways to share a GPU's memory, each with less on it than the one before, and what they cost.

What costs time is weights on their way, at the rates that were measured at start-up. Blocks that
are streamed cost what their copies take beyond the computing that hides them; how long a forward
computes at least is taken from the fastest GPU that could be short of memory, so that the seconds
told here are rather too many than too few. Launching kernels one by one costs next to nothing at
sizes where memory is short, and none is counted.
Source: docs/reference/performance.md A, B and F7.
"""

from dataclasses import dataclass

# INT8 products a second of an RTX 5090, twice: no card with less than 40 GB computes faster
FASTEST_OPS = 838e12
COPY_SHARE = 1.05  # of copying, that a step takes at most where computing hides none of it
UNKNOWN_EVALUATIONS = 50  # of a clip whose recipe is not told


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to share the GPU: what is on it, and when."""

    does: str
    graphs: bool  # blocks are recorded
    encoders_stay: bool  # CLIP and VAE are there between their stages
    blocks_stay: bool  # the blocks' weights are there while others work
    contexts_stay: bool = False  # the weights that prepare text and picture are there for the next
    texts_stay: bool = False  # and so are the keys of the last texts
    streams: bool = False  # as many blocks are there as fit, the others pass through a ring


LADDER = (
    Rung("everything stays on the GPU", True, True, True, True, True),
    Rung("what prepares text and picture is read for each clip", True, True, True, False, True),
    Rung("text and picture are prepared anew for each clip", True, True, True),
    Rung("kernels are launched one after another, without CUDA graphs", False, True, True),
    Rung("there are no CUDA graphs, CLIP and VAE have the GPU in turns", False, False, True),
    Rung("there are no CUDA graphs, all models have the GPU in turns", False, False, False),
    Rung("blocks are streamed to the GPU while others compute", False, True, True, streams=True),
    Rung(
        "blocks are streamed to the GPU while others compute, CLIP and VAE have it in turns",
        False, False, True, streams=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes a second, as they were measured at start-up; before that, of a slow machine."""

    copy: float = 12e9  # from pinned memory to the GPU
    read: float = 2e9  # from the package's file to the GPU
    is_pinned: bool = True  # streamed blocks lie in pinned memory; else in the file

    @property
    def stream(self) -> float:
        """The rate at which streamed blocks come."""
        return self.copy if self.is_pinned else min(self.copy, self.read)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The bytes that a clip may have on their way, and the work that hides some of them."""

    contexts: int  # weights that prepare text and picture
    encoders: int  # CLIP and VAE
    blocks: int
    streamed: int  # of the blocks, those that pass in every forward
    forwards: int
    products: float  # of one forward, each a multiplication and an addition


def seconds(rung: Rung, moved: Traffic, rates: Rates) -> float:
    """Estimates what a clip loses to weights on their way on this rung."""
    copying = moved.streamed / rates.stream
    computing = 2 * moved.products / FASTEST_OPS
    lost = max(COPY_SHARE * copying - computing, 0.0) if rung.streams else 0.0
    return (
        (not rung.contexts_stay) * moved.contexts / rates.read
        + (not rung.encoders_stay) * 2 * moved.encoders / rates.copy
        + (not rung.blocks_stay) * moved.blocks / rates.read
        + lost * moved.forwards
    )
