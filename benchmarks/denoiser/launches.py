"""The steps of a block of the transformer, and the work of each kernel.

A step is a kernel of `engine.denoise.block.run_block`, or the few behind one operation; those that
do the same work twice are one step with a count. Work is that of S tokens of the 14B model with a
prompt that fills all 512 rows (docs/reference/performance.md B). All layers count alike: that the
last one could keep the video's tokens alone would save 0.6 % (docs/reference/performance.md D), and
is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.denoiser.random_package import form_of
from benchmarks.kernel.cases import SHORT
from engine.config import HEAD_SIZE, SCAIL_14B, TEXT_TOKENS
from engine.memory import VISION_TOKENS
from kernels.arch import Arch
from kernels.attention import variants
from kernels.gemm import GEMM

KEYS = TEXT_TOKENS + VISION_TOKENS
D, F = SCAIL_14B.dim, SCAIL_14B.ffn


@dataclass(frozen=True, slots=True)
class LaunchWork:
    """The work of one launch."""

    flop: float = 0.0
    moved: float = 0.0  # bytes: every input read once, every output written once
    traffic: float = 0.0  # bytes that our kernels do move
    exponentials: float = 0.0
    bits: int = 8  # of the operands of its products


WorkOf = Callable[[float], LaunchWork]  # of S tokens


@dataclass(frozen=True, slots=True)
class LaunchStep:
    name: str
    kind: str  # steps of one kind share a colour
    op: str  # field of `kernels.ops.Ops`
    case: str  # of `kernel.cases`, without the format: what its kernel is measured as
    count: int  # in a block
    work: WorkOf


def product(n: int, k: int, written: int) -> WorkOf:
    """A product [S, k] x [k, n] of 8 bits that writes `written` bytes for each value."""

    def work(s: float) -> LaunchWork:
        moved = s * k + n * k + written * s * n
        return LaunchWork(2 * s * n * k, moved, moved)

    return work


def rows(width: int, nbytes: int, traffic: int | None = None) -> WorkOf:
    """A pass over tokens that moves so many bytes for each value; ours moves `traffic`."""
    return lambda s: LaunchWork(moved=nbytes * s * width, traffic=(traffic or nbytes) * s * width)


def self_attention(s: float) -> LaunchWork:
    return LaunchWork(4 * s * s * D, 5 * s * D, 5 * s * D, s * s * D / HEAD_SIZE)


def cross_attention(s: float) -> LaunchWork:
    moved = 4 * s * D + 8 * KEYS * D
    return LaunchWork(4 * s * KEYS * D, moved, moved, s * KEYS * D / HEAD_SIZE, 16)


ATTENTION, PRODUCTS, FEED_FORWARD = "self attention", "products of attention", "feed forward"
CROSS, ROWS, ROPE = "cross attention", "norms and rows", "RMSNorm and RoPE"
KINDS = (ATTENTION, PRODUCTS, FEED_FORWARD, CROSS, ROPE, ROWS)

STEPS = (
    LaunchStep("modulate", ROWS, "modulate", "modulate", 3, rows(D, 5)),
    LaunchStep("qkv", PRODUCTS, "gemm", "qkv", 1, product(3 * D, D, 2)),
    # kernels.rope: q and k are read twice, v and k again
    LaunchStep("rope", ROPE, "rope", "rope", 1, rows(D, 9, traffic=17)),
    LaunchStep("attention", ATTENTION, "attention", "attention", 1, self_attention),
    LaunchStep("quantise", ROWS, "quantize", "quantize", 2, rows(D, 3)),
    LaunchStep("o + residual", PRODUCTS, "gemm_residual", "o + residual", 2,
        product(D, D, 8)),
    LaunchStep("cross q", PRODUCTS, "gemm", "qkv", 1, product(D, D, 2)),
    LaunchStep("1 / rms of cross q", ROPE, "rms_inverse", "rms_inverse", 1, rows(D, 2)),
    LaunchStep("cross attention", CROSS, "cross_attention", "cross_attention", 1, cross_attention),
    LaunchStep("up + GELU", FEED_FORWARD, "gemm_gelu", "up + gelu", 1, product(F, D, 2)),
    LaunchStep("quantise the inner", FEED_FORWARD, "quantize", "quantize", 1,
        rows(F, 3)),
    LaunchStep("down + residual", FEED_FORWARD, "gemm_residual", "down + residual", 1,
        product(D, F, 8)),
)  # fmt: skip


def candidates(step: LaunchStep, arch: Arch) -> list[str]:
    """The cases of `kernel.cases` that do it; of several a worker takes the fastest at start-up."""
    form = form_of(arch)[1]
    dtype = form.down if step.name in ("quantise the inner", "down + residual") else form.others
    match step.op:
        case "attention":
            return [spec.name for spec in variants("int8fp8", arch)]
        case "gemm" | "gemm_gelu" | "gemm_residual":
            ways = [n for n, way in GEMM.items() if way.dtype == dtype and arch in way.bias.tuning]
            return [f"gemm.{name} {step.case}" for name in ways]
        case "modulate":
            return [f"modulate.{SHORT[dtype]}"]
        case "quantize":
            width = F if step.name == "quantise the inner" else D
            return [f"quantize.{SHORT[dtype]} {width}"]
        case "rope":
            return ["rope.i8"]  # of the form int8fp8
    return [step.case]
