"""A mask file of any form -> its frames as they are stored; the form is read from the content.

A picture, a video, a folder or ZIP of pictures, or an .npz of labels: docs/reference/masks.md 4.1.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from engine.config import LIMITS, Limits
from engine.errors import BadMedia
from engine.flow import Check, go_on
from engine.masks.archive import Labels, find_labels, member_names, open_members, read_labels
from engine.masks.cleaning import has_palette
from engine.masks.sequence import in_order
from engine.media.files import check_file, content_kind, with_article
from engine.media.picture import load_layers
from engine.media.video import VideoInfo, probe_video, read_video

# Numbers of frames from 0, ascending, and whom to ask -> one frame for each number.
Frames: TypeAlias = Callable[[Sequence[int], Check], Iterator[Tensor]]
Load: TypeAlias = Callable[[str], Tensor]  # the name of one of several pictures -> its pixels

_OPAQUE = 128  # and above
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Stored:
    """The frames of a mask file: colours [h, w, 3] u8, or labels [h, w] u8 of 0 to 6."""

    name: str
    height: int
    width: int
    count: int
    has_labels: bool
    frames: Frames


def open_reference(path: Path, limits: Limits = LIMITS) -> Stored | None:
    """Finds the mask of the picture in a file that the engine made of a video's masks.

    None for a file of another kind, or without one. Raises `BadMedia` for a damaged one.
    """
    if path.is_dir() or content_kind(path) != "ZIP archive":
        return None
    labels = find_labels(path, member_names(path), _of_pictures(limits), "reference")
    if labels is None:
        return None
    if math.prod(labels.shape[-2:]) > limits.max_image_pixels:
        raise BadMedia(f"{path.name} is damaged: no picture has as many pixels as its reference.")
    return dataclasses.replace(_labelled(labels), name=f"The reference of {path.name}")


def open_mask(path: Path, limits: Limits = LIMITS, check: Check = go_on) -> Stored:
    """Finds out what a mask file holds. Raises `BadMedia` if that is no mask."""
    if path.is_dir():
        return _folder(path, _of_frames(limits))
    check_file(path, "mask", limits.max_video_bytes)
    kind = content_kind(path)
    if kind == "ZIP archive":
        return _archive(path, _of_frames(limits))
    if kind is not None and kind.endswith("picture") and not kind.startswith("GIF"):
        picture = load_flat(path, limits)
        height, width = picture.shape[:2]
        return Stored(
            path.name, height, width, 1, False, lambda wanted, _: (picture for _ in wanted)
        )
    try:
        return _video(probe_video(path, limits, check), limits)
    except BadMedia as error:
        if kind is not None and (kind == "video" or kind.startswith("GIF")):
            raise
        found = with_article(kind or "file of another kind")
        raise BadMedia(
            f"{path.name} is {found}; a mask is a picture, a video, a folder or ZIP of pictures, "
            "or an .npz file with an array masks."
        ) from error


def load_flat(path: Path, limits: Limits = LIMITS) -> Tensor:
    """Reads a mask from a picture [h, w, 3] u8; one with transparency is laid on black.

    Where it is transparent nobody is. If what is not has no mask's colours, as a person that was
    cut out of a photograph, the mask is the opacity. Raises `BadMedia`.
    """
    picture, alpha = load_layers(path, limits)
    if alpha is None:
        return picture
    is_opaque = alpha >= _OPAQUE
    if has_palette(picture[is_opaque].numpy()):
        return torch.where(is_opaque[..., None], picture, 0)
    return (is_opaque.to(torch.uint8) * 255)[..., None].expand(-1, -1, 3)


def _of_frames(limits: Limits) -> Limits:
    """The pictures of a sequence may be as large as the frames of a video."""
    return dataclasses.replace(limits, max_image_pixels=limits.max_video_side**2)


def _of_pictures(limits: Limits) -> Limits:
    """A picture may be larger than the frames of a video."""
    return dataclasses.replace(limits, max_video_side=limits.max_image_pixels)


def _labelled(labels: Labels) -> Stored:
    height, width = labels.shape[-2:]
    return Stored(
        labels.path.name, height, width, labels.shape[0], True,
        lambda wanted, check: read_labels(labels, wanted, check),
    )  # fmt: skip


def _archive(path: Path, limits: Limits) -> Stored:
    names = member_names(path)
    labels = find_labels(path, names, limits)
    if labels is not None:
        return _labelled(labels)
    if names and all(name.endswith(".npy") for name in names):
        held = repr(", ".join(sorted(names))[:_SHOWN_CHARS])
        raise BadMedia(f"{path.name} holds no array masks, but {held}; write masks into it.")

    @contextmanager
    def opened() -> Iterator[Load]:
        with (
            open_members(path, limits.max_image_bytes) as unpack,
            tempfile.TemporaryDirectory() as folder,
        ):

            def load(name: str) -> Tensor:
                # not the name that the archive gives it, which may be anything
                place = Path(folder, f"{names.index(name) + 1} of {path.name[:40]}")
                place.write_bytes(unpack(name))
                picture = load_flat(place, limits)
                place.unlink()
                return picture

            yield load

    return _sequence(path, names, opened)


def _folder(path: Path, limits: Limits) -> Stored:
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    return _sequence(path, names, lambda: nullcontext(lambda name: load_flat(path / name, limits)))


def _sequence(
    path: Path, names: Sequence[str], opened: Callable[[], AbstractContextManager[Load]]
) -> Stored:
    if not names:
        raise BadMedia(f"{path.name} holds no pictures; one for each frame is expected.")
    pictures = [name for name in names if name.lower().endswith(_PICTURES)]
    ordered = in_order(pictures or names, path.name)  # and what lies beside them is no matter
    with opened() as load:
        height, width = load(ordered[0]).shape[:2]

    def frames(wanted: Sequence[int], check: Check) -> Iterator[Tensor]:
        at, frame = -1, torch.empty(0)
        with opened() as load:
            for number in wanted:
                check()
                if number != at:
                    at, frame = number, load(ordered[number])
                if frame.shape[:2] != (height, width):
                    raise BadMedia(
                        f"{path.name}: {ordered[number][-_SHOWN_CHARS:]!r} is "
                        f"{frame.shape[1]}x{frame.shape[0]} and the first {width}x{height}; "
                        "pictures of one size are expected."
                    )
                yield frame

    return Stored(path.name, height, width, len(ordered), False, frames)


def _video(info: VideoInfo, limits: Limits) -> Stored:
    # of whatever rate: every frame as it is stored
    whole = dataclasses.replace(info, is_constant=True)

    def frames(wanted: Sequence[int], check: Check) -> Iterator[Tensor]:
        most = wanted[-1] + 1
        wide = dataclasses.replace(limits, max_frames=max(most, limits.max_frames))
        stored = (
            frame
            for chunk in read_video(whole, None, most, check=check, limits=wide)
            for frame in chunk
        )
        place, frame = -1, torch.empty(0)
        for number in wanted:
            while place < number:
                if (found := next(stored, None)) is None:
                    raise BadMedia(
                        f"{info.path.name} is a damaged video: {place + 1} of {info.frames} frames "
                        "of it can be read."
                    )
                frame, place = found, place + 1
            yield frame
        next(stored, None)  # which ends the reading, and tells if anything of it was damaged

    return Stored(info.path.name, info.height, info.width, info.frames, False, frames)
