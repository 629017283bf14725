"""Compares one block of the transformer in our kernels and in PyTorch, on the same tokens.

The plain block has the weights of ours, so that results are compared before times are taken. It
runs with each attention of PyTorch, and all are timed in turns.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.denoiser.forward_place import ForwardPlace, name_of
from benchmarks.denoiser.random_package import RandomWeights, random_package
from benchmarks.kernel.gpu import difference
from benchmarks.timing import interleaved, require, spread
from engine.config import TEXT_TOKENS
from engine.denoise.block import (
    LINEARS,
    BlockWeights,
    ContextWeights,
    Weight,
    assemble,
    block_modulation,
    context_keys,
    run_block,
)
from engine.memory import VISION_TOKENS, ClipShape
from engine.models.attention import sdpa
from engine.models.dit import Block, Context, Rope, rope_tables

UPDATE_LIMIT = 0.12  # relative error of what a block adds: E4M3 twice in each product, and INT8

BlockRun = Callable[[], Tensor]  # -> tokens [S, D]


@dataclass(frozen=True, slots=True)
class BlockScene:
    """The weights of one block of ours, and the inputs of blocks."""

    weights: BlockWeights
    context_weights: ContextWeights
    x: Tensor  # [S, D]
    modulation: Tensor  # [6, D]
    context: Context
    rope: Rope


def drawn_scene(place: ForwardPlace, shape: ClipShape) -> BlockScene:
    """Random weights and tokens, the same in every run."""
    weights = RandomWeights(random_package(place.model, place.arch), place.device)
    names = [name for name in weights.package.names if name.startswith("blocks.0.")]
    held = weights.read(names)
    generator = torch.Generator(place.device).manual_seed(2)
    draw = partial(torch.randn, generator=generator, device=place.device)
    rows, columns = shape.height // 16, shape.width // 16
    dim = place.model.dim
    context = Context(draw(TEXT_TOKENS, dim), draw(VISION_TOKENS, dim))
    read = lambda name: held[f"blocks.0.{name}"]  # noqa: E731
    return BlockScene(
        assemble(BlockWeights, read),
        assemble(ContextWeights, read),
        draw(shape.tokens, dim),
        0.5 * draw(6, dim),
        context,
        rope_tables((shape.grid[0], rows, columns), True, place.device),
    )


def our_block(place: ForwardPlace, scene: BlockScene) -> Callable[[Tensor], Tensor]:
    """Runs one block on tokens [S, D], which it changes."""
    context = scene.context
    keys = context_keys(place.ops, scene.context_weights, context.text, context.vision)
    modulation = block_modulation(scene.weights, scene.modulation)
    return lambda x: run_block(place.ops, scene.weights, keys, x, modulation, scene.rope)


def plain_block(place: ForwardPlace, scene: BlockScene) -> Block:
    """The block of `engine.models.dit` that the weights of a scene stand for."""
    weights, context, dtype = scene.weights, scene.context_weights, place.dtype
    with torch.device("meta"):
        block = Block(replace(place.model, ffn=len(weights.up.bias)), sdpa)
    held: dict[str, Tensor] = {
        "modulation": weights.modulation[None],
        "self_attn.norm_q.weight": weights.norm_q,
        "self_attn.norm_k.weight": weights.norm_k,
        "norm3.weight": weights.norm3_scale + 1,
        "norm3.bias": weights.norm3_shift,
        "cross_attn.norm_q.weight": context.cross_norm_q,
        "cross_attn.norm_k.weight": context.text_norm_k,
        "cross_attn.norm_k_img.weight": context.vision_norm_k,
    }
    smooth = {"qkv": weights.smooth[0], "up": weights.smooth[1]}
    for field, names in LINEARS.items():
        linear: Weight = getattr(context if field in ("text", "vision") else weights, field)
        exact = linear.rows.dequantize()
        if field in smooth:
            exact *= smooth[field]
        parts = exact.chunk(len(names)), linear.bias.chunk(len(names))
        for name, matrix, bias in zip(names, *parts, strict=True):
            held[f"{name}.weight"], held[f"{name}.bias"] = matrix.to(dtype), bias.to(dtype)
    block.load_state_dict({name: t.to(place.device) for name, t in held.items()}, assign=True)
    return block.requires_grad_(False).eval()


def measure_blocks(place: ForwardPlace, shape: ClipShape) -> float | None:
    """Seconds of 40 plain BF16 blocks with the best attention of PyTorch; says all times."""
    scene = drawn_scene(place, shape)
    plain, ours = plain_block(place, scene), our_block(place, scene)
    plains = plain_works(place, shape, scene, plain)
    update = next(iter(plains.values()))() - scene.x
    error, cosine = difference(ours(scene.x.clone()).sub_(scene.x), update)
    place.say("check", size=name_of(shape), error=error, cosine=cosine, limit=UPDATE_LIMIT,
        ok=error <= UPDATE_LIMIT)  # fmt: skip
    require(error <= UPDATE_LIMIT, f"{name_of(shape)}: a block is off by {error:.1e}")
    held = scene.x.clone()
    works = {plain_name(place, backend): run for backend, run in plains.items()}
    works["ours"] = lambda: ours(held)
    del update
    times = interleaved(works, place.clock)
    for program, found in times.items():
        say_block(place, shape, program, found)
    found = [times[plain_name(place, backend)] for backend in plains]
    return min((place.model.layers * statistics.median(ms) / 1e3 for ms in found if ms),
        default=None)  # fmt: skip


def plain_works(
    place: ForwardPlace, shape: ClipShape, scene: BlockScene, plain: Block
) -> dict[SDPBackend, BlockRun]:
    """The plain block with each attention that runs here. Raises `WrongResult` if none does."""
    found: dict[SDPBackend, BlockRun] = {}
    for backend in place.backends:
        run = under(backend, plain, scene)
        try:
            run()
        except RuntimeError as error:  # this backend is not for this GPU, or does not fit
            say_block(place, shape, plain_name(place, backend), [], note=first_line(error))
        else:
            found[backend] = run
    require(bool(found), f"{name_of(shape)}: no plain block ran, so ours cannot be checked")
    return found


def under(backend: SDPBackend, block: Block, scene: BlockScene) -> BlockRun:
    """Runs a plain block with this attention of PyTorch and no other."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return block(scene.x, scene.modulation, scene.context, scene.rope)

    return run


def plain_name(place: ForwardPlace, backend: SDPBackend) -> str:
    return f"PyTorch {str(place.dtype).removeprefix('torch.')}, sdpa {backend.name.lower()}"


def first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:100]
    return text or type(error).__name__


def say_block(
    place: ForwardPlace, shape: ClipShape, program: str, times: Sequence[float], note: str = ""
) -> None:
    """`times`: medians in ms; none, where there is no clock or a note says why."""
    ms, noise = spread(times) or (None, None)
    seconds = None if ms is None else place.model.layers * ms / 1e3
    place.say(
        "block", size=name_of(shape), program=program, ms=ms, noise_ms=noise,
        seconds_of_all_layers=seconds, note=note,
    )  # fmt: skip
