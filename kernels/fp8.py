"""8-bit rows: values of one byte and one FP32 scale a row.

    x ~ q * s,    s = max|row| / limit

E4M3 keeps three bits after the leading one wherever the value lies; INT8 has even steps, which is
more exact for rows without outliers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
INT8_MAX = 127.0
TINY = 1e-12  # the smallest row maximum: rows of zeros stay zeros

CHUNK = 2**18  # values quantised at a time: they stay in the cache of a core

LIMITS = {torch.float8_e4m3fn: E4M3_MAX, torch.int8: INT8_MAX}


@dataclass(frozen=True, slots=True)
class Rows:
    q: Tensor  # [M, D] e4m3 or int8
    s: Tensor  # [M] fp32

    def dequantize(self) -> Tensor:
        """Returns the values, [M, D] fp32."""
        return self.q.float() * self.s[:, None]


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Rows:
    """Quantises x [M, D], any float. NaN and infinity in x are the caller's mistake."""
    rows, width = x.shape
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = torch.empty(rows, dtype=torch.float32, device=x.device)
    step = max(1, CHUNK // max(1, width))
    held, size = (
        torch.empty(min(step, rows), width, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    for first in range(0, rows, step):
        part = x.detach()[first : first + step]
        wide = held[: len(part)].copy_(part)
        scale = torch.abs(wide, out=size[: len(part)]).amax(dim=-1)
        scale = scale.clamp_min_(TINY).div_(LIMITS[dtype])
        wide /= scale[:, None]
        # x / s exceeds the limit by a rounding at most, which rounding to 8 bits takes back
        q[first : first + step] = wide.round_() if dtype == torch.int8 else wide
        s[first : first + step] = scale
    return Rows(q, s)


def to_8bit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds half to even and saturates."""
    limit = LIMITS[dtype]
    x = x.clamp(-limit, limit)
    return x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)
