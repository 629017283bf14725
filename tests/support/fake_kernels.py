"""A GPU that computes small problems by the definitions and takes the time that it is told to."""

import torch

from engine.machine.gpu import Gpu
from engine.machine.kernel_choice import choose_variants
from kernels.aot.cubin import Cubin, spec_digest
from kernels.arch import SM89
from kernels.attention import ATTENTION, variant_reference
from kernels.fp8 import E4M3, Rows
from kernels.gemm import (
    GEMM,
    gemm_gelu_reference,
    gemm_reference,
    gemm_residual_reference,
)
from kernels.layout import Qkv8
from kernels.modulate import QUANTIZE
from kernels.spec import KernelError
from kernels.trial import TIMED_PRODUCT, TIMED_TOKENS

GPU = Gpu("NVIDIA GeForce RTX 4090", "GPU-1f2e", (8, 9), (12, 7), "565.57.01", 25 * 10**9, None)
FP8 = torch.float8_e4m3fn
# in order of preference
FIRST, SECOND, THIRD = "i8_fp8_f16_narrow", "i8_fp8_f16_wide", "i8_fp8_f16"
F32 = "i8_fp8_f32"
FORM = [ATTENTION[name] for name in (FIRST, SECOND, THIRD, F32)]  # all variants of int8fp8 on sm89
PRODUCTS = [*GEMM["i8"].specs, *GEMM["i8_tall"].specs]
QUANTISE = QUANTIZE[5120, E4M3]  # a kernel that has no other variant


def cubin(spec, arch=SM89):
    """Makes a cubin whose code begins with the toolkit's release, for a driver that looks at it."""
    toolkit = spec.tuning[arch].toolkit
    return Cubin(
        spec.name, arch.name, spec_digest(spec, arch), "", "kernel", 8, 1000, 0, 40, 8, toolkit,
        None, f"{toolkit} {spec.name}".encode(),
    )  # fmt: skip


class Time:
    """A clock that stands still unless something takes time."""

    def __init__(self):
        self.s = 1000.0

    def now(self):
        return self.s


class Fake:
    """A bank that computes small problems by the definitions and takes the time it is told to."""

    def __init__(self, arch=SM89, check_ms=1.0, **times):
        self.arch, self.time, self.check_ms = arch, Time(), check_ms
        self.times = {name.replace("__", "."): ms for name, ms in times.items()}
        self.loaded, self.timed, self.checked = [], [], []
        self.spoil, self.refuse = {}, {}  # name -> what to do with the result; -> what to raise

    def load(self, cubin):
        if cubin.name in self.refuse:
            raise self.refuse[cubin.name]
        self.loaded.append(cubin.name)

    def tuning(self, spec):
        if spec.name not in self.loaded:
            raise KernelError(f"kernel {spec.name} is not loaded")
        return spec.tuning[self.arch]

    def launch(self, spec, grid, *arguments):
        self.tuning(spec)
        *tensors, tokens, _, _ = arguments
        if tokens in (TIMED_TOKENS, TIMED_PRODUCT[0]):
            self.timed.append(spec.name)
            return
        self.checked.append(spec.name)
        self.time.s += self.check_ms / 1000
        compute(spec, self.tuning(spec), tensors, tokens)
        self.spoil.get(spec.name, lambda out: out)(tensors[-1])

    def clock(self, run):
        run()
        ms = self.times.get(self.timed[-1], 1.0)
        self.time.s += ms / 1000
        return ms


def compute(spec, tuning, tensors, tokens):
    if spec.name.startswith("attention."):
        *operands, out = tensors
        out.copy_(variant_reference(spec, tuning, Qkv8(*operands, tokens)))
        return
    aq, a_s, bq, b_s, bias, *rest = tensors
    a, b = Rows(aq, a_s), Rows(bq, b_s)
    if spec.name.endswith("residual"):
        gemm_residual_reference(a, b, bias, *rest)
    else:
        define = gemm_gelu_reference if spec.name.endswith("gelu") else gemm_reference
        *vectors, out = rest
        out.copy_(define(a, b, bias, *vectors))


def choose(fake, specs, state, digest="d1", gpu=GPU, **options):
    cubins = [cubin(spec, fake.arch) for spec in specs]
    cpu = torch.device("cpu")
    options = {"clock": fake.clock, "now": fake.time.now} | options
    return choose_variants(cubins, digest, gpu, fake, cpu, state, **options)


def found(choices, op):
    return next(choice for choice in choices.ops if choice.op == op)
