"""Brings the files of a job into its folder, as the request that the pipeline is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from engine.errors import BadRequest
from engine.flow import Reference, Request
from engine.jobs.fetch import Wanted, fetch_base64, fetch_path, fetch_url
from engine.jobs.job import Given, Job
from engine.jobs.wire import INTERNET, Internet
from engine.worker.progress import JobProgress

FETCH_S = 120.0  # for one file

Medium: TypeAlias = Literal["picture", "video", "joints", "mask"]


@dataclass(frozen=True, slots=True)
class Gathering:
    """Where the files of a job come from and go to."""

    folder: Path  # of the job
    inputs: tuple[Path, ...]  # folders whose files a job may name
    video: Path | None  # of jobs without one
    progress: JobProgress
    network: Internet = INTERNET


def gather(job: Job, to: Gathering) -> Request:
    """Fetches all that a job names. Raises what the fetching raises, and what ends the job."""
    if job.image is None:
        raise BadRequest("There is no picture: send image_url, image_base64 or image_path.")
    image = _file(job.image, "picture", to)
    if job.motion is not None:
        kind = "joints" if job.kind == "joints" else "video"  # a skeleton is a video too
        motion = _file(job.motion, kind, to)
    elif to.video is not None:
        motion = to.video
    else:
        raise BadRequest("There is no video: send video_url, video_base64 or video_path.")
    return Request(
        image,
        motion,
        job.kind,
        job.settings,
        mask=_file_or_none(job.cast.mask, "mask", to),
        reference_mask=_file_or_none(job.cast.reference_mask, "mask", to),
        references=tuple(
            Reference(_file(one.image, "picture", to), _file_or_none(one.mask, "mask", to))
            for one in job.cast.references
        ),
    )


def _file_or_none(given: Given | None, kind: Medium, to: Gathering) -> Path | None:
    return None if given is None else _file(given, kind, to)


def _file(given: Given, kind: Medium, to: Gathering) -> Path:
    wanted = Wanted(given.field, kind, to.folder)
    if given.kind == "url":
        left_s = to.progress.left_s(FETCH_S)
        return fetch_url(given.value, wanted, to.network, left_s, to.progress.check)
    to.progress.check()
    if given.kind == "base64":
        return fetch_base64(given.value, wanted)
    return fetch_path(given.value, wanted, to.inputs)
