"""Decode a clip three ways in turn: the library's decoder, the plain one, the one on buffers.

python benchmarks/vae.py build DIR                 on a machine with the .venv: the norm's cubins
python benchmarks/vae.py run --cubins DIR          on a GPU machine: 81 frames of 512x896, BF16
python benchmarks/vae.py run                       on a CPU: a small clip and a narrow model, FP32

Weights are random. A run ends with all frames as bytes on the host. Results are compared before
times are taken; the last line is one JSON object. Without diffusers a line says how to get it, and
ours is held against the plain one. Needs torch, on a GPU no Triton.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernel.gpu import load
from benchmarks.kernel.peers import DIFFUSERS, PeerLibrary, interleaved, lacking
from benchmarks.kernel.suite import current_stream
from benchmarks.timing import WrongResult, require
from engine.config import LATENT_CHANNELS, VAE_STRIDE, state_dir
from engine.denoise.cuda_graphs import CudaGraphRecorder
from engine.media.framing import frames_to_u8
from engine.models.vae import LATENT_MEAN, LATENT_STD, Vae, in_layout
from engine.models.vae_decode import VaeDecoder, decode_bytes
from kernels.aot.compile import compile_kernels
from kernels.arch import ARCHS
from kernels.channel_norm import CHANNEL_NORM, channel_norm, channel_norm_reference
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

DecodeWay = Callable[
    [Tensor], Tensor
]  # latents [16, t, h, w] -> frames [T, H, W, 3] u8 on the host


def build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for arch in ARCHS:
        (folder / arch.name).mkdir(exist_ok=True)
        for cubin in compile_kernels([(s, arch) for s in CHANNEL_NORM.values()], state_dir()):
            path = folder / arch.name / f"{cubin.name}.cubin"
            path.write_bytes(cubin.data)
            path.with_suffix(".json").write_text(json.dumps(cubin.record()))


def random_vae(job: DecodeJob) -> Vae:
    torch.manual_seed(0)
    vae = Vae(job.model_width).to(job.device, job.dtype).requires_grad_(False)
    for weight in vae.parameters():
        weight.data = in_layout(weight)
    return vae


def library(vae: Vae, job: DecodeJob) -> DecodeWay:
    """As a user of diffusers has it, who knows nothing of layouts. Raises `ImportError`."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    theirs = AutoencoderKLWan(base_dim=job.model_width)
    weights = {name: weight.float().cpu() for name, weight in vae.state_dict().items()}
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    theirs.load_state_dict(convert_wan_vae_to_diffusers(weights), strict=True)
    theirs.eval()
    for tensor in theirs.parameters():  # `to` warns of modules that it does not have
        tensor.data = tensor.data.to(job.device, job.dtype)
    std, mean = (
        torch.tensor(row, device=job.device)[:, None, None, None]
        for row in (LATENT_STD, LATENT_MEAN)
    )

    @torch.inference_mode()
    def run(latents: Tensor) -> Tensor:
        z = (latents * std + mean).to(job.dtype)
        return frames_to_u8(theirs.decode(z[None], return_dict=False)[0][0]).cpu()

    return run


def ways(
    vae: Vae, job: DecodeJob, bank: KernelBank | None, peer: PeerLibrary
) -> Mapping[str, DecodeWay]:
    """The definition of correct first: the library's where it is, else the plain one."""
    norm = channel_norm_reference if bank is None else partial(channel_norm, bank)
    capture = CudaGraphRecorder() if job.device.type == "cuda" else None
    fast = VaeDecoder(vae, norm, frames_to_u8, capture)
    theirs = {} if lacking((peer,), on_gpu=True) else {"diffusers": library(vae, job)}
    return theirs | {
        "plain": lambda z: torch.cat([frames_to_u8(p).cpu() for p in vae.decode(z)]),
        "buffers": lambda z: torch.cat(list(fast.decode(z))),
    }


def measure(
    job: DecodeJob, bank: KernelBank | None, runs: int, peer: PeerLibrary = DIFFUSERS
) -> dict[str, object]:
    """Raises `WrongResult`. Without `peer` it has no times, and `missing` says how to get it."""
    vae = random_vae(job)
    size = job.height // VAE_STRIDE[1], job.width // VAE_STRIDE[2]
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(LATENT_CHANNELS, job.latents, *size, generator=generator).to(job.device)
    compared = ways(vae, job, bank, peer)
    first, peaks, frames = {}, {}, {}
    for name, way in compared.items():  # kernels are loaded, algorithms chosen, graphs captured
        frames[name], first[name], peaks[name] = timed(way, latents, job)
    truth, *others = compared
    want = frames[truth].float() - 127.5
    errors = {}
    for name in others:
        errors[name] = float((frames[name].float() - 127.5 - want).norm() / want.norm())
        require(errors[name] < LIMITS[job.dtype], f"{name}: relative error {errors[name]:.1e}")
    times = interleaved(compared, lambda way: timed(way, latents, job)[1], runs)
    ms = {name: statistics.median(found) for name, found in times.items()}
    return {
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu, one thread",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if job.device.type == "cuda" else None,
        "dtype": str(job.dtype),
        "model_width": job.model_width,
        "frames": list(frames["plain"].shape[:3]),
        "errors": errors,
        "first_ms": first,
        "ms": ms,
        "best_ms": {name: min(found) for name, found in times.items()},
        "missing": lacking((peer,), on_gpu=True),
        "faster_than_diffusers": ms["diffusers"] / ms["buffers"] if "diffusers" in ms else None,
        "faster_than_plain": ms["plain"] / ms["buffers"],
        "peak_bytes": peaks,
        "decode_bytes": decode_bytes(job.height, job.width, job.dtype, job.model_width),
    }


def timed(way: DecodeWay, latents: Tensor, job: DecodeJob) -> tuple[Tensor, float, int | None]:
    """Frames, ms, and on a GPU the most memory beside what was there before. On a CPU the time is
    that of the process: other programs do not count.
    """
    if job.device.type == "cpu":
        start = time.process_time()
        return way(latents), 1000 * (time.process_time() - start), None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    frames = way(latents)
    torch.cuda.synchronize()
    ms = 1000 * (time.perf_counter() - start)
    return frames, ms, torch.cuda.max_memory_allocated() - before


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("build").add_argument("folder", type=Path, metavar="DIR")
    runner = actions.add_parser("run")
    runner.add_argument("--cubins", type=Path, metavar="DIR", help="needed on a GPU")
    runner.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    if args.action == "build":
        build(args.folder)
        return
    job, bank = CPU, nullcontext()
    if torch.cuda.is_available():
        job, capability = GPU, torch.cuda.get_device_capability()
        arch = next((arch for arch in ARCHS if arch.capability == capability), None)
        if arch is None or args.cubins is None:
            sys.exit(f"error: compute capability {capability} needs --cubins and one of {ARCHS}.")
        torch.backends.cudnn.allow_tf32 = False
        torch.zeros(1, device=job.device)  # the context that the launcher shares
        bank = KernelBank(load(args.cubins / arch.name).values(), arch, current_stream)
    else:
        torch.set_num_threads(1)
    try:
        with bank as loaded:
            found = measure(job, loaded, args.runs)
            if found["missing"]:
                print(found["missing"])
            print(json.dumps(found))
    except WrongResult as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
