"""The orders in which a launch is run: all of them must give the same bits.

Each has another order of warps and of blocks, another pattern in everything that nobody wrote, and
asynchronous copies and products as late, or as early, as the rules allow.
"""

from dataclasses import dataclass

ASCENDING, DESCENDING, DRAWN = range(3)  # as in machine/program.hpp
_LATE_COPIES, _LATE_PRODUCTS, _RACES = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Order:
    name: str
    warps: int
    blocks: int
    is_late: bool  # cp.async and wgmma are done at the wait that covers them, or at once
    finds_races: bool  # and what PTX leaves undefined
    poison: int

    @property
    def flags(self) -> int:
        late = _LATE_COPIES | _LATE_PRODUCTS if self.is_late else 0
        return late | (_RACES if self.finds_races else 0)


FORWARD = Order("forward", ASCENDING, ASCENDING, True, True, 0xFFFFFFFF)
MIXED = Order("mixed", DRAWN, DRAWN, False, False, 0x7F7F7F7F)
BACKWARD = Order("backward", DESCENDING, DESCENDING, True, False, 0x01010101)
ORDERS = (FORWARD, MIXED, BACKWARD)

# Without the record of who touched which byte, for tensors of gigabytes.
UNWATCHED = Order("unwatched", ASCENDING, ASCENDING, True, False, 0xFFFFFFFF)
