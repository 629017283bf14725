"""Suite `vae`: a clip decoded by the plain decoder and by the one on buffers, in turns.

On a GPU: 81 frames of 512x896 in BF16. On a CPU: a small clip and a narrow model in FP32. Weights
are random. A run ends with all frames as bytes on the host. Needs torch, on a GPU no Triton.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel.cubins import compiled, load
from benchmarks.kernel.gpu import current_stream, here
from benchmarks.record import Figure, Suite
from benchmarks.timing import columns, interleaved, require, spread
from engine.config import LATENT_CHANNELS, VAE_STRIDE
from engine.denoise.cuda_graphs import CudaGraphRecorder
from engine.media.framing import frames_to_u8
from engine.models.vae import Vae, in_layout
from engine.models.vae_decode import VaeDecoder
from kernels.channel_norm import channel_norm, channel_norm_reference
from kernels.launch import KernelBank

LIMITS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}  # of the relative error, in bytes


@dataclass(frozen=True, slots=True)
class DecodeJob:
    device: torch.device
    dtype: torch.dtype
    model_width: int
    height: int
    width: int
    latents: int


GPU = DecodeJob(torch.device("cuda:0"), torch.bfloat16, 96, 512, 896, 21)
CPU = DecodeJob(torch.device("cpu"), torch.float32, 24, 96, 128, 4)

DecodeWay = Callable[[Tensor], Tensor]  # latents [16, t, h, w] -> frames [T, H, W, 3] u8, the host


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One way to decode the clip."""

    way: str  # "plain": `Vae.decode`; "buffers": `VaeDecoder`
    frames: tuple[int, ...]  # number, height, width
    ms: float  # median
    noise_ms: float
    error: float  # relative, against the plain decoder
    peak_bytes: int | None  # beside weights and latents; None on a CPU


def measure_vae(kernels: Path | None = None, runs: int = 5) -> tuple[str, list[DecodeRow]]:
    """Raises `WrongResult`."""
    checked = "the plain decoder"
    if not torch.cuda.is_available():
        return checked, decode_rows(CPU, None, runs)
    arch = here()
    torch.backends.cudnn.allow_tf32 = False
    torch.zeros(1, device=GPU.device)  # the context that the launcher shares
    cubins = compiled(arch) if kernels is None else load(kernels)
    with KernelBank(cubins.values(), arch, current_stream) as bank:
        return checked, decode_rows(GPU, bank, runs)


def decode_rows(job: DecodeJob, bank: KernelBank | None, runs: int) -> list[DecodeRow]:
    """Times both ways to decode and compares their frames. Raises `WrongResult`."""
    size = job.height // VAE_STRIDE[1], job.width // VAE_STRIDE[2]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(LATENT_CHANNELS, job.latents, *size, generator=generator).to(job.device)
    ways = decode_ways(random_vae(job), job, bank)
    first = {name: timed(way, latents, job) for name, way in ways.items()}
    times = interleaved(ways, lambda way: timed(way, latents, job)[1], runs)
    want = first["plain"][0].float() - 127.5
    rows = []
    for name, (frames, _, peak) in first.items():
        error = float((frames.float() - 127.5 - want).norm() / want.norm())
        require(error < LIMITS[job.dtype], f"{name}: relative error {error:.1e}")
        ms, noise = spread(times[name]) or (0.0, 0.0)
        rows.append(DecodeRow(name, tuple(frames.shape[:3]), ms, noise, error, peak))
    return rows


def random_vae(job: DecodeJob) -> Vae:
    torch.manual_seed(0)
    vae = Vae(job.model_width).to(job.device, job.dtype).requires_grad_(False)
    for weight in vae.parameters():
        weight.data = in_layout(weight)
    return vae


def decode_ways(vae: Vae, job: DecodeJob, bank: KernelBank | None) -> dict[str, DecodeWay]:
    """The definition of correct first."""
    norm = channel_norm_reference if bank is None else partial(channel_norm, bank)
    capture = CudaGraphRecorder() if job.device.type == "cuda" else None
    fast = VaeDecoder(vae, norm, frames_to_u8, capture)
    return {
        "plain": lambda z: torch.cat([frames_to_u8(p).cpu() for p in vae.decode(z)]),
        "buffers": lambda z: torch.cat(list(fast.decode(z))),
    }


def timed(way: DecodeWay, latents: Tensor, job: DecodeJob) -> tuple[Tensor, float, int | None]:
    """Frames, ms, and on a GPU the most memory beside what was there before.

    On a CPU the time is that of the process: other programs do not count.
    """
    if job.device.type == "cpu":
        start = time.process_time()
        return way(latents), 1000 * (time.process_time() - start), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    frames = way(latents)  # on the host when it returns
    ms = 1000 * (time.perf_counter() - start)
    return frames, ms, torch.cuda.max_memory_allocated() - before


def vae_table(rows: Sequence[DecodeRow]) -> str:
    heads = {"ms": ".0f", "+-": ".0f", "error": ".1e", "peak bytes": ",d"}
    lines = [(row.way, row.ms, row.noise_ms, row.error, row.peak_bytes) for row in rows]
    return columns(heads, lines, "x".join(map(str, rows[0].frames)))


def vae_figures(rows: Sequence[DecodeRow]) -> list[Figure]:
    return [Figure(f"{row.way} {row.frames}", row.ms, "ms", row.noise_ms) for row in rows]


SUITE = Suite(measure_vae, vae_table, vae_figures)
