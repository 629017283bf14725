"""How near clips by kernels and clips by references are to exact ones, over many seeds.

A code that tips over moves a value by a whole step, so that rounding errors of two programs which
differ by one bit part within a few layers: of one clip the PSNR moves by some tenths of a decibel
whatever is changed. Means over seeds tell if one program is better.
"""

import math
import statistics
from dataclasses import dataclass, replace

from engine.recipes import RECIPES
from kernels.ops import native_ops, reference_ops
from tests.support.nano_clips import bank_of, exact, packaged, pairs, psnr, request_of, run
from virtual_gpu.orders import FORWARD

FRAMES = 5
GRAINS = (0, 1, 2)  # references whose residual stream is so many ulps larger


@dataclass(frozen=True)
class Closeness:
    kernels: list[float]  # PSNR of each seed's clip against the exact one
    references: list[list[float]]  # of each seed, by GRAINS

    @property
    def differences(self):
        """Kernels less references, in dB."""
        return [mine - statistics.mean(them) for mine, them in zip(self.kernels, self.references)]

    @property
    def difference(self):
        return statistics.mean(self.differences)

    @property
    def standard_error(self):
        return statistics.stdev(self.differences) / math.sqrt(len(self.differences))

    @property
    def noise(self):
        """How far a grain moves the PSNR of one clip: a standard deviation, in dB."""
        return math.sqrt(statistics.mean(statistics.variance(them) for them in self.references))

    @property
    def kernels_move(self):
        """How far the kernels move it, beside a reference: that of both, in dB."""
        moved = [mine - them[0] for mine, them in zip(self.kernels, self.references)]
        return math.sqrt(statistics.mean(one**2 for one in moved) / 2)


def grained(ops, ulps):
    """The same operations, but that LayerNorm is given so many ulps more of all values, which it
    takes out again: rounding is all that differs.
    """
    return replace(ops, modulate=lambda x, *rest: ops.modulate(x * (1 + ulps * 2.0**-23), *rest))


def closeness(arch, name, clips, folder):
    """Measures the first variants of an architecture on so many clips of two steps."""
    spec, ways = next(pairs(arch))
    ops = native_ops(bank_of(arch, [FORWARD]), arch, attention=spec, gemm=ways)
    ours = packaged(arch, ops)
    theirs = [packaged(arch, grained(reference_ops(spec, arch), ulps)) for ulps in GRAINS]
    found = Closeness([], [])
    for seed in range(clips):
        request = request_of(folder, replace(RECIPES["preview"][name], steps=2), FRAMES, seed)
        want = run(exact(), request)
        found.kernels.append(psnr(run(ours, request), want))
        found.references.append([psnr(run(one, request), want) for one in theirs])
    return found
