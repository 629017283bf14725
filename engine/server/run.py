"""Runs the service until it is told to end: `python -m engine serve`."""

import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

_GRACE_S = 4.0  # for the job at hand to end by itself
_LAST_S = 1.0  # for all else
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
        server = _Server(server_config(service), service.models)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a terminal that is closed
            signal.signal(signal.SIGHUP, server.handle_exit)
        try:
            server.run([listener])
        finally:
            service.models.end(_GRACE_S)
            if service.models.is_busy:  # Python itself would wait for it
                server.leave()
        if server.heard == signal.SIGHUP:  # the others are raised again by uvicorn
            sys.exit(128 + signal.SIGHUP)


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
        clip: Path, job: str, wanted: Delivery, bucket: Bucket | None, check: Check, beside: int
    ) -> Delivered:
        size = records.keep_clip(clip, job).stat().st_size
        here = Delivered("video_url", f"/results/{job}.mp4", size)
        if bucket is None or wanted != "url":
            return here
        sent = deliver(clip, job, wanted, bucket, check, beside)
        if sent.key == "video_url":
            return sent
        return Delivered(here.key, here.value, here.nbytes, sent.warnings)

    return Outlet(send, has_urls=True, report_s=_REPORT_S, preview=records.picture)


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


class _Server(uvicorn.Server):
    """A web server that ends in time, whatever the job at hand does: its loop waits for the job."""

    def __init__(self, config: uvicorn.Config, models: Models) -> None:
        super().__init__(config)
        self._models = models
        self.heard: int = signal.SIGTERM  # the signal that ends the process

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.heard = sig
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        threading.Thread(target=self._end, name="end", daemon=True).start()
        await super().shutdown(sockets)

    def _end(self) -> None:
        self._models.end(_GRACE_S)
        time.sleep(_LAST_S)
        self.leave()

    def leave(self) -> None:
        """Ends the process, with threads that are busy left behind."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(128 + self.heard)


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
