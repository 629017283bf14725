"""Multipliers of a linear's inputs, by which the columns of its weight are divided.

A product x W^T keeps its value if the input is multiplied by m and the columns of W divided by it.
Channels that are large in x and small in W, or the other way round, then cost 8 bits less: rotation
alone would spread a large channel over its group (docs/reference/rotation.md 0 and 1.2).
"""

import math

import torch
from torch import Tensor

BOUND = 64.0  # of multipliers, both ways


def square_sums(weight: Tensor) -> Tensor:
    """Returns |W_:j|^2 for the columns of weight [out, in]: [in] fp64."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for part in weight.split(256):
        total += part.double().square_().sum(dim=0)
    return total


def equalised(gain: Tensor) -> Tensor:
    """Makes the multipliers [in] fp32 that give columns one norm: |W_:j| over the median of those
    that are not zero. `gain`: their squares, as `square_sums` makes them. Zero columns get 1.
    """
    live = gain > 0
    log = torch.zeros_like(gain)
    if bool(live.any()):
        log[live] = gain[live].log() / 2 - gain[live].sqrt().median().log()
    return _bounded(log)


def smoothed(power: Tensor, gain: Tensor, alpha: float) -> Tensor:
    """Makes multipliers [in] fp32, rms(W)^(1 - alpha) / rms(x)^alpha with a median of 1, from the
    mean squares of inputs and the square sums of columns, [in] fp64. Channels that were never used
    get 1.
    """
    live = (power > 0) & (gain > 0)
    log = torch.zeros_like(power)
    log[live] = (1 - alpha) / 2 * gain[live].log() - alpha / 2 * power[live].log()
    log[live] -= log[live].median()
    return _bounded(log)


def _bounded(log: Tensor) -> Tensor:
    return log.clamp(-math.log(BOUND), math.log(BOUND)).exp().float()
