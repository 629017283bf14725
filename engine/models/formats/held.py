"""What a file holds of one parameter, and what a format makes of it.

A format is a row of `FORMATS` in `engine.models.formats.table`: it recognises its parameters by
the tensors beside them, checks what the headers tell, and says how rows become FP32.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from engine.errors import BadCheckpoint
from engine.models.tensorfile import TensorFile

WEIGHT = "weight"  # the ending of the tensor that holds a parameter's values
WIDE = ("F64", "F32", "BF16", "F16")

Shape: TypeAlias = tuple[int, ...]
Tensors: TypeAlias = Mapping[str, Tensor]  # opened, by their endings
RowReader: TypeAlias = Callable[[int, int], Tensor]  # rows [first, last) of a weight, fp32 or plain
CodeKind: TypeAlias = Literal["fp8", "mxfp8", "convrot"]
PackageForm: TypeAlias = Literal["fp8", "int8"]  # of the weights of a package


@dataclass(frozen=True, slots=True)
class Told:
    """How a file says that a linear is stored."""

    source: str  # as messages call the place where it says so
    kind: str
    settings: Mapping[str, object] = field(default_factory=dict)  # beside the format


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of one parameter, none of them read yet."""

    file: TensorFile
    name: str  # of the parameter, without the model's prefix
    tensors: Mapping[str, str]  # stored names by ending: "weight", "weight_scale", ...
    told: Told | None = None

    def __contains__(self, ending: str) -> bool:
        return ending in self.tensors

    def shape(self, ending: str = WEIGHT) -> Shape:
        return self.file.shape(self.tensors[ending])

    def dtype(self, ending: str = WEIGHT) -> str:
        return self.file.dtype(self.tensors[ending])

    def first(self, *endings: str) -> str | None:
        """The first of the endings that is there."""
        return next((ending for ending in endings if ending in self.tensors), None)

    def number(self, setting: str, default: int) -> int:
        """A size that the file tells. Raises `BadCheckpoint` if it is none."""
        told = {} if self.told is None else self.told.settings
        value = told.get(setting, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
            raise self.error(f"{setting} {value!r:.40}", "a whole number above 0")
        return value

    def flag(self, setting: str, default: bool) -> bool:
        """A claim that the file makes. Raises `BadCheckpoint` if it is neither true nor false."""
        told = {} if self.told is None else self.told.settings
        value = told.get(setting)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{setting} {value!r:.40}", "true or false")
        return default if value is None else value

    def require_group(self, size: int) -> None:
        """Raises `BadCheckpoint` if the file tells another size of groups than its format has."""
        if (found := self.number("group_size", size)) != size:
            raise self.error(f"group_size {found}", f"{size}, which the format has")

    def value(self, ending: str) -> float:
        """The one number of a tensor. Raises `BadCheckpoint` unless it is finite and above 0."""
        self.require_numbers(ending, (), (1,))
        with self.file.open(self.tensors[ending]) as tensor:
            value = tensor.double().item()
        if not (math.isfinite(value) and value > 0):
            raise self.error(f"{ending} {value:g}", "a finite number above 0")
        return value

    def require_matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight as stored."""
        shape = self.shape()
        if len(shape) != 2 or 0 in shape:
            raise self.error(f"the shape {list(shape)}", "rows and columns")
        return shape[0], shape[1]

    def require_numbers(self, ending: str, *shapes: Shape, types: tuple[str, ...] = WIDE) -> Shape:
        """The shape of a tensor beside the weight, which must be one of `shapes`, of wide floats
        if `types` does not say otherwise.
        """
        if ending not in self.tensors:
            raise self.error(f"no {ending}", "one")
        if self.dtype(ending) not in types:
            raise self.error(f"{ending} as {self.dtype(ending)}", " or ".join(types))
        if (found := self.shape(ending)) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.error(f"{ending} {list(found)}", wanted)
        return found

    def error(self, found: str, wanted: str) -> BadCheckpoint:
        """Says what was found beside or in the weight, and what its format expects."""
        stored, where = self.tensors.get(WEIGHT, self.name), ""
        if WEIGHT in self.tensors:
            where = f", {self.dtype()} {list(self.shape())},"
        if self.told is not None:
            where += f" told as {self.told.kind} by {self.told.source},"
        return BadCheckpoint(
            f"{self.file.path.name}: {stored}{where} has {found}; {wanted} is expected. Fetch the "
            "file again, or use a copy in another format."
        )


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix in the 8-bit codes of its file, as tensors of its own."""

    kind: CodeKind
    q: Tensor  # [R, C] e4m3 ("fp8", "mxfp8") or i8 ("convrot", in groups of 256)
    s: Tensor  # [R] fp32; of "mxfp8" [R, C/32] u8, powers of two with an offset of 127


@dataclass(frozen=True, slots=True)
class KeptCodes:
    """Codes that a package could hold as they are."""

    by: PackageForm  # packages of this form
    read: Callable[[Tensors], Codes]


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of a file: its shape, and how its rows are read."""

    kind: str  # how it is stored, as people call it
    loss: float  # relative error of a Gaussian weight in this format, in per cent
    names: Mapping[str, str]  # of the tensors that make it, by ending
    shape: Shape  # in values, as stored
    open: Callable[[Tensors], RowReader]
    padding: int = 1  # rows and columns may be filled up to multiples of it
    codes: KeptCodes | None = None  # None: no package could hold them as they are
    is_plain: bool = False  # numbers that only need a cast
    notes: tuple[str, ...] = ()  # what an operator should know, once for each kind

    def fits(self, shape: Shape) -> bool:
        """Tells if this can be a parameter of the shape; leading ones count for nothing."""
        stored, wanted = _without_ones(self.shape), _without_ones(shape)
        if self.padding == 1 or len(stored) != 2 or len(wanted) != 2:
            return stored == wanted
        filled = [-(-size // self.padding) * self.padding for size in wanted]
        return all(held in pair for held, pair in zip(stored, zip(wanted, filled)))


def require_positive(held: Held, ending: str, scale: Tensor, codes: Tensor) -> None:
    """Raises `BadCheckpoint` if a scale is below 0, or 0 for a row of codes that are not 0.

    `scale` broadcasts over `codes`. Scales that are not finite show in the weight.
    """
    odd = (scale <= 0) & scale.isfinite()
    if bool(odd.any()) and bool((codes != 0)[odd.expand_as(codes)].any()):
        raise BadCheckpoint(
            f"{held.file.path.name}: {held.tensors[ending]} is {scale.min().item():g} for a weight "
            "that is not 0; a scale above 0 is expected. Fetch the file again."
        )


def _without_ones(shape: Shape) -> Shape:
    first = next((axis for axis, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as U8."""
    return tensor.reshape(-1).view(torch.uint8).view(tensor.shape)
