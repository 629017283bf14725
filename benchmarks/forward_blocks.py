"""One block of the transformer in each program, on the same tokens: ours, PyTorch, diffusers.

The plain block stands for the same weights as ours, so that results are compared before times.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from forward_place import Place, name_of
from kernel_suite import difference
from random_package import RandomWeights, random_package
from timing import require
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.block import (
    LINEARS,
    BlockWeights,
    ContextWeights,
    Weight,
    assemble,
    block_modulation,
    context_keys,
    run_block,
)
from engine.config import HEAD_SIZE, TEXT_TOKENS, ModelConfig
from engine.memory import VISION_TOKENS, Shape
from engine.models.attention import Attention, sdpa
from engine.models.dit import Block, Context, Rope, rope_tables

UPDATE_LIMIT = 0.12  # relative error of what a block adds: E4M3 twice in each product, and INT8


@dataclass(frozen=True, slots=True)
class Scene:
    """One block of ours, and what blocks are given."""

    weights: BlockWeights
    context_weights: ContextWeights
    x: Tensor  # [S, D]
    modulation: Tensor  # [6, D]
    context: Context
    rope: Rope


def drawn_scene(place: Place, shape: Shape) -> Scene:
    weights = RandomWeights(random_package(place.model, place.arch), place.device)
    names = [name for name in weights.package.names if name.startswith("blocks.0.")]
    held = weights.read(names)
    draw = partial(
        torch.randn,
        generator=torch.Generator(place.device).manual_seed(2),
        device=place.device,
    )
    rows, columns = shape.height // 16, shape.width // 16
    rope = rope_tables((shape.grid[0], rows, columns), True, place.device)
    dim = place.model.dim
    context = Context(draw(TEXT_TOKENS, dim), draw(VISION_TOKENS, dim))
    read = lambda name: held[f"blocks.0.{name}"]  # noqa: E731
    return Scene(
        assemble(BlockWeights, read),
        assemble(ContextWeights, read),
        draw(shape.tokens, dim),
        0.5 * draw(6, dim),
        context,
        rope,
    )


def measure_blocks(place: Place, shape: Shape) -> float | None:
    """Seconds of 40 plain BF16 blocks with the best attention of PyTorch; says all times."""
    scene = drawn_scene(place, shape)
    rope = scene.rope
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    plain = plain_block(place.model, scene.weights, scene.context_weights, dtype, sdpa)
    keys = context_keys(place.ops, scene.context_weights, scene.context.text, scene.context.vision)
    modulation = block_modulation(scene.weights, scene.modulation)

    def ours(x: Tensor) -> Tensor:
        return run_block(place.ops, scene.weights, keys, x, modulation, rope)

    def theirs() -> Tensor:
        return plain(scene.x, scene.modulation, scene.context, rope)

    say = partial(say_block, place, shape)
    best: tuple[float, SDPBackend] | None = None
    compared = False
    for backend in place.backends:
        with sdpa_kernel(backend):
            name = f"PyTorch {str(dtype).removeprefix('torch.')}, sdpa {backend.name.lower()}"
            try:
                want = theirs()
            except RuntimeError as error:  # this backend is not for this GPU, or does not fit
                say(name, None, note=str(error).strip().partition("\n")[0][:100])
                continue
            if not compared:
                check_block(place, shape, ours(scene.x.clone()), want, scene.x)
                compared = True
            del want
            ms = place.clock(theirs)
            say(name, ms)
        if ms is not None and (best is None or ms < best[0]):
            best = ms, backend
    require(compared, f"{name_of(shape)}: no plain block ran, so ours cannot be checked")
    held = scene.x.clone()
    say("ours", place.clock(lambda: ours(held)))
    measure_diffusers(place, shape, scene, None if best is None else best[1])
    return None if best is None else place.model.layers * best[0] / 1e3


def check_block(place: Place, shape: Shape, got: Tensor, want: Tensor, x: Tensor) -> None:
    """What was added to the tokens, ours and plain. Raises `WrongResult`."""
    error, cosine = difference(got - x, want - x)
    ok = error <= UPDATE_LIMIT
    place.say("check", size=name_of(shape), error=error, cosine=cosine, limit=UPDATE_LIMIT, ok=ok)
    require(ok, f"{name_of(shape)}: a block is off by {error:.1e}")


def measure_diffusers(place: Place, shape: Shape, scene: Scene, backend: SDPBackend | None) -> None:
    name = "diffusers WanTransformerBlock bfloat16"
    if find_spec("diffusers") is None:
        say_block(place, shape, name, None, note="not installed: pip install diffusers==0.42.1")
        return
    try:
        block = diffusers_block(place.model, scene.x, scene.context, scene.modulation, scene.rope)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            ms = place.clock(block)
    except RuntimeError as error:
        say_block(place, shape, name, None, note=str(error).strip().partition("\n")[0][:100])
        return
    say_block(place, shape, name, ms)


def say_block(place: Place, shape: Shape, program: str, ms: float | None, note: str = "") -> None:
    seconds = None if ms is None else place.model.layers * ms / 1e3
    place.say(
        "block", size=name_of(shape), program=program, ms=ms, seconds_of_all_layers=seconds,
        note=note,
    )  # fmt: skip


def plain_block(
    model: ModelConfig,
    weights: BlockWeights,
    context: ContextWeights,
    dtype: torch.dtype,
    attention: Attention,
) -> Block:
    """The block of `engine.models.dit` that these weights stand for, its linears in `dtype`."""
    device, ffn = weights.modulation.device, len(weights.up.bias)
    with torch.device("meta"):
        block = Block(replace(model, ffn=ffn), attention)
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
        for name, matrix, bias in zip(
            names, exact.chunk(len(names)), linear.bias.chunk(len(names)), strict=True
        ):
            held[f"{name}.weight"], held[f"{name}.bias"] = matrix.to(dtype), bias.to(dtype)
    block.load_state_dict({name: t.to(device) for name, t in held.items()}, assign=True)
    return block.requires_grad_(False).eval()


def diffusers_block(
    model: ModelConfig, x: Tensor, context: Context, modulation: Tensor, rope: Rope
) -> Callable[[], Tensor]:
    """The block of another library's Wan model, BF16, its own random weights: for times alone.

    x [S, D], modulation [6, D], as of `engine.models.dit.Block`. Raises `ImportError` without
    diffusers.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with x.device:
        theirs = WanTransformerBlock(
            model.dim, model.ffn, model.heads, "rms_norm_across_heads", True, 1e-6, model.dim
        )
    theirs = theirs.bfloat16().requires_grad_(False).eval()
    theirs.scale_shift_table.data = theirs.scale_shift_table.float()  # as the library keeps it
    rotary = tuple(
        side[:, 0].repeat_interleave(2, dim=1).view(1, len(x), 1, HEAD_SIZE)
        for side in (rope.cos, rope.sin)
    )
    tokens = x[None].bfloat16()
    seen = torch.cat([context.vision, context.text])[None].bfloat16()
    return lambda: theirs(tokens, seen, modulation[None], rotary)[0]
