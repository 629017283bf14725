"""Operations that kernels and references do on the same operands; the clip goes on with what the
references made.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from kernels.fp8 import Rows
from kernels.ops import Ops
from virtual_gpu.measure import places, relative_error


@dataclass
class Found:
    """What was found of one operation over a whole clip."""

    calls: int = 0
    error: float = 0.0  # the largest of a call: values, or scales of codes
    codes: int = 0
    others: int = 0  # codes that differ
    farthest: int = 0  # by so many places


@dataclass
class Beside:
    """The operations of `kernels`, each compared with `references`."""

    kernels: Ops
    references: Ops
    found: dict[str, Found] = field(default_factory=lambda: defaultdict(Found))

    def ops(self):
        """The record of functions that a denoiser takes."""
        names = ("modulate", "quantize", "rms_inverse", "rope", "attention", "cross_attention")
        products = ("gemm", "gemm_gelu")
        both = {name: self._both(name) for name in (*names, *products)}
        return Ops(**both, gemm_residual=self._residual)

    def _both(self, name):
        mine, theirs = (getattr(ops, name) for ops in (self.kernels, self.references))

        def call(*operands):
            # what an operation uses up, both get
            copies = [one.clone() if isinstance(one, torch.Tensor) else one for one in operands]
            want = theirs(*operands)
            self._note(self.found[name], mine(*copies), want)
            return want

        return call

    def _residual(self, a, b, bias, gate, x):
        before = x.clone()
        mine = x.clone()
        self.kernels.gemm_residual(a, b, bias, gate, mine)
        self.references.gemm_residual(a, b, bias, gate, x)
        self._note(self.found["gemm_residual"], mine - before, x - before)

    def _note(self, found, got, want):
        found.calls += 1
        if isinstance(got, torch.Tensor):
            values, codes = [(got, want)], []
        elif isinstance(got, Rows):
            values, codes = [(got.s, want.s)], [(got.q, want.q)]
        else:
            values = [(got.qs, want.qs), (got.ks, want.ks), (got.vs, want.vs)]
            codes = [(got.q, want.q), (got.k, want.k), (got.vt, want.vt)]
        found.error = max(found.error, *(relative_error(*pair) for pair in values))
        for pair in codes:
            apart = (places(pair[0]) - places(pair[1])).abs()
            found.codes += apart.numel()
            found.others += int((apart > 0).sum())
            found.farthest = max(found.farthest, int(apart.max()))
