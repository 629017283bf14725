"""How clips and news leave a worker: as RunPod takes them, or as who runs the worker wants them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from engine.flow import Check
from engine.jobs.job import Bucket, Delivery
from engine.worker.delivery import Delivered, deliver
from engine.worker.progress import REPORT_S

Send: TypeAlias = Callable[[Path, str, Delivery, Bucket | None, Check, int], Delivered]


@dataclass(frozen=True, slots=True)
class Outlet:
    """What becomes of a finished clip, and how often a job tells of itself."""

    send: Send = deliver  # is given the clip, the job, what is wanted, bucket, check, other bytes
    has_urls: bool = False  # clips have addresses here, without a bucket
    report_s: float = REPORT_S
    preview: Callable[[str], Path] | None = None  # where a job's preview goes; None: nowhere


RUNPOD = Outlet()
