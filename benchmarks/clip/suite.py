"""Suite `clip`: a job from its files to the MP4, stage by stage, for each recipe and size.

A clip's time begins with the download and ends with the finished file: the wall clock of what a
worker does for a job, but for motion capture, its queue, and sending the answer. The first run does
not count: it meets a prompt that nobody embedded yet and memory that was never touched.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.clip.rows import ClipRow, clip_figures, clip_pictures, clip_table
from benchmarks.clip.scene import Loaded, fetch, load, served, write_media
from benchmarks.clip.stages import FETCH, FORWARDS, STAGES, Spans, stages, timed_pipeline
from benchmarks.record import Suite
from benchmarks.timing import Row, require
from engine.config import VAE_STRIDE
from engine.denoise.windows import evaluations
from engine.errors import BadRequest
from engine.flow import Clip, Recipe, Request, Settings
from engine.jobs.wire import Internet
from engine.machine.heap import keep_freed_memory
from engine.media.framing import check_size, trim_to_whole_latents
from engine.media.video import probe_video, read_video
from engine.recipes import NEGATIVE_PROMPT, PROMPT, RECIPES
from engine.stage_dump import StageDump

FrameSize = tuple[int, int]  # height, width

SIZES: tuple[FrameSize, ...] = ((96, 64), (160, 96))  # for one core; upright, as the demo's picture
FRAMES, RUNS = 5, 3
KNOWN: Mapping[str, Recipe] = {f"{name}": row for name, row in RECIPES["preview"].items()}
NOISE_MS, NOISE_SHARE = 50.0, 0.05  # between two clocks around the same work


@dataclass(frozen=True, slots=True)
class ClipRun:
    """The times and the memory of one clip."""

    wall_ms: float
    stages_ms: dict[str, float]
    forward_ms: tuple[float, ...]
    peak_mib: float


def measure_clip(
    package: Path | None = None,
    models: Path | None = None,
    *,
    sizes: Sequence[FrameSize] = SIZES,
    frames: int = FRAMES,
    recipes: Sequence[str] = tuple(KNOWN),
    runs: int = RUNS,
) -> tuple[str, list[ClipRow]]:
    """Says how the clips were checked, and gives a row for each.

    Raises `BadRequest` for what cannot be asked, what loading and the pipeline raise, and
    `WrongResult` if a clip is not what was asked, or if its stages do not add up to its wall clock.
    """
    _check_asked(sizes, frames, recipes)
    with TemporaryDirectory(prefix="scail-clip-") as name:
        folder = Path(name)
        write_media(folder / "media", frames)
        if not torch.cuda.is_available():
            keep_freed_memory()  # as the worker and the command line do
        loaded = load(folder, package, models)
        with served(folder / "media") as network:
            bench = Bench(loaded, folder, network)
            rows = [bench.row(recipe, size, frames, runs) for size in sizes for recipe in recipes]
    return "frames and size of every MP4, stages against wall clocks", rows


def _check_asked(sizes: Sequence[FrameSize], frames: int, recipes: Sequence[str]) -> None:
    for height, width in sizes:
        check_size(height, width)
    for recipe in recipes:
        if recipe not in KNOWN:
            raise BadRequest(f"There is no recipe {recipe!r}. Choose of: {', '.join(KNOWN)}.")
    if trim_to_whole_latents(frames) != frames:
        whole = trim_to_whole_latents(frames)
        raise BadRequest(f"{frames} frames fill no whole latents; ask for {whole} or {whole + 4}.")


class Bench:
    """Owns the loaded models while clips are timed."""

    def __init__(self, loaded: Loaded, folder: Path, network: Internet) -> None:
        self._loaded, self._folder, self._network = loaded, folder, network

    def row(self, recipe: str, size: FrameSize, frames: int, runs: int) -> ClipRow:
        """Makes a run that does not count, then `runs` more."""
        self._run(recipe, size, frames)
        found = [self._run(recipe, size, frames) for _ in range(runs)]
        middle = sorted(found, key=lambda run: run.wall_ms)[(runs - 1) // 2]
        seconds = [run.wall_ms / 1000 for run in found]
        times = []
        for name in STAGES:
            ms = [run.stages_ms[name] for run in found]
            times.append(Row(name, middle.stages_ms[name], min(ms), max(ms), runs))
        threads, gpu = torch.get_num_threads(), self._loaded.gpu
        device = gpu or f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        return ClipRow(
            recipe, self._loaded.weights, *size, frames, device, runs,
            middle.wall_ms / 1000, min(seconds), max(seconds),
            tuple(times), middle.forward_ms, max(run.peak_mib for run in found),
            "RSS" if gpu is None else "GPU memory",
        )  # fmt: skip

    def _run(self, recipe: str, size: FrameSize, frames: int) -> ClipRun:
        loaded, on_gpu = self._loaded, self._loaded.gpu is not None
        spans = Spans(torch.cuda.synchronize if on_gpu else bool)
        with TemporaryDirectory(dir=self._folder, prefix="job-") as name:
            job, out = Path(name), Path(name, "clip.mp4")
            pipeline = timed_pipeline(loaded.pipeline, spans)
            reset_peak(on_gpu)
            start = time.monotonic()
            with spans(FETCH):
                image, motion = fetch(job, self._network)
            settings = Settings(
                KNOWN[recipe], PROMPT, NEGATIVE_PROMPT,
                seed=1, height=size[0], width=size[1], frames=frames,
            )  # fmt: skip
            request = Request(image, motion, "video", settings)
            clip = pipeline.run(request, out, "benchmark", StageDump(None))
            wall_ms = 1000 * (time.monotonic() - start)
            peak = peak_mib(on_gpu)
            check_clip(clip, size, frames)
        found = stages(spans, clip.timings_ms)
        check_sum(found, wall_ms)
        forwards = tuple(spans.of(FORWARDS))
        want = evaluations(KNOWN[recipe], 1 + (frames - 1) // VAE_STRIDE[0])
        right = len(forwards) == want
        require(right, f"{recipe}: {len(forwards)} evaluations were timed, {want} belong to it")
        return ClipRun(wall_ms, found, forwards, peak)


def check_clip(clip: Clip, size: FrameSize, frames: int) -> None:
    """Raises `WrongResult` unless the file holds what was asked for, made in one go."""
    info = probe_video(clip.path)
    held = sum(len(chunk) for chunk in read_video(info))
    found = (held, info.height, info.width)
    require(found == (frames, *size), f"The MP4 holds {found}, asked were {(frames, *size)}")
    once = not clip.notes
    require(once, f"The clip was begun twice, so stages have no times: {' '.join(clip.notes)}")


def check_sum(stages_ms: Mapping[str, float], wall_ms: float) -> None:
    """Raises `WrongResult` if two clocks disagree by more than noise."""
    noise_ms = max(NOISE_MS, NOISE_SHARE * wall_ms)
    added = sum(stages_ms.values())
    adds_up = abs(added - wall_ms) <= noise_ms
    require(adds_up, f"The stages add up to {added:.0f} ms, the wall clock says {wall_ms:.0f}")
    least = min(stages_ms, key=lambda name: stages_ms[name])
    fits = stages_ms[least] >= -noise_ms
    require(fits, f"{least}: {stages_ms[least]:.0f} ms are left for it by what it contains")


def reset_peak(on_gpu: bool) -> None:
    """Forgets the most memory so far. Raises `OSError` if the system does not let it."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mib(on_gpu: bool) -> float:
    """The most since `reset_peak`: tensors on the GPU, or pages of this process in memory."""
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    held = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    require(held is not None, "/proc/self/status does not say VmHWM")
    assert held is not None
    return int(held[1]) / 1024


SUITE = Suite(measure_clip, clip_table, clip_figures, clip_pictures)
