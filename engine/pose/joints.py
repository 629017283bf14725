"""SMPL joints of a clip in an .npz file: motion capture that was kept, or made elsewhere.

joints          [T, 24, 3] or [T, P, 24, 3] numbers: millimetres in camera space, x right,
                y down, z forward, SMPL order; a joint at (0, 0, 0) is missing;
                P is at most `LIMITS.max_persons`
fps             frames a second (16 if absent)
height, width   of the picture that the joints were found in; both or neither

A file may be anybody's. What an array claims to be is looked at before its numbers are unpacked,
and whatever zipfile and numpy raise for a file is the file's fault: lists of what they raise were
never complete.
"""

import logging
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.config import LIMITS
from engine.errors import BadMedia, OutputError
from engine.pose.arrays import Floats
from engine.pose.bones import FARTHEST, SMPL_JOINTS
from kernels.whole_file import whole_file

DEFAULT_FPS = 16.0  # of the official skeleton videos

_MAX_BYTES = 64 * 2**20  # of one array, unpacked and as float64; the longest clip has a sixth of it
_MAX_MEMBERS = 64  # of the archive; four are read, other programs keep some more
_MEMBER = b"PK\x01\x02"  # begins the entry of a member in the table of an archive
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # as numpy writes; others take memory at will
_LOCKED = 1  # the flag of a member that needs a password
_NEAREST_MEDIAN = 50.0  # mm; a person's joints this near the camera are in metres

_NAMES = ("joints", "fps", "height", "width")
_KINDS = "fiu"  # numpy's letters for numbers

_SHOWN_CHARS = 80

Array: TypeAlias = NDArray[np.generic]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JointClip:
    joints: Floats  # [T, P, 24, 3] mm, camera space; missing joints are 0
    fps: float
    size: tuple[int, int] | None  # height and width of the picture they were found in


def load_joints(path: Path) -> JointClip:
    """Reads the joints of a clip. Raises `BadMedia` if no skeleton can be drawn from the file.

    A joint that is not finite, or farther than a kilometre, is missing; the log says how many are.
    """
    arrays = _read(path)
    joints = _checked_joints(path, arrays)
    fps = _number(path, arrays, "fps") if "fps" in arrays else DEFAULT_FPS
    if not 1 <= fps <= LIMITS.max_fps:
        raise BadMedia(f"{path.name}: fps is {fps:g}; it must be 1 to {LIMITS.max_fps:g}.")
    return JointClip(joints, fps, _size(path, arrays))


def save_joints(path: Path, clip: JointClip) -> None:
    """Writes the file whole or not at all. Raises `OutputError`."""
    arrays = {"joints": clip.joints.astype(np.float32), "fps": np.array(clip.fps)}
    if clip.size is not None:
        arrays["height"], arrays["width"] = np.array(clip.size[0]), np.array(clip.size[1])
    try:
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def _read(path: Path) -> dict[str, Array]:
    """Reads the arrays that this format knows, and nothing else that the file holds."""
    if not path.is_file():
        raise BadMedia(f"There is no file {path}; expected an .npz with SMPL joints.")
    try:
        if path.stat().st_size > LIMITS.max_image_bytes:
            raise BadMedia(
                f"{path.name} has {path.stat().st_size} bytes, more than {LIMITS.max_image_bytes}. "
                "Cut the clip."
            )
        if path.read_bytes().count(_MEMBER) > _MAX_MEMBERS:
            raise BadMedia(f"{path.name} holds more than {_MAX_MEMBERS} arrays; 4 are expected.")
        if not zipfile.is_zipfile(path):
            raise BadMedia(
                f"{path.name} is not an .npz file, or cut short ({path.stat().st_size} bytes). "
                "Write it with numpy.savez."
            )
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            return {
                name: _array(path, archive, member, name)
                for name in _NAMES
                if (member := members.get(f"{name}.npy") or members.get(name)) is not None
            }
    except BadMedia:
        raise
    except Exception as error:
        raise BadMedia(
            f"{path.name} is damaged or holds more than numbers: {_glance(error)}"
        ) from error


def _array(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Array:
    """Reads one array, after a look at its size and its head."""
    if member.flag_bits & _LOCKED or member.compress_type not in _PACKED:
        raise BadMedia(f"{path.name}: {name} is locked or packed otherwise than numpy does it.")
    if member.file_size > _MAX_BYTES:
        raise BadMedia(
            f"{path.name}: {name} unpacks to {member.file_size} bytes, more than {_MAX_BYTES}. "
            "Cut the clip."
        )
    with archive.open(member) as file:
        shape, dtype = _head(file)
    _check_claim(path, name, shape, dtype)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise BadMedia(f"{path.name} is damaged: {name} has fewer numbers than it says.")
    with archive.open(member) as file:
        held = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # the end of the member, where its checksum is compared
    return np.asarray(held)


def _head(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Reads shape and type of an array from what stands before its numbers."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    return shape, dtype


def _check_claim(
    path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> None:
    """Refuses an array by what its head says, before there is memory for its numbers."""
    if name != "joints":
        if dtype.kind not in _KINDS or math.prod(shape) != 1:
            raise BadMedia(
                f"{path.name}: {name} is not one finite number but {_glance(dtype)} "
                f"{_glance(list(shape))}."
            )
        return
    if dtype.kind not in _KINDS:
        raise BadMedia(
            f"{path.name}: joints are {_glance(dtype)}; expected numbers in millimetres."
        )
    if len(shape) not in (3, 4) or shape[-2:] != (SMPL_JOINTS, 3) or min(shape) < 1:
        raise BadMedia(
            f"{path.name}: joints are {_glance(list(shape))}; expected [T, 24, 3] or "
            "[T, P, 24, 3] with at least one frame and one person."
        )
    if len(shape) == 4 and shape[1] > LIMITS.max_persons:
        raise BadMedia(
            f"{path.name} has {shape[1]} persons; at most {LIMITS.max_persons} are drawn. "
            "Keep the main ones."
        )
    if math.prod(shape) * np.dtype(np.float64).itemsize > _MAX_BYTES:
        raise BadMedia(f"{path.name} has {shape[0]} frames, which is too many. Cut the clip.")


def _glance(thing: object) -> str:
    """Writes what a file or a foreign parser says: short, and on one line."""
    said = " ".join(str(thing).split())[:_SHOWN_CHARS]
    return "".join(character if character.isprintable() else "?" for character in said)


def _checked_joints(path: Path, arrays: dict[str, Array]) -> Floats:
    if "joints" not in arrays:
        raise BadMedia(f"{path.name} holds no array `joints`, [T, 24, 3] or [T, P, 24, 3].")
    held = arrays["joints"]
    exact = held.astype(np.float64).reshape(len(held), -1, SMPL_JOINTS, 3)
    known = np.all(np.abs(exact) < FARTHEST, axis=-1)  # False for NaN
    joints = np.where(known[..., None], exact, 0).astype(np.float32)
    if not known.all():
        log.warning(
            "%s: %d of %d joints are not finite or beyond a kilometre: taken as missing",
            path.name, known.size - known.sum(), known.size,
        )  # fmt: skip
    present = joints.any(axis=-1)
    if not present.any():
        raise BadMedia(
            f"{path.name}: every joint is missing (0, not finite or beyond a kilometre)."
        )
    depth = float(np.median(np.abs(joints[present][:, 2])))
    if depth < _NEAREST_MEDIAN:
        raise BadMedia(
            f"{path.name}: the median depth of the joints is {depth:.3g}; expected millimetres "
            "from the camera, some thousands. Multiply metres by 1000."
        )
    return joints


def _size(path: Path, arrays: dict[str, Array]) -> tuple[int, int] | None:
    if "height" not in arrays and "width" not in arrays:
        return None
    for name in ("height", "width"):
        if name not in arrays:
            raise BadMedia(f"{path.name} holds only one of height and width; give both or neither.")
    height, width = _number(path, arrays, "height"), _number(path, arrays, "width")
    if not (height.is_integer() and width.is_integer() and min(height, width) >= 1):
        raise BadMedia(f"{path.name}: a picture of {height:g} x {width:g} is none.")
    return int(height), int(width)


def _number(path: Path, arrays: dict[str, Array], name: str) -> float:
    value = float(arrays[name].reshape(-1)[0])
    if not math.isfinite(value):
        raise BadMedia(f"{path.name}: {name} is not one finite number but {value}.")
    return value
