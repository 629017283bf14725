"""What a block of the transformer does, step by step: the work of each kernel, and its time.

A step is a kernel of `engine.denoise.block.run_block`, or the few behind one operation; those that
do the same work twice are one step with a count. Work is that of S tokens of the 14B model with a
prompt that fills all 512 rows (docs/reference/performance.md B). All layers count alike: that the
last one keeps the video's tokens alone saves 0.6 %, and is left out here as it is there.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.random_package import form_of
from benchmarks.timing import WrongResult
from engine.config import HEAD_SIZE, TEXT_TOKENS, ModelConfig
from engine.denoise.block import BlockWeights, ContextKeys, run_block
from engine.memory import VISION_TOKENS
from engine.models.dit import Rope
from kernels.arch import Arch
from kernels.attention import variants
from kernels.gemm import GEMM
from kernels.ops import Ops

KEYS = TEXT_TOKENS + VISION_TOKENS
SHORT = {torch.int8: "i8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, slots=True)
class LaunchStep:
    name: str
    kind: str  # steps of one kind share a colour
    op: str  # field of `kernels.ops.Ops`
    case: str  # of `kernel_cases`, without the format: what its kernel is measured as
    count: int  # in a block


@dataclass(frozen=True, slots=True)
class LaunchWork:
    """Of one launch."""

    flop: float
    moved: float  # bytes: every input read once, every output written once
    traffic: float  # bytes that our kernels do move
    exponentials: float
    bits: int  # of the operands of its products


ATTENTION, PRODUCTS, FEED_FORWARD = "self attention", "products of attention", "feed forward"
CROSS, ROWS, ROPE = "cross attention", "norms and rows", "RMSNorm and RoPE"
KINDS = (ATTENTION, PRODUCTS, FEED_FORWARD, CROSS, ROPE, ROWS)

STEPS = (
    LaunchStep("modulate", ROWS, "modulate", "modulate", 3),
    LaunchStep("qkv", PRODUCTS, "gemm", "qkv", 1),
    LaunchStep("rope", ROPE, "rope", "rope", 1),
    LaunchStep("attention", ATTENTION, "attention", "attention", 1),
    LaunchStep("quantise", ROWS, "quantize", "quantize", 2),
    LaunchStep("o + residual", PRODUCTS, "gemm_residual", "o + residual", 2),
    LaunchStep("cross q", PRODUCTS, "gemm", "qkv", 1),
    LaunchStep("1 / rms of cross q", ROPE, "rms_inverse", "rms_inverse", 1),
    LaunchStep("cross attention", CROSS, "cross_attention", "cross_attention", 1),
    LaunchStep("up + GELU", FEED_FORWARD, "gemm_gelu", "up + gelu", 1),
    LaunchStep("quantise the inner", FEED_FORWARD, "quantize", "quantize", 1),
    LaunchStep("down + residual", FEED_FORWARD, "gemm_residual", "down + residual", 1),
)
ORDER = (
    "modulate", "qkv", "rope", "attention", "quantise", "o + residual",
    "modulate", "cross q", "1 / rms of cross q", "cross attention", "quantise", "o + residual",
    "modulate", "up + GELU", "quantise the inner", "down + residual",
)  # fmt: skip
_BY_NAME = {step.name: step for step in STEPS}


def work_of(step: LaunchStep, model: ModelConfig, tokens: int) -> LaunchWork:
    """One launch with S tokens."""
    s, d, f = float(tokens), model.dim, model.ffn

    def product(n: int, k: int, written: int) -> LaunchWork:
        moved = s * k + n * k + written * s * n
        return LaunchWork(2 * s * n * k, moved, moved, 0, 8)

    def rows(width: float, traffic: float | None = None) -> LaunchWork:
        return LaunchWork(0, s * width, s * (traffic or width), 0, 8)

    match step.name:
        case "modulate":
            return rows(5 * d)
        case "qkv":
            return product(3 * d, d, 2)
        case "rope":
            return rows(9 * d, 17 * d)  # kernels.rope: q and k are read twice, v and k again
        case "attention":
            return LaunchWork(4 * s * s * d, 5 * s * d, 5 * s * d, s * s * d / HEAD_SIZE, 8)
        case "quantise":
            return rows(3 * d)
        case "o + residual":
            return product(d, d, 8)
        case "cross q":
            return product(d, d, 2)
        case "1 / rms of cross q":
            return rows(2 * d)
        case "cross attention":
            moved = 4 * s * d + 8 * KEYS * d
            return LaunchWork(4 * s * KEYS * d, moved, moved, s * KEYS * d / HEAD_SIZE, 16)
        case "up + GELU":
            return product(f, d, 2)
        case "quantise the inner":
            return rows(3 * f)
        case "down + residual":
            return product(d, f, 8)
    raise AssertionError(f"no step is called {step.name}")


def candidates(step: LaunchStep, model: ModelConfig, arch: Arch) -> list[str]:
    """The cases of `kernel_cases` that do it; of several a worker takes the fastest at start-up."""
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
            width = model.ffn if step.name == "quantise the inner" else model.dim
            return [f"quantize.{SHORT[dtype]} {width}"]
        case "rope":
            return ["rope.i8"]  # of the form int8fp8
    return [step.case]


# --- times


class Stopwatch(Protocol):
    def mark(self) -> None:
        """A point between two steps."""
        ...

    def laps_ms(self) -> list[float]:
        """Between marks, when all work is done."""
        ...


class CudaStopwatch:
    """Events on the current stream: the host does not wait between steps."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def laps_ms(self) -> list[float]:
        self.events[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:])]


def timed(ops: Ops, stopwatch: Stopwatch, called: list[str]) -> Ops:
    """The same operations between two marks each; their names go to `called`."""

    def between(name: str, op: Callable[..., object]) -> Callable[..., object]:
        @wraps(op)
        def run(*given: object) -> object:
            stopwatch.mark()
            result = op(*given)
            stopwatch.mark()
            called.append(name)
            return result

        return run

    return replace(ops, **{f.name: between(f.name, getattr(ops, f.name)) for f in fields(ops)})


def timed_block(
    ops: Ops,
    weights: BlockWeights,
    keys: ContextKeys,
    x: Tensor,
    modulation: Tensor,
    rope: Rope,
    stopwatch: Stopwatch,
) -> dict[str, float]:
    """Milliseconds of each step in one block; `between`: from the first to the last mark, what is
    in no step. x is changed. Raises `WrongResult` if the block does not do what `ORDER` says.
    """
    called: list[str] = []
    run_block(timed(ops, stopwatch, called), weights, keys, x, modulation, rope)
    expected = [_BY_NAME[name].op for name in ORDER]
    if called != expected:
        raise WrongResult(f"a block called {called}, expected {expected}: mend block_steps.ORDER")
    laps = stopwatch.laps_ms()
    found = dict.fromkeys(_BY_NAME, 0.0)
    for name, ms in zip(ORDER, laps[::2], strict=True):
        found[name] += ms
    return found | {"between": sum(laps[1::2])}
