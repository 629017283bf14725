"""How far a job is, told now and then; and whether it may go on."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from engine.errors import Cancelled, DeadlineExceeded

# what is told: {"stage": "denoise", "percent": 41, "eta_s": 75}
ProgressReport: TypeAlias = Callable[[Mapping[str, object]], None]

REPORT_S = 3.0  # the platform takes each report in a connection of its own, in any order
# Of the whole, by stage: what a clip of the usual length takes, roughly
_SHARES = {"fetch": 0.02, "media": 0.05, "conditioning": 0.05, "denoise": 0.75, "decode": 0.13}


class JobProgress:
    """Of one job. Called between forwards, from the thread that renders."""

    def __init__(
        self,
        report: ProgressReport,
        max_seconds: float | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._now, self._max_seconds = report, now, max_seconds
        self._began = self._told = now()
        self._ends = math.inf
        self._cancelled = threading.Event()
        self._where = ("", 0)

    def begin(self) -> None:
        """Time runs from here: a job may have waited for another one. Raises what `check` does."""
        self._began = self._told = self._now()
        if self._max_seconds is not None:
            self._ends = self._began + self._max_seconds
        self.check()

    def cancel(self) -> None:
        """From any thread: the job ends at the next call."""
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
        """What a wait may take: `most`, or less if the job has to end before."""
        self.check()
        return min(most, self._ends - self._now())

    def __call__(self, stage: str, share: float) -> None:
        """`share` of the stage is done. Raises what `check` raises."""
        done = percent_done(stage, share)
        self._where = stage, int(done)
        self.check()
        now = self._now()
        if now - self._told >= REPORT_S:
            self._told = now
            left_s = (now - self._began) * (100 - done) / done if done else None
            eta_s = None if left_s is None else round(left_s)
            self._report({"stage": stage, "percent": int(done), "eta_s": eta_s})


def percent_done(stage: str, share: float) -> float:
    """Of the whole job. Sending the result is what is left at the end."""
    names = list(_SHARES)
    before = sum(_SHARES[name] for name in names[: names.index(stage)])
    return 99 * (before + share * _SHARES[stage])
