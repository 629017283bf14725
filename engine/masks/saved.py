"""Made masks as files that can be kept, edited and given again.

.npz  labels and all that is known of them: what is cached, and what a program edits
.mkv  colours as lossless video (FFV1, gbrp); .zip: colours as PNG, a picture a frame

All of them are read again by `engine.masks.reader`, to the pixel. Of what an .npz has beside labels
the engine asks for the picture's hash alone; the rest is for whoever edits it. Source:
docs/reference/masks.md 6.2.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.errors import BadMedia, OutputError
from engine.masks.archive import member_names, open_members
from engine.masks.colours import PERSON_COLOURS, paint
from engine.masks.made import MadeMasks
from engine.media.ffmpeg import FfmpegFailed, ffmpeg, file_url, write_from
from engine.media.video import exact_rate
from kernels.whole_file import whole_file

_MOST_BYTES = 2**16  # of an array with a hash

Save: TypeAlias = Callable[[Path, MadeMasks, int], None]


def save_masks(path: Path, made: MadeMasks, ground: int) -> None:
    """Writes the masks of the clip in the form that the name's suffix says, whole or not at all.

    `ground` is the colour of the background, where the form has colours. Raises `OutputError`.
    """
    try:
        with whole_file(path) as draft:
            FORMS[path.suffix.lower()](draft, made, ground)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
    except FfmpegFailed as error:
        raise OutputError(f"{path.name} could not be written: {error.reason}.") from error


def save_reference(path: Path, labels: Tensor, ground: int) -> None:
    """Writes the mask of the picture [h, w] u8 as a PNG in colours. Raises `OutputError`."""
    try:
        with whole_file(path) as draft:
            Image.fromarray(coloured(labels, ground).numpy()).save(draft, "PNG")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def coloured(labels: Tensor, ground: int) -> Tensor:
    """Paints labels [.., H, W] u8 on a background: [.., H, W, 3] u8."""
    return paint(torch.tensor([ground, *PERSON_COLOURS], dtype=torch.uint8)[labels.int()])


def _npz(path: Path, made: MadeMasks, _: int) -> None:
    arrays = {
        "masks": made.labels.numpy(),
        "boxes": made.boxes.numpy(),
        "scores": made.scores.numpy(),
        "fps": np.array(made.fps),
        "source_sha256": np.array(made.source_sha256),
        "image_sha256": np.array(made.image_sha256),
        "order": np.array(made.order, np.uint8),
        "model": np.array(made.model),
        "version": np.array(made.version),
        "warned": np.array(json.dumps([[one.kind, one.said, one.frame] for one in made.warned])),
    }
    if made.reference is not None:
        arrays["reference"] = made.reference[None].numpy()
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _mkv(path: Path, made: MadeMasks, ground: int) -> None:
    _, height, width = made.labels.shape
    rate: Fraction = exact_rate(made.fps)
    arguments = [
        "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", f"{width}x{height}",
        "-framerate", str(rate), "-i", "pipe:0", "-c:v", "ffv1", "-level", "3",
        "-pix_fmt", "gbrp", "-fflags", "+bitexact", "-f", "matroska", "-y", file_url(path),
    ]  # fmt: skip
    with ffmpeg(arguments, feed=True) as run:
        for frame in made.labels:
            write_from(run, coloured(frame, ground).numpy().reshape(-1).data)
        run.finish()


def _zip(path: Path, made: MadeMasks, ground: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, frame in enumerate(made.labels):
            picture = BytesIO()
            Image.fromarray(coloured(frame, ground).numpy()).save(picture, "PNG")
            archive.writestr(zipfile.ZipInfo(f"mask_{number:05}.png"), picture.getvalue())


FORMS: Mapping[str, Save] = {".npz": _npz, ".mkv": _mkv, ".zip": _zip}


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_of(path: Path) -> str:
    """The hash of the picture whose mask lies in an .npz of `save_masks`; "" if it tells none.

    Raises `BadMedia`.
    """
    if "image_sha256.npy" not in member_names(path):
        return ""
    with open_members(path, _MOST_BYTES) as unpack:
        return _text(_array(path, unpack, "image_sha256"), path, "image_sha256")


def _array(path: Path, unpack: Callable[[str], bytes], name: str) -> np.ndarray:
    held = unpack(f"{name}.npy")
    try:
        return np.lib.format.read_array(BytesIO(held), allow_pickle=False)
    except Exception as error:  # whatever numpy raises for it, it is the file's fault
        raise BadMedia(f"{path.name} is damaged: {name} cannot be read.") from error


def _text(held: np.ndarray, path: Path, name: str) -> str:
    if held.shape or held.dtype.kind != "U":
        raise BadMedia(f"{path.name} is damaged: {name} is {held.dtype}; text is expected.")
    return str(held)
