"""The routes of the service: RunPod's, and those of the page."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from engine.errors import BadRequest, EngineError
from engine.jobs.like import like
from engine.server import examples, told
from engine.server.body import read_json, read_pieces
from engine.server.disk import check_room
from engine.server.guard import Guard
from engine.server.house import House
from engine.server.ids import is_id, owner_of
from engine.server.info import info
from engine.server.models import Models
from engine.server.multipart import FilePart, boundary_of
from engine.server.pages import routes_page
from engine.server.queue import Queue
from engine.server.records import ENDED, QUESTIONS, Record, Records
from engine.server.refused import Refused, status_of, unknown
from engine.server.reply import Reply
from engine.server.static import TYPES, page_file
from engine.server.stream import follow
from engine.server.submission import Places, read_submission
from engine.server.uploads import BODY_BYTES, Upload, Uploads

_WAIT_MS, _LEAST_WAIT_MS, _MOST_WAIT_MS = 90_000, 1_000, 300_000
_TIDY_S = 600.0
_LISTED = 200
_EVENTS = "text/event-stream"

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input"],
                    "properties": {
                        "input": {"type": "object"},
                        "model": {"type": "string"},
                        "s3Config": {"type": "object"},
                    },
                }
            }
        },
    }
}
_FILE = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes stand on."""

    house: House
    models: Models
    records: Records
    uploads: Uploads
    gpu: str
    page: Path  # the folder of the page
    features: Sequence[str] = ("preview", "overlay", "settings", "masks")


def make_app(service: Service, when_ready: Callable[[Queue], None] = lambda _: None) -> ASGIApp:
    """Makes the application. `when_ready` is given the queue, in the event loop."""
    queue = Queue(service.house, service.models, service.records, service.uploads)

    @asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        queue.start()
        tidying = asyncio.create_task(_tidy(service))
        when_ready(queue)
        yield
        tidying.cancel()
        await queue.end()

    app = FastAPI(
        title="SCAIL engine", docs_url=None, redoc_url=None, lifespan=living, redirect_slashes=False
    )
    _add_job_routes(app, service, queue)
    _add_history_routes(app, service, queue)
    _add_upload_routes(app, service.uploads)
    _add_page_routes(app, service)  # at last: what no other route takes is a file of the page
    _add_errors(app, service.house)
    return Guard(app, service.house, lambda path: page_file(path, service.page) is not None)


async def _tidy(service: Service) -> None:
    while True:
        await asyncio.sleep(_TIDY_S)
        service.uploads.expire()
        service.records.expire()


def _add_errors(app: FastAPI, house: House) -> None:
    @app.exception_handler(EngineError)
    async def of_engine(request: Request, error: EngineError) -> Response:
        own = isinstance(error, Refused)  # its sentence names routes, which are no folders
        said = str(error) if own else house.redact.tell(str(error))
        return _failure(status_of(error), error.code, said)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return _failure(error.status_code, "bad_request", f"{error.detail}; see GET /docs.")

    @app.exception_handler(Exception)
    async def of_none(request: Request, error: Exception) -> Response:
        return _failure(500, "internal", "The service failed in a way nobody foresaw.")


def _failure(status: int, code: str, sentence: str) -> Response:
    return Reply({"error": sentence, "code": code}, status)


def _add_job_routes(app: FastAPI, service: Service, queue: Queue) -> None:
    places = Places(service.uploads.path, examples.example_path, bool(service.house.inputs))

    async def submit(request: Request, *, looks: bool = False) -> Record | dict[str, Any]:
        body, size = await read_json(request.receive, request.headers)
        submission = read_submission(body, service.models, places, looks=looks)
        if submission.action == "health":
            return _health_job(service, queue)
        check_room(service.house)
        return queue.submit(submission, size, owner_of(request.headers.get("x-browser")))

    @app.post("/run", openapi_extra=_BODY)
    async def run(request: Request) -> Response:
        """Takes a job and answers at once with its id."""
        taken = await submit(request)
        if isinstance(taken, dict):
            return Reply(taken)
        return Reply({"id": taken.id, "status": taken.status})

    @app.post("/overlay", openapi_extra=_BODY)
    async def overlay(request: Request) -> Response:
        """Draws what a clip will be made of, with nothing denoised; answers as /runsync does."""
        return await answered(request, looks=True)

    @app.post("/runsync", openapi_extra=_BODY)
    async def runsync(request: Request) -> Response:
        """Takes a job and waits for its end, at most `wait` milliseconds."""
        return await answered(request)

    async def answered(request: Request, *, looks: bool = False) -> Response:
        wait_s = _wait_s(request.query_params.get("wait"))
        taken = await submit(request, looks=looks)
        if isinstance(taken, dict):
            return Reply(taken)
        await queue.ended(taken.id, wait_s)
        return Reply(await asyncio.to_thread(told.status, _record(queue, taken.id), queue))

    @app.post("/status/{job}", include_in_schema=False)  # as some clients of RunPod ask
    @app.get("/status/{job}")
    async def status(job: str) -> Response:
        """Tells how a job is, and with what it ended."""
        return Reply(await asyncio.to_thread(told.status, _record(queue, job), queue))

    @app.post("/cancel/{job}")
    async def cancel(job: str) -> Response:
        """Calls a job off: at once if it waits, at its next forward if it runs."""
        _record(queue, job)
        queue.cancel(job)
        return Reply(told.status(_record(queue, job), queue, carries=False))

    @app.get("/stream/{job}")
    async def stream(request: Request, job: str) -> Response:
        """Follows a job: server-sent events where Accept asks for them, else RunPod's JSON."""
        record = _record(queue, job)
        if _EVENTS in request.headers.get("accept", ""):
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(follow(job, queue), media_type=_EVENTS, headers=headers)
        shown = told.status(record, queue, carries=False)
        pieces = [{"output": shown["output"]}] if shown.get("output") else []
        return Reply({"id": job, "status": record.status, "stream": pieces})

    @app.get("/health")
    async def health(request: Request) -> Response:
        """Tells how the service is."""
        shown = _health(service, queue)
        if not request.state.is_known:
            shown = {"status": shown["status"]}
        return Reply(shown)


def _add_history_routes(app: FastAPI, service: Service, queue: Queue) -> None:
    records = service.records

    @app.get("/jobs")
    async def jobs(request: Request) -> Response:
        """Lists the jobs of the browser that X-Browser names, the newest first."""
        own = records.of(owner_of(request.headers.get("x-browser")))
        clips = islice((one for one in own if one.action not in QUESTIONS), _LISTED)
        return Reply({"jobs": [told.listed(one, queue) for one in clips]})

    @app.delete("/jobs/{job}")
    async def forget(request: Request, job: str) -> Response:
        """Forgets a finished job of this browser, and its clip."""
        record = _record(queue, job)
        if record.owner is not None and record.owner != owner_of(request.headers.get("x-browser")):
            raise unknown("job of this id")
        if record.status not in ENDED:
            raise Refused(
                400, "bad_request",
                "The job has not ended; call it off first, with POST /cancel/ID.",
            )  # fmt: skip
        records.drop(job)
        return Response(status_code=204)

    @app.head("/results/{name}", include_in_schema=False)
    @app.get("/results/{name}")
    async def result(request: Request, name: str) -> Response:
        """Gives a finished clip; ranges of it where Range asks for them."""
        job = name.removesuffix(".mp4")
        path = records.clip(job)
        if not is_id(job) or not name.endswith(".mp4") or not path.is_file():
            raise unknown("clip of this name")
        saved = f"scail-{job[:8]}.mp4" if request.query_params.get("download") else None
        return FileResponse(
            path, media_type="video/mp4", filename=saved,
            headers={"cache-control": "private, max-age=3600"},
        )  # fmt: skip

    @app.get("/preview/{job}")
    async def preview(job: str) -> Response:
        """Gives the latest picture of a job, as PNG."""
        path = records.picture(job)
        if not is_id(job) or not path.is_file():
            raise unknown("preview of this job")
        return FileResponse(path, media_type="image/png", headers={"cache-control": "no-store"})


def _add_upload_routes(app: FastAPI, uploads: Uploads) -> None:
    async def received(request: Request) -> Upload:
        part = FilePart(
            read_pieces(request.receive, request.headers, BODY_BYTES),
            boundary_of(request.headers),
        )
        await part.begin()
        return await uploads.keep(part.name, part.contents())

    @app.post("/uploads", openapi_extra=_FILE)
    async def upload(request: Request) -> Response:
        """Takes one file as multipart/form-data; a job names it as `upload:ID`."""
        return Reply(asdict(await received(request)), 201)

    @app.post("/settings", openapi_extra=_FILE)
    async def settings(request: Request) -> Response:
        """Reads the settings that a clip of this engine carries, for another one like it."""
        kept = await received(request)
        try:
            found = await asyncio.to_thread(like, uploads.path(kept.id), "This clip")
        finally:
            uploads.drop(kept.id)
        return Reply({"input": dict(found.given), "model": found.kind, "warnings": [*found.told]})

    @app.delete("/uploads/{upload}")
    async def drop_upload(upload: str) -> Response:
        """Removes an upload."""
        uploads.drop(upload)
        return Response(status_code=204)


def _add_page_routes(app: FastAPI, service: Service) -> None:
    @app.get("/info")
    async def tell() -> Response:
        """Tells what can be asked for: models, presets, sizes, limits, examples."""
        found = info(service.house, service.models, service.gpu, service.features)
        return Reply(found)

    @app.get("/examples/{name:path}")
    async def example(name: str) -> Response:
        """Gives a picture or a video of an example."""
        path = await asyncio.to_thread(examples.shown_path, name, service.house.folder / "examples")
        return FileResponse(
            path, media_type=examples.TYPES[path.suffix],
            headers={"cache-control": "private, max-age=3600"},
        )  # fmt: skip

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(routes_page(app.openapi()))

    @app.get("/{name:path}", include_in_schema=False)
    async def page(name: str) -> Response:
        path = page_file(f"/{name}", service.page)
        if path is None:
            raise unknown("page of this address")
        headers = {"cache-control": "no-cache"}
        return FileResponse(path, media_type=TYPES[path.suffix], headers=headers)


def _record(queue: Queue, job: str) -> Record:
    if not is_id(job) or job not in queue.records:
        raise unknown("job of this id")
    return queue.records[job]


def _wait_s(given: str | None) -> float:
    if given is None:
        return _WAIT_MS / 1000
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise BadRequest("wait is no number of milliseconds.")
    if not _LEAST_WAIT_MS <= int(given) <= _MOST_WAIT_MS:
        raise BadRequest(
            f"wait is {int(given)}; it must be {_LEAST_WAIT_MS} to {_MOST_WAIT_MS} ms."
        )
    return int(given) / 1000


def _health(service: Service, queue: Queue) -> dict[str, Any]:
    """Tells how the service is, in RunPod's words and its own."""
    worker, counts = service.models.health(), queue.counts()
    problem = queue.problem if worker is None else worker["problem"]
    if problem is not None:
        status = "broken"
    elif queue.is_loading or worker is None:
        status = "loading"
    else:
        status = "busy" if counts["inProgress"] else "ready"
    return {
        "status": status,
        "problem": problem,
        "engine": None if worker is None else worker["engine"],
        "gpu": service.gpu,
        "model": service.models.loaded,
        "jobs": counts,
        "workers": {"idle": 1 - counts["inProgress"], "running": counts["inProgress"]},
    }


def _health_job(service: Service, queue: Queue) -> dict[str, Any]:
    """Answers the action `health` as a worker does, without a place in the queue."""
    shown = _health(service, queue)
    counts = {"done": queue.done, "failed": queue.failed}
    output = {**(service.models.health() or {}), **shown, "jobs": counts}
    return {"id": "health", "status": "COMPLETED", "output": output}
