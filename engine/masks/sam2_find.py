"""Where SAM 2 lies below a models folder, and how long it takes where there is no GPU.

Source: docs/reference/masks.md 7.1.
"""

import logging
from pathlib import Path

import torch

from engine.errors import BadRequest, MissingModel
from engine.masks.sam2_load import CONFIG
from engine.masks.sam2_others import refusal_of_name
from engine.masks.sam2_sizes import PERSON_CPU_S, SIZES, Sam2Kind
from engine.models.locate import KnownModel, search

_BEST_FIRST = ("large", "base_plus", "small", "tiny")
_FOLDERS = ("sam2", "sams", "")


def _names() -> tuple[str, ...]:
    """Every name that people have it under; 2.1 before 2, a larger one before a smaller."""
    names = []
    for version in ("2.1", "2"):
        for size in _BEST_FIRST:
            stem = f"sam{version}_hiera_{size}"
            names += [f"{stem}.safetensors", f"{stem}-fp16.safetensors", f"{stem}.pt"]
            names.append(f"sam{version}-hiera-{size.replace('_', '-')}/{CONFIG}")
    return tuple(names)


SEGMENTER = KnownModel("SAM 2, which makes masks", _FOLDERS, _names())
ASKED_FOR = "sam2.1_hiera_large.safetensors or the folder sam2.1-hiera-large (light: small)"

log = logging.getLogger(__name__)


def find_segmenter(models: Path, wanted: Path | None = None) -> Path:
    """The file or folder of SAM 2: the `wanted` one, else the best below the models folder.

    Raises `MissingModel` with what to put where; a file of another segmenter is named with the
    reason why it is not taken.
    """
    if wanted is not None:
        if wanted.exists():
            return wanted
        raise MissingModel(f"There is no {wanted}; name a folder or a file of SAM 2.")
    found = search(models, SEGMENTER)
    if found is not None:
        found = found.parent if found.name == CONFIG else found
        log.info("masks by %s", found)
        return found
    places = ", ".join(str(models / folder) for folder in _FOLDERS if folder)
    said = f"No SAM 2 makes masks here: put {ASKED_FOR} into {places}, or give a file of masks."
    raise MissingModel(" ".join([said, *_others(models)]))


def require_time(
    kind: Sam2Kind | None,
    frames: int,
    persons: int,
    device: torch.device,
    slow: bool,
    threads: int | None = None,
) -> None:
    """Says how long masks take on a CPU, and goes on only if that was asked for.

    Raises `BadRequest` on a CPU without `slow`. On a GPU there is nothing to say.
    """
    if device.type != "cpu":
        return
    time = told_time(cpu_seconds(kind, frames, persons, threads))
    what = f"Masks of {frames} frames by {kind or 'SAM 2'} take about {time} on this CPU"
    if not slow:
        raise BadRequest(
            f"{what}. Make them where there is a GPU and give their file, or begin with "
            "`python -m engine masks ... --slow`; SAM 2.1 small takes about "
            f"{told_time(cpu_seconds(_SMALL, frames, persons, threads))}."
        )
    log.warning("%s.", what)


def cpu_seconds(
    kind: Sam2Kind | None, frames: int, persons: int, threads: int | None = None
) -> float:
    """Roughly how long masks take: measured on one thread, and shared by the threads there are."""
    encoder = (SIZES[0] if kind is None else kind.size).cpu_s
    return frames * (encoder + persons * PERSON_CPU_S) / (threads or torch.get_num_threads())


def told_time(seconds: float) -> str:
    """A time as a person says it, never shorter than it is."""
    minutes = max(1, -(-int(seconds) // 60))
    if minutes < 120:
        return f"{minutes} minute{'' if minutes == 1 else 's'}"
    return f"{-(-minutes // 60)} hours"


_SMALL = Sam2Kind(next(size for size in SIZES if size.name == "small"), True)


def _others(models: Path) -> list[str]:
    """Sentences for files of other segmenters that lie where SAM 2 is looked for."""
    found = []
    for folder in _FOLDERS:
        place = models / folder
        if place.is_dir():
            names = sorted(entry.name for entry in place.iterdir())
            found += [said for name in names if (said := refusal_of_name(name)) is not None]
    return list(dict.fromkeys(found))[:3]
