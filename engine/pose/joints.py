"""SMPL joints of a clip in an .npz file: motion capture that was kept, or made elsewhere.

joints          [T, 24, 3] or [T, P, 24, 3] numbers: millimetres in camera space, x right,
                y down, z forward, SMPL order; a joint at (0, 0, 0) is missing
fps             frames a second (16 if absent)
height, width   of the picture that the joints were found in; both or neither
"""

import logging
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.config import LIMITS
from engine.errors import BadMedia, OutputError
from engine.pose.arrays import Floats
from engine.pose.bones import FARTHEST, SMPL_JOINTS
from kernels.whole_file import whole_file

DEFAULT_FPS = 16.0  # of the official skeleton videos

_MAX_BYTES = 64 * 2**20  # unpacked; the longest clip the engine takes needs a sixth of it
_NEAREST_MEDIAN = 50.0  # mm; a person's joints this near the camera are in metres

_NAMES = ("joints", "fps", "height", "width")
_UNREADABLE = (  # what numpy and zipfile raise for damaged, foreign, locked or pickled contents
    OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    struct.error,
)  # fmt: skip

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


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    """Reads the arrays that this format knows, and nothing else that the file holds."""
    if not path.is_file():
        raise BadMedia(f"There is no file {path}; expected an .npz with SMPL joints.")
    if not zipfile.is_zipfile(path):
        raise BadMedia(
            f"{path.name} is not an .npz file, or cut short ({path.stat().st_size} bytes). "
            "Write it with numpy.savez."
        )
    try:
        _refuse_huge(path)
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in _NAMES if name in held}
    except _UNREADABLE as error:
        raise BadMedia(f"{path.name} is damaged or holds more than numbers: {error}.") from error


def _refuse_huge(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.removesuffix(".npy") in _NAMES and member.file_size > _MAX_BYTES:
                raise BadMedia(
                    f"{path.name}: {member.filename} unpacks to {member.file_size} bytes, "
                    f"more than {_MAX_BYTES}. Cut the clip."
                )


def _checked_joints(path: Path, arrays: dict[str, NDArray[np.generic]]) -> Floats:
    if "joints" not in arrays:
        raise BadMedia(f"{path.name} holds no array `joints`, [T, 24, 3] or [T, P, 24, 3].")
    held = arrays["joints"]
    if held.dtype.kind not in "fiu":
        raise BadMedia(f"{path.name}: joints are {held.dtype}; expected numbers in millimetres.")
    if held.ndim not in (3, 4) or held.shape[-2:] != (SMPL_JOINTS, 3) or held.size == 0:
        raise BadMedia(
            f"{path.name}: joints are {list(held.shape)}; expected [T, 24, 3] or [T, P, 24, 3] "
            "with at least one frame and one person."
        )
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


def _size(path: Path, arrays: dict[str, NDArray[np.generic]]) -> tuple[int, int] | None:
    if "height" not in arrays and "width" not in arrays:
        return None
    for name in ("height", "width"):
        if name not in arrays:
            raise BadMedia(f"{path.name} holds only one of height and width; give both or neither.")
    height, width = _number(path, arrays, "height"), _number(path, arrays, "width")
    if not (height.is_integer() and width.is_integer() and min(height, width) >= 1):
        raise BadMedia(f"{path.name}: a picture of {height:g} x {width:g} is none.")
    return int(height), int(width)


def _number(path: Path, arrays: dict[str, NDArray[np.generic]], name: str) -> float:
    held = arrays[name]
    if held.dtype.kind in "fiu" and held.size == 1 and np.isfinite(held).all():
        return float(held.reshape(-1)[0])
    raise BadMedia(f"{path.name}: {name} is not one finite number but {held.dtype} {held.shape}.")
