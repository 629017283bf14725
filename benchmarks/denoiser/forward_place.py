"""A place to measure the transformer: a GPU with our kernels, or a CPU with their references."""

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from benchmarks.denoiser.random_package import form_of
from benchmarks.kernel.cubins import compiled, load
from benchmarks.kernel.gpu import current_stream, here, run_once, say
from engine.config import SCAIL_14B, TINY, ModelConfig, state_dir
from engine.denoise.cuda_graphs import CudaGraphRecorder, GraphRecorder
from engine.machine.gpu import find_gpu
from engine.machine.kernel_choice import attention_kernel, choose_variants, gemm_ways
from engine.memory import ClipShape
from kernels.arch import SM90, Arch
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, reference_ops
from kernels.trial import event_ms

SIZES = (ClipShape(512, 896, 81), ClipShape(416, 672, 81))
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
    """A device, and everything that runs the transformer on it."""

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

    @property
    def dtype(self) -> torch.dtype:
        """The numbers that plain models are measured in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, step: str, **facts: object) -> None:
        say(self.out, step, facts)


def name_of(shape: ClipShape) -> str:
    return f"{shape.height}x{shape.width}x{shape.frames}"


def median_of_runs(run: Callable[[], object]) -> float:
    run()
    return statistics.median(event_ms(run) for _ in range(RUNS))


def rerun(run: Callable[[], object]) -> Callable[[], None]:
    """Stands for a CUDA graph on a CPU: what it would do is done again."""

    def replay() -> None:
        run()

    return replay


@contextmanager
def prepared(kernels: Path | None, out: Path, dry: bool) -> Iterator[ForwardPlace]:
    """`kernels`: what `run.py cubins` wrote, else they are compiled; `out` gets a line a step.

    Raises `UnsupportedGpu` and what loading kernels raises.
    """
    if dry:
        cpu = torch.device("cpu")
        yield ForwardPlace(
            SM90, cpu, TINY, reference_ops(), rerun, DRY_SIZES, run_once, (SDPBackend.MATH,), None,
            out,
        )  # fmt: skip
        return
    arch, gpu, device = here(), find_gpu(), torch.device("cuda:0")
    assert gpu is not None
    cubins = [*(compiled(arch) if kernels is None else load(kernels)).values()]
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
            free, out,
        )  # fmt: skip
        place.say("variants", ops=[asdict(choice) for choice in choices.ops])
        yield place
        torch.cuda.synchronize()
