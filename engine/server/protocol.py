"""Gives up on connections that say nothing and on clients that do not read what they are sent."""

import asyncio
import time

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 15.0  # from a connection, or the end of a reply, to the whole head of the next request
READ_S = 60.0  # for a client that has stopped to read
_LOOK_S = 3.0


class PatientProtocol(H11Protocol):
    """A connection whose other side has limited time. uvicorn itself waits for a head for ever."""

    _idle_since: float | None = None  # None: a request is being answered
    _full_since: float | None = None  # None: what is sent is read
    _look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._idle_since = time.monotonic()
        self._look = self.loop.call_later(_LOOK_S, self._look_at_it)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._full_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._full_since = None
        super().resume_writing()

    def _look_at_it(self) -> None:
        now, cycle = time.monotonic(), self.cycle
        is_asked = cycle is not None and not cycle.response_complete
        says_nothing = not is_asked and now - (self._idle_since or now) > HEAD_S
        reads_nothing = self._full_since is not None and now - self._full_since > READ_S
        if says_nothing or reads_nothing:
            self.transport.abort()
            return
        self._look = self.loop.call_later(_LOOK_S, self._look_at_it)
