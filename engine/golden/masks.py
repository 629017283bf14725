"""Masks of SCAIL-2 with the pictures they belong to, against the official preprocessing.

A case is a driving clip and a picture with their masks, from pixels to channels, or frames alone
that are compressed. Sizes and counts are those of the data.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import BadMedia
from engine.golden.check import Check, compare, resized
from engine.masks.colours import driving_channels, mask_channels, reference_channels, show_black
from engine.media.framing import (
    Size,
    crop_frames,
    crop_image,
    image_to_network,
    skeleton_to_network,
    trim_to_whole_latents,
)
from engine.models.tensorfile import TensorFile

TOLERANCE = 1e-6
_LEVEL = 2 / 255  # of a frame, which is rounded to levels behind a resize

_CLIP_GIVEN = ("driving_in_u8", "driving_mask_in_u8", "ref_in_u8", "ref_mask_in_u8", "target_hw")
_CLIP_WANTED = (
    "keep", "driving_half", "driving_mask_half", "driving_masks", "ref_cropped",
    "ref_mask_cropped", "ref_mask_28", "ref_masks", "ref_mask_28_sat_animation",
)  # fmt: skip
_HALVES = ("driving_half", "driving_mask_half")
_FRAMES_GIVEN, _FRAMES_WANTED = ("mask_u8",), ("masks",)
_KINDS = (_CLIP_GIVEN + _CLIP_WANTED, _FRAMES_GIVEN + _FRAMES_WANTED)
_MARKS = ("driving_mask_in_u8", "ref_mask_in_u8", "mask_u8")  # in no other golden file


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return any(name.rpartition(".")[2] in _MARKS for name in names)


def checks(path: Path) -> Iterator[Check]:
    """Compares every tensor of every case; one that is missing or unknown is told."""
    file = TensorFile(path)
    cases: dict[str, set[str]] = {}
    for name in file:
        case, _, tensor = name.rpartition(".")
        cases.setdefault(case, set()).add(tensor)
    for case, held in sorted(cases.items()):
        kind = next((kind for kind in _KINDS if held & set(kind)), ())
        if missing := [name for name in kind if name not in held]:
            yield Check(f"{path.name}: {case} lacks {', '.join(missing)}", None, None, False)
            continue
        for name in sorted(held - set(kind)):
            yield Check(f"{path.name}: {case}.{name}", None, None, None)
        if not kind:
            continue
        tensors = {name: _read(file, f"{case}.{name}") for name in kind}
        got = _compressed(tensors) if "mask_u8" in kind else _prepared(tensors)
        for name, tensor in got.items():
            tolerance = resized(TOLERANCE, _LEVEL) if name in _HALVES else TOLERANCE
            yield compare(f"{path.name}: {case}.{name}", tensor, tensors[name], tolerance)


def _compressed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compresses frames [F, 3, a, b] u8 of any size."""
    frames = given["mask_u8"]
    if (count := len(frames)) < 1 or trim_to_whole_latents(count) != count:
        raise BadMedia(f"mask_u8 has {count} frames; 4k + 1 are expected.")
    return {"masks": mask_channels((frames.float() - 127.5) / 127.5)}


def _prepared(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prepares frames [F, 3, h, w] u8 and pictures [1, 3, h, w] u8 with their masks."""
    height, width = given["target_hw"].tolist()
    size: Size = (height, width)
    kept = trim_to_whole_latents(len(given["driving_mask_in_u8"]))
    driving, mask = (
        crop_frames(given[name][:kept].permute(0, 2, 3, 1), size)
        for name in ("driving_in_u8", "driving_mask_in_u8")
    )
    picture, picture_mask = (
        crop_image(image_to_network(given[name][0].permute(1, 2, 0)), size)
        for name in ("ref_in_u8", "ref_mask_in_u8")
    )
    driving_masks, reference = driving_channels(mask), reference_channels(picture_mask)
    no_frames = reference.new_zeros(len(reference), driving_masks.shape[1], *reference.shape[2:])
    return {
        "keep": torch.tensor([kept]),
        "driving_half": skeleton_to_network(driving).transpose(0, 1),
        "driving_mask_half": skeleton_to_network(mask).transpose(0, 1),
        "driving_masks": driving_masks,
        "ref_cropped": picture[None],
        "ref_mask_cropped": picture_mask[None],
        "ref_mask_28": reference,
        "ref_masks": torch.cat([reference, no_frames], 1),
        "ref_mask_28_sat_animation": reference_channels(show_black(picture_mask)),
    }


def _read(file: TensorFile, name: str) -> Tensor:
    with file.open(name) as tensor:
        return tensor.clone()
