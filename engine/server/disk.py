"""Writes what the service keeps, whole or not at all, and tells of a full disk in a sentence."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import OutputError
from engine.server.house import House


def check_room(house: House) -> None:
    """Raises `OutputError` before work is taken whose result would find no room."""
    try:
        free = shutil.disk_usage(house.folder).free
    except OSError as error:
        raise full("The job", error) from error
    if free < house.free_bytes:
        raise OutputError(
            f"The disk of the service has {free / 1e6:.0f} MB left; {house.free_bytes / 1e6:.0f} "
            "MB are needed. Remove something, or set SCAIL_STATE to a folder with room."
        )


def full(what: str, error: OSError) -> OutputError:
    """Makes the sentence about something that could not be stored."""
    return OutputError(
        f"{what} cannot be stored by the service: {error.strerror or error}. Remove something from "
        "the disk, or set SCAIL_STATE to a folder with room."
    )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a file beside `path`, for this user alone, and puts it in its place.

    Raises `OutputError`; what was there before then stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        write(part)
        part.replace(path)
    except OSError as error:
        raise full(path.name, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
