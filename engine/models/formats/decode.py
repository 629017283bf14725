"""Codes of a byte as FP32, by a table of their 256 values: PyTorch casts FP8 four times slower."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.models.formats.held import as_bytes

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def decoded(codes: Tensor) -> Tensor:
    """The values of codes in FP8, INT8 or a wide float, as a new FP32 tensor."""
    if codes.dtype not in _FP8:
        return codes.to(torch.float32, copy=True)
    return torch.from_numpy(np.take(_values(codes.dtype), as_bytes(codes).numpy(), mode="clip"))


def decoded_pairs(codes: Tensor, pairs: Tensor) -> Tensor:
    """The two FP32 values of each byte [n, C / 2] as a row [n, C]; `pairs` [256, 2] fp32."""
    whole = pairs.numpy().view(np.int64)[:, 0]  # both values at once
    taken = np.take(whole, codes.numpy(), mode="clip")
    return torch.from_numpy(taken.view(np.float32))


@cache
def _values(dtype: torch.dtype) -> NDArray[np.float32]:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
