"""Runs the service until it is told to end: `python -m engine serve`."""

import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from engine.errors import OutputError, Unavailable
from engine.flow import Check
from engine.jobs.job import Bucket, Delivery
from engine.machine.device import find_device
from engine.machine.gpu import find_gpu
from engine.server import examples
from engine.server.app import Service, make_app
from engine.server.house import House, endpoint_of, make_folders
from engine.server.models import Models, find_models
from engine.server.protocol import PatientProtocol
from engine.server.records import Records
from engine.server.uploads import Uploads
from engine.worker.delivery import Delivered, deliver
from engine.worker.outlet import Outlet

log = logging.getLogger("engine.server")

PAGE = Path(__file__).resolve().parents[1] / "playground"

_GRACE_S = 5.0  # for the job at hand to end by itself
_CONNECTIONS = 256
_BACKLOG = 128
_REPORT_S = 0.25  # between two reports of progress


def serve(house: House, package: Path | None, models: Path | None, *, opens_page: bool) -> None:
    """Serves until a signal comes. Raises an `EngineError` if this machine or set-up cannot."""
    make_folders(house.folder)
    with _alone(house.folder), _listening(house) as listener:
        service = make_service(house, package, models)
        address = f"http://{_bracketed(house.host)}:{listener.getsockname()[1]}/"
        _greet(service, address, opens_page=opens_page)
        server = uvicorn.Server(server_config(service))
        with _hung_up(server):
            try:
                server.run([listener])
            finally:
                _end(service.models)


def make_service(house: House, package: Path | None, models: Path | None) -> Service:
    """Finds the models, and reads what is kept. No weights are loaded."""
    device = find_device()
    endpoint = endpoint_of(house, package or Path(), models, examples.HOME)
    found = find_models(package, device, endpoint.allows_cpu)
    records = Records(house)
    gpu = find_gpu() if device.type == "cuda" else None
    return Service(
        house,
        Models(found, endpoint, outlet_of(records)),
        records,
        Uploads(house),
        "CPU" if gpu is None else gpu.name,
        PAGE,
    )


def outlet_of(records: Records) -> Outlet:
    """Makes what becomes of a finished clip: it is kept as it is, and has an address here.

    A bucket that the job brings gets it too, as on RunPod.
    """

    def send(
        clip: Path, job: str, wanted: Delivery, bucket: Bucket | None, check: Check
    ) -> Delivered:
        size = records.keep_clip(clip, job).stat().st_size
        here = Delivered("video_url", f"/results/{job}.mp4", size)
        if bucket is None or wanted != "url":
            return here
        sent = deliver(clip, job, wanted, bucket, check)
        if sent.key == "video_url":
            return sent
        return Delivered(here.key, here.value, here.nbytes, sent.warnings)

    return Outlet(send, has_urls=True, report_s=_REPORT_S)


def server_config(service: Service) -> uvicorn.Config:
    """Sets the web server up: patient with jobs, and not with clients."""
    return uvicorn.Config(
        make_app(service),
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        backlog=_BACKLOG,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=32 * 1024,
    )


@contextmanager
def _hung_up(server: uvicorn.Server) -> Iterator[None]:
    """Has SIGHUP, which uvicorn does not listen to, end the service as SIGTERM does: a terminal was
    closed. Who started the service may have it ignored.
    """
    before = signal.getsignal(signal.SIGHUP)
    heard = list[int]()

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        server.handle_exit(number, frame)

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
    if heard:
        sys.exit(128 + signal.SIGHUP)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder for this process. Raises `Unavailable` if another service has it."""
    lock = folder / "lock"
    try:
        file = lock.open("ab")
    except OSError as error:
        raise OutputError(f"{lock} cannot be opened: {error.strerror}. Set SCAIL_STATE.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Unavailable(
                f"Another service keeps its jobs in {folder}; end that one, or set SCAIL_STATE to "
                "another folder."
            ) from error
        yield


@contextmanager
def _listening(house: House) -> Iterator[socket.socket]:
    """Opens the port. Raises `Unavailable` where it cannot be had."""
    family = socket.AF_INET6 if ":" in house.host else socket.AF_INET
    try:
        listener = socket.create_server((house.host, house.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise Unavailable(
            f"{house.host}, port {house.port} cannot be listened on: {error.strerror or error}. "
            "Name another with --port."
        ) from error
    with listener:
        yield listener


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _greet(service: Service, address: str, *, opens_page: bool) -> None:
    for model in service.models.found.values():
        if model.load is None:
            log.warning("%s is not served: %s", model.served.kind.title, model.why)
        elif model.demo is not None:
            log.warning("%s", model.demo.warning)
    log.info("the page and the service are at %s", address)
    if opens_page:
        threading.Timer(1.0, webbrowser.open, (address,)).start()


def _end(models: Models) -> None:
    """Has the job at hand end, and leaves a thread that does not hear behind."""
    models.end(_GRACE_S)
    if models.is_busy:  # Python itself would wait for it
        ending = sys.exc_info()[1]
        status = ending.code if isinstance(ending, SystemExit) else 128 + signal.SIGINT
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status if isinstance(status, int) else 1)
