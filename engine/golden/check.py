"""One comparison between what the engine computes and what a reference program computed."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Check:
    """`ok` is None for a kind of golden data that the engine cannot recompute yet."""

    check: str  # file and tensor, or file, tensor and measure
    error: float | None
    tolerance: float | None
    ok: bool | None


def compare(name: str, got: ArrayLike, want: ArrayLike, tolerance: float) -> Check:
    """Largest absolute difference. NaN and a wrong shape never pass."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return Check(f"{name}: shape {got.shape}, not {want.shape}", None, tolerance, False)
    error = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0.0))
    return at_most(name, error, tolerance)


def resized(tolerance: float, elsewhere: float) -> float:
    """Chooses the tolerance of what PyTorch has resized. On a processor without vector instructions
    another of its programs does that, whose sums have another order and fall on the other side of
    some halves: the reference program differs there in the same way. Golden data are of AVX2.
    """
    return elsewhere if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else tolerance


def at_most(name: str, measure: float, limit: float) -> Check:
    """A measure such as a share of wrong pixels that must not exceed its limit."""
    if not math.isfinite(limit):
        return Check(f"{name}: its limit is not a finite number", None, None, False)
    if math.isfinite(measure):
        return Check(name, measure, limit, measure <= limit)
    return Check(f"{name}: not a finite number", None, limit, False)
