"""Recomputes every golden file below a folder. Files are known by what is in them, not by name."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import BadMedia, EngineError
from engine.golden import (
    align,
    encoders,
    keypoints,
    preprocess,
    render,
    sampling,
    transformer,
    vae,
)
from engine.golden.check import Check

KINDS: tuple[ModuleType, ...] = (
    transformer,
    preprocess,
    vae,
    encoders,
    sampling,
    render,
    align,
    keypoints,
)


def recompute(folder: Path) -> Iterator[Check]:
    """One check per case and tensor. Raises `BadMedia` if there is no golden data at all."""
    if not folder.is_dir():
        raise BadMedia(f"There is no folder {folder} to verify.")
    found = False
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".safetensors", ".npz", ".json"):
            continue
        for check in _checks(path):
            found = True
            yield check
    if not found:
        raise BadMedia(f"There is no golden data below {folder}.")


def _checks(path: Path) -> Iterator[Check]:
    try:
        names, metadata = _contents(path)
    except (SafetensorError, ValueError, OSError) as error:
        yield Check(f"{path.name}: unreadable: {error}", None, None, False)
        return
    for kind in KINDS:
        if kind.recognises(names, metadata):
            try:
                yield from kind.checks(path)
            except (EngineError, KeyError, ValueError, RuntimeError) as error:
                yield Check(f"{path.name}: {type(error).__name__}: {error}", None, None, False)
            return
    known = path.suffix == ".json" or transformer.supports(names, metadata)
    if not known:
        yield Check(path.name, None, None, None)


def _contents(path: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return frozenset(file.keys()), file.metadata() or {}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return frozenset(file.files), {}
    held = json.loads(path.read_text())
    return frozenset(held) if isinstance(held, dict) else frozenset(), {}
