"""Reads the body of a request: bounded in size and time, whoever sends it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.types import Receive

from engine.server.refused import Refused

JSON_BYTES = 32 * 2**20

_PIECE_S = 20.0  # for the next piece of a body
_FIRST_S = 30.0  # before the rate of a body counts
_LEAST_BYTES_S = 4096  # slower than that a client only holds a connection


async def read_pieces(
    receive: Receive,
    headers: Mapping[str, str],
    most: int,
    now: Callable[[], float] = time.monotonic,
) -> AsyncIterator[bytes]:
    """Yields a body as it comes. Raises `Refused` for one that is too large, too slow or cut."""
    _check_length(headers.get("content-length"), most)
    began, size = now(), 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), _PIECE_S)
        except TimeoutError:
            raise _too_slow() from None
        if message["type"] == "http.disconnect":
            raise Refused(400, "cut_off", "The connection was closed before the body had ended.")
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            raise _too_large(most)
        took = now() - began
        if took > _FIRST_S and size < took * _LEAST_BYTES_S:
            raise _too_slow()
        if piece:
            yield piece
        if not message.get("more_body", False):
            return


async def read_json(receive: Receive, headers: Mapping[str, str]) -> tuple[object, int]:
    """Reads a body of JSON, and says how many bytes it had. Raises `Refused`."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(
            415,
            "not_json",
            "The body must be JSON, with the header Content-Type: application/json.",
        )
    held = bytearray()
    async for piece in read_pieces(receive, headers, JSON_BYTES):
        held += piece
    try:
        return json.loads(held.decode("utf-8")), len(held)
    except RecursionError as error:
        raise Refused(400, "bad_request", "The body is JSON nested too deep.") from error
    except ValueError as error:  # of UTF-8, of JSON, and of numbers with thousands of digits
        raise Refused(400, "bad_request", "The body is no JSON.") from error


def _check_length(given: str | None, most: int) -> None:
    if given is not None and given.isascii() and given.isdigit() and int(given[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> Refused:
    return Refused(
        413, "too_large",
        f"The body has more than the {most // 2**20} MiB that are taken; upload large media with "
        "POST /uploads, or send their addresses.",
    )  # fmt: skip


def _too_slow() -> Refused:
    return Refused(408, "too_slow", "The body comes too slowly; send it again.")
