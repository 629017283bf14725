"""Starts a program phase by phase: `cold_start.suite` runs this in a process of its own.

python benchmarks/cold_start/worker.py BEGAN WAY [PATH...]

Ways: torch, engine, worker, safetensors, read.

BEGAN is the parent's `time.monotonic()` before it started this process, so that the interpreter is
a phase too. It prints its times as one line of JSON, then the files that are in use as another. At
the top nothing is imported that a phase is.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

READY = "encoders awaited"  # the phase after which a pipeline takes its first job
SERVING = "platform awaited"  # the phase after which a worker asks the platform for one
SMALL = (64, 64, 5)  # height, width, frames of the first forward on a CPU
FULL = (512, 896, 81)  # on a GPU, unless the model is tiny


class Laps:
    """Phases that follow each other without a gap, so that they add up to the whole."""

    def __init__(self, began: float) -> None:
        self.began = self._last = began
        self.ms: dict[str, float] = {}

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self.ms[phase] = self.ms.get(phase, 0.0) + 1000 * (now - self._last)
        self._last = now

    def around(self, before: str, phase: str, work: Callable[P, T]) -> Callable[P, T]:
        """Makes a phase of a function; what was done since the last one is the phase `before`."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            self.end(before)
            found = work(*args, **kwargs)
            self.end(phase)
            return found

        return timed


def start_torch(laps: Laps) -> None:
    """Imports PyTorch, which no program that uses it can do without."""
    importlib.import_module("torch")
    laps.end("import torch")


def start_engine(laps: Laps, package: str, models: str, state: str) -> None:
    """Loads a package as a worker does, and evaluates the transformer once."""
    start_torch(laps)
    import torch

    from engine import load, program
    from engine.pose.networks import Networks

    laps.end("import engine")
    watch_loading(laps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if device.type == "cuda" else "fp32"
    settings = program.ModelSettings(device, precision, None, Path(state))
    networks = Networks(Path(models), device, Path(state))
    choice = program.choose_package(Path(package), device)
    pipeline = load.load_package(choice, Path(models), networks, settings)
    laps.end(READY)
    evaluate(pipeline)
    laps.end("first forward")


def watch_loading(laps: Laps) -> None:
    """Puts a clock around the functions that loading calls, in the thread that loads."""
    from engine import load, program

    opened, chosen = program.open_package, program.choose_variants
    program.open_package = laps.around("GPU found", "package opened", opened)
    program.choose_variants = laps.around("CUDA context", "kernels loaded", chosen)
    denoiser = laps.around("models found", "weights read and copied", load.PackagedDenoiser)
    load.PackagedDenoiser = denoiser  # pyright: ignore[reportAttributeAccessIssue]


def start_worker(laps: Laps, package: str, models: str, state: str) -> None:
    """Starts the worker itself, `handler.py`, until it asks the platform for its first job."""
    given = {"SCAIL_PACKAGE": package, "SCAIL_MODELS": models, "SCAIL_STATE": state}
    os.environ.update(given, SCAIL_ALLOW_CPU="1")
    handler = importlib.import_module("handler")  # the program, whose layer is this one's

    def imported(_redact: object) -> None:
        """Stands where the worker begins to log, once all is imported but the platform."""
        from engine.worker import renderer

        laps.end("import engine and torch")
        watch_loading(laps)
        renderer._warm = laps.around(READY, "first clip, of nothing", renderer._warm)

    import_runpod = handler.import_runpod

    def platform() -> ModuleType:
        found = import_runpod()
        found.serverless.start = lambda _config: laps.end(SERVING)
        return found

    vars(handler).update(log_as_json=imported, import_runpod=platform)
    handler.main()
    laps.end("ended")


def evaluate(pipeline: object) -> None:
    """Runs one evaluation for drawn conditions. Numbers that are not finite end the process."""
    import torch

    from engine.config import LATENT_CHANNELS, TEXT_TOKENS, TINY
    from engine.denoise.packaged import PackagedDenoiser
    from engine.denoise.sampler import grid
    from engine.flow import Conditions, Recipe
    from engine.pipeline import Pipeline

    assert isinstance(pipeline, Pipeline) and isinstance(pipeline.denoiser, PackagedDenoiser)
    model, device = pipeline.denoiser.config, pipeline.denoiser.device
    full = device.type == "cuda" and model != TINY
    height, width, frames = FULL if full else SMALL
    time_, rows, columns = (frames - 1) // 4 + 1, height // 8, width // 8

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    text = torch.zeros(TEXT_TOKENS, model.text_dim)
    text[:20] = randn(20, model.text_dim)
    conditions = Conditions(
        text,
        None,
        randn(257, model.clip_dim),
        randn(LATENT_CHANNELS, 1, rows, columns),
        randn(LATENT_CHANNELS, time_, rows // 2, columns // 2),
    )
    recipe = Recipe("euler", 4, 1.0, 5.0)
    velocity = pipeline.denoiser.bind(conditions, recipe)
    latents = randn(LATENT_CHANNELS, time_, rows, columns).to(device)
    told = grid(recipe.sampler, recipe.steps, recipe.shift).timesteps[0]
    if not velocity(latents, range(time_), 0, told).isfinite().all():
        sys.exit("the first forward is not finite")


def start_safetensors(laps: Laps, weights: str) -> None:
    """Loads the same weights as others do. No hash is checked; every page is touched."""
    start_torch(laps)
    import torch
    from safetensors.torch import load_file

    laps.end("import safetensors")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = load_file(weights, device)
    for tensor in held.values():
        tensor.view(-1).view(torch.uint8)[::4096].sum().item()
    laps.end("weights read and copied")


def start_read(laps: Laps, package: str) -> None:
    """Reads the weights alone, hashed, without torch, to nowhere: what disk and hashes allow."""
    from engine.package.manifest import MANIFEST, WEIGHTS, decode
    from engine.package.stream import Piece, stream

    manifest = Path(package, MANIFEST)
    entries = decode(manifest.read_bytes(), manifest)[0].tensors
    laps.end("package opened")
    pieces = [Piece(entry.name, entry.offset, entry.nbytes, entry.sha256) for entry in entries]
    stream(Path(package, WEIGHTS), pieces, lambda _piece, _bytes: None)
    laps.end("weights read")


WAYS: dict[str, Callable[..., None]] = {
    "torch": start_torch,
    "engine": start_engine,
    "worker": start_worker,
    "safetensors": start_safetensors,
    "read": start_read,
}


def files_in_use() -> Iterator[str]:
    """The files of this process: its modules and what it has mapped."""
    for module in [*sys.modules.values()]:
        for name in ("__file__", "__cached__"):
            if isinstance(path := getattr(module, name, None), str):
                yield path
    for line in (
        Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    ):
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            yield fields[5]


def main() -> None:
    laps = Laps(float(sys.argv[1]))
    laps.end("interpreter")
    WAYS[sys.argv[2]](laps, *sys.argv[3:])
    total_ms = 1000 * (time.monotonic() - laps.began)
    print(json.dumps({"ms": laps.ms, "total_ms": total_ms}), flush=True)
    files = {os.path.realpath(path) for path in files_in_use() if Path(path).is_file()}
    print(json.dumps(sorted(files)), flush=True)


if __name__ == "__main__":
    main()
