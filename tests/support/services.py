"""A service in this process, on a port of its own, whose clips are made by hand."""

import asyncio
import http.client
import json
import socket
import threading
import time
from dataclasses import replace

import uvicorn

from engine.config import KINDS
from engine.jobs.served import Served
from engine.server.app import Service
from engine.server.house import House, endpoint_of, make_folders
from engine.server.models import Model, Models
from engine.server.records import Records
from engine.server.run import outlet_of, server_config
from engine.server.uploads import Uploads
from tests.support.workers import HandMade

BROWSER, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
READY_S = 30.0


def house(folder, **changes):
    given = {
        "host": "127.0.0.1", "port": 0, "names": frozenset({"localhost", "127.0.0.1", "::1"}),
        "takes_numeric": False, "token": None, "folder": folder / "serve", "inputs": (),
        "free_bytes": 10**6,
    }  # fmt: skip
    return House(**given | changes)


def model(made, name="preview", **changes):
    kind = KINDS[name]
    served = Served(kind, kind.modes)

    def load(endpoint):
        renderer = made.load(endpoint) if isinstance(made, HandMade) else made(endpoint)
        return replace(renderer, served=served)

    return Model(**{"name": name, "served": served, "demo": None, "load": load} | changes)


class Serving:
    """A service that runs in a thread of this process."""

    def __init__(self, folder, *models, page=None, **changes):
        self.house = house(folder, **changes)
        make_folders(self.house.folder)
        examples = folder / "examples"
        examples.mkdir(exist_ok=True)
        endpoint = endpoint_of(self.house, folder, folder / "models", examples)
        endpoint = replace(endpoint, scratch=folder / "scratch")
        self.records = Records(self.house)
        self.models = Models(models or [model(HandMade())], endpoint, outlet_of(self.records))
        self.service = Service(
            self.house, self.models, self.records, Uploads(self.house), "no GPU",
            page or folder / "page",
        )  # fmt: skip
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.server = uvicorn.Server(server_config(self.service))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        ends = time.monotonic() + READY_S
        while not self.server.started:
            assert time.monotonic() < ends and self.thread.is_alive()
            time.sleep(0.01)

    def _run(self):
        asyncio.run(self.server.serve([self.listener]))

    def stop(self):
        self.server.should_exit = True
        self.thread.join(READY_S)
        assert not self.thread.is_alive()
        self.listener.close()
        self.models.let_go()

    # --- asking

    def send(self, method, path, body=None, headers=(), timeout=30):
        """Sends a request as it is; returns status, headers and body."""
        asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            asked.request(method, path, body, dict(headers))
            answer = asked.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            asked.close()

    def ask(self, method, path, given=None, browser=None, **headers):
        """Asks in JSON; returns status and what was answered."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if browser is not None:
            sent["X-Browser"] = browser
        body = None
        if given is not None:
            body = json.dumps(given)
            sent.setdefault("Content-Type", "application/json")
        status, _, said = self.send(method, path, body, sent)
        return status, json.loads(said) if said else None

    def upload(self, contents, name="me.png", **headers):
        body, sent = multipart(contents, name)
        status, _, said = self.send("POST", "/uploads", body, sent | headers)
        return status, json.loads(said)

    def ended(self, job, most_s=30.0):
        """Waits until a job has ended, and returns how."""
        ends = time.monotonic() + most_s
        while time.monotonic() < ends:
            status, told = self.ask("GET", f"/status/{job}")
            assert status == 200, told
            if told["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
                return told
            time.sleep(0.02)
        raise AssertionError(told)


def multipart(contents, name="me.png", boundary="xxBOUNDARYxx"):
    """A body of one file, and its headers."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    body = (
        head.encode() + b"Content-Type: x/y\r\n\r\n" + contents + f"\r\n--{boundary}--\r\n".encode()
    )
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def events(stream):
    """Reads server-sent events from an open reply: (name, data) as they come."""
    name = None
    for line in stream:
        line = line.decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))
