"""The schedule of streamed blocks: which one is copied into which buffer, after which has run.

Where the device has no room for all blocks, some stay on it, spread evenly over a step, and the
others pass through a ring of buffers in the order of their use. At first the ring is filled. From
then on a block that has run leaves its buffer to the streamed block that is as many further on as
the ring has buffers, into the next step where this one ends: so a copy always has a whole turn of
the ring to arrive, and neither the copies nor the blocks wait for the end of a step.

Whoever follows the schedule lets a copy wait until the block that had the buffer has run, and a
block until its copy is there. Nothing else orders the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Streaming:
    """How blocks share a device that does not hold all of them."""

    resident: int  # blocks that stay
    depth: int  # buffers of the ring, at least two: one is read while another is filled


@dataclass(frozen=True, slots=True)
class Turn:
    """A block's turn in a step."""

    block: int
    buffer: int | None  # the place in the ring that it is read from; None: it stays on the device
    refill: int | None  # the block that is copied there once this one has run


def streamed_blocks(layers: int, resident: int) -> list[int]:
    """Lists the blocks that pass through the ring: all but `resident` ones, evenly spread."""
    passing = layers - resident
    return [n for n in range(layers) if (n + 1) * passing // layers > n * passing // layers]


def first_fill(layers: int, streaming: Streaming) -> list[int]:
    """Lists the blocks that are copied before the first step, buffer by buffer."""
    passing = streamed_blocks(layers, streaming.resident)
    return [passing[place % len(passing)] for place in range(streaming.depth) if passing]


def turns(layers: int, streaming: Streaming) -> Iterator[Turn]:
    """Yields the turns of step after step, without an end."""
    passing, depth = streamed_blocks(layers, streaming.resident), streaming.depth
    place = 0  # of the next streamed block among all that ever pass
    while True:
        for block in range(layers):
            if block not in passing:
                yield Turn(block, None, None)
                continue
            yield Turn(block, place % depth, passing[(place + depth) % len(passing)])
            place += 1
