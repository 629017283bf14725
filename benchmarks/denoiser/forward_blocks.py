"""One block of the transformer in each program, on the same tokens: ours, PyTorch, diffusers.

The plain block and those of diffusers have the weights of ours, so that results are compared before
times, and all are timed in turns.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.denoiser.forward_place import ForwardPlace, name_of
from benchmarks.kernel.peers import (
    COMPILER,
    DIFFUSERS,
    TORCHAO,
    TRITON,
    PeerLibrary,
    PeerWork,
    interleaved,
    lacking,
)
from benchmarks.kernel.suite import difference, spread
from benchmarks.random_package import RandomWeights, random_package
from benchmarks.timing import require
from engine.config import HEAD_SIZE, TEXT_TOKENS, ModelConfig
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
from engine.models.attention import Attention, sdpa
from engine.models.dit import EPS, Block, Context, Rope, rope_tables

UPDATE_LIMIT = 0.12  # relative error of what a block adds: E4M3 twice in each product, and INT8
FP8_LIMIT = 0.12  # the same of torchao: E4M3 twice in each product, all else BF16
BF16_LIMIT = 0.03  # tokens and all between operations in BF16
# parts of the names of `engine.models.dit.Block`, and those of diffusers
DIFFUSERS_NAMES = (
    ("norm3.", "norm2."), ("self_attn.", "attn1."), ("cross_attn.", "attn2."),
    (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."),
    (".k_img.", ".add_k_proj."), (".v_img.", ".add_v_proj."), (".norm_k_img.", ".norm_added_k."),
    ("ffn.0.", "ffn.net.0.proj."), ("ffn.2.", "ffn.net.2."), ("modulation", "scale_shift_table"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockScene:
    """One block of ours, and what blocks are given."""

    weights: BlockWeights
    context_weights: ContextWeights
    x: Tensor  # [S, D]
    modulation: Tensor  # [6, D]
    context: Context
    rope: Rope


def drawn_scene(place: ForwardPlace, shape: ClipShape) -> BlockScene:
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
    return BlockScene(
        assemble(BlockWeights, read),
        assemble(ContextWeights, read),
        draw(shape.tokens, dim),
        0.5 * draw(6, dim),
        context,
        rope,
    )


@dataclass(frozen=True, slots=True)
class PeerForm:
    """Diffusers' block in one of the ways in which people run it."""

    program: str
    needs: tuple[PeerLibrary, ...]
    on_cpu: bool  # False: what it needs is there, and still needs a GPU
    limit: float  # of the relative error of what it adds
    finish: Callable[[nn.Module], nn.Module]


def eager(block: nn.Module) -> nn.Module:
    return block


def compiled(block: nn.Module) -> nn.Module:
    """When it is called first. `dynamic`: else the second size would get kernels for any size."""
    block.compile(dynamic=False)
    return block


def fp8_rows(block: nn.Module) -> nn.Module:
    """Linears of E4M3: weights with a scale a row, inputs with a scale a token."""
    from torchao.quantization import (  # pyright: ignore[reportMissingImports] - of one peer
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    quantize_(block, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return compiled(block)


FORMS = (
    PeerForm("diffusers WanTransformerBlock bfloat16", (DIFFUSERS,), True, BF16_LIMIT, eager),
    PeerForm(
        "diffusers WanTransformerBlock bfloat16, compiled",
        (DIFFUSERS, TRITON, COMPILER), False, BF16_LIMIT, compiled,
    ),
    PeerForm(
        "diffusers WanTransformerBlock torchao FP8, compiled",
        (DIFFUSERS, TRITON, COMPILER, TORCHAO), False, FP8_LIMIT, fp8_rows,
    ),
)  # fmt: skip


def measure_blocks(place: ForwardPlace, shape: ClipShape) -> float | None:
    """Seconds of 40 plain BF16 blocks with the best attention of PyTorch; says all times."""
    scene = drawn_scene(place, shape)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    plain = plain_block(place.model, scene.weights, scene.context_weights, dtype, sdpa)
    keys = context_keys(place.ops, scene.context_weights, scene.context.text, scene.context.vision)
    modulation = block_modulation(scene.weights, scene.modulation)

    def ours(x: Tensor) -> Tensor:
        return run_block(place.ops, scene.weights, keys, x, modulation, scene.rope)

    plains: dict[SDPBackend, PeerWork] = {}
    update: Tensor | None = None
    for backend in place.backends:
        run = under(backend, lambda: plain(scene.x, scene.modulation, scene.context, scene.rope))
        try:
            added = run() - scene.x
        except RuntimeError as error:  # this backend is not for this GPU, or does not fit
            say_block(place, shape, plain_name(dtype, backend), [], note=first_line(error))
            continue
        plains[backend] = run
        update = added if update is None else update
    require(update is not None, f"{name_of(shape)}: no plain block ran, so ours cannot be checked")
    assert update is not None
    added = ours(scene.x.clone()).sub_(scene.x)
    error = check_block(place, shape, "ours", added, update, UPDATE_LIMIT)
    require(error <= UPDATE_LIMIT, f"{name_of(shape)}: a block is off by {error:.1e}")
    del added
    quick = {backend: place.clock(run) for backend, run in plains.items()}
    best = min(quick, key=lambda backend: quick[backend] or 0.0)
    held = scene.x.clone()
    works = {plain_name(dtype, backend): run for backend, run in plains.items()}
    works["ours"] = lambda: ours(held)
    make = partial(diffusers_block, place.model, plain, scene)
    for form in FORMS:
        begin = lambda form=form: under(best, make(form.finish))  # noqa: E731
        work = begun(place, shape, form, begin, scene.x, update)
        if work is not None:
            works[form.program] = work
    del update
    times = interleaved(works, place.clock)
    for program, found in times.items():
        say_block(place, shape, program, found)
    found = [times[plain_name(dtype, backend)] for backend in plains]
    seconds = [place.model.layers * statistics.median(ms) / 1e3 for ms in found if ms]
    return min(seconds, default=None)


def begun(
    place: ForwardPlace,
    shape: ClipShape,
    form: PeerForm,
    begin: Callable[[], Callable[[], Tensor]],
    x: Tensor,
    update: Tensor,
) -> PeerWork | None:
    """Its work: done once, so compiled, and found right. None: a line says why there is none."""
    note = lacking(form.needs, on_gpu=form.on_cpu or place.device.type == "cuda")
    if not note:
        try:
            work = begin()
            added = work() - x
        except (RuntimeError, ImportError, AssertionError) as error:  # torchao asserts its GPU
            note = first_line(error)
        else:
            error = check_block(place, shape, form.program, added, update, form.limit)
            if error <= form.limit:
                return work
            note = f"wrong: off by {error:.1e}, limit {form.limit}, so there is no time"
    say_block(place, shape, form.program, [], note)
    return None


def check_block(
    place: ForwardPlace, shape: ClipShape, program: str, got: Tensor, want: Tensor, limit: float
) -> float:
    """The relative error of what was added to the tokens [S, D]; says it."""
    error, cosine = difference(got, want)
    place.say(
        "check", size=name_of(shape), program=program, error=error, cosine=cosine, limit=limit,
        ok=error <= limit,
    )  # fmt: skip
    return error


def under(backend: SDPBackend, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """With this attention of PyTorch and no other."""

    def bound() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return bound


def plain_name(dtype: torch.dtype, backend: SDPBackend) -> str:
    return f"PyTorch {str(dtype).removeprefix('torch.')}, sdpa {backend.name.lower()}"


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
    model: ModelConfig, plain: Block, scene: BlockScene, finish: Callable[[nn.Module], nn.Module]
) -> Callable[[], Tensor]:
    """The block of another library's Wan model in BF16, with the weights of the plain one.

    Returns tokens [S, D] bf16. Raises `ImportError` without diffusers, and what `finish` raises.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    ffn = plain.state_dict()["ffn.0.bias"].numel()
    with torch.device("meta"):
        theirs = WanTransformerBlock(
            model.dim, ffn, model.heads, "rms_norm_across_heads", True, EPS, model.dim
        )
    state = {their_name(name): tensor for name, tensor in plain.state_dict().items()}
    theirs.load_state_dict({name: in_their_type(name, x) for name, x in state.items()}, assign=True)
    block = finish(theirs.requires_grad_(False).eval())
    rope, modulation = scene.rope, scene.modulation[None]
    rotary = tuple(
        side[:, 0].repeat_interleave(2, dim=1).view(1, len(scene.x), 1, HEAD_SIZE)
        for side in (rope.cos, rope.sin)
    )
    tokens = scene.x[None].bfloat16()
    seen = torch.cat([scene.context.vision, scene.context.text])[None].bfloat16()
    return lambda: block(tokens, seen, modulation, rotary)[0]


def their_name(name: str) -> str:
    """Of a tensor of `engine.models.dit.Block`."""
    for ours, theirs in DIFFUSERS_NAMES:
        name = name.replace(ours, theirs)
    return name


def in_their_type(name: str, tensor: Tensor) -> Tensor:
    """What the library keeps in FP32 stays so."""
    return tensor.float() if name.startswith(("scale_shift_table", "norm2.")) else tensor.bfloat16()
