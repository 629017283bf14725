"""What FP8 sums cost on Hopper (and Ada) in the worst case: products that all have one sign.

A tensor core there keeps about 14 bits of a sum (docs/reference/performance.md A). Where products
have both signs the sum stays small, and what is dropped is less than E4M3 loses anyway
(tests/kernels/test_gemm.py). A coherent sum grows with every product, and drops more of each. The
figures are of a model on the CPU, against the exact sum of the same codes: an upper bound of what a
choice by speed alone may cost, estimated and not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.record import Figure
from benchmarks.timing import columns
from engine.config import SCAIL_14B
from kernels.fp8 import quantize_rows

Codes = np.ndarray  # [rows, K] fp64, values of E4M3
STEP = 32  # products that one step of a tensor core adds
BITS = 14  # of a sum, with the leading one
PROMOTED = 128  # products after which a kernel could move its sum to FP32; none of ours does
ROWS = 12  # of each operand


@dataclass(frozen=True, slots=True)
class SumRow:
    """One way to sum, over products of one sign."""

    products: str  # how they are drawn
    way: str  # of `kernels.gemm.GEMM`, and whether its sums were promoted to FP32
    depth: int  # K
    error: float  # relative, of the worst of all sums of codes; estimated

    @property
    def name(self) -> str:
        return f"coherent sums, {self.products}, K {self.depth}, gemm.{self.way}"


def hopper_product(a: Codes, b: Codes, promote: int) -> np.ndarray:
    """Sums codes as a Hopper is believed to: each step aligns 32 products and the sum so far to
    the largest of them, and drops what lies 13 bits below its leading one. After `promote` products
    the sum is added to a total in full.
    """
    total, running = np.zeros((2, len(a), len(b)))
    for k in range(0, a.shape[1], STEP):
        terms = a[:, None, k : k + STEP] * b[None, :, k : k + STEP]
        terms = np.concatenate([running[..., None], terms], axis=-1)
        _, exponent = np.frexp(np.abs(terms).max(-1, keepdims=True))
        unit = np.exp2(exponent - float(BITS))
        running = (np.trunc(terms / unit) * unit).sum(-1)
        if (k + STEP) % promote == 0:
            total, running = total + running, np.zeros_like(running)
    return total + running


def measure_sums(depth: int = SCAIL_14B.ffn) -> list[SumRow]:
    """A row for each way to sum, and each way to draw products of one sign."""
    rows = []
    for products, codes in _coherent(depth).items():
        exact = codes @ codes.T
        for way, promote in (("fp8", depth), (f"fp8 if promoted every {PROMOTED}", PROMOTED)):
            made = hopper_product(codes, codes, promote)
            error = float(np.max(np.abs(made - exact) / exact))
            rows.append(SumRow(products, way, depth, error))
    return rows


def _coherent(depth: int) -> Mapping[str, Codes]:
    """Operands of products with one sign: rows of sizes as of a normal distribution, and rows of
    one value, with each of the mantissas that E4M3 has.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, depth, generator=generator).abs()
    equal = np.repeat(np.arange(8.0, 16.0)[:, None], depth, axis=1)
    return {"sizes of a normal": quantize_rows(normal).q.double().numpy(), "all equal": equal}


def sums_table(rows: Sequence[SumRow]) -> str:
    return columns({"sum % (upper bound)": ".2f"}, [(row.name, 100 * row.error) for row in rows])


def sums_figures(rows: Sequence[SumRow]) -> list[Figure]:
    """Half of the last digit is their noise: the model draws nothing."""
    return [
        Figure(
            f"{row.name}: upper bound", round(100 * row.error, 2), "%", 0.005, "lower", "estimate"
        )
        for row in rows
    ]  # fmt: skip
