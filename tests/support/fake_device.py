"""A device of two queues and a clock: copies and kernels take time, and leave traces in memory.

It follows the rules of a GPU: what one queue was given runs in that order, and waits for what it
was told to wait for and for nothing else. Afterwards `damage` tells what went wrong in memory.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

MOMENT = 1e-9


@dataclass(frozen=True)
class Use:
    """A time in which memory was written, with a block, or read, for one."""

    memory: int
    block: int
    start: float
    end: float


class FakeDevice:
    """The `Transfers` of such a device, and the `BlockSource` of its copies."""

    def __init__(self, layers, kernel_s, copy_s, nbytes=8):
        self.kernel_s, self.copy_s = kernel_s, copy_s
        self.kernels_end = self.copies_end = 0.0
        self.layouts = [Layout(nbytes)] * layers
        self.writes, self.reads = [], []

    # --- Transfers

    def mark(self):
        return self.kernels_end

    def start(self, copy, after):
        begin = max(self.copies_end, after)
        self.copies_end = begin + self.copy_s
        self.writing = begin, self.copies_end
        copy()
        return self.copies_end

    def wait(self, copied):
        self.kernels_end = max(self.kernels_end, copied)

    def finish(self):
        pass

    # --- BlockSource

    def fill(self, block, memory):
        self.writes.append(Use(memory.data_ptr(), block, *self.writing))

    # --- whoever computes

    def launch(self, block, memory):
        begin = self.kernels_end
        self.kernels_end += self.kernel_s
        self.reads.append(Use(memory.data_ptr(), block, begin, self.kernels_end))

    def step(self, blocks):
        """Runs all blocks, and returns how long that took."""
        begin = self.kernels_end
        for block, memory in enumerate(blocks):
            self.launch(block, memory)
        return self.kernels_end - begin

    def damage(self):
        """Lists the reads that found another block, or a block that was being overwritten."""
        written = defaultdict(list)
        for write in self.writes:
            written[write.memory].append(write)
        return [read for read in self.reads if not is_whole(read, written[read.memory])]

    def is_one_by_one(self):
        """Tells if no two copies, and no two kernels, ran at the same time."""
        return all(
            first.end <= after.start + MOMENT
            for uses in (self.writes, self.reads)
            for first, after in pairwise(uses)
        )


def is_whole(read, writes):
    """Tells if the last write that began before a read's end was its block's, and had ended."""
    begun = [one for one in writes if one.start < read.end - MOMENT]
    last = max(begun, key=lambda one: one.end, default=None)
    return last is not None and last.block == read.block and last.end <= read.start + MOMENT


@dataclass(frozen=True)
class Layout:
    """A block that is its memory."""

    nbytes: int

    def weights(self, memory):
        return memory
