"""Chooses the 8-bit rows that suit each linear best, from its inputs in a real clip.

`generate --stages DIR` keeps, per input channel of each linear, the largest magnitude and the mean
square (engine/stage_dump.py). From them `choose` takes rotated INT8 or E4M3 and a multiplier of the
input (engine/build/columns.py), for the least expected error of the product.

Errors of rounding have no mean and do not know of each other. So with x m + d in place of x m and
W / m + e in place of W / m, to first order, over tokens t and outputs o,

    mean_t sum_o (error of y_to)^2  =  sum_j mean_t d_tj^2 sum_o (W_oj / m_j)^2      activation
                                     + sum_j mean_t (x_tj m_j)^2 sum_o e_oj^2        weight

for rotated rows with R (x m) and R (W / m) in place of both. Both are given relative to
sum_j mean_t x_tj^2 sum_o W_oj^2, the output of channels that do not know of each other. The true
output may be larger or smaller, but is the same for every choice.

e is measured: rows of W, spread evenly, are quantised.
d depends on the scale s of the token:

    INT8 rotated  R makes all channels of a group g alike, with the variance v_g, the mean over the
                  group of (m_j^2 mean_t x_tj^2). The largest of K normal values is sqrt(2 ln K)
                  times their deviation: s^2 = 2 ln K max_g v_g / 127^2, and d^2 = s^2 / 12
                  (docs/reference/rotation.md 1.3).
    E4M3          d^2 = (E4M3_ERROR x)^2, and s^2 / 12 with the step of its subnormal numbers; s is
                  that of the largest channel

In E4M3 the largest value of all tokens bounds s, but a channel that is large once in a clip spoils
one token, not all. So a channel is thought to be at its largest value, or else zero, as often as
gives its mean square. Of all that could have been seen this makes the largest s^2 if channels are
independent.

Smoothing as in SmoothQuant (arXiv 2211.10438) shifts the difficulty from x to W, but by root mean
squares instead of maxima, m = rms(W)^(1 - a) / rms(x)^a. Several a are tried; rotated rows also try
the columns made equal, which need no clip. Multipliers are no powers of two: they go into FP32
tables and into weights before these are rounded to 8 bits, where exactness gains nothing.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.build.columns import equalised, smoothed, square_sums
from engine.config import ModelConfig
from engine.errors import BadCheckpoint, BadRequest, MissingModel
from engine.models.attention import sdpa
from engine.models.dit import Block, Linear
from engine.models.tensorfile import TensorFile, is_finite
from engine.stage_dump import ACTIVATIONS
from kernels.fp8 import E4M3_MAX, GROUP, INT8_MAX, RowForm, quantize_rows, rotate

ALPHAS = (0.25, 0.5, 0.75)
ROTATED_ALPHAS = (*ALPHAS, 1.0)
EQUALISED = "equal columns"
SAMPLED = 512  # rows that stand for a weight: 2.5 million values or more
# a multiplier must come below this share of the plain error, or it may be a fault of the estimate
WORTHWHILE = 0.97
# root mean square for one value: docs/reference/kernels.md 4 has sqrt(2) times it
E4M3_ERROR = 0.0265
E4M3_SMALLEST = 2**-9  # subnormal, in units of the row scale


@dataclass(frozen=True, slots=True)
class Channels:
    """The inputs of one linear over a whole clip."""

    absmax: Tensor  # [in] fp32
    mean_square: Tensor  # [in] fp32

    def padded(self, width: int) -> "Channels":
        """Adds channels that are always zero, up to `width`."""
        more = width - len(self.absmax)
        return Channels(F.pad(self.absmax, (0, more)), F.pad(self.mean_square, (0, more)))


@dataclass(frozen=True, slots=True)
class Activations:
    """The inputs of all linears, named as `blocks.0.self_attn.q`; those of q, k and v are equal."""

    seen: Mapping[str, Channels]

    def channels(self, name: str) -> Channels:
        return self.seen[name]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected errors of a product in one form, relative to its output."""

    form: RowForm
    how: str  # the multiplier is made; "": there is none
    activation: float
    weight: float

    @property
    def total(self) -> float:
        return math.hypot(self.activation, self.weight)

    def __str__(self) -> str:
        rotated, how = " rotated" if self.form.rotated else "", f" {self.how}" if self.how else ""
        dtype = str(self.form.dtype).removeprefix("torch.")
        return f"{dtype}{rotated}{how} {100 * self.total:.2f} %"


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """The form of one linear, and the multipliers of its input."""

    form: RowForm
    smooth: Tensor  # [in] fp32: multiplies the input; the weight's columns are divided by it
    estimates: tuple[Estimate, ...]  # of each allowed form at its best, the chosen one first
    reason: str

    @classmethod
    def plain(cls, form: RowForm, width: int, reason: str = "not calibrated") -> "FormatChoice":
        return cls(form, torch.ones(width), (), reason)


def load_activations(folder: Path, config: ModelConfig) -> Activations:
    """Reads the inputs of every linear of every block from a folder that `generate --stages` wrote.

    Raises `BadRequest` if there are none, `BadCheckpoint` if it is damaged or of another model.
    """
    path = folder / ACTIVATIONS
    try:
        file = TensorFile(path)
    except MissingModel as error:
        raise BadRequest(
            f"{folder} holds no {ACTIVATIONS}. Calibration needs a folder that "
            "`python -m engine generate --stages` wrote with this model."
        ) from error
    with torch.device("meta"):
        block = Block(config, sdpa)
    widths = {
        f"blocks.{n}.{name}": module.in_features
        for n in range(config.layers)
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    }
    blocks = (name for name in file if name.startswith("blocks."))
    strange = sorted(name for name in blocks if name.rpartition(".")[0] not in widths)
    if strange:
        raise BadCheckpoint(
            f"{path} holds {strange[0]}, which the checkpoint's {config.layers} blocks have not: "
            "it is of another model. Make it again with this one."
        )
    return Activations({name: _channels(file, name, width) for name, width in widths.items()})


def choose(
    weight: Tensor,
    seen: Channels | None,
    allowed: Sequence[RowForm],
    default: RowForm,
    can_smooth: bool,
    kept: Sequence[RowForm] = (),
) -> FormatChoice:
    """Chooses the form with the least expected error for weight [out, in] fp32, finite. In the
    forms of `kept` its rows are there already, and without multipliers nothing of it is rounded.

    Without `seen` it is `default`: rotated rows with equal columns, others as they are. Of equal
    errors `default` wins too. The largest weight of SCAIL takes 200 MB more, and some seconds.
    """
    width = weight.shape[1]
    if seen is None and not (default.rotated and can_smooth):
        return FormatChoice.plain(default, width)
    if seen is None:
        reason = f"not calibrated, {EQUALISED}"
        return FormatChoice(default, equalised(square_sums(weight)), (), reason)
    assert len(seen.absmax) == width
    columns = equalised(square_sums(weight)) if can_smooth else torch.ones(width)
    rows = weight[:: -(-len(weight) // SAMPLED) | 1]  # odd, so that it meets both halves of a pair
    rows = rows / rows.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    peak = seen.absmax.double()
    largest = peak.amax().clamp_min(torch.finfo(torch.float32).tiny)
    peak, power = peak / largest, seen.mean_square.double() / largest.square()
    gain = rows.square().sum(dim=0, dtype=torch.float64)
    if not float(power @ gain) > 0:
        return FormatChoice.plain(default, width, "its input or its weight is zero throughout")

    sample = _Sample(rows, gain, peak, power)
    best: list[tuple[Estimate, Tensor]] = []
    for form in sorted(allowed, key=lambda one: one != default):
        ones = torch.ones(width)
        plain = (_estimate(sample, form, "", ones, is_kept=form in kept), ones)
        tried = _multipliers(sample, form, columns) if can_smooth else ()
        others = [(_estimate(sample, form, how, m), m) for how, m in tried]
        least = min(others, key=lambda one: one[0].total, default=plain)
        best.append(least if least[0].total < WORTHWHILE * plain[0].total else plain)
    best.sort(key=lambda one: one[0].total)
    estimates = tuple(estimate for estimate, _ in best)
    return FormatChoice(estimates[0].form, best[0][1], estimates, " < ".join(map(str, estimates)))


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is known of a linear, in units of its largest weight and input."""

    rows: Tensor  # [R, in] fp32, of the weight
    gain: Tensor  # [in] fp64, their square sums
    peak: Tensor  # [in] fp64, of the inputs
    power: Tensor  # [in] fp64, mean squares


def _multipliers(sample: _Sample, form: RowForm, columns: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The multipliers that are tried, and how they are made. `columns`: those that need no clip."""
    if form.rotated:
        yield EQUALISED, columns
    for alpha in ROTATED_ALPHAS if form.rotated else ALPHAS:
        yield f"smoothed by {alpha:g}", smoothed(sample.power, sample.gain, alpha)


def _estimate(
    sample: _Sample, form: RowForm, how: str, m: Tensor, is_kept: bool = False
) -> Estimate:
    """Estimates the errors of one form with the multipliers m [in] fp32. Of rows that are kept as
    they are, the weight has none.
    """
    wide = m.double()
    output = sample.power @ sample.gain
    power = sample.power * wide.square()
    scaled = sample.rows / m
    if form.rotated:
        power = power.unflatten(0, (-1, GROUP)).mean(dim=1).repeat_interleave(GROUP)
        rounded = _rotated_noise(power)
        scaled = rotate(scaled)
    else:
        rounded = _e4m3_noise(sample.peak * wide, power)
    activation = rounded @ (sample.gain / wide.square())
    weight = torch.zeros((), dtype=torch.float64)
    if not is_kept:
        lost = scaled - quantize_rows(scaled, RowForm(form.dtype)).dequantize()
        weight = lost.square().sum(dim=0, dtype=torch.float64) @ power
    return Estimate(
        form, how, math.sqrt(float(activation / output)), math.sqrt(float(weight / output))
    )


def _rotated_noise(power: Tensor) -> Tensor:
    """Estimates mean_t d_tj^2 [in] fp64 of INT8 for channels of this variance, those of a group
    alike.
    """
    largest = 2 * math.log(len(power)) * power.amax()
    return (largest / INT8_MAX**2 / 12).expand(len(power))


def _e4m3_noise(peak: Tensor, power: Tensor) -> Tensor:
    """Estimates mean_t d_tj^2 [in] fp64 for channels that are at their `peak` or zero."""
    peaks, order = peak.sort()
    at_peak = torch.where(peak > 0, power / peak.square(), 0.0).clamp(max=1.0)[order]
    larger_absent = (1 - at_peak).flip(0).cumprod(0).flip(0).roll(-1)
    larger_absent[-1] = 1.0
    share = at_peak * larger_absent  # of tokens whose scale is that of this channel
    uniform = (peaks / E4M3_MAX * E4M3_SMALLEST).square() / 12

    # sum over tokens of min(uniform, power): those below `power` as they are, the others capped
    below = torch.searchsorted(uniform, power)
    noise_below = F.pad((share * uniform).cumsum(0), (1, 0))[below]
    share_above = F.pad(share.flip(0).cumsum(0).flip(0), (0, 1))[below]
    return noise_below + power * share_above + E4M3_ERROR**2 * power


def _channels(file: TensorFile, name: str, width: int) -> Channels:
    absmax = _read(file, f"{name}.absmax", width)
    mean_square = _read(file, f"{name}.mean_square", width)
    most = absmax.double().square() * (1 + 1e-5) + torch.finfo(torch.float32).tiny
    if not bool((mean_square <= most).all()):
        raise BadCheckpoint(
            f"{file.path}: {name}.mean_square is above the square of {name}.absmax, which no "
            "values have: the file is damaged. Make it again."
        )
    return Channels(absmax, mean_square)


def _read(file: TensorFile, name: str, width: int) -> Tensor:
    if name not in file:
        raise BadCheckpoint(
            f"{file.path} lacks {name}: it is of another model, or of a job that was broken off. "
            "Make it again with this checkpoint."
        )
    with file.open(name) as tensor:
        if tuple(tensor.shape) != (width,) or tensor.dtype != torch.float32:
            raise BadCheckpoint(
                f"{file.path}: {name} is {list(tensor.shape)} {tensor.dtype}; [{width}] "
                "torch.float32 is expected. It is of another model; make it again with this one."
            )
        if not is_finite(tensor) or bool((tensor < 0).any()):
            raise BadCheckpoint(
                f"{file.path}: {name} holds values that are negative or not finite; magnitudes "
                "are expected. Make it again."
            )
        return tensor.clone()
