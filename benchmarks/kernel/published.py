"""Suite `published`: the model beside what others measured on GPUs that nobody here has.

A row whose kernel was compiled here from the same kind of source holds the model: `kind` says what
it is held to.

fitted    `STEP_WAIT_CYCLES` was chosen by it, so that it shows nothing
check     nothing was chosen by it
beside    other instructions, another tile or other overlaps than those of the kernel here: no test
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernel.estimate import EXPECTED, UPPER_BOUND, estimate
from benchmarks.kernel.model import GPUS, GpuModel
from benchmarks.kernel.work import LaunchWork, product, self_attention
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns
from engine.config import state_dir
from kernels.aot.compile import compile_kernels
from kernels.arch import SM89, SM90, SM120, Arch
from kernels.attention import ATTENTION
from kernels.gemm import GEMM
from kernels.spec import KernelSpec, Loop, Tuning

FITTED, CHECK, BESIDE = "fitted", "check", "beside"
WITHIN = 0.15  # of a published figure: what a check must hold

H100 = GpuModel("H100 SXM", 132, 1.83, 3350, 233_472, 1.83)
RTX_4060 = GpuModel("RTX 4060", 24, 2.31, 272, 102_400, 2.31)  # at the clock of that profile


@dataclass(frozen=True, slots=True)
class Published:
    """A rate that others measured, and the kernel here that is most like theirs."""

    name: str
    tflops: float
    source: str  # docs/reference/performance.md, if it is there
    kind: str
    gpu: GpuModel
    spec: KernelSpec
    arch: Arch
    work: LaunchWork


@dataclass(frozen=True, slots=True)
class PublishedRow:
    name: str
    gpu: str
    kind: str
    source: str
    tflops: float  # measured by others
    expected_tflops: float
    bound_tflops: float

    @property
    def difference(self) -> float:
        """How far what is expected lies from what was measured, as a share of that."""
        return self.expected_tflops / self.tflops - 1


def plain_attention(code: str, head: int, warps: int = 8) -> KernelSpec:
    """Attention in Triton's own way, tiles of 128 queries and 128 keys."""
    mma = {"fp8e4nv": "QGMMA", "fp16": "HGMMA"}[code]
    return KernelSpec(
        name=f"plain_attention.{code}.{head}.{warps}",
        device="device:attention_kernel",
        signature=f"*{code} *{code} *{code} *fp16 i32 fp32",
        constants={"HEAD": head},
        tuning={SM90: Tuning(warps, 3, {"BLOCK_Q": 128, "BLOCK_KEYS": 128}, "12.6")},
        multiples_of_16=(4,),
        loop=Loop({SM90: (mma,)}),
        package="benchmarks.kernel.plain",
    )


PLAIN_PRODUCT = KernelSpec(
    name="plain_product.fp16",
    device="device:product_kernel",
    signature="*fp16 *fp16 *fp16 i32 i32",
    constants={},
    tuning={SM89: Tuning(8, 4, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, "12.6")},
    multiples_of_16=(3, 4),
    loop=Loop({SM89: ("HMMA.16816.F16",)}),
    package="benchmarks.kernel.plain",
)


def _attention(head: int, tokens: int = 16384, width: int = 2048) -> LaunchWork:
    return LaunchWork(
        4.0 * tokens**2 * width, 5.0 * tokens * width,
        rows=tokens, columns=width // head, ending=3.0 * tokens * width,
    )  # fmt: skip


_LONG = self_attention(32 * 128)(32768)
PUBLISHED = (
    Published("Triton attention, FP16, head size 128", 482, "torch benchmark #2391; "
        "facebookexperimental/triton #205: 477, 487", FITTED, H100, plain_attention("fp16", 128),
        SM90, _attention(128)),
    Published("Triton attention, FP8, head size 128", 635, "C2", CHECK, H100,
        plain_attention("fp8e4nv", 128), SM90, _attention(128)),
    Published("Triton attention, FP8, head size 64", 511, "the same charts", BESIDE, H100,
        plain_attention("fp8e4nv", 64), SM90, _attention(64)),
    Published("Triton product, FP16 with FP16 sums", 51.1, "triton #10851: 89.9 % of the tensor "
        "cores", CHECK, RTX_4060, PLAIN_PRODUCT, SM89, product(2048, 2048, 2)(2048)),
    Published("Triton product, FP8, 3584^3", 1280, "C3", BESIDE, H100, GEMM["fp8"].bias, SM90,
        product(3584, 3584, 2)(3584)),
    Published("FBGEMM product, FP8 rows, 8192^3", 1126, "C3", BESIDE, H100, GEMM["fp8"].bias, SM90,
        product(8192, 8192, 2)(8192)),
    Published("cuBLASLt product, MXFP8, 4096^3", 600, "C3", BESIDE, GPUS[SM120], GEMM["mx"].bias,
        SM120, product(4096, 4096, 2)(4096)),
    Published("SageAttention2++ 8+8", 493, "C2", BESIDE, GPUS[SM89], ATTENTION["i8_fp8_f16"], SM89,
        _LONG),
    Published("SageAttention2++ 8+8", 643, "C2", BESIDE, GPUS[SM120], ATTENTION["i8_mx"], SM120,
        _LONG),
)  # fmt: skip


def measure_published(state: Path | None = None) -> tuple[str, list[PublishedRow]]:
    """Compiles the kernels and estimates their rates; nothing is measured."""
    wanted = [(each.spec, each.arch) for each in PUBLISHED]
    cubins = compile_kernels(wanted, state or state_dir())
    rows = []
    for each, cubin in zip(PUBLISHED, cubins, strict=True):
        blocks = each.spec.tuning[each.arch].blocks
        times = estimate(each.work, cubin, each.gpu, blocks)
        expected, bound = (each.work.flop / ms / 1e9 for ms in (times.ms, times.bound_ms))
        rows.append(
            PublishedRow(
                each.name, each.gpu.name, each.kind, each.source, each.tflops, expected, bound
            )
        )
    return "nothing: others measured, and the rest is estimated from machine code", rows


# --- shown


def published_table(rows: Sequence[PublishedRow]) -> str:
    heads = {"GPU": "", "kind": "", "measured elsewhere": ".0f", "expected": ".0f",
        "difference": "+.0%", "upper bound": ".0f"}  # fmt: skip
    lines = [
        (row.name, row.gpu, row.kind, row.tflops, row.expected_tflops, row.difference,
         row.bound_tflops)
        for row in rows
    ]  # fmt: skip
    return f"TFLOPS; sources: docs/reference/performance.md\n{columns(heads, lines)}"


def published_figures(rows: Sequence[PublishedRow]) -> list[Figure]:
    """What is estimated; what others measured stands in the names."""
    found = []
    for row in rows:
        name = f"{row.gpu}, {row.name}, {row.tflops:.0f} measured elsewhere ({row.kind})"
        for kind, rate in ((EXPECTED, row.expected_tflops), (UPPER_BOUND, row.bound_tflops)):
            found.append(Figure(f"{name}, {kind}", rate, "TFLOPS", 0.0, "higher", "estimate"))
    return found


SUITE = Suite(measure_published, published_table, published_figures)
