"""Logs in JSON, one object a line, with the job that it belongs to and without secrets.

The same redaction stands before every sentence that a client is told: addresses lose their path
and query, which may be signed, paths their folders, base64 its letters, secrets everything. It
takes a time in proportion to the text, whatever is in it, and what is told has a limit: sentences
quote what strangers' files and servers say.
"""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime

CURRENT: ContextVar[str | None] = ContextVar("job", default=None)  # the id of the job at hand

_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
_SECRET_CHARS = 8  # shorter values are words that sentences are made of
# Each begins where a run of its characters does and never gives one back: no text takes long.
_ADDRESS = re.compile(r"://(?:[^\s/?#'\"<>@]*+@)*+([^\s/?#'\"<>@]*+)[^\s'\"<>]*+")
_PAYLOAD = re.compile(r"(?<![A-Za-z0-9+/_=-])[A-Za-z0-9+/_=-]{100,}+")
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/:'\",;()]++/)++")

_SENTENCE_CHARS, _TRACE_CHARS = 1_000, 20_000
_END_SHARE = 4  # one part in so many of a long text is its end, where it says what to do
_ID_CHARS = 100


@dataclass(frozen=True, slots=True)
class Redactor:
    """Takes out of a text whatever must not leave the worker."""

    secrets: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Redactor":
        """Makes a redactor that knows the values of all variables that are named like secrets."""
        found = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and len(value) >= _SECRET_CHARS
        }
        return cls(tuple(sorted(found, key=len, reverse=True)))  # a long one may hold a short one

    def __call__(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        text = _ADDRESS.sub(r"://\1/...", text)
        text = _PAYLOAD.sub(lambda run: f"<{len(run[0])} characters>", text)
        return _FOLDERS.sub("", text)

    def tell(self, text: str, most: int = _SENTENCE_CHARS) -> str:
        """Returns the text as it may be told: on one line, redacted, and cut if it is long."""
        return shortened(self(" ".join(text.split())), most)


def shortened(text: str, most: int) -> str:
    """Cuts the midst out of a text, so that at most `most` characters are left."""
    if len(text) <= most:
        return text
    mark = " [...] "
    end = most // _END_SHARE
    return text[: most - end - len(mark)] + mark + text[-end:]


def name_of(job: Mapping[str, object]) -> str:
    """Returns the id of a job, as far as an id goes; a job that has none is this machine's own."""
    name = job.get("id")
    return name[:_ID_CHARS] if isinstance(name, str) else "local"


class JsonLines(logging.Formatter):
    """Formats a record. Its `extra={"facts": {...}}` goes beside the message as it is."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "job": CURRENT.get(),
            "message": shortened(self._redact(record.getMessage()), _TRACE_CHARS),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            trace = self._redact(self.formatException(record.exc_info))
            line["traceback"] = shortened(trace, _TRACE_CHARS)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_as_json(redact: Redactor) -> None:
    """Logs the engine's lines from INFO on, and those of others from WARNING on."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a locale may not have all letters
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines(redact))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("engine").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a line that cannot be written would be shown unredacted


@contextmanager
def job_named(name: str) -> Iterator[None]:
    """Names the job in the lines of this task, and of threads in a copy of its context."""
    token = CURRENT.set(name)
    try:
        yield
    finally:
        CURRENT.reset(token)
