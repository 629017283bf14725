"""NVFP4: E2M1 codes of four bits, an E4M3 scale for each 16 columns, one scale for all.

    W[r, c] = E2M1 * (t * scale(r, c / 16))                     docs/reference/formats.md 3.3

Two dialects under the same names, with their nibbles in opposite order: a mistake would keep the
norm, the sums of rows and the histogram.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.formats.decode import decoded_pairs
from engine.models.formats.held import WEIGHT, Held, RowReader, Tensors, Weight, as_bytes
from engine.models.formats.swizzle import swizzled_shape, unswizzle

GROUP = 16
LOSS = 9.5
_SCALE, _SCALE_TYPES = "weight_scale", ("F8_E4M3", "U8")
_TENSOR_SCALE = "weight_scale_2"  # of ComfyUI's dialect
_INVERSE, _ALPHA, _INPUT = "weight_global_scale", "alpha", "input_global_scale"  # of lightx2v's
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_UNTOLD = (
    "is NVFP4 and nothing in the file says in which order its nibbles lie: the order of ComfyUI "
    "is taken"
)
_OTHER_NAMES = ("attn1", "attn2", "to_q", "to_k", "to_v", "ffn.net")  # of diffusers


@dataclass(frozen=True, slots=True)
class _Dialect:
    name: str
    is_high_first: bool  # the nibble of the even column
    padding: int


_COMFY = _Dialect("NVFP4", is_high_first=True, padding=GROUP)
_LIGHTX2V = _Dialect("NVFP4 of lightx2v", is_high_first=False, padding=GROUP)


def is_nvfp4(held: Held) -> bool:
    """True for U8 with block scales of one byte."""
    return held.dtype() == "U8" and _SCALE in held and held.dtype(_SCALE) in _SCALE_TYPES


def nvfp4(held: Held) -> Weight:
    """A weight in one of the dialects; the scale of the tensor tells which."""
    rows, half = held.require_matrix()
    columns = 2 * half
    if columns % GROUP:
        raise held.error(f"{columns} columns", f"a multiple of {GROUP} for NVFP4")
    held.require_group(GROUP)
    is_foreign = any(part in held.name for part in _OTHER_NAMES)
    if held.told is None and _TENSOR_SCALE in held and is_foreign:
        raise held.error(
            "NVFP4 under the names of diffusers, whose nibbles and scales lie otherwise",
            "ComfyUI's or lightx2v's file",
        )
    shape = swizzled_shape(rows, columns // GROUP)
    held.require_numbers(_SCALE, shape, types=_SCALE_TYPES)
    dialect, endings = _dialect(held)
    for ending in endings:
        held.require_numbers(ending, (), (1,))
    names = {ending: held.tensors[ending] for ending in (WEIGHT, _SCALE, *endings)}
    notes = (_UNTOLD,) if held.told is None and dialect is _COMFY else ()
    return Weight(
        dialect.name, LOSS, names, (rows, columns), partial(_open, held, dialect),
        padding=dialect.padding, notes=notes,
    )  # fmt: skip


def _dialect(held: Held) -> tuple[_Dialect, tuple[str, ...]]:
    """The dialect, and the tensors that its scale of the tensor is made of."""
    if _TENSOR_SCALE in held:
        return _COMFY, (_TENSOR_SCALE,)
    if held.told is None and _INVERSE in held:
        return _LIGHTX2V, (_INVERSE,)
    if held.told is None and _ALPHA in held and _INPUT in held:
        return _LIGHTX2V, (_ALPHA, _INPUT)
    wanted = _TENSOR_SCALE
    if held.told is None:
        wanted += f", {_INVERSE}, or {_ALPHA} with {_INPUT}"
    raise held.error("no scale of the tensor", wanted)


def _open(held: Held, dialect: _Dialect, tensors: Tensors) -> RowReader:
    rows, half = held.require_matrix()
    stored = as_bytes(tensors[_SCALE]).view(torch.float8_e4m3fn)
    scales = unswizzle(as_bytes(stored), rows, 2 * half // GROUP).view(torch.float8_e4m3fn)
    scales = _tensor_scale(held) * scales.float()
    if bool((scales < 0).any()) or not bool((scales != 0).any()):
        raise BadCheckpoint(
            f"{held.file.path.name}: {held.tensors[_SCALE]} goes from {scales.min().item():g} to "
            f"{scales.max().item():g}; scales above 0 are expected. Fetch the file again."
        )
    pairs = _pairs(dialect.is_high_first)

    def read(first: int, last: int) -> Tensor:
        weight = decoded_pairs(tensors[WEIGHT][first:last], pairs)
        weight.unflatten(-1, (-1, GROUP)).mul_(scales[first:last, :, None])
        return weight

    return read


def _tensor_scale(held: Held) -> float:
    """The scale of the whole tensor, as fp32 would have it."""
    if _TENSOR_SCALE in held:
        return held.value(_TENSOR_SCALE)
    if _INVERSE in held:
        return (1 / torch.tensor(held.value(_INVERSE), dtype=torch.float32)).item()
    alpha, given = (torch.tensor(held.value(ending)) for ending in (_ALPHA, _INPUT))
    return (alpha * given).item()


@cache
def _pairs(is_high_first: bool) -> Tensor:
    """The two values of each byte [256, 2]."""
    values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
    byte = torch.arange(256)
    high, low = values[byte >> 4], values[byte & 15]
    return torch.stack([high, low] if is_high_first else [low, high], 1)
