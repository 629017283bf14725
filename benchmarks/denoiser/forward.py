"""Suite `forward`: one evaluation of the 14B transformer on this GPU, beside other programs.

Weights are drawn on the GPU. Blocks of ours are held against the plain ones with the same weights
before a time is taken. A file gets a line of JSON after each step. Memory is compared with the
plan. `--dry` does the same on a CPU, tiny, without times.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.denoiser.forward_blocks import UPDATE_LIMIT, measure_blocks
from benchmarks.denoiser.forward_place import ForwardPlace, name_of, prepared
from benchmarks.denoiser.random_package import RandomWeights, random_package
from benchmarks.kernel.gpu import gpu_facts
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns, require
from engine.config import LATENT_CHANNELS, TEXT_TOKENS, ModelConfig
from engine.denoise.cuda_graphs import GraphedBlocks
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.sampler import grid
from engine.errors import TooLarge
from engine.flow import Conditions, Recipe
from engine.memory import VISION_TOKENS, ClipShape, EncoderBytes, MemoryPlan, plan

RECIPE = Recipe("euler", 4, 1.0, 5.0)
MEMORY_LIMIT = 0.05  # of the plan


@dataclass(frozen=True, slots=True)
class ForwardRow:
    """The times of one size; None where the machine gives no times."""

    arch: str
    size: str
    seconds: float | None  # of an evaluation by our kernels, the faster of launched and graph
    bf16_seconds: float | None  # of as many plain blocks in BF16
    times_bf16: float | None  # how much faster ours is


def measure_forward(
    kernels: Path | None = None, out: Path = Path("forward.jsonl"), *, dry: bool = False
) -> tuple[str, list[ForwardRow]]:
    """Raises `WrongResult` for a block or an evaluation that is wrong."""
    with prepared(kernels, out, dry) as place:
        rows = measure_sizes(place)
    return f"the plain block with the same weights, off by at most {UPDATE_LIMIT:g}", rows


@torch.inference_mode()
def measure_sizes(place: ForwardPlace) -> list[ForwardRow]:
    """A row for each size that this machine has the memory for, the smallest first."""
    place.say("machine", **gpu_facts())
    rows = []
    for shape in sorted(place.sizes, key=lambda shape: shape.tokens):
        encoders = EncoderBytes(0, 0, 0)  # not in this process
        free = place.free_bytes
        manifest = random_package(place.model, place.arch).manifest
        try:
            planned = plan(manifest, shape, encoders, 2**62 if free is None else free)
        except TooLarge as error:
            place.say("skipped", size=name_of(shape), why=str(error))
            continue
        ours = measure_evaluation(place, shape, planned)
        _give_back(place)
        plain = measure_blocks(place, shape)
        _give_back(place)
        faster = None if ours is None or plain is None else plain / ours
        rows.append(ForwardRow(place.arch.name, name_of(shape), ours, plain, faster))
        place.say("result", size=name_of(shape), seconds=ours, bf16_seconds=plain,
            times_bf16=faster)  # fmt: skip
    return rows


def tflop(model: ModelConfig, shape: ClipShape) -> float:
    """The work of one evaluation, keys of text and picture known (docs/reference/performance.md
    B).
    """
    tokens, dim = shape.tokens, model.dim
    products = 2 * tokens * dim * (6 * dim + 2 * model.ffn)
    attention = 4 * tokens * dim * (tokens + TEXT_TOKENS + VISION_TOKENS)
    return model.layers * (products + attention) / 1e12


def measure_evaluation(place: ForwardPlace, shape: ClipShape, planned: MemoryPlan) -> float | None:
    """Seconds of an evaluation, as a graph where the plan has graphs; says times and memory."""
    on_gpu = place.device.type == "cuda"
    begin = time.perf_counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    weights = RandomWeights(random_package(place.model, place.arch), place.device)
    denoiser = PackagedDenoiser(weights, place.ops, partial(GraphedBlocks, record=place.capture))
    place.say("weights", seconds=round(time.perf_counter() - begin, 1))
    latents, conditions = drawn_conditions(place, shape)
    velocity = denoiser.bind(conditions, RECIPE)
    told = grid(RECIPE.sampler, RECIPE.steps, RECIPE.shift).timesteps[0]
    run = partial(velocity, latents, range(shape.grid[0]), 0, told)
    work, found, last = tflop(place.model, shape), [], None
    for way in ("launched", "graph") if planned.rung.graphs else ("launched",):
        denoiser.use_graphs(way == "graph")
        result = run().clone()
        again = run().clone()  # recorded now, if it is a graph
        require(bool(again.isfinite().all()), f"{name_of(shape)}, {way}: not finite")
        require(torch.equal(result, again), f"{name_of(shape)}, {way}: two equal runs differ")
        same = last is None or torch.equal(result, last)
        require(same, f"{name_of(shape)}: the graph differs from its launches")
        last = result
        ms = place.clock(run)
        found += [] if ms is None else [ms / 1e3]
        rate = None if ms is None else round(work / ms * 1e3, 1)
        place.say("forward", size=name_of(shape), tokens=shape.tokens, way=way, ms=ms, tflops=rate)
    if on_gpu and place.free_bytes is not None:
        say_memory(place, shape, planned, place.free_bytes)
    denoiser.forget()
    return min(found, default=None)


def say_memory(place: ForwardPlace, shape: ClipShape, planned: MemoryPlan, free_bytes: int) -> None:
    """Says the most that the GPU held for this process: its pool at its largest, and all outside
    the pool.
    """
    outside = free_bytes - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    peak = outside + torch.cuda.max_memory_reserved()
    plan_bytes = planned.peaks["denoise"]
    place.say(
        "memory", size=name_of(shape), rung=planned.rung.does, planned_bytes=plan_bytes,
        peak_bytes=peak, allocated_bytes=torch.cuda.max_memory_allocated(),
        of_plan=round(peak / plan_bytes, 4), ok=abs(peak / plan_bytes - 1) <= MEMORY_LIMIT,
    )  # fmt: skip


def drawn_conditions(place: ForwardPlace, shape: ClipShape) -> tuple[Tensor, Conditions]:
    """Noise, and a clip whose prompt fills all 512 tokens."""
    time_, rows, columns_ = shape.grid[0], shape.height // 8, shape.width // 8
    randn = partial(torch.randn, generator=torch.Generator(place.device).manual_seed(1))
    draw = partial(randn, device=place.device)
    conditions = Conditions(
        draw(TEXT_TOKENS, place.model.text_dim),
        None,
        draw(VISION_TOKENS, place.model.clip_dim),
        draw(LATENT_CHANNELS, 1, rows, columns_),
        draw(LATENT_CHANNELS, time_, rows // 2, columns_ // 2),
    )
    return draw(LATENT_CHANNELS, time_, rows, columns_), conditions


def _give_back(place: ForwardPlace) -> None:
    gc.collect()  # a denoiser and its residency hold each other
    if place.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def forward_table(rows: Sequence[ForwardRow]) -> str:
    heads = {"arch": "", "seconds": ".2f", "BF16": ".2f", "times": ".2f"}
    lines = [(row.size, row.arch, row.seconds, row.bf16_seconds, row.times_bf16) for row in rows]
    return columns(heads, lines)


def forward_figures(rows: Sequence[ForwardRow]) -> list[Figure]:
    """Seconds of ours; each is a median of which no spread is kept."""
    return [
        Figure(f"{row.arch} {row.size} evaluation", row.seconds, "s", 0.0)
        for row in rows
        if row.seconds is not None
    ]


SUITE = Suite(measure_forward, forward_table, forward_figures)
