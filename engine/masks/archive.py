"""ZIP archives of masks, from anybody: what a member claims to be is looked at before it unpacks.

An archive is never unpacked to a folder by its own names. Labels lie in an .npz file:

masks           [T, H, W] u8: 0 background, 1 to 6 the person; or bool: person 1
                [T, P, H, W] bool: where each of P <= 6 persons is; the first of two wins
reference       [1, h, w] u8: the same of the picture, in files that the engine made

They are read frame by frame, for a whole clip of them may be larger than memory. Whatever zipfile
and numpy raise for a file is the file's fault. Source: docs/reference/masks.md 4.1.
"""

import math
import mmap
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import LIMITS, Limits
from engine.errors import BadMedia
from engine.flow import Check, go_on
from engine.masks.colours import PERSONS

_MAX_MEMBERS = 20_000  # 2000 frames of a result of 12 fps, of a video of 120
_MAX_UNPACKED = 4 * 2**30  # bytes of one member, which are read frame by frame
_MEMBER = b"PK\x01\x02"  # begins the entry of a member in the table of an archive
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others take memory at will
_LOCKED = 1  # the flag of a member that needs a password
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Labels:
    """Where the labels of a clip lie in an .npz file."""

    path: Path
    member: str
    begins: int  # bytes before the first frame
    shape: tuple[int, ...]  # [T, H, W] or [T, P, H, W]
    is_bool: bool

    @property
    def frame_bytes(self) -> int:
        return math.prod(self.shape[1:])


def member_names(path: Path) -> list[str]:
    """Names what is in an archive, without folders and what programs hide in them.

    Raises `BadMedia` if it is damaged, locked, holds far too much or means to leave its folder.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = -1
            for _ in range(_MAX_MEMBERS + 1):
                if (place := data.find(_MEMBER, place + 1)) < 0:
                    break
            else:
                raise BadMedia(f"{path.name} holds more than {_MAX_MEMBERS} files.")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except BadMedia:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in member.filename:
            raise BadMedia(
                f"{path.name} holds a file that is to be written outside of it, "
                f"{member.filename[:_SHOWN_CHARS]!r}; pack it again, without folders."
            )
        if member.flag_bits & _LOCKED or member.compress_type not in _PACKED:
            raise BadMedia(
                f"{path.name}: {member.filename[:_SHOWN_CHARS]!r} is locked or packed otherwise "
                "than ZIP files usually are; pack it again."
            )
    names = [member.filename for member in members if not _is_hidden(member)]
    if len(set(names)) < len(names):
        raise BadMedia(f"{path.name} holds two files of the same name; pack it again.")
    return names


@contextmanager
def open_members(path: Path, most: int) -> Iterator[Callable[[str], bytes]]:
    """Opens an archive; what it yields unpacks a member of at most `most` bytes by its name.

    Raises `BadMedia`.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise _damaged(path, error) from error

    def unpack(name: str) -> bytes:
        try:
            if (size := archive.getinfo(name).file_size) <= most:
                return archive.read(name)
        except Exception as error:
            raise _damaged(path, error) from error
        raise BadMedia(
            f"{path.name}: {name[-_SHOWN_CHARS:]!r} unpacks to {size} bytes; at most {most} are "
            "taken."
        )

    with archive:
        yield unpack


def find_labels(
    path: Path, names: Sequence[str], limits: Limits = LIMITS, array: str = "masks"
) -> Labels | None:
    """Looks at the labels in an array of an archive; None if it holds none. Raises `BadMedia`."""
    name = next((name for name in (f"{array}.npy", array) if name in names), None)
    if name is None:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(name).file_size
            with archive.open(name) as file:
                shape, is_fortran, dtype = _head(file)
                begins = file.tell()
    except Exception as error:
        raise _damaged(path, error) from error
    found = f"{path.name}: {array} is {dtype} {list(shape)[:6]}"
    is_bool = dtype == np.dtype(bool)
    if not (is_bool and len(shape) in (3, 4)) and not (dtype == np.uint8 and len(shape) == 3):
        raise BadMedia(
            f"{found}; uint8 [T, H, W] of labels 0 to {len(PERSONS)} or bool [T, P, H, W] is "
            "expected."
        )
    if is_fortran:
        raise BadMedia(f"{found} in Fortran order; write numpy.ascontiguousarray of it.")
    if len(shape) == 4 and shape[1] > len(PERSONS):
        raise BadMedia(f"{found}, {shape[1]} persons; at most {len(PERSONS)} are told apart.")
    if min(shape) < 1 or max(shape[-2:]) > limits.max_video_side:
        raise BadMedia(f"{found}; 1 to {limits.max_video_side} pixels a side are expected.")
    if begins + math.prod(shape) != size:
        raise BadMedia(f"{path.name} is damaged: {array} has not as many numbers as it says.")
    if size > _MAX_UNPACKED:
        raise BadMedia(
            f"{found}, {size / 2**30:.1f} GiB; at most {_MAX_UNPACKED / 2**30:.0f} are taken. "
            "Halve its sides, or give a video."
        )
    return Labels(path, name, begins, shape, is_bool)


def read_labels(labels: Labels, wanted: Sequence[int], check: Check = go_on) -> Iterator[Tensor]:
    """Reads labels [H, W] u8, one for each of the ascending numbers. Raises `BadMedia`."""
    try:
        archive = zipfile.ZipFile(labels.path)
    except Exception as error:
        raise _damaged(labels.path, error) from error
    with archive, archive.open(labels.member) as file:
        _exactly(labels, file, labels.begins)
        place, frame = -1, b""
        for number in wanted:
            while place < number:
                check()
                frame, place = _exactly(labels, file, labels.frame_bytes), place + 1
            yield torch.from_numpy(_numbers(labels, frame, number))


def _numbers(labels: Labels, frame: bytes, number: int) -> NDArray[np.uint8]:
    held = np.frombuffer(frame, np.uint8).reshape(labels.shape[1:])
    if not labels.is_bool:
        if (most := int(held.max())) > len(PERSONS):
            raise BadMedia(
                f"{labels.path.name}: frame {number} has the label {most}; "
                f"0, for the background, to {len(PERSONS)} are expected."
            )
        return held.copy()
    persons = held.reshape(-1, *held.shape[-2:]) != 0  # [P, H, W]
    told = np.where(persons.any(0), persons.argmax(0) + 1, 0)
    return told.astype(np.uint8)


def _exactly(labels: Labels, file: IO[bytes], size: int) -> bytes:
    try:
        held = file.read(size)
    except Exception as error:
        raise _damaged(labels.path, error) from error
    if len(held) < size:
        raise BadMedia(f"{labels.path.name} is damaged: masks ends too soon.")
    return held


def _head(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Reads shape, order and type of an array from what stands before its numbers."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(file)


def _is_hidden(member: zipfile.ZipInfo) -> bool:
    parts = PurePosixPath(member.filename).parts
    return member.is_dir() or "__MACOSX" in parts or (bool(parts) and parts[-1].startswith("."))


def _damaged(path: Path, error: Exception) -> BadMedia:
    said = " ".join(str(error).split())[:_SHOWN_CHARS]
    return BadMedia(f"{path.name} is a damaged ZIP or .npz file ({said}); write it again.")
