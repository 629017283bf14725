"""Measures how near two results are: latents by error, frames by PSNR and SSIM.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility
to structural similarity", IEEE Transactions on Image Processing 13 (4), 2004: windows of 11x11
Gaussian weights that sum to one, of standard deviation 1.5, wholly inside the frame.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import require

PEAK = 255.0  # of a pixel
EQUAL_DB = 120.0  # stands for frames that do not differ: one level in one value is less
WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| of all values; 0 of two that are zero, infinite where `want` alone is.

    Raises `WrongResult` for shapes that differ and for values that are not finite.
    """
    require(got.shape == want.shape, f"Compared {list(got.shape)} with {list(want.shape)}")
    finite = bool(got.isfinite().all()) and bool(want.isfinite().all())
    require(finite, "Compared values are not finite")
    wanted = want.double()
    apart, size = (got.double() - wanted).norm().item(), wanted.norm().item()
    return 0.0 if apart == 0 else apart / size if size > 0 else math.inf


def psnr(got: Tensor, want: Tensor) -> float:
    """The dB of all pixels of frames or clips of bytes; at most `EQUAL_DB`."""
    require(got.shape == want.shape, f"Compared {list(got.shape)} with {list(want.shape)}")
    error = (got.float() - want.float()).square().mean(dtype=torch.float64).item()
    return min(EQUAL_DB, 10 * math.log10(PEAK**2 / error)) if error else EQUAL_DB


def ssim(got: Tensor, want: Tensor) -> float:
    """The SSIM of two frames [H, W, 3] u8, over all windows and the three colours."""
    x, y = (side.permute(2, 0, 1).double() for side in (got, want))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    alike = (2 * mean_x * mean_y + C1) * (2 * both + C2)
    return (alike / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean().item()


def _blurred(channels: Tensor) -> Tensor:
    """[3, H, W] -> [3, H - 10, W - 10]."""
    places = torch.arange(WINDOW, dtype=channels.dtype, device=channels.device) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    down = F.conv2d(channels[:, None], weights.view(1, 1, -1, 1))
    return F.conv2d(down, weights.view(1, 1, 1, -1))[:, 0]
