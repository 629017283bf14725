"""8-bit rows: values of one byte and one FP32 scale a row, some of them in a rotated basis.

    x ~ q * s,        s = max|row| / limit
    R x ~ q * s                                        rotated

E4M3 keeps three bits after the leading one wherever the value lies; INT8 has even steps, which is
more exact for rows without outliers. R makes such rows of any: it mixes each `GROUP` neighbours, so
that no channel stands out. With i = i3 i2 i1 i0 in base 4 it does, for one digit after another,

    y = (x_0 + x_1 + x_2 + x_3) / 2 - x                over the 4 values that differ in the digit

R_ij is 1/16, or -1/16 where an odd number of digits of i and j is equal. R = R^T and R R = 1, so a
product of two rotated operands is that of the operands; of a rotated and another one it is noise.
Each row of R sums to 1: a constant row stays as it is. Source: docs/reference/rotation.md 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.spec import KernelError

E4M3_MAX = 448.0
INT8_MAX = 127.0
TINY = 1e-12  # the smallest row maximum: rows of zeros stay zeros

CHUNK = 2**18  # values quantised at a time: they stay in the cache of a core
GROUP = 256  # neighbours that R mixes
DIGITS = 4  # of base 4, of a place in a group

LIMITS = {torch.float8_e4m3fn: E4M3_MAX, torch.int8: INT8_MAX}
_CODES = {torch.float8_e4m3fn: "fp8e4nv", torch.int8: "i8"}  # as Triton calls them


@dataclass(frozen=True, slots=True)
class RowForm:
    """How rows are kept. Raises `KernelError` for a dtype that has no limit."""

    dtype: torch.dtype  # int8 or e4m3
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in LIMITS:
            raise KernelError(
                f"8-bit rows are of {' or '.join(map(str, LIMITS))}, not {self.dtype}"
            )

    @property
    def limit(self) -> float:
        """The largest code."""
        return LIMITS[self.dtype]

    @property
    def codes(self) -> str:
        """The dtype as Triton calls it."""
        return _CODES[self.dtype]

    @property
    def name(self) -> str:
        return f"{self.codes}r" if self.rotated else self.codes


E4M3 = RowForm(torch.float8_e4m3fn)
INT8 = RowForm(torch.int8)
INT8R = RowForm(torch.int8, rotated=True)
# Those that a package's weights may have: what is INT8 there is rotated (docs/reference/rotation.md
# 0), and a float format gains nothing by it.
FORMS = (E4M3, INT8R)


@dataclass(frozen=True, slots=True)
class Rows:
    q: Tensor  # [M, D] e4m3 or int8
    s: Tensor  # [M] fp32
    rotated: bool = False  # q * s is R x, not x

    @property
    def form(self) -> RowForm:
        return RowForm(self.q.dtype, self.rotated)

    def dequantize(self) -> Tensor:
        """Returns q * s, [M, D] fp32: in the rotated basis, if the rows are."""
        return self.q.float() * self.s[:, None]

    def restore(self) -> Tensor:
        """Returns what the rows stand for, [M, D] fp32."""
        return rotate(self.dequantize()) if self.rotated else self.dequantize()


def rotate(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns R x for each row of x [..., D], in FP64 if x is, else in FP32: in `out`, if that is
    given, which may be x. Additions have one order, so that every machine makes the same package.

    Raises `KernelError` if D is no multiple of `GROUP`.
    """
    require_groups(x.shape[-1])
    wide = x if x.dtype == torch.float64 else x.float()
    if out is None:
        out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    _rotate_into(wide, out, _Held.of(wide.numel(), wide))
    return out


def require_groups(width: int) -> None:
    """Raises `KernelError` for rows that cannot be rotated."""
    if width % GROUP:
        raise KernelError(f"rows of {width} values cannot be rotated in groups of {GROUP}")


@dataclass(frozen=True, slots=True)
class _Held:
    """Memory of a rotation, used again and again: fresh pages take as long as the additions."""

    turns: tuple[Tensor, Tensor]  # [GROUP, groups at a time]
    sums: tuple[Tensor, Tensor]  # a quarter of it

    @classmethod
    def of(cls, values: int, like: Tensor) -> "_Held":
        count = max(1, min(values, CHUNK) // GROUP)
        held = [like.new_empty(size, count) for size in (GROUP, GROUP, GROUP // 4, GROUP // 4)]
        return cls((held[0], held[1]), (held[2], held[3]))


def _rotate_into(x: Tensor, out: Tensor, held: _Held) -> None:
    """Writes R x to `out`, which is contiguous. Groups become columns, as sums over rows that lie
    apart are the fast ones.
    """
    groups, made = x.reshape(-1, GROUP), out.view(-1, GROUP)
    step = held.turns[0].shape[1]
    for first in range(0, len(groups), step):
        part = groups[first : first + step].T
        turns = [turn.flatten()[: part.numel()] for turn in held.turns]
        turns[0].view(part.shape).copy_(part)
        sums = [one.flatten()[: part.numel() // 4] for one in held.sums]
        for digit in range(DIGITS):
            y, new = (turn.view(-1, 4, 4**digit, part.shape[1]) for turn in turns)
            left, right = (one.view(y[:, 0].shape) for one in sums)
            torch.add(y[:, 0], y[:, 1], out=left)
            left.add_(torch.add(y[:, 2], y[:, 3], out=right)).mul_(0.5)
            torch.sub(left[:, None], y, out=new)
            turns.reverse()
        made[first : first + step] = turns[0].view(part.shape).T


def quantize_rows(x: Tensor, form: RowForm = E4M3) -> Rows:
    """Quantises x [M, D], any float, and rotates it first if `form` is. NaN and infinity in x are
    the caller's mistake. Raises `KernelError` for a width that cannot be rotated.
    """
    rows, width = x.shape
    if form.rotated:
        require_groups(width)
    q = torch.empty(x.shape, dtype=form.dtype, device=x.device)
    s = torch.empty(rows, dtype=torch.float32, device=x.device)
    step = max(1, CHUNK // max(1, width))
    held, size = (
        torch.empty(min(step, rows), width, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    turning = _Held.of(held.numel(), held) if form.rotated else None
    for first in range(0, rows, step):
        part = x.detach()[first : first + step]
        wide = held[: len(part)].copy_(part)
        if turning is not None:
            _rotate_into(wide, wide, turning)
        scale = torch.abs(wide, out=size[: len(part)]).amax(dim=-1)
        scale = scale.clamp_min_(TINY).div_(form.limit)
        wide /= scale[:, None]
        # x / s exceeds the limit by a rounding at most, which rounding to 8 bits takes back
        q[first : first + step] = wide.round_() if form.dtype == torch.int8 else wide
        s[first : first + step] = scale
    return Rows(q, s, form.rotated)


def to_8bit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds half to even and saturates."""
    limit = LIMITS[dtype]
    x = x.clamp(-limit, limit)
    return x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)
