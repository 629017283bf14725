"""Reads the one file of a `multipart/form-data` body, piece by piece (RFC 7578, RFC 2046 5.1).

Our own, since it takes exactly what the page and curl send: one part, with a name of a file. What
comes is handed on as it comes, so that no body is held in memory.
"""

import re
from collections.abc import AsyncIterator, Mapping

from engine.server.refused import Refused

_BOUNDARY = re.compile(r"[A-Za-z0-9'()+_,./:=?-]{1,70}")
_HEAD_BYTES = 4096  # of the part's own headers
_NAME = re.compile(rb'filename="((?:[^"\\\r\n]|\\.)*)"')
_NAME_CHARS = 200


def boundary_of(headers: Mapping[str, str]) -> bytes:
    """Reads the boundary in the type of a body. Raises `Refused` for another type."""
    kind, *parameters = headers.get("content-type", "").split(";")
    if kind.strip().lower() != "multipart/form-data":
        raise Refused(
            415, "not_multipart",
            "A file is uploaded as multipart/form-data with one file in it, as curl -F file=@NAME "
            "sends it.",
        )  # fmt: skip
    for parameter in parameters:
        name, _, value = parameter.strip().partition("=")
        value = value.strip('"')
        if name.lower() == "boundary" and _BOUNDARY.fullmatch(value):
            return value.encode("ascii")
    raise _broken("names no boundary")


class FilePart:
    """The file in a body, as its pieces come."""

    def __init__(self, pieces: AsyncIterator[bytes], boundary: bytes) -> None:
        self._pieces, self._held = pieces, bytearray()
        self._mark = b"\r\n--" + boundary
        self.name = ""  # as the client calls the file; known once `begin` was called

    async def begin(self) -> None:
        """Reads up to the first byte of the file. Raises `Refused` for a body that has none."""
        first = self._mark[2:] + b"\r\n"
        await self._fill(len(first))
        if not self._held.startswith(first):
            raise _broken("does not begin with its boundary")
        del self._held[: len(first)]
        while not 0 <= (end := self._held.find(b"\r\n\r\n")) <= _HEAD_BYTES:
            if len(self._held) > _HEAD_BYTES or not await self._more():
                raise _broken("has a part without an end of its headers")
        head = bytes(self._held[:end])
        del self._held[: end + 4]
        found = _NAME.search(head)
        if found is None or b"form-data" not in head.lower():
            raise _broken("has no file in its first part")
        self.name = _readable(found[1])

    async def contents(self) -> AsyncIterator[bytes]:
        """Yields the file. Raises `Refused` for a body that is cut short or holds more."""
        while (end := self._held.find(self._mark)) < 0:
            keep = len(self._mark) - 1  # the mark may have begun
            if len(self._held) > keep:
                piece = bytes(self._held[:-keep])
                del self._held[:-keep]
                yield piece
            if not await self._more():
                raise _broken("ends in the midst of the file")
        if end:
            yield bytes(self._held[:end])
        del self._held[: end + len(self._mark)]
        await self._fill(2)
        if not self._held.startswith(b"--"):
            raise _broken("has more than one part; send one file at a time")
        while await self._more():  # what follows the end says nothing
            self._held.clear()

    async def _fill(self, size: int) -> None:
        while len(self._held) < size and await self._more():
            pass

    async def _more(self) -> bool:
        piece = await anext(self._pieces, None)
        if piece is None:
            return False
        self._held += piece
        return True


def _readable(name: bytes) -> str:
    """Returns the name of a file without its folders and without what no name has."""
    text = name.decode("utf-8", "replace").replace('\\"', '"').replace("%22", '"')
    text = re.split(r"[/\\]", text)[-1]
    return "".join(one if one.isprintable() else "?" for one in text)[:_NAME_CHARS] or "file"


def _broken(how: str) -> Refused:
    return Refused(400, "bad_upload", f"The upload {how}. Send it again.")
