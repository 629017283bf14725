"""The steps of a block of the transformer, and the work of each kernel.

A step is a kernel of `engine.denoise.block.run_block`, or the few behind one operation; those that
do the same work twice are one step with a count. Work is that of S tokens of the 14B model with a
prompt that fills all 512 rows (docs/reference/performance.md B). All layers count alike: that the
last one could keep the video's tokens alone would save 0.6 % (docs/reference/performance.md D), and
is left out. So is what is done for some tokens, to find what all have in common (`OF_FEW`): by the
same estimates 0.06 to 0.16 % of a forward, without launches of a few values.
"""

from dataclasses import dataclass

from benchmarks.denoiser.random_package import FORM
from benchmarks.kernel.cases import short_name
from benchmarks.kernel.work import WorkOf, cross_attention, product, rows, self_attention
from engine.config import SCAIL_14B, TEXT_TOKENS
from engine.memory import VISION_TOKENS, ClipShape
from kernels.arch import Arch
from kernels.attention import variants
from kernels.gemm import GEMM

SIZES = (ClipShape(512, 896, 81), ClipShape(416, 672, 81))
KEYS = TEXT_TOKENS + VISION_TOKENS
D, F = SCAIL_14B.dim, SCAIL_14B.ffn


@dataclass(frozen=True, slots=True)
class LaunchStep:
    name: str
    kind: str  # steps of one kind share a colour
    case: str  # of `kernel.cases`, for a `way` to multiply and a `form` of rows
    count: int  # in a block
    work: WorkOf


ATTENTION, PRODUCTS, FEED_FORWARD = "self attention", "products of attention", "feed forward"
CROSS, ROWS, ROPE = "cross attention", "norms and rows", "RMSNorm and RoPE"
KINDS = (ATTENTION, PRODUCTS, FEED_FORWARD, CROSS, ROPE, ROWS)

# Operations of a block on 64 tokens and less (docs/reference/rotation.md 4.2).
OF_FEW = ("cross_attention", "cross_attention", "quantize", "gemm_residual")

STEPS = (
    LaunchStep("modulate", ROWS, "modulate.{form}", 3, rows(D, 5)),
    LaunchStep("qkv", PRODUCTS, "gemm.{way} qkv", 1, product(3 * D, D, 2)),
    # kernels.rope: q and k are read twice, v and k again
    LaunchStep("rope", ROPE, "rope.{attention}", 1, rows(D, 9, again=8)),
    LaunchStep("attention", ATTENTION, "attention", 1, self_attention(D)),
    LaunchStep("quantise", ROWS, f"quantize.{{form}} {D}", 2, rows(D, 3)),
    LaunchStep("o + residual", PRODUCTS, "gemm.{way} o + residual", 2, product(D, D, 8)),
    LaunchStep("cross q", PRODUCTS, "gemm.{way} qkv", 1, product(D, D, 2)),
    LaunchStep("1 / rms of cross q", ROPE, "rms_inverse", 1, rows(D, 2)),
    LaunchStep("cross attention", CROSS, "cross_attention", 1, cross_attention(D, KEYS)),
    LaunchStep("up + GELU", FEED_FORWARD, "gemm.{way} up + gelu", 1, product(F, D, 2)),
    LaunchStep("quantise the inner", FEED_FORWARD, f"quantize.{{form}} {F}", 1, rows(F, 3)),
    LaunchStep("down + residual", FEED_FORWARD, "gemm.{way} down + residual", 1,
        product(D, F, 8)),
)  # fmt: skip


def candidates(step: LaunchStep, arch: Arch) -> list[str]:
    """The cases of `kernel.cases` that do it; of several a worker takes the fastest at start-up."""
    if step.kind == ATTENTION:
        return [spec.name for spec in variants(arch.attention, arch)]
    ways = [n for n, way in GEMM.items() if way.dtype == FORM.dtype and arch in way.bias.tuning]
    told = {"form": short_name(FORM), "attention": arch.attention}
    names = [step.case.format(way=way, **told) for way in ways]
    return list(dict.fromkeys(names))


def name_of(shape: ClipShape) -> str:
    return f"{shape.height}x{shape.width}x{shape.frames}"
