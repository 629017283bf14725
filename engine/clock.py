"""Times the stages of a job and logs one line for each."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


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
