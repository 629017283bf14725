"""The numbers by which a kernel is compared with its reference."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8 import LIMITS, to_8bit


@dataclass(frozen=True, slots=True)
class Check:
    """One number that a kernel was measured by."""

    kernel: str
    case: str
    what: str
    found: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.found <= self.limit  # NaN does not

    def __str__(self) -> str:
        return f"{self.kernel}, {self.case}: {self.what} {self.found:.2e}, limit {self.limit:.0e}"


def relative_error(got: Tensor, want: Tensor) -> float:
    """Returns |got - want| / |want|; NaN if shapes or types differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.nan
    size = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (size or 1.0)


def places(codes: Tensor) -> Tensor:
    """Returns codes as integers in the order of their values, neighbours one apart."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)


def wrong_codes(got: Tensor, exact: Tensor, slack: float) -> float:
    """Returns how many codes are the nearest to no value within `slack` of the exact one.

    `slack` is a part of the value, and a tenth of that part of the largest value of all.
    """
    around = slack * (exact.abs() + 0.1 * LIMITS[got.dtype])
    low, high = (places(to_8bit(exact + side, got.dtype)) for side in (-around, around))
    found = places(got)
    # -0 and 0 are one value with two codes
    return float(((found < low) | (found > high)).sum().item())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
