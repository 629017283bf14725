"""Checks what stands around a job, and turns uploads and examples into files for its parser.

The job itself is parsed when its turn comes, by the worker: what is refused here is what this door
does not do.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import BadRequest
from engine.flow import KindName
from engine.jobs.fields import shown
from engine.server.models import Models
from engine.server.records import LOOK
from engine.server.refused import Refused

_BESIDE = ("input", "id", "model", "s3Config", "webhook", "policy")
_UPLOAD, _EXAMPLE = "upload:", "example:"
_NAMED = 10


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as it is handed to a worker, and what the queue must know of it."""

    model: KindName
    action: str  # as it was sent; the parser judges it
    wants_base64: bool
    given: Mapping[str, Any] = field(repr=False)  # what the worker is given
    sent: object = field(repr=False)  # the input as it was sent
    uploads: tuple[str, ...] = ()  # the ids of those that it names
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Places:
    """Where the media that a job names lie."""

    upload: Callable[[str], Path]  # raises for an id that is not there
    example: Callable[[str], Path]
    takes_paths: bool


def read_submission(
    body: object, models: Models, places: Places, *, looks: bool = False
) -> Submission:
    """Reads the body of `/run`, or of `/overlay` if it only `looks`. Raises an `EngineError`."""
    if not isinstance(body, dict) or "input" not in body:
        raise BadRequest('The body has no "input", an object with what is to be done.')
    if body.get("webhook"):
        raise Refused(
            400, "bad_request",
            "webhook is not taken: this service calls nobody. Ask GET /status/ID, or listen to "
            "GET /stream/ID.",
        )  # fmt: skip
    model = _model(body.get("model"), models)
    sent = body["input"]
    if isinstance(sent, str):
        sent = _parsed(sent)
    uploads = list[str]()
    given = sent
    if isinstance(sent, dict):
        given = {name: _resolved(name, value, places, uploads) for name, value in sent.items()}
        if isinstance(records := given.get("references"), list):
            given["references"] = [_reference(one, places, uploads) for one in records]
    if isinstance(given, dict):  # a page's clips can be made again, unless its owner says no
        given.setdefault("keep_settings", True)
    fields = given if isinstance(given, dict) else {}
    handed: dict[str, Any] = {"input": given}
    if body.get("s3Config"):
        handed["s3Config"] = body["s3Config"]
    return Submission(
        model=model,
        action=LOOK if looks else _word(fields.get("action")) or "generate",
        wants_base64=_word(fields.get("output")) != "url",
        given=handed,
        sent=sent,
        uploads=tuple(dict.fromkeys(uploads)),
        warnings=_told(body),
    )


def _told(body: Mapping[str, object]) -> tuple[str, ...]:
    unread = [name for name in body if name not in _BESIDE]
    said = []
    if body.get("policy"):
        said.append("policy: ignored here; the field max_seconds limits the time of a job.")
    if unread:
        named = ", ".join(shown(name) for name in unread[:_NAMED])
        said.append(f"Not known beside input and ignored: {named}.")
    return tuple(said)


def _model(named: object, models: Models) -> KindName:
    if named is None:
        return models.usual
    for name in models.found:
        if name == named:
            return name
    raise BadRequest(
        f"There is no model {shown(named)} here, only {' and '.join(models.found)}; leave it out."
    )


def _parsed(text: str) -> object:
    """Parses an input that is a JSON string of its own; what is none is left to the parser."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _word(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _reference(record: object, places: Places, uploads: list[str]) -> object:
    if not isinstance(record, dict):
        return record
    return {name: _resolved(name, value, places, uploads) for name, value in record.items()}


def _resolved(name: object, value: object, places: Places, uploads: list[str]) -> object:
    """Turns the name of an upload or an example into that of its file. Raises an `EngineError`
    for a path of this machine where none is taken.
    """
    if not isinstance(name, str) or (name != "path" and not name.endswith("_path")):
        return value
    if isinstance(value, list):
        return [_resolved(name, one, places, uploads) for one in value]
    if not isinstance(value, str) or not value.strip():
        return value
    text = value.strip()
    if text.startswith(_UPLOAD):
        upload = text.removeprefix(_UPLOAD)
        path = places.upload(upload)
        uploads.append(upload)
        return str(path)
    if text.startswith(_EXAMPLE):
        return str(places.example(text.removeprefix(_EXAMPLE)))
    if not places.takes_paths:
        raise BadRequest(
            f"{name} names a file of this machine, and no folder is open to jobs. Upload the file "
            "with POST /uploads, or start the service with SCAIL_INPUTS=FOLDER."
        )
    return value
