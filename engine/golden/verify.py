"""Recomputes every golden file below a folder. Files are known by their content, not by name."""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from zipfile import BadZipFile

import cv2
import numpy as np
from safetensors import SafetensorError, safe_open

from engine.errors import BadMedia, EngineError
from engine.golden import (
    align,
    encoders,
    formats,
    keypoints,
    masks,
    preprocess,
    render,
    sampling,
    scail2,
    segments,
    transformer,
    vae,
)
from engine.golden.cases import holds_weights
from engine.golden.check import Check

SUFFIXES = (".safetensors", ".npz", ".json", ".pt", ".gguf")
KINDS: tuple[ModuleType, ...] = (
    transformer,
    scail2,
    preprocess,
    masks,
    vae,
    encoders,
    sampling,
    segments,
    render,
    align,
    keypoints,
)

# the errors that readers, NumPy, OpenCV and PyTorch can raise for data of any content
DAMAGE = (
    EngineError,
    SafetensorError,
    BadZipFile,
    zlib.error,
    struct.error,
    cv2.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # of PyTorch, and RecursionError
    TypeError,
    ValueError,
)


def recompute(folder: Path) -> Iterator[Check]:
    """Yields one check a case and tensor; a file that cannot be recomputed is a failed one.

    Raises `BadMedia` if the folder cannot be read or there is no golden data at all.
    """
    found = False
    for path in _files(folder):
        for check in _checks(path):
            found = True
            yield check
    if not found:
        raise BadMedia(f"There is no golden data below {folder}.")


def _files(folder: Path) -> list[Path]:
    """Files that may hold golden data, in order."""

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise BadMedia(f"There is no folder {folder} to verify.") from error
        raise BadMedia(f"The folder {folder} cannot be read: {error.strerror}.") from error

    walk = os.walk(folder, onerror=refuse)
    paths = sorted(Path(place, name) for place, _, names in walk for name in names)
    return [path for path in paths if path.suffix in SUFFIXES]


def _checks(path: Path) -> Iterator[Check]:
    try:
        if path.exists() and not path.is_file():
            return  # a pipe would be waited for; a link that leads nowhere is a failure below
        if formats.belongs(path):  # known by what lies beside it
            yield from _made(formats, path)
            return
        names, metadata = _contents(path)
    except DAMAGE as error:
        yield Check(f"{path.name}: unreadable: {error}", None, None, False)
        return
    for kind in KINDS:
        if kind.recognises(names, metadata):
            yield from _made(kind, path)
            return
    other_json = path.suffix == ".json" and "cases" not in names
    if not other_json and not holds_weights(names, metadata):
        yield Check(path.name, None, None, None)


def _made(kind: ModuleType, path: Path) -> Iterator[Check]:
    """The checks of a file of a kind; one failure for a file that is damaged."""
    try:
        yield from kind.checks(path)
    except DAMAGE as error:
        yield Check(f"{path.name}: {type(error).__name__}: {error}", None, None, False)


def _contents(path: Path) -> tuple[frozenset[str], Mapping[str, str]]:
    """Names of tensors, or of JSON's entries and theirs ("81.cover"), and the metadata."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return frozenset(file.keys()), file.metadata() or {}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return frozenset(file.files), {}
    if path.suffix != ".json":
        return frozenset(), {}  # a checkpoint or a LoRA that no result lies beside
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict):
        return frozenset(), {}
    inner = (
        f"{name}.{key}" for name, part in held.items() if isinstance(part, dict) for key in part
    )
    return frozenset(held).union(inner), {}
