"""The run-time arguments that a kernel's signature asks for, and checks of the values given.

A compiled kernel trusts its arguments: a wrong type or an unaligned pointer is a wrong result or a
dead GPU. So every launch is checked here, in the driver's bank and in the interpreter's alike. What
a signature does not say, the shapes, a launcher asks for with `require`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from kernels.spec import Argument, KernelError, KernelSpec

if TYPE_CHECKING:  # the build compiles kernels on machines without torch
    import torch

ALIGNMENT = 16  # bytes; compiled code loads 16 bytes at once from every pointer
POINTER_BYTES = 8
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # programs along each axis, a limit of CUDA

# Triton's name of a tensor's elements -> torch's name.
ELEMENTS = {
    "fp32": "torch.float32",
    "fp16": "torch.float16",
    "bf16": "torch.bfloat16",
    "fp8e4nv": "torch.float8_e4m3fn",
    "i8": "torch.int8",
    "u8": "torch.uint8",
    "i32": "torch.int32",
    "i64": "torch.int64",
}
_INTEGERS = {"i32": (4, -(2**31), 2**31 - 1), "i64": (8, -(2**63), 2**63 - 1)}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One run-time argument of a kernel."""

    type: str  # Triton's: "*fp32", "i32"
    is_multiple_of_16: bool  # true of every pointer's address

    @property
    def element(self) -> str | None:
        """Triton's name of what a pointer points to; None for a number."""
        return self.type[1:] if self.type.startswith("*") else None

    @property
    def size_bytes(self) -> int:
        if self.element is not None:
            return POINTER_BYTES
        return _INTEGERS[self.type][0] if self.type in _INTEGERS else 4


class Axis(NamedTuple):
    """An axis whose size the caller chooses: a multiple of `of` that is not 0."""

    name: str
    of: int = 1


def require(
    kernel: str,
    argument: str,
    tensor: "torch.Tensor",
    shape: Sequence[int | Axis],
    dtype: "torch.dtype | None" = None,
) -> None:
    """Raises `KernelError` for a tensor of another shape, or of another dtype if one is given.

    `kernel` and `argument` are their names in the error.
    """
    is_right = len(shape) == tensor.ndim and all(
        found > 0 and found % axis.of == 0 if isinstance(axis, Axis) else found == axis
        for axis, found in zip(shape, tensor.shape)
    )
    if is_right and dtype in (None, tensor.dtype):
        return
    names = [axis.name if isinstance(axis, Axis) else str(axis) for axis in shape]
    multiples = [
        f", {axis.name} a multiple of {axis.of}"
        for axis in shape
        if isinstance(axis, Axis) and axis.of > 1
    ]
    expected = f"{dtype or 'a tensor'} [{', '.join(names)}]{''.join(multiples)}"
    found = f"{tensor.dtype} {list(tensor.shape)}"
    raise KernelError(f"{kernel}, {argument}: expected {expected}, found {found}")


def parameters(spec: KernelSpec) -> tuple[Parameter, ...]:
    """The arguments of a launch, in order. Raises `KernelError` for a signature with an unknown
    type, and for `multiples_of_16` that does not name an integer.
    """
    return _parameters(spec.name, spec.signature, spec.multiples_of_16)


@cache
def _parameters(name: str, signature: str, multiples: tuple[int, ...]) -> tuple[Parameter, ...]:
    types = signature.split()
    known = {"fp32", *_INTEGERS, *(f"*{element}" for element in ELEMENTS)}
    for unknown in (kind for kind in types if kind not in known):
        raise KernelError(f"{name}: {unknown} in its signature is none of {sorted(known)}")
    for index in multiples:
        if not 0 <= index < len(types) or types[index] not in _INTEGERS:
            raise KernelError(
                f"{name}: argument {index} cannot be a multiple of 16: not an integer"
            )
    return tuple(
        Parameter(kind, kind.startswith("*") or index in multiples)
        for index, kind in enumerate(types)
    )


def check_launch(
    spec: KernelSpec, device: str, grid: Sequence[int], arguments: Sequence[Argument]
) -> None:
    """Raises `KernelError` that names the kernel and the argument that does not fit.

    `device` is where every tensor must be, as torch writes it: "cuda:0" or "cpu".
    """
    wanted = parameters(spec)
    if not 1 <= len(grid) <= len(GRID_LIMITS):
        raise KernelError(f"{spec.name}: a grid has 1 to 3 axes, not {len(grid)}")
    for size, limit in zip(grid, GRID_LIMITS):
        if not 1 <= size <= limit:
            raise KernelError(f"{spec.name}: grid {tuple(grid)} has an axis outside 1..{limit}")
    if len(arguments) != len(wanted):
        raise KernelError(f"{spec.name} takes {len(wanted)} arguments, got {len(arguments)}")
    for index, (parameter, value) in enumerate(zip(wanted, arguments)):
        wrong = _mistake(parameter, device, value)
        if wrong:
            raise KernelError(f"{spec.name}, argument {index} ({parameter.type}): {wrong}")


def _mistake(parameter: Parameter, device: str, value: Argument) -> str | None:
    element = parameter.element
    if isinstance(value, int | float):
        return "a tensor is wanted, not a number" if element else _wrong_number(parameter, value)
    if element is None:
        return "a number is wanted, not a tensor"
    if str(value.dtype) != ELEMENTS[element]:
        return f"the tensor is {value.dtype}"
    if str(value.device) != device:
        return f"the tensor is on {value.device}, the kernel on {device}"
    if not value.is_contiguous():
        return f"a tensor {list(value.shape)} with strides {list(value.stride())} has gaps"
    if value.data_ptr() % ALIGNMENT:
        return f"the tensor does not begin at a multiple of {ALIGNMENT} bytes"
    return None


def _wrong_number(parameter: Parameter, value: float) -> str | None:
    if parameter.type == "fp32":
        largest = 3.4028234663852886e38
        is_finite = not isinstance(value, bool) and math.isfinite(value) and abs(value) <= largest
        return None if is_finite else f"{value} is not a finite number of 32 bits"
    if isinstance(value, bool) or not isinstance(value, int):
        return f"{value!r} is not an integer"
    _, low, high = _INTEGERS[parameter.type]
    if not low <= value <= high:
        return f"{value} does not fit"
    if parameter.is_multiple_of_16 and value % ALIGNMENT:
        return f"{value} is not a multiple of {ALIGNMENT}"
    return None
