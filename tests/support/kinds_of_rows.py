"""Twelve kinds of rows that linears of a transformer are given, and weights that read them.

They are those of docs/reference/rotation.md 2: channels of unequal size, some far larger than the
others and read by smaller weights, tokens that are off by a constant, values after GELU with rare
or steady giants. Each kind is drawn from a seed, so that errors can be averaged over draws.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, OUTPUTS = 160, 320
WIDTH, FFN = 5120, 13824
HEAD = 128


@dataclass(frozen=True)
class Draw:
    """Random numbers of one draw."""

    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def student(self, degrees: int, *shape: int) -> Tensor:
        return self.normal(*shape) / self.normal(*shape, degrees).square().mean(-1).sqrt()

    def some(self, count: int, of: int) -> Tensor:
        return torch.randperm(of, generator=self.generator)[:count]

    def factors(self, width: int, count: int, least: float, most: float) -> Tensor:
        """Ones, but for `count` channels, whose factors are even on a logarithmic scale."""
        found = torch.ones(width)
        at = self.some(count, width)
        found[at] = least * torch.exp(self.uniform(count) * math.log(most / least))
        return found


Operands = tuple[Tensor, Tensor]  # rows [M, K], weight [N, K]


def _normal_weight(draw: Draw, width: int) -> Tensor:
    weight = draw.normal(OUTPUTS, width) * width**-0.5
    return weight * torch.exp(0.3 * draw.normal(OUTPUTS, 1))


def _tailed_weight(draw: Draw, width: int) -> Tensor:
    """Heavy tails, columns of unequal size, and a few values 20 times as large."""
    weight = draw.student(5, OUTPUTS, width) * width**-0.5
    weight = weight * torch.exp(0.3 * draw.normal(OUTPUTS, 1)) * torch.exp(0.4 * draw.normal(width))
    at = torch.randint(0, weight.numel(), (OUTPUTS,), generator=draw.generator)
    weight.view(-1)[at] *= 20
    return weight


def _modulated(draw: Draw) -> Tensor:
    x = F.layer_norm(draw.normal(ROWS, WIDTH) + 0.5 * draw.normal(1, WIDTH), (WIDTH,))
    return x * torch.exp(0.4 * draw.normal(WIDTH)) + 0.3 * draw.normal(WIDTH)


def _attended(draw: Draw) -> Tensor:
    """The result of attention: heads of unequal size, with means over the tokens."""
    heads = WIDTH // HEAD
    sizes = torch.exp(0.7 * draw.normal(heads)).repeat_interleave(HEAD)
    shared = draw.normal(ROWS, heads).repeat_interleave(HEAD, 1) * draw.normal(1, WIDTH)
    return sizes * (0.35 * draw.normal(ROWS, WIDTH) + 0.8 * draw.normal(1, WIDTH) + 0.5 * shared)


def _inner(draw: Draw) -> Tensor:
    z = 1.5 * draw.normal(ROWS, FFN) * torch.exp(0.5 * draw.normal(FFN))
    return F.gelu(z - 0.7 + 0.5 * draw.normal(FFN), approximate="tanh")


def _moved(x: Tensor, weight: Tensor, factors: Tensor) -> Operands:
    """Makes channels of x larger, and the weights that read them smaller."""
    return x * factors, weight / factors


def _gauss(draw: Draw) -> Operands:
    return draw.normal(ROWS, WIDTH), _normal_weight(draw, WIDTH)


def _uneven(draw: Draw) -> Operands:
    return _modulated(draw), _tailed_weight(draw, WIDTH)


def _many_outliers(draw: Draw) -> Operands:
    factors = draw.factors(WIDTH, 80, 20, 100)
    return _moved(_modulated(draw), _normal_weight(draw, WIDTH), factors)


def _few_outliers(draw: Draw) -> Operands:
    factors = draw.factors(WIDTH, 3, 200, 400)
    return _moved(_modulated(draw), _normal_weight(draw, WIDTH), factors)


def _offset(draw: Draw) -> Operands:
    """An eighth of the rows is off by a constant."""
    x = _modulated(draw)
    x[draw.some(ROWS // 8, ROWS)] += 5.77  # as in the table: the error falls with it
    return x, _normal_weight(draw, WIDTH)


def _heads(draw: Draw) -> Operands:
    return _attended(draw), _tailed_weight(draw, WIDTH)


def _heads_with_outliers(draw: Draw) -> Operands:
    factors = draw.factors(WIDTH, 80, 20, 100)
    return _moved(_attended(draw), _tailed_weight(draw, WIDTH), factors)


def _gelu(draw: Draw) -> Operands:
    return _inner(draw), _normal_weight(draw, FFN)


def _gelu_with_outliers(draw: Draw) -> Operands:
    factors = draw.factors(FFN, FFN // 64, 20, 100)
    return _moved(_inner(draw), _normal_weight(draw, FFN), factors)


def _rare_giants(draw: Draw) -> Operands:
    """Two channels are at 300 and 900 in 5 % of the rows."""
    x = _inner(draw)
    at = draw.some(ROWS // 20, ROWS)
    x[at, 777], x[at, 5000] = 300.0, 900.0
    return x, _tailed_weight(draw, FFN)


def _steady_giant(draw: Draw) -> Tensor:
    x = _inner(draw)
    x[:, 777] = 300 * torch.exp(0.2 * draw.normal(ROWS))
    return x


def _steady_giant_hardly_read(draw: Draw) -> Operands:
    x, weight = _steady_giant(draw), _normal_weight(draw, FFN)
    weight[:, 777] /= 100
    return x, weight


def _steady_giant_read(draw: Draw) -> Operands:
    return _steady_giant(draw), _normal_weight(draw, FFN)


KINDS: Mapping[str, Callable[[Draw], Operands]] = {
    "gauss": _gauss,
    "ln+mod": _uneven,
    "80 channels": _many_outliers,
    "3 channels": _few_outliers,
    "row offset": _offset,
    "attention out": _heads,
    "attention out, 80 channels": _heads_with_outliers,
    "gelu": _gelu,
    "gelu, 216 channels": _gelu_with_outliers,
    "gelu, rare giants": _rare_giants,
    "gelu, a giant hardly read": _steady_giant_hardly_read,
    "gelu, a giant": _steady_giant_read,
}


def drawn(kind: str, seed: int) -> Operands:
    """Draws rows [160, K] and a weight [320, K] of a kind."""
    return KINDS[kind](Draw(torch.Generator().manual_seed(seed)))
