"""Segmenters that are not run here, told by what is in their files, and why each is refused.

Source: docs/reference/masks.md 7.1.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_MASKS = "Masks that were made with it are taken as a file of masks."
_WANTED = "SAM 2.1 large or small (sam2.1_hiera_large.safetensors) is expected."


@dataclass(frozen=True, slots=True)
class Other:
    """A model that is known and not run."""

    name: str
    model_types: tuple[str, ...]  # beginnings, in a config.json
    tensors: re.Pattern[str]  # begins a name of a tensor that no other has
    files: re.Pattern[str]  # matches names of files, in small letters
    why: str


OTHERS = (
    Other(
        "SAM 3", ("sam3",),
        re.compile(r"(detector|tracker|sam3_model|detector_model|tracker_model|sam2_predictor)\."),
        re.compile(r"sam[-_]?3"), f"It is not run here. {_MASKS}",
    ),
    Other(
        "EdgeTAM", ("edgetam",), re.compile(r"image_encoder\.trunk\.body\.|spatial_perceiver\."),
        re.compile(r"edgetam"), f"Its encoder needs a package that is not installed. {_MASKS}",
    ),
    Other(
        "SAM of 2023", ("sam",),
        re.compile(r"image_encoder\.(patch_embed|blocks|pos_embed)"),
        re.compile(r"sam_vit|mobile_sam"), "It follows nobody through a video.",
    ),
    Other(
        "BiRefNet or RMBG 2", ("birefnet", "segformerforsemanticsegmentation"),
        re.compile(r"bb\.|squeeze_module\."), re.compile(r"birefnet|rmbg-?2"),
        f"It tells no persons apart, and its folder wants to run code of its own. {_MASKS}",
    ),
    Other(
        "RMBG 1.4", (), re.compile(r"(conv_in|stage1)\."), re.compile(r"rmbg"),
        f"Its licence forbids commercial use, and it tells no persons apart. {_MASKS}",
    ),
    Other(
        "RobustVideoMatting", (), re.compile(r"(project_mat|project_seg|refiner)\."),
        re.compile(r"rvm_"), f"Its licence is GPL-3.0, and it tells no persons apart. {_MASKS}",
    ),
)  # fmt: skip


def refusal_of_tensors(names: Iterable[str], file: str) -> str | None:
    """The sentence for a file whose tensors are those of another model; None: of none known."""
    held = list(names)
    for other in OTHERS:
        if any(other.tensors.match(name) for name in held):
            return _sentence(file, other)
    return None


def refusal_of_type(model_type: str, file: str) -> str | None:
    """The sentence for the model type of a config.json; None: of none known."""
    for other in OTHERS:
        if any(_is_type(model_type, begin) for begin in other.model_types):
            return _sentence(file, other)
    return None


def refusal_of_name(file: str) -> str | None:
    """The sentence for a file that is called as another model is; None: as none known."""
    for other in OTHERS:
        if other.files.search(file.lower()):
            return _sentence(file, other)
    return None


def _is_type(model_type: str, begin: str) -> bool:
    return model_type == begin or (begin != "sam" and model_type.startswith(begin))


def _sentence(file: str, other: Other) -> str:
    return f"{file} is {other.name}. {other.why} {_WANTED}"
