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

LIMITS = {torch.float8_e4m3fn: E4M3_MAX, torch.int8: INT8_MAX}


@dataclass(frozen=True, slots=True)
class Rows:
    q: Tensor  # [M, D] e4m3 or int8
    s: Tensor  # [M] fp32

    def dequantize(self) -> Tensor:
        """[M, D] fp32."""
        return self.q.float() * self.s[:, None]


def quantize_rows(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Rows:
    """x [M, D], any float -> its 8-bit rows. NaN and infinity are the caller's mistake."""
    x = x.float()
    s = x.abs().amax(dim=-1).clamp_min(TINY) / LIMITS[dtype]
    return Rows(to_8bit(x / s[:, None], dtype), s)


def to_8bit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds half to even and saturates."""
    limit = LIMITS[dtype]
    x = x.clamp(-limit, limit)
    return x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)
