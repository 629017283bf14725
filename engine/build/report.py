"""Measures how far a package's weights are from the checkpoint's, and where that is unusual.

Errors are relative, |W - q s| / |W| with roots of summed squares, and exact: every value is read
back, for half the time that quantising took. A row's crest is its largest magnitude over its root
mean square; a row with one large value among small ones has a large crest, and INT8 loses its
small values. A row is an outlier if its error or its crest is far beyond what is usual for its
class: the linears of one kind and format in all blocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

from kernels.fp8 import LIMITS, TINY, Rows

CHUNK = 2**19  # values at a time: they stay in the cache of a core
ERROR_OUTLIER = 2.0  # times what is usual; E4M3 rounds no value worse than 2.4 times its average
CREST_OUTLIER = 4.0
EXACT = 1e-5  # an error below is rounding of FP32: copied codes have no other
ZERO = 1.0001 * TINY  # a row whose values are below is taken as one of zeros
SHOWN = 8  # outliers in the terminal; the JSON has all
OUTSIDE = "outside"  # the kind of all that is in no block
E4M3_IN_HALF = 256.0  # E4M3's bits are worth so much more than the same bits in FP16's places


@dataclass(frozen=True, slots=True)
class TensorError:
    """The errors of one matrix in fewer bits. Rows of zeros have neither error nor crest."""

    name: str
    kind: str  # qkv, o, cross_q, cross_o, up, down, text, vision, or OUTSIDE
    dtype: str
    values: int
    relative: float
    worst_row: float
    worst_row_index: int
    usual_row: float  # median
    crest: float  # the largest of all rows
    crest_index: int
    usual_crest: float  # median
    reason: str  # why this format
    copied: Sequence[str]  # its parts whose codes are those of the file: "self_attn.q"

    @property
    def form(self) -> str:
        return f"{self.dtype} copied" if self.copied else self.dtype


@dataclass(frozen=True, slots=True)
class Outlier:
    """A row that is far beyond its class."""

    name: str
    row: int
    what: str  # error or crest
    found: float
    usual: float  # median of the class

    def __str__(self) -> str:
        return (
            f"{self.name} row {self.row}: {self.what} {self.found:.3g}, "
            f"{self.found / self.usual:.1f} times the usual {self.usual:.3g}"
        )


def measure(
    name: str, weight: Tensor, rows: Rows, reason: str = "", copied: Sequence[str] = ()
) -> TensorError:
    """Measures the errors of `rows`, made of weight [out, in], any float, smoothed as it was."""
    limit, shift = LIMITS[rows.q.dtype], 1.0 if rows.q.dtype == torch.int8 else E4M3_IN_HALF
    unit, live = rows.s * shift, rows.s * limit > ZERO
    peak = _peaks(weight) / unit if copied else torch.full_like(unit, limit / shift)
    return _summary(name, weight, rows.q, unit, live * peak, reason, copied)


def measure_cast(name: str, weight: Tensor, stored: Tensor, reason: str = "") -> TensorError:
    """Measures the errors of `stored`, which is weight [out, in], any float, in 16 or 32 bits."""
    unit = weight.abs().amax(dim=1).float()
    peak = (unit > ZERO).float()
    return _summary(name, weight, stored, unit.clamp_min(TINY), peak, reason, ())


def _peaks(weight: Tensor) -> Tensor:
    """The largest magnitude of each row [out] fp32. Copied codes need not reach their limit."""
    low, high = torch.aminmax(weight, dim=1)
    return torch.maximum(high, -low).float()


def _summary(
    name: str,
    weight: Tensor,
    stored: Tensor,
    unit: Tensor,
    peak: Tensor,
    reason: str,
    copied: Sequence[str],
) -> TensorError:
    """Sums the errors up. Each row is divided by its unit [out] fp32, so that nothing under- or
    overflows; peak [out] is its largest magnitude in this unit, 0 for rows of zeros.
    """
    size, lost = _norms(weight, stored, unit)
    live = (peak > 0) & (size > 0)
    error = torch.where(live, lost / size, 0.0)
    crest = torch.where(live, peak * weight.shape[1] ** 0.5 / size, 0.0)
    whole = (size * unit).double().norm()
    worst, sharpest = int(error.argmax()), int(crest.argmax())
    return TensorError(
        name=name,
        kind=name.split(".")[2] if name.startswith("blocks.") else OUTSIDE,
        dtype=str(stored.dtype).removeprefix("torch."),
        values=weight.numel(),
        relative=float((lost * unit).double().norm() / whole) if bool(live.any()) else 0.0,
        worst_row=float(error[worst]),
        worst_row_index=worst,
        usual_row=_median(error[live]),
        crest=float(crest[sharpest]),
        crest_index=sharpest,
        usual_crest=_median(crest[live]),
        reason=reason,
        copied=[*copied],  # as JSON has it
    )


def _norms(weight: Tensor, stored: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the norms of rows and of their errors, [out] each, in their units, as codes are."""
    rows, width = weight.shape
    step = max(1, CHUNK // width)
    size, lost = torch.empty(rows), torch.empty(rows)
    held = torch.empty(min(step, rows), width)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        codes, divisor = stored[part], unit[part, None]
        exact = held[: len(codes)].copy_(weight[part])
        exact /= divisor
        torch.linalg.vector_norm(exact, dim=1, out=size[part])
        if codes.dtype == torch.float8_e4m3fn:
            exact -= _as_half(codes)
        elif codes.dtype == torch.int8:
            exact -= codes
        else:
            exact -= codes / divisor
        torch.linalg.vector_norm(exact, dim=1, out=lost[part])
    return size, lost


def _as_half(codes: Tensor) -> Tensor:
    """Makes E4M3 / E4M3_IN_HALF in FP16, exactly: PyTorch's own conversion is ten times slower.

    FP16 has one exponent bit more on top: sign and the other seven bits move apart around it.
    """
    wide = codes.view(torch.int8).to(torch.int16)
    return wide.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else 0.0


def report(errors: Sequence[TensorError]) -> dict[str, object]:
    """Makes the content of `report.json`: a summary of each class, outliers, and every tensor."""
    return {
        "classes": [
            {
                "kind": kind,
                "dtype": members[0].dtype,
                "copied": sum(len(one.copied) for one in members),
                "tensors": len(members),
                "values": sum(one.values for one in members),
                "relative": _mean_error(members),
                "worst_tensor": max(members, key=lambda one: one.relative).name,
                "worst_row": max(one.worst_row for one in members),
                "usual_row": median(one.usual_row for one in members),
                "crest": max(one.crest for one in members),
                "usual_crest": median(one.usual_crest for one in members),
            }
            for (kind, _), members in _classes(errors)
        ],
        "copied": [*copied_names(errors)],
        "outliers": [asdict(outlier) for outlier in find_outliers(errors)],
        "tensors": [asdict(one) for one in errors],
    }


def copied_names(errors: Iterable[TensorError]) -> Iterator[str]:
    """Names the weights whose codes are those of the file, as a checkpoint calls them."""
    for one in errors:
        block = one.name.rpartition(".")[0]
        yield from (f"{block}.{part}.weight" for part in one.copied)


def find_outliers(errors: Sequence[TensorError]) -> list[Outlier]:
    """Finds the tensors whose worst row is far beyond its class, the farthest first."""
    found = []
    for _, members in _classes(errors):
        row = median(one.usual_row for one in members)
        crest = median(one.usual_crest for one in members)
        for one in members:
            if one.worst_row > max(ERROR_OUTLIER * row, EXACT) and row > 0:
                found.append(Outlier(one.name, one.worst_row_index, "error", one.worst_row, row))
            if one.crest > CREST_OUTLIER * crest > 0:
                found.append(Outlier(one.name, one.crest_index, "crest", one.crest, crest))
    return sorted(found, key=lambda one: one.usual / one.found)


def lines(errors: Sequence[TensorError]) -> Iterator[str]:
    """Writes the report for a terminal of 80 columns."""
    yield f"{'weights':<10}{'format':<21}{'tensors':>8}{'error':>9}{'worst row':>11}{'crest':>8}"
    for (kind, form), members in _classes(errors):
        yield (
            f"{kind:<10}{form:<21}{len(members):>8}{_mean_error(members):>9.3%}"
            f"{max(one.worst_row for one in members):>11.3%}"
            f"{max(one.crest for one in members):>8.1f}"
        )
    if copied := [*copied_names(errors)]:
        yield f"copied: the 8-bit codes of {len(copied)} weights are those of the file"
    outliers = find_outliers(errors)
    for outlier in outliers[:SHOWN]:
        yield f"outlier: {outlier}"
    if len(outliers) > SHOWN:
        yield f"and {len(outliers) - SHOWN} more outliers"


def _classes(
    errors: Iterable[TensorError],
) -> list[tuple[tuple[str, str], list[TensorError]]]:
    """Groups errors by kind and form, in the order in which they come."""
    classes: dict[tuple[str, str], list[TensorError]] = {}
    for one in errors:
        classes.setdefault((one.kind, one.form), []).append(one)
    return list(classes.items())


def _mean_error(members: Sequence[TensorError]) -> float:
    """The root mean square over all values."""
    total = sum(one.values * one.relative**2 for one in members)
    return (total / sum(one.values for one in members)) ** 0.5
