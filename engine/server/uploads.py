"""Keeps the files that browsers upload, until a job has named them or their time is over.

They are written to disk as they come, under ids of ours. The name that a stranger gave to a file is
told back and names nothing here.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.config import LIMITS
from engine.errors import OutputError
from engine.server.disk import check_room, full
from engine.server.house import House
from engine.server.ids import is_id, make_id
from engine.server.refused import Refused, unknown

UPLOAD_BYTES = LIMITS.max_video_bytes
BODY_BYTES = UPLOAD_BYTES + 2**16  # and what multipart writes around it
_PART = ".part"


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that was uploaded, as its sender is told."""

    id: str
    medium: str  # stands in a field `*_path` of a job
    name: str
    bytes: int
    expires_at: float  # seconds since 1970


class Uploads:
    """Owns the folder of uploads."""

    def __init__(self, house: House, now: Callable[[], float] = time.time) -> None:
        """Removes what was being written when the service ended."""
        self._house, self._now = house, now
        self._folder = house.folder / "uploads"
        self._used = dict[str, int]()  # by jobs that wait or run
        for part in self._folder.glob(f"*{_PART}"):
            part.unlink(missing_ok=True)

    async def keep(self, name: str, contents: AsyncIterator[bytes]) -> Upload:
        """Writes a file. Raises `Refused` if it is too large or no room is left; nothing is left
        of it then.
        """
        self.expire()
        check_room(self._house)
        room = self._house.upload_bytes - sum(self._sizes().values())
        made = make_id()
        part = self._folder / f"{made}{_PART}"
        size = 0
        try:
            with part.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                async for piece in contents:
                    size += len(piece)
                    if size > UPLOAD_BYTES:
                        raise Refused(
                            413, "too_large",
                            f"A file may have {UPLOAD_BYTES // 2**20} MiB; this one has more.",
                        )  # fmt: skip
                    if size > room:
                        raise OutputError(
                            "The uploads here have all the room that they may take; wait until "
                            "some are forgotten, or send an address."
                        )
                    await asyncio.to_thread(file.write, piece)
            part.rename(self._folder / made)
        except OSError as error:
            raise full("The file", error) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return Upload(made, f"upload:{made}", name, size, self._now() + self._house.keep_upload_s)

    def path(self, upload: str) -> Path:
        """Returns the file of an upload, whose time begins anew. Raises `Refused` if none."""
        path = self._folder / upload
        if not is_id(upload) or not path.is_file():
            raise unknown("upload of this id")
        with suppress(OSError):
            os.utime(path)
        return path

    def drop(self, upload: str) -> None:
        """Removes an upload. Raises `Refused` for one that is not there, or that a job needs."""
        path = self.path(upload)
        if upload in self._used:
            raise Refused(
                409, "in_use",
                "A job that has not ended needs this upload; call it off first, or wait for it.",
            )  # fmt: skip
        path.unlink(missing_ok=True)

    def hold(self, uploads: tuple[str, ...]) -> None:
        """Keeps uploads for a job that waits, however long."""
        for one in uploads:
            self._used[one] = self._used.get(one, 0) + 1

    def release(self, uploads: tuple[str, ...]) -> None:
        for one in uploads:
            self._used[one] -= 1
            if not self._used[one]:
                del self._used[one]

    def expire(self) -> None:
        """Removes those whose time is over."""
        for path in self._there():
            with suppress(OSError):
                age_s = self._now() - path.stat().st_mtime
                if age_s > self._house.keep_upload_s and path.name not in self._used:
                    path.unlink(missing_ok=True)

    def _sizes(self) -> dict[str, int]:
        found = dict[str, int]()
        for path in self._there():
            with suppress(OSError):
                found[path.name] = path.stat().st_size
        return found

    def _there(self) -> list[Path]:
        with suppress(OSError):  # writing will say what is wrong with the folder
            return list(self._folder.iterdir())
        return []
