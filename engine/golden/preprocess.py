"""Size, resize, crop and value mapping of picture and skeleton, against the official script."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.golden.check import Check, compare, resized
from engine.media.framing import (
    Size,
    crop_frames,
    crop_image,
    image_to_network,
    skeleton_to_network,
    target_size,
)
from engine.models.tensorfile import TensorFile

_SUMS = 2e-6  # of a resize in FP32, in another order
_TENSORS = ("ref_in_u8", "pose_in_u8", "target_hw", "ref_cropped", "pose_cropped_u8", "pose_half")


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    return "base_size" in metadata and any(not missing for missing in _cases(names).values())


def checks(path: Path) -> Iterator[Check]:
    """Compares to the bit, since there is one right answer."""
    file = TensorFile(path)
    base, _ = json.JSONDecoder().raw_decode(file.metadata["base_size"])  # "[64,112] stands for …"
    for case, missing in sorted(_cases(frozenset(file)).items()):
        if missing:
            name = f"{path.name}: {case} lacks {', '.join(missing)}"
            yield Check(name, None, None, False)
            continue
        held = {name: _read(file, f"{case}.{name}") for name in _TENSORS}
        got = _recompute(held["ref_in_u8"], held["pose_in_u8"], (base[0], base[1]))
        for name, tensor in got.items():
            tolerance = resized(0.0, _SUMS)
            yield compare(f"{path.name}: {case}.{name}", tensor, held[name], tolerance)


def _recompute(pictures: Tensor, frames: Tensor, base: Size) -> dict[str, Tensor]:
    """Computes the results for pictures [n, 3, h, w] u8 and frames [F, 3, h, w] u8."""
    size = target_size(pictures.shape[2], pictures.shape[3], base)
    cropped = [crop_image(image_to_network(one.permute(1, 2, 0)), size) for one in pictures]
    skeleton = crop_frames(frames.permute(0, 2, 3, 1), size)
    return {
        "target_hw": torch.tensor(size),
        "ref_cropped": torch.stack(cropped),
        "pose_cropped_u8": skeleton.permute(0, 3, 1, 2),
        "pose_half": skeleton_to_network(skeleton).transpose(0, 1),
    }


def _cases(names: frozenset[str]) -> dict[str, list[str]]:
    """The names before the dot, and the tensors that each lacks."""
    parts = [name.rpartition(".") for name in names]
    cases = {case for case, _, tensor in parts if tensor in _TENSORS}
    return {case: [n for n in _TENSORS if f"{case}.{n}" not in names] for case in cases}


def _read(file: TensorFile, name: str) -> Tensor:
    with file.open(name) as tensor:
        return tensor.clone()
