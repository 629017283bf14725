"""Suite `forward`: one evaluation of the 14B transformer on this GPU, beside a plain BF16 block.

Weights are drawn on the GPU. A block of ours is held against the plain one of the same weights
before both are timed in turns. A file gets a line of JSON after each time; memory stands beside the
plan. `--dry` does the same by references on a CPU, tiny, without times.
"""

import gc
import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.denoiser.launches import SIZES, name_of
from benchmarks.denoiser.random_package import FORM, RandomWeights, random_package
from benchmarks.kernel.cubins import compiled, load
from benchmarks.kernel.gpu import current_stream, here, median_ms, relative_error, run_once, say
from benchmarks.kernel.peers import PeerTimer
from benchmarks.record import Figure, Suite, machine
from benchmarks.timing import columns, interleaved, require
from engine.config import LATENT_CHANNELS, SCAIL_14B, TEXT_TOKENS, TINY, ModelConfig, state_dir
from engine.denoise import block as fused
from engine.denoise.cuda_graphs import CudaGraphRecorder, GraphedBlocks, GraphRecorder
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.sampler import grid
from engine.flow import Conditions, Recipe
from engine.machine.gpu import find_gpu
from engine.machine.kernel_choice import attention_kernel, choose_variants, gemm_ways
from engine.memory import VISION_TOKENS, ClipShape, EncoderBytes, MemoryPlan, plan
from engine.models.attention import sdpa
from engine.models.dit import Block, Context, Rope, rope_tables
from kernels.arch import SM90, Arch
from kernels.fp8 import rotate
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, reference_ops
from kernels.trial import trial_ms

NO_ENCODERS = EncoderBytes(0, 0, 0)  # in this process
DRY_SIZES = (ClipShape(64, 96, 5),)
RECIPE = Recipe("euler", 50, 1.0, 5.0)  # so many steps that graphs are recorded
UPDATE_LIMIT = 0.12  # relative error of what a block adds: E4M3 twice in each product, and INT8
WAYS = ("launched", "graph")
# The attention of the plain block is the first of these that runs on the GPU.
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """A time of one size."""

    arch: str
    size: str
    what: str  # an evaluation in one of `WAYS`; "our block", "plain block": as many as the model's
    seconds: float | None  # None: the machine gives no times
    error: float | None = None  # relative, of what our block adds
    peak_bytes: int | None = None  # the most that the GPU held for this process until now
    planned_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ForwardPlace:
    """A device, and everything that runs the transformer on it."""

    arch: Arch
    device: torch.device
    model: ModelConfig
    ops: Ops
    record: GraphRecorder
    sizes: Sequence[ClipShape]
    clock: PeerTimer
    free_bytes: int  # before this process touched the GPU
    out: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def measure_forward(
    kernels: Path | None = None, out: Path = Path("forward.jsonl"), *, dry: bool = False
) -> tuple[str, list[ForwardRow]]:
    """Raises `WrongResult` for a block or an evaluation that is wrong."""
    with prepared(kernels, out, dry) as place:
        rows = measure_sizes(place)
    return f"the plain block with the same weights, off by at most {UPDATE_LIMIT:g}", rows


@contextmanager
def prepared(kernels: Path | None, out: Path, dry: bool) -> Iterator[ForwardPlace]:
    """`kernels`: what `run.py cubins` wrote, else they are compiled.

    Raises `UnsupportedGpu` and what loading kernels raises.
    """
    if dry:
        cpu, free = torch.device("cpu"), 2**62
        again = lambda run: partial(run_once, run)  # noqa: E731 - in place of a graph
        yield ForwardPlace(SM90, cpu, TINY, reference_ops(), again, DRY_SIZES, run_once, free, out)
        return
    arch, gpu, device = here(), find_gpu(), torch.device("cuda:0")
    assert gpu is not None
    cubins = [*(compiled(arch) if kernels is None else load(kernels)).values()]
    torch.zeros(1, device=device)  # the context that the launcher shares
    with KernelBank([], arch, current_stream) as bank:
        codes = "".join(sorted(cubin.sha256 for cubin in cubins))
        digest = hashlib.sha256(codes.encode()).hexdigest()
        choices = choose_variants(cubins, digest, gpu, bank, device, state_dir(), trial_ms)
        say(out, "variants", {"ops": [asdict(choice) for choice in choices.ops]})
        ways = gemm_ways(choices, {FORM.dtype})
        ops = native_ops(bank, arch, attention=attention_kernel(choices, arch.attention), gemm=ways)
        free = gpu.free_bytes or gpu.memory_bytes
        yield ForwardPlace(
            arch, device, SCAIL_14B, ops, CudaGraphRecorder(), SIZES, median_ms, free, out
        )
        torch.cuda.synchronize()


@torch.inference_mode()
def measure_sizes(place: ForwardPlace) -> list[ForwardRow]:
    """Rows of each size, the smallest first. Raises `TooLarge` for what the memory cannot hold."""
    say(place.out, "machine", machine())
    rows = []
    for shape in sorted(place.sizes, key=lambda shape: shape.tokens):
        manifest = random_package(place.model, place.arch).manifest
        planned = plan(manifest, shape, NO_ENCODERS, place.free_bytes)
        for found in (evaluations(place, shape, planned), blocks(place, shape)):
            for row in found:
                say(place.out, "forward", asdict(row))
                rows.append(row)
            gc.collect()  # a denoiser and its residency hold each other
            if place.on_gpu:
                torch.cuda.empty_cache()
    return rows


# --- an evaluation


def evaluations(place: ForwardPlace, shape: ClipShape, planned: MemoryPlan) -> Iterator[ForwardRow]:
    """An evaluation launched, and as a graph where the plan has graphs."""
    size = name_of(shape)
    if place.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    weights = RandomWeights(random_package(place.model, place.arch), place.device)
    denoiser = PackagedDenoiser(weights, place.ops, partial(GraphedBlocks, record=place.record))
    latents, conditions = drawn_conditions(place, shape)
    velocity = denoiser.bind(conditions, RECIPE)
    time = grid(RECIPE.sampler, RECIPE.steps, RECIPE.shift).timesteps[0]
    run = partial(velocity, latents, range(shape.grid[0]), 0, time)
    denoiser.use_graphs(False)
    launched = run().clone()
    for way in WAYS if planned.rung.graphs else WAYS[:1]:
        denoiser.use_graphs(way == "graph")
        run()  # records a graph, so that the next run is one
        again = run()
        require(bool(again.isfinite().all()), f"{size}, {way}: not finite")
        require(torch.equal(again, launched), f"{size}, {way}: two equal runs differ")
        ms = place.clock(run)
        seconds = None if ms is None else ms / 1e3
        peak, planned_bytes = peak_bytes(place), planned.peaks["denoise"]
        yield ForwardRow(place.arch.name, size, way, seconds, None, peak, planned_bytes)
    denoiser.forget()


def peak_bytes(place: ForwardPlace) -> int | None:
    """The pool of the GPU at its largest, and all that this process has outside the pool."""
    if not place.on_gpu:
        return None
    outside = place.free_bytes - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    return outside + torch.cuda.max_memory_reserved()


def drawn_conditions(place: ForwardPlace, shape: ClipShape) -> tuple[Tensor, Conditions]:
    """Noise, and a clip whose prompt fills all 512 tokens."""
    time, height, width = shape.grid[0], shape.height // 8, shape.width // 8
    generator = torch.Generator(place.device).manual_seed(1)
    draw = partial(torch.randn, generator=generator, device=place.device)
    conditions = Conditions(
        draw(TEXT_TOKENS, place.model.text_dim),
        None,
        draw(VISION_TOKENS, place.model.clip_dim),
        draw(LATENT_CHANNELS, 1, height, width),
        draw(LATENT_CHANNELS, time, height // 2, width // 2),
    )
    return draw(LATENT_CHANNELS, time, height, width), conditions


# --- a block beside the plain one


@dataclass(frozen=True, slots=True)
class BlockScene:
    """The weights of one block of ours, and the inputs of blocks."""

    weights: fused.BlockWeights
    context_weights: fused.ContextWeights
    x: Tensor  # [S, D]
    modulation: Tensor  # [6, D]
    context: Context
    rope: Rope


def drawn_scene(place: ForwardPlace, shape: ClipShape) -> BlockScene:
    """Random weights and tokens, the same in every run."""
    weights = RandomWeights(random_package(place.model, place.arch), place.device)
    held = weights.read(name for name in weights.package.names if name.startswith("blocks.0."))
    generator = torch.Generator(place.device).manual_seed(2)
    draw = partial(torch.randn, generator=generator, device=place.device)
    dim, time = place.model.dim, shape.grid[0]
    read = lambda name: held[f"blocks.0.{name}"]  # noqa: E731
    return BlockScene(
        fused.assemble(fused.BlockWeights, read),
        fused.assemble(fused.ContextWeights, read),
        draw(shape.tokens, dim),
        0.5 * draw(6, dim),
        Context(draw(TEXT_TOKENS, dim), draw(VISION_TOKENS, dim)),
        rope_tables((time, shape.height // 16, shape.width // 16), True, place.device),
    )


def our_block(place: ForwardPlace, scene: BlockScene) -> Callable[[Tensor], Tensor]:
    """Runs one block on tokens [S, D], which it changes."""
    context = scene.context
    keys = fused.context_keys(place.ops, scene.context_weights, context.text, context.vision)
    modulation = fused.block_modulation(scene.weights, scene.modulation)
    return lambda x: fused.run_block(place.ops, scene.weights, keys, x, modulation, scene.rope)


def plain_block(place: ForwardPlace, scene: BlockScene) -> Block:
    """The block of `engine.models.dit` that the weights of a scene stand for, in BF16 on a GPU."""
    weights, context = scene.weights, scene.context_weights
    dtype = torch.bfloat16 if place.on_gpu else torch.float32
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
    for field, names in fused.LINEARS.items():  # random weights are not smoothed
        linear: fused.Weight = getattr(context if field in ("text", "vision") else weights, field)
        values = linear.rows.dequantize()
        values = rotate(values) if linear.form.rotated else values
        parts = values.chunk(len(names)), linear.bias.chunk(len(names))
        for name, matrix, bias in zip(names, *parts, strict=True):
            held[f"{name}.weight"], held[f"{name}.bias"] = matrix.to(dtype), bias.to(dtype)
    block.load_state_dict({name: t.to(place.device) for name, t in held.items()}, assign=True)
    return block.requires_grad_(False).eval()


def blocks(place: ForwardPlace, shape: ClipShape) -> Iterator[ForwardRow]:
    """A block of ours and the plain one, both times the layers of the model."""
    scene = drawn_scene(place, shape)
    plain, ours = plain_block(place, scene), our_block(place, scene)

    def run_plain() -> Tensor:
        with sdpa_kernel([*BACKENDS], set_priority=True):
            return plain(scene.x, scene.modulation, scene.context, scene.rope)

    error = relative_error(ours(scene.x.clone()) - scene.x, run_plain() - scene.x)
    require(error <= UPDATE_LIMIT, f"{name_of(shape)}: a block is off by {error:.1e}")
    held = scene.x.clone()

    def run_ours() -> Tensor:
        return ours(
            held.copy_(scene.x)
        )  # a block adds to its input; the copy is 1 % of its traffic

    works = {"our block": run_ours, "plain block": run_plain}
    for what, times in interleaved(works, place.clock).items():
        seconds = place.model.layers * statistics.median(times) / 1e3 if times else None
        off = error if what == "our block" else None
        yield ForwardRow(place.arch.name, name_of(shape), what, seconds, off)


# --- shown


def forward_table(rows: Sequence[ForwardRow]) -> str:
    heads = {"arch": "", "what": "", "seconds": ".2f", "error": ".3f", "peak MB": ".0f",
        "planned MB": ".0f"}  # fmt: skip
    lines = [
        (row.size, row.arch, row.what, row.seconds, row.error,
         *(None if count is None else count / 1e6 for count in (row.peak_bytes, row.planned_bytes)))
        for row in rows
    ]  # fmt: skip
    return columns(heads, lines)


def forward_figures(rows: Sequence[ForwardRow]) -> list[Figure]:
    """Seconds of all that has times, of which no spread is kept."""
    return [
        Figure(f"{row.arch} {row.size} {row.what}", row.seconds, "s", 0.0)
        for row in rows
        if row.seconds is not None
    ]


SUITE = Suite(measure_forward, forward_table, forward_figures)
