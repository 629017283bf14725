"""What programs are told of a job, as RunPod tells it, with what a page needs beside."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from engine.errors import OutputError
from engine.server.queue import Queue
from engine.server.records import Record, in_short

Told = dict[str, Any]


def status(record: Record, queue: Queue, *, carries: bool = True) -> Told:
    """Tells of a job. A clip that is wanted in base64 is in there only if `carries` says so."""
    told: Told = {
        "id": record.id,
        "status": record.status,
        "model": record.model,
        "action": record.action,
        "created_at": record.created_at,
    }
    if (place := queue.place(record.id)) is not None:
        told["queue"] = {"position": place[0], "waiting": place[1]}
    if record.began_at is not None:
        told["delayTime"] = _ms(record.began_at - record.created_at)
        if record.ended_at is not None:
            told["executionTime"] = _ms(record.ended_at - record.began_at)
    if (address := preview_url(record, queue)) is not None:
        told["preview_url"] = address
    live = queue.live(record.id)
    if live is not None and live.progress is not None and record.status == "IN_PROGRESS":
        told["output"] = live.progress
    if record.output is not None:
        told["output"] = _carried(record, queue) if carries else record.output
    if record.error is not None:
        told["error"] = record.error
    return told


def listed(record: Record, queue: Queue) -> Told:
    """Tells of a job as a list holds it: stills and masks are told by GET /status/ID alone."""
    told = status(record, queue, carries=False)
    if "output" in told:
        told["output"] = in_short(told["output"])
    return {**told, "input": record.input}


def preview_url(record: Record, queue: Queue) -> str | None:
    """Names the latest picture of a job; a newer one has a greater number."""
    try:
        changed = queue.records.picture(record.id).stat().st_mtime_ns
    except OSError:
        return None
    return f"/preview/{record.id}?n={changed // 1_000_000}"


def event(name: str, number: int, data: Mapping[str, Any]) -> bytes:
    """Writes one server-sent event. JSON has no line break outside of a string, and none in it."""
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _carried(record: Record, queue: Queue) -> Mapping[str, Any]:
    """Puts the clip into the output of a job that wanted it there. Raises `OutputError`."""
    output = record.output or {}
    if record.status != "COMPLETED" or not record.wants_base64 or "video_url" not in output:
        return output
    try:
        clip = queue.records.clip(record.id).read_bytes()
    except OSError as error:
        raise OutputError("The clip of this job is not there any more.") from error
    return {"video": base64.b64encode(clip).decode("ascii"), **output}


def _ms(seconds: float) -> int:
    return max(0, round(1000 * seconds))
