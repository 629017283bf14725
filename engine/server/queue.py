"""Runs jobs one after the other, and tells whoever asks how they are.

It lives in the event loop; a worker renders in a thread of its own. Questions (`validate`) go
before clips, as they take no more than seconds.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from engine.errors import EngineError, OutputError
from engine.flow import KindName, Source
from engine.server.disk import write_whole
from engine.server.house import House
from engine.server.ids import make_id
from engine.server.models import Models
from engine.server.overlay import draw
from engine.server.records import ENDED, LOOK, QUESTIONS, Record, Records, shown_input
from engine.server.refused import Refused
from engine.server.submission import Submission
from engine.server.uploads import Uploads
from engine.worker.joblog import job_named
from engine.worker.service import Worker

log = logging.getLogger(__name__)

Done = TypeVar("Done")

_UNFORESEEN = "The job failed in a way nobody foresaw; the model is loaded anew. Send it again."


@dataclass(slots=True, eq=False)
class Live:
    """A job that has not ended."""

    submission: Submission
    size: int  # bytes of its body
    record: Record
    progress: Mapping[str, Any] | None = None
    is_cancelled: bool = False
    task: "asyncio.Task[Any] | None" = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set, and replaced, at each news

    def tell(self) -> None:
        """Wakes whoever waits for news."""
        self.changed.set()
        self.changed = asyncio.Event()


class Queue:
    """Owns the jobs that wait and the one that runs."""

    def __init__(
        self,
        house: House,
        models: Models,
        records: Records,
        uploads: Uploads,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.records, self.models = records, models
        self._house, self._uploads, self._now = house, uploads, now
        self._live = dict[str, Live]()
        self._questions, self._clips = deque[Live](), deque[Live]()
        self._woken = asyncio.Event()
        self._loader = ThreadPoolExecutor(1, "load")  # the loop waits for none of its threads
        self._running: Live | None = None
        self._runner: asyncio.Task[None] | None = None
        self.is_loading = False
        self.problem: str | None = None  # of the model that could not be loaded
        self.done = self.failed = 0

    # --- of the event loop

    def start(self) -> None:
        """Begins to run jobs, with the usual model loaded first."""
        self._runner = asyncio.create_task(self._run_all())

    async def end(self) -> None:
        """Runs no more jobs; the one that runs is called off and not waited for."""
        if self._runner is not None:
            self._runner.cancel()
        if self._running is not None and self._running.task is not None:
            self._running.task.cancel()

    def submit(self, submission: Submission, size: int, owner: str | None) -> Record:
        """Takes a job. Raises `Refused` if too many wait, and `OutputError` if the disk is full."""
        waiting = [*self._questions, *self._clips]
        if len(waiting) >= self._house.most_waiting or (
            waiting and size + sum(one.size for one in waiting) > self._house.waiting_bytes
        ):
            raise Refused(
                429,
                "busy",
                f"{len(waiting)} jobs wait already; send this one when some have ended.",
            )
        record = Record(
            id=make_id(),
            model=submission.model,
            action=submission.action[:40],
            owner=owner,
            created_at=self._now(),
            input=shown_input(submission.sent),
            wants_base64=submission.wants_base64,
        )
        self.records.expire()
        self.records.put(record)
        live = Live(submission, size, record)
        self._uploads.hold(submission.uploads)
        self._live[record.id] = live
        (self._questions if submission.action in QUESTIONS else self._clips).append(live)
        self._woken.set()
        return record

    def cancel(self, job: str) -> None:
        """Calls a job off: one that waits at once, one that runs at its next forward."""
        live = self._live.get(job)
        if live is None or live.is_cancelled:
            return
        live.is_cancelled = True
        if live is self._running:
            if live.task is not None:
                live.task.cancel()
            return
        for waiting in (self._questions, self._clips):
            with suppress(ValueError):
                waiting.remove(live)
        self._finish(live, replace(live.record, status="CANCELLED", ended_at=self._now()))
        self._tell_all()

    def live(self, job: str) -> Live | None:
        return self._live.get(job)

    def place(self, job: str) -> tuple[int, int] | None:
        """Returns where a job stands among those that wait, from 1, and how many they are."""
        waiting = [*self._questions, *self._clips]
        for number, live in enumerate(waiting, start=1):
            if live.record.id == job:
                return number, len(waiting)
        return None

    def counts(self) -> dict[str, int]:
        """Counts the jobs since the start, as RunPod calls them."""
        return {
            "completed": self.done,
            "failed": self.failed,
            "inProgress": 0 if self._running is None else 1,
            "inQueue": len(self._questions) + len(self._clips),
        }

    async def ended(self, job: str, most_s: float) -> None:
        """Waits for the end of a job, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while (live := self._live.get(job)) is not None:
                    await live.changed.wait()

    # --- running

    async def _run_all(self) -> None:
        with suppress(EngineError):  # told to each job, and in `problem`
            await self._load(self.models.usual)
        while True:
            live = self._next()
            if live is None:
                self._woken.clear()
                await self._woken.wait()
                continue
            self._running = live
            try:
                with job_named(live.record.id):
                    await self._run(live)
            finally:
                self._running = None
            self._tell_all()

    def _next(self) -> Live | None:
        for waiting in (self._questions, self._clips):
            if waiting:
                return waiting.popleft()
        return None

    async def _run(self, live: Live) -> None:
        live.record = replace(live.record, status="IN_PROGRESS", began_at=self._now())
        self._put(live.record)
        self._tell_all()
        live.task = asyncio.create_task(self._answer(live))
        given_up = False
        try:
            output = await asyncio.shield(live.task)
            ended = replace(live.record, status="COMPLETED", output=output)
        except asyncio.CancelledError:
            if not live.is_cancelled:
                raise  # the service ends
            ended = replace(live.record, status="CANCELLED")
        except EngineError as error:
            log.warning("%s: %s", error.code, error)
            given_up = error.fatal
            ended = self._failed(live, str(error), error.code)
        except Exception:
            log.exception("unforeseen")
            given_up = True
            ended = self._failed(live, _UNFORESEEN, EngineError.code)
        if self.models.is_ending and ended.status != "COMPLETED":
            return  # the next service says that it was lost
        if given_up:  # a model after an unforeseen failure cannot be trusted
            await self._in_loader(self.models.let_go)
        self._finish(live, replace(ended, ended_at=self._now()))

    def _failed(self, live: Live, sentence: str, code: str) -> Record:
        told = self._house.redact.tell(sentence)
        return replace(live.record, status="FAILED", error=told, output={"code": code})

    async def _answer(self, live: Live) -> Mapping[str, Any]:
        loop = asyncio.get_running_loop()

        def hear(progress: Mapping[str, object]) -> None:
            live.progress = dict(progress)
            live.tell()

        def report(progress: Mapping[str, object]) -> None:  # from the worker's thread
            loop.call_soon_threadsafe(hear, progress)

        if self.models.loaded != live.submission.model:
            hear({"stage": "load", "percent": 0, "eta_s": None})
        worker = await self._load(live.submission.model)
        if live.is_cancelled:
            raise asyncio.CancelledError
        given = {"id": live.record.id, **live.submission.given}
        if live.submission.action == LOOK:
            output = await worker.look(given, report, partial(self._show, live.record.id))
            output["picture_url"] = f"/preview/{live.record.id}?n=1"
        else:
            output = await worker.answer(given, report)
        if (warnings := live.submission.warnings) and "warnings" in output:
            output["warnings"] = [*warnings, *output["warnings"]]
        return output

    def _show(self, job: str, source: Source) -> None:  # in the worker's thread
        png = draw(source)
        write_whole(self.records.picture(job), lambda part: part.write_bytes(png))

    async def _load(self, name: KindName) -> Worker:
        if self.models.loaded == name:
            return await self._in_loader(self.models.worker, name)
        self.is_loading = True
        try:
            worker = await asyncio.shield(self._in_loader(self.models.worker, name))
        except EngineError as error:
            self.problem = self._house.redact.tell(str(error))
            raise
        finally:
            self.is_loading = False
        self.problem = None
        return worker

    def _in_loader(self, work: Callable[..., Done], *given: object) -> "asyncio.Future[Done]":
        return asyncio.get_running_loop().run_in_executor(self._loader, work, *given)

    def _finish(self, live: Live, record: Record) -> None:
        assert record.status in ENDED
        if record.status == "COMPLETED":
            self.done += 1
        elif record.status == "FAILED":
            self.failed += 1
        live.record = record
        self._put(record)
        self._uploads.release(live.submission.uploads)
        del self._live[record.id]
        self.records.expire()
        live.tell()

    def _put(self, record: Record) -> None:
        try:
            self.records.put(record)
        except OutputError as error:  # memory has it
            log.warning("%s", error)

    def _tell_all(self) -> None:
        """Tells those who wait that the queue has moved."""
        for live in [*self._live.values()]:
            live.tell()
