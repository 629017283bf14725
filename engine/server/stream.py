"""Follows a job for a client: server-sent events until it has ended."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from engine.server import told
from engine.server.queue import Queue
from engine.server.records import ENDED

_LOOK_S = 0.25  # between two looks at the preview's file, which others write
_KEEP_S = 10.0  # between two lines that keep the connection open


async def follow(
    job: str, queue: Queue, now: Callable[[], float] = time.monotonic
) -> AsyncIterator[bytes]:
    """Yields events of a job that is known: status, progress, preview and, last, end."""
    number, last, progress, spoke = 0, None, None, now()
    preview = None
    while True:
        live = queue.live(job)
        changed = None if live is None else live.changed
        try:
            record = queue.records[job]
        except KeyError:  # forgotten by its browser
            return
        if live is None or record.status in ENDED:
            number += 1
            yield told.event("end", number, told.status(record, queue, carries=False))
            return
        events = list[tuple[str, dict[str, object]]]()
        if (shown := (record.status, queue.place(job))) != last:
            last = shown
            events.append(("status", told.status(record, queue, carries=False)))
        if live.progress is not None and live.progress is not progress:
            progress = live.progress
            events.append(("progress", dict(progress)))
        if (address := told.preview_url(record, queue)) != preview and address is not None:
            preview = address
            events.append(("preview", {"url": address}))
        for name, data in events:
            number, spoke = number + 1, now()
            yield told.event(name, number, data)
        if now() - spoke > _KEEP_S:
            spoke = now()
            yield b": waiting\n\n"
        if changed is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _LOOK_S)
