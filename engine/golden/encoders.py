"""Golden data of the text and image encoders and of prompt cleaning.

A safetensors file holds the weights under the official names, with `weights.` in front, and cases;
the weights go through the loaders of the product.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.golden.check import Check, at_most, compare, resized
from engine.models.text import TextEncoder, clean_prompt
from engine.models.vision import VisionEncoder, preprocess

TOLERANCE = 2e-5
PIXELS, PIXELS_ELSEWHERE = 2e-6, 5e-5  # in units of a standard deviation of pictures
WEIGHTS = "weights."
CPU = torch.device("cpu")

GoldenTensors = Mapping[str, Tensor]


def recognises(names: frozenset[str], metadata: Mapping[str, str]) -> bool:
    """True for files of these encoders; the names alone tell."""
    return _is_text(names) or _is_vision(names) or {"rule", "cases"} <= names


def checks(path: Path) -> Iterator[Check]:
    """One check a case and tensor. Raises `BadCheckpoint` if the weights cannot be loaded."""
    if path.suffix == ".json":
        yield from _cleaning(path)
        return
    tensors = load_file(path)
    weights = {
        name.removeprefix(WEIGHTS): tensor
        for name, tensor in tensors.items()
        if name.startswith(WEIGHTS)
    }
    with TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file(weights, file)
        if _is_text(frozenset(tensors)):
            yield from _text(path.name, tensors, TextEncoder(file, CPU, torch.float32))
        else:
            encoder = VisionEncoder(file, CPU, torch.float32, _heads(path))
            yield from _vision(path.name, tensors, encoder)


def _is_text(names: frozenset[str]) -> bool:
    return "weights.token_embedding.weight" in names


def _is_vision(names: frozenset[str]) -> bool:
    return "weights.visual.patch_embedding.weight" in names


def _heads(path: Path) -> int:
    """The number of heads, which the weights do not tell."""
    with safe_open(path, "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    heads = config.get("vision_heads") if isinstance(config, dict) else None
    if not isinstance(heads, int):
        raise BadCheckpoint(
            f"{path.name} holds weights of an image encoder without metadata: a `config` with "
            "`vision_heads` is expected."
        )
    return heads


def _cases(file: str, tensors: GoldenTensors, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in sorted(tensors) if name.endswith(suffix)]


def _text(file: str, tensors: GoldenTensors, encoder: TextEncoder) -> Iterator[Check]:
    """Compares `raw` where the mask is one, as only the real tokens are ever computed."""
    for case in _cases(file, tensors, ".ids"):
        ids, mask = tensors[f"{case}.ids"], tensors[f"{case}.mask"].bool()  # [B, L]
        wanted = tensors[f"{case}.embedding"]
        embedding = torch.zeros_like(wanted)
        for row, real, out in zip(ids, mask, embedding):
            out[: int(real.sum())] = encoder.embed(row[real])
        yield compare(f"{file}: {case}.embedding", embedding, wanted, TOLERANCE)
        yield compare(
            f"{file}: {case}.raw", embedding[mask], tensors[f"{case}.raw"][mask], TOLERANCE
        )


def _vision(file: str, tensors: GoldenTensors, encoder: VisionEncoder) -> Iterator[Check]:
    for case in _cases(file, tensors, ".image"):
        image, pixels = tensors[f"{case}.image"], tensors[f"{case}.pixels"]
        got = preprocess(image, pixels.shape[-1])
        yield compare(f"{file}: {case}.pixels", got, pixels, resized(PIXELS, PIXELS_ELSEWHERE))
        if f"{case}.features" in tensors:
            features = tensors[f"{case}.features"]
            yield compare(f"{file}: {case}.features", encoder(image), features, TOLERANCE)


def _cleaning(path: Path) -> Iterator[Check]:
    for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))["cases"]):
        wrong = clean_prompt(case["input"]) != case["cleaned"]
        yield at_most(f"{path.name}: case {number}", float(wrong), 0.0)
