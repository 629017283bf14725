"""Models PyTorch's caching allocator: how much of a GPU it reserves for what a program asks of it.

Sizes are rounded to 512 bytes. Up to 1 MiB comes from segments of 2 MiB; up to 10 MiB from such of
20 MiB; more from a segment of its own, a multiple of 2 MiB. A freed block joins its free
neighbours, and serves the next request that it is the best fit for; what a large one has over is
split off if it is more than 1 MiB. So a segment may be kept for a block that no later request
fills. Where the GPU has no more, segments without a used block are given back and it is asked
again: a program needs less than what it reserves where nothing is short (`smallest_gpu`).

With expandable segments a pool is one range of addresses that grows at its end, by granules of 2 or
20 MiB, and every remainder is split off. One stream is modelled.
Source: docs/reference/performance.md E.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Protocol

MIB = 2**20
ROUND = 512  # bytes, of every request
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
MEDIUM, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
LARGE_ROUND = 2 * MIB


class Heap(Protocol):
    """Whoever gives memory out: `take` gives a handle for `give`."""

    def take(self, nbytes: int) -> object: ...

    def give(self, handle: object) -> None: ...


class Counter:
    """Counts bytes as they were asked for."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, nbytes: int) -> object:
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        return nbytes

    def give(self, handle: object) -> None:
        assert isinstance(handle, int)
        self.now -= handle


class Full(Exception):
    """The modelled GPU has no memory for a request."""


class Card:
    """A GPU's memory, which several allocators may share: the usual one, and that of graphs."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.reserved = self.peak = 0

    def has(self, nbytes: int) -> bool:
        return self.limit is None or self.reserved + nbytes <= self.limit

    def reserve(self, nbytes: int) -> None:
        """Counts bytes that a pool got, or gave back."""
        self.reserved += nbytes
        self.peak = max(self.peak, self.reserved)


class Block:
    """A range of addresses, free or used, with memory or (in an expandable segment) without."""

    __slots__ = ("after", "before", "is_there", "pool", "size", "start", "used")

    def __init__(self, pool: "_Pool", start: int, size: int, *, is_there: bool = True) -> None:
        self.pool, self.start, self.size, self.used = pool, start, size, False
        self.is_there = is_there
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Gives out blocks as PyTorch does, from segments on `card`."""

    def __init__(self, card: Card, *, expandable: bool = False, records: bool = False) -> None:
        """`records`: for a graph, whose pool gives nothing back."""
        self.card, self.records = card, records
        kind = _ExpandablePool if expandable else _Pool
        self._small, self._large = kind(self, SMALL_SEGMENT), kind(self, MEDIUM_SEGMENT)

    def take(self, nbytes: int) -> Block:
        """Raises `Full` if the card has no memory for it."""
        size = round_up(max(nbytes, 1), ROUND)
        return (self._small if size <= SMALL else self._large).take(size)

    def give(self, handle: object) -> None:
        assert isinstance(handle, Block)
        handle.pool.give(handle)

    def empty_cache(self) -> None:
        """Gives back what no block is used of."""
        if self.records:
            return
        for pool in (self._small, self._large):
            pool.shrink()

    def reserve(self, nbytes: int) -> None:
        """Gets bytes from the card: as it is, or after all that is not used was given back."""
        if not self.card.has(nbytes):
            self.empty_cache()
        if not self.card.has(nbytes):
            raise Full(f"{nbytes} bytes beside {self.card.reserved} of {self.card.limit}")
        self.card.reserve(nbytes)


class _Pool:
    """Segments of the one kind of requests."""

    def __init__(self, owner: CachingAllocator, segment: int) -> None:
        self.owner, self.segment = owner, segment
        self.free: list[tuple[int, int, Block]] = []  # by size, then by address
        self.least_rest = ROUND if segment == SMALL_SEGMENT else SMALL + 1  # that is split off
        self._end = 0  # addresses up to here have been given to segments

    def take(self, size: int) -> Block:
        block = self.best_fit(size) or self.grow(size)
        if block.size - size >= self.least_rest:
            self.keep(self.cut(block, size))
        block.used = True
        return block

    def give(self, block: Block) -> None:
        block.used = False
        before, after = block.before, block.after
        if before is not None and before.is_there and not before.used:
            self.forget(before)
            block = self.join(before, block)
        if after is not None and after.is_there and not after.used:
            self.forget(after)
            self.join(block, after)
        self.keep(block)

    def best_fit(self, size: int) -> Block | None:
        place = bisect_left(self.free, (size,))
        return self.free.pop(place)[2] if place < len(self.free) else None

    def grow(self, size: int) -> Block:
        """Makes a segment of one free block."""
        large = self.segment == MEDIUM_SEGMENT and size >= MEDIUM
        block = Block(self, self._end, round_up(size, LARGE_ROUND) if large else self.segment)
        self.owner.reserve(block.size)
        self._end += block.size
        return block

    def shrink(self) -> None:
        for _, _, block in [*self.free]:
            if block.before is None and block.after is None:
                self.forget(block)
                self.owner.card.reserve(-block.size)

    def cut(self, block: Block, size: int) -> Block:
        """Leaves the first `size` bytes to a block, and returns the rest as one of its own."""
        rest = Block(self, block.start + size, block.size - size, is_there=block.is_there)
        rest.before, rest.after, block.size = block, block.after, size
        if rest.after is not None:
            rest.after.before = rest
        block.after = rest
        return rest

    def join(self, block: Block, after: Block) -> Block:
        block.size += after.size
        block.after = after.after
        if block.after is not None:
            block.after.before = block
        return block

    def keep(self, block: Block) -> None:
        insort(self.free, (block.size, block.start, block))

    def forget(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.start))]


class _ExpandablePool(_Pool):
    """One range of addresses without an end. A free block may be of addresses without memory."""

    def __init__(self, owner: CachingAllocator, segment: int) -> None:
        super().__init__(owner, segment)
        self.least_rest = ROUND
        self._first = Block(self, 0, 2**62, is_there=False)

    def best_fit(self, size: int) -> Block | None:
        """Spares a block that could grow for a larger one that cannot."""
        place = bisect_left(self.free, (size,))
        if place == len(self.free):
            return None
        while place + 1 < len(self.free) and self._reach(place + 1) < self._reach(place):
            place += 1
        return self.free.pop(place)[2]

    def _reach(self, place: int) -> int:
        """The size that a free block can grow to."""
        block = self.free[place][2]
        after = block.after
        return block.size + (after.size if after is not None and not after.is_there else 0)

    def grow(self, size: int) -> Block:
        """Gives memory to the first addresses without any that have room, and to the free block
        before them.
        """
        start = self._room(size)
        if not self.owner.card.has(self._missing(start, size)):
            self.owner.empty_cache()
            start = self._room(size)
        self.owner.reserve(self._missing(start, size))
        return self._fill(start, size)

    def _room(self, size: int) -> Block:
        """Finds free neighbours of this size together, of which some have no memory."""
        block: Block | None = self._first
        while block is not None:
            run, room = block, 0
            while block is not None and not block.used and room < size:
                room += block.size
                block = block.after
            if room >= size:
                return run
            block = None if block is None else block.after
        raise AssertionError("addresses do not end")

    def _missing(self, start: Block, size: int) -> int:
        """Counts the bytes without memory in the first `size` from `start` on, in granules."""
        missing, block = 0, start
        while True:
            part = min(size, block.size)
            missing += 0 if block.is_there else min(round_up(part, self.segment), block.size)
            size -= part
            if not size:
                return missing
            assert block.after is not None
            block = block.after

    def _fill(self, start: Block, size: int) -> Block:
        block = start
        if block.is_there:
            self.forget(block)
        else:
            self._take_part(block, size)
        while block.size < size:
            after = block.after
            assert after is not None
            if after.is_there:
                self.forget(after)
            else:
                self._take_part(after, size - block.size)
            self.join(block, after)
        after = block.after
        if after is not None and after.is_there and not after.used:
            self.forget(after)
            self.join(block, after)
        return block

    def _take_part(self, block: Block, size: int) -> None:
        """Gives memory to the beginning of a block."""
        size = round_up(size, self.segment)
        if size < block.size:
            self.cut(block, size)
        block.is_there = True

    def shrink(self) -> None:
        """Takes the memory from all whole granules of free blocks."""
        for _, _, block in [*self.free]:
            begin = round_up(block.start, self.segment)
            end = (block.start + block.size) // self.segment * self.segment
            if begin >= end:
                continue
            self.forget(block)
            self.owner.card.reserve(begin - end)
            if end < block.start + block.size:
                self.keep(self.cut(block, end - block.start))
            if begin > block.start:
                front, block = block, self.cut(block, begin - block.start)
                self.keep(front)
            block.is_there = False
            self._join_empty(block)

    def _join_empty(self, block: Block) -> None:
        for first in (block, block.before):
            after = None if first is None else first.after
            if first is not None and after is not None and not (first.is_there or after.is_there):
                self.join(first, after)


def smallest_gpu(run: Callable[[Card], object], least: int, step: int) -> int:
    """Finds the smallest memory, `least` or a number of `step` more, with which `run` ends without
    `Full`.
    """
    roomy = Card()
    run(roomy)
    fails, fits = -1, max(0, -(-(roomy.peak - least) // step))
    while fits - fails > 1:
        middle = (fails + fits) // 2
        try:
            run(Card(least + middle * step))
            fits = middle
        except Full:
            fails = middle
    return least + fits * step


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
