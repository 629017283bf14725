"""Reports now and then how far a job is, and ends a job that may not go on."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from engine.errors import Cancelled, DeadlineExceeded

# is given {"stage": "denoise", "percent": 41, "eta_s": 75}
ProgressReport: TypeAlias = Callable[[Mapping[str, object]], None]

REPORT_S = 3.0  # the platform takes each report in a connection of its own, in any order
# The share of each stage in the whole, roughly, for a clip of the usual length
_SHARES = {"fetch": 0.02, "media": 0.05, "conditioning": 0.05, "denoise": 0.75, "decode": 0.13}


class JobProgress:
    """The progress of one job. It is called between forwards, from the thread that renders."""

    def __init__(
        self,
        report: ProgressReport,
        max_seconds: float | None,
        now: Callable[[], float] = time.monotonic,
        every_s: float = REPORT_S,
    ) -> None:
        self._report, self._now, self._max_seconds = report, now, max_seconds
        self._every_s = every_s
        self._began = self._told = now()
        self._ends = math.inf
        self._cancelled = threading.Event()
        self._shares: dict[str, float] = {}
        self._where = ("", 0)

    def begin(self) -> None:
        """Starts the time of the job, which may have waited for another. Raises as `check` does."""
        self._began = self._told = self._now()
        if self._max_seconds is not None:
            self._ends = self._began + self._max_seconds
        self.check()

    def cancel(self) -> None:
        """Ends the job at its next call. May be called from any thread."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises `Cancelled` or `DeadlineExceeded`."""
        if self._cancelled.is_set():
            raise Cancelled("The job was called off.")
        if self._now() > self._ends:
            stage, percent = self._where
            where = f" at {stage}, {percent} % done" if stage else ""
            raise DeadlineExceeded(
                f"The job took longer than the {self._max_seconds:g} s it may take, and was "
                f"ended{where}. Allow more time, or ask for a smaller or shorter clip."
            )

    def left_s(self, most: float) -> float:
        """Returns the seconds that a wait may take: `most`, or less if the job must end before."""
        self.check()
        return min(most, self._ends - self._now())

    def __call__(self, stage: str, share: float) -> None:
        """Notes that `share` of the stage is done. Raises as `check` does."""
        self._shares[stage] = max(share, self._shares.get(stage, 0.0))
        done = percent_done(self._shares)
        self._where = stage, int(done)
        self.check()
        now = self._now()
        if now - self._told >= self._every_s:
            self._told = now
            left_s = (now - self._began) * (100 - done) / done if done else None
            eta_s = None if left_s is None else round(left_s)
            self._report({"stage": stage, "percent": int(done), "eta_s": eta_s})


def percent_done(shares: Mapping[str, float]) -> float:
    """Returns the percentage of the whole job from the share that is done of each stage.

    The stages of a long clip take turns. A stage that one after it has begun, and that told
    nothing, is done. Sending the result is left at the end.
    """
    names = list(_SHARES)
    latest = max(names.index(name) for name in shares)
    done = {name: shares.get(name, 1.0) for name in names[: latest + 1]}
    return 99 * sum(_SHARES[name] * share for name, share in done.items())
