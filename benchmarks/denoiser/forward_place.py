"""Where `forward.py` measures: a GPU with our kernels on it, or a CPU with their references."""

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from benchmarks.kernel.gpu import load
from benchmarks.kernel.suite import current_stream
from benchmarks.random_package import form_of
from engine.config import SCAIL_14B, TINY, ModelConfig, state_dir
from engine.denoise.cuda_graphs import CudaGraphRecorder, GraphRecorder
from engine.errors import UnsupportedGpu
from engine.machine.gpu import find_gpu
from engine.machine.kernel_choice import attention_kernel, choose_variants, gemm_ways
from engine.memory import ClipShape
from kernels.arch import ARCHS, SM90, Arch
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, reference_ops
from kernels.trial import event_ms

SIZES = (ClipShape(416, 672, 81), ClipShape(512, 896, 81))
DRY_SIZES = (ClipShape(64, 96, 5),)
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
RUNS = 5

StepTimer = Callable[[Callable[[], object]], float | None]  # ms, the median of some runs


@dataclass(frozen=True, slots=True)
class ForwardPlace:
    """Where it runs, and with what."""

    arch: Arch
    device: torch.device
    model: ModelConfig
    ops: Ops
    capture: GraphRecorder
    sizes: Sequence[ClipShape]
    clock: StepTimer
    backends: Sequence[SDPBackend]
    free_bytes: int | None  # before this process touched the GPU; None: a CPU
    out: Path

    def say(self, step: str, **facts: object) -> None:
        line = json.dumps({"step": step} | facts)
        with self.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def name_of(shape: ClipShape) -> str:
    return f"{shape.height}x{shape.width}x{shape.frames}"


def median_of_runs(run: Callable[[], object]) -> float:
    run()
    return statistics.median(event_ms(run) for _ in range(RUNS))


def once(run: Callable[[], object]) -> None:
    """The clock of a machine whose times mean nothing."""
    run()


def rerun(run: Callable[[], object]) -> Callable[[], None]:
    """In place of a CUDA graph: what it would do is done again."""

    def replay() -> None:
        run()

    return replay


@contextmanager
def prepared(args: argparse.Namespace) -> Iterator[ForwardPlace]:
    """Raises `UnsupportedGpu` and what loading kernels raises."""
    if args.dry:
        cpu = torch.device("cpu")
        yield ForwardPlace(
            SM90, cpu, TINY, reference_ops(), rerun, DRY_SIZES, once, (SDPBackend.MATH,), None,
            args.out,
        )  # fmt: skip
        return
    gpu = find_gpu()
    arch = next((a for a in ARCHS if gpu is not None and a.capability == gpu.capability), None)
    if gpu is None or arch is None:
        has = "There is no GPU" if gpu is None else f"{gpu.name} is of no architecture known"
        raise UnsupportedGpu(f"{has} here. Use --dry to try the steps without.")
    device, cubins = torch.device("cuda:0"), [*load(args.folder).values()]
    torch.zeros(1, device=device)  # the context that the launcher shares
    form = form_of(arch)[1]
    with KernelBank([], arch, current_stream) as bank:
        codes = "".join(sorted(cubin.sha256 for cubin in cubins))
        digest, state = hashlib.sha256(codes.encode()).hexdigest(), state_dir()
        choices = choose_variants(cubins, digest, gpu, bank, device, state, event_ms)
        ways = gemm_ways(choices, {form.down, form.others})
        ops = native_ops(bank, arch, attention=attention_kernel(choices, "int8fp8"), gemm=ways)
        free = gpu.free_bytes or gpu.memory_bytes
        place = ForwardPlace(
            arch, device, SCAIL_14B, ops, CudaGraphRecorder(), SIZES, median_of_runs, BACKENDS,
            free, args.out,
        )  # fmt: skip
        place.say("variants", ops=[asdict(choice) for choice in choices.ops])
        yield place
        torch.cuda.synchronize()


def build(folder: Path, arch: Arch) -> int:
    """Writes the cubins that a package of this size would have; returns their bytes."""
    from engine.build.native import build_native  # its parts are not on a measuring machine

    folder.mkdir(parents=True, exist_ok=True)
    form, size = form_of(arch)[1], 0
    for cubin in build_native(SCAIL_14B, {form.down, form.others}, arch, state_dir()):
        (folder / f"{cubin.name}.cubin").write_bytes(cubin.data)
        (folder / f"{cubin.name}.json").write_text(json.dumps(cubin.record()))
        size += len(cubin.data)
    return size
