"""Finds what a recorded case of a transformer is recomputed from: its weights and its inputs.

A case carries the configuration of its model and a description of itself as metadata. Weights are
files of the same folder that carry an equal configuration, inputs are those of an equal case.
Nothing is known by the name of a file, but for a tie between two sets of weights.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import BadCheckpoint, MissingModel
from engine.golden.check import Check
from engine.models.checkpoint import Checkpoint, load_transformer
from engine.models.dit import Scail

Metadata: TypeAlias = Mapping[str, str]

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True)
class RecordedCase:
    """A file of results with all that they were computed from."""

    file: str  # and its weights, where they were chosen among several
    metadata: Metadata
    wanted: Mapping[str, Tensor]  # all that the file holds, fp32
    inputs: Mapping[str, Tensor]  # at least `in.x`
    checkpoint: Checkpoint

    def load(self, dtype: torch.dtype = torch.float32) -> Scail:
        return load_transformer(self.checkpoint, torch.device("cpu"), dtype)


def holds_weights(names: frozenset[str], metadata: Metadata) -> bool:
    """True for weights: they are read by the checks of other files and hold nothing to check."""
    if "prefix" not in metadata or "case" in metadata:
        return False
    return all(name.startswith(metadata["prefix"]) for name in names)


def takes_masks(metadata: Metadata) -> bool:
    """True for SCAIL-2: its configuration says how many channels masks have."""
    return "mask_channels" in fields(metadata, "config")


def find(path: Path) -> RecordedCase | Check:
    """Reads a case. What it lacks is a failed check.

    Raises `BadCheckpoint` or `MissingModel` for bad or incomplete weights.
    """
    wanted, metadata = _read(path)
    weights, others = _beside(path, metadata)
    inputs = wanted if "in.x" in wanted or not others else _read(others[0])[0]
    if not weights or "in.x" not in inputs:
        missing = "weights with the same config" if not weights else "inputs of the same case"
        return Check(f"{path.name}: no {missing} beside it", None, None, False)
    checkpoint, used = _choose(weights, metadata)
    file = path.name if used is None else f"{path.name} with {used}"
    return RecordedCase(file, metadata, wanted, inputs, checkpoint)


def fields(metadata: Metadata, key: str) -> Mapping[str, object]:
    """Reads the JSON object under a key; empty for anything else."""
    parsed = _parsed(metadata, key)
    return parsed if isinstance(parsed, dict) else {}


def _beside(path: Path, metadata: Metadata) -> tuple[list[Path], list[Path]]:
    """Finds files of its folder: weights of an equal config, and inputs of an equal case."""
    weights, inputs = [], []
    config, case = _parsed(metadata, "config"), _parsed(metadata, "case")
    for other in sorted(path.parent.glob("*.safetensors")):
        names, found = _header(other)
        if _parsed(found, "config") != config:
            continue
        if holds_weights(names, found):
            weights.append(other)
        elif "in.x" in names and _parsed(found, "case") == case:
            inputs.append(other)
    return weights, inputs


def _header(path: Path) -> tuple[frozenset[str], Metadata]:
    """Reads names and metadata; none of a file that cannot be read, which is reported itself."""
    if not path.is_file():
        return frozenset(), {}
    try:
        with safe_open(path, "pt") as file:
            return frozenset(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError):
        return frozenset(), {}


def _parsed(metadata: Metadata, key: str) -> object:
    """Reads a value for comparing, as equal JSON may be written differently; other text stays."""
    text = metadata.get(key, "null")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _choose(files: Sequence[Path], metadata: Metadata) -> tuple[Checkpoint, str | None]:
    """Finds the weights of a case, and their name where more than one set has its config.

    The name decides: that of `weights_A` ends in the name of the configuration. Results play no
    part, so a check does not try until it passes. Parts whose names do not join them are opened
    together.
    """
    config = fields(metadata, "config")
    layers = config.get("num_layers", config.get("layers"))
    layers = layers if isinstance(layers, int) else None
    cfg = str(fields(metadata, "case").get("cfg", config.get("config", "")))
    sets: dict[str, list[Path]] = {}
    for file in files:
        sets.setdefault(_SHARD.sub("", file.stem), []).append(file)
    opened = {name: _opened(parts, layers) for name, parts in sets.items()}
    whole = {name: checkpoint for name, checkpoint in opened.items() if checkpoint is not None}

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        as_a_word = re.search(rf"(^|[^0-9A-Za-z]){re.escape(cfg)}$", name) is not None
        return not as_a_word, not name.endswith(cfg), name not in whole, name

    used = min(sets, key=rank)
    if used in whole:
        return whole[used], used if len(sets) > 1 else None
    parts = [part for name, parts in sets.items() if name not in whole for part in parts]
    return Checkpoint(*parts, layers=layers), None


def _opened(parts: Sequence[Path], layers: int | None) -> Checkpoint | None:
    """Opens the checkpoint in these files, or None if they are not all weights of a model."""
    try:
        return Checkpoint(*parts, layers=layers)
    except (BadCheckpoint, MissingModel):
        return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}
