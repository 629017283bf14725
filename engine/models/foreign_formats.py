"""Formats of weights that people have and that are not read: each is refused by its name.

Most would otherwise be told as a missing weight or an odd scale, and INT8 would be read as noise.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from engine.errors import BadCheckpoint
from engine.models.tensorfile import TensorFile

TAKE = "Take a copy in BF16, FP16, FP32 or scaled FP8 (fp8_e4m3fn_scaled)"
_BYTES = ("U8", "torch.uint8")
_CODES = ("I8", "torch.int8")
_SCALE = "weight_scale"
_BLOCK_SCALES = ("F8_E8M0", "torch.float8_e8m0fnu", *_BYTES)
_METADATA = "_quantization_metadata"


def refuse_foreign(file: TensorFile) -> None:
    """Raises `BadCheckpoint` for the first weight whose format is one of `FOREIGN`."""
    for name in file:
        stem = name.removesuffix(".weight")
        for called, is_found in FOREIGN.items():
            if is_found(file, name, stem):
                raise BadCheckpoint(
                    f"{file.path.name}: {stem} is stored in {called}, which is not read. {TAKE}."
                )


def _is_quanto(file: TensorFile, name: str, stem: str) -> bool:
    return name.endswith(".weight._data")


def _is_mxfp8(file: TensorFile, name: str, stem: str) -> bool:
    return file.is_fp8(name) and _of_scale(file, stem) in _BLOCK_SCALES


def _is_nvfp4(file: TensorFile, name: str, stem: str) -> bool:
    return name != stem and file.dtype(name) in _BYTES and _of_scale(file, stem) is not None


def _is_rotated(file: TensorFile, name: str, stem: str) -> bool:
    return file.dtype(name) in _CODES and any("convrot" in text for text in _told(file, stem))


def _is_int8(file: TensorFile, name: str, stem: str) -> bool:
    return name != stem and file.dtype(name) in _CODES


FOREIGN: Mapping[str, Callable[[TensorFile, str, str], bool]] = {
    "quanto's INT8": _is_quanto,
    "MXFP8": _is_mxfp8,
    "NVFP4": _is_nvfp4,
    "INT8 with rotated columns (ConvRot)": _is_rotated,
    "INT8": _is_int8,
}


def _of_scale(file: TensorFile, stem: str) -> str | None:
    """The type of a weight's scale; None: it has none."""
    name = f"{stem}.{_SCALE}"
    return file.dtype(name) if name in file else None


def _told(file: TensorFile, stem: str) -> Iterator[str]:
    """What a file says of the format of a linear."""
    name = f"{stem}.comfy_quant"
    if name in file:
        with file.open(name) as tensor:
            yield bytes(tensor.flatten().to(torch.uint8).tolist()).decode(errors="replace")
    yield file.metadata.get(_METADATA, "")
