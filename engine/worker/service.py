"""Serves one job at a time: fetches, renders and delivers it, and leaves nothing of it.

A job runs in the worker's one thread, so that whoever waits for it can call it off, and the GPU is
used from there alone. Telling how the worker is needs neither thread nor GPU.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from engine.clock import Clock
from engine.config import Defaults, defaults
from engine.errors import (
    BadRequest,
    BlankFrames,
    Cancelled,
    EngineError,
    NotFinite,
    OutputError,
    Unavailable,
)
from engine.flow import Check, Clip, Request, Source
from engine.jobs.job import Job
from engine.jobs.parse import parse_job
from engine.jobs.served import PREVIEW, Served
from engine.jobs.told import bounded
from engine.masks.looked import Look
from engine.masks.making import Segment
from engine.memory import ClipShape, MemoryPlan
from engine.worker.bucket import check_bucket
from engine.worker.delivery import Delivered
from engine.worker.dry_run import DryRun, dry_run, load_undanced, measure, sized
from engine.worker.endpoint import Endpoint
from engine.worker.gather import Gathering, gather
from engine.worker.joblog import name_of
from engine.worker.masks import framing_of, returned, shown_masks, with_wanted
from engine.worker.outlet import RUNPOD, Outlet
from engine.worker.progress import JobProgress, ProgressReport
from engine.worker.scratch import Scratch

log = logging.getLogger(__name__)

EXACT = "sdpa"  # attention in 16 bits by PyTorch, for a clip that came out wrong with another
LOOKED_AT = 13  # frames, from which a look ahead is drawn
_SEND_S = 3.0  # for a reply to reach the platform
_NONE_RETURNED = "return_masks: validate returns none; the action masks does."

Response = dict[str, Any]  # JSON, as clients read it
Work: TypeAlias = "Callable[[Job, str, Renderer, JobProgress], Response]"


@dataclass(frozen=True, slots=True)
class Renderer:
    """The functions that make clips. `engine.worker.renderer` has the real ones."""

    engine: str  # names version and package in replies
    gpu: str
    attention: str  # the name of the attention that the transformer has
    run: Callable[[Request, Path, JobProgress], Clip]
    attending: Callable[[str], AbstractContextManager[None]]  # has the named one while it is open
    plan: Callable[[ClipShape], MemoryPlan | None]  # None where no memory is planned
    high_water: Callable[[], int | None]  # the most bytes of GPU memory since the last call
    served: Served = PREVIEW  # what jobs may ask of the model
    segment: Segment | None = None  # makes masks, for jobs without any
    see: Callable[[Request, Check], Source] = load_undanced  # reads the media as `run` does
    look: Look | None = None  # finds joints, for framing


class Worker:
    """Owns the renderer, its thread, and the folder of jobs."""

    def __init__(self, endpoint: Endpoint, scratch: Scratch, outlet: Outlet = RUNPOD) -> None:
        """Makes a worker that serves once `start` was called."""
        self.endpoint, self._outlet = endpoint, outlet
        self._scratch = scratch
        self._thread = ThreadPoolExecutor(1, "job")
        self._defaults = Defaults()
        self._renderer: Renderer | None = None
        self._problem: EngineError | None = None
        self._born, self._start_ms = time.monotonic(), dict[str, float]()
        self._waiting = self._done = self._failed = 0
        self._running = set[JobProgress]()
        self._answered, self.is_ending = -math.inf, False
        self._works = {
            "generate": self._generate, "validate": self._validate, "masks": self._masks,
        }  # fmt: skip
        self._last: tuple[DryRun, float, float] | None = None  # seconds to denoise, and the rest

    def start(self, load: Callable[[Endpoint], Renderer]) -> None:
        """Reads the endpoint's defaults, and loads in the thread of the jobs.

        Raises an `EngineError` that is fatal: this machine cannot serve, another may. With any
        other the worker goes on, and each job is told what is wrong: no machine would do better.
        """
        clock = Clock()
        try:
            self.endpoint.check()
            self._defaults = defaults()
            with clock("load"), self._scratch.job_folder() as folder:
                given = replace(self.endpoint, scratch=folder)  # so that nothing is left of it
                self._renderer = self._thread.submit(load, given).result()
        except EngineError as error:
            if error.fatal:
                raise
            log.error("no job can be served: %s", error)
            self._problem = error
        self._start_ms = clock.laps

    def close(self) -> None:
        self._thread.shutdown()
        self._scratch.close()

    def call_off(self, patience_s: float) -> None:
        """Ends all jobs, or leaves them alone after so many seconds. From any thread, and again.

        A reply that was handed over just now gets some of the time to reach the client.
        """
        self.is_ending = True
        ends = time.monotonic() + (patience_s if self._start_ms else 0.0)  # loading has no end
        for progress in [*self._running]:
            progress.cancel()
        with contextlib.suppress(TimeoutError, RuntimeError):  # or the thread was ended before
            self._thread.submit(lambda: None).result(max(ends - time.monotonic(), 0.0))
        time.sleep(max(min(self._answered + _SEND_S, ends) - time.monotonic(), 0.0))

    def leave(self) -> None:
        """Removes all files, those of a job that goes on too. From any thread."""
        self._scratch.close()

    async def answer(self, given: Mapping[str, object], report: ProgressReport) -> Response:
        """Answers a job as the platform hands it over. Raises an `EngineError`.

        If the waiting task is cancelled, the job ends at its next forward, and only then this does.
        """
        job, renderer = self._parsed(given)
        if job.action == "health":
            return self.health()
        if renderer is None:
            raise self._new_problem()
        work = self._works[job.action]
        return await self._worked(work, job, name_of(given), renderer, report)

    async def look(
        self, given: Mapping[str, object], report: ProgressReport, show: Callable[[Source], None]
    ) -> Response:
        """Reads the first frames of a job as its clip would, has `show` draw them, and renders
        nothing. Raises as `answer` does.
        """
        job, renderer = self._parsed(given)
        if renderer is None:
            raise self._new_problem()
        work = partial(self._look, show=show)
        return await self._worked(work, job, name_of(given), renderer, report)

    def _parsed(self, given: Mapping[str, object]) -> tuple[Job, Renderer | None]:
        renderer = self._renderer
        try:
            return parse_job(
                given, self._defaults, renderer.served if renderer else PREVIEW
            ), renderer
        except BadRequest:
            if renderer is None:  # a job for another model than the one that is not there
                raise self._new_problem() from None
            raise

    async def _worked(
        self, work: Work, job: Job, name: str, renderer: Renderer, report: ProgressReport
    ) -> Response:
        """Has the thread do the work of a job, and waits for it."""
        progress = JobProgress(report, job.max_seconds, every_s=self._outlet.report_s)
        self._waiting += 1
        self._running.add(progress)
        try:
            if self.is_ending:
                raise Cancelled("The worker ends.")
            todo = partial(work, job, name, renderer, progress)
            running = asyncio.get_running_loop().run_in_executor(
                self._thread, copy_context().run, todo
            )
            response = await _ended(running, progress)
        except BaseException:
            self._failed += 1
            raise
        finally:
            self._waiting -= 1
            self._running.discard(progress)
            if not self.is_ending:
                self._answered = time.monotonic()
        self._done += 1
        return response

    @property
    def problem(self) -> EngineError | None:
        """What the start has found, that each job is told; None where jobs are served."""
        return self._problem

    def _new_problem(self) -> EngineError:
        """Makes the problem of the start anew, so that its trace is that of one job."""
        assert self._problem is not None
        return type(self._problem)(*self._problem.args)

    def health(self) -> Response:
        """Tells how the worker is. A disk that holds no job is a problem until it does again."""
        renderer, problem = self._renderer, self._problem
        if problem is None:
            try:
                self._scratch.check()
            except OutputError as error:
                problem = error
        return {
            "status": "broken" if problem else "busy" if self._waiting else "ready",
            "problem": None if problem is None else self.endpoint.redact.tell(str(problem)),
            "engine": renderer.engine if renderer else None,
            "gpu": renderer.gpu if renderer else None,
            "model": renderer.served.kind.title if renderer else None,
            "modes": [*renderer.served.modes] if renderer else [],
            "jobs": {"done": self._done, "failed": self._failed},
            "uptime_s": round(time.monotonic() - self._born, 1),
            "start_ms": _rounded(self._start_ms),
            "bucket": self.endpoint.bucket is not None,
            "default_video": self._defaults.video is not None,
        }

    def _generate(self, job: Job, name: str, renderer: Renderer, progress: JobProgress) -> Response:
        """Makes and delivers a clip. Runs in the worker's thread."""
        progress.begin()
        self._check_delivery(job, progress)
        clock = Clock()
        with self._scratch.job_folder() as folder:
            with clock("fetch"):
                request = self._fetch(job, folder, progress)
            if self._outlet.preview is not None:
                request = replace(request, preview=self._outlet.preview(name))
            progress("fetch", 1.0)
            renderer.high_water()
            request, of_masks = with_wanted(job, request, renderer.segment, folder, progress)
            clip, notes = _render(job, request, folder / "clip.mp4", renderer, progress)
            masks = returned(job, request, folder, name, progress)
            with clock("deliver"):
                bucket = job.bucket or self.endpoint.bucket
                sent = self._outlet.send(
                    clip.path, name, job.delivery, bucket, progress.check, masks.nbytes
                )
        laps = {"fetch": clock.laps["fetch"], **clip.timings_ms, "deliver": clock.laps["deliver"]}
        self._learn(request, clip)
        facts = {
            "timings_ms": _rounded(laps),
            "frames": clip.frames,
            "size": [clip.width, clip.height],
            "sent_bytes": sent.nbytes,
            "gpu_bytes": renderer.high_water(),
        }
        log.info("clip finished", extra={"facts": facts})
        warnings = self._told(*job.warnings, *of_masks, *notes, *sent.warnings, *masks.warnings)
        return _response(renderer, clip, sent, laps, warnings) | masks.reply

    def _validate(self, job: Job, name: str, renderer: Renderer, progress: JobProgress) -> Response:
        """Fetches and measures the media, and renders nothing. Runs in the worker's thread."""
        progress.begin()
        self._check_delivery(job, progress)
        with self._scratch.job_folder() as folder:
            request = self._fetch(job, folder, progress)
            request, of_masks = with_wanted(job, request, renderer.segment, folder, progress)
            source = measure(request, progress.check, renderer.look)
            seen = dry_run(request, source)
        with _attending(job.attention or renderer.attention, renderer):
            plan = renderer.plan(seen.shape)  # as this attention needs it
        expected = None if self._last is None else seen.seconds(*self._last)
        of_reply = (_NONE_RETURNED,) if job.returns_masks else ()
        return {
            "valid": True,
            "width": seen.shape.width,
            "height": seen.shape.height,
            "num_frames": seen.frames,
            "fps": seen.fps,
            "duration_s": round(seen.frames / seen.fps, 3),
            "segments": seen.segments,
            "forwards": seen.forwards,
            "memory": None if plan is None else _memory(plan),
            "estimate_s": None if expected is None else round(expected, 1),
            "settings": _settings(job, renderer),
            "framing": framing_of(source),
            "warnings": self._told(*job.warnings, *of_masks, *of_reply, *source.notes),
        }

    def _masks(self, job: Job, name: str, renderer: Renderer, progress: JobProgress) -> Response:
        """Shows who becomes whom, and renders nothing. Runs in the worker's thread."""
        progress.begin()
        with self._scratch.job_folder() as folder:
            request = self._fetch(job, folder, progress)
            request, of_masks = with_wanted(
                replace(job, wants_masks=True), request, renderer.segment, folder, progress
            )
            source = measure(request, progress.check, renderer.look)
            masks = returned(job, request, folder, name, progress)
            return (
                shown_masks(source, name, masks.nbytes)
                | masks.reply
                | {
                    "warnings": self._told(
                        *job.warnings, *of_masks, *source.notes, *masks.warnings
                    ),
                }
            )

    def _look(
        self,
        job: Job,
        name: str,
        renderer: Renderer,
        progress: JobProgress,
        show: Callable[[Source], None],
    ) -> Response:
        """Reads the first frames and has them shown. Runs in the worker's thread."""
        progress.begin()
        with self._scratch.job_folder() as folder:
            request = self._fetch(job, folder, progress)
            frames = min(request.settings.frames or LOOKED_AT, LOOKED_AT)
            first = replace(request, settings=replace(request.settings, frames=frames))
            source = renderer.see(first, progress.check)
            show(source)
        return {
            "frames": len(source.skeleton),
            "warnings": self._told(*job.warnings, *source.notes),
        }

    def _told(self, *warnings: str) -> list[str]:
        """Returns warnings as clients are told them: redacted, and no more than anybody reads."""
        return [self.endpoint.redact.tell(warning) for warning in bounded(warnings)]

    def _check_delivery(self, job: Job, progress: JobProgress) -> None:
        if job.bucket is not None:
            check_bucket(job.bucket, progress.check)
        elif job.delivery == "url" and self.endpoint.bucket is None and not self._outlet.has_urls:
            raise Unavailable(
                "There is no bucket to put the clip into. Send s3Config, set BUCKET_* for the "
                'endpoint, or ask for the output "base64".'
            )

    def _fetch(self, job: Job, folder: Path, progress: JobProgress) -> Request:
        return gather(job, Gathering(folder, self.endpoint.inputs, self._defaults.video, progress))

    def _learn(self, request: Request, clip: Clip) -> None:
        """Keeps what the next estimate is made from."""
        laps = clip.timings_ms
        if laps.get("denoise"):
            like = sized(request.settings.recipe, clip.height, clip.width, clip.frames, clip.fps)
            rest_ms = sum(laps.values()) - laps["denoise"]
            self._last = dry_run(request, like), laps["denoise"] / 1000, rest_ms / 1000


async def _ended(running: "asyncio.Future[Response]", progress: JobProgress) -> Response:
    """Waits for the end of a job. If this task is cancelled, calls the job off and still waits."""
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        progress.cancel()
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):  # asked once is enough
                await asyncio.wait([running])
        running.exception()  # looked at, or asyncio complains that nobody did
        raise


def _render(
    job: Job, request: Request, out: Path, renderer: Renderer, progress: JobProgress
) -> tuple[Clip, tuple[str, ...]]:
    """Renders the clip, once more with exact attention if it came out wrong; notes say so."""
    name = job.attention or renderer.attention
    try:
        with _attending(name, renderer):
            clip = renderer.run(request, out, progress)
        return clip, clip.notes
    except (NotFinite, BlankFrames) as error:
        if name == EXACT:
            raise
        log.warning("%s Tried again with attention %s.", error, EXACT)
        note = f"With attention {name} no clip came out; this one was made with {EXACT}."
    with _attending(EXACT, renderer):
        clip = renderer.run(request, out, progress)
    return clip, (note, *clip.notes)


def _attending(name: str, renderer: Renderer) -> AbstractContextManager[None]:
    return nullcontext() if name == renderer.attention else renderer.attending(name)


def _response(
    renderer: Renderer,
    clip: Clip,
    sent: Delivered,
    laps_ms: Mapping[str, float],
    warnings: list[str],
) -> Response:
    return {
        sent.key: sent.value,
        "seed": clip.seed,
        "width": clip.width,
        "height": clip.height,
        "fps": clip.fps,
        "num_frames": clip.frames,
        "duration_s": round(clip.frames / clip.fps, 3),
        "timings_ms": _rounded(laps_ms),
        "gpu": renderer.gpu,
        "engine": renderer.engine,
        "warnings": warnings,
        **({"drift": [asdict(one) for one in clip.drift]} if clip.drift else {}),
    }


def _settings(job: Job, renderer: Renderer) -> Response:
    """Writes all settings of the job as one object, those of its recipe among them."""
    settings = asdict(job.settings)
    return {
        **settings.pop("recipe"),
        **settings,
        "kind": job.kind,
        "attention": job.attention or renderer.attention,
        "max_seconds": job.max_seconds,
        "output": job.delivery,
    }


def _memory(plan: MemoryPlan) -> Response:
    return {
        "does": plan.does,
        "seconds": round(plan.seconds, 1),
        "peak_bytes": plan.peak_bytes,
        "resident_bytes": plan.resident_bytes,
        "free_bytes": plan.free_bytes,
    }


def _rounded(laps_ms: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(ms, 1) for stage, ms in laps_ms.items()}
