"""Measures the same work several times, and shows rows as a table of columns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.record import Figure

RUNS = 7
ROUNDS = 3  # of works that are timed in turns

Timed = TypeVar("Timed")
Cell = str | int | float | None


class WrongResult(Exception):
    """Raised where the result of what was to be timed is wrong, so that its time means nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured thing."""

    name: str
    ms: float  # median of the runs, for one unit of work
    best_ms: float
    worst_ms: float
    runs: int = RUNS

    @property
    def noise_ms(self) -> float:
        return (self.worst_ms - self.best_ms) / 2


def row_of(name: str, times_ms: Sequence[float]) -> Row:
    return Row(name, statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))


def require(is_right: bool, what: str) -> None:
    if not is_right:
        raise WrongResult(f"{what}. No time is given for a wrong result.")


def measure(name: str, work: Callable[[], object], units: int = 1) -> Row:
    """Times `work`, which does `units` units; the caller has run and checked it once."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start) / units)
    return row_of(name, times)


def interleaved(
    works: Mapping[str, Timed], clock: Callable[[Timed], float | None], runs: int = ROUNDS
) -> dict[str, list[float]]:
    """ms of each work, taken in turns (A B A B), so that clocks and heat of the machine hit all
    alike.

    A clock that gives no times leaves the lists empty; each work has then been run `runs` times.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            ms = clock(work)
            if ms is not None:
                times[name].append(ms)
    return times


def spread(times: Sequence[float]) -> tuple[float, float] | None:
    """The median, and half of what lies between the best and the worst; None of no times."""
    return (statistics.median(times), (max(times) - min(times)) / 2) if times else None


def columns(heads: Mapping[str, str], lines: Sequence[Sequence[Cell]], first: str = "") -> str:
    """A table for a terminal. `heads`: the formats of the columns right of the names, by title.

    Each line begins with its name. Words stand left, numbers right; None stays empty, and a column
    of nothing else is left out.
    """
    shown = [[first, *heads]]
    for name, *cells in lines:
        formats = zip(cells, heads.values())
        shown.append([str(name), *("" if c is None else format(c, form) for c, form in formats)])
    held = [n for n in range(len(shown[0])) if any(line[n] for line in shown[1:])]
    shown = [[line[n] for n in held] for line in shown]
    widths = [max(map(len, column)) for column in zip(*shown)]
    words = [any(isinstance(line[n], str) for line in lines) for n in held]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if is_word else f"{cell:>{width}}"
            for cell, width, is_word in zip(line, widths, words)
        ).rstrip()
        for line in shown
    )


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Medians of several runs: the noise of a single one is not known."""
    return [Figure(row.name, row.ms, "ms", row.noise_ms) for row in rows if row.runs > 1]


def table(rows: Sequence[Row]) -> str:
    """Columns for a terminal."""
    lines = [(row.name, row.ms, row.best_ms, row.worst_ms) for row in rows]
    return columns({"median ms": ".3f", "best": ".3f", "worst": ".3f"}, lines)
