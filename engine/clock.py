"""Tells how long each stage of a job took, and how far long work is: a bar in a terminal, elsewhere
a line in the log now and then.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY_S = 30.0  # between two lines of how far work is
Item = TypeVar("Item")


class Clock:
    """A stopwatch: `laps` are milliseconds by stage, in the order in which stages ended.

    A stage that comes again adds to its lap. The time of a stage within another is its own alone,
    so that all laps together are the time of the job.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._within_ms = 0.0  # of the stages that ended inside the one that is open

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start, before = time.perf_counter(), self._within_ms
        self._within_ms = 0.0
        try:
            yield
        finally:
            whole_ms = (time.perf_counter() - start) * 1000
            own_ms = whole_ms - self._within_ms
            self._within_ms = before + whole_ms
        self.laps[stage] = self.laps.get(stage, 0.0) + own_ms
        log.info("%-12s %8.0f ms", stage, own_ms)


class Progress:
    """Tells how far work of `total` units is. Short work leaves no lines, nor does its end: the
    log has the time of each stage. A context manager, which takes its bar along when it ends.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "it",
        *,
        is_scaled: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unit` is one of them in a bar, `is_scaled` writes thousands as k and millions as M."""
        self._name, self._total, self._now = name, total, now
        self._bar = tqdm(total=total, desc=name, unit=unit, unit_scale=is_scaled, disable=None)
        self._done = 0
        self._began = self._told = now()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Says that `count` units more are done."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """Says that `done` units are done in all."""
        self._bar.update(done - self._done)
        self._done = done
        now = self._now()
        if self._bar.disable and 0 < done < self._total and now - self._told >= EVERY_S:
            spent = now - self._began
            left = spent * (self._total - done) / done
            share = 100 * done / self._total
            log.info("%s: %.0f %% after %.0f s, %.0f s left", self._name, share, spent, left)
            self._told = now

    def close(self) -> None:
        """Takes the bar along."""
        self._bar.close()


def over(items: Sequence[Item], name: str, unit: str = "it") -> Iterator[Item]:
    """Hands items on, and tells how many are done."""
    with Progress(name, len(items), unit) as progress:
        for item in items:
            yield item
            progress.advance()
