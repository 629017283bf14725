"""From files to a pipeline that is ready for its first job."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine.binding import Denoiser
from engine.capture import capture_skeleton
from engine.conditioning import Encoders
from engine.denoiser import PackagedDenoiser
from engine.errors import MissingModel, UnsupportedGpu
from engine.exact import ExactDenoiser
from engine.gpu import arch_of, find_gpu, require_cudnn, require_driver
from engine.graphs import CudaCapture, GraphedSteps
from engine.manifest import PROMPTS
from engine.models.attention import find_attention
from engine.models.checkpoint import Checkpoint
from engine.models.locate import IMAGE_ENCODER, TEXT_ENCODER, VAE, find_model
from engine.models.lora import Lora
from engine.models.stored_prompts import StoredPrompts, load_prompts
from engine.models.text import embed_prompts
from engine.models.vae import load_vae
from engine.models.vision import VisionEncoder
from engine.package import Package, find_packages, open_package
from engine.pipeline import Pipeline
from engine.pose.extract import PoseExtractor
from engine.pose.networks import Networks
from engine.source import Capture
from engine.upload import Weights
from engine.variants import attention_kernel, choose_variants, gemm_ways
from kernels.arch import ARCHS, Arch
from kernels.attention import FORMS, variants
from kernels.launch import KernelBank
from kernels.ops import Ops, native_ops, plain_attention, reference_ops
from kernels.trial import event_ms

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


DEFAULT_ATTENTION = "int8fp8"  # of packages: of the 8-bit forms the more exact


@dataclass(frozen=True, slots=True)
class Settings:
    """How the models are run."""

    device: torch.device
    precision: str  # a key of PRECISIONS
    attention: str | None  # None: the default of what is loaded
    state: Path  # what can be recomputed is kept here

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


def load_exact(
    checkpoint: Path,
    loras: Sequence[tuple[Path, float]],
    models: Path,
    networks: Networks,
    settings: Settings,
) -> Pipeline:
    """The plain PyTorch model of a checkpoint, and the other models from a models folder.

    All files are found and checked before the first weight is read, but for the motion capture
    `networks`: not every job needs them.
    """
    attention = find_attention(settings.attention or "sdpa")
    opened = Checkpoint(checkpoint, loras=[Lora(path, strength) for path, strength in loras])
    found = _find_models(models)
    denoiser = ExactDenoiser(opened, settings.device, settings.dtype, attention)
    return _pipeline(denoiser, found, None, networks, settings)


def load_package(path: Path, models: Path, networks: Networks, settings: Settings) -> Pipeline:
    """A package, or the one of a folder of packages that fits the GPU, and the other models.

    Without a GPU the references compute what the kernels of any package do. Raises what
    `find_gpu`, `arch_of`, `require_driver` and `open_package` raise, all before weights are read.
    """
    attention = settings.attention or DEFAULT_ATTENTION
    if settings.device.type == "cuda":
        package, ops = _native(path, attention, settings)
        graphed = partial(GraphedSteps, capture=CudaCapture())
    else:
        package = open_package(path)
        arch = next(arch for arch in ARCHS if arch.name == package.manifest.arch)
        ops, graphed = _references(attention, arch), None
    has_prompts = package.manifest.prompts is not None
    stored = load_prompts(package.path / PROMPTS) if has_prompts else None
    found = _find_models(models, needs_text=stored is None)
    with ThreadPoolExecutor(1, "encoders") as pool:  # they load while the transformer streams
        encoders = pool.submit(_encoders, found, stored, settings)
        denoiser = PackagedDenoiser(Weights(package, settings.device), ops, graphed)
        return Pipeline(denoiser, encoders.result(), _capture(networks, settings))


def _native(path: Path, attention: str, settings: Settings) -> tuple[Package, Ops]:
    """The package for this GPU, and its kernels on it."""
    gpu = find_gpu()
    if gpu is None:
        raise UnsupportedGpu("PyTorch sees a GPU and the CUDA driver shows none. Restart.")
    arch = arch_of(gpu, [name for name, _ in find_packages(path)])
    package = open_package(path, arch)
    require_driver(gpu, package.manifest.driver)
    require_cudnn(torch.backends.cudnn.version())
    device = settings.device
    torch.zeros(1, device=device)  # makes the context that the bank shares
    bank = KernelBank([], arch, lambda: torch.cuda.current_stream(device).cuda_stream)
    digest, state = package.digest, settings.state
    choices = choose_variants(package.kernels, digest, gpu, bank, device, state, event_ms)
    form = attention if attention in FORMS else DEFAULT_ATTENTION
    dtypes = (
        {torch.int8, torch.float8_e4m3fn}
        if package.manifest.weights == "mixed"
        else {torch.float8_e4m3fn}
    )
    ops = native_ops(
        bank, arch, attention=attention_kernel(choices, form), gemm=gemm_ways(choices, dtypes)
    )
    return package, _with_attention(ops, attention)


def _references(attention: str, arch: Arch) -> Ops:
    form = attention if attention in FORMS else DEFAULT_ATTENTION
    return _with_attention(reference_ops(variants(form, arch)[0]), attention)


def _with_attention(ops: Ops, attention: str) -> Ops:
    """The same, or with an attention of 16 bits if it is called by its name."""
    return ops if attention in FORMS else plain_attention(ops, find_attention(attention))


@dataclass(frozen=True, slots=True)
class _Found:
    """Where the models beside the transformer are."""

    folder: Path
    text: Path
    vision: Path
    vae: Path


def _find_models(models: Path, needs_text: bool = True) -> _Found:
    """Raises `MissingModel`. A text encoder that may never be asked is missed when it is."""
    try:
        text = find_model(models, TEXT_ENCODER)
    except MissingModel:
        if needs_text:
            raise
        text = models / TEXT_ENCODER.folders[0] / TEXT_ENCODER.names[0]
    return _Found(models, text, find_model(models, IMAGE_ENCODER), find_model(models, VAE))


def _pipeline(
    denoiser: Denoiser,
    found: _Found,
    stored: StoredPrompts | None,
    networks: Networks,
    settings: Settings,
) -> Pipeline:
    return Pipeline(denoiser, _encoders(found, stored, settings), _capture(networks, settings))


def _encoders(found: _Found, stored: StoredPrompts | None, settings: Settings) -> Encoders:
    device, dtype = settings.device, settings.dtype
    torch.backends.cudnn.allow_tf32 = False  # FP32 convolutions shall be FP32
    # UMT5 overflows in FP16 (spec/encoders.md 2.3)
    text_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    return Encoders(
        text=partial(
            embed_prompts,
            encoder=found.text,
            models=found.folder,
            cache=settings.state / "prompts",
            device=device,
            dtype=text_dtype,
            stored=stored,
        ),
        vision=VisionEncoder(found.vision, device, dtype),
        vae=load_vae(found.vae, device, dtype),
    )


def _capture(networks: Networks, settings: Settings) -> Capture:
    return partial(capture_skeleton, PoseExtractor(networks, settings.state))
