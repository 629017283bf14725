"""Times the stages of a job and logs one line for each."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Clock:
    """A stopwatch: `laps` are milliseconds by stage, in the order in which stages ended."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.laps[stage] = (time.perf_counter() - start) * 1000
        log.info("%-12s %8.0f ms", stage, self.laps[stage])
