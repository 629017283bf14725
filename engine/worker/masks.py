"""Masks of a job of the worker: made where none come, shown before a clip is made, and returned."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image
from torch import Tensor

from engine.errors import BadRequest
from engine.flow import Request, Source
from engine.jobs.cast import MASKS
from engine.jobs.job import Job
from engine.masks.making import FILES, FOLDER, Segment, read_masks
from engine.masks.preview import stills
from engine.masks.reader import DRIVING
from engine.masks.saved import save_masks
from engine.source import MADE, wanted_masks, with_masks
from engine.worker.delivery import clip_limit
from engine.worker.progress import JobProgress

_SHARE = 4  # of what a reply carries, the masks have at most this part
_QUALITIES = (88, 70, 50, 30)  # in the last one noise of the largest size fits any reply


@dataclass(frozen=True, slots=True)
class Returned:
    """Masks as they stand in a reply."""

    reply: dict[str, object] = field(default_factory=dict, repr=False)  # base64
    nbytes: int = 0
    warnings: tuple[str, ...] = ()


def with_wanted(
    job: Job, request: Request, segment: Segment | None, folder: Path, progress: JobProgress
) -> tuple[Request, tuple[str, ...]]:
    """Makes masks for a job that wants some and has none, if this worker can.

    The action `masks` shows nothing without any: raises `BadRequest` then. Raises what `segment`
    raises, and what ends the job.
    """
    if request.mask is not None or request.kind != "video" or not job.wants_masks:
        return request, ()
    if segment is not None:
        made, warned = with_masks(request, segment, folder, job.persons, progress.check)
        return made, tuple(one.said for one in warned)
    if job.action == "masks":
        raise BadRequest(
            f"There are no masks to show, and this worker makes none: send {MASKS}, or put SAM 2.1 "
            f"as {FILES} into the folder {FOLDER} of its models."
        )
    return request, ()


def returned(
    job: Job, request: Request, folder: Path, name: str, progress: JobProgress
) -> Returned:
    """Packs the masks of a job that wants them back: `masks` is an .npz for `mask_base64`."""
    if not job.returns_masks:
        return Returned()
    if request.mask is None:
        return Returned(warnings=("return_masks: there are no masks of this job to return.",))
    kept = request.mask
    if kept != folder / MADE:  # they came in another form
        wanted, kept = wanted_masks(request), folder / "returned.npz"
        save_masks(kept, read_masks(wanted, request.mask, progress.check), DRIVING[wanted.mode])
    data = kept.read_bytes()
    if len(data) > clip_limit(name) // _SHARE:
        said = (
            f"The masks have {len(data) / 1e6:.1f} MB, too many for a reply beside a clip: "
            "they are not returned. Ask for a smaller or shorter clip."
        )
        return Returned(warnings=(said,))
    return Returned({"masks": base64.b64encode(data).decode()}, len(data))


def shown_masks(source: Source, name: str, beside_bytes: int = 0) -> dict[str, object]:
    """Tells of the media of a job who becomes whom: three stills as base64 of JPEG, and warnings
    with their frames.

    Stills of noise have less quality, as the reply to the job `name` can carry them beside other
    files. Raises `BadRequest` for a model without masks.
    """
    if source.roles is None:
        raise BadRequest("This model takes no masks: there are none to show.")
    height, width = source.image.shape[1:]
    return {
        "stills": _packed(stills(source), clip_limit(name) - beside_bytes),
        "width": width,
        "height": height,
        "num_frames": len(source.skeleton),
        "fps": source.fps,
        "mode": source.roles.mode,
        "framing": framing_of(source),
        "warned": [asdict(one) for one in source.warned],
    }


def framing_of(source: Source) -> list[dict[str, object]]:
    """Where each person of the picture stands in the clip: scale, foot line, what is cropped."""
    return [
        {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(one).items()
        }
        for one in source.standing
    ]


def _packed(pictures: Sequence[Tensor], most_bytes: int) -> list[str]:
    """Packs pictures [h, w, 3] u8 as base64 of JPEG, in the first quality in which all fit."""
    packed: list[bytes] = []
    for quality in _QUALITIES:
        packed = [_jpeg(Image.fromarray(picture.numpy()), quality) for picture in pictures]
        if sum(map(len, packed)) <= most_bytes:
            break
    return [base64.b64encode(data).decode() for data in packed]


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
