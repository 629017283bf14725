"""How a suite measures: the same work several times, after somebody has checked its result."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.figures import Figure

RUNS = 7


class WrongResult(Exception):
    """What was to be timed is wrong, so its time means nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured thing."""

    name: str
    ms: float  # median of the runs, for one unit of work
    best_ms: float
    cpu_ms: float  # median of this process alone: what the work takes of an idle core
    reference_ms: float | None = None  # of the program that this replaces
    worst_ms: float | None = None  # None: its spread is not known

    @property
    def times_faster(self) -> float | None:
        return None if self.reference_ms is None else self.reference_ms / self.ms


def measure(
    name: str, work: Callable[[], object], units: int = 1, reference_ms: float | None = None
) -> Row:
    """Wall time of `work`, which does `units` units; the caller has run and checked it once."""
    times, own = [], []
    for _ in range(RUNS):
        start, busy = time.perf_counter(), time.process_time()
        work()
        own.append(1000 * (time.process_time() - busy) / units)
        times.append(1000 * (time.perf_counter() - start) / units)
    median = statistics.median
    return Row(name, median(times), min(times), median(own), reference_ms, max(times))


def require(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongResult(f"{what}. No time is given for a wrong result.")


def figures(rows: Sequence[Row]) -> list[Figure]:
    """The medians, with half of what lies between the best and the worst run."""
    return [
        Figure(row.name, row.ms, "ms", (row.worst_ms - row.best_ms) / 2, "lower", "measured")
        for row in rows
        if row.worst_ms is not None
    ]


def table(rows: Sequence[Row]) -> str:
    """Columns for a terminal; how much faster is said of the median, waiting included."""
    heads = f"{'median ms':>10}{'best':>9}{'worst':>9}{'CPU ms':>10}{'official':>10}{'faster':>8}"
    lines = [f"{'':40}{heads}"]
    for row in rows:
        worst = "" if row.worst_ms is None else f"{row.worst_ms:.3f}"
        official = "" if row.reference_ms is None else f"{row.reference_ms:.0f}"
        faster = "" if row.times_faster is None else f"{row.times_faster:.0f}x"
        measured = f"{row.ms:10.3f}{row.best_ms:9.3f}{worst:>9}{row.cpu_ms:10.3f}"
        lines.append(f"{row.name:40}{measured}{official:>10}{faster:>8}".rstrip())
    return "\n".join(lines)
