"""One evaluation of the 14B transformer on this GPU, beside plain PyTorch and diffusers.

python benchmarks/denoiser/forward.py build DIR --arch sm90    anywhere with the .venv: the kernels
python benchmarks/denoiser/forward.py run DIR --out FILE       on a GPU: no compiler, no weights
python benchmarks/denoiser/forward.py run --dry --out FILE     the same on a CPU, tiny, no times

Weights are drawn on the GPU. Blocks of ours are held against the plain ones with the same weights
before a time is taken. FILE gets a line of JSON after each step. Memory is compared with the plan.
"""

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.denoiser.forward_blocks import measure_blocks
from benchmarks.denoiser.forward_place import ForwardPlace, build, name_of, prepared
from benchmarks.kernel.gpu import machine
from benchmarks.random_package import RandomWeights, random_package
from benchmarks.timing import WrongResult, require
from engine.config import LATENT_CHANNELS, TEXT_TOKENS, ModelConfig
from engine.denoise.cuda_graphs import GraphedBlocks
from engine.denoise.packaged import PackagedDenoiser
from engine.denoise.sampler import grid
from engine.errors import EngineError, TooLarge
from engine.flow import Conditions, Recipe
from engine.memory import VISION_TOKENS, ClipShape, EncoderBytes, MemoryPlan, plan
from kernels.arch import ARCHS, SM90, Arch
from kernels.launch import DriverError

RECIPE = Recipe("euler", 4, 1.0, 5.0)
MEMORY_LIMIT = 0.05  # of the plan
FASTER = (1.3, 1.75)  # than the BF16 model: floor, goal
# seconds of a forward by architecture and size: floor, goal (docs/reference/performance.md F4)
SECONDS = {
    ("sm90", "512x896x81"): (4.0, 3.0),
    ("sm89", "512x896x81"): (9.0, 7.0),
    ("sm89", "416x672x81"): (4.2, 3.3),
    ("sm120", "512x896x81"): (6.5, 5.0),
    ("sm120", "416x672x81"): (3.0, 2.35),
}


def tflop(model: ModelConfig, shape: ClipShape) -> float:
    """Of one evaluation, keys of text and picture known (docs/reference/performance.md B)."""
    tokens, dim = shape.tokens, model.dim
    products = 2 * tokens * dim * (6 * dim + 2 * model.ffn)
    attention = 4 * tokens * dim * (tokens + TEXT_TOKENS + VISION_TOKENS)
    return model.layers * (products + attention) / 1e12


def measure_forward(place: ForwardPlace, shape: ClipShape, planned: MemoryPlan) -> float | None:
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
    work, found, last = tflop(place.model, shape), {}, None
    for way in ("launched", "graph") if planned.rung.graphs else ("launched",):
        denoiser.use_graphs(way == "graph")
        result = run().clone()
        again = run().clone()  # recorded now, if it is a graph
        require(bool(again.isfinite().all()), f"{name_of(shape)}, {way}: not finite")
        require(torch.equal(result, again), f"{name_of(shape)}, {way}: two equal runs differ")
        same = last is None or torch.equal(result, last)
        require(same, f"{name_of(shape)}: the graph differs from its launches")
        last = result
        found[way] = ms = place.clock(run)
        rate = None if ms is None else round(work / ms * 1e3, 1)
        place.say("forward", size=name_of(shape), tokens=shape.tokens, way=way, ms=ms, tflops=rate)
    if on_gpu and place.free_bytes is not None:
        say_memory(place, shape, planned, place.free_bytes)
    denoiser.forget()
    best = [ms / 1e3 for ms in found.values() if ms is not None]
    return min(best, default=None)


def say_memory(place: ForwardPlace, shape: ClipShape, planned: MemoryPlan, free_bytes: int) -> None:
    """The most that the GPU held for this process: its pool at its largest, and all outside it."""
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
    time_, rows, columns = shape.grid[0], shape.height // 8, shape.width // 8
    randn = partial(torch.randn, generator=torch.Generator(place.device).manual_seed(1))
    draw = partial(randn, device=place.device)
    conditions = Conditions(
        draw(TEXT_TOKENS, place.model.text_dim),
        None,
        draw(VISION_TOKENS, place.model.clip_dim),
        draw(LATENT_CHANNELS, 1, rows, columns),
        draw(LATENT_CHANNELS, time_, rows // 2, columns // 2),
    )
    return draw(LATENT_CHANNELS, time_, rows, columns), conditions


@torch.inference_mode()
def measure(place: ForwardPlace) -> None:
    place.say("machine", **{k: v for k, v in machine().items() if k != "step"})
    for shape in place.sizes:
        encoders = EncoderBytes(0, 0, 0)  # not in this process
        free = place.free_bytes
        manifest = random_package(place.model, place.arch).manifest
        try:
            planned = plan(manifest, shape, encoders, 2**62 if free is None else free)
        except TooLarge as error:
            place.say("skipped", size=name_of(shape), why=str(error))
            continue
        ours = measure_forward(place, shape, planned)
        _give_back(place)
        plain = measure_blocks(place, shape)
        _give_back(place)
        place.say("result", size=name_of(shape), **verdict(place.arch, shape, ours, plain))


def verdict(
    arch: Arch, shape: ClipShape, ours: float | None, plain: float | None
) -> Mapping[str, object]:
    """How the times stand to floor and goal; None where there is no time or no such figure."""
    faster = None if ours is None or plain is None else plain / ours
    seconds = SECONDS.get((arch.name, name_of(shape)))
    reached: list[bool | None] = [None, None]
    if ours is not None and faster is not None and seconds is not None:
        reached = [ours <= s and faster >= f for s, f in zip(seconds, FASTER)]
    return {
        "seconds": ours, "bf16_seconds": plain, "times_bf16": faster,
        "floor": reached[0], "goal": reached[1],
    }  # fmt: skip


def _give_back(place: ForwardPlace) -> None:
    gc.collect()  # a denoiser and its residency hold each other
    if place.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    builder = actions.add_parser("build")
    builder.add_argument("folder", type=Path, metavar="DIR")
    builder.add_argument("--arch", choices=[a.name for a in ARCHS], default=SM90.name)
    runner = actions.add_parser("run")
    runner.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="of `build`")
    runner.add_argument("--out", type=Path, default=Path("forward.jsonl"), metavar="FILE")
    runner.add_argument("--dry", action="store_true", help="on the CPU, by references, tiny")
    args = parser.parse_args(argv)
    if args.action == "build":
        arch = next(a for a in ARCHS if a.name == args.arch)
        print(f"{build(args.folder, arch) / 2**20:.1f} MiB of cubins in {args.folder}")
        return
    if args.folder is None and not args.dry:
        parser.error("the folder of `build` is needed, or --dry")
    try:
        with prepared(args) as place:
            measure(place)
    except (WrongResult, EngineError, DriverError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
