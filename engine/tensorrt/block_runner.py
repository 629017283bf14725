"""The blocks of one evaluation as TensorRT plans: whole, or around our own attention.

    tensorrt   the plan `block` for each layer, with the layer's weights as its inputs
    hybrid     `pre`, then attention of `kernels.ops`, then `post`

It is experimental and never chosen by itself: somebody asks for it, and accepts that the licence of
TensorRT restricts offering it as a hosted service. Keys and values of text and picture are the
native program's, laid out as the plans want them. Source: docs/reference/tensorrt.md 8.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from engine.config import TEXT_TOKENS
from engine.denoise.block import ENDS, BlockWeights, ContextKeys, Weight, block_modulation
from engine.denoise.block_runner import BlockRunner, Blocks, Pass
from engine.diskcache import DiskCache
from engine.errors import Unavailable
from engine.machine.gpu import Gpu
from engine.package.folder import Package
from engine.tensorrt.library import INSTEAD, TensorRt, import_library
from engine.tensorrt.plans import KERNEL_BYTES, Host, Opener, TensorRtPlan, read_record
from kernels.cross_attention import CrossKeys
from kernels.ops import Ops
from kernels.spec import KernelError

log = logging.getLogger(__name__)

PROGRAMS: Mapping[str, tuple[str, ...]] = {"tensorrt": ("block",), "hybrid": ("pre", "post")}

PortTensors: TypeAlias = Mapping[str, Tensor]  # by the names of a plan's ports
RunBlock: TypeAlias = Callable[[PortTensors, int], None]  # x and the rest, S tokens: writes `out`
MakeRunner: TypeAlias = Callable[[Ops, Blocks], BlockRunner]


def open_program(
    package: Package,
    program: str,
    gpu: Gpu | None,
    state: Path,
    stream: Callable[[], int],
    find: Callable[[str], TensorRt] = import_library,
) -> MakeRunner:
    """Opens what `program`, a key of `PROGRAMS`, needs of a package, before its weights are read.

    `stream` gives the handle of PyTorch's current stream, `find` the library in a version. Raises
    `Unavailable` if package, GPU, driver or library do not have it, `BadPackage` as `Opener` does.
    """
    record = read_record(package)
    if gpu is None:
        raise Unavailable(f"--program {program} needs a GPU, and there is none: {INSTEAD}")
    host = Host(gpu, stream, DiskCache(state / "tensorrt", KERNEL_BYTES))
    opener = Opener(package, find(record.library), host)
    plans = [opener.open(name) for name in PROGRAMS[program]]
    log.info("program %s: experimental; TensorRT's licence restricts hosting it", program)
    if program == "tensorrt":
        (whole,) = plans
        return lambda _, weights: PlannedBlocks(whole.run, weights)
    pre, post = plans
    return lambda ops, weights: PlannedBlocks(around_attention(pre, post, ops), weights)


def around_attention(pre: TensorRtPlan, post: TensorRtPlan, ops: Ops) -> RunBlock:
    """Makes a block of two plans with our own attention between them."""

    def run(given: PortTensors, tokens: int) -> None:
        x = given["x"]
        # Each tensor is dropped once nobody reads it: they are most of the memory of a block.
        qkv = x.new_empty(1, tokens, 3 * x.shape[2], dtype=torch.bfloat16)
        pre.run({**given, "qkv": qkv}, tokens)
        cos, sin = given["cos"][0], given["sin"][0]
        heads = ops.rope(qkv[0], given["norm_q"], given["norm_k"], cos, sin)
        del qkv
        seen = ops.attention(heads, tokens)  # [S, D] bf16
        del heads
        post.run({**given, "attention": seen[None]}, tokens)

    return run


@dataclass(frozen=True, slots=True)
class PlannedBlocks:
    """Runs a plan, or two, for each block. An `engine.denoise.block_runner.BlockRunner`."""

    run: RunBlock
    weights: Blocks

    def __call__(self, given: Pass) -> Tensor:
        """Runs all blocks. A plan does not write where it reads, so two tensors alternate."""
        x, out = given.x, torch.empty_like(given.x)
        tables = {"cos": given.rope.cos[None, :, 0], "sin": given.rope.sin[None, :, 0]}
        keys = PlanKeys(given.context[0])
        for weights, seen in zip(self.weights, given.context, strict=True):
            own = block_modulation(weights, given.modulation)
            own_ports = {"x": x[None], "out": out[None], "modulation": own[None]}
            self.run({**own_ports, **tables, **keys.of(seen), **block_tensors(weights)}, len(x))
            x, out = out, x
        return x[: given.kept]


class PlanKeys:
    """Lays out `ContextKeys` as plans take them: every row of text, and no padding of tiles.

    Blocks differ in the values of their keys, not in how many there are. One copy of the text's is
    enough, as blocks run one after another; those of the picture are used where they lie.
    """

    def __init__(self, first: ContextKeys) -> None:
        """Takes the keys of any block of a clip. Raises `KernelError` for text of other lengths."""
        text, bias = first.text, first.text.bias.tolist()
        real = count_keys(bias)
        repeats = round(2 ** bias[real - 1])
        if real - 1 + repeats != TEXT_TOKENS:
            raise KernelError(
                f"plans take {TEXT_TOKENS} rows of text, padding included; got {real - 1 + repeats}"
            )
        self._vision = count_keys(first.vision.bias.tolist())
        self._rows = torch.arange(TEXT_TOKENS, device=text.k.device).clamp(max=real - 1)
        self._k, self._v = text.k.new_empty(2, TEXT_TOKENS, text.k.shape[1])

    def of(self, keys: ContextKeys) -> PortTensors:
        """Lays out those of one block, valid until the next ones are asked for."""
        _spread(keys.text, self._rows, self._k, self._v)
        vision = keys.vision
        return {
            "text_k": self._k[None],
            "text_v": self._v[None],
            "vision_k": vision.k[None, : self._vision],
            "vision_v": vision.v[None, : self._vision],
        }


def _spread(keys: CrossKeys, rows: Tensor, k: Tensor, v: Tensor) -> None:
    torch.index_select(keys.k, 0, rows, out=k)
    torch.index_select(keys.v, 0, rows, out=v)


def count_keys(bias: Sequence[float]) -> int:
    """Counts the keys that are no padding of a tile. They come first."""
    return sum(math.isfinite(value) for value in bias)


def block_tensors(weights: BlockWeights) -> dict[str, Tensor]:
    """Names the weights of a block as the ports of plans, which are called as in a package. Codes
    get an axis of one before theirs.
    """
    made: dict[str, Tensor] = {}
    for field in fields(weights):
        held: Tensor | Weight = getattr(weights, field.name)
        if isinstance(held, Weight):
            parts = held.rows.q[None], held.rows.s, held.bias
            made |= {f"{field.name}.{end}": part for end, part in zip(ENDS, parts, strict=True)}
        else:
            made[field.name] = held
    # two are part of the modulation that a plan is given, whose name the first one has; FP8 weights
    # have no multipliers inside the feed forward
    del made["modulation"], made["smooth"], made["inner"]
    return made
