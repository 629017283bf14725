"""What the service remembers of its jobs, on disk, so that it is known after a restart.

A record is a file `jobs/ID.json`, replaced as a whole; its clip is `results/ID.mp4`. Jobs that
waited or ran when the service ended are reported as lost: their media are not kept.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from engine.errors import OutputError
from engine.server.disk import write_whole
from engine.server.house import House
from engine.server.ids import is_id

log = logging.getLogger(__name__)

Status: TypeAlias = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED"]
ENDED: tuple[Status, ...] = ("COMPLETED", "FAILED", "CANCELLED")
LOST = "lost"
LOOK = "overlay"  # the action of a job that shows what its clip would be made of
QUESTIONS = ("validate", LOOK)  # actions whose answers nobody asks for twice


_QUESTION_S = 600.0  # that the answer to a question is kept
_MOST = 2000  # records, of which most take a few kilobytes of memory
_MOST_BYTES = 256 * 2**20  # of all of them: stills and returned masks lie in some
_TEXT_CHARS, _PACKED_CHARS = 5000, 100  # of a value that is kept, and of one in base64
_INPUT_BYTES = 100_000
_DEEPEST = 20  # levels; a workflow has six


@dataclass(frozen=True, slots=True)
class Record:
    """A job as it is remembered: nothing of its media."""

    id: str
    model: str
    action: str
    owner: str | None  # of `ids.owner_of`
    created_at: float  # seconds since 1970
    input: Mapping[str, Any] = field(repr=False)  # as it was sent, long values left out
    status: Status = "IN_QUEUE"
    wants_base64: bool = True
    began_at: float | None = None
    ended_at: float | None = None
    output: Mapping[str, Any] | None = field(default=None, repr=False)
    error: str | None = None


class Records:
    """Owns the records and the clips that belong to them."""

    def __init__(self, house: House, now: Callable[[], float] = time.time) -> None:
        """Reads what is there; what did not end is lost, and written down as that."""
        self._house, self._now = house, now
        self._jobs, self._results = house.folder / "jobs", house.folder / "results"
        self._previews = house.folder / "previews"
        for part in (*self._jobs.glob(".*.part"), *self._results.glob(".*.part")):
            part.unlink(missing_ok=True)
        read = [one for path in self._jobs.glob("*.json") if (one := _read(path)) is not None]
        self._held = {one.id: one for one in sorted(read, key=lambda one: one.created_at)}
        self._sizes = {one: _size(self._jobs / f"{one}.json") for one in self._held}
        for one in [*self._held.values()]:
            if one.status not in ENDED:
                self._lose(one)
        self._drop_strays()
        self.expire()

    def __getitem__(self, job: str) -> Record:
        """Raises `KeyError`."""
        return self._held[job]

    def __contains__(self, job: str) -> bool:
        return job in self._held

    def of(self, owner: str | None) -> Iterator[Record]:
        """Lists the jobs of a browser, the newest first."""
        if owner is not None:
            yield from (one for one in reversed(self._held.values()) if one.owner == owner)

    def put(self, record: Record) -> None:
        """Remembers a record. Raises `OutputError` if the disk is full; memory has it all the same,
        unless it is a new one.
        """
        if record.id in self._held:
            self._held[record.id] = record
        path = self._jobs / f"{record.id}.json"
        text = json.dumps(asdict(record))
        self._sizes[record.id] = len(text)
        write_whole(path, lambda part: part.write_text(text, "ascii"))
        self._held[record.id] = record

    def drop(self, job: str) -> None:
        """Forgets a job, its clip and its picture."""
        self._held.pop(job, None)
        self._sizes.pop(job, None)
        for path in (self._jobs / f"{job}.json", self.clip(job), self.picture(job)):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def clip(self, job: str) -> Path:
        return self._results / f"{job}.mp4"

    def picture(self, job: str) -> Path:
        """Returns where the latest preview of a job is put, by whoever makes it, as a whole PNG."""
        return self._previews / f"{job}.png"

    def keep_clip(self, clip: Path, job: str) -> Path:
        """Copies a finished clip to its place. Raises `OutputError`. From any thread."""
        kept = self.clip(job)
        write_whole(kept, lambda part: shutil.copyfile(clip, part))
        return kept

    def expire(self) -> None:
        """Forgets the oldest jobs that have ended, while there are too many or their time is over,
        and clips while they take too much room.
        """
        ended = [one for one in self._held.values() if one.status in ENDED]
        taken = sum(_size(self.clip(one.id)) for one in ended)
        too_many = len(self._held) - _MOST
        held = sum(self._sizes.values())
        for number, one in enumerate(ended):
            age_s = self._now() - (one.ended_at or one.created_at)
            keep_s = _QUESTION_S if one.action in QUESTIONS else self._house.keep_s
            is_young = age_s <= keep_s
            has_room = taken <= self._house.keep_bytes and held <= _MOST_BYTES
            if is_young and has_room and number >= too_many:
                continue
            if is_young and number == len(ended) - 1:  # larger than all room, it is given once
                continue
            taken -= _size(self.clip(one.id))
            held -= self._sizes.get(one.id, 0)
            self.drop(one.id)

    def _lose(self, one: Record) -> None:
        did = "ran" if one.status == "IN_PROGRESS" else "waited"
        lost = replace(
            one,
            status="FAILED",
            ended_at=self._now(),
            output={"code": LOST},
            error=f"The service ended while the job {did}, so that it is lost. Send it again.",
        )
        self._held[one.id] = lost
        with suppress(OutputError):  # the next start says it again
            self.put(lost)

    def _drop_strays(self) -> None:
        """Removes clips and pictures whose job is not known."""
        for path in (*self._results.iterdir(), *self._previews.iterdir()):
            if path.stem not in self._held:
                with suppress(OSError):
                    path.unlink()


def shown_input(given: object) -> Mapping[str, Any]:
    """Returns an input as it is remembered: without base64 and other long texts."""
    if not isinstance(given, dict):
        return {}
    kept = in_short(given)
    if len(json.dumps(kept)) <= _INPUT_BYTES:
        return kept
    return {name: value for name, value in kept.items() if not isinstance(value, dict | list)}


def in_short(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields with a word in the place of each value that is too long for a list."""
    return {str(name): _shortened(value, str(name)) for name, value in given.items()}


def _shortened(value: object, name: str, level: int = 1) -> object:
    most = _PACKED_CHARS if name.endswith("base64") else _TEXT_CHARS
    if isinstance(value, str) and len(value) > most:
        return f"<{len(value)} characters>"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | dict) and level > _DEEPEST:
        return "<nested too deep>"
    if isinstance(value, list):
        return [_shortened(one, name, level + 1) for one in value]
    if isinstance(value, dict):
        return {str(key): _shortened(one, str(key), level + 1) for key, one in value.items()}
    return value


def _read(path: Path) -> Record | None:
    try:
        held = json.loads(path.read_text("ascii"), parse_constant=_no_number)
        record = Record(**{one.name: held[one.name] for one in fields(Record) if one.name in held})
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("%s is no record of a job: %s", path.name, type(error).__name__)
        return None
    if _is_sound(record) and is_id(record.id) and record.id == path.stem:
        return record
    log.warning("%s is no record of a job: it has values that none has", path.name)
    return None


def _is_sound(record: Record) -> bool:
    """Tells whether the values of a record are of the kinds that they are when it is written."""
    words = (record.id, record.model, record.action, record.status)
    times = (one for one in (record.began_at, record.ended_at) if one is not None)
    return (
        all(isinstance(one, str) for one in words)
        and all(isinstance(one, int | float) for one in (record.created_at, *times))
        and all(one is None or isinstance(one, str) for one in (record.owner, record.error))
        and isinstance(record.input, dict)
        and (record.output is None or isinstance(record.output, dict))
    )


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not in JSON")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
