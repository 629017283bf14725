"""How much a closed queue gets done: customers go round through stations, alone or in a line.

Solved exactly by mean value analysis. Customers come in classes of equal size that have stations of
their own and meet at one more: the warps of four schedulers, and the pipe to shared memory. Times
at a station are taken as irregular: customers who work in lockstep, or who use two stations at
once, would wait less.
"""

from collections.abc import Sequence
from functools import cache

Seen = tuple[tuple[float, ...], float, float]  # customers at each own station, at the shared; rate


def throughput(
    own: Sequence[float], customers: int, delay: float, shared: float = 0.0, classes: int = 1
) -> float:
    """Returns rounds a cycle of one class of so many customers.

    `own` and `shared` are the cycles that a round takes at each station of the class, and at that
    of all classes; `delay` is spent at none.
    """

    @cache
    def seen(population: tuple[int, ...]) -> tuple[Seen, ...]:
        """What an arriving customer would see of each class, from the largest to the smallest."""
        found = []
        for at, count in enumerate(population):
            if not count:
                found.append((tuple(0.0 for _ in own), 0.0, 0.0))
                continue
            others = [n - (at == other) for other, n in enumerate(population)]
            order = sorted(range(classes), key=lambda other: -others[other])
            before = seen(tuple(others[other] for other in order))
            mine, line = before[order.index(at)][0], sum(held for _, held, _ in before)
            times = [cycles * (1 + waiting) for cycles, waiting in zip(own, mine)]
            at_shared = shared * (1 + line)
            rate = count / (sum(times) + at_shared + delay)
            found.append((tuple(rate * time for time in times), rate * at_shared, rate))
        return tuple(found)

    return seen((customers,) * classes)[0][2]
